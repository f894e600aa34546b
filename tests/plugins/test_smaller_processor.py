"""What a machine with AVX2 alone does instead, tried in a process that passes for one."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import pytest

PIPELINE = """
forge: 1
run: {name: small, seed: 0, device: cpu, max_steps: 3, precision: PRECISION}
data: {use: modular_arithmetic, with: {modulus: 11}}
model: {use: mlp, with: {hidden: [16, 16]}}
quantizer: {use: bitnet, with: {arithmetic: ARITHMETIC}}
optimizer: {use: OPTIMIZER}
loss: {use: cross_entropy}
exporters: [{use: state_dict}]
observers: [{use: progress_bar}]
"""


def outcome(folder: Path, **parts: str) -> tuple[bytes, str, Path]:
    """Weights and what was said of a run on a processor with AVX2 alone."""
    text = PIPELINE
    for name, value in {
        "precision": "fp32", "arithmetic": "exact", "optimizer": "adamw", **parts
    }.items():  # fmt: skip
        text = text.replace(name.upper(), value)
    folder.mkdir()
    (folder / "p.yaml").write_text(text)
    environment = {
        **os.environ, "FORGE_CPU_CAPABILITY": "avx2", "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    found = forked.run(
        [sys.executable, "-m", "forge_kernel", "run", "p.yaml", "--output-dir", "out"], cwd=folder,
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (weights,) = (folder / "out" / "exports" / "state_dict").glob("*.safetensors")
    return weights.read_bytes(), found.stdout + found.stderr, folder / "out"


@pytest.mark.parametrize("arithmetic", ["int8", "int8_bf16_backward"])
def test_int8_products_fall_back_to_the_exact_ones_and_say_so(
    arithmetic: str, tmp_path: Path
) -> None:
    """Planted fault: the limit not looked at."""
    exact, silent, _ = outcome(tmp_path / "exact")
    fast, said, out = outcome(tmp_path / "fast", arithmetic=arithmetic)
    assert fast == exact
    assert "the exact path is taken" in said
    assert "the exact path is taken" not in silent
    notices: Any = json.loads((out / "quantization.json").read_text())["notices"]
    assert any("avx512_vnni" in notice for notice in notices)


def test_precision_auto_is_fp32_without_a_word(tmp_path: Path) -> None:
    plain, _, _ = outcome(tmp_path / "fp32")
    auto, said, out = outcome(tmp_path / "auto", precision="auto")
    assert auto == plain
    assert json.loads((out / "environment.json").read_text())["precision"] == "fp32"
    assert "times as long" not in said


def test_a_chosen_bf16_is_obeyed_and_its_cost_is_on_the_screen(tmp_path: Path) -> None:
    plain, _, _ = outcome(tmp_path / "fp32")
    half, said, _ = outcome(tmp_path / "bf16", precision="bf16")
    assert half != plain
    assert "times as long as in fp32" in said


def test_muon_trains(tmp_path: Path) -> None:
    _, said, _ = outcome(tmp_path / "muon", optimizer="muon")
    assert "times as long" not in said
