"""Settings that several data plugins have."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

OnChange = Annotated[
    Literal["refuse", "go_on"],
    Meta(
        description="when a run is resumed and the file is not what it was: refuse, or go on with "
        "the new content from the same position"
    ),
]
"""Of the plugins that read files."""

TokenCacheDir = Annotated[
    str | None,
    Meta(
        description="where the tokens are kept, mapped from there; null: forge-kernel/data "
        "below the user's cache folder",
        extra_json_schema={"format": "path"},
    ),
]
SequenceBatchSize = Annotated[int, Meta(ge=1, description="sequences in a training batch")]
SequenceValidationBatchSize = Annotated[
    int, Meta(ge=1, description="sequences in a validation batch")
]
