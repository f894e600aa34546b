"""What plugins tell of the run, handed on to whoever listens."""

from __future__ import annotations

from forge_kernel.contract.run import Run
from forge_kernel.training.bus import Bus


def pass_events(run: Run, bus: Bus) -> None:
    """Pass on what plugins told; a listener may not tell in its turn for ever."""
    for _ in range(3):
        events, run.events[:] = list(run.events), []
        for event in events:
            for listen in bus.calls("on_event"):
                listen(run, event)
