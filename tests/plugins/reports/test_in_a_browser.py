"""Report and live page in a real browser: nothing complained of, nothing loaded, all readable.

Deep: they need a browser (`apt-get install chromium`) and fail without one. FORGE_PICTURES names a
folder that keeps the pictures, to be looked at.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, Page, started
from report_runs import folder_of, logged

from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_plugins.reports.page import report_page, write_report
from forge_plugins.reports.run_data import read_run

pytestmark = pytest.mark.deep

SCHEMES = ["light", "dark"]
CLOCK = (
    "phases={use: grokfast, with: {warmup_steps: 20, acceleration_steps: 40,"
    " consolidation_steps: 20, refinement_steps: 10}}"
)
CAPABILITIES = (
    "callbacks=[{use: capabilities, with: {capabilities: {"
    "begun: {metric: loss, threshold: 9.0, mode: min},"
    " 'one with a name that is longer than there is room for': "
    "{metric: loss, threshold: 3.3, mode: min}}}}]"
)
SETTINGS = [
    "run.max_steps=100", "run.log_every=2", "run.validate_every=5", CLOCK, CAPABILITIES,
    "quantizer.with.metrics=layers",
]  # fmt: skip

READABLE = """
(() => {
  const found = [];
  const shade = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const part = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const ground = (part) => {
    for (let at = part; at; at = at.parentElement) {
      const colour = shade(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const contrast = (part, colour) => {
    const [one, two] = [light(shade(colour)), light(ground(part))].sort((a, b) => b - a);
    return (one + 0.05) / (two + 0.05);
  };
  for (const svg of document.querySelectorAll("svg")) {
    if (!svg.getClientRects().length) continue;
    const name = svg.querySelector("title").textContent;
    const box = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].map((t) => [t, t.getBoundingClientRect()]);
    texts.forEach(([text, at], index) => {
      const words = text.textContent;
      if (at.left < box.left - 1 || at.right > box.right + 1
          || at.top < box.top - 1 || at.bottom > box.bottom + 1)
        found.push(`${name}: '${words}' is cut off`);
      if (contrast(svg, getComputedStyle(text).fill) < 4.5)
        found.push(`${name}: '${words}' is too pale`);
      if (Math.max(at.height, at.width) > 0 && Math.min(at.height, at.width) < 8
          && words.length > 1)
        found.push(`${name}: '${words}' is too small`);
      for (const [other, where] of texts.slice(index + 1)) {
        const wide = Math.min(at.right, where.right) - Math.max(at.left, where.left);
        const high = Math.min(at.bottom, where.bottom) - Math.max(at.top, where.top);
        if (wide > 1 && high > 3) found.push(`${name}: '${words}' covers '${other.textContent}'`);
      }
    });
    for (const line of svg.querySelectorAll("path.line")) {
      const at = line.getBoundingClientRect();
      if (at.width + at.height === 0) found.push(`${name}: a line without length`);
      if (contrast(svg, getComputedStyle(line).color) < 3) found.push(`${name}: a pale line`);
    }
    if (!svg.querySelector("path.line, rect, path.level")) found.push(`${name}: nothing drawn`);
  }
  for (const part of document.querySelectorAll("p, dt, dd, th, td, h1, h2, h3, summary, .badge")) {
    if (part.getClientRects().length && part.textContent.trim()
        && contrast(part, getComputedStyle(part).color) < 4.5)
      found.push(`'${part.textContent.slice(0, 40)}' is too pale`);
  }
  for (const table of document.querySelectorAll(".wide"))
    if (window.innerWidth > 1000 && table.scrollWidth > table.clientWidth)
      found.push(`a table is cut off: ${table.textContent.slice(0, 40)}`);
  if (document.documentElement.scrollWidth > window.innerWidth)
    found.push(`the page is ${document.documentElement.scrollWidth} wide`);
  return found;
})()
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found, place = started()
    yield found
    found.close()
    place.cleanup()


@pytest.fixture(scope="module")
def reports(tmp_path_factory: Any) -> dict[str, Path]:
    """Pages of a run with everything, of several, of one that failed, and of one with nothing."""
    place = tmp_path_factory.mktemp("reports")
    runs = []
    for name, seed, more in (
        ("everything", 0, []), ("everything", 1, []), ("everything", 2, []),
        ("plain", 0, ["quantizer=null", "regularizers=null", "exporters=[{use: state_dict}]"]),
    ):  # fmt: skip
        folder = place / f"{name}-{seed}"
        settings = [*SETTINGS, f"run.seed={seed}", f"run.name={name}", *more]
        if more:
            settings.remove("quantizer.with.metrics=layers")
        run(load_pipeline("smoke", settings), output_dir=folder, quiet=True)
        runs.append(read_run(folder))
    rising = [logged(step, loss=10.0**step) for step in range(1, 9)]
    error = "NonFiniteError: the loss is not finite. " + 30 * "Long. "
    failed = read_run(folder_of(place / "failed", rising, state="failed", error=error))
    nothing = folder_of(place / "nothing", [])
    for file in ("result.json", "status.json", "environment.json", "metrics.jsonl"):
        (nothing / file).unlink()
    made = {
        "one": [runs[0]], "several": runs, "failed": [failed], "nothing": [read_run(nothing)],
    }  # fmt: skip
    pages = {}
    for name, shown in made.items():
        pages[name] = place / f"{name}.html"
        write_report(shown, pages[name])
    return pages


def kept(page: Page, name: str, tmp_path: Path) -> None:
    """A picture, where it is asked for."""
    place = os.environ.get("FORGE_PICTURES")
    file = page.picture((Path(place) if place else tmp_path) / f"{name}.png")
    assert file.stat().st_size > 10_000


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", ["one", "several", "failed", "nothing"])
def test_a_report_opened_from_disk_is_readable_and_asks_for_nothing(
    browser: Browser, reports: dict[str, Path], tmp_path: Path, name: str, width: int, scheme: Any
) -> None:
    """Red with a font from elsewhere, labels that cover each other, or grey on grey."""
    page = browser.page(width=width, scheme=scheme)
    page.call(
        "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=-1,
        uploadThroughput=-1,
    )  # fmt: skip
    address = reports[name].as_uri()
    page.open(address)
    for detail in ("", "document.querySelectorAll('details').forEach((d) => (d.open = true))"):
        if detail:
            page.evaluate(detail)
        assert page.evaluate(READABLE) == []
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = false))")
    kept(page, f"{name}-{width}-{scheme}", tmp_path)
    assert page.complaints == []
    assert page.requests == [address]
    page.close()


