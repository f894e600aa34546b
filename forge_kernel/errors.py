"""What can go wrong, as one family of errors that say where, what and how to mend it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

MAX_SHOWN: Final = 60
"""Faults that an error's text spells out; `faults` has all of them."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a text: 1-based line and column (in code points) and the length marked there."""

    source: str
    line: int = 0  # 0: the source has no lines (a command line argument, a Python call)
    column: int = 0
    length: int = 1
    text: str = ""

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source

    def frame(self) -> list[str]:
        """The marked line with carets under the place; nothing for a source without lines."""
        if not self.line or not self.text:
            return []
        text = self.text.replace("\t", " ")
        start = self.column - 1
        left = max(0, start - 60)  # a long line is cut round the mark
        shown = text[left : left + 96]
        number = str(self.line)
        carets = "^" * max(1, min(self.length, len(shown) - (start - left)))
        gutter = " " * len(number)
        return [
            f"    {number} | {shown}".rstrip(),
            f"    {gutter} | {' ' * (start - left)}{carets}",
        ]


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake of the user's: place, path of the setting, what is wrong, how to mend it."""

    message: str
    path: str = ""
    mark: Mark | None = None
    hints: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        head = "  ".join(part for part in (str(self.mark or ""), self.path) if part)
        lines = [head] if head else []
        if self.mark is not None:
            lines += self.mark.frame()
        lines.append(f"  {self.message}" if head else self.message)
        lines += [f"  {hint}" for hint in self.hints]
        return "\n".join(lines)

    @property
    def place(self) -> tuple[str, int, int]:
        """Sorting key: faults are told in the order of the file."""
        return (
            (self.mark.source, self.mark.line, self.mark.column) if self.mark else ("\uffff", 0, 0)
        )


class ForgeError(Exception):
    """Base of all errors that the kernel raises on purpose."""

    exit_status: ClassVar[int] = 3


class FaultsError(ForgeError):
    """An error that carries faults; its text is all of them, in the order of the file."""

    exit_status: ClassVar[int] = 2

    def __init__(self, faults: Sequence[Fault] | str) -> None:
        result = [Fault(faults)] if isinstance(faults, str) else list(faults)
        assert result, "an error without a fault"
        self.faults: tuple[Fault, ...] = tuple(sorted(result, key=lambda fault: fault.place))
        texts = [str(fault) for fault in self.faults[:MAX_SHOWN]]
        if len(self.faults) > MAX_SHOWN:
            texts.append(f"... and {len(self.faults) - MAX_SHOWN} more")
        super().__init__("\n\n".join(texts))


class ConfigError(FaultsError, ValueError):
    """The pipeline file, an override or a configuration object is wrong."""


class PlanError(FaultsError):
    """The parts do not make a run: missing, doubled, contradicting or unordered."""


class PluginError(FaultsError):
    """A plugin cannot be loaded or breaks the contract of its kind."""


class RunError(ForgeError):
    """The run failed on the way."""


class NonFiniteError(RunError):
    """A gradient or the loss was NaN or infinite and the policy is to stop."""


class OutOfMemoryError(RunError):
    """The memory of the device or the host did not suffice."""


class HangError(RunError):
    """The run stood still for longer than it may."""

    def __init__(
        self, message: str = "the run stood still for run.hang_minutes: see stacks.txt"
    ) -> None:
        super().__init__(message)  # raised from another thread, it comes without words


class CheckpointError(RunError):
    """A checkpoint cannot be written, found or trusted."""


class OwnershipError(RunError):
    """Checked mode: a plugin wrote what its hook does not own."""


class Ended(BaseException):
    """A signal came while nothing was being trained; no part of the command line catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_status = 128 + number


INTERRUPTS: Final = (KeyboardInterrupt, Ended)
"""What the user's signals raise; all else that ends a run is an error of whoever raised it."""
