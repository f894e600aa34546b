"""A finished run in use: its model, what its data made numbers of, and what can be done with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.uses import use
from forge_kernel.errors import ConfigError, Fault

if TYPE_CHECKING:
    import torch
    from torch import nn

    from forge_kernel.training.session import Session


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What a run has learned, ready to be used.

    Args:
        folder: the run folder, or that of a model.
        model: in evaluation mode; the weights that the run validates with.
        spec: of the data that it was trained on.
        tokenizer: turns texts into tokens (`encode`, `decode`, `end`); None where there are none.
        step: of the weights.
        data: the data section of the run's configuration, filled; empty where there is none.
        ignore_index: the target that counts for nothing.
        preparation: what the data's plugin has fitted to read files alike; None where it has none.
    """

    folder: Path
    model: nn.Module
    spec: DataSpec
    tokenizer: Any = None
    step: int = 0
    data: Mapping[str, Any] = field(default_factory=dict)
    ignore_index: int = -100
    preparation: Any = None

    def generate(self, prompt: str | Sequence[int], **options: Any) -> str:
        """What the model writes after a text; see `stream`."""
        return "".join(self.stream(prompt, **options))

    def stream(self, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
        """What the model writes after a text, piece by piece.

        Args:
            prompt: a text, or tokens where the run has no tokenizer.
            options: `max_tokens` (128), `temperature` (0: the likeliest token), `top_k` (all),
                `top_p` (1), `seed` (0), `chat` (False: the text stands as it is).

        Raises:
            ValueError: an option is out of its range, or the model writes no tokens.
        """
        result: Iterator[str] = use("stream")(self, prompt, **options)
        return result

    def predict(self, inputs: torch.Tensor, *, batch_size: int = 256) -> torch.Tensor:
        """The model's outputs.

        Args:
            inputs: shape (samples, ...), as the model reads them.
            batch_size: samples at a time.

        Returns:
            Shape (samples, ...), on the CPU: logits of a classifier, numbers of a regressor.
        """
        result: torch.Tensor = use("predict")(self, inputs, batch_size=batch_size)
        return result


_DESCRIPTIONS = ("config.json", "adapter_config.json")
"""Files that say what a model's folder holds."""


def load_run(folder: str | Path, *, device: str = "cpu", allow_code: bool = False) -> TrainedRun:
    """Open a finished run, or a model's folder, for use.

    Args:
        folder: a run folder; or one that exporters write with a JSON file that says what it is: of
            the transformers library (`config.json`), or with adapters (`adapter_config.json`).
        device: as `run.device`.
        allow_code: also run code that the run's configuration names; see `run`.

    Raises:
        ConfigError: it is neither, or the run was given live parts.
        PlanError: a plugin of the run is missing here.
        CheckpointError: there is no intact checkpoint.
    """
    folder = Path(folder)
    from forge_kernel.run_folder.folder import CONFIG

    if (folder / CONFIG).is_file():
        return _of_run(folder, device, allow_code=allow_code)
    if any((folder / name).is_file() for name in _DESCRIPTIONS):
        from forge_kernel.training.device import resolve_device

        result: TrainedRun = use("open_folder")(folder, resolve_device(device))
        return result
    hint = "name the folder of a run, or of a model (config.json and safetensors files)"
    raise ConfigError([Fault(f"{folder} is no run folder and no model's folder", hints=(hint,))])


def _of_run(folder: Path, device: str, *, allow_code: bool) -> TrainedRun:
    from forge_kernel.runner import restored
    from forge_kernel.trust import code_allowed

    with code_allowed(allow_code), restored(folder, _reading(device)) as session:
        return _in_use(folder, session)


def _reading(device: str) -> list[str]:
    """Settings of a run that is only read."""
    return ["observers=null", "exporters=null", f"run.device={device}"]


def _in_use(folder: Path, session: Session) -> TrainedRun:
    from forge_kernel.planning.pipeline_file import fill

    run = session.run
    return TrainedRun(
        folder=folder,
        model=session.evaluation_model().eval(),
        spec=run.data.spec,
        tokenizer=getattr(run.data, "tokenizer", None),
        step=run.progress.step,
        data=fill(session.plan.pipeline).get("data", {}),
        ignore_index=run.settings.ignore_index,
        preparation=getattr(run.data, "preparation", None),
    )


class _Evaluated:
    """Data whose validation is that of a file; all else is as it was."""

    def __init__(self, data: Any, batches: Iterator[Any]) -> None:
        self._data, self._batches = data, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)

    def validation(self) -> Iterator[Any]:
        """The file's batches, once."""
        return self._batches


def evaluate_run(
    folder: str | Path,
    file: str | Path | None = None,
    *,
    teacher: str | Path | None = None,
    device: str = "cpu",
    allow_code: bool = False,
) -> dict[str, float]:
    """The loss and the validators' metrics of what a run has learned; nothing is written.

    Args:
        folder: the run folder.
        file: samples or a text, read by the settings of the run's own data, all of it; None: the
            run's own validation data.
        teacher: another run's folder, or a model's: `teacher_agreement` is how often both choose
            the same answer.
        device: as `run.device`.
        allow_code: see `load_run`.

    Raises:
        ConfigError: it is no run folder, or the file cannot be read so, or not by the teacher.
        CheckpointError: there is no intact checkpoint.
    """
    from forge_kernel.runner import restored
    from forge_kernel.trust import code_allowed

    folder = Path(folder)
    with code_allowed(allow_code), restored(folder, _reading(device)) as session:
        run = _in_use(folder, session)
        data = session.run.data

        def batches() -> Iterable[Any]:
            return data.validation() if file is None else use("evaluation_batches")(run, Path(file))

        if file is not None:
            session.run.data = _Evaluated(data, iter(batches()))
        metrics = session.validate()
        if teacher is not None and metrics:
            other = load_run(teacher, device=device, allow_code=allow_code)
            metrics["teacher_agreement"] = use("teacher_agreement")(run, other, batches())
        return metrics


def evaluate_clients(
    folder: str | Path,
    file: str | Path | None = None,
    *,
    clients: Sequence[str],
    most: int | None = None,
    device: str = "cpu",
    allow_code: bool = False,
) -> dict[str, dict[str, float]]:
    """The same metrics by several programs: the run's own model, and its exports where they run.

    Args:
        folder: the run folder.
        file: as in `evaluate_run`.
        clients: names of programs, as `forge evaluate --with` takes them.
        most: how many targets are asked about, the first ones; None: all.
        device: as `run.device`, for the run's own model.
        allow_code: see `load_run`.

    Returns:
        By client, metrics by name.

    Raises:
        ConfigError: as `evaluate_run`; or a client is unknown, is not installed or has no export.
        PluginError: a client cannot run its export.
    """
    from forge_kernel.runner import restored
    from forge_kernel.trust import code_allowed

    folder = Path(folder)
    with code_allowed(allow_code), restored(folder, _reading(device)) as session:
        run = _in_use(folder, session)
        data = session.run.data
        batches = data.validation() if file is None else use("evaluation_batches")(run, Path(file))
        result: dict[str, dict[str, float]] = use("client_metrics")(
            run, batches, clients, most=most
        )
        return result
