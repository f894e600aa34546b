"""A tiny run around one plugin: small real parts for every kind that the run must have."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_kernel.config.pipeline import PipelineConfig, takes_many
from forge_kernel.config.schema import bind_config
from forge_kernel.config.use import USE_OF_KIND
from forge_kernel.contract.data import Data, DataSpec
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.metric_info import MetricInfo
from forge_kernel.contract.metrics import Metric
from forge_kernel.contract.plugin import Kind, PluginInfo, facts
from forge_kernel.contract.result import RunResult
from forge_kernel.contract.run import Run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.contract.values import Batch, Step
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.plan import plan
from forge_kernel.runner import resume, run
from forge_kernel.training.loaders.in_memory import NoConfig
from forge_kernel.training.session import Session

SAMPLES, FEATURES, SEQUENCE, VOCABULARY, CLASSES = 22, 8, 4, 7, 5


class TrialWords:
    """A tokenizer whose texts are words with numbers."""

    @staticmethod
    def decode(tokens: Iterable[int]) -> str:
        """One word for each token."""
        return " ".join(f"word{token}" for token in tokens)


class TrialData:
    """Random samples of features, or of tokens with the answer at the last position.

    Args:
        tokens: whether inputs are tokens.
        numbers: whether targets are numbers, as many as there are classes otherwise.
        text: whether the tokens stand for words, which the data's `tokenizer` knows.
    """

    def __init__(self, *, tokens: bool, numbers: bool = False, text: bool = False) -> None:
        form = ("data:tokens",) if tokens or text else ("data:features",)
        answers = "data:numbers" if numbers else "data:classes"
        meaning = ("data:text",) if text else ()
        self.info = PluginInfo(
            name="trial_data", kind=Kind.DATA, config=NoConfig, provides=(*form, answers, *meaning)
        )
        self.config = NoConfig()
        self._tokens = tokens or text
        self._numbers = numbers
        self._text = text

    def samples(self, count: int) -> Batch:
        """The first samples as one batch."""
        inputs, targets, _ = self._made()
        return Batch(inputs[:count], targets[:count], None, self._positions())

    def _positions(self) -> slice | None:
        return slice(-1, None) if self._tokens else None

    def _made(self) -> tuple[Tensor, Tensor, DataSpec]:
        generator = torch.Generator().manual_seed(1)
        targets = torch.randint(CLASSES, (SAMPLES, 1), generator=generator)
        if self._tokens:
            inputs = torch.randint(VOCABULARY, (SAMPLES, SEQUENCE), generator=generator)
            spec = DataSpec(vocabulary=VOCABULARY, sequence=SEQUENCE, classes=CLASSES)
        else:
            inputs = torch.randn((SAMPLES, FEATURES), generator=generator)
            targets = targets.squeeze(1)
            spec = DataSpec(features=FEATURES, classes=CLASSES)
        if self._numbers:
            targets = torch.randn((SAMPLES, CLASSES), generator=generator)
        return inputs, targets, spec

    @hookimpl
    def make_data(self, run: Run) -> Data:
        """Shuffled batches of four; the last one of an epoch is smaller."""
        inputs, targets, spec = self._made()
        data = TensorData(
            inputs,
            targets,
            batch_size=4,
            seed=run.seed,
            spec=spec,
            validation=(inputs[:9], targets[:9]),
            positions=self._positions(),
        )
        if self._text:
            data.tokenizer = TrialWords()
        return data


class TrialModel:
    """Two linear layers with dropout between them; an answer for each token behind an embedding."""

    info = PluginInfo(name="trial_model", kind=Kind.MODEL, config=NoConfig)

    def __init__(self) -> None:
        self.config = NoConfig()

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network."""
        spec = run.data.spec
        width = spec.features or FEATURES
        tokens = spec.vocabulary
        first: list[nn.Module] = [] if tokens is None else [nn.Embedding(tokens, width)]
        if spec.shape is not None:
            first = [nn.Flatten()]
        classes = spec.classes or CLASSES
        return nn.Sequential(
            *first, nn.Linear(width, 16), nn.ReLU(), nn.Dropout(0.25), nn.Linear(16, classes)
        )


