"""Status, report and live page against odd files and odd clients: no traceback, no hang."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from battery import Battery, Trial
from commands import command as forge
from commands import finish
from forged import warm
from hostile_folders import DEEP, TAG, whole
from plugin_run import scratch

FILES: Final = (
    "status.json", "result.json", "environment.json", "metrics.jsonl", "forge.log", "config.yaml",
    "resources.json", "report.html",
)  # fmt: skip


def fifo(path: Path) -> None:
    os.mkfifo(path)


def sock(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        place = Path.cwd()
        os.chdir(path.parent)
        made.bind(path.name)
        os.chdir(place)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def endless(path: Path) -> None:
    path.symlink_to("/dev/urandom")


def ring(path: Path) -> None:
    path.symlink_to(path)


def folder(path: Path) -> None:
    path.mkdir()


def sealed(path: Path) -> None:
    path.write_text("{}")
    path.chmod(0)


def deep(path: Path) -> None:
    path.write_text(DEEP + "\n")


def deep_mapping(path: Path) -> None:
    path.write_text('{"a":' * 50_000 + "1" + "}" * 50_000 + "\n")


def deep_facts(path: Path) -> None:
    facts = '{"a":' * 400 + "1" + "}" * 400
    path.write_text(
        f'{{"step": 1, "kind": "event", "event": "x", "state": "x", "facts": {facts}}}\n'
    )


def huge_number(path: Path) -> None:
    path.write_text('{"step": 1' + "0" * 5000 + ', "kind": "log", "pid": 1' + "0" * 400 + "}\n")


def other_types(path: Path) -> None:
    data = dict.fromkeys(("state", "step", "epoch", "pid", "heartbeat", "host", "events"), TAG)
    path.write_text(
        json.dumps({**data, "metrics": [TAG], "best": 3, "kind": {}, "plugins": []}) + "\n"
    )


def numbers_for_texts(path: Path) -> None:
    names = ("state", "phase", "host", "error", "stop_reason", "outcome", "metrics", "exports")
    data: dict[str, Any] = dict.fromkeys(names, -1.5)
    path.write_text(json.dumps({**data, "step": -1, "total_steps": -5, "heartbeat": 1e308}) + "\n")


def no_text(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 4000)


def no_end(path: Path) -> None:
    path.write_bytes(b'{"step": 1, "kind": "log", "x": "' + b"a" * 2**23)


def sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(2**31)


ODD: Final[tuple[Callable[[Path], None], ...]] = (
    fifo, sock, device, endless, ring, folder, sealed, deep, deep_mapping, deep_facts, huge_number,
    other_types, numbers_for_texts, no_text, no_end, sparse,
)  # fmt: skip


def looked_at(root: Path, name: str, make: Callable[[Path], None], command: str) -> str:
    path = root / "r" / name
    path.unlink(missing_ok=True)
    make(path)
    done = finish(forge(command, str(root / "r"), folder=root), root / "said", limit=20.0)
    return done.wrong


def marked(root: Path) -> str:
    """Names and texts of a run are shown, never read as markup."""
    lines = [
        {"step": 1, "time": 1.0, "kind": "log", "epoch": 0, "loss": 1.0, TAG: 2.0},
        {"step": 2, "time": 2.0, "kind": "validation", "epoch": 0, "loss": 1.0, TAG: 2.0},
        {"step": 2, "time": 2.0, "kind": "event", "epoch": 0, "event": TAG, "message": TAG,
         "facts": {TAG: TAG}},
    ]  # fmt: skip
    with (root / "r" / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line) + "\n" for line in lines)
    done = finish(forge("report", str(root / "r"), folder=root), root / "said", limit=20.0)
    page = (root / "r" / "report.html").read_text(encoding="utf-8")
    return done.wrong or ("a text stands in the page as markup" if TAG in page else "")


# -- the live page ------------------------------------------------------------------------------


def silent(port: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), 5) for _ in range(100)]


def half(port: int) -> list[socket.socket]:
    made = silent(port)
    for one in made:
        one.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1")
    return made


def unread(port: int) -> list[socket.socket]:
    made = silent(port)
    for one in made:
        one.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
    return made


def reset(port: int) -> list[socket.socket]:
    for one in unread(port):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
    return []


def noise(port: int) -> list[socket.socket]:
    made = silent(port)
    for number, one in enumerate(made):
        with_errors = [
            b"\x00\xff" * 5000,
            b"GET " + b"/" * 70_000,
            b"\r\n" * 9000,
            b"POST / HTTP/9\r\n\r\n",
        ]
        try:
            one.sendall(with_errors[number % len(with_errors)])
        except OSError:
            continue
    return made


def others(port: int) -> list[socket.socket]:
    made = silent(port)
    for one in made:
        one.sendall(b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n")
    return made


def served_to(client: socket.socket) -> str:
    """What a client of another host was told, if it was served."""
    client.settimeout(10)
    said = client.recv(300).decode("utf-8", "replace")
    return f"another host was served: {said[:100]}" if " 200 " in said else ""


CLIENTS: Final = (silent, half, unread, reset, noise, others)


def answers(port: int) -> str:
    """What a plain client gets."""
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.settimeout(10)
        client.sendall(
            f"GET /body HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n\r\n".encode()
        )
        text = b""
        while part := client.recv(65536):
            text += part
    return text.decode("utf-8", "replace")


def served(root: Path, clients: Callable[[int], list[socket.socket]]) -> str:
    """The page must answer a plain client while odd ones hold on, with a bounded number of threads."""
    from forge_plugins.reports.live import LivePage

    status = json.loads((root / "r" / "status.json").read_text())
    (root / "r" / "result.json").unlink(missing_ok=True)
    (root / "r" / "status.json").write_text(json.dumps({**status, "state": "training"}))

    def work() -> None:
        page = LivePage(root / "r", 0)
        thread = threading.Thread(target=page.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        held = clients(page.server_port)
        time.sleep(0.7)
        most = threading.active_count()
        if clients is others:
            print(*(text for one in held[:5] if (text := served_to(one))))
        text = answers(page.server_port)
        if "200 OK" not in text:
            print(f"no page: {text[:200]}")
        if most > 60:
            print(f"{most} threads")
        for one in held:
            one.close()
        page.closing.set()
        page.shutdown()
        page.server_close()
        sys.stdout.flush()

    done = finish(work, root / "said", limit=30.0)
    return done.wrong or done.said.strip()[-400:]


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each odd file through status and report, each odd client at the page, in a drawn order."""
    warm()
    with scratch() as first:
        whole(first / "r")
        cases: list[tuple[str, Callable[[Path], str]]] = []
        for name, make, command in itertools.product(FILES, ODD, ("status", "report")):
            cases.append((
                f"{make.__name__} as {name}: {command}",
                lambda root, n=name, m=make, c=command: looked_at(root, n, m, c),
            ))  # fmt: skip
        draw.shuffle(cases)
        clients = [
            (f"clients: {one.__name__}", lambda root, one=one: served(root, one)) for one in CLIENTS
        ]
        for name, judge in itertools.islice([("names", marked), *clients, *cases], count):
            with scratch() as root:
                shutil.copytree(first / "r", root / "r")
                yield Trial(name, judge(root))


BATTERY = Battery(
    "viewers",
    "no traceback, no hang, no text read as markup, only this host is served, bounded threads",
    ci=131,
    deep=263,
    trials=trials,
)
