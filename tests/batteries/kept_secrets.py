"""Tokens and passwords in settings and the environment: in no log, run folder, report or error."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from battery import Battery, Trial
from commands import Finished, command, finish
from forged import warm
from msgspec import Meta
from plugin_run import scratch

from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.secret_settings import variable

TOKENS: Final = (
    "sk-proj-4fQ9zX1vT7bK2mN8", "ghp_16C7e42F292c6912E7710c838347Ae178B4a", "AKIAIOSFODNN7EXAMPLE",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4", "hf_QWxsWW91ckJhc2VBcmU",
    "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "xoxb-123456789012-abcdefABCDEF", "0" * 8 + "deadbeef",
    "pa ss wo rd", "quote'd", 'double"d', "back\\slash", "ümläut-tökën", "percent%20", "dollar$HOME",
    "brace{x}", "comma,token", "colon:token", "glpat-20charslong_aaaaa", "AIzaSyD-9tSrke72PouQMnMX",
)  # fmt: skip
ACTS: Final = (
    "nothing", "tells it", "fails in the constructor", "fails at the start", "fails in a step",
    "fails in a log",
)  # fmt: skip
WAYS: Final = ("an override", "the file", "a variable", "an address", "the environment alone")
OTHERS: Final = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "GITHUB_TOKEN")
PLACE: Final = ("callbacks", 0, "with", "token")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of the plugin under trial."""

    token: Annotated[str, Meta(description="A token.", extra_json_schema={"writeOnly": True})] = ""
    address: Annotated[str, Meta(description="A server.")] = ""


class Culprit:
    """Has a token, and may be careless with it."""

    info = PluginInfo(name="culprit", kind=Kind.CALLBACKS, config=Settings)
    act = "nothing"

    def __init__(self, config: Settings) -> None:
        self.config = config
        self.secret = config.token or config.address
        self.fail("fails in the constructor")

    def fail(self, where: str) -> None:
        if self.act == where:
            raise ValueError(f"the server refuses {self.secret}")

    @hookimpl
    def on_run_start(self, run: Any) -> None:
        Path("got").write_text(self.secret, encoding="utf-8")
        self.fail("fails at the start")
        if self.act == "tells it":
            run.emit_event("connected", f"Connected with {self.secret}.", token=self.secret)

    @hookimpl
    def on_step_end(self, run: Any, step: Any) -> None:
        self.fail("fails in a step")

    @hookimpl
    def on_log(self, run: Any, record: Any) -> None:
        self.fail("fails in a log")


def forge(root: Path, arguments: list[str], act: str, variables: dict[str, str]) -> Finished:
    def work() -> None:
        catalog = Catalog.installed()
        Culprit.act = act
        catalog.add(Culprit)
        Catalog.installed = classmethod(lambda cls: catalog)  # type: ignore[method-assign,assignment]
        command(*arguments, folder=root, variables=variables)()

    return finish(work, root / "said")


def leaks(root: Path, secret: str, said: str) -> list[str]:
    """Where the secret can be read."""
    forms = {secret, secret.encode("unicode_escape").decode(), secret.replace("'", "''")}
    forms |= {secret.replace("\\", "\\\\").replace('"', '\\"'), secret.replace('"', "&quot;")}
    raw = [form.encode("utf-8", "surrogatepass") for form in forms]
    found = ["the terminal"] if any(form in said for form in forms) else []
    for path in sorted((root / "r").rglob("*")):
        if path.is_file() and any(form in path.read_bytes() for form in raw):
            found.append(path.relative_to(root).as_posix())
    return found


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def judged(root: Path, secret: str, act: str, way: str) -> str:
    variables = dict.fromkeys(OTHERS, secret)
    name, value = "token", secret
    if way == "an address":
        secret = "".join(sign for sign in secret if sign.isalnum() and sign.isascii())
        name, value = "address", f"https://me:{secret}@127.0.0.1/x"
    elif way == "a variable":
        variables["FORGE_SECRET_MINE"] = secret
        value = "env:FORGE_SECRET_MINE"
    elif way == "the environment alone":
        value = ""
    entry = f"[{{use: culprit, with: {{{name}: {quoted(value)}}}}}]"
    arguments = [
        "run",
        "smoke",
        "--output-dir",
        "r",
        "--set",
        "run.max_steps=3",
        "--set",
        "run.log_every=1",
    ]
    if way == "the file":
        (root / "p.yaml").write_text(f"extends: smoke.yaml\ncallbacks: {entry}\n", encoding="utf-8")
        from forge_kernel.planning.pipeline_file import shipped_pipelines

        shutil.copy(shipped_pipelines()["smoke"], root / "smoke.yaml")
        arguments[1] = "p.yaml"
    else:
        arguments += ["--set", f"callbacks={entry}"]
    done = forge(root, arguments, act, variables)
    said = done.said
    if done.wrong:
        return done.wrong
    silent = act == "nothing" or act == "tells it"
    if silent != (done.status == 0):
        return f"exit status {done.status}: {said[-300:]}"
    wanted = value if way in ("an address", "the environment alone") else secret
    if silent and (root / "got").read_text(encoding="utf-8") != wanted:
        return "the plugin did not get it"
    if (root / "r" / "config.yaml").is_file():
        report = forge(root, ["report", "r"], act, variables)
        said += report.said
    places = leaks(root, secret, said)
    if places:
        return f"read in {places}"
    return wrong_resume(root, way, name, value, variables) if silent else ""


def wrong_resume(root: Path, way: str, name: str, value: str, variables: dict[str, str]) -> str:
    """A run that goes on asks for the variable, and goes on with it."""
    if way == "the environment alone":
        return ""
    named = "FORGE_SECRET_MINE" if way == "a variable" else variable((*PLACE[:-1], name))
    variables = {key: text for key, text in variables.items() if key != "FORGE_SECRET_MINE"}
    arguments = ["resume", "r", "-q", "--set", "run.max_steps=4"]
    done = forge(root, arguments, "nothing", variables)
    if done.status != 2 or named not in done.said:
        return f"resume does not ask for {named}: {done.status}, {done.said[-300:]}"
    given = variables | {named: value if way != "a variable" else "again"}
    done = forge(root, arguments, "nothing", given)
    return "" if done.status == 0 else f"resume with the variable: {done.said[-300:]}"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Tokens in turn, ways and acts in a drawn order."""
    warm()
    for name in (*OTHERS, "FORGE_SECRET_MINE"):
        os.environ.pop(name, None)
    cases = list(itertools.product(WAYS, ACTS))
    draw.shuffle(cases)
    tokens = itertools.cycle(TOKENS)
    for way, act in itertools.islice(itertools.cycle(cases), count):
        token = next(tokens)
        with scratch() as root:
            yield Trial(
                f"{token[:12]} by {way}, a plugin that {act}", judged(root, token, act, way)
            )


BATTERY = Battery(
    "kept-secrets",
    "read nowhere; asked for by its variable's name when the run goes on",
    ci=30,
    deep=120,
    trials=trials,
)
