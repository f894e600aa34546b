"""A model's outputs for inputs that it has not seen."""

from __future__ import annotations

import torch
from torch import Tensor

from forge_kernel.api import TrainedRun


def predict(run: TrainedRun, inputs: Tensor, *, batch_size: int = 256) -> Tensor:
    """The model's outputs, batch by batch; see `TrainedRun.predict`.

    Args:
        run: any whose model answers with one tensor, or with an object that has it as `logits`.
        inputs: shape (samples, ...).
        batch_size: samples at a time.

    Returns:
        Shape (samples, ...), fp32, on the CPU.

    Raises:
        ValueError: there is no sample, or the model answers otherwise.
    """
    if not len(inputs):
        raise ValueError("there is no sample to predict for")
    device = next(run.model.parameters()).device
    parts = []
    with torch.no_grad():
        for batch in torch.split(inputs, batch_size):
            outputs = run.model(batch.to(device))
            outputs = getattr(outputs, "logits", outputs)
            if not isinstance(outputs, Tensor):
                raise ValueError(f"the model answers with {type(outputs).__name__}, no tensor")  # noqa: TRY004  a network of the user's
            parts.append(outputs.float().cpu())
    return torch.cat(parts)
