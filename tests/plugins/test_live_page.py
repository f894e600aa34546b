"""`forge watch --serve`: the page and its stream, asked for as a browser does."""

from __future__ import annotations

import http.client
import json
import os
import platform
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest

from forge_kernel.errors import ConfigError
from forge_plugins.reports.live import LivePage, serve

STATUS = {
    "state": "training", "step": 7, "total_steps": 9, "epoch": 1, "phase": "warmup",
    "metrics": {"loss": 0.5}, "metrics_step": 6, "events": [], "pid": os.getpid(),
    "host": platform.node(), "started": 1.0,
}  # fmt: skip


def write(folder: Path, **changes: Any) -> None:
    """As the run does: the file is replaced in one step."""
    status = {**STATUS, "heartbeat": time.time(), **changes}
    (folder / "beside").write_text(json.dumps(status))
    (folder / "beside").replace(folder / "status.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("forge: 1\nrun: {name: watched}\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 5, "time": 1.0, "kind": "log", "epoch": 0, "loss": 0.25}\n'
    )
    write(tmp_path)
    return tmp_path


@pytest.fixture
def page(folder: Path) -> Iterator[LivePage]:
    server = LivePage(folder, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


def get(port: int, path: str, host: str | None = None) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={"Host": host or f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def events(port: int) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/events", headers={"Host": f"127.0.0.1:{port}"})
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream"
    while line := answer.readline().decode():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    connection.close()


def test_the_page_shows_the_run_and_loads_nothing_from_elsewhere(page: LivePage) -> None:
    status, text = get(page.server_port, "/")
    assert status == 200
    assert "step 7 of 9, epoch 1, phase warmup" in text
    assert "<svg" in text
    assert set(re.findall(r'(?:src|href)="([^"]*)"', text)) == {"/live.js"}
    assert "script-src 'self'; connect-src 'self'" in text
    assert "EventSource" in get(page.server_port, "/live.js")[1]
    assert get(page.server_port, "/etc/passwd")[0] == 404


def test_the_body_is_drawn_anew_at_each_request(page: LivePage, folder: Path) -> None:
    write(folder, step=8)
    assert "step 8 of 9" in get(page.server_port, "/body")[1]


def test_the_server_listens_on_loopback_only_and_knows_its_name(page: LivePage) -> None:
    assert page.socket.getsockname()[0] == "127.0.0.1"
    status, text = get(page.server_port, "/", host="rebound.example")
    assert (status, "watched" in text) == (403, False)
    assert get(page.server_port, "/", host=f"localhost:{page.server_port}")[0] == 200


@pytest.mark.spec("H8")
def test_the_stream_tells_each_change_and_ends_with_the_run(page: LivePage, folder: Path) -> None:
    stream = events(page.server_port)
    assert next(stream)["status"]["step"] == 7
    told = {"step": 8, "time": 2.0, "event": "grokked", "message": "It came."}
    write(folder, step=8, events=[told])
    second = next(stream)
    assert (second["status"]["events"], second["over"]) == ([told], False)
    write(folder, step=9, state="completed")
    assert next(stream)["over"]
    assert list(stream) == []


def test_each_change_is_told_at_once_and_a_new_picture_asked_for_when_one_can_be_drawn(
    page: LivePage, folder: Path
) -> None:
    """Red when a page that takes long to draw is asked for at each change."""
    stream = events(page.server_port)
    assert next(stream)["renew"] is True
    page.draw_seconds = 1e9
    for step in (8, 9, 10):
        write(folder, step=step)
        told = next(stream)
        assert (told["renew"], told["line"]) == (
            False, f"training · step {step} of 9, epoch 1, phase warmup",
        )  # fmt: skip
    page.draw_seconds = 0.0
    told = next(stream)  # nothing has changed since, but the picture is old
    assert (told["renew"], told["status"]["step"]) == (True, 10)
    page.draw_seconds = 1e9
    write(folder, state="completed")
    told = next(stream)
    assert (told["renew"], told["over"]) == (True, True)


def test_that_a_run_has_not_ended_is_no_news_on_its_live_page(page: LivePage, folder: Path) -> None:
    assert "result.json is absent" not in get(page.server_port, "/body")[1]
    write(folder, pid=1, host=platform.node(), heartbeat=1.0)
    assert "result.json is absent" in get(page.server_port, "/body")[1]


def test_serving_ends_when_the_process_of_the_run_is_gone(folder: Path) -> None:
    sleeper = forked.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write(folder, pid=sleeper.pid)
    threading.Timer(0.5, lambda: sleeper.communicate(b"\n")).start()
    assert serve(folder, 0).condition == "gone"


def test_a_run_that_is_over_is_left_to_the_report(folder: Path) -> None:
    write(folder, state="completed")
    with pytest.raises(ConfigError, match=r"nothing to watch(.|\n)*forge report"):
        serve(folder, 0)


def test_a_port_that_is_taken_is_refused_with_a_hint(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match=r"cannot serve on port(.|\n)*--port 0"):
            serve(folder, taken.getsockname()[1])


def test_the_command_says_where_the_page_is(folder: Path) -> None:
    command = [sys.executable, "-m", "forge_kernel", "watch", str(folder), "--serve"]
    process = forked.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    )
    line = process.stderr.readline()  # type: ignore[union-attr]
    assert "http" in line, line + process.stderr.read()  # type: ignore[union-attr]
    port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", line)[1])  # type: ignore[index]
    assert get(port, "/")[0] == 200
    write(folder, state="completed")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out.endswith(": completed\n")
