"""Settings that several optimizers have, with their bounds and words. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

Share = Annotated[float, Meta(ge=0, lt=1)]
LearningRate = Annotated[float, Meta(ge=0, description="learning rate")]
AdamBetas = Annotated[
    tuple[Share, Share], Meta(description="decay of the averages of gradient and of its square")
]
Epsilon = Annotated[float, Meta(gt=0, description="added to the root in the divisor")]
DecoupledDecay = Annotated[
    float, Meta(ge=0, description="decoupled decay, times the learning rate")
]
L2Decay = Annotated[float, Meta(ge=0, description="L2 decay")]
DecayRule = Annotated[
    Literal["all", "matrices"],
    Meta(description="which parameters decay; matrices leaves out biases and norms"),
]
Fused = Annotated[
    bool, Meta(description="torch's fused implementation, one pass over all parameters")
]


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Parameters by name, with a rate and a decay of their own."""

    parameters: Annotated[
        tuple[Annotated[str, Meta(min_length=1)], ...],
        Meta(min_length=1, description="names of parameters; glob pattern; of several entries that "
             "name one, the first counts"),
    ]  # fmt: skip
    lr: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="learning rate; null: the optimizer's for them"),
    ] = None
    weight_decay: Annotated[
        Annotated[float, Meta(ge=0)] | None,
        Meta(description="of all of them, vectors too; null: the optimizer's, by its rule"),
    ] = None

    def __post_init__(self) -> None:
        if self.lr is None and self.weight_decay is None:
            raise ValueError(
                f"the entry of {list(self.parameters)} changes nothing: set lr or weight_decay, "
                "or take it out"
            )


Groups = Annotated[
    tuple[ParameterGroup, ...],
    Meta(description="rates and decays by parameter name; all others have those above"),
]
