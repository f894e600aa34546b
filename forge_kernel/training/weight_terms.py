"""Terms of the weights that regularizers add to a window's loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import torch

from forge_kernel.contract.run import Run
from forge_kernel.contract.values import Step
from forge_kernel.errors import PluginError
from forge_kernel.training.bus import Bus

_NONE: Final = torch.zeros(())


class WeightTerms:
    """What the regularizers of a run give for the weights, once a window.

    Attributes:
        asked: whether there is a regularizer.
        given: of this window, detached, one for each regularizer; empty where none gave any.
        total: their sum, 0-d, detached.
    """

    def __init__(self, run: Run, step: Step, bus: Bus) -> None:
        self._run, self._step, self._bus = run, step, bus
        self._regularize = bus.calls("regularize")
        self.asked = bool(self._regularize)
        self.given: Sequence[Any] = ()
        self.total = _NONE

    def add(self, scale: float) -> None:
        """Ask for the terms of this window and add their gradients.

        Args:
            scale: of the loss (fp16), which its gradients carry too.

        Raises:
            PluginError: a term is none.
        """
        terms = [call(self._run, self._step) for call in self._regularize]
        self.given = ()  # those of another window are not looked at
        self.total = _NONE  # else the NaN of a window that was dropped stays
        try:
            result = [term for term in terms if term is not None]
            if result:
                total = torch.stack([term.reshape(()) for term in result]).sum()
                (total * scale).backward()  # type: ignore[no-untyped-call]
                self.total = total.detach()
                self.given = [None if term is None else term.detach() for term in terms]
        except Exception:
            self._judge(terms)
            raise

    def _judge(self, terms: Sequence[Any]) -> None:
        """Say whose term cannot be used."""
        for index, term in enumerate(terms):
            self._bus.judge("regularize", term, index)
        given = [index for index, term in enumerate(terms) if term is not None]
        if given and not any(terms[index].requires_grad for index in given):
            whose = " and ".join(self._bus.giver("regularize", index) for index in given)
            raise PluginError(f"{whose}: the term does not depend on the weights (no gradient)")

    def non_finite(self) -> Iterator[str]:
        """The terms that are not finite themselves, and whose they are."""
        for index, term in enumerate(self.given):
            if term is not None and not bool(torch.isfinite(term).all()):
                yield f"the term of {self._bus.giver('regularize', index)}"
