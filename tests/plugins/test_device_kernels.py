"""The kernels of a GPU where there is none: interpreted, and compiled for two generations."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_plugins.mathematics.quantization import device_kernels, quantizers
from forge_plugins.mathematics.quantization.scheme import Scheme

ROOT = Path(__file__).resolve().parents[2]
POINTERS = {
    "inputs": "*i8", "weight": "*i8", "outputs": "*bf16", "input_scale": "*fp32",
    "weight_scale": "*fp32", "bias": "*bf16", "rows": "i32", "width": "i32", "out": "i32",
    "scale_step": "i32",
}  # fmt: skip
TILES = {
    "inputs": "tensordesc<i8[128, 128]>", "weight": "tensordesc<i8[256, 128]>",
    "bias": "*fp32",
}  # fmt: skip
CHUNKS = {
    "gradient": "tensordesc<i8[{0}, 256]>", "finer": "tensordesc<i8[{0}, 256]>",
    "values": "tensordesc<i8[{1}, 256]>", "outputs": "*fp32", "steps": "*fp32",
    "finer_steps": "*fp32", "coarse": "*i8", "out": "i32", "width": "i32", "chunks": "i32",
    "groups": "i32",
}  # fmt: skip


@pytest.mark.spec("K3")
@pytest.mark.parametrize("chosen", ["not deep", pytest.param("deep", marks=pytest.mark.deep)])
def test_interpreted_they_give_what_the_plain_forms_give(chosen: str) -> None:
    """Each fault is planted in `tests/interpreted`; red when one of its tests is."""
    surroundings = {key: value for key, value in os.environ.items() if "PYTEST" not in key}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, "tests/interpreted"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**surroundings, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def assembly(kernel: Any, signature: dict[str, str], constants: dict[str, Any], **how: int) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    aligned = [
        place for place, name in enumerate(kernel.arg_names)
        if types[name].startswith("*") or (types[name] == "i32" and name != "scale_step")
    ]  # fmt: skip
    source = ASTSource(
        fn=kernel, signature=types, constexprs=values,
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )  # fmt: skip
    target = GPUTarget("cuda", how.pop("capability"), 32)
    return compile(source, target=target, options={**how, "enable_fp_fusion": False})


def split(tile: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    how = {name: tile[name] for name in ("num_warps", "num_stages")}
    return {name: value for name, value in tile.items() if name not in how}, how


@pytest.mark.parametrize(
    ("capability", "instruction", "shared"), [(80, "mma.sync", 99 << 10), (90, "wgmma", 227 << 10)]
)
@pytest.mark.parametrize("name", ["FEW_ROWS", "TILE"])
def test_the_product_compiles_to_the_tensor_cores(
    capability: int, instruction: str, shared: int, name: str
) -> None:
    """Red when the sums are taken in fp32, or a tile fits no chip of the generation."""
    from forge_plugins.mathematics.quantization import triton_kernels

    blocks, how = split(getattr(triton_kernels, name))
    constants = {"OF_OUTPUTS": True, "BIAS": True, "EVEN": False, **blocks}
    found = assembly(
        triton_kernels._integer_linear, POINTERS, constants, capability=capability, **how
    )
    assert instruction in found.asm["ptx"]
    assert ".s32.s8.s8" in found.asm["ptx"]
    assert "div.full" not in found.asm["ptx"]  # divisions are rounded to nearest
    assert found.metadata.shared <= shared


@pytest.mark.parametrize("outputs", ["bf16[128, 256]", "fp32[128, 128]"])
def test_on_hopper_tiles_come_by_the_copy_engine(outputs: str) -> None:
    """Red when a tile on its way out leaves no room for the next one's parts."""
    from forge_plugins.mathematics.quantization import triton_kernels

    blocks, how = split(triton_kernels.WIDE_TILE)
    parts = 2 if outputs.startswith("fp32") else 1
    constants = {"OF_OUTPUTS": False, "BIAS": True, "PROGRAMS": 132, "PARTS": parts, **blocks}
    found = assembly(
        triton_kernels._integer_linear_by_tiles,
        {**POINTERS, **TILES, "outputs": f"tensordesc<{outputs}>"}, constants,
        capability=90, **how,
    )  # fmt: skip
    assert "cp.async.bulk.tensor" in found.asm["ptx"]
    assert "wgmma" in found.asm["ptx"]
    assert found.metadata.shared <= 227 << 10


@pytest.mark.parametrize(
    ("capability", "instruction", "shared"), [(80, "mma.sync", 99 << 10), (90, "wgmma", 227 << 10)]
)
def test_the_weight_gradient_compiles_to_the_tensor_cores(
    capability: int, instruction: str, shared: int
) -> None:
    from forge_plugins.mathematics.quantization import triton_gradients

    blocks, how = split(triton_gradients.chunk_tile(capability >= 90))
    types = {
        name: kind.format(blocks["BLOCK_M"], blocks["BLOCK_N"]) for name, kind in CHUNKS.items()
    }
    found = assembly(
        triton_gradients._sum_of_chunks, types, {"TOKENS": 256, "COLUMNS": 32, "CHUNKS": 64, **blocks},
        capability=capability, **how,
    )  # fmt: skip
    assert instruction in found.asm["ptx"]
    assert ".s32.s8.s8" in found.asm["ptx"]
    assert found.metadata.shared <= shared


def test_the_plain_forms_serve_a_device_without_kernels() -> None:
    assert device_kernels.kernels(torch.device("cpu")) is None
    assert device_kernels.lacks_kernels("cpu") == ""
    found = quantizers.activation_levels_and_values(torch.randn(3, 8), Scheme(), torch.bfloat16)
    assert found[2] is None


@pytest.mark.parametrize(
    ("hip", "capability", "reason"),
    [("6.2", (9, 0), "kind of GPU"), (None, (7, 5), "kind of GPU"), (None, (9, 0), "triton")],
)
def test_what_stands_in_the_way_is_told(
    hip: str | None, capability: tuple[int, int], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when a GPU of another maker is given the kernels."""
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setitem(sys.modules, "triton", None)
    device_kernels._of.cache_clear()
    try:
        assert reason in device_kernels.lacks_kernels("cuda")
        assert not device_kernels.has_kernels("cuda")
    finally:
        device_kernels._of.cache_clear()
        device_kernels._FOUND.clear()
