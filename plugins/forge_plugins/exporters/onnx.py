"""The network as an ONNX file for onnxruntime."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from msgspec import Meta

from forge_kernel.api import (
    Batch,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    Step,
    hookimpl,
)

if TYPE_CHECKING:
    import numpy as np
    import torch

    from forge_plugins.clients import reading, verification
    from forge_plugins.interchange import onnx_export, onnx_layers
else:
    np = LazyModule("numpy")
    torch = LazyModule("torch")
    reading = LazyModule("forge_plugins.clients.reading")
    verification = LazyModule("forge_plugins.clients.verification")
    onnx_export = LazyModule("forge_plugins.interchange.onnx_export")
    onnx_layers = LazyModule("forge_plugins.interchange.onnx_layers")

WORST: Final = 5e-2  # relative L2: a client may round activations once more
INSTALL: Final = "pip install 'forge-kernel[onnx]'"
ROWS: Final = 64  # compared; a sequence has a row for each token


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """How the quantized weights stand in the file."""

    weights: Annotated[
        Literal["matmul_nbits", "int2", "matmul_integer"],
        Meta(
            description="how weights, packed at their bits, are multiplied: matmul_nbits: by "
            "onnxruntime's own operator; int2: dequantized by standard operators only (opset 25 "
            "for INT2); matmul_integer: by 8-bit integer operators, with exact sums"
        ),
    ] = "matmul_nbits"
    verify: Annotated[
        bool, Meta(description="load the file in onnxruntime, where installed, and compare")
    ] = True


class Onnx:
    """The network as an ONNX file for onnxruntime.

    Writes `model.onnx` by torch's own exporter, any network that `torch.export` can follow, with
    the quantized weights packed; then asks onnxruntime for its outputs.
    """

    info = PluginInfo(
        name="onnx",
        kind=Kind.EXPORTERS,
        config=OnnxConfig,
        requires=("model:quantized",),
        packages={"onnx": INSTALL, "onnxscript": INSTALL},
        alternatives="packed_ternary and state_dict (weights: applied) hold any levels, and "
        "state_dict any network",
    )

    def __init__(self, config: OnnxConfig) -> None:
        self.config = config
        self._awaits_batch = False
        self._first_inputs: Any = None

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """A forward pass that cannot be followed, and layers that the encoding cannot hold."""
        encoding = self.config.weights
        try:
            onnx_layers.check_layers(run.model, encoding)
            inputs = _example(run)
            self._awaits_batch = inputs is None
            if inputs is not None:
                _ = onnx_export.export_network(run.model, inputs, encoding, finished=False)
        except ValueError as error:
            return str(error)
        return None

    @hookimpl
    def on_batch(self, run: Run, step: Step, batch: Batch) -> None:
        """Keep the first inputs where no others tell what the network takes."""
        del run, step
        if not self._awaits_batch:
            return
        self._awaits_batch = False
        try:
            self._first_inputs = _samples(batch).cpu()
        except ValueError as error:
            raise PluginError(f"onnx: {error}") from error

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the file and load it again.

        Raises:
            PluginError: the forward pass cannot be followed, a layer is not on its levels yet, or
                onnxruntime computes something else.
        """
        network, file, files = self._written(run, folder, free_length=True)
        verified = self._verified(run, file, network)
        if network.free_length and not self._takes_other_lengths(run, file):
            network, file, files = self._written(run, folder, free_length=False)
            verified = self._verified(run, file, network)
        return {
            "format": f"onnx {self.config.weights}",
            "opset": network.opset,
            "step": run.progress.step,
            "bytes": sum(item.stat().st_size for item in files),
            "packed_weights": network.packed_weights,
            "packed_bytes": network.packed_bytes,
            "other_bytes": network.other_bytes,
            "any_length": network.free_length,
            "verified": verified,
        }

    def _written(
        self, run: Run, folder: Path, *, free_length: bool
    ) -> tuple[onnx_export.OnnxNetwork, Path, list[Path]]:
        try:
            network = onnx_export.export_network(
                run.active_model, self._inputs(run), self.config.weights, free_length=free_length
            )
        except ValueError as error:
            raise PluginError(f"onnx: {error}") from error
        files = onnx_export.write_network(network, folder / "model.onnx")
        return network, files[0], files

    def _inputs(self, run: Run) -> torch.Tensor:
        inputs = _example(run)
        inputs = self._first_inputs if inputs is None else inputs
        if inputs is None:
            raise ValueError(
                "the data has no validation set to take an example of the inputs from, and does "
                "not say their sizes: give it a validation set, or a `spec = "
                "DataSpec(features=...)`"
            )
        return inputs

    def _verified(self, run: Run, file: Path, network: onnx_export.OnnxNetwork) -> dict[str, Any]:
        if not self.config.verify:
            return verification.NOT_ASKED
        result = reading.compared_weights(reading.ONNX_WEIGHTS, file, network.numbers)
        return result | verification.verify(
            verification.ONNXRUNTIME, file, _compared(run), run.active_model, worst=WORST
        )

    def _takes_other_lengths(self, run: Run, file: Path) -> bool:
        """Whether the file also computes shorter sequences: some operators keep the first length.

        Where nothing can be asked, what torch says holds.
        """
        inputs = _compared(run) if self.config.verify else None
        if inputs is None or inputs.shape[1] < 3:
            return True
        shorter = inputs[:2, :-1]
        try:
            verification.verify(
                verification.ONNXRUNTIME, file, shorter, run.active_model, worst=WORST
            )
        except PluginError:
            return False
        return True


def _compared(run: Run) -> torch.Tensor | None:
    """Validation inputs for some `ROWS` rows of outputs."""
    inputs = verification.sample_inputs(run.data.validation(), ROWS, None)
    if inputs is None or inputs.is_floating_point():
        return inputs
    return inputs[: max(4, ROWS // max(1, inputs[0].numel()))]


def _example(run: Run) -> torch.Tensor | None:
    """Two samples to follow the forward pass with; no random number of the run is drawn for it.

    Returns:
        Of the validation set, or zeros of the sizes that the data tell; None: neither is known.

    Raises:
        ValueError: a batch has more than one tensor of inputs.
    """
    streams = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            batch = next(iter(run.data.validation()), None)
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
    if batch is not None:
        return _samples(batch)
    spec = run.data.spec
    if spec.vocabulary is not None and spec.sequence is not None:
        return torch.zeros(2, spec.sequence, dtype=torch.int64)
    if spec.shape is not None:
        return torch.zeros(2, *spec.shape)
    return None if spec.features is None else torch.zeros(2, spec.features)


def _samples(batch: Batch) -> torch.Tensor:
    """The first two samples of a batch; of packed texts, the tokens as one text.

    Raises:
        ValueError: it has more than one tensor of inputs.
    """
    inputs = batch.inputs
    if isinstance(inputs, Mapping) and inputs.keys() == {"input_ids", "position_ids"}:
        inputs = inputs["input_ids"]
    if not isinstance(inputs, torch.Tensor):
        raise ValueError(  # noqa: TRY004  a batch of the user's data
            f"the inputs of a batch are a {type(inputs).__name__}, and the file has one "
            "input tensor: give the model one tensor, or export with packed_ternary or state_dict"
        )
    return inputs[:2].detach()
