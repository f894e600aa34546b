"""`forge status` and `forge watch`: a run seen from another process."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import jsonschema
import pytest
from kernel_parts import make_plugin

from forge_kernel.api import Kind
from forge_kernel.cli.watch import POLL_SECONDS, Pace
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.schemas import RECORDS
from forge_kernel.run_folder import record as run_folder
from forge_kernel.run_folder.log_text import notice_text
from forge_kernel.run_folder.status import LogFollower, read_status
from forge_kernel.runner import resume, run

STATUS = {
    "state": "training", "step": 7, "total_steps": 9, "epoch": 1, "phase": "warmup",
    "metrics": {"loss": 0.5, "slow": None}, "metrics_step": 6, "pid": os.getpid(),
    "events": [{"step": 5, "time": 1.0, "event": "told", "message": "Something came."}],
}  # fmt: skip
RUN = """
import sys, time
from pathlib import Path
sys.path.insert(0, PARTS)
from kernel_parts import make_plugin
from forge_kernel.api import Kind
from forge_kernel.runner import run

told = []
def on_step_end(self, run, step):
    time.sleep(0.01)
    if Path("tell").exists() and not told:
        told.append(1)
        run.emit_event("test_event", "The signal was seen.")
    if Path("end").exists():
        run.request("stop", reason="told to")
run("smoke", output_dir="run", quiet=True,
    plugins=[make_plugin("teller", Kind.CALLBACKS, on_step_end=on_step_end)])
