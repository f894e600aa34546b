"""Settings of a training: how long, how fast, how exactly."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from msgspec import Meta

from agent_forge.phases.phase5_training.configuration import Configuration
from forge_kernel.api import UseSchedule
from forge_kernel.embedding import ConfigError

_LOADERS: Final = "the loaders are the caller's, or DataConfig's"
_SWITCHED: Final = {
    "bitnet_enabled": ("quantization_schedule",),
    "grokfast_enabled": ("grokfast_alpha", "grokfast_lambda"),
}
"""Fields that are read when a switch is on."""


class TrainingConfig(Configuration):
    """How long, how fast, how exactly.

    - `use_amp`: mixed precision; `amp_dtype` (torch.bfloat16, torch.float16) is obeyed where it is
      set; None: what the device is fast in (`precision: auto`), fp32 on a CPU without bf16;
    - `max_grad_norm` is read by `gradient_clipping`, `quantization_schedule` (how the levels are
      blended in) by `bitnet_enabled`, `grokfast_alpha` and `grokfast_lambda` by `grokfast_enabled`;
    - `min_lr_ratio`: where a cosine or linear schedule ends, as a fraction of the rate.
    """

    without_meaning: ClassVar[Mapping[str, str]] = {
        "loss_scale": "the kernel's loss scale starts there and finds its own way",
        "dataloader_num_workers": _LOADERS,
        "pin_memory": _LOADERS,
        "memory_cleanup_interval": "gradients are freed at each step, and emptying the device's "
        "cache only makes the next step slower",
    }

    epochs: Annotated[int, Meta(ge=1)] = 100
    learning_rate: Annotated[float, Meta(ge=0)] = 1e-4
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-2  # decoupled, of all parameters
    beta1: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.999
    eps: Annotated[float, Meta(gt=0)] = 1e-8
    max_grad_norm: Annotated[float, Meta(gt=0)] = 1.0
    gradient_clipping: bool = True
    gradient_accumulation_steps: Annotated[int, Meta(ge=1)] = 1
    use_amp: bool = True
    amp_dtype: torch.dtype | None = None
    loss_scale: float = 65536.0
    warmup_steps: Annotated[int, Meta(ge=0)] = 1000  # shortened in a short run
    scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Annotated[float, Meta(ge=0, le=1)] = 0.1
    log_interval: Annotated[int, Meta(ge=1)] = 100
    eval_interval: Annotated[int, Meta(ge=1)] = 1000
    save_interval: Annotated[int, Meta(ge=1)] = 5000
    max_checkpoints: Annotated[int, Meta(ge=2)] = 5
    compile_model: bool = False
    use_fused_optimizer: bool = True
    dataloader_num_workers: int = 4
    pin_memory: bool = True
    max_memory_usage: Annotated[float, Meta(gt=0, le=1)] = 0.9  # share that a warning is given at
    memory_cleanup_interval: int = 1000
    validation_patience: Annotated[int, Meta(ge=1)] = 10
    min_delta: Annotated[float, Meta(ge=0)] = 1e-4
    bitnet_enabled: bool = False  # ternary weights, as the kernel's bitnet plugin has them
    quantization_schedule: Literal["linear", "exponential", "sigmoid"] = "linear"
    grokfast_enabled: bool = False
    grokfast_alpha: Annotated[float, Meta(ge=0, lt=1)] = 0.98
    grokfast_lambda: Annotated[float, Meta(ge=0)] = 2.0

    def check(self) -> None:
        """Also: a half-precision type."""
        super().check()
        if self.amp_dtype not in (None, torch.float16, torch.bfloat16):
            raise ConfigError(f"amp_dtype is {self.amp_dtype}: torch.float16 or torch.bfloat16")

    def check_switches(self, **on: bool) -> None:
        """Refuse what is assigned for a part that is off.

        Args:
            on: by switch, where it is not the field of that name that decides.

        Raises:
            SettingError: with the switch.
        """
        for switch, names in _SWITCHED.items():
            if not on.get(switch, getattr(self, switch)):
                for name in names:
                    part = switch.removesuffix("_enabled")
                    self.refuse(name, f"{switch} is off (in a pipeline: use_{part})")

    def precision(self) -> Literal["auto", "fp32", "bf16", "fp16"]:
        """The arithmetic of the forward pass, as the kernel's `run.precision` has it."""
        if not self.use_amp:
            return "fp32"
        if self.amp_dtype is None:
            return "auto"
        return "fp16" if self.amp_dtype is torch.float16 else "bf16"

    def optimizer_options(self, cls: type[torch.optim.Optimizer]) -> dict[str, Any]:
        """What an optimizer class of the caller's is told: the rate, and what the program set.

        Raises:
            SettingError: it set what the class does not take.
        """
        known = inspect.signature(cls).parameters
        result: dict[str, Any] = {"lr": self.learning_rate}
        wanted = {
            "weight_decay": (("weight_decay",), self.weight_decay),
            "betas": (("beta1", "beta2"), (self.beta1, self.beta2)),
            "eps": (("eps",), self.eps),
        }
        for option, (names, value) in wanted.items():
            if option in known and any(self.given(name) for name in names):
                result[option] = value
            elif option not in known:
                for name in names:
                    self.refuse(name, f"{cls.__name__} takes no {option}")
        return result


def goal_of(metric: str) -> Literal["max", "min"]:
    """Whether a metric is to rise or to fall."""
    falls = ("loss", "perplexity", "error")
    return "min" if any(word in metric for word in falls) else "max"


def fitted_warmup(steps: int, total: int | None) -> int:
    """A warm-up that takes at most a tenth of the run."""
    return steps if total is None else min(steps, total // 10)


def schedule_of(config: TrainingConfig, total: int | None) -> UseSchedule[Any]:
    """The kernel's schedule of a training configuration.

    Without a known end there is nothing to fall towards: the rate rises and stays.
    """
    warmup = fitted_warmup(config.warmup_steps, total)
    if total is None or config.scheduler_type == "constant":
        return UseSchedule("linear_warmup", {"warmup_steps": warmup})
    name = {"cosine": "warmup_cosine", "linear": "linear"}[config.scheduler_type]
    return UseSchedule(name, {"warmup_steps": warmup, "floor": config.min_lr_ratio})
