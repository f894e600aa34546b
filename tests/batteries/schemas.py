"""Plugins whose schema would hang a check, fill the memory or ask an address."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Iterator, Mapping
from dataclasses import field, make_dataclass
from typing import Annotated, Any, Final

from battery import Battery, Trial
from commands import finish
from msgspec import Meta
from plugin_run import scratch

from forge_kernel.api import Kind, PluginInfo
from forge_kernel.errors import ForgeError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline

PATTERNS: Final = (
    r"^(a+)+$", r"^(a*)*$", r"^(a|aa)+$", r"^(a|a?)+$", r"^(.*a){20}$", r"^([a-z]+)*$",
    r"^(\w+\s?)*$", r"^((a{1,99})b?)*$", r"^a*a*a*a*a*b$", r"^(?:(?:a+)+)+$", r"(a+)+b",
    r"^(a*?)*?$", r"^(?=(a+)+b)", r"^(a{0,100}){0,100}$", r"([a-zA-Z]+)*\1$", r"^(([^a])*x?)*$",
    r"^(.*a){3}(.*b){3}$", "(", "a{99999999999}", "a" * 5000,
)  # fmt: skip
SCHEMAS: Final[dict[str, Mapping[str, Any]]] = {
    "an address": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a secure address": {"$ref": "https://example.invalid/schema.json"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a file beside": {"$ref": "other.json"},
    "a place in another": {"$ref": "http://127.0.0.1:9/s.json#/$defs/a"},
    "an address deep inside": {"anyOf": [{"allOf": [{"$ref": "http://127.0.0.1:9/s.json"}]}]},
    "the root": {"$ref": "#"},
    "nothing": {"$ref": "#/$defs/nowhere"},
    "a name of its own": {"$id": "http://127.0.0.1:9/s.json"},
    "a dynamic reference": {"$dynamicRef": "#node"},
    "a recursive reference": {"$recursiveRef": "#"},
    "a huge list": {"enum": list(range(100_000))},
    "many parts": {"anyOf": [{"const": number} for number in range(30_000)]},
    "a slow pattern of names": {"patternProperties": {"^(a+)+$": {"type": "string"}}},
}


HARMLESS: Final[dict[str, Mapping[str, Any]]] = {
    "itself": {"$ref": "#/$defs/callbacks.culprit:Settings"},
    "itself by alternatives": {"anyOf": [{"$ref": "#/$defs/callbacks.culprit:Settings"}, {}]},
    "numbers with dots": {"pattern": r"^([0-9]{1,3}\.){3}[0-9]{1,3}|a+!$"},
    "words": {"pattern": r"^[a-z][a-z0-9_]*!$"},
}
"""Schemas that are followed to an end."""


def culprit(extra: Mapping[str, Any], pattern: str | None) -> type[Any]:
    """A plugin with a text setting that has this in its schema."""
    more = {**extra, **({} if pattern is None else {"pattern": pattern})}
    meta = Meta(extra_json_schema=more, description="A text.")
    values = [("text", Annotated[str, meta], field(default="a"))]
    settings = make_dataclass("Settings", values, frozen=True, kw_only=True)

    class Culprit:
        """Does nothing."""

        info = PluginInfo(name="culprit", kind=Kind.CALLBACKS, config=settings)

        def __init__(self, config: Any) -> None:
            self.config = config

    return Culprit


def judged(extra: Mapping[str, Any], pattern: str | None) -> str:
    text = "a" * 31 + "!"

    def work() -> None:
        def refused(*_: Any) -> Any:
            raise AssertionError("a network was asked")

        socket.socket.connect = socket.getaddrinfo = refused  # type: ignore[method-assign]
        catalog = Catalog.installed()
        setting = f"callbacks=[{{use: culprit, with: {{text: '{text}'}}}}]"
        try:
            catalog.add(culprit(extra, pattern))
            load_pipeline("smoke", [setting], catalog=catalog)
        except ForgeError as error:
            print(f"refused: {error}")

    with scratch() as folder:
        done = finish(work, folder / "said", limit=20.0)
    if done.wrong or done.status:
        return done.wrong or f"exit status {done.status}: {done.said[-300:]}"
    if any(extra is harmless for harmless in HARMLESS.values()):
        return f"refused: {done.said}" if "schema" in done.said else ""
    named = "refused:" in done.said and "culprit" in done.said and "schema" in done.said
    return "" if named else f"not refused: {done.said[-300:]}"


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Each pattern and each schema, in a drawn order."""
    cases: list[tuple[str, Mapping[str, Any], str | None]] = [
        *((f"the pattern {pattern[:40]}", {}, pattern) for pattern in PATTERNS),
        *((name, extra, None) for name, extra in {**SCHEMAS, **HARMLESS}.items()),
    ]
    draw.shuffle(cases)
    load_pipeline("smoke", catalog=Catalog.installed())  # imported before the children are forked
    for name, extra, pattern in itertools.islice(cases, count):
        yield Trial(name, judged(extra, pattern))


BATTERY = Battery(
    "schemas",
    "refused by name when the plugin is asked for; no network, no hang",
    ci=40,
    deep=40,
    trials=trials,
)
