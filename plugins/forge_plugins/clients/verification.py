"""What an exported file computes in its real client, beside what the model computed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forge_kernel.api import Batch, PluginError
from forge_plugins.mathematics.metrics.label_positions import main_output

NOISE: Final = 4.0  # times the distance that another order of sums gives
TIMEOUT: Final = 900  # seconds for loading and a few hundred tokens
PATIENCE: Final = 2  # seconds more for each target that is asked about
INSTALL: Final = "pip install 'forge-kernel[clients]'"


@dataclass(frozen=True, slots=True)
class Client:
    """A program that can run an export.

    Args:
        module: of this package, that asks it.
        packages: distributions that it needs, the one with its version first.
        up_to_constant: whether it gives log-probabilities, which are logits but for one number in
            each row.
    """

    module: str
    packages: tuple[str, ...]
    up_to_constant: bool = False


TRANSFORMERS: Final = Client("transformers_logits", ("transformers", "accelerate"))
PEFT: Final = Client("peft_logits", ("peft", *TRANSFORMERS.packages))
LLAMA_CPP: Final = Client("llama_cpp_logits", ("xllamacpp",), up_to_constant=True)
LLAMA_CPP_TARGETS: Final = Client("llama_cpp_targets", LLAMA_CPP.packages)
ONNXRUNTIME: Final = Client("onnxruntime_logits", ("onnxruntime",))


def reference_logits(
    model: nn.Module, inputs: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """What the model gives in evaluation, on the CPU; the model itself is not touched."""
    copy = deepcopy(model).to("cpu", dtype).eval()
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    with torch.no_grad():
        result: Tensor = main_output(copy(inputs))
    return result


def rounding_noise(model: nn.Module, inputs: Tensor) -> float:
    """How far the logits move, in relative L2, when sums are rounded otherwise: fp32 to fp64.

    A network that rounds activations to levels takes a last bit for a whole level now and then,
    and passes that on from layer to layer. No two programs agree better on it than that.
    """
    double = reference_logits(model, inputs, torch.float64)
    return float(
        agreement(reference_logits(model, inputs), double, up_to_constant=True)["relative_l2"]
    )


def sample_inputs(validation: Iterable[Batch], samples: int, length: int | None) -> Tensor | None:
    """The first held-out inputs, cut to a few samples of at most `length` tokens.

    Batches are read until there are enough samples, while they are of one shape. Of inputs with
    names the tokens are taken: without positions a packed sequence is one text, for both sides.
    """
    result: list[Tensor] = []
    for batch in validation:
        missing = samples - sum(len(part) for part in result)
        named = isinstance(batch.inputs, Mapping)
        batch_inputs = batch.inputs.get("input_ids") if named else batch.inputs
        if batch_inputs is None:
            break
        inputs: Tensor = batch_inputs[:missing].cpu()
        if result and inputs.shape[1:] != result[0].shape[1:]:
            break
        result.append(inputs)
        if len(inputs) == missing:
            break
    if not result:
        return None
    whole = torch.cat(result)
    return whole if length is None else whole[:, :length]


def agreement(logits: Tensor, reference: Tensor, *, up_to_constant: bool) -> dict[str, Any]:
    """How near two sets of logits are.

    Args:
        logits: shape (..., classes).
        reference: the same shape.
        up_to_constant: compare them without the mean of each row.

    Returns:
        `relative_l2` (norm of the difference by norm of the reference), `median_relative_l2` (the
        same of each row, their median), `top1_agreement` (share of rows with the same largest
        logit) and `rows`.

    Raises:
        ValueError: another shape, or a value that is not finite.
    """
    if logits.shape != reference.shape or not bool(torch.isfinite(logits).all()):
        raise ValueError(
            f"it gave {tuple(logits.shape)} numbers (finite or not), the model {reference.shape}"
        )
    same = (logits.argmax(-1) == reference.argmax(-1)).double().mean()
    left, right = logits.double(), reference.double()
    if up_to_constant:
        left, right = (part - part.mean(-1, keepdim=True) for part in (left, right))
    norm = right.norm()
    distance = (left - right).norm() / norm if float(norm) else (left - right).norm()
    by_row = (left - right).norm(dim=-1) / right.norm(dim=-1).clamp(min=1e-300)
    return {
        "relative_l2": float(distance),
        "median_relative_l2": float(by_row.median()),
        "top1_agreement": float(same),
        "rows": reference.numel() // reference.shape[-1],
    }


def missing(client: Client) -> list[str]:
    """The client's packages that are not installed."""
    return [name for name in client.packages if find_spec(name) is None]


