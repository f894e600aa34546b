"""What an exported file computes in its real client, beside what the model computed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
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

TIMEOUT: Final = 900  # seconds for loading and a few hundred tokens
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
LLAMA_CPP: Final = Client("llama_cpp_logits", ("xllamacpp",), up_to_constant=True)
ONNXRUNTIME: Final = Client("onnxruntime_logits", ("onnxruntime",))


def reference_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """What the model gives in evaluation, on the CPU in fp32; the model itself is not touched."""
    copy = deepcopy(model).to("cpu", torch.float32).eval()
    with torch.no_grad():
        result: Tensor = main_output(copy(inputs))
    return result


def sample_inputs(validation: Iterable[Batch], samples: int, length: int | None) -> Tensor | None:
    """The first held-out inputs, cut to a few samples of at most `length` tokens.

    Batches are read until there are enough samples, while they are of one shape.
    """
    result: list[Tensor] = []
    for batch in validation:
        missing = samples - sum(len(part) for part in result)
        inputs: Tensor = batch.inputs[:missing].cpu()
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
        `relative_l2` (norm of the difference by norm of the reference), `top1_agreement` (share of
        rows with the same largest logit) and `rows`.

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
    return {
        "relative_l2": float(distance),
        "top1_agreement": float(same),
        "rows": reference.numel() // reference.shape[-1],
    }


def missing(client: Client) -> list[str]:
    """The client's packages that are not installed."""
    return [name for name in client.packages if find_spec(name) is None]


def answer_of(client: Client, export: Path, request: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a client answers to a request; both are tensors by name.

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
            command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT,
            check=False, env=surroundings,
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
        "top1_agreement": None,
        "rows": None,
        "note": f"not verified: {why}",
    }


NOT_ASKED: Final = not_verified("the setting verify is off")


def verify(
    client: Client, export: Path, inputs: Tensor | None, model: nn.Module, *, worst: float
) -> dict[str, Any]:
    """Run an export in its client and compare.

    Args:
        client: which.
        export: the file or folder.
        inputs: what to ask.
        model: what it was exported from.
        worst: relative L2 above which the export is refused.

    Returns:
        For the manifest: the client, the metrics (null where nothing was measured) and a note.

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
        metrics = agreement(
            result, reference_logits(model, inputs), up_to_constant=client.up_to_constant
        )
    except ValueError as error:
        raise PluginError(f"{client.packages[0]} does not agree: {error}") from error
    if metrics["relative_l2"] > worst:
        raise PluginError(
            f"{client.packages[0]} computes something else from {export.name}: relative L2 of the "
            f"logits {metrics['relative_l2']:.3g}, top-1 agreement {metrics['top1_agreement']:.3g}"
        )
    return {"client": f"{client.packages[0]} {_version(client)}", **metrics, "note": None}


def _version(client: Client) -> str:
    try:
        return version(client.packages[0])
    except PackageNotFoundError:
        return "of an unknown version"
