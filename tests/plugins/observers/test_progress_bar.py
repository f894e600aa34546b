"""Progress on standard error: a bar on a terminal, JSON lines elsewhere, nothing when quiet."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kernel_parts import make_plugin

from forge_kernel.api import Kind
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_plugins.observers import progress_bar

SETTINGS = [
    "run.max_steps=4", "run.log_every=2", "run.validate_every=4", "run.save_every=null",
    "quantizer=null", "regularizers=null", "exporters=[]", "callbacks=[]",
]  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trained(
    folder: Path, *plugins: Any, settings: dict[str, Any] | None = None, quiet: bool = False
) -> None:
    chosen = json.dumps(settings or {})
    observers = f"observers=[{{use: progress_bar, with: {chosen}}}]"
    pipeline = load_pipeline("smoke", [*SETTINGS, observers])
    run(pipeline, output_dir=folder, plugins=plugins, quiet=quiet)


def teller() -> Any:
    def on_step_end(self: Any, run: Any, step: Any) -> None:
        if step.number == 3:
            run.emit_event("grokked", "It [b]came[/b].", score=1)

    return make_plugin("teller", Kind.CALLBACKS, on_step_end=on_step_end)


def test_away_from_a_terminal_each_thing_is_a_line_of_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path / "run", teller())
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in error.splitlines()]
    lines = [line for line in lines if line["event"] != "warmup_not_over"]  # the schedule's own
    assert out == ""
    assert [(line["event"], line["step"]) for line in lines] == [
        ("start", 0), ("log", 2), ("grokked", 3), ("validation", 4), ("log", 4),
        ("checkpoint", 4), ("end", 4),
    ]  # fmt: skip
    assert lines[0]["total_steps"] == 4
    assert lines[2]["facts"] == {"score": 1}
    assert {"loss", "accuracy"} <= lines[3]["metrics"].keys()
    assert lines[-1]["reason"] == "max_steps (4)"


def test_a_quiet_run_says_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run", teller(), quiet=True)
    assert capsys.readouterr() == ("", "")


def drawn(tmp_path: Path, monkeypatch: Any, *plugins: Any, refresh: float) -> tuple[int, str]:
    """How often the bar was drawn in four steps of a second each, and what the terminal got."""
    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    count: list[int] = []
    original = progress_bar.ProgressBar._draw

    def draw(self: Any, run: Any) -> None:
        count.append(run.progress.step)
        original(self, run)

    def on_weights(self: Any, run: Any, step: Any) -> None:
        clock.now += 1.0

    monkeypatch.setattr(progress_bar, "time", clock)
    monkeypatch.setattr(progress_bar.ProgressBar, "_draw", draw)
    monkeypatch.setattr(sys, "stderr", Terminal())
    second = make_plugin("second", Kind.CALLBACKS, on_weights=on_weights)
    trained(tmp_path, second, *plugins, settings={"refresh_seconds": refresh})
    return len(count), sys.stderr.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(("refresh", "times"), [(0.5, 4 + 2), (2.0, 2 + 2), (60.0, 1 + 2)])
def test_the_bar_is_drawn_no_more_often_than_asked_for(
    tmp_path: Path, monkeypatch: Any, refresh: float, times: int
) -> None:
    """And at each validation and at the end. Red when each step draws."""
    assert drawn(tmp_path / "run", monkeypatch, refresh=refresh)[0] == times


def test_on_a_terminal_the_bar_shows_steps_and_metrics_and_events_as_they_are(
    tmp_path: Path, monkeypatch: Any
) -> None:
    _, text = drawn(tmp_path / "run", monkeypatch, teller(), refresh=0.5)
    assert "4/4" in text
    assert "loss " in text
    plain = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", text)
    assert "step 3: It [b]came[/b]." in plain  # markup is not obeyed
    assert not text.lstrip().startswith("{")


def test_the_terminal_is_given_back_when_the_run_fails(tmp_path: Path, monkeypatch: Any) -> None:
    stopped: list[int] = []

    def on_step_end(self: Any, run: Any, step: Any) -> None:
        raise ArithmeticError("on purpose")

    from rich.progress import Progress

    original = Progress.stop
    monkeypatch.setattr(Progress, "stop", lambda self: (stopped.append(1), original(self))[1])
    breaker = make_plugin("breaker", Kind.CALLBACKS, on_step_end=on_step_end)
    with pytest.raises(ArithmeticError):
        drawn(tmp_path / "run", monkeypatch, breaker, refresh=0.5)
    assert stopped == [1]