def test_the_scale_is_switched_without_a_script(browser: Browser, reports: dict[str, Path]) -> None:
    page = browser.page()
    page.call("Emulation.setScriptExecutionDisabled", value=True)
    page.open(reports["one"].as_uri())

    def shown(scale: str) -> bool:
        path = f".scales .on-{scale}"
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        node = page.call("DOM.querySelector", nodeId=root, selector=path)["nodeId"]
        try:
            page.call("DOM.getBoxModel", nodeId=node)
        except RuntimeError:
            return False
        return True

    def press(scale: str) -> None:
        root = page.call("DOM.getDocument")["root"]["nodeId"]
        selector = f".scales label[for$='-{scale}']"
        node = page.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        [x1, y1, _, _, x2, y2, *_] = page.call("DOM.getBoxModel", nodeId=node)["model"]["content"]
        where = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "button": "left", "clickCount": 1}
        for kind in ("mousePressed", "mouseReleased"):
            page.call("Input.dispatchMouseEvent", type=kind, **where)

    for scale, other in (("log", "linear"), ("linear", "log")):
        press(scale)
        assert (shown(scale), shown(other)) == (True, False)
    page.close()


def test_many_lines_and_long_names_do_not_cover_each_other(
    browser: Browser, tmp_path: Path
) -> None:
    names = [f"part/a layer with a long name, number {number}" for number in range(14)]
    values = {name: 0.1 * number for number, name in enumerate(names)}
    records = [logged(step, loss=1.0 / step, **values) for step in range(1, 30)]
    file = tmp_path / "page.html"
    file.write_text(report_page([read_run(folder_of(tmp_path / "run", records))]))
    page = browser.page()
    page.open(file.as_uri())
    assert page.evaluate(READABLE) == []
    page.close()


