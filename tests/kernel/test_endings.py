"""Runs end where they should: not for ever, not too early, and never without their result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_plugin
from torch import nn

from forge_kernel import load_pipeline, resume, run
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import CheckpointError, ConfigError, PluginError, RunError
from forge_kernel.runner import export

SMOKE = ["run.max_steps=12", "run.validate_every=1", "observers=[{use: metrics_jsonl}]"]
BLEND = "quantizer={use: bitnet, with: {warmup_steps: 5, warmup_fraction: 0.9}}"
LATE = (
    "quantizer={use: bitnet, with: {warmup_start: 3, warmup_steps: 2, warmup_order: last_to_first}}"
)
RAMP = "quantizer={use: bitnet, with: {target_sparsity: 0.6, sparsity_warmup_steps: 5, warmup_fraction: 0.9}}"


def smoke(folder: Path, *settings: str, **options: Any) -> Any:
    pipeline = load_pipeline("smoke", [*SMOKE, *settings])
    return run(pipeline, output_dir=folder, quiet=True, **options)


def policy(name: str, **config: Any) -> str:
    return "callbacks=[" + json.dumps({"use": name, "with": config}) + "]"


@pytest.mark.parametrize("quantizer", [BLEND, LATE, RAMP], ids=["blend", "late", "sparsity"])
@pytest.mark.parametrize(
    ("not_before", "steps"), [(None, 5), (0, 1), (3, 3), (8, 8)], ids=["default", "0", "3", "8"]
)
def test_no_callback_ends_a_run_whose_network_is_not_yet_what_is_exported(
    tmp_path: Path, quantizer: str, not_before: int | None, steps: int
) -> None:
    """Unless it is asked to. The threshold is reached at once."""
    stop = policy("stop_at", metric="accuracy", threshold=0.0, not_before=not_before)
    result = smoke(tmp_path / "run", quantizer, stop, "exporters=[{use: packed_ternary}]")
    assert result.steps == steps
    assert (result.failed_exports == {}) == (steps >= 5 or quantizer == RAMP)


def test_neither_the_best_nor_a_capability_is_of_an_unfinished_network(tmp_path: Path) -> None:
    capability = {"learned": {"metric": "loss", "threshold": 1e9, "mode": "min"}}
    callbacks = json.dumps(
        [
            {"use": "capabilities", "with": {"capabilities": capability}},
            {"use": "best_checkpoint", "with": {"metric": "loss", "mode": "max"}},
            {"use": "early_stopping", "with": {"metric": "loss", "mode": "max", "min_delta": 1e9, "patience": 3}},
        ]
    )  # fmt: skip
    result = smoke(tmp_path / "run", BLEND, f"callbacks={callbacks}")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    acquired = [line["step"] for line in lines if line.get("event") == "capability_acquired"]
    assert acquired == [5]
    assert int((tmp_path / "run/checkpoints/best.pin").read_text().split("-")[1]) >= 5
    assert result.steps == 8, "three validations after the first that counts"
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}
    assert result.best["loss"] == min(loss for step, loss in losses.items() if step >= 5)


def test_a_run_that_ends_unfinished_says_so(tmp_path: Path) -> None:
    told: list[str] = []
    pipeline = load_pipeline(
        "smoke", [*SMOKE, "run.max_steps=null", "run.max_seconds=1e9", "schedule=null", "quantizer={use: bitnet, with: {warmup_steps: 1000}}"]
    )  # fmt: skip

    def ends(self: Any, run: Any, step: Any) -> None:
        if step.number == 4:
            run.request("stop", reason="enough")

    stop = make_plugin("stop", Kind.CALLBACKS, on_step_end=ends)
    result = run(
        pipeline, output_dir=tmp_path / "run", quiet=True, plugins=[stop],
        on_progress=lambda event: told.append(event.get("message", "")),
    )  # fmt: skip
    assert result.steps == 4
    assert any("before its network was finished" in message for message in told)
    assert result.best == {}


class Unexportable(nn.Module):
    """A network that no exporter of architectures knows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, inputs: Any) -> Any:
        return self.layer(inputs)


