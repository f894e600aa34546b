"""New plugin: a forge plugin of the kind exporters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from forge_kernel.api import Kind, PluginInfo, Run, hookimpl
from msgspec import Meta


@dataclass(frozen=True, kw_only=True)
class NewPluginConfig:
    """Settings of New plugin."""

    scale: Annotated[float, Meta(gt=0, description="a factor")] = 1.0


class NewPlugin:
    """New plugin."""

    info = PluginInfo(
        name="new_plugin",
        kind=Kind.EXPORTERS,
        config=NewPluginConfig,
    )

    def __init__(self, config: NewPluginConfig) -> None:
        self.config = config

    @hookimpl
    def export(self, run: Run, folder: Path) -> Mapping[str, Any]:
        """Write the number of parameters, times the factor."""
        count = sum(parameter.numel() for _, parameter in run.named_parameters())
        (folder / "size.txt").write_text(f"{count * self.config.scale}\n", encoding="utf-8")
        return {"format": "text", "parameters": count}