class TrialOptimizer:
    """SGD with momentum."""

    info = PluginInfo(name="trial_optimizer", kind=Kind.OPTIMIZER, config=NoConfig)

    def __init__(self) -> None:
        self.config = NoConfig()

    @hookimpl
    def make_optimizer(
        self, run: Run, parameters: Sequence[tuple[str, nn.Parameter]]
    ) -> torch.optim.Optimizer:
        """Over all parameters."""
        del run
        return torch.optim.SGD([p for _, p in parameters], lr=0.05, momentum=0.9)


class TrialLoss:
    """Cross-entropy; against numbers, the mean squared distance."""

    info = PluginInfo(name="trial_loss", kind=Kind.LOSS, config=NoConfig)

    def __init__(self) -> None:
        self.config = NoConfig()

    @hookimpl
    def compute_loss(self, run: Run, step: Step, batch: Batch, outputs: Any) -> Tensor:
        """Over the last dimension."""
        del run, step
        outputs = _answers(outputs)
        if batch.targets.is_floating_point():
            return nn.functional.mse_loss(outputs, batch.targets, reduction="none")
        if outputs.ndim == 3 and outputs.shape[1] != batch.targets.shape[1]:
            outputs = outputs[:, batch.positions]
        logits = outputs.reshape(-1, outputs.shape[-1])
        return nn.functional.cross_entropy(
            logits, batch.targets.reshape(-1), reduction="none", ignore_index=batch.ignore_index
        )


def _answers(outputs: Any) -> Any:
    """What a model gives, or the logits among it, as models of transformers give them."""
    return getattr(outputs, "logits", outputs)


class _TrialMetric:
    def __init__(self) -> None:
        self._counts = torch.zeros(2)

    def reset(self) -> None:
        self._counts = torch.zeros(2)

    def update(self, batch: Batch, outputs: Any, loss: Tensor, weight: float | Tensor) -> None:
        del loss, weight
        outputs = _answers(outputs)
        targets = batch.targets.reshape(-1)
        hits = outputs.reshape(len(targets), -1, outputs.shape[-1])[:, -1].argmax(-1) == targets
        weights = batch.counted.weights
        counts = torch.ones(len(targets)) if weights is None else weights
        self._counts = self._counts + torch.stack([(hits * counts).sum(), counts.sum()])

    def compute(self, add: Callable[[Tensor], Tensor]) -> Mapping[str, float]:
        hits, total = add(self._counts).tolist()
        return {"accuracy": hits / total} if total else {}


class TrialValidator:
    """Accuracy."""

    info = PluginInfo(
        name="trial_validator",
        kind=Kind.VALIDATORS,
        config=NoConfig,
        provides=("metric:accuracy",),
        metrics=(MetricInfo("accuracy", "share", "max"),),
    )

    def __init__(self) -> None:
        self.config = NoConfig()

    @hookimpl
    def make_metrics(self, run: Run) -> Sequence[Metric]:
        """One metric."""
        del run
        return [_TrialMetric()]


class TrialStop:
    """Cancels the run after so many steps, as a signal would."""

    info = PluginInfo(name="trial_stop", kind=Kind.OBSERVERS, config=NoConfig)

    def __init__(self, after: int | None) -> None:
        self.config = NoConfig()
        self._after = after
        self._reached = False

    @hookimpl
    def on_step_end(self, run: Run, step: Step) -> None:
        """Count."""
        del run
        self._reached = step.number == self._after

    def is_set(self) -> bool:
        """Whether to stop now."""
        return self._reached


