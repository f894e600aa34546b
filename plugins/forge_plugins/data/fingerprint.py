"""Whether a resumed run reads what it has read before."""

from __future__ import annotations

from typing import Any

from forge_kernel.api import PluginError


class Identity:
    """The content that a data plugin has read, as a checkpoint keeps it.

    Args:
        plugin: name of the plugin, for messages.
        on_change: what to do when a checkpoint tells another content.
    """

    def __init__(self, plugin: str, on_change: str) -> None:
        self.plugin, self._on_change = plugin, on_change
        self.file, self.content, self.records = "", "", 0

    def set(self, file: str, content: str, records: int) -> None:
        """What was read: the file's name, the hash of its content, its samples or tokens."""
        self.file, self.content, self.records = file, content, records

    def state_dict(self) -> dict[str, Any]:
        """The identity, for a checkpoint."""
        return {"file": self.file, "content": self.content, "records": self.records}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with a checkpoint's.

        Raises:
            PluginError: the content is another and the setting does not allow it.
        """
        if state["content"] == self.content or self._on_change == "go_on":
            return
        raise PluginError(
            f"{self.plugin}: {self.file} is not what this run was trained on: it holds "
            f"{self.records} records and the content {self.content[:12]}, the checkpoint tells "
            f"{state['records']} and {state['content'][:12]} (of {state['file']}); put the old "
            "file back, or go on with this one: forge resume RUN_DIR --set "
            "data.with.on_change=go_on"
        )


class RemembersContent:
    """A data plugin's part of a checkpoint: the content that the run has read."""

    _identity: Identity

    def state_dict(self) -> dict[str, Any]:
        """Which content the run has read."""
        return self._identity.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse to go on with another content, unless `on_change` allows it."""
        self._identity.load_state_dict(state)
