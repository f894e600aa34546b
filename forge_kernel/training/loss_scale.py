"""The factor on the loss that keeps fp16 gradients from vanishing."""

from __future__ import annotations

from typing import Final

_GROWTH_INTERVAL: Final = 2000  # clean steps before the scale doubles, as torch's scaler


class LossScale:
    """Doubled after many finite steps, halved when gradients overflow.

    Micikevicius et al. 2018, "Mixed Precision Training", arXiv 1710.03740, section 3.2.

    Args:
        precision: of the run; the factor is 1 and stays so unless it is `fp16`.
    """

    def __init__(self, precision: str) -> None:
        self._moves = precision == "fp16"
        self.value = 65536.0 if self._moves else 1.0
        self.clean = 0  # finite steps since it last changed

    def count_finite(self) -> None:
        """A step was finite."""
        if not self._moves:
            return
        self.clean += 1
        if self.clean >= _GROWTH_INTERVAL:
            self.value, self.clean = self.value * 2.0, 0

    def back_off(self) -> bool:
        """A step was not finite.

        Returns:
            Whether the scale was lowered: then it may have been the scale's fault.
        """
        if not self._moves or self.value <= 1.0:
            return False
        self.value, self.clean = max(1.0, self.value / 2.0), 0
        return True
