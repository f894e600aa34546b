"""The command line: what it prints, its exit status, signals."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import jsonschema
import pytest

from forge_kernel.config.yaml_file import read_yaml
from forge_kernel.planning.pipeline_file import shipped_pipelines
from forge_kernel.planning.schemas import RECORDS
from forge_kernel.run_folder.folder import RunFolder

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--set", "run.max_steps=6", "--set", "run.validate_every=3", "--set", "run.log_every=2"]


def forge(*arguments: str, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return forked.run(
        [sys.executable, "-m", "forge_kernel", *arguments],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=300, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    done = forge("run", "smoke", "--output-dir", "run", *TINY, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    (folder / "stderr").write_text(done.stderr)
    return folder


def test_a_run_prints_its_folder_and_what_matters_of_it(finished: Path) -> None:
    """Planted: metrics in the order they were logged; no best; all metrics listed."""
    lines = (finished / "stdout").read_text().splitlines()
    assert lines[0] == "run"
    assert lines[1].startswith("completed after 6 steps")
    assert len(lines) <= 12
    result = json.loads((finished / "run/result.json").read_text())
    infos = RunFolder(finished / "run").metric_infos()
    names = ["validation_accuracy", "validation_loss", "accuracy", "loss"]
    for line, name in zip(lines[2:6], names, strict=True):
        shown = f"  {name}: {infos.of(name).number(result['final'][name], grouped=False)}"
        best = result["best"].get(name.removeprefix("validation_"))
        if name.startswith("validation_"):
            shown += f"  (best {infos.of(name).number(best, grouped=False)})"
        assert line == shown
    assert lines[6] == f"  and {len(result['final']) - 4} more: forge status run"
    about = json.loads((finished / "run/exports/packed_ternary/manifest.json").read_text())
    times = about["bytes_fp32"] / about["bytes"]
    (line,) = (line for line in lines if "export packed_ternary" in line)
    assert line.endswith(f"in fp32: {times:.1f} times smaller)")
    assert any(line == "  report: run/report.html" for line in lines)


def test_a_run_folder_holds_what_is_promised(finished: Path) -> None:
    run = finished / "run"
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.yaml", "environment.json", "status.json", "metrics.jsonl", "forge.log", "owner.json",
        "checkpoints", "exports", "result.json", "report.html", "quantization.json", "confusion.json",
        "resources.json",
    }  # fmt: skip
    for name in ("result", "status", "environment"):
        jsonschema.validate(json.loads((run / f"{name}.json").read_text()), RECORDS[name])
    for line in (run / "metrics.jsonl").read_text().splitlines():
        jsonschema.validate(json.loads(line), RECORDS["metrics"])
    for manifest in (run / "exports").glob("*/manifest.json"):
        jsonschema.validate(json.loads(manifest.read_text()), RECORDS["export"])
    for manifest in (run / "checkpoints").glob("*/manifest.json"):
        jsonschema.validate(json.loads(manifest.read_text()), RECORDS["checkpoint"])
    for line in (run / "forge.log").read_text().splitlines():
        assert {"event", "timestamp", "level"} <= json.loads(line).keys()


def test_piped_progress_is_one_json_line_per_event(finished: Path) -> None:
    events = [json.loads(line) for line in (finished / "stderr").read_text().splitlines()]
    assert [event["event"] for event in events if event["event"] != "checkpoint"] == [
        "note", "start", "quantized", "log", "validation", "log", "validation", "log", "end",
    ]  # fmt: skip
    assert events[-1]["event"] == "end"
    assert {event["step"] for event in events if event["event"] == "log"} == {2, 4, 6}


def test_quiet_shows_no_progress(tmp_path: Path) -> None:
    done = forge("run", "smoke", "-q", "--output-dir", "run", *TINY, cwd=tmp_path)
    assert done.returncode == 0
    assert [json.loads(line)["event"] for line in done.stderr.splitlines()] == ["note"]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = forked.Popen(
        [sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir", "run", *TINY],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=slave, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(slave)
    shown = b""
    while True:
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    assert process.wait() == 0
    assert process.stdout is not None
    process.stdout.close()
    os.close(master)
    text = shown.decode()
    assert "smoke" in text
    assert "6/6" in text, text
    assert "accuracy" in text


def test_runs_lie_below_runs_and_never_share_a_folder(tmp_path: Path) -> None:
    folders = []
    for _ in range(2):
        done = forge("run", "smoke", "-q", "--set", "run.max_steps=1", cwd=tmp_path)
        folders.append(done.stdout.splitlines()[0])
    assert len(set(folders)) == 2
    assert all(re.fullmatch(r"runs/smoke-\d{8}-\d{6}-[0-9a-f]{4}", folder) for folder in folders)


IN_A_LINE = """
import io, os, signal, sys
from forge_kernel.cli.interrupt import Interrupt