def broken_exporter(name: str, *, late: bool) -> Any:
    def export(self: Any, run: Any, folder: Path) -> dict[str, Any]:
        if late:
            raise OSError("the disk is full")
        (folder / "ok.txt").write_text("ok")
        return {"format": "text"}

    def check_export(self: Any, run: Any) -> str | None:
        return None if late else f"{name} knows no such network"

    return make_plugin(name, Kind.EXPORTERS, export=export, check_export=check_export)


def live(folder: Path, *plugins: Any, steps: int = 3) -> Any:
    file = folder / "p.yaml"
    file.write_text(
        f"forge: 1\nrun: {{name: t, seed: 0, device: cpu, max_steps: {steps}}}\n"
        "optimizer: {use: sgd, with: {lr: 0.1}}\nloss: {use: cross_entropy}\n"
        "exporters: [{use: state_dict}]\n"
    )
    batch = torch.ones(6, 4), torch.arange(6) % 3
    return run(
        file, model=Unexportable(), data=([batch], [batch]), output_dir=folder / "o", quiet=True,
        plugins=list(plugins),
    )  # fmt: skip


def test_an_exporter_that_cannot_is_told_before_the_first_step(tmp_path: Path) -> None:
    steps: list[int] = []

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        steps.append(step.number)

    watcher = make_plugin("watcher", Kind.OBSERVERS, on_step_end=on_step_end)
    with pytest.raises(PluginError, match="strict knows no such network"):
        live(tmp_path, broken_exporter("strict", late=False), watcher)
    assert steps == []


def test_a_late_failure_of_an_export_keeps_the_result_and_the_other_exports(tmp_path: Path) -> None:
    told: list[str] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        told.append(event.message)

    watcher = make_plugin("watcher", Kind.OBSERVERS, on_event=on_event)
    result = live(tmp_path, broken_exporter("late", late=True), watcher)
    assert (result.outcome, result.steps) == ("completed", 3)
    assert set(result.exports) == {"state_dict"}
    assert "the disk is full" in result.failed_exports["late"]
    assert any("The export late failed" in message for message in told)
    kept = json.loads((tmp_path / "o/result.json").read_text())
    assert kept["outcome"] == "completed"
    assert "late" in kept["failed_exports"]
    assert not (tmp_path / "o/exports/late").exists()


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("override", "error"),
    [
        ("model.with.hidden=[32]", RunError), ("optimizer.with.lr=-1", ConfigError),
        ("data.with.no_such=1", ConfigError), ("optimizer={use: lion}", RunError),
        ("callbacks=[{use: capabilities, with: {capabilities: {a: {metric: nothing, threshold: 1}}}}]", ConfigError),
        ("run.device=cuda:7", RunError),
    ],
)  # fmt: skip
def test_a_resume_that_is_refused_changes_not_one_byte(
    tmp_path: Path, override: str, error: type[Exception]
) -> None:
    smoke(tmp_path / "run", "run.max_steps=4", "run.save_every=2")
    before = files_of(tmp_path / "run")
    with pytest.raises(Exception) as caught:
        resume(tmp_path / "run", [override, "run.max_steps=6"], quiet=True)
    assert caught.type.__module__.startswith("forge_kernel"), caught.value
    assert files_of(tmp_path / "run") == before
    assert resume(tmp_path / "run", ["run.max_steps=6"], quiet=True).steps == 6
    assert export(tmp_path / "run", "state_dict")


def test_a_checkpoint_that_lacks_a_part_is_told_as_one(tmp_path: Path) -> None:
    from forge_kernel.storage.atomic_files import manifest_of, write_json
    from forge_kernel.storage.manifest import write_manifest

    smoke(tmp_path / "run", "run.max_steps=2", "callbacks=null")
    folder = tmp_path / "run/checkpoints/step-2"
    state = json.loads((folder / "state.json").read_text())
    manifest = json.loads((folder / "manifest.json").read_text())

    def put(changed: dict[str, Any]) -> None:
        write_json(folder / "state.json", changed)
        (folder / "manifest.json").unlink()
        write_manifest(folder, {**manifest, "files": manifest_of(folder)})

    older = {**state, "loop": {k: v for k, v in state["loop"].items() if k != "empty"}}
    older = {k: v for k, v in older.items() if k not in ("extra_state", "data")}
    put(older)
    assert resume(tmp_path / "run", ["run.max_steps=3"], quiet=True).steps == 3
    smoke(tmp_path / "other", "run.max_steps=2", "callbacks=null")
    folder = tmp_path / "other/checkpoints/step-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    put({k: v for k, v in state.items() if k != "metrics"})
    with pytest.raises(CheckpointError, match="has no metrics"):
        resume(tmp_path / "other", ["run.max_steps=3"], quiet=True)


