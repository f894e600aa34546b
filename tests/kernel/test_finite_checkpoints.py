"""Weights and memories that are no numbers: never kept, never the end of a completed run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin

from forge_kernel import resume, run
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import CheckpointError, NonFiniteError
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.storage.atomic_files import manifest_of
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.storage.manifest import write_manifest
from forge_kernel.training.guards.finite_check import non_finite_names, state_of_parameters

PLAIN = ("observers=null", "exporters=null", "callbacks=null", "run.save_every=2")


def smoke(*settings: str) -> Any:
    return load_pipeline("smoke", [*PLAIN, "run.max_steps=12", *settings])


def injector(place: str, value: float, at: int) -> Any:
    """A callback that writes a value into one place after the update of a step, once."""

    def on_weights(self: Any, run: Any, step: Any) -> None:
        if step.number != at or getattr(self, "done", False):
            return
        self.done = True
        name, parameter = next(iter(run.parameters.items()))
        del name
        if place == "weight":
            parameter.data.view(-1)[0] = value
        elif place == "buffer":
            run.model.mark.fill_(value)
        else:
            run.optimizer.state[parameter][place].view(-1)[0] = value

    return make_plugin("injector", Kind.CALLBACKS, on_weights=on_weights)


def kept(folder: Path) -> list[int]:
    """The steps of a run's checkpoints, all of which are numbers."""
    store = CheckpointStore(folder / "checkpoints")
    for step in store.steps():
        snapshot = store.load(store.path(step))
        assert non_finite_names(snapshot.model) == []
        shapes = {tensor.shape for tensor in snapshot.model.values()}
        memories = state_of_parameters(snapshot.trees["optimizer"], shapes)
        assert len(memories) >= 2
        assert non_finite_names(memories) == []
    return store.steps()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("more", [(), ("run.accumulate=3",), ("run.precision=bf16",)])