"""


def forge(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=120,
    )  # fmt: skip


def write(folder: Path, **changes: Any) -> Path:
    (folder / "config.yaml").write_text("forge: 1\n")
    status = {**STATUS, "heartbeat": time.time(), "host": run_folder.platform.node(), **changes}
    (folder / "status.json").write_text(json.dumps(status))
    return folder


def begun(folder: Path) -> subprocess.Popen[bytes]:
    """A run in another process, which has taken a step."""
    parts = repr(str(Path(__file__).resolve().parents[1]))
    code = RUN.replace("PARTS", parts).replace(
        '"smoke"', "__import__('forge_kernel').load_pipeline('smoke', ['run.max_steps=100000'])"
    )
    process = forked.Popen([sys.executable, "-c", code], cwd=folder)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "run/config.yaml").is_file() and read_status(folder / "run").data.get("step"):
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the run did not begin")


def dead_pid() -> int:
    process = forked.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("changes", "condition", "said"),
    [
        ({}, "running", "training"),
        ({"state": "completed", "pid": 0}, "ended", "completed"),
        ({"heartbeat": time.time() - 300}, "silent", "is there"),
        ({"heartbeat": 1000.0}, "gone", "forge resume"),  # the pid is another process's by now
        ({"host": "elsewhere", "pid": 1}, "running", "training"),
        ({"host": "elsewhere", "heartbeat": 1000.0}, "silent", "machine is elsewhere"),
        ({"heartbeat": None}, "running", "training"),
    ],
)
def test_the_condition_follows_from_state_process_and_heartbeat(
    tmp_path: Path, changes: dict[str, Any], condition: str, said: str
) -> None:
    if condition == "silent" and "host" not in changes:
        changes = {**changes, "pid": 1, "heartbeat": time.time() - 31}
    found = read_status(write(tmp_path, **changes))
    assert (found.condition, said in found.said) == (condition, True), found.said


def test_a_process_that_is_gone_is_said_to_be_so(tmp_path: Path) -> None:
    found = read_status(write(tmp_path, pid=dead_pid()))
    assert found.condition == "gone"
    done = forge("watch", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 3
    assert "is gone without ending the run" in done.stdout


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_a_status_that_cannot_be_read_is_unknown(tmp_path: Path, text: str) -> None:
    (write(tmp_path) / "status.json").write_text(text)
    assert read_status(tmp_path).condition == "unknown"


def test_status_prints_place_metrics_and_events_or_json(tmp_path: Path) -> None:
    write(tmp_path)
    lines = forge("status", str(tmp_path), cwd=tmp_path).stdout.splitlines()
    assert lines[0].endswith(": training")
    assert [line.strip() for line in lines[1:]] == [
        "step 7 of 9, epoch 1, phase warmup", "at step 6:", "loss  0.5", "step 5: Something came.",
    ]  # fmt: skip
    data = json.loads(forge("status", str(tmp_path), "--json", cwd=tmp_path).stdout)
    assert data["condition"] == "running"
    assert data["status"]["metrics"] == {"loss": 0.5, "slow": None}


@pytest.mark.parametrize("command", ["status", "watch"])
def test_what_is_no_run_folder_is_refused(tmp_path: Path, command: str) -> None:
    done = forge(command, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert "is no run folder" in done.stderr


def test_the_follower_gives_each_whole_line_once_and_begins_again_in_a_cut_file(
    tmp_path: Path,
) -> None:
    file = tmp_path / "lines"
    follower = LogFollower(file)
    assert list(follower.new()) == []
    file.write_bytes(b'{"a": 1}\nbroken\n[2]\n{"b": ')
    assert list(follower.new()) == [{"a": 1}]
    with file.open("ab") as stream:
        stream.write(b"2}\n")
    assert list(follower.new()) == [{"b": 2}]
    assert list(follower.new()) == []
    file.write_bytes(b'{"c": 3}\n')
    assert list(follower.new()) == [{"c": 3}]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"event": "grokked", "step": 3, "message": "It did.", "facts": {}}, "step 3: It did."),
        ({"event": "phase", "step": 4, "before": None, "after": "warmup"},
         "step 4: phase none -> warmup"),
        ({"event": "validation", "step": 4, "metrics": {"loss": 0.25, "f1": None}},
         "step 4: validation loss 0.25"),
        ({"event": "run_end", "level": "info", "outcome": "stopped"}, "run end (outcome stopped)"),
    ],
)  # fmt: skip
def test_a_line_of_the_log_becomes_a_sentence(line: dict[str, Any], text: str) -> None:
    assert notice_text(line) == text


def test_the_pace_is_steps_between_signs_of_life() -> None:
    pace = Pace()
    for heartbeat, step in ((10.0, 100), (10.5, 120), (12.0, 150)):
        pace.take({"heartbeat": heartbeat, "step": step})
    assert pace.steps_per_second == pytest.approx(25.0)


def traced(folder: Path, monkeypatch: Any, seconds: float) -> tuple[list[Any], Any]:
    """`status.json` as each step found it, of a run whose log lines are far away."""
    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", seconds)
    seen: list[Any] = []

    def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
        seen.append((step.number, json.loads((run.folder / "status.json").read_text())))

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 4:
            run.emit_event("told", "Something came.", size=3)

    teller = make_plugin("teller", Kind.CALLBACKS, on_batch=on_batch, on_step_end=on_step_end)
    settings = [
        "run.max_steps=8", "run.validate_every=null", "run.log_every=1000", "run.save_every=null",
        "phases={use: grokfast, with: {warmup_steps: 5, acceleration_steps: 3,"
        " consolidation_steps: 0, refinement_steps: 0}}",
    ]  # fmt: skip
    result = run(load_pipeline("smoke", settings), output_dir=folder, plugins=[teller], quiet=True)
    return seen, result


@pytest.mark.spec("H8")
def test_an_event_and_a_phase_are_in_the_status_at_once_without_a_log_line(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Written before the next step begins; a watcher looks more than once a second."""
    seen, _ = traced(tmp_path / "run", monkeypatch, 1e9)
    status = dict(seen)
    before = status[4]["events"]  # what the quantizer told at set-up
    assert "Something came." not in [event["message"] for event in before]
    assert status[5]["events"][: len(before)] == before
    came = status[5]["events"][len(before) :]
    assert [event["message"] for event in came] == ["Something came."]
    assert (status[5]["phase"], status[6]["phase"]) == ("warmup", "acceleration")
    assert status[4]["step"] == 0  # no sign of life was due
    assert POLL_SECONDS <= 0.5
    for _, found in seen:
        jsonschema.validate(found, RECORDS["status"])


def test_the_log_has_all_that_was_told_and_each_validation_and_the_status_the_last_twenty(
    tmp_path: Path,
) -> None:
    """Red when a validation or its metrics are missing, or the status grows with the run."""
    seen: dict[int, Any] = {}

    def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
        seen[step.number] = json.loads((run.folder / "status.json").read_text())

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        run.emit_event("told", f"Step {step.number} is over.")

    teller = make_plugin("teller", Kind.CALLBACKS, on_batch=on_batch, on_step_end=on_step_end)
    settings = ["run.max_steps=25", "run.validate_every=10", "run.log_every=1000"]
    result = run(
        load_pipeline("smoke", settings), output_dir=tmp_path / "run", plugins=[teller], quiet=True
    )
    lines = [json.loads(line) for line in (tmp_path / "run/forge.log").read_text().splitlines()]
    told = [(line["step"], line["message"]) for line in lines if "facts" in line]
    assert [message for _, message in told if message.startswith("Step ")] == [
        f"Step {number} is over." for number in range(1, 26)
    ]
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert [(event["step"], event["message"]) for event in status["events"]] == told[-20:]
    validations = [line for line in lines if line["event"] == "validation"]
    assert [line["step"] for line in validations] == [10, 20, 25]
    metrics = {f"validation_{name}": value for name, value in validations[-1]["metrics"].items()}
    assert metrics == {k: v for k, v in result.final.items() if k.startswith("validation_")}
    assert len(metrics) > 1
    assert metrics.items() <= status["metrics"].items()
    assert [seen[step]["metrics_step"] for step in (10, 11, 21)] == [None, 10, 20]