def failing(step: int) -> Any:
    def on_batch(self: Any, run: Any, step_: Any, batch: Any) -> None:
        if step_.number == step:
            raise ArithmeticError("planned")

    on_batch.__annotations__.clear()
    import types

    code = on_batch.__code__.replace(co_varnames=("self", "run", "step", "batch"))
    renamed = types.FunctionType(code, on_batch.__globals__, "on_batch", None, on_batch.__closure__)
    return make_plugin("failing", Kind.CALLBACKS, on_batch=renamed)


def test_the_folder_of_a_run_that_never_reached_step_1_can_be_used_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ArithmeticError):
        smoke(out, plugins=[failing(1)])
    assert json.loads((out / "result.json").read_text())["steps"] == 0
    assert smoke(out, "run.max_steps=2", "callbacks=null").steps == 2
    with pytest.raises(ConfigError, match="not empty"):
        smoke(out)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    begun, foreign = tmp_path / "begun", tmp_path / "foreign"
    with pytest.raises(ArithmeticError):
        smoke(begun, plugins=[failing(3)])
    with pytest.raises(ArithmeticError):
        smoke(foreign, plugins=[failing(1)])
    (foreign / "my notes.txt").write_text("mine")
    for folder in (begun, foreign):
        before = files_of(folder)
        with pytest.raises(ConfigError, match="not empty"):
            smoke(folder)
        assert files_of(folder) == before


def test_a_run_is_resumed_and_exported_from_another_folder_than_it_was_started_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = [{"input": [1.0, i % 3], "target": i % 2} for i in range(32)]
    (tmp_path / "a" / "d.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path / "a")
    data = "data={use: file, with: {path: d.json, input: features, target: class, cache_dir: c}}"
    first = run(
        load_pipeline("smoke", [*SMOKE, data, "run.max_steps=4", "callbacks=null"]), output_dir="out", quiet=True
    )  # fmt: skip
    assert first.outcome == "completed"
    monkeypatch.chdir(tmp_path / "b")
    assert resume(tmp_path / "a/out", ["run.max_steps=6"], quiet=True).steps == 6
    assert export(tmp_path / "a/out", "state_dict")
    assert (tmp_path / "b").exists()
    assert not list((tmp_path / "b").iterdir())
    again = run(tmp_path / "a/out/config.yaml", output_dir=tmp_path / "again", quiet=True)
    assert again.steps == 6


@pytest.mark.parametrize(
    "settings",
    [
        ("schedule={use: plateau}",), (policy("early_stopping"),), (policy("best_checkpoint"),),
        ("schedule={use: composite, with: {schedules: [{use: constant}, {use: linear}], until: [{metric: loss, threshold: 0.1}]}}",),
    ],
)  # fmt: skip
def test_a_metric_that_can_never_come_is_refused(tmp_path: Path, settings: tuple[str, ...]) -> None:
    batch = torch.ones(6, 4), torch.arange(6) % 3
    pipeline = load_pipeline("smoke", ["run.max_steps=3", "callbacks=null", *settings])
    with pytest.raises(PluginError, match="no validation data"):
        run(pipeline, model=Unexportable(), data=[batch], output_dir=tmp_path / "o", quiet=True)


def test_each_part_whose_metric_can_never_come_is_named(tmp_path: Path) -> None:
    """Red when the user mends one and is then refused for the next."""
    batch = torch.ones(6, 4), torch.arange(6) % 3
    settings = ["run.max_steps=3", "schedule={use: plateau}", policy("early_stopping")]
    with pytest.raises(PluginError) as told:
        run(
            load_pipeline("smoke", settings), model=Unexportable(), data=[batch],
            output_dir=tmp_path / "o", quiet=True,
        )  # fmt: skip
    for name in ("plateau", "early_stopping"):
        assert f"{name} acts on the validation metric loss" in str(told.value)


def test_a_metric_that_did_not_come_is_told_once(tmp_path: Path) -> None:
    """Red when it is not told of each part that waits, or again after the next validation."""
    told: list[str] = []

    def on_event(self: Any, run: Any, event: Any) -> None:
        if event.name == "metric_missing":
            told.append(event.message)

    watcher = make_plugin("watcher", Kind.OBSERVERS, on_event=on_event)
    batch = torch.ones(6, 4), torch.arange(6) % 3
    empty = (value for value in ())

    class Endless:
        def __iter__(self) -> Any:
            return iter(empty)

    settings = [*SMOKE, "schedule={use: plateau}", policy("early_stopping")]
    run(
        load_pipeline("smoke", settings), model=Unexportable(), data=([batch], Endless()),
        output_dir=tmp_path / "o", quiet=True, plugins=[watcher],
    )  # fmt: skip
    assert sorted(told) == [
        f"{label} waits for the validation metric loss, which this validation did not give (it "
        "gave: none)."
        for label in ("callbacks[0] early_stopping", "schedule plateau")
    ]


def test_a_schedule_over_another_length_is_told_at_the_resume(tmp_path: Path) -> None:
    smoke(tmp_path / "run", "schedule={use: one_cycle}", "callbacks=null", "run.max_steps=4")
    resume(tmp_path / "run", ["run.max_steps=8"], quiet=True)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    assert "was 4: one_cycle goes on at another place" in lines
    smoke(tmp_path / "told", "callbacks=null", "run.max_steps=4",
          "schedule={use: one_cycle, with: {total_steps: 20}}")  # fmt: skip
    resume(tmp_path / "told", ["run.max_steps=8"], quiet=True)
    assert "length_changed" not in (tmp_path / "told/metrics.jsonl").read_text()


def test_a_schedule_that_ended_at_0_gives_way_to_the_next_ones_own_rate(tmp_path: Path) -> None:
    schedules = "[{use: warmup_cosine, with: {warmup_steps: 0, total_steps: 6}}, {use: constant}]"
    composite = (
        f"schedule={{use: composite, with: {{schedules: {schedules}, until: [{{step: 6}}]}}}}"
    )
    smoke(tmp_path / "run", composite, "run.log_every=1", "callbacks=null")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if line["kind"] == "log"]
    assert rates[5] == 0.0
    assert rates[6:] == [max(rates[6:])] * 6
    assert rates[6] == max(rates)


