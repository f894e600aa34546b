"""AdamW that leads the warm-up of quantized layers and tames gradients that are far too large."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from forge_plugins.mathematics.optimizers.gradient_scaling import hold_spikes
from forge_plugins.mathematics.optimizers.plain_parameters import with_plain_parameters
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.warmup import warmup_lambda
from forge_plugins.mathematics.quantization.weight_statistics import weight_metrics, weight_sums

SCALE_DECAY = 0.99
"""Of the moving averages of the gradients' squares."""


class BitNetOptimizer(torch.optim.AdamW):
    """Decoupled weight decay Adam (arXiv 1711.05101) over latent weights.

    After each step the layers' share of quantized values and of zeros goes on, and what they keep
    of the old weights is dropped. A gradient that is far larger than its tensor's usual one is
    scaled down before it enters Adam's averages (a steady factor cancels there, a spike does not:
    it would raise the second average, and so slow the tensor down, for a thousand steps).

    Args:
        params: as of any torch optimizer.
        lr: learning rate.
        betas: decay of the averages.
        eps: added to the root in the divisor.
        weight_decay: decoupled, times the learning rate.
        amsgrad: keep the largest second average.
        layers: quantized layers whose weights are trained here.
        warmup_steps: steps over which the levels are blended in.
        sparsity: least share of zeros in each applied weight.
        sparsity_steps: steps over which the sparsity rises.
        scale_limit: times the usual size that a tensor's gradient may have; None: not scaled.
    """

    def __init__(  # noqa: PLR0913  keyword-only, each a setting of its own
        self,
        params: Any,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-4,
        amsgrad: bool = False,
        layers: Iterable[BitLayer] = (),
        warmup_steps: int = 0,
        sparsity: float = 0.0,
        sparsity_steps: int = 0,
        scale_limit: float | None = None,
    ) -> None:
        super().__init__(
            params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad
        )
        self.layers: Sequence[BitLayer] = list({id(layer): layer for layer in layers}.values())
        self.warmup_steps, self.sparsity_steps = warmup_steps, sparsity_steps
        self.sparsity, self.scale_limit = sparsity, scale_limit
        with_plain_parameters(self)
        self.settle()

    def steps_done(self) -> int:
        """Steps of the parameter that has made most of them."""
        return max((int(state["step"]) for state in self.state.values() if state), default=0)

    def settle(self) -> None:
        """Bring warm-up and sparsity to the steps done; drop what the layers keep."""
        done = self.steps_done() if self.layers else 0
        for layer in self.layers:
            quantization = layer.quantization
            quantization.warmup_lambda = warmup_lambda(done, self.warmup_steps)
            quantization.steps = max(0, done - self.warmup_steps)
            quantization.sparsity = self.sparsity * warmup_lambda(done, self.sparsity_steps)
            layer.invalidate()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; the layers apply the new weights from here on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        averages = {} if self.scale_limit is None else self._scaled(self.scale_limit)
        super().step()
        for parameter, average in averages.items():  # Adam makes its state when it finds none
            self.state[parameter]["gradient_average"] = average
        self.settle()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        """Take up a state: the layers are where its number of steps puts them."""
        super().load_state_dict(state_dict)
        self.settle()

    def _scaled(self, limit: float) -> dict[Tensor, Tensor]:
        """Scale the gradients; mean square and number of each one's gradients, shape (2,)."""
        result: dict[Tensor, Tensor] = {}
        parameters = [
            item for group in self.param_groups for item in group["params"] if item.grad is not None
        ]
        for device in {item.device for item in parameters}:
            here = [item for item in parameters if item.device == device]
            known = [self.state[item].get("gradient_average") for item in here]
            zero = torch.zeros(2, device=device)
            before = torch.stack([zero if item is None else item.float() for item in known])
            square, count = before.T.contiguous()
            hold_spikes([item.grad for item in here], square, count, decay=SCALE_DECAY, limit=limit)
            after = torch.stack((square, count), 1)
            result |= dict(zip(here, after, strict=True))
        return result

    def get_quantization_info(self) -> dict[str, float | None]:
        """Metrics over all layers, read to the host.

        Returns:
            `layers`, `weights`, `blend`, `target_sparsity` as it is now, and the metrics of
            `weight_metrics` (error, sparsity, latent distribution, share of each level); without a
            quantized layer the latter are missing.
        """
        info: dict[str, float | None] = {
            "layers": len(self.layers),
            "weights": sum(layer.weight.numel() for layer in self.layers),
            "blend": self.layers[0].warmup_lambda if self.layers else None,
            "target_sparsity": self.layers[0].quantization.sparsity if self.layers else None,
        }
        with_levels = [layer for layer in self.layers if layer.scheme.quantizes_weight]
        if not with_levels:
            return info
        sums = torch.stack([weight_sums(layer, None).cpu() for layer in with_levels]).sum(0)
        metrics = weight_metrics(sums, with_levels[0].scheme.qmax)
        del metrics["weight_flips"]  # of the last update: not known here
        return info | {name: float(value) for name, value in metrics.items()}
