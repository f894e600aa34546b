"""Combinations that must work: each trains, and resumes bit for bit. Nothing here is refused."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest

from forge_kernel import PipelineConfig, RunConfig, resume, run
from forge_kernel.config.use import (
    UseData,
    UseGradients,
    UseLoss,
    UseModel,
    UseOptimizer,
    UseQuantizer,
    UseValidator,
    UseWrapper,
)
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences

COMPILER = any(shutil.which(name) for name in ("cc", "gcc", "clang"))
AXES = {
    "bitnet": (False, True),
    "grokfast": (None, "ema", "ma"),
    "accumulate": (1, 3),
    "precision": ("fp32", "bf16"),
    "compiled": (False, True) if COMPILER else (False,),
}
CASES = [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def _model(case: dict[str, Any]) -> UseModel[Any]:
    """A transformer; compiled, a perceptron: the compiler takes its time for each operation."""
    if case["compiled"]:
        return UseModel("mlp", {"hidden": [16], "dropout": 0.1})
    return UseModel("decoder_transformer", {"layers": 1, "width": 16, "heads": 2, "dropout": 0.1})


def pipeline(case: dict[str, Any], steps: int) -> PipelineConfig:
    filters = [UseGradients("clip_norm")]
    if case["grokfast"]:
        filters.insert(0, UseGradients("grokfast", {"filter": case["grokfast"], "window": 2}))
    return PipelineConfig(
        run=RunConfig(
            max_steps=steps, accumulate=case["accumulate"], precision=case["precision"],
            device="cpu", validate_every=4,
        ),
        data=UseData("modular_arithmetic", {"modulus": 7, "batch_size": 6}),
        model=_model(case),
        quantizer=UseQuantizer("bitnet") if case["bitnet"] else None,
        wrappers=(UseWrapper("compile", {"dynamic": True}),) if case["compiled"] else (),
        optimizer=UseOptimizer("adamw"),
        loss=UseLoss("cross_entropy"),
        gradients=tuple(filters),
        validators=(UseValidator("classification"),),
    )  # fmt: skip


def name(case: dict[str, Any]) -> str:
    return "-".join(f"{value}" for value in case.values())


def check(case: dict[str, Any], folder: Path) -> None:
    steps, cut = 6, 4
    straight = run(pipeline(case, steps), output_dir=folder / "straight", quiet=True)
    run(pipeline(case, cut), output_dir=folder / "cut", quiet=True)
    resume(folder / "cut", [f"run.max_steps={steps}"], quiet=True)
    left, right = (
        CheckpointStore(folder / half / "checkpoints").path(steps) for half in ("straight", "cut")
    )
    assert differences(left, right) == []
    assert straight.model is not None
    assert not any(key.startswith("_orig_mod") for key in straight.model.state_dict())
    if case["bitnet"]:
        from forge_plugins.mathematics.quantization.bit_linear import BitLinear

        layers = [layer for layer in straight.model.modules() if isinstance(layer, BitLinear)]
        assert layers
        assert all(len(layer.applied_weight().unique()) <= 3 for layer in layers)


@pytest.mark.parametrize("case", [c for c in CASES if not c["compiled"]], ids=name)
def test_it_trains_and_resumes_bit_for_bit(case: dict[str, Any], tmp_path: Path) -> None:
    check(case, tmp_path)


FEW = {("fp32", 1, True, "ema"), ("bf16", 3, True, "ma")}


def _compiled(few: bool) -> list[dict[str, Any]]:
    return [
        case
        for case in CASES
        if case["compiled"]
        and few
        == ((case["precision"], case["accumulate"], case["bitnet"], case["grokfast"]) in FEW)
    ]


@pytest.mark.spec("K10")
@pytest.mark.parametrize("case", _compiled(True), ids=name)
def test_compiled_it_trains_and_resumes_bit_for_bit(case: dict[str, Any], tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.deep
@pytest.mark.parametrize("case", _compiled(False), ids=name)
def test_every_compiled_combination_resumes_bit_for_bit(
    case: dict[str, Any], tmp_path: Path
) -> None:
    check(case, tmp_path)
