"""What a rule found, and the rules themselves by number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

RULES: Final = {
    1: "no recursion: direct, or through other functions",
    2: "every loop has a bound",
    4: "a function fits on a page: at most 60 lines and 4 levels",
    5: "long public functions check what they are given: a raise or an assert",
    6: "no `global`, no module-level state that can change",
    7: "answers yes or no are used, exceptions are not swallowed and keep their cause",
    8: "no dynamic code: eval, exec, __import__, metaclasses, patched modules",
    9: "no mutable default",
    10: "no warning is silenced without its code",
}

NOT_CARRIED_OVER: Final = {
    3: "no allocation after start: Python allocates always; growth is a matter of tests",
}
"""Rules without a static check, and why."""


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One breach of a rule."""

    file: str
    line: int
    rule: int
    function: str  # qualified within the module; empty at module level
    message: str

    def text(self) -> str:
        """One line for people."""
        where = f" in {self.function}" if self.function else ""
        return f"{self.file}:{self.line}: rule {self.rule}{where}: {self.message}"