@pytest.mark.parametrize("content", ["notes.txt", ".hidden", "deep/er.bin", "folder/", "a.json"])
def test_a_folder_with_anything_in_it_is_used(tmp_path: Path, content: str) -> None:
    """Planted: only JSON files count."""
    place = tmp_path / "run" / content
    if content.endswith("/"):
        place.mkdir(parents=True)
    else:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        smoke(tmp_path / "run")
    assert place.exists()


def test_everyone_hears_of_the_error_also_when_one_of_them_fails(tmp_path: Path) -> None:
    """Planted: only the first listener is told."""
    heard: list[str] = []

    def listener(name: str, *, fails: bool = False) -> Any:
        def on_error(self: Any, run: Any, error: BaseException) -> None:
            heard.append(f"{name}: {error}")
            if fails:
                raise OSError("the log cannot be written")

        return make_plugin(name, Kind.OBSERVERS, on_error=on_error)

    listeners = [listener("one"), listener("two", fails=True), listener("three")]
    with pytest.raises(ArithmeticError, match="planned"):
        smoke(tmp_path / "run", plugins=[failing(2), *listeners])
    assert heard == ["one: planned", "two: planned", "three: planned"]
    assert "on_error_failed" in (tmp_path / "run/forge.log").read_text()


def test_two_exporters_of_one_name_write_beside_each_other(tmp_path: Path) -> None:
    """Planted: the second takes the first one's folder."""
    both = "exporters=[{use: state_dict}, {use: state_dict, with: {dtype: bfloat16}}]"
    result = smoke(tmp_path / "run", "run.max_steps=2", "callbacks=null", both)
    assert list(result.exports) == ["state_dict", "state_dict_"]
    sizes = [
        (tmp_path / "run" / path / "model.safetensors").stat().st_size
        for path in result.exports.values()
    ]
    assert sizes[0] > sizes[1]
