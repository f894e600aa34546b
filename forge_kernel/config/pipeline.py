"""The pipeline as the kernel knows it: the loop's own settings and the plugins named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from msgspec import Meta

from forge_kernel.config.document import Path
from forge_kernel.config.use import USE_OF_KIND, Use
from forge_kernel.contract.plugin import RULES, Kind

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of the loop: how long, where, how exactly and how often."""

    name: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$",
            description="name of the run, the start of its folder's name",
        ),
    ] = "run"
    seed: Annotated[
        Annotated[int, Meta(ge=0, le=2**32 - 1)] | None,
        Meta(description="start of all random streams; null: not seeded"),
    ] = 0
    device: Annotated[
        str,
        Meta(
            pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$",
            description="auto, cpu, mps, cuda or cuda:N",
        ),
    ] = "auto"
    max_steps: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="end after this many optimizer steps"),
    ] = None
    max_epochs: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="end after this many passes over the training data"),
    ] = None
    max_seconds: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="end after this many seconds of training"),
    ] = None
    validate_every: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="optimizer steps between validations; null: only at the end"),
    ] = None
    log_every: Annotated[
        int, Meta(ge=1, description="optimizer steps between lines of the log")
    ] = 50
    save_every: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="optimizer steps between checkpoints; null: only at the end"),
    ] = None
    keep_checkpoints: Annotated[
        int, Meta(ge=2, description="newest checkpoints kept, beside those that a policy pins")
    ] = 2
    accumulate: Annotated[int, Meta(ge=1, description="micro-batches in one optimizer step")] = 1
    ignore_index: Annotated[
        int,
        Meta(
            ge=-(2**63), le=2**63 - 1,
            description="an integer target that counts for nothing (padding, masked prompts), in "
            "the loss, in metrics and in data files; numbers to be predicted are never ignored",
        ),
    ] = -100  # fmt: skip
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"],
        Meta(description="arithmetic of the forward pass (autocast; fp16 scales the loss); auto: "
             "what the device is fast in (bf16 with instructions for it, fp16 on older GPUs, else "
             "fp32)"),
    ] = "fp32"  # fmt: skip
    non_finite: Annotated[
        Literal["stop", "skip", "rollback", "off"],
        Meta(description="what to do about a NaN or infinite gradient, before the update"),
    ] = "stop"
    deterministic: Annotated[
        bool, Meta(description="use only deterministic algorithms of torch")
    ] = False
    threads: Annotated[
        Annotated[int, Meta(ge=1, le=1024)] | None,
        Meta(description="threads of one operation; null: torch's own"),
    ] = None
    checked: Annotated[
        bool, Meta(description="watch that each plugin writes only what its hooks own (slow)")
    ] = False

    @property
    def ends(self) -> bool:
        """Whether the run ends by itself; a program that drives the steps needs no end."""
        bounds = (self.max_steps, self.max_epochs, self.max_seconds)
        return any(bound is not None for bound in bounds)

    def notices(self) -> list[str]:
        """What the user may not have meant: intervals that never come round."""
        found = []
        for name in ("validate_every", "save_every"):
            every = getattr(self, name)
            if every is not None and self.max_steps is not None and every > self.max_steps:
                found.append(
                    f"run.{name} ({every}) is longer than the run ({self.max_steps} steps): "
                    "it happens at the end only"
                )
        return found


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole pipeline; a kind that is None or empty is absent or handed in live."""

    run: RunConfig
    data: Use[Any] | None = None
    model: Use[Any] | None = None
    quantizer: Use[Any] | None = None
    wrappers: tuple[Use[Any], ...] = ()
    strategy: Use[Any] | None = None
    optimizer: Use[Any] | None = None
    loss: Use[Any] | None = None
    penalties: tuple[Use[Any], ...] = ()
    gradients: tuple[Use[Any], ...] = ()
    phases: Use[Any] | None = None
    schedule: Use[Any] | None = None
    validators: tuple[Use[Any], ...] = ()
    policies: tuple[Use[Any], ...] = ()
    exporters: tuple[Use[Any], ...] = ()
    observers: tuple[Use[Any], ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)  # the user's own `x-...` keys

    def entries(self) -> Iterator[tuple[Path, Kind, Use[Any]]]:
        """The plugins named, in canonical order of kinds and in file order within a kind."""
        for kind in Kind:
            named = getattr(self, kind.value)
            if isinstance(named, Use):
                yield (kind.value,), kind, named
            elif named:
                for index, use in enumerate(named):
                    yield (kind.value, index), kind, use

    def to_data(self) -> dict[str, Any]:
        """The mapping that a pipeline file would hold, every default of the run written out."""
        import msgspec

        data: dict[str, Any] = {"forge": FORMAT, "run": msgspec.to_builtins(self.run)}
        for kind in Kind:
            named = getattr(self, kind.value)
            if isinstance(named, Use):
                data[kind.value] = named.to_data()
            elif named:
                data[kind.value] = [use.to_data() for use in named]
        return {**data, **self.notes}


def takes_many(kind: Kind) -> bool:
    """Whether a pipeline file holds a list for the kind."""
    return RULES[kind].at_most is None


def uses_in(data: Mapping[str, Any]) -> Iterator[tuple[Path, Kind, Use[Any]]]:
    """The plugins that a file's data name, in canonical order; what has another form is left out.

    Args:
        data: a pipeline's mapping, checked or not.
    """
    for kind in Kind:
        given = data.get(kind.value)
        items: list[tuple[Path, Any]] = [((kind.value,), given)]
        if takes_many(kind):
            listed = given if isinstance(given, list) else []
            items = [((kind.value, index), item) for index, item in enumerate(listed)]
        for path, item in items:
            if isinstance(item, Mapping) and isinstance(item.get("use"), str):
                yield path, kind, USE_OF_KIND[kind](item["use"], item.get("with") or {})


def notes_in(data: Mapping[str, Any]) -> dict[str, Any]:
    """The user's own keys."""
    return {key: value for key, value in data.items() if key.startswith("x-")}


assert {kind.value for kind in Kind} <= {item.name for item in fields(PipelineConfig)}
