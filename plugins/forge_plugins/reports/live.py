"""A run as a page that renews itself, on this machine only: `forge watch --serve`."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.errors import ConfigError, Fault
from forge_kernel.run_folder.folder import RESULT, STATUS
from forge_kernel.run_folder.log_text import place_text
from forge_kernel.run_folder.status import RunStatus, read_status
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.page import one_run, whole_page
from forge_plugins.reports.run_data import read_run

if TYPE_CHECKING:
    from pathlib import Path

LOOPBACK: Final = "127.0.0.1"
POLL_SECONDS: Final = 0.25
_IDLE_SECONDS: Final = 10.0  # after so long a client hears something, so that a lost one is noticed
_FAREWELL_SECONDS: Final = 30.0  # what a client is given to fetch the last picture
_DRAWING_SHARE: Final = 4.0  # a picture is drawn anew after four times what the last one took
_PATIENCE_SECONDS: Final = 10.0  # for a client to send its request, or to take what it is sent
MOST_CLIENTS: Final = 32
"""At once; of more the oldest is let go, one that has not asked for anything first."""
_WATCHED: Final = (STATUS, "metrics.jsonl", RESULT)

_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'self'; connect-src 'self'"
)
_SCRIPT: Final = """\
"use strict";
const main = document.querySelector("main");
const key = (part) => part.dataset.key || part.id;
function opened() {
  const found = {};
  main.querySelectorAll("details,input").forEach((part) => {
    found[key(part)] = part.open || part.checked;
  });
  return found;
}
async function renew() {
  const answer = await fetch("/body");
  if (!answer.ok) return;
  const before = opened();
  const focused = document.activeElement && document.activeElement.id;
  main.innerHTML = await answer.text();
  main.querySelectorAll("details,input").forEach((part) => {
    if (!(key(part) in before)) return;
    if (part.tagName === "DETAILS") part.open = before[key(part)];
    else part.checked = before[key(part)];
  });
  const again = focused && document.getElementById(focused);
  if (again) again.focus({preventScroll: true});
}
let due = Promise.resolve();
const source = new EventSource("/events");
source.addEventListener("status", (event) => {
  const told = JSON.parse(event.data);
  document.title = told.title;
  const line = document.getElementById("live");
  if (line) line.textContent = told.line;
  if (told.renew) due = due.then(renew, renew);
  if (told.over) source.close();
});
source.onerror = () => {
  const line = document.getElementById("live");
  if (line) line.textContent = "The page has lost its server: forge watch has ended.";
};
"""


class LivePage(ThreadingHTTPServer):
    """Serves one run folder on loopback.

    Args:
        folder: the run folder; it is only read.
        port: 0 for a free one.

    Raises:
        OSError: the port cannot be had.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.streams: set[int] = set()  # threads of the event streams that are open
        self.closing = threading.Event()
        self.draw_seconds = 0.0  # of the last picture
        self._clients: dict[Any, bool] = {}  # by age; whether they have asked for something
        self._clients_lock = threading.Lock()
        super().__init__((LOOPBACK, port), _Answer)

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client in a thread of its own; there are only so many of them."""
        with self._clients_lock:
            ages = sorted(self._clients, key=lambda client: self._clients[client])  # stable
            gone = ages[: max(0, len(ages) + 1 - MOST_CLIENTS)]
            for client in gone:
                del self._clients[client]
            self._clients[request] = False
        for client in gone:
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def asked(self, client: Any) -> None:
        """Note that a client has sent a request."""
        with self._clients_lock:
            if client in self._clients:
                self._clients[client] = True

    def is_served(self, client: Any) -> bool:
        """Whether a client has not been let go."""
        return client in self._clients

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._clients_lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone, or that is too slow, is no error."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    def hosts(self) -> tuple[str, ...]:
        """Names by which it may be addressed; a foreign site's name that leads here is none."""
        return (f"{LOOPBACK}:{self.server_port}", f"localhost:{self.server_port}")

    def mark(self) -> tuple[tuple[int, int], ...]:
        """Changes whenever the run has written."""
        result = []
        for name in _WATCHED:
            try:
                about = (self.folder / name).stat()
                result.append((about.st_mtime_ns, about.st_size))
            except OSError:
                result.append((0, 0))
        return tuple(result)


