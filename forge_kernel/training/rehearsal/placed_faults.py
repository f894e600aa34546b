"""What a part of a run raised, as a fault at the place of the file that names it."""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path as FilePath
from types import TracebackType
from typing import Any, Final

from forge_kernel.config.document import Document, Path, look_up, show_path
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import Fault, FaultsError, ForgeError, PlanError
from forge_kernel.planning.plan import Planned

_RUN: Final = re.compile(r"\brun\.(\w+)")
_SETTINGS: Final = re.compile(rf"\b((?:{'|'.join(Kind)})(?:\[\d+\])?\.with\.\w+)")
_PARTS: Final = re.compile(r"\w+")
_RUN_SETTINGS: Final = frozenset(item.name for item in fields(RunConfig))
_KERNEL: Final = FilePath(__file__).resolve().parents[2]
_LONGEST: Final = 10_000  # frames


class Places:
    """Where the parts of a run stand in the file that names them.

    Args:
        entries: the plugins of the run.
        document: the file; None: a program built the pipeline, and faults have paths alone.
    """

    def __init__(self, entries: Sequence[Planned], document: Document | None) -> None:
        self._entries, self._document = entries, document

    def fault(self, message: str, path: Path, *hints: str) -> Fault:
        """A fault at a path of the pipeline."""
        mark = self._document.mark(path) if self._document is not None and path else None
        return Fault(message, show_path(path), mark, tuple(hint for hint in hints if hint))

    def path_of(self, label: str) -> Path:
        """Where a plugin is named, by its label; of one that a program handed in, nowhere."""
        for entry in self._entries:
            if entry.label == label and entry.instance is None:
                return entry.path
        return ()

    def faults_of(self, error: BaseException, blamed: tuple[str, str] | None) -> list[Fault]:
        """What was raised, as faults.

        Args:
            error: what a plugin or the kernel raised.
            blamed: label and hook of the plugin that it came out of, where one is known.
        """
        entry = self._entry(error, blamed)
        path = entry.path if entry is not None else ()
        if isinstance(error, FaultsError):
            return [self._of_fault(fault, entry, path) for fault in error.faults]
        text = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, ForgeError):
            return [self.fault(text, self._setting(text, entry) or path)]
        name = type(error).__name__
        message = (
            f"{entry.label} failed: {name}: {text}" if entry is not None else f"{name}: {text}"
        )
        return [self.fault(message, self._setting(text, entry) or path, raised_in(error))]

    def _of_fault(self, fault: Fault, entry: Planned | None, path: Path) -> Fault:
        if fault.mark is not None:
            return fault
        if fault.path and entry is not None:  # of one of its settings
            return self.fault(fault.message, (*path, "with", *fault.path.split(".")), *fault.hints)
        said = "\n".join((fault.message, *fault.hints))
        return self.fault(fault.message, self._setting(said, entry) or path, *fault.hints)

    def _entry(self, error: BaseException, blamed: tuple[str, str] | None) -> Planned | None:
        """Whose error it is: by its traceback, else by the label that its text begins with."""
        text = str(error)
        label = blamed[0] if blamed is not None else None
        for entry in self._entries:
            if entry.instance is None and (
                entry.label == label or (label is None and text.startswith(entry.label))
            ):
                return entry
        return None

    def _setting(self, text: str, entry: Planned | None) -> Path | None:
        """The setting that a text is about: one whose value it quotes, that it names, or holds."""
        if entry is not None:
            base = (*entry.path, "with")
            given = self._given(base)
            words = {name: value for name, value in given.items() if isinstance(value, str)}
            quoted = [name for name, value in words.items() if f"'{value}'" in text]
            named = sorted(name for name in given if _says(text, name))
            held = [name for name, value in words.items() if len(value) > 1 and value in text]
            named.sort(key=text.index)
            for name in (*quoted, *named, *held):
                return (*base, name)
        for place in _SETTINGS.findall(text):
            return tuple(int(part) if part.isdecimal() else part for part in _PARTS.findall(place))
        for name in _RUN.findall(text):
            if name in _RUN_SETTINGS:
                return ("run", name)
        return None

    def _given(self, path: Path) -> Mapping[str, Any]:
        """The settings that the file itself gives."""
        if self._document is None:
            return {}
        try:
            given = look_up(self._document.data, path)
        except KeyError:
            return {}
        return given if isinstance(given, Mapping) else {}


@contextmanager
def placed(entries: Sequence[Planned], document: Document | None) -> Iterator[None]:
    """What is raised inside, before there is a session, is told at its place.

    Raises:
        PlanError: in its place.
    """
    try:
        yield
    except (PlanError, OSError):
        raise
    except Exception as error:
        raise PlanError(Places(entries, document).faults_of(error, None)) from error


def _says(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) is not None


def raised_in(error: BaseException) -> str:
    """Where an error arose: the innermost line that is neither the kernel's nor torch's."""
    place = ""
    trace: TracebackType | None = error.__traceback__
    for _ in range(_LONGEST):
        if trace is None:
            break
        file, line = trace.tb_frame.f_code.co_filename, trace.tb_lineno
        if not _is_library(file):
            code = linecache.getline(file, line).strip()
            place = f"raised in {file}:{line}" + (f": {code}" if code else "")
        trace = trace.tb_next
    return place


def _is_library(file: str) -> bool:
    """Whether a file is of torch, of Python's own machinery or of the kernel."""
    path = FilePath(file)
    return file.startswith("<") or "torch" in path.parts or _KERNEL in path.parents
