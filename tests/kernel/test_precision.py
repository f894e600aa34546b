"""`precision: auto` is what the machine is fast in; what is slow here is said."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import nn

from forge_kernel import run
from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseLoss, UseOptimizer
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.runner import resume
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.training import precision
from forge_kernel.training.precision import cost_on_cpu, fast_precision, slow_precision_notice

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in precision.LIMITS:
        monkeypatch.delenv(name, raising=False)


def pretend(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(names, True))


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (("avx2",), "fp32"), (("avx2", "avx512_f", "avx512_vnni"), "fp32"),
        (("avx2", "avx512_bf16"), "bf16"), (("avx2", "amx_bf16"), "bf16"),
        (("asimd", "bf16"), "bf16"), (("asimd",), "fp32"), ((), "fp32"),
    ],
)  # fmt: skip
def test_a_cpu_is_fast_in_bf16_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], expected: str
) -> None:
    pretend(monkeypatch, *sets)
    assert fast_precision(CPU) == expected


@pytest.mark.parametrize("name", precision.LIMITS)
@pytest.mark.parametrize("limit", ["avx2", "default"])
def test_a_processor_can_pass_for_a_smaller_one(
    monkeypatch: pytest.MonkeyPatch, name: str, limit: str
) -> None:
    pretend(monkeypatch, "avx2", "avx512_bf16", "amx_bf16")
    monkeypatch.setenv(name, limit)
    assert fast_precision(CPU) == "fp32"
    assert precision.instructions() == {"avx2": True}


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")]
)
def test_a_gpu_is_fast_in_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert fast_precision(torch.device("cuda", 0)) == expected


def test_other_devices_stay_in_fp32() -> None:
    assert fast_precision(torch.device("mps")) == "fp32"


def pipeline(**settings: Any) -> PipelineConfig:
    return PipelineConfig(
        run=RunConfig(max_steps=4, device="cpu", seed=0, save_every=2, **settings),
        optimizer=UseOptimizer("adamw", {"lr": 1e-2}),
        loss=UseLoss("cross_entropy"),
    )


def network(seen: list[torch.dtype]) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Linear(8, 3)
    model.register_forward_hook(lambda _, __, outputs: seen.append(outputs.dtype))
    return model


def data() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 8, generator=generator), torch.randint(3, (5,), generator=generator))
        for _ in range(4)
    ]


@pytest.mark.parametrize(
    ("sets", "name", "dtype"),
    [(("avx2",), "fp32", torch.float32), (("avx512_bf16",), "bf16", torch.bfloat16)],
)
def test_auto_is_what_the_run_does_and_what_its_files_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sets: tuple[str, ...], name: str,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    """Planted faults: autocast from the setting as written; the file with `auto`."""
    pretend(monkeypatch, *sets)
    seen: list[torch.dtype] = []
    folder = tmp_path / "run"
    run(pipeline(precision="auto"), model=network(seen), data=data(), output_dir=folder, quiet=True)
    assert set(seen) == {dtype}
    assert json.loads((folder / "environment.json").read_text())["precision"] == name
    assert f"precision: {name}" in (folder / "config.yaml").read_text()


def test_a_resumed_run_keeps_the_arithmetic_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On a machine that is fast in another one, and bit for bit. Planted: `auto` in the file."""
    pretend(monkeypatch, "avx512_bf16")
    seen: list[torch.dtype] = []
    whole = replace_steps(pipeline(precision="auto"), 8)
    run(whole, model=network([]), data=data(), output_dir=tmp_path / "straight", quiet=True)
    run(
        pipeline(precision="auto"), model=network([]), data=data(), output_dir=tmp_path / "cut",
        quiet=True,
    )  # fmt: skip
    pretend(monkeypatch, "avx2")
    resume(tmp_path / "cut", ["run.max_steps=8"], model=network(seen), data=data(), quiet=True)
    assert set(seen) == {torch.bfloat16}
    left, right = (
        CheckpointStore(tmp_path / name / "checkpoints").path(8) for name in ("straight", "cut")
    )
    assert differences(left, right) == []


def replace_steps(whole: PipelineConfig, steps: int) -> PipelineConfig:
    from dataclasses import replace

    return replace(whole, run=replace(whole.run, max_steps=steps))


def test_fp32_costs_what_it_costs_and_is_never_called_slow() -> None:
    assert slow_precision_notice("fp32", CPU) is None
    assert slow_precision_notice("bf16", torch.device("cuda")) is None
    assert cost_on_cpu("bf16") > 0.0


def test_a_precision_that_is_slow_here_is_told_with_its_cost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Planted fault: the notice is never asked for."""
    monkeypatch.setattr(precision, "cost_on_cpu", lambda name: 50.25)
    run(
        pipeline(precision="bf16"), model=network([]), data=data(), output_dir=tmp_path / "run",
        quiet=True,
    )  # fmt: skip
    log = (tmp_path / "run" / "forge.log").read_text()
    assert "50.2 times as long as in fp32" in log
    monkeypatch.setattr(precision, "cost_on_cpu", lambda name: 0.5)
    run(
        pipeline(precision="bf16"), model=network([]), data=data(), output_dir=tmp_path / "fast",
        quiet=True,
    )  # fmt: skip
    assert "as in fp32" not in (tmp_path / "fast" / "forge.log").read_text()


def test_the_doctor_says_what_is_fast_on_a_processor_with_avx2_alone(tmp_path: Path) -> None:
    found = forked.run(
        [sys.executable, "-m", "forge_kernel", "doctor", "--json"], cwd=tmp_path, check=True,
        capture_output=True, text=True, env={**os.environ, "FORGE_CPU_CAPABILITY": "avx2"},
    )  # fmt: skip
    fast = json.loads(found.stdout)["fast arithmetic"]
    assert fast["precision auto"].startswith("cpu fp32")
    assert fast["limited by"] == "FORGE_CPU_CAPABILITY=avx2"
    assert "avx512" not in fast["instruction sets"]
    assert fast["int8 products"] is False
