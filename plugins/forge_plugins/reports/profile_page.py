"""The profile of a data file as a page of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from forge_plugins.reports.bars import svg_bars
from forge_plugins.reports.markup import element, escaped
from forge_plugins.reports.notation import number_text
from forge_plugins.reports.page import whole_page
from forge_plugins.reports.run_sections import card
from forge_plugins.reports.tables import number_cell, table

_FIELDS: Final = ("field", "type", "shape of a record", "smallest", "mean", "largest")


def profile_page(profile: Mapping[str, Any]) -> str:
    """A whole HTML document.

    Args:
        profile: of `formats.profile.Profile.to_data`.
    """
    parts = [
        element("header", element("h1", escaped(profile["file"]))),
        _tiles(profile),
        element("h2", "Fields"),
        element("section", table(_FIELDS, _fields(profile["fields"]), "number"), class_="card"),
        element("h2", "Quality"),
        _reasons(profile),
        element("h2", "Spread"),
        element("div", _charts(profile), class_="charts"),
    ]
    return whole_page(f"Data: {profile['file']}", "\n".join(parts))


def _tiles(profile: Mapping[str, Any]) -> str:
    texts = profile["format"] == "texts"
    what, unit = ("documents", "characters") if texts else ("records", "numbers in an input")
    below = "of those that serve" if texts else f"at quality {profile['threshold']:g} and above"
    tiles = [
        ("format", escaped(profile["format"]), f"targets: {profile['target']}"),
        (what, number_text(profile["records"]), ""),
        ("kept", number_text(profile["kept"]), below),
        (unit, number_text(profile["length"]), ""),
    ]
    return element("dl", "".join(_tile(*item) for item in tiles), class_="tiles")


def _tile(name: str, value: str, under: str) -> str:
    below = element("span", escaped(under), class_="under")
    return element(
        "div", element("dt", escaped(name)) + element("dd", value + below), class_="card"
    )


def _fields(fields: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    return [
        (
            escaped(name),
            [
                escaped(about["type"]), escaped(about["shape"] or "one"),
                *(number_cell(about[key]) for key in ("smallest", "mean", "largest")),
            ],
        )
        for name, about in fields.items()
    ]  # fmt: skip


def _reasons(profile: Mapping[str, Any]) -> str:
    if not profile["reasons"]:
        return card("Nothing is wrong with any record", "")
    rows = [
        (
            escaped(reason),
            [
                f"{about['records']:,}", f"{profile['left_out'].get(reason, 0):,}",
                escaped(", ".join(map(str, about["first"]))),
            ],
        )
        for reason, about in profile["reasons"].items()
    ]  # fmt: skip
    heads = ("reason", "records", "left out for it first", "first record numbers, from 0")
    return element("section", table(heads, rows, "plain"), class_="card")


def _charts(profile: Mapping[str, Any]) -> str:
    charts = []
    if profile["labels"]:
        labels = profile["labels"]
        charts.append(svg_bars("Labels of the kept records", [*labels], [*labels.values()], 0))
    if profile["scores"]:
        scores = profile["scores"]
        charts.append(svg_bars("Records by quality", scores["names"], scores["counts"], 2))
    if profile["spread"]:
        texts = profile["format"] == "texts"
        title = "Documents by their characters" if texts else "Numbers of inputs by their size"
        charts.append(svg_bars(title, profile["spread"]["names"], profile["spread"]["counts"], 1))
    return "".join(charts)
