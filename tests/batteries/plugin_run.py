"""A run of a few steps around plugins under trial, in this process."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from kernel_parts import SgdPart
from torch import nn

from forge_kernel import run
from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.testing.trial import TrialLoss
from forge_kernel.training.loaders.in_memory import NoConfig

FEATURES, CLASSES, SAMPLES = 6, 3, 12


def features() -> TensorData:
    """Twelve samples in batches of four, three for the validation."""
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(SAMPLES, FEATURES, generator=generator)
    targets = torch.arange(SAMPLES) % CLASSES
    spec = DataSpec(features=FEATURES, classes=CLASSES)
    return TensorData(
        inputs, targets, batch_size=4, seed=1, spec=spec, validation=(inputs[:3], targets[:3])
    )


def network() -> nn.Module:
    """Two layers with a norm between them, so that there is a buffer."""
    return nn.Sequential(
        nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES)
    )


class SmallData:
    """The data part."""

    info = PluginInfo(name="small_data", kind=Kind.DATA, config=NoConfig)
    config = NoConfig()

    @hookimpl
    def make_data(self, run: Any) -> Any:
        return features()


class SmallModel:
    """The model part."""

    info = PluginInfo(name="small_model", kind=Kind.MODEL, config=NoConfig)
    config = NoConfig()

    @hookimpl
    def make_model(self, run: Any) -> nn.Module:
        return network()


class Outcome:
    """What became of a run: its result or its error, and all that was said of it."""

    def __init__(self, result: Any, error: BaseException | None, log: str) -> None:
        self.result, self.error, self.log = result, error, log

    @property
    def words(self) -> str:
        """The error and its notes, as a user sees them."""
        if self.error is None:
            return ""
        notes = getattr(self.error, "__notes__", ())
        return "\n".join([f"{type(self.error).__name__}: {self.error}", *notes])

    @property
    def where(self) -> str:
        """The last line of the traceback, for what is not an error of ours."""
        return "".join(traceback.format_exception(self.error)[-3:]) if self.error else ""


def parts(under_trial: Sequence[Any]) -> list[Any]:
    """The plugins under trial, and a small part of each kind that a run must have beside them."""
    kinds = {plugin.info.kind for plugin in under_trial}
    needed = (SmallData(), SmallModel(), SgdPart(0.05), TrialLoss())
    return [*(part for part in needed if part.info.kind not in kinds), *under_trial]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder of its own, removed afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="battery-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def small_run(under_trial: Sequence[Any], folder: Path, **settings: Any) -> Outcome:
    """Run four steps and see what becomes of it; what plugins print is dropped."""
    chosen = {"max_steps": 4, "device": "cpu", "log_every": 1, "validate_every": 2, **settings}
    pipeline = PipelineConfig(run=RunConfig(**chosen))
    result, failure = None, None
    grad = torch.is_grad_enabled()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            result = run(pipeline, plugins=parts(under_trial), output_dir=folder, quiet=True)
        except BaseException as error:  # noqa: BLE001  whatever a plugin under trial raises
            failure = error
    torch.set_grad_enabled(grad)
    log = folder / "forge.log"
    return Outcome(result, failure, log.read_text(encoding="utf-8") if log.is_file() else "")