class Trial:
    """Runs one plugin among the small parts.

    Args:
        catalog: where the plugin and what it needs are found.
        kind: of the plugin under test.
        name: of the plugin under test.
        config: its settings as plain data.
    """

    def __init__(self, catalog: Catalog, kind: Kind, name: str, config: Mapping[str, Any]) -> None:
        self.catalog = catalog
        self.kind = kind
        self.name = name
        self.config = dict(config)
        self.plugin = catalog.load(kind, name)
        self._needs = facts(self.plugin.info.requires, bind_config(self.plugin.info.config, config))
        self._companions = self._find_companions()

    def parts(self) -> list[Any]:
        """Fresh small parts for the kinds that are missing."""
        taken = {kind for kind, _ in self._companions}
        return [part for part in self._small_parts() if part.info.kind not in taken]

    def _small_parts(self) -> list[Any]:
        numbers = "data:numbers" in self._needs
        parts: dict[Kind, Any] = {
            Kind.DATA: TrialData(
                tokens="data:tokens" in self._needs,
                numbers=numbers,
                text="data:text" in self._needs,
            ),
            Kind.MODEL: TrialModel(),
            Kind.OPTIMIZER: TrialOptimizer(),
            Kind.LOSS: TrialLoss(),
            Kind.VALIDATORS: TrialValidator(),
        }
        chosen: set[Kind] = set() if self.kind is Kind.VALIDATORS else {self.kind}
        if numbers:
            chosen.add(Kind.VALIDATORS)  # its accuracy is of classes
        return [part for kind, part in parts.items() if kind not in chosen]

    def _find_companions(self) -> list[tuple[Kind, str]]:
        """Installed plugins that bring what the small parts do not; what they need is added.

        Of several, the one that brings most of what is needed.
        """
        given = {fact for part in self._small_parts() for fact in facts(part.info.provides, None)}
        result: list[tuple[Kind, str]] = []
        for fact in self._needs:
            if fact in given or fact.startswith(("metric:", "data:")):
                continue
            best: tuple[int, Kind, str] | None = None
            for offer in self.catalog.offers():
                info = self.catalog.load(offer.kind, offer.name).info
                if not info.provides or offer.kind is Kind.DATA or offer.kind is self.kind:
                    continue
                brought = set(facts(info.provides, bind_config(info.config, {})))
                count = len(brought & set(self._needs))
                if fact in brought and (best is None or count > best[0]):
                    best = (count, offer.kind, offer.name)
            if best is not None:
                info = self.catalog.load(best[1], best[2]).info
                settled = bind_config(info.config, {})
                given |= set(facts(info.provides, settled))
                self._needs = (*self._needs, *facts(info.requires, settled))
                result.append(best[1:])
        return result

    def pipeline(self, **settings: Any) -> PipelineConfig:
        """The plugin and its companions with the loop's settings."""
        run_config = RunConfig(
            **{
                "name": "trial", "max_steps": 10, "validate_every": 5, "log_every": 2,
                "device": "cpu", **settings,
            }
        )  # fmt: skip
        uses: dict[str, Any] = {}
        for kind, name in [*self._companions, (self.kind, self.name)]:
            config = self.config if (kind, name) == (self.kind, self.name) else {}
            use = USE_OF_KIND[kind](name, config)
            uses[kind.value] = (use,) if takes_many(kind) else use
        return PipelineConfig(run=run_config, **uses)

    def run(self, folder: Path, *, stop_after: int | None = None, **settings: Any) -> RunResult:
        """A run of ten steps, or as told; cancelled after `stop_after` of them."""
        stop = TrialStop(stop_after)
        return run(
            self.pipeline(**settings),
            plugins=[*self.parts(), stop],
            catalog=self.catalog,
            output_dir=folder,
            cancel=stop,
            quiet=True,
        )

    def session(self, *plugins: Any, folder: Path | None = None, **settings: Any) -> Session:
        """A session that is stepped by hand, without dropout."""
        decided = plan(
            self.pipeline(**{"log_every": 10**6, **settings}),
            self.catalog,
            plugins=[*self.parts(), *plugins],
        )
        session = Session(decided, folder=folder, quiet=True).opened()
        for module in session.run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        session.start()
        return session

    def batch(self) -> Batch:
        """Eight samples of the trial's data, in the form that the plugin under test reads."""
        (data,) = (part for part in self._small_parts() if part.info.kind is Kind.DATA)
        return data.samples(8)  # type: ignore[no-any-return]

    def resume(self, folder: Path, *settings: str) -> RunResult:
        """Go on with a run."""
        plugins = [*self.parts(), TrialStop(None)]
        return resume(folder, settings, plugins=plugins, catalog=self.catalog, quiet=True)