class _Answer(BaseHTTPRequestHandler):
    server: LivePage
    protocol_version = "HTTP/1.1"
    timeout = _PATIENCE_SECONDS

    def log_message(self, *_: Any) -> None:
        """Requests are not worth a line on the terminal."""

    def do_GET(self) -> None:
        """The page, its script, its body anew, or the stream of events."""
        self.server.asked(self.request)
        if self.headers.get("Host") not in self.server.hosts():
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "This page is for this machine only.\n")
        elif self.path == "/":
            title, body = self._drawn()
            script = '<script src="/live.js"></script>'
            page = whole_page(title, body, policy=_POLICY, script=script)
            self._send(HTTPStatus.OK, "text/html", page)
        elif self.path == "/live.js":
            self._send(HTTPStatus.OK, "text/javascript", _SCRIPT)
        elif self.path == "/body":
            self._send(HTTPStatus.OK, "text/html", self._drawn()[1])
        elif self.path == "/events":
            self._stream()
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "There is no such page.\n")

    def _drawn(self) -> tuple[str, str]:
        """The picture of the run as it stands, and how long it took."""
        begun = time.perf_counter()
        result = _body(self.server.folder)
        self.server.draw_seconds = time.perf_counter() - begun
        return result

    def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def _stream(self) -> None:
        """Server-sent events: one at once, one for each change, until the run is over."""
        self.close_connection = True
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.server.streams.add(threading.get_ident())
        try:
            self._follow()
        except OSError:
            return  # the browser has gone
        finally:
            self.server.streams.discard(threading.get_ident())

    def _follow(self) -> None:
        """Tell each change at once; ask for a new picture no more often than it can be drawn."""
        seen: Any = None
        sent = drawn = 0.0
        stale = False
        while not self.server.closing.is_set() and self.server.is_served(self.request):
            result = read_status(self.server.folder)
            mark, now = (self.server.mark(), result.condition), time.monotonic()
            stale = stale or mark != seen
            renew = stale and (
                result.over or now - drawn >= _DRAWING_SHARE * self.server.draw_seconds
            )
            if mark != seen or renew:
                seen, sent = mark, now
                drawn, stale = (now, False) if renew else (drawn, stale)
                self._event(result, renew=renew)
                if result.over:
                    return
            elif now - sent >= _IDLE_SECONDS:
                sent = now
                self.wfile.write(b": nothing new\n\n")
            time.sleep(POLL_SECONDS)

    def _event(self, status: RunStatus, *, renew: bool) -> None:
        title = f"{status.condition}: {status.folder.resolve().name}"
        about = {"title": title, "line": _line(status), "over": status.over, "renew": renew}
        data = json.dumps({**about, **status.to_data()})
        self.wfile.write(f"event: status\ndata: {data}\n\n".encode())
        self.wfile.flush()


def _line(status: RunStatus) -> str:
    """How the run stands, in one line."""
    return f"{status.said} · {place_text(status.data)}" if status.data else status.said


def _body(folder: Path) -> tuple[str, str]:
    """Title and body as the run stands now, with a line that says how it stands."""
    result = read_status(folder)
    run = read_run(folder)
    if not result.over:  # that it has not ended is no news
        open_ = tuple(note for note in run.notes if not note.startswith(RESULT))
        run = replace(run, notes=open_)
    title, body = one_run(run)
    return title, element("p", escaped(_line(result)), class_="quiet", id="live") + body


def serve(folder: Path, port: int) -> RunStatus:
    """Serve the page until the run is over.

    Args:
        folder: the run folder.
        port: 0 for a free one.

    Raises:
        ConfigError: the port cannot be had, or the run is over already.
    """
    if read_status(folder).over:
        hint = f"draw its page with: forge report {folder} --open"
        raise ConfigError([Fault(f"the run {folder} is over: there is nothing to watch",
                                 hints=(hint,))])  # fmt: skip
    try:
        server = LivePage(folder, port)
    except OSError as error:
        hint = "choose another: --port 0 takes a free one"
        raise ConfigError(
            [Fault(f"cannot serve on port {port}: {error}", hints=(hint,))]
        ) from error
    thread = threading.Thread(target=server.serve_forever, args=(POLL_SECONDS,), daemon=True)
    thread.start()
    print(f"forge: the run is shown at {server.address} (this machine only)", file=sys.stderr)
    try:
        return _until_over(server)
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def _until_over(server: LivePage) -> RunStatus:
    """Wait for the end of the run, then for the browsers to have fetched the last picture."""
    while not (result := read_status(server.folder)).over:
        time.sleep(POLL_SECONDS)
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while server.streams and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    time.sleep(4 * POLL_SECONDS)  # the last event makes a browser ask once more
    return result
