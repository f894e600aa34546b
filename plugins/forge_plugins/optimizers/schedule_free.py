"""Schedule-free optimizers: an average of the iterates in the place of a falling rate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.api import Kind, LazyModule, PluginInfo, Run, hookimpl
from forge_plugins.optimizers.groups import check_names, decay_groups
from forge_plugins.optimizers.settings import DecayRule, Groups

if TYPE_CHECKING:
    import schedulefree
    import torch
    from torch import nn

    from forge_plugins.mathematics.optimizers import averaged_model, plain_parameters
    from forge_plugins.mathematics.optimizers.averaged_model import ShadowModel
else:
    schedulefree = LazyModule("schedulefree")
    plain_parameters = LazyModule("forge_plugins.mathematics.optimizers.plain_parameters")
    averaged_model = LazyModule("forge_plugins.mathematics.optimizers.averaged_model")

COUNTERS = ("k", "weight_sum", "lr_max")
"""What the library counts in its groups; a checkpoint's groups come from the configuration."""


@dataclass(frozen=True, kw_only=True)
class ScheduleFreeConfig:
    """What the library's optimizers are told."""

    base: Annotated[Literal["adamw", "sgd"], Meta(description="whose steps are averaged")] = "adamw"
    lr: Annotated[
        float, Meta(gt=0, description="learning rate; larger than with a schedule (sgd: 10 to 50 "
                    "times)")
    ] = 2.5e-3  # fmt: skip
    momentum: Annotated[
        float,
        Meta(gt=0, lt=1, description="where gradients are taken: 1 at the average, 0 at the last "
             "iterate (beta 1 of adamw)"),
    ] = 0.9  # fmt: skip
    beta2: Annotated[
        float, Meta(ge=0, lt=1, description="decay of the average of squared gradients (adamw)")
    ] = 0.999
    eps: Annotated[float, Meta(gt=0, description="added to the root in the divisor (adamw)")] = 1e-8
    weight_decay: Annotated[float, Meta(ge=0, description="decay, times the learning rate")] = 0.0
    decay: DecayRule = "all"
    groups: Groups = ()
    warmup_steps: Annotated[int, Meta(ge=0, description="optimizer steps of a linear rise")] = 0
    average_power: Annotated[
        float, Meta(ge=0, description="later iterates weigh step ** this in the average")
    ] = 0.0
    rate_power: Annotated[
        float, Meta(ge=0, description="iterates of a higher rate weigh rate ** this")
    ] = 2.0


class ScheduleFree:
    """AdamW or SGD with an average of the iterates in the place of a falling rate.

    `schedulefree.AdamWScheduleFree` or `SGDScheduleFree`; validation and export use the average.

    Defazio et al. 2024, "The Road Less Scheduled", arXiv 2405.15682. The model in training holds
    the points y at which gradients are taken; the averaged weights are
    `x = y + (1 - 1 / momentum) (z - y)`, with the iterates z in the optimizer's state.
    """

    info = PluginInfo(
        name="schedule_free",
        kind=Kind.OPTIMIZER,
        config=ScheduleFreeConfig,
        packages={"schedulefree": "pip install 'forge-kernel[optimizers]'"},
    )

    def __init__(self, config: ScheduleFreeConfig) -> None:
        self.config = config
        self._optimizer: Any = None
        self._shadow: ShadowModel | None = None
        self._names: dict[str, nn.Parameter] = {}

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """The optimizer over all parameters."""
        del run
        config = self.config
        check_names(parameters, config.groups)
        self._names = dict(parameters)
        groups = decay_groups(parameters, config.weight_decay, config.decay, config.groups)
        common = {
            "lr": config.lr, "warmup_steps": config.warmup_steps, "r": config.average_power,
            "weight_lr_power": config.rate_power,
        }  # fmt: skip
        if config.base == "sgd":
            made = schedulefree.SGDScheduleFree(groups, momentum=config.momentum, **common)
        else:
            made = schedulefree.AdamWScheduleFree(
                groups, betas=(config.momentum, config.beta2), eps=config.eps, **common
            )
        made.train()
        self._optimizer = made
        return plain_parameters.with_plain_parameters(made, keep_weights=True)

    @hookimpl
    def compute_evaluation_model(self, run: Run) -> nn.Module:
        """The model of the averaged weights, taken now."""
        if self._shadow is None:
            self._shadow = averaged_model.ShadowModel(run.model)
        share = 1.0 - 1.0 / self.config.momentum
        for own, point in zip(self._shadow.weights(), run.model.parameters(), strict=True):
            memory = self._optimizer.state.get(point, {})
            own.copy_(plain_parameters.weight_in(memory, point))
            if "z" in memory:
                own.lerp_(memory["z"], share)
        self._shadow.follow()
        return self._shadow.model

    def state_dict(self) -> dict[str, Any]:
        """The library's counters, and the iterates: a restore of best weights needs them too.

        Of half-precision parameters the fp32 points as well.
        """
        state = self._optimizer.state
        kept = plain_parameters.WEIGHT
        return {
            "groups": {
                str(place): {name: group[name] for name in COUNTERS}
                for place, group in enumerate(self._optimizer.param_groups)
            },
            "iterates": {
                name: state[parameter]["z"]
                for name, parameter in self._names.items()
                if "z" in state.get(parameter, {})
            },
            "points": {
                name: state[parameter][kept]
                for name, parameter in self._names.items()
                if kept in state.get(parameter, {})
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up counters and iterates."""
        for place, group in enumerate(self._optimizer.param_groups):
            group.update(state["groups"][str(place)])
        for name, iterate in state["iterates"].items():
            self._optimizer.state[self._names[name]]["z"].copy_(iterate)
        for name, point in state.get("points", {}).items():
            memory = self._optimizer.state[self._names[name]]
            memory[plain_parameters.WEIGHT] = point.to(memory["z"], copy=True)