class Raw(io.RawIOBase):
    def writable(self):
        return True

    def fileno(self):
        return 2

    def write(self, data):
        if b"line" in bytes(data):
            os.kill(os.getpid(), signal.SIGTERM)
        return os.write(2, data)

sys.stderr = io.TextIOWrapper(io.BufferedWriter(Raw()), line_buffering=True)
with Interrupt() as interrupt:
    assert not interrupt.is_set()  # as a run in its steps asks
    print("line", file=sys.stderr)
assert interrupt.is_set()
"""


def test_a_signal_in_the_middle_of_a_line_breaks_nothing(tmp_path: Path) -> None:
    """Planted fault: the handler prints: the write that it interrupts raises, and the run fails."""
    done = forked.run(
        [sys.executable, "-c", IN_A_LINE], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "SIGTERM: stopping after this step and saving" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_can_go_on(tmp_path: Path, number: signal.Signals) -> None:
    process = forked.Popen(
        [sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir", "run",
         "--set", "run.max_steps=1000000"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if '"log"' in line:
            break
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number, errors
    assert "go on with: forge resume run" in errors
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["outcome"] == "stopped"
    assert result["stop_reason"] == f"signal {number.name}"
    done = forge(
        "resume", "run", "-q", "--set", f"run.max_steps={result['steps'] + 2}", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "run/result.json").read_text())
    assert (again["outcome"], again["steps"]) == ("completed", result["steps"] + 2)


def test_faults_are_told_with_their_place_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("forge: 1\nrun: {max_stepz: 3}\noptimizer: {use: adamv}\n")
    for command in ("run", "check", "plan"):
        done = forge(command, "bad.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "bad.yaml:2:7  run.max_stepz" in done.stderr
        assert "did you mean 'max_steps'" in done.stderr
        assert "bad.yaml:3:18  optimizer.use" in done.stderr
        assert (
            "did you mean 'adam' or 'adamw'" in done.stderr or "did you mean 'adamw'" in done.stderr
        )
    assert [path.name for path in tmp_path.iterdir()] == ["bad.yaml"]


def test_check_can_speak_json(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("forge: 1\nrun: {max_stepz: 3}\n")
    done = forge("check", "bad.yaml", "--json", cwd=tmp_path)
    assert done.returncode == 2
    faults = json.loads(done.stdout)["faults"]
    assert {"run.max_stepz"} <= {fault["path"] for fault in faults}
    good = forge("check", "smoke", "--json", cwd=tmp_path)
    assert json.loads(good.stdout) == {"faults": [], "notices": [], "code": []}


def test_a_run_that_fails_on_the_way_has_status_three_and_says_why(tmp_path: Path) -> None:
    done = forge("run", "smoke", "-q", "--output-dir", "run", "--set", "optimizer.with.lr=1e38",
                 "--set", "schedule=null", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "not finite" in done.stderr
    assert json.loads((tmp_path / "run/result.json").read_text())["outcome"] == "failed"
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"


def test_explain_names_the_place_the_argument_or_the_default(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((ROOT / "pipelines/smoke.yaml").read_text())
    (tmp_path / "child.yaml").write_text("extends: base.yaml\nrun:\n  seed: 7\n")
    found = {
        key: forge(
            "explain", "child.yaml", key, "--set", "optimizer.with.lr=0.5", cwd=tmp_path
        ).stdout
        for key in ("run.seed", "optimizer.with.lr", "run.accumulate", "model.use")
    }
    assert "= 7" in found["run.seed"]
    assert "child.yaml:3:9" in found["run.seed"]
    assert "--set optimizer.with.lr=0.5" in found["optimizer.with.lr"]
    assert "default" in found["run.accumulate"]
    assert re.search(r"base\.yaml:\d+:\d+", found["model.use"])
    wrong = forge("explain", "child.yaml", "run.sed", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'run.seed'" in wrong.stderr


def test_plan_shows_who_runs_in_each_hook_and_why(tmp_path: Path) -> None:
    done = forge("plan", "smoke", "--json", cwd=tmp_path)
    hooks = json.loads(done.stdout)["hooks"]
    filters = ["gradients[0] grokfast", "gradients[1] clip_norm"]
    assert hooks["on_gradients"] == ["quantizer bitnet", *filters]
    text = forge("plan", "smoke", cwd=tmp_path).stdout
    assert "gradients[0] -> gradients[1]" in text
    assert "after grokfast" in text


def test_plugins_lists_origin_and_shows_a_page(tmp_path: Path) -> None:
    rows = json.loads(forge("plugins", "--json", cwd=tmp_path).stdout)["plugins"]
    assert {"gradients", "loss"} <= {row["kind"] for row in rows}
    assert all(row["origin"].startswith("forge-kernel") for row in rows if row["name"] == "bitnet")
    page = forge("plugins", "grokfast", cwd=tmp_path).stdout
    for piece in ("alpha: number >= 0 < 1, default 0.98", "on_gradients(run, step)"):
        assert piece in page
    wrong = forge("plugins", "grokfats", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "did you mean 'grokfast'" in wrong.stderr


def test_schema_check_finds_a_stale_file(tmp_path: Path) -> None:
    assert forge("schema", "--write", "schemas", cwd=tmp_path).returncode == 0
    assert forge("schema", "--check", cwd=tmp_path).returncode == 0
    (tmp_path / "schemas/loss/cross_entropy.json").write_text("{}\n")
    done = forge("schema", "--check", cwd=tmp_path)
    assert done.returncode == 1
    assert "cross_entropy.json" in done.stdout


def test_doctor_tells_what_is_there(tmp_path: Path) -> None:
    import torch

    found = json.loads(forge("doctor", "--json", cwd=tmp_path).stdout)
    assert found["torch"] == torch.__version__
    assert found["current folder is writable and syncs"] is True
    assert list(tmp_path.iterdir()) == []


def test_report_compares_runs(finished: Path) -> None:
    done = forge("report", "run", "run", "--output", "both.html", cwd=finished)
    assert done.returncode == 0, done.stderr
    assert "<svg" in (finished / "both.html").read_text()
    wrong = forge("report", ".", cwd=finished)
    assert wrong.returncode == 2
    assert "Traceback" not in wrong.stderr


def test_bench_lists_and_refuses(tmp_path: Path) -> None:
    listed = forge("bench", cwd=ROOT)
    assert "overhead" in listed.stdout
    wrong = forge("bench", "overhed", cwd=ROOT)
    assert wrong.returncode == 2
    assert "did you mean 'overhead'" in wrong.stderr
    assert forge("bench", cwd=tmp_path).returncode == 2


def test_schema_check_says_that_there_is_no_folder(tmp_path: Path) -> None:
    """Planted fault: every schema of it is called out of date."""
    (tmp_path / "empty").mkdir()
    for place in (tmp_path, tmp_path / "empty"):
        done = forge("schema", "--check", cwd=place)
        assert done.returncode == 2
        assert "there is no folder schemas here" in done.stderr
        assert "not up to date" not in done.stdout


def named_schema(file: Path) -> Path:
    """The schema that an editor finds for a pipeline file."""
    [line] = [line for line in file.read_text().splitlines() if "$schema=" in line]
    return file.parent / line.partition("$schema=")[2].strip()


@pytest.mark.parametrize("folder", [".", "deep/er"])
def test_a_new_pipeline_names_a_schema_that_is_there_and_that_it_keeps(
    tmp_path: Path, folder: str
) -> None:
    """Planted fault: the way of the shipped file, which leads nowhere from here."""
    assert forge("new", "pipeline", "mine", "--directory", folder, cwd=tmp_path).returncode == 0
    schema = json.loads(named_schema(tmp_path / folder / "mine.yaml").read_text())
    jsonschema.validate(read_yaml(tmp_path / folder / "mine.yaml").data, schema)


@pytest.mark.parametrize(
    ("folder", "way"), [(".", "schemas"), ("pipelines", "../schemas"), ("a/b", "../../schemas")]
)
def test_a_new_pipeline_names_the_schemas_above_it(tmp_path: Path, folder: str, way: str) -> None:
    assert forge("schema", "--write", "schemas", cwd=tmp_path).returncode == 0
    assert forge("new", "pipeline", "mine", "--directory", folder, cwd=tmp_path).returncode == 0
    assert f"$schema={way}/pipeline.schema.json" in (tmp_path / folder / "mine.yaml").read_text()
    assert not (tmp_path / folder / "pipeline.schema.json").exists()


def test_every_shipped_pipeline_names_a_schema_that_is_there() -> None:
    """In the checkout, and where the package lies: a wheel holds both."""
    for file in shipped_pipelines().values():
        assert named_schema(file).is_file(), file


def test_a_new_pipeline_runs(tmp_path: Path) -> None:
    assert forge("new", "pipeline", "mine", cwd=tmp_path).returncode == 0
    assert "#" in (tmp_path / "mine.yaml").read_text()
    done = forge(
        "run", "mine.yaml", "-q", "--output-dir", "run", "--set", "run.max_steps=5", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert forge("new", "pipeline", "mine", cwd=tmp_path).returncode == 2


def test_help_names_every_command_in_its_place(tmp_path: Path) -> None:
    text = forge("--help", cwd=tmp_path).stdout
    for command in (
        "run", "resume", "check", "plan", "explain", "plugins", "schema", "report", "new",
        "doctor", "bench",
    ):  # fmt: skip
        assert re.search(rf"^  {command} ", text, re.MULTILINE), command


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    process = forked.Popen(
        [sys.executable, "-m", "forge_kernel", "run", "smoke", "--output-dir", "run",
         "--set", "run.max_steps=1000000"],
        cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if '"log"' in line:
            break
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
