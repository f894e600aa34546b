"""Arithmetic modulo a prime: the data of the grokking experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from msgspec import Meta

from forge_kernel.api import (
    Data,
    DataSpec,
    Kind,
    LazyModule,
    PluginInfo,
    Run,
    TensorData,
    hookimpl,
    stream_seed,
)

if TYPE_CHECKING:
    from forge_plugins.mathematics.networks import modular_arithmetic as mathematics
else:
    mathematics = LazyModule("forge_plugins.mathematics.networks.modular_arithmetic")


@dataclass(frozen=True, kw_only=True)
class ModularArithmeticConfig:
    """Which table, and how it is split."""

    renamed: ClassVar[Mapping[str, str]] = {"training_share": "train_fraction"}

    modulus: Annotated[
        int, Meta(ge=2, le=4093, description="the number p that all is taken modulo")
    ] = 97
    operation: Annotated[
        Literal["add", "sub", "mul", "div"], Meta(description="x op y; div needs a prime modulus")
    ] = "mul"
    train_fraction: Annotated[
        float, Meta(gt=0, lt=1, description="fraction of all pairs that is trained on")
    ] = 0.5
    batch_size: Annotated[int, Meta(ge=1, description="samples in a training batch")] = 512
    validation_batch_size: Annotated[
        int, Meta(ge=1, description="samples in a validation batch")
    ] = 4096
    split_seed: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="seed of the split; null: the run's seed"),
    ] = None

    def __post_init__(self) -> None:
        prime = self.modulus > 1 and all(
            self.modulus % divisor for divisor in range(2, int(self.modulus**0.5) + 1)
        )
        if self.operation == "div" and not prime:
            raise ValueError(f"operation div needs a prime modulus; {self.modulus} is not prime")
        pairs = (
            self.modulus**2 if self.operation in ("add", "sub") else self.modulus**2 - self.modulus
        )
        training = round(pairs * self.train_fraction)
        if not 0 < training < pairs:
            raise ValueError(
                f"train_fraction {self.train_fraction} of {pairs} pairs leaves one part empty"
            )


class ModularArithmetic:
    """Arithmetic modulo a prime, the task of the grokking experiments, as tokens `[x, op, y, =]`.

    Tokens `[x, op, y, =]`; the answer stands at the last position.
    """

    info = PluginInfo(
        name="modular_arithmetic",
        kind=Kind.DATA,
        config=ModularArithmeticConfig,
        provides=("data:tokens", "data:classes"),
    )

    def __init__(self, config: ModularArithmeticConfig) -> None:
        self.config = config

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The whole table in memory, split at random."""
        config = self.config
        tokens, answers = mathematics.operation_table(config.operation, config.modulus)
        seed = run.seed if config.split_seed is None else config.split_seed
        training, validation = mathematics.split_pairs(
            len(answers), config.train_fraction, stream_seed(seed, "split")
        )
        spec = DataSpec(vocabulary=config.modulus + 2, sequence=4, classes=config.modulus)
        return TensorData(
            tokens[training],
            answers[training].unsqueeze(1),
            batch_size=config.batch_size,
            seed=run.seed,
            spec=spec,
            validation=(tokens[validation], answers[validation].unsqueeze(1)),
            validation_batch_size=config.validation_batch_size,
            positions=slice(-1, None),
        )
