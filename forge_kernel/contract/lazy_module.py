"""A module that is imported when first used, so that a plugin's card costs no torch."""

from __future__ import annotations

import importlib
from typing import Any


class LazyModule:
    """Stands for a module and fetches each attribute once.

    Used under `else:` of `if TYPE_CHECKING:`, so that type checkers see the real module. The
    standard library's lazy loader would put an unfinished module into `sys.modules` of the
    embedding process; this one is private to the importing module.
    """

    def __init__(self, name: str) -> None:
        self.__dict__["_forge_name"] = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(importlib.import_module(self.__dict__["_forge_name"]), attribute)
        self.__dict__[attribute] = value
        return value

    def __repr__(self) -> str:
        return f"<lazy module {self.__dict__['_forge_name']}>"
