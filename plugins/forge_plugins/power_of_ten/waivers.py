"""Breaches that are accepted, each with its reason, in one reviewed file."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forge_plugins.power_of_ten.finding import RULES, Finding

FILE_NAME = "pot10.toml"


@dataclass(frozen=True, slots=True)
class Waiver:
    """One accepted breach: a rule in a function of a file."""

    rule: int
    path: str  # how the finding's file ends
    function: str
    reason: str

    def is_of(self, file: str | Path) -> bool:
        """Whether the file is the one that the waiver names, from whichever folder it is seen."""
        return f"/{Path(file).resolve().as_posix()}".endswith(f"/{self.path.lstrip('/')}")

    def covers(self, finding: Finding) -> bool:
        """Whether the finding is the one that was accepted."""
        return self.is_of(finding.file) and (finding.rule, finding.function) == (
            self.rule,
            self.function,
        )


def read_waivers(file: Path) -> list[Waiver]:
    """The waivers of a file.

    Raises:
        ValueError: the file is no TOML, or an entry lacks something or says too much.
    """
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: no TOML: {error}") from error
    unknown = sorted(set(data) - {"waiver"})
    entries: Any = data.get("waiver", [])
    if unknown or not isinstance(entries, list):
        raise ValueError(f"{file}: only [[waiver]] tables stand here, not {unknown or entries}")
    return [_waiver(file, number, entry) for number, entry in enumerate(entries, 1)]


def _waiver(file: Path, number: int, entry: Any) -> Waiver:
    keys = {"rule": int, "path": str, "function": str, "reason": str}
    if not isinstance(entry, dict) or set(entry) != set(keys):
        raise ValueError(f"{file}: waiver {number} needs exactly the keys {', '.join(keys)}")
    for key, kind in keys.items():
        if not isinstance(entry[key], kind):
            message = f"{file}: waiver {number}: {key} must be {kind.__name__}"
            raise ValueError(message)  # noqa: TRY004  all faults of the file are of one kind
    if entry["rule"] not in RULES:
        raise ValueError(f"{file}: waiver {number}: there is no rule {entry['rule']}")
    if not entry["reason"].strip() or not entry["path"].strip():
        raise ValueError(f"{file}: waiver {number}: path and reason must say something")
    return Waiver(**entry)


def apply_waivers(
    findings: Sequence[Finding],
    waivers: Sequence[Waiver],
    looked_at: Sequence[str],
    others: Callable[[], Iterable[Path]],
) -> tuple[list[Finding], list[Waiver], list[Waiver]]:
    """Take the accepted breaches out.

    Args:
        findings: in the files that were looked at.
        waivers: of these files, or of others, which are not judged here.
        looked_at: the files.
        others: all files that a waiver may be of; a waiver of none of them covers nothing.

    Returns:
        The findings that are left, the waivers that were used, and those that cover nothing.
    """
    used = [each for each in waivers if any(each.covers(result) for result in findings)]
    left = [result for result in findings if not any(each.covers(result) for each in used)]
    unused = [each for each in waivers if each not in used]
    idle = [each for each in unused if any(each.is_of(file) for file in looked_at)]
    apart = [each for each in unused if each not in idle]
    if apart:
        known = [*others()]
        idle += [each for each in apart if not any(each.is_of(file) for file in known)]
    return left, used, idle