LIVE = """
import sys, time
from pathlib import Path
sys.path.insert(0, PARTS)
from kernel_parts import make_plugin
from forge_kernel import load_pipeline
from forge_kernel.api import Kind
from forge_kernel.runner import run

def on_step_end(self, run, step):
    time.sleep(0.02)
    if step.number == 30:
        run.emit_event("told", "The signal <b>came</b>.")
    if Path("end").exists():
        run.request("stop", reason="told to")

run(load_pipeline("smoke", SETTINGS + ["run.max_steps=100000"]), output_dir="run", quiet=True,
    plugins=[make_plugin("slow", Kind.CALLBACKS, on_step_end=on_step_end)])
"""


@pytest.mark.spec("H8")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_live_page_follows_a_run_to_its_end(
    browser: Browser, tmp_path: Path, scheme: Any
) -> None:
    """Red when the picture is not renewed, what was opened closes, or the end looks like a loss."""
    parts = repr(str(Path(__file__).resolve().parents[2]))
    code = LIVE.replace("PARTS", parts).replace("SETTINGS", json.dumps(SETTINGS))
    training = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path)
    serving: Any = None
    page = browser.page(scheme=scheme)
    try:
        deadline = 600
        while not (tmp_path / "run/status.json").is_file() and deadline:
            browser.listen(0.1)
            deadline -= 1
        command = [sys.executable, "-m", "forge_kernel", "watch", "run", "--serve"]
        serving = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        said = serving.stderr.readline()
        address = re.search(r"http://\S+/", said)[0]  # type: ignore[index]
        page.open(address)
        opened = "document.querySelector('details[data-key=Configuration]').open"
        page.evaluate(f"{opened} = true")
        page.wait_for("document.querySelector('.pick:not(:checked)') !== null")
        page.evaluate("document.querySelector('.pick:not(:checked)').click()")
        chosen = page.evaluate("document.querySelector('.pick:checked').id")
        page.wait_for("document.body.textContent.includes('The signal <b>came</b>.')")
        step = "Number(document.getElementById('live').textContent.match(/step (\\d+)/)[1])"
        before = page.evaluate(step)
        page.wait_for(f"{step} > {before} + 10")
        page.wait_for("document.querySelector('svg') !== null")
        assert page.evaluate(opened) is True
        assert page.evaluate("document.querySelector('.pick:checked').id") == chosen
        assert page.evaluate(READABLE) == []
        kept(page, f"live-{scheme}", tmp_path)
        (tmp_path / "end").touch()
        page.wait_for("document.title.startsWith('ended')")
        page.wait_for("document.querySelector('.badge.completed') !== null")
        assert "lost its server" not in page.evaluate("document.body.textContent")
        assert training.wait(60) == 0
        assert serving.wait(60) == 0
        assert page.complaints == []
        own = {f"{address}{path}" for path in ("", "live.js", "body", "events")}
        assert set(page.requests) <= own
        assert "lost its server" not in page.evaluate("document.body.textContent")
    finally:
        for process in (training, serving):
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(60)
        if serving is not None:
            serving.stderr.close()
        page.close()


def test_a_page_whose_server_is_gone_says_so(browser: Browser, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "run", [logged(1, loss=1.0), logged(2, loss=0.5)])
    status = {"state": "training", "step": 2, "pid": os.getpid(), "heartbeat": None}
    (folder / "status.json").write_text(json.dumps(status))
    command = [sys.executable, "-m", "forge_kernel", "watch", str(folder), "--serve"]
    serving = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    page = browser.page()
    try:
        said = serving.stderr.readline()  # type: ignore[union-attr]
        page.open(re.search(r"http://\S+/", said)[0])  # type: ignore[index]
        page.wait_for("document.title.startsWith('running')")
        serving.kill()
        serving.wait()
        page.wait_for("document.getElementById('live').textContent.includes('lost its server')")
    finally:
        serving.kill()
        serving.wait()
        serving.stderr.close()  # type: ignore[union-attr]
        page.close()


def test_without_a_browser_the_tests_fail_and_say_what_to_install(monkeypatch: Any) -> None:
    from browser import BrowserError

    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("FORGE_BROWSER", raising=False)
    with pytest.raises(BrowserError, match="apt-get install chromium"):
        started()
