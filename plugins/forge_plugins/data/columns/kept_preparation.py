"""What a run's columns became, as a file in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from forge_kernel.api import PluginError
from forge_plugins.data.columns.preparation import Preparation
from forge_plugins.data.fingerprint import RemembersContent

FILE: Final = "preparation.json"


def read(folder: Path | None) -> Preparation | None:
    """What the run has fitted before; None where it has not.

    Raises:
        PluginError: the file is damaged.
    """
    if folder is None or not (folder / FILE).is_file():
        return None
    file = folder / FILE
    try:
        return Preparation.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"file: {file} is damaged ({error}): put it back, or begin a new run"
        raise PluginError(message) from error


def write(folder: Path | None, preparation: Preparation) -> None:
    """Keep what was fitted.

    Raises:
        PluginError: the folder cannot be written.
    """
    if folder is None:
        return
    file = folder / FILE
    beside = file.with_name(f".{FILE}")
    text = json.dumps(preparation.to_data(), ensure_ascii=False, indent=1)
    try:
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(file)
    except OSError as error:
        raise PluginError(f"file: {file} cannot be written: {error}") from error


class KeepsPreparation(RemembersContent):
    """A data plugin's part of a checkpoint: the content, and what was fitted to read it."""

    preparation: Preparation | None
    """Given before `make_data`, or known after it."""

    def state_dict(self) -> dict[str, Any]:
        """Which content the run has read, and what it becomes."""
        own = None if self.preparation is None else self.preparation.to_data()
        return {**super().state_dict(), "preparation": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another content, unless allowed, or with another preparation.

        Raises:
            PluginError: it is another.
        """
        super().load_state_dict(state)
        kept = state.get("preparation")
        if kept is not None and Preparation.of(kept) != self.preparation:
            raise PluginError(
                f"{self._identity.plugin}: what {self._identity.file} becomes is not what the run "
                f"was trained with: put {FILE} back into the run's folder"
            )
