"""The Grokfast paper's experiment, with the random numbers of its published code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

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
)

if TYPE_CHECKING:
    from torch import Tensor

    from forge_plugins.mathematics.grokfast import grokfast_experiment as experiment
else:
    experiment = LazyModule("forge_plugins.mathematics.grokfast.grokfast_experiment")


@dataclass(frozen=True, kw_only=True)
class GrokfastPaperConfig:
    """How many samples at once; all else is the paper's."""

    batch_size: Annotated[int, Meta(ge=1, description="samples in a training batch")] = 512
    validation_batch_size: Annotated[
        int, Meta(ge=1, description="samples in a validation batch")
    ] = 4096


class GrokfastPaperData(TensorData):
    """The paper's halves of the table, shuffled as there."""

    def __init__(self, draws: experiment.Draws, config: GrokfastPaperConfig) -> None:
        tokens, answers = experiment.table()
        answers = answers.unsqueeze(1)
        validation = draws.validation
        super().__init__(
            tokens[draws.training],
            answers[draws.training],
            batch_size=config.batch_size,
            seed=None,
            spec=DataSpec(
                vocabulary=experiment.TOKENS, sequence=experiment.LENGTH, classes=experiment.TOKENS
            ),
            validation=(tokens[validation], answers[validation]),
            validation_batch_size=config.validation_batch_size,
            positions=slice(-1, None),
        )
        self._draws = draws

    def order(self, epoch: int) -> Tensor:
        """The order of an epoch, shape (samples,): the shuffles up to it, one after the other."""
        return self._draws.order(epoch)


class GrokfastPaper:
    """Multiplication modulo 97 with the very split and shuffles of the Grokfast paper's code.

    They follow from the seed alone, as if the paper's network had been made before them; with that
    network (`decoder_transformer` with `residual: normed, start: multihead`) its first weights are
    the paper's too, and a run repeats the published one step by step, to rounding.
    """

    info = PluginInfo(
        name="grokfast_paper",
        kind=Kind.DATA,
        config=GrokfastPaperConfig,
        provides=("data:tokens", "data:classes"),
    )

    def __init__(self, config: GrokfastPaperConfig) -> None:
        self.config = config

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """The two halves in memory."""
        return GrokfastPaperData(experiment.Draws(run.seed), self.config)
