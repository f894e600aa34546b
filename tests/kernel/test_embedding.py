"""The kernel inside other programs: threads, event loops, live parts, nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from kernel_parts import StopAfter, make_plugin

from forge_kernel import PipelineConfig, RunConfig, load_pipeline, run, run_async
from forge_kernel.api import Kind
from forge_kernel.config.use import UseData, UseLoss, UseModel, UseObserver, UseOptimizer
from forge_kernel.contract.data import DataSpec
from forge_kernel.errors import ConfigError
from forge_kernel.runner import resume
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.training.loaders.data_loaders import LoaderData


def pipeline(**settings: Any) -> PipelineConfig:
    return PipelineConfig(
        run=RunConfig(**{"max_steps": 6, "validate_every": 3, "device": "cpu", **settings}),
        data=UseData("modular_arithmetic", {"modulus": 7, "batch_size": 8}),
        model=UseModel("mlp", {"hidden": [16], "dropout": 0.2}),
        optimizer=UseOptimizer("adamw"),
        loss=UseLoss("cross_entropy"),
        observers=(UseObserver("metrics_jsonl"),),
    )


def checkpoint(folder: Path) -> Path:
    return CheckpointStore(folder / "checkpoints").path(6)


def globals_of_the_process() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "handlers": list(root.handlers),
        "level": root.level,
        "loggers": {
            name: (logger.level, list(logger.handlers))
            for name, logger in logging.Logger.manager.loggerDict.items()
            if isinstance(logger, logging.Logger) and not name.startswith("torch")
        },
        "signals": {number: signal.getsignal(number) for number in (2, 10, 12, 15)},
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
        "torch": torch.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "torch threads": torch.get_num_threads(),
        "threads": {thread.name for thread in threading.enumerate()},
        "cwd": os.getcwd(),
        "files": sorted(file.path for file in psutil.Process().open_files()),
        "environment": dict(os.environ),
    }


@pytest.mark.parametrize("ends", ["well", "badly"])
def test_a_run_leaves_the_process_as_it_found_it(tmp_path: Path, ends: str) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    run(pipeline(), output_dir=tmp_path / "first")  # what the first use of torch loads stays
    gc.collect()  # files that another test's garbage holds open are not closed in between
    before = globals_of_the_process()
    settings: dict[str, Any] = {"deterministic": True, "threads": 2}
    if ends == "well":
        run(pipeline(**settings), output_dir=tmp_path / "run")
    else:

        def explode(event: dict[str, Any]) -> None:
            if event["event"] == "validation":
                raise RuntimeError("the watcher broke")

        with pytest.raises(RuntimeError, match="the watcher broke"):
            run(pipeline(**settings), output_dir=tmp_path / "run", on_progress=explode)
    assert globals_of_the_process() == before


def test_two_runs_in_one_process_are_the_same_run(tmp_path: Path) -> None:
    for name in ("a", "b"):
        random.random()
        torch.rand(3)
        run(pipeline(), output_dir=tmp_path / name)
    assert differences(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")) == []


def test_a_run_in_a_thread_is_the_same_run(tmp_path: Path) -> None:
    run(pipeline(), output_dir=tmp_path / "a")
    thread = threading.Thread(target=run, args=(pipeline(),), kwargs={"output_dir": tmp_path / "b"})
    thread.start()
    thread.join()
    assert differences(checkpoint(tmp_path / "a"), checkpoint(tmp_path / "b")) == []


def test_a_run_inside_an_event_loop_lets_the_loop_go_on(tmp_path: Path) -> None:
    async def program() -> tuple[Any, int]:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        result = await run_async(pipeline(max_steps=200), output_dir=tmp_path / "run")
        ticking.cancel()
        return result, ticks

    result, ticks = asyncio.run(program())
    assert result.outcome == "completed"
    assert ticks > 3


def test_cancelling_the_task_stops_the_run_resumably(tmp_path: Path) -> None:
    async def program() -> None:
        task = asyncio.create_task(
            run_async(pipeline(max_steps=10**6), output_dir=tmp_path / "run")
        )
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(program())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["outcome"] == "stopped"
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest()[0].step == result["steps"]


def test_a_synchronous_run_works_inside_a_running_loop(tmp_path: Path) -> None:
    async def program() -> Any:
        return run(pipeline(), output_dir=tmp_path / "run")

    assert asyncio.run(program()).steps == 6


def test_live_model_and_data_take_the_files_places(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    data = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(4)]
    result = run(
        load_pipeline("smoke", ["run.max_steps=3"]), model=model,
        data=LoaderData(data, data[:1], DataSpec(features=4, classes=3)),
        output_dir=tmp_path / "run",
    )  # fmt: skip
    assert result.model is model
    assert not torch.equal(before, model[0].weight.cpu())
    text = (tmp_path / "run" / "config.yaml").read_text()
    assert "x-live:" in text
    assert "does not repeat it" in text.replace("# ", "").replace("\n", " ")


def test_a_pair_of_loaders_is_training_and_validation(tmp_path: Path) -> None:
    training = [{"input": torch.randn(5, 4), "target": torch.randint(3, (5,))} for _ in range(3)]
    validation = [(torch.randn(7, 4), torch.randint(3, (7,)))]
    result = run(
        pipeline(), model=torch.nn.Linear(4, 3), data=(training, validation),
        output_dir=tmp_path / "run",
    )  # fmt: skip
    assert result.final["validation_loss"] is not None


def test_progress_is_told_in_order(tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []
    run(
        pipeline(log_every=2), output_dir=tmp_path / "run",
        on_progress=lambda event: events.append((event["event"], event["step"])),
    )  # fmt: skip
    assert events == [
        ("start", 0), ("log", 2), ("validation", 3), ("log", 4), ("validation", 6), ("log", 6),
        ("checkpoint", 6),
    ]  # fmt: skip


def test_cancel_from_another_thread_stops_the_run(tmp_path: Path) -> None:
    cancel = threading.Event()
    timer = threading.Timer(0.3, cancel.set)
    timer.start()
    result = run(pipeline(max_steps=10**6), output_dir=tmp_path / "run", cancel=cancel)
    timer.join()
    assert result.outcome == "stopped"
    assert result.stop_reason == "cancelled"


def test_several_kernels_run_at_once(tmp_path: Path) -> None:
    results: dict[str, Any] = {}

    def work(name: str) -> None:
        results[name] = run(pipeline(max_steps=30), output_dir=tmp_path / name)

    threads = [threading.Thread(target=work, args=(str(number),)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {result.outcome for result in results.values()} == {"completed"}
    assert all(result.steps == 30 for result in results.values())


def test_nothing_is_written_for_a_pipeline_that_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        run(PipelineConfig(run=RunConfig(max_steps=3), model=UseModel("mlpp")))
    assert list(tmp_path.iterdir()) == []


def test_a_stop_from_outside_keeps_the_last_step(tmp_path: Path) -> None:
    stop = StopAfter(4)
    result = run(pipeline(), plugins=[stop], cancel=stop, output_dir=tmp_path / "run")
    assert (result.outcome, result.steps) == ("stopped", 4)
    assert CheckpointStore(tmp_path / "run" / "checkpoints").steps() == [4]


def test_a_session_of_plugin_objects_needs_no_folder_end_or_seed() -> None:
    import copy

    from kernel_parts import SgdPart

    from forge_kernel.contract.values import Batch
    from forge_kernel.testing.trial import TrialLoss
    from forge_kernel.training.loaders.in_memory import InMemoryData, InMemoryModel
    from forge_kernel.training.session import Session

    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    bare = copy.deepcopy(model)
    batches = [Batch(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(6)]
    parts = [InMemoryModel(model), InMemoryData(batches), SgdPart(0.1), TrialLoss()]
    before = torch.get_rng_state()
    with Session.of(parts) as session:
        bare.to(device := session.run.device)
        optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
        for batch in batches:
            session.accumulate(batch)
            assert session.update()
            found = bare(batch.inputs.to(device))
            torch.nn.functional.cross_entropy(found, batch.targets.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert session.run.folder is None
        assert session.run.total_steps is None
        assert session.finish() == {}
    assert torch.equal(model.weight, bare.weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_strategy_plugin_is_the_one_that_the_session_uses(linear: torch.nn.Module) -> None:
    from kernel_parts import SgdPart

    from forge_kernel.contract.plugin import Kind, PluginInfo
    from forge_kernel.contract.values import Batch
    from forge_kernel.testing.trial import TrialLoss
    from forge_kernel.training.loaders.in_memory import InMemoryData, InMemoryModel, NoConfig
    from forge_kernel.training.one_process import OneProcess
    from forge_kernel.training.session import Session

    told: list[str] = []

    class Doubled(OneProcess):
        """Pretends to be one of two equal ranks: sums are doubled."""

        info = PluginInfo(name="doubled", kind=Kind.STRATEGY, config=NoConfig)
        config = NoConfig()
        world_size = 2

        def start(self) -> None:
            told.append("start")

        def reduce(self, value: torch.Tensor) -> torch.Tensor:
            told.append("reduce")
            return value * 2

        def backward_scope(self, *, last: bool) -> Any:
            told.append(f"scope {last}")
            return super().backward_scope(last=last)

        def finish(self) -> None:
            told.append("finish")

    batch = Batch(torch.randn(5, 4), torch.randint(3, (5,)))
    strategy = Doubled()
    parts = [InMemoryModel(linear), InMemoryData([batch]), SgdPart(0.1), TrialLoss(), strategy]
    with Session.of(parts) as session:
        assert session.run.strategy is strategy
        session.step(batch, batch)
    assert told == ["start", "scope False", "scope True", "reduce", "finish"]


def test_a_validation_without_a_finite_metric_is_null_in_every_file(tmp_path: Path) -> None:
    # Planted: metrics kept as they came: "Out of range float values are not JSON compliant".
    def on_weights(self: Any, run: Any, step: Any) -> None:
        if run.progress.step >= 1:
            for parameter in run.model.parameters():
                parameter.data.fill_(float("nan"))

    poison = make_plugin("poison", Kind.CALLBACKS, on_weights=on_weights)
    run(pipeline(non_finite="off", save_every=1), plugins=[poison], output_dir=tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["outcome"] == "completed"
    assert result["final"]["validation_loss"] is None
    again = resume(tmp_path / "run", plugins=[poison])
    assert again.final["validation_loss"] is None
