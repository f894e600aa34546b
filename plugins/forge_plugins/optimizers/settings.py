"""Settings that several optimizers have, with their bounds and words. Imports no torch."""

from __future__ import annotations

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
