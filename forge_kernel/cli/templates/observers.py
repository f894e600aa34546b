"""New plugin: a forge plugin of the kind observers."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated

from forge_kernel.api import Kind, LogRecord, PluginInfo, Run, hookimpl
from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    scale: Annotated[float, Meta(gt=0, description="a factor")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.OBSERVERS,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def on_log(self, run: Run, record: LogRecord) -> None:
        """Tell the loss of each log interval, times the factor."""
        loss = record.metrics.get("loss")
        if loss is not None and not run.quiet:
            print(f"step {record.step}: {loss * self.config.scale:.4f}", file=sys.stderr)
