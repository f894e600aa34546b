"""What a run's columns became, as a file in the run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from forge_kernel.api import PluginError
from forge_plugins.data.columns.preparation import Preparation

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
