"""The settings of a run itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta


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
        Meta(description="seed of every random stream; null: no fixed seed"),
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
    save_minutes: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="minutes after which a checkpoint is written at the latest; null: none "
             "for the time alone"),
    ] = 10.0  # fmt: skip
    keep_checkpoints: Annotated[
        int, Meta(ge=2, description="newest checkpoints kept, beside those that a callback pins")
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
    on_out_of_memory: Annotated[
        Literal["stop", "halve"],
        Meta(description="what to do when the memory does not suffice for a step: end with a "
             "report and a checkpoint, or take the same step in micro-batches of half the size, "
             "from then on too"),
    ] = "stop"  # fmt: skip
    on_disk_full: Annotated[
        Literal["stop", "pause", "skip"],
        Meta(description="what a checkpoint that finds no room does: end the run, wait for room, "
             "or leave that checkpoint out (never the last one)"),
    ] = "stop"  # fmt: skip
    pause_minutes: Annotated[
        float, Meta(gt=0, description="how long on_disk_full: pause waits for room")
    ] = 60.0
    hang_minutes: Annotated[
        Annotated[float, Meta(gt=0)] | None,
        Meta(description="minutes without a batch, a step, a validation or a checkpoint after "
             "which the stacks of all threads are kept and the run is saved and ended; "
             "null: never"),
    ] = None  # fmt: skip
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
        result = []
        for name in ("validate_every", "save_every"):
            every = getattr(self, name)
            if every is not None and self.max_steps is not None and every > self.max_steps:
                result.append(
                    f"run.{name} ({every}) is longer than the run ({self.max_steps} steps): "
                    "it happens at the end only"
                )
        return result
