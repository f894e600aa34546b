"""Checkpoints of the caller's model and optimizer that the default `torch.load` takes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forge_kernel.api import RunError
from forge_kernel.embedding import ConfigError, write_bytes


class CheckpointManager:
    """`checkpoint_step_N.pt` files of plain types, which the default `torch.load` takes.

    Written beside and renamed, so that a file is whole or not there. (`TrainingLoop.train` keeps
    the kernel's own checkpoints, from which a run goes on to the bit.)

    Args:
        checkpoint_dir: made when the first file is written.
        max_checkpoints: newest ones kept.
    """

    def __init__(self, checkpoint_dir: str | Path, max_checkpoints: int = 5) -> None:
        if max_checkpoints < 1:
            raise ConfigError(f"max_checkpoints is {max_checkpoints}, at least 1 is needed")
        self.checkpoint_dir = Path(checkpoint_dir)
        self.max_checkpoints = max_checkpoints

    def save_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        scheduler: Any = None,
        metrics: Mapping[str, Any] | None = None,
        step: int = 0,
        epoch: int = 0,
    ) -> Path:
        """Write one, drop those beyond the number kept."""
        stream = io.BytesIO()
        held = {
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": None if optimizer is None else optimizer.state_dict(),
            "scheduler_state_dict": None if scheduler is None else scheduler.state_dict(),
            "metrics": {str(name): _number(value) for name, value in (metrics or {}).items()},
            "step": int(step),
            "epoch": int(epoch),
        }
        torch.save(held, stream)
        self.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        file = self.checkpoint_dir / f"checkpoint_step_{step}.pt"
        write_bytes(file, stream.getvalue())
        for old in self.checkpoints()[: -self.max_checkpoints]:
            old.unlink()
        return file

    def checkpoints(self) -> list[Path]:
        """The files, oldest first."""
        result = [
            file
            for file in self.checkpoint_dir.glob("checkpoint_step_*.pt")
            if file.stem.rpartition("_")[2].isdecimal()
        ]
        return sorted(result, key=lambda file: int(file.stem.rpartition("_")[2]))

    def get_latest_checkpoint(self) -> Path | None:
        """The newest file, or None."""
        result = self.checkpoints()
        return result[-1] if result else None

    def load_checkpoint(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        path: str | Path | None = None,
    ) -> dict[str, Any]:
        """Bring the objects to the state of a file, the newest one unless told.

        Returns:
            `metrics`, `step` and `epoch`.

        Raises:
            RunError: there is none.
        """
        file = self.get_latest_checkpoint() if path is None else Path(path)
        if file is None or not file.is_file():
            raise RunError(f"there is no checkpoint {path or f'in {self.checkpoint_dir}'}")
        held = torch.load(file, map_location="cpu")
        model.load_state_dict(held["model_state_dict"])
        for target, name in ((optimizer, "optimizer"), (scheduler, "scheduler")):
            if target is not None and held[f"{name}_state_dict"] is not None:
                target.load_state_dict(held[f"{name}_state_dict"])
        return {name: held[name] for name in ("metrics", "step", "epoch")}


def _number(value: Any) -> Any:
    """A metric as a plain number, so that the safe loader takes it."""
    return value.item() if hasattr(value, "item") else value