def test_what_is_no_number_after_an_update_is_not_kept(
    tmp_path: Path, place: str, value: float, more: tuple[str, ...]
) -> None:
    """Red when only gradients are looked at: they were finite."""
    plugin = injector(place, value, at=6)
    with pytest.raises(NonFiniteError, match=r"step [67]") as error:
        run(smoke(*more), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    del error
    assert kept(tmp_path / "r")[-1] == 4
    result = json.loads((tmp_path / "r" / "result.json").read_text())
    assert result["outcome"] == "failed"
    again = resume(tmp_path / "r", quiet=True, plugins=[injector(place, value, at=99)])
    assert again.outcome == "completed"


@pytest.mark.parametrize("place", ["weight", "exp_avg_sq"])
def test_skip_and_stop_end_the_run_and_rollback_goes_on(tmp_path: Path, place: str) -> None:
    with pytest.raises(NonFiniteError):
        run(
            smoke("run.non_finite=skip"),
            plugins=[injector(place, math.nan, 6)], output_dir=tmp_path / "s", quiet=True,
        )  # fmt: skip
    assert kept(tmp_path / "s")[-1] == 4
    result = run(
        smoke("run.non_finite=rollback"),
        plugins=[injector(place, math.nan, 6)], output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert result.outcome == "completed"
    assert kept(tmp_path / "r")[-1] == 12


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_weights_that_are_lost_are_not_called_those_of_a_step(tmp_path: Path, policy: str) -> None:
    """Red when the error says that the weights are those of step 6; skipping mends nothing."""
    with pytest.raises(NonFiniteError, match="The weights are lost") as error:
        run(
            smoke(f"run.non_finite={policy}", "run.save_every=null"),
            plugins=[injector("weight", math.nan, 6)], output_dir=tmp_path / "r", quiet=True,
        )  # fmt: skip
    assert "in step 7" in str(error.value)
    assert "windows in a row" not in str(error.value)


def test_off_goes_on_and_says_what_it_did_not_keep(tmp_path: Path) -> None:
    heard: list[Any] = []
    hooks = {
        "on_batch": lambda self, step: heard.append(step.number),
        "on_event": lambda self, event: heard.append((event.name, event.message[:57])),
    }
    result = run(
        smoke("run.non_finite=off", "optimizer.with.fused=false"),
        plugins=[injector("weight", math.nan, 6), make_plugin("ear", Kind.OBSERVERS, **hooks)],
        output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert result.outcome == "completed"
    assert kept(tmp_path / "r")[-1] == 4
    said = "The checkpoint was not written: not finite after step 6: "
    place = heard.index(("not_saved", said))
    assert (heard[place - 1], heard[place + 1]) == (6, 7), "told at once"
    assert said in (tmp_path / "r" / "forge.log").read_text()


def test_no_run_without_a_folder_completes_with_weights_that_are_none() -> None:
    from kernel_parts import make_session
    from torch import nn

    from forge_kernel.api import Batch

    data = [Batch(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))] * 9
    plugin = injector("weight", math.inf, at=9)
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_buffer("mask", torch.full((3,), -math.inf))  # the first by name and by place
    session = make_session(model, data, plugins=[plugin], max_steps=9)
    session.train()
    with pytest.raises(NonFiniteError, match="at the end, after step 9"):
        session.finish()


def test_a_mask_of_infinities_is_as_it_should_be(tmp_path: Path) -> None:
    """Red when every buffer must be finite."""
    from torch import nn

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.register_buffer("mask", torch.full((3,), -math.inf))
            self.register_buffer("mark", torch.zeros(3))

        def forward(self, inputs: torch.Tensor) -> Any:
            return self.inner(inputs)

    file = tmp_path / "p.yaml"
    file.write_text(
        "forge: 1\nrun: {name: t, device: cpu, max_steps: 4, save_every: 1}\n"
        "optimizer: {use: sgd, with: {lr: 0.1}}\nloss: {use: cross_entropy}\n"
    )
    data = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
    result = run(file, model=Masked(), data=data, output_dir=tmp_path / "a", quiet=True)
    assert result.outcome == "completed"
    with pytest.raises(NonFiniteError, match="mark"):
        run(
            file, model=Masked(), data=data, output_dir=tmp_path / "b", quiet=True,
            plugins=[injector("buffer", math.nan, at=2)],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "spoils", "tried"),
    [
        ("on_batch", {6: 1}, [*range(1, 7), *range(5, 13)]),
        ("on_batch", {6: 2}, [*range(1, 7), 5, 6, *range(3, 13)]),  # 4 leads to the same end
        ("on_batch", {6: 1, 9: 1}, [*range(1, 7), *range(5, 10), *range(9, 13)]),
        ("on_batch", {1: 2}, [1, 1, *range(1, 13)]),  # there is none before the start
        ("on_weights", {6: 1}, [*range(1, 7), *range(5, 13)]),  # seen at once, not in step 7
    ],
)
def test_a_rollback_goes_to_the_newest_checkpoint_that_leads_further(
    tmp_path: Path, hook: str, spoils: dict[int, int], tried: list[int]
) -> None:
    """Red when the newest one is tried ten times: its weights are finite and lead nowhere."""
    steps: list[int] = []
    drawn: list[float] = []

    def spoil(run: Any, step: Any) -> None:
        if steps.count(step.number) <= spoils.get(step.number, 0):
            with torch.no_grad():
                next(iter(run.parameters.values())).view(-1)[0] = math.nan

    def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
        steps.append(step.number)
        drawn.append(float(torch.rand(())))
        if hook == "on_batch":
            spoil(run, step)

    def on_weights(self: Any, run: Any, step: Any) -> None:
        if hook == "on_weights":
            spoil(run, step)

    plugin = make_plugin("trap", Kind.CALLBACKS, on_batch=on_batch, on_weights=on_weights)
    result = run(
        smoke("run.non_finite=rollback", "run.keep_checkpoints=5"),
        plugins=[plugin], output_dir=tmp_path / "r", quiet=True,
    )  # fmt: skip
    assert result.outcome == "completed"
    assert steps == tried
    assert len(set(drawn)) == len(drawn), "the random streams go on, as the data do"
    assert kept(tmp_path / "r")[-1] == 12


def test_rollbacks_end_where_none_helps(tmp_path: Path) -> None:
    """The data go on: each rollback meets another batch."""
    from kernel_parts import make_session
    from torch import nn

    from forge_kernel.api import Batch

    good = [Batch(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    bad = [Batch(torch.full((4, 3), math.nan), torch.zeros(4, dtype=torch.int64))] * 20
    session = make_session(
        nn.Linear(3, 3), [*good, *bad], folder=tmp_path, non_finite="rollback", save_every=1
    )
    with pytest.raises(NonFiniteError, match="after 10 rollbacks"):
        session.train()
    progress = session.run.progress
    assert (progress.step, progress.rollbacks) == (1, 10)  # what 2 led to is known


def test_an_older_checkpoint_with_a_nan_in_it_is_not_chosen(tmp_path: Path) -> None:
    """Red when what a kernel of before has kept unseen is believed."""
    folder = tmp_path / "r"
    run(smoke("run.max_steps=4"), output_dir=folder, quiet=True)
    newest = folder / "checkpoints/step-4"
    from safetensors.torch import load_file, save_file

    tensors = load_file(newest / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = math.nan
    save_file(tensors, newest / "model.safetensors")
    manifest = json.loads((newest / "manifest.json").read_text())
    (newest / "manifest.json").unlink()
    del manifest["finite"]
    write_manifest(newest, {**manifest, "files": manifest_of(newest)})
    store = CheckpointStore(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="holds a NaN"):
        store.load(newest)
    assert store.newest()[0].step == 2


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([1.0, math.nan]),
        torch.tensor([math.inf], dtype=torch.bfloat16),
        torch.tensor([complex(0, math.nan)]),
        torch.tensor([1.0, math.nan]).to(torch.float8_e4m3fn),
        torch.tensor([[0.0, math.inf]]).to_sparse(),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
def test_each_kind_of_number_is_looked_at(tensor: torch.Tensor) -> None:
    fine = {"a": torch.ones(3), "b": torch.arange(3), "c": torch.zeros(0), "d": torch.ones(()) > 0}
    assert non_finite_names({**fine, "bad": tensor}) == ["bad"]
    assert non_finite_names(fine) == []
