"""Memory that does not suffice: what the error says, and the same step in smaller micro-batches."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import nn

from forge_kernel import resume, run
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.errors import OutOfMemoryError, PlanError
from forge_kernel.planning.pipeline_file import load_pipeline

ROWS, BATCHES = 12, 5


def batches(seed: int = 0, ignored: bool = True) -> list[dict[str, torch.Tensor]]:
    draws = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(BATCHES):
        targets = torch.randint(0, 3, (ROWS,), generator=draws)
        if ignored:
            targets[torch.rand(ROWS, generator=draws) < 0.3] = -100
        inputs = torch.randn(ROWS, 4, generator=draws)
        result.append({"inputs": inputs, "targets": targets})
    return result


class Short(nn.Module):
    """A network for which the memory suffices up to so many rows."""

    def __init__(self, rows: int, error: Callable[[], BaseException]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(4, 3)
        self.rows, self.error = rows, error
        self.seen: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen.append(len(inputs))
        if self.training and len(inputs) > self.rows:
            raise self.error()
        return self.linear(inputs)


def cuda() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def host() -> BaseException:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    return caught.value


def cublas() -> BaseException:
    return RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`")


PIPELINE = """\
forge: 1
run: {device: cpu, save_every: null, max_steps: 5, log_every: 1}
optimizer: {use: adamw, with: {lr: 0.05}}
loss: {use: cross_entropy}
data: {use: modular_arithmetic}
model: {use: mlp}
"""


def trained(
    folder: Path, model: nn.Module, data: Any = None, *settings: str, **more: Any
) -> Any:  # fmt: skip
    file = folder.parent / "short.yaml"
    file.write_text(PIPELINE)
    pipeline = load_pipeline(file, settings)
    return run(pipeline, model=model, data=data or batches(), output_dir=folder, quiet=True, **more)


@pytest.mark.parametrize("error", [cuda, host, cublas, lambda: MemoryError()])
@pytest.mark.parametrize(("rows", "parts"), [(6, 2), (4, 4), (1, 16)])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_halved_step_is_the_whole_batchs(
    tmp_path: Path, error: Callable[[], BaseException], rows: int, parts: int, accumulate: int
) -> None:
    """Planted: the parts' means averaged, not weighed by what they count; a step dropped."""
    setting = f"run.accumulate={accumulate}"
    whole = Short(ROWS, error)
    expected = trained(tmp_path / "whole", whole, None, setting)
    halved = Short(rows, error)
    result = trained(tmp_path / "parts", halved, None, setting, "run.on_out_of_memory=halve")
    assert (result.outcome, result.steps) == ("completed", expected.steps)
    for mine, theirs in zip(halved.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
    log = (tmp_path / "parts" / "forge.log").read_text()
    assert f"in {parts} parts from now on" in log
    assert log.count('"event": "out_of_memory"') == parts.bit_length() - 1
    assert sum(count > rows for count in halved.seen) == parts.bit_length() - 1


def test_a_resumed_run_knows_that_memory_was_short(tmp_path: Path) -> None:
    """Red when the parts are not kept: its first step fails once more."""
    folder = tmp_path / "run"
    trained(folder, Short(6, cuda), None, "run.on_out_of_memory=halve")
    model = Short(6, cuda)
    resume(folder, ["run.max_steps=8"], model=model, data=batches(), quiet=True)
    assert max(model.seen) <= 6
    assert (folder / "forge.log").read_text().count('"event": "out_of_memory"') == 1


@pytest.mark.parametrize("error", [cuda, host, cublas, lambda: MemoryError()])
@pytest.mark.parametrize("policy", ["stop", "halve"])
def test_the_report_says_where_how_much_and_what_helps(
    tmp_path: Path, error: Callable[[], BaseException], policy: str
) -> None:
    """`halve` ends as well where one sample is too much. Planted: the error as torch has it."""
    model = Short(0, error)
    folder = tmp_path / "run"
    with pytest.raises(OutOfMemoryError) as caught:
        trained(folder, model, None, f"run.on_out_of_memory={policy}")
    rows = ROWS if policy == "stop" else 1
    text = str(caught.value)
    assert "out of memory in step 1" in text
    assert f"inputs [{rows}, 4] float32; targets [{rows}] int64" in text
    assert "GiB" in text
    assert text.count("\n  - ") == 3
    assert ("run.on_out_of_memory: halve" in text) == (policy == "stop")
    assert "out of memory in step 1" in json.loads((folder / "result.json").read_text())["error"]


@pytest.mark.parametrize("policy", ["stop", "halve"])
@pytest.mark.parametrize("hook", ["on_batch", "on_step_end", "on_weights", "on_validation"])
def test_memory_that_a_plugin_lacks_is_reported_and_what_was_trained_is_kept(
    tmp_path: Path, hook: str, policy: str
) -> None:
    """Planted: a step taken a second time in halves after it was counted; parts that were no help
    kept for the resumed run."""
    calls = []

    def fail(self: Any, run: Any, *rest: Any) -> None:
        calls.append(1)
        if len(calls) >= 3 or hook == "on_validation":
            raise cuda()

    parameters = {
        "on_batch": "self, run, step, batch", "on_step_end": "self, run, step",
        "on_weights": "self, run, step", "on_validation": "self, run, metrics",
    }[hook]  # fmt: skip
    space: dict[str, Any] = {"fail": fail}
    body = parameters.replace("self, ", "")
    exec(f"def hook({parameters}): fail(self, {body})", space)
    plugin = make_plugin("greedy", Kind.CALLBACKS, **{hook: space["hook"]})
    folder = tmp_path / "run"
    with pytest.raises(OutOfMemoryError, match="out of memory"):
        trained(
            folder, Short(ROWS, cuda), (batches(), batches()), "run.validate_every=3",
            f"run.on_out_of_memory={policy}", plugins=[plugin],
        )  # fmt: skip
    log = (folder / "forge.log").read_text()
    assert "greedy" in log
    assert hook in log
    if hook != "on_weights":  # there the weights are between two steps
        model = Short(ROWS, cuda)
        resumed = resume(
            folder,
            model=model,
            data=(batches(), batches()),
            plugins=[make_plugin("greedy", Kind.CALLBACKS)],
            quiet=True,
        )
        assert resumed.steps == 5
        straight = trained(
            tmp_path / "s", Short(ROWS, cuda), (batches(), batches()), "run.validate_every=3"
        )
        for mine, theirs in zip(model.parameters(), straight.model.parameters(), strict=True):
            assert mine.equal(theirs)


def test_a_batch_that_is_no_rows_is_not_split(tmp_path: Path) -> None:
    """Red when what has no rows goes into each part whole."""

    class Pairs(Short):
        def forward(self, inputs: Any) -> torch.Tensor:  # type: ignore[override]
            return super().forward(inputs["x"])

    data = [
        Batch({"x": each["inputs"], "edges": torch.zeros(2, 40)}, each["targets"])
        for each in batches()
    ]
    with pytest.raises(OutOfMemoryError, match=r"inputs.edges \[2, 40\]"):
        trained(tmp_path / "run", Pairs(6, cuda), data, "run.on_out_of_memory=halve")


def test_a_loss_that_compares_samples_is_not_halved(tmp_path: Path) -> None:
    file = tmp_path / "pipeline.yaml"
    file.write_text(PIPELINE.replace("cross_entropy", "contrastive"))
    with pytest.raises(PlanError, match="halve would change what loss contrastive computes"):
        run(
            load_pipeline(file, ["run.on_out_of_memory=halve"]), model=Short(6, cuda),
            data=batches(), output_dir=tmp_path / "run", quiet=True,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_statistics_over_smaller_batches_are_told(tmp_path: Path) -> None:
    class Normed(Short):
        def __init__(self) -> None:
            super().__init__(6, cuda)
            self.norm = nn.BatchNorm1d(4)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(self.norm(inputs))

    trained(tmp_path / "run", Normed(), None, "run.on_out_of_memory=halve")
    assert (
        "norm computes its statistics over the smaller ones"
        in (tmp_path / "run" / "forge.log").read_text()
    )


def test_a_program_that_drives_the_steps_gets_the_same(tmp_path: Path) -> None:
    data = batches()
    whole, halved = Short(ROWS, cuda), Short(5, cuda)
    for model in (whole, halved):
        session = make_session(model, data, on_out_of_memory="halve")
        for item in data:
            session.step(Batch(item["inputs"], item["targets"]))
        session.__exit__(None, None, None)
    for mine, theirs in zip(halved.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-6)