def answer_of(
    client: Client, export: Path, request: dict[str, Tensor], *, targets: int = 0
) -> dict[str, Tensor]:
    """What a client answers to a request; both are tensors by name.

    Args:
        client: which.
        export: the file or folder that it reads.
        request: as its module wants it.
        targets: how many it is asked about, which take it their time.

    Raises:
        PluginError: the client cannot run the export; with its words.
    """
    with tempfile.TemporaryDirectory() as place:
        asked, answer = Path(place) / "request.safetensors", Path(place) / "answer.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in request.items()}, asked)
        module = f"{__package__}.{client.module}"
        command = [sys.executable, "-m", module, str(export), str(asked), str(answer)]
        surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(  # noqa: S603  this interpreter, a module of ours
            command, capture_output=True, text=True, errors="replace",
            timeout=TIMEOUT + PATIENCE * targets, check=False, env=surroundings,
        )  # fmt: skip
        if done.returncode or not answer.is_file():
            message = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise PluginError(
                f"{client.packages[0]} cannot run {export.name} "
                f"(status {done.returncode}):\n{message}"
            )
        return load_file(answer)


def _ask(client: Client, export: Path, inputs: Tensor) -> Tensor:
    return answer_of(client, export, {"inputs": inputs})["logits"]


def not_verified(why: str) -> dict[str, Any]:
    """The manifest's entry where nothing was measured: no metric, and the reason."""
    return {
        "client": None,
        "relative_l2": None,
        "median_relative_l2": None,
        "top1_agreement": None,
        "rows": None,
        "note": f"not verified: {why}",
    }


NOT_ASKED: Final = not_verified("the setting verify is off")


def verify(
    client: Client,
    export: Path,
    inputs: Tensor | None,
    model: nn.Module,
    *,
    worst: float,
    rounded: Callable[[], nn.Module] | None = None,
) -> dict[str, Any]:
    """Run an export in its client and compare.

    A client that rounds activations otherwise than the training did is judged by what the model
    gives under the client's own rounding; how far both are from the training is told as well.

    Args:
        client: which.
        export: the file or folder.
        inputs: what to ask.
        model: what it was exported from.
        worst: relative L2 above which the export is refused, unless another order of sums moves the
            model itself as far (`rounding_noise`).
        rounded: gives the model that rounds as the client does; None: it rounds as `model`.

    Returns:
        For the manifest: the client, the metrics (null where nothing was measured) and a note;
        with `rounded`, the metrics under the client's rounding as `client_rounding`.

    Raises:
        PluginError: the client cannot run the export, or computes something else.
    """
    lacking = missing(client)
    if lacking or inputs is None:
        why = (
            f"{' and '.join(lacking)} is not installed ({INSTALL})"
            if lacking
            else "the data has no validation set to take inputs from"
        )
        return not_verified(why)
    inputs = inputs.float() if inputs.is_floating_point() else inputs  # exports compute in fp32
    result = _ask(client, export, inputs)
    try:
        metrics = _agreement(client, result, model, inputs)
        same = model if rounded is None else rounded()
        judged = metrics if rounded is None else _agreement(client, result, same, inputs)
    except ValueError as error:
        raise PluginError(f"{client.packages[0]} does not agree: {error}") from error
    if judged["relative_l2"] > worst:
        noise = judged["rounding_noise"] = rounding_noise(same, inputs)
        if judged["relative_l2"] > NOISE * noise:
            raise PluginError(
                f"{client.packages[0]} computes something else from {export.name}: relative L2 of "
                f"the logits {judged['relative_l2']:.3g} (another order of sums: {noise:.3g}), "
                f"top-1 agreement {judged['top1_agreement']:.3g}"
            )
    if rounded is not None:
        metrics["client_rounding"] = judged
    return {"client": f"{client.packages[0]} {_version(client)}", **metrics, "note": None}


def _agreement(client: Client, logits: Tensor, model: nn.Module, inputs: Tensor) -> dict[str, Any]:
    return agreement(logits, reference_logits(model, inputs), up_to_constant=client.up_to_constant)


def _version(client: Client) -> str:
    try:
        return version(client.packages[0])
    except PackageNotFoundError:
        return "of an unknown version"
