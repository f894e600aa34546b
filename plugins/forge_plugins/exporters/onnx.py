"""The network as an ONNX file for onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginError, PluginInfo, Run, hookimpl

if TYPE_CHECKING:
    from forge_plugins.clients import reading, verification
    from forge_plugins.interchange import onnx_graph
    from forge_plugins.mathematics.networks import llama
else:
    llama = LazyModule("forge_plugins.mathematics.networks.llama")
    reading = LazyModule("forge_plugins.clients.reading")
    verification = LazyModule("forge_plugins.clients.verification")
    onnx_graph = LazyModule("forge_plugins.interchange.onnx_graph")

WORST = 5e-2  # relative L2: onnxruntime may round activations of INT2 weights once more


@dataclass(frozen=True, kw_only=True)
class OnnxConfig:
    """How the ternary weights stand in the file."""

    weights: Annotated[
        Literal["matmul_nbits", "int2", "matmul_integer"],
        Meta(
            description="matmul_nbits: two bits, onnxruntime's own operator; int2: two bits, "
            "standard operators only (opset 25); matmul_integer: a byte each, exact sums"
        ),
    ] = "matmul_nbits"
    verify: Annotated[
        bool, Meta(description="load the file in onnxruntime, where installed, and compare")
    ] = True


class Onnx:
    """The network as an ONNX file for onnxruntime.

    Writes `model.onnx`, then asks onnxruntime for its outputs.
    """

    info = PluginInfo(
        name="onnx",
        kind=Kind.EXPORTERS,
        config=OnnxConfig,
        requires=("model:ternary", "model:onnx"),
        alternatives="packed_ternary and state_dict (weights: applied) hold any levels, and "
        "state_dict any network",
    )

    def __init__(self, config: OnnxConfig) -> None:
        self.config = config

    @hookimpl
    def check_export(self, run: Run) -> str | None:
        """Another architecture, and layers that the encoding cannot hold."""
        try:
            _ = onnx_graph.check_onnx(run.model, self.config.weights)
        except ValueError as error:
            return str(error)
        return None

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the file and load it again.

        Raises:
            PluginError: the model is of another architecture, has no ternary layer or layers that
                the encoding cannot hold, or onnxruntime computes something else.
        """
        file = folder / "model.onnx"
        try:
            opset = onnx_graph.write_onnx(run.active_model, self.config.weights, file)
        except ValueError as error:
            raise PluginError(f"onnx: {error}") from error
        return {
            "format": f"onnx {self.config.weights}",
            "opset": opset,
            "step": run.progress.step,
            "bytes": file.stat().st_size,
            "verified": self._verified(run, file),
        }

    def _verified(self, run: Run, file: Path) -> dict[str, Any]:
        if not self.config.verify:
            return verification.NOT_ASKED
        model = run.active_model
        meant = onnx_graph.onnx_numbers(model, self.config.weights)
        result = reading.compared_weights(reading.ONNX_WEIGHTS, file, meant)
        samples = 4 if isinstance(model, llama.Llama) else 64  # a sequence has a row for each token
        inputs = verification.sample_inputs(run.data.validation(), samples, None)
        return result | verification.verify(
            verification.ONNXRUNTIME, file, inputs, run.active_model, worst=WORST
        )
