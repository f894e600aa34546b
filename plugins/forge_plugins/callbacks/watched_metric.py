"""The settings by which a policy watches one metric of the validation, once for all of them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

MetricName = Annotated[str, Meta(min_length=1, description="name of a validation metric")]

Mode = Annotated[
    Literal["max", "min"], Meta(description="whether higher (max) or lower (min) is better")
]

MinDelta = Annotated[float, Meta(ge=0, description="smallest change that counts as an improvement")]

NotBefore = Annotated[
    Annotated[int, Meta(ge=0)] | None,
    Meta(description="validations before this step are not looked at; null: none is looked at "
         "before the network is what will be exported (levels still being blended in); a "
         "number: from that step on, whatever the network is"),
]  # fmt: skip
