"""The memory of a step, counted: by hand for a small network, less with checkpointing."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel import load_pipeline, run
from forge_kernel.api import Kind
from forge_kernel.config.use import UseObserver
from forge_kernel.contract.values import Batch
from forge_plugins.observers.memory_profile import RECORD

BATCH = Batch(torch.randn(6, 4), torch.arange(6) % 3)


def profile(folder: Path, model: nn.Module, **config: Any) -> tuple[dict[str, Any], list[Any]]:
    told: list[Any] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        told.append(event)

    session = make_session(
        model, [BATCH] * 4, folder=folder, plugins=[make_plugin("ear", Kind.OBSERVERS, on_event=on_event)],
        uses={"observers": (UseObserver("memory_profile", config),)},
        optimizer=None, max_steps=4,
    )  # fmt: skip
    for _ in range(4):
        session.step(BATCH)
    record = json.loads((folder / "memory_profile.json").read_text())
    jsonschema.validate(record, RECORD)
    return record, told


@pytest.mark.spec("C13", "K7")
def test_each_part_is_what_counting_by_hand_gives(tmp_path: Path) -> None:
    """Planted faults: parameters among what is saved; a storage counted for each tensor of it."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3, bias=False))
    record, told = profile(tmp_path, model)
    weights = (4 * 5 + 5 + 5 * 3) * 4
    assert record["bytes"]["weights"] == weights
    assert record["bytes"]["gradients"] == weights
    assert record["bytes"]["buffers"] == record["bytes"]["optimizer"] == 0
    # the first layer keeps its input, the second its output, which the third keeps too
    assert record["layers"]["0"] == 6 * 4 * 4
    assert record["layers"]["1"] == 6 * 5 * 4
    assert "2" not in record["layers"]
    assert record["layers"]["(rest)"] >= 6 * 3 * 4  # the loss keeps the logarithms of the shares
    assert record["bytes"]["saved_for_backward"] == sum(record["layers"].values())
    assert (record["step"], record["samples"]) == (2, 6)
    assert [event.name for event in told] == ["memory_profile"]
    assert told[0].facts == record["bytes"]


def test_the_step_and_the_depth_are_chosen_and_no_hook_is_left(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 5), nn.Tanh()), nn.Linear(5, 3))
    record, _ = profile(tmp_path, model, step=3, depth=1)
    assert record["step"] == 3
    assert set(record["layers"]) == {"0", "(rest)"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_in_the_step_leaves_no_hook(tmp_path: Path) -> None:
    class Failing(nn.Linear):
        calls = 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 2:
                raise ValueError("planted")
            return super().forward(inputs)

    model = nn.Sequential(Failing(4, 3))
    named = load_pipeline("smoke", ["observers=[{use: memory_profile}]"])
    bare = dataclasses.replace(named, quantizer=None, exporters=(), callbacks=(), gradients=())
    with pytest.raises(ValueError, match="planted"):
        run(
            bare, model=model, data=[(BATCH.inputs, BATCH.targets)] * 3,
            output_dir=tmp_path / "r", quiet=True,
        )  # fmt: skip
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.spec("K6")
def test_checkpointing_shows_in_it(tmp_path: Path) -> None:
    def saved(name: str, wrappers: str) -> int:
        settings = [
            "observers=[{use: memory_profile}]", f"wrappers={wrappers}", "run.max_steps=2",
            "exporters=[{use: state_dict}]", "quantizer=null",
        ]  # fmt: skip
        run(load_pipeline("bitnet_grokfast", settings), output_dir=tmp_path / name, quiet=True)
        record = json.loads((tmp_path / name / "memory_profile.json").read_text())
        return int(record["bytes"]["saved_for_backward"])

    assert saved("kept", "[{use: activation_checkpointing}]") < 0.6 * saved("plain", "[]")
