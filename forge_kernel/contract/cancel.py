"""What can ask a run to stop from outside."""

from __future__ import annotations

import signal
from typing import Protocol


class Cancel(Protocol):
    """A `threading.Event` or alike; an attribute `signal` tells the number of what came."""

    def is_set(self) -> bool:
        """Whether the run is to stop at the next step's edge."""
        ...


def cancel_reason(cancel: Cancel) -> str:
    """Why a run that was cancelled stopped, in words."""
    number = getattr(cancel, "signal", None)
    return f"signal {signal.Signals(number).name}" if number else "cancelled"
