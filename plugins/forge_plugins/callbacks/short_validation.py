"""Validations of the first batches only."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from msgspec import Meta

from forge_kernel.api import Data, Kind, PluginInfo, Run, hookimpl


@dataclass(frozen=True, kw_only=True)
class ShortValidationConfig:
    """How many."""

    batches: Annotated[
        int, Meta(ge=1, description="validation batches that are looked at, the first ones")
    ] = 100


class ShortValidation:
    """Validations of the first batches only.

    Every validation looks at the same ones; the rest of the held-out samples is read by nobody.
    """

    info = PluginInfo(name="short_validation", kind=Kind.CALLBACKS, config=ShortValidationConfig)

    def __init__(self, config: ShortValidationConfig) -> None:
        self.config = config

    @hookimpl
    def transform_data(self, run: Run, data: Data) -> Data:
        """The same data, with a shorter validation."""
        del run
        result: Any = copy.copy(data)  # of its own class: plugins ask for that
        count = self.config.batches

        def validation() -> Iterator[Any]:
            return islice(data.validation(), count)

        result.validation = validation
        shorter: Data = result
        return shorter
