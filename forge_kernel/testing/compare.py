"""Whether two checkpoints hold the same run, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file


def _raw(file: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().numpy().tobytes())
        if str(tensor.dtype) != "torch.bfloat16"
        else (str(tensor.dtype), tuple(tensor.shape), tensor.float().numpy().tobytes())
        for name, tensor in load_file(file).items()
    }


def _plain_state(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["progress"].pop("seconds")
    latest = state["metrics"]["latest"]  # other metrics may be of the clock or of the system
    known = ("loss", "learning_rate", "grad_norm")
    state["metrics"]["latest"] = {name: latest[name] for name in known if name in latest}
    return state


def differences(left: Path, right: Path) -> list[str]:
    """What differs between two checkpoint folders, times apart; empty when nothing does."""
    result: list[str] = []
    for file in ("model.safetensors", "state.safetensors"):
        mine, theirs = _raw(left / file), _raw(right / file)
        if mine.keys() != theirs.keys():
            result.append(f"{file}: other tensors: {sorted(mine.keys() ^ theirs.keys())}")
        result += [
            f"{file}: {name} differs"
            for name in sorted(mine.keys() & theirs.keys())
            if mine[name] != theirs[name]
        ]
    mine_state, their_state = _plain_state(left), _plain_state(right)
    result += [
        f"state.json: {name} differs: {mine_state.get(name)} / {their_state.get(name)}"[:400]
        for name in sorted(mine_state.keys() | their_state.keys())
        if mine_state.get(name) != their_state.get(name)
    ]
    return result