def test_a_run_that_is_being_set_up_can_be_seen(tmp_path: Path) -> None:
    """Red when a monitor finds nothing until the data is read and the model made."""
    seen: list[str] = []

    def make_modules(self: Any, run: Any) -> dict[str, Any]:
        seen.append(json.loads((run.folder / "status.json").read_text())["state"])
        return {}

    looker = make_plugin("looker", Kind.CALLBACKS, make_modules=make_modules)
    run(load_pipeline("smoke", ["run.max_steps=1"]), output_dir=tmp_path, plugins=[looker])
    assert seen == ["initializing"]


def test_a_run_says_of_which_revision_the_folder_was_that_it_began_in(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Red when it is not told, or a folder without revisions is an error."""

    def git(*words: str) -> str:
        chosen = ["-c", "user.name=A", "-c", "user.email=a@b.example", "-c", "commit.gpgsign=false"]
        command = ["git", *chosen, *words]
        return forked.run(command, capture_output=True, check=True, text=True).stdout.strip()

    def revision(name: str) -> Any:
        run(load_pipeline("smoke", ["run.max_steps=1"]), output_dir=tmp_path / name, quiet=True)
        return json.loads((tmp_path / name / "environment.json").read_text())["git_revision"]

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert revision("without") is None
    git("init", "-q")
    assert revision("empty") is None
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert revision("with") == git("rev-parse", "HEAD")


def test_metrics_of_fast_steps_are_written_together_and_of_slow_ones_at_once(
    tmp_path: Path, monkeypatch: Any
) -> None:
    """Red when each log line replaces the file, or a slow run's metrics wait for its next step."""

    def written(folder: Path, fast: float) -> list[int | None]:
        monkeypatch.setattr(run_folder, "FAST_STEP_SECONDS", fast)
        seen: list[int | None] = []

        def on_batch(self: Any, run: Any, step: Any, batch: Any) -> None:
            status = json.loads((run.folder / "status.json").read_text())
            seen.append(status["metrics_step"])

        settings = [
            "run.max_steps=5", "run.log_every=1", "run.validate_every=null",
            "run.save_every=null", "quantizer=null", "regularizers=null", "exporters=[]",
        ]  # fmt: skip
        watch = make_plugin("watch", Kind.CALLBACKS, on_batch=on_batch)
        pipeline = load_pipeline("smoke", settings)
        result = run(pipeline, output_dir=folder, plugins=[watch], quiet=True)
        assert read_status(folder).data["metrics"]["loss"] == result.final["loss"]
        return seen

    monkeypatch.setattr(run_folder, "HEARTBEAT_SECONDS", 1e9)
    monkeypatch.setattr(run_folder, "GATHER_SECONDS", 1e9)
    assert written(tmp_path / "slow", 0.0) == [None, 1, 2, 3, 4]
    assert written(tmp_path / "fast", 1e9) == [None, 1, 1, 1, 1]  # the first step has no pace yet


def test_signs_of_life_carry_the_step_when_they_are_due(tmp_path: Path, monkeypatch: Any) -> None:
    seen, _ = traced(tmp_path / "run", monkeypatch, 0.0)
    assert [(number, status["step"]) for number, status in seen[1:]] == [
        (number, number - 1) for number in range(2, 9)
    ]


def test_a_resumed_run_says_its_phase_though_it_does_not_change(
    tmp_path: Path, monkeypatch: Any
) -> None:
    _, result = traced(tmp_path / "run", monkeypatch, 0.0)
    assert result.outcome == "completed"
    noop = make_plugin("teller", Kind.CALLBACKS, on_step_end=lambda self, run, step: None)
    resume(tmp_path / "run", ["run.max_steps=9"], plugins=[noop], quiet=True)
    assert read_status(tmp_path / "run").data["phase"] == "completed"


def test_a_validation_metric_that_is_not_finite_leaves_the_status_strict(tmp_path: Path) -> None:
    record = run_folder.RunRecord()
    record.open(tmp_path)
    state = type("State", (), {"progress": type("P", (), {"step": 3, "epoch": 0})})()
    state.total_steps = None
    record.on_validation(state, {"loss": float("nan")})
    record.close()
    assert json.loads((tmp_path / "status.json").read_text())["metrics"] == {
        "validation_loss": None
    }


@pytest.mark.spec("H8")
def test_watch_prints_what_another_process_tells_and_ends_with_the_run(tmp_path: Path) -> None:
    process = begun(tmp_path)
    try:
        command = [sys.executable, "-m", "forge_kernel", "watch", "run"]
        watching = forked.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        (tmp_path / "tell").touch()
        lines = iter(watching.stdout.readline, "")  # type: ignore[union-attr]
        assert any("The signal was seen." in line for line in lines)
        assert watching.poll() is None
        (tmp_path / "end").touch()
        rest = list(lines)
        assert watching.wait(60) == 0
        assert rest[-1] == "run: completed\n"
        watching.stdout.close()  # type: ignore[union-attr]
    finally:
        process.kill()
        process.wait()


HELD = """
import sys, time
from pathlib import Path
sys.path.insert(0, PARTS)
from kernel_parts import make_plugin
from forge_kernel import load_pipeline
from forge_kernel.api import Kind
from forge_kernel.runner import run

def on_step_end(self, run, step):
    if step.number == 3:
        run.emit_event("test_event", "The third step is done.")

def on_batch(self, run, step, batch):
    while step.number == 4 and not Path("seen").exists():
        time.sleep(0.01)  # nothing more is written before the other process has seen it

run(load_pipeline("smoke", ["run.max_steps=5", "run.log_every=1000", "run.save_every=null"]),
    output_dir="run", quiet=True,
    plugins=[make_plugin("teller", Kind.CALLBACKS, on_step_end=on_step_end, on_batch=on_batch)])
"""


@pytest.mark.spec("K4")
def test_an_event_is_seen_by_another_process_before_the_run_does_anything_more(
    tmp_path: Path,
) -> None:
    """The run stands still until it was seen, in the status, the log and the metrics' file alike.

    Red when events are written with the next sign of life, or stay in a buffer. How long it takes
    is measured by benchmarks/monitors.py.
    """
    code = HELD.replace("PARTS", repr(str(Path(__file__).resolve().parents[1])))
    process = forked.Popen([sys.executable, "-c", code], cwd=tmp_path)
    try:
        told: list[Any] = []  # by us: other plugins tell things too
        deadline = time.monotonic() + 90
        while not told and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            if (tmp_path / "run/config.yaml").is_file():
                events = read_status(tmp_path / "run").data.get("events", [])
                told = [event for event in events if event["event"] == "test_event"]
        assert [event["step"] for event in told] == [3]
        shown = json.loads(forge("status", "run", "--json", cwd=tmp_path).stdout)
        assert shown["condition"] == "running"
        assert shown["status"]["events"][-1]["message"] == "The third step is done."
        for name in ("forge.log", "metrics.jsonl"):
            assert '"test_event"' in (tmp_path / "run" / name).read_text(), name
    finally:
        (tmp_path / "seen").touch()
        assert process.wait(60) == 0


def test_watch_says_that_the_process_was_killed(tmp_path: Path) -> None:
    process = begun(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert read_status(tmp_path / "run").condition == "gone"


def test_watch_draws_in_a_terminal(tmp_path: Path) -> None:
    write(tmp_path, state="completed")
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "forge_kernel", "watch", str(tmp_path)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = forked.Popen(command, stdout=slave, stderr=slave, env=environment)
    assert process.wait(60) == 0
    os.close(slave)
    shown = os.read(master, 65536).decode()
    os.close(master)
    assert "step 7 of 9" in shown
    assert "loss" in shown


@pytest.mark.parametrize("command", ["status", "watch"])
def test_looking_at_a_run_imports_no_torch(tmp_path: Path, command: str) -> None:
    write(tmp_path, state="completed")
    code = (
        f"import sys; sys.argv = ['forge', {command!r}, {str(tmp_path)!r}]\n"
        "from forge_kernel.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["run.validate_every=3", "run.save_every=1"], ["validate_every"]),
        (["run.validate_every=1", "run.save_every=9"], ["save_every"]),
        (["run.validate_every=3", "run.save_every=3"], ["validate_every", "save_every"]),
        (["run.validate_every=2", "run.save_every=2"], []),
    ],
    ids=str,
)
def test_an_interval_that_never_comes_round_is_a_warning_in_the_log(
    tmp_path: Path, settings: list[str], named: list[str]
) -> None:
    """Planted: the notices are not written."""
    run(
        load_pipeline("smoke", ["run.max_steps=2", *settings]),
        output_dir=tmp_path / "run",
        quiet=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "forge.log").read_text().splitlines()]
    notices = [line for line in lines if line["event"] == "notice"]
    assert [line["level"] for line in notices] == ["warning"] * len(named)
    for line, name in zip(notices, named, strict=True):
        assert f"run.{name}" in line["notice"]
