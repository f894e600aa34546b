from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from forge_plugins.interchange.onnx_packing import level_table, packed_rows, two_bit_table
from forge_plugins.interchange.packed_ternary import LAYOUTS, pack_model, read_packed, write_packed
from forge_plugins.interchange.ternary_blocks import pack_blocks, unpack_blocks
from forge_plugins.mathematics.quantization.conversion import convert_linears
from forge_plugins.mathematics.quantization.packing import (
    pack_base_three,
    pack_two_bits,
    unpack_base_three,
    unpack_two_bits,
)
from forge_plugins.mathematics.quantization.ternary_layers import read_layers

PACKERS = {4: (pack_two_bits, unpack_two_bits), 5: (pack_base_three, unpack_base_three)}
seeds = st.integers(0, 2**31)


def levels(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)


@given(shape=st.lists(st.integers(0, 12), max_size=3).map(tuple), seed=seeds)
@settings(max_examples=80, deadline=None)
def test_packing_is_exact_for_any_shape(shape: tuple[int, ...], seed: int) -> None:
    found = levels(shape, seed)
    for places, (pack, unpack) in PACKERS.items():
        packed = pack(found)
        assert packed.numel() == -(-found.numel() // places)
        assert torch.equal(unpack(packed, shape), found)


@given(rows=st.integers(1, 5), blocks=st.integers(1, 4), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_blocks_are_exact_for_any_shape(rows: int, blocks: int, seed: int) -> None:
    found = levels((rows, 256 * blocks), seed)
    found[0, :256] = 0
    for kind in ("tq1_0", "tq2_0", "q2_0", "q4_0"):
        packed = pack_blocks(found, 0.5, kind)  # type: ignore[arg-type]
        again, scales = unpack_blocks(packed, 256 * blocks, kind)  # type: ignore[arg-type]
        assert torch.equal(again, found)
        assert float(scales[0, 0]) == 0
        assert set(scales.flatten().tolist()) <= {0.0, 0.5}
    binary = torch.where(found == 0, 1, found).to(torch.int8)
    again, scales = unpack_blocks(pack_blocks(binary, 0.5, "q1_0"), 256 * blocks, "q1_0")
    assert torch.equal(again, binary)
    assert set(scales.flatten().tolist()) == {0.5}
    with pytest.raises(ValueError, match="a level is 0"):
        pack_blocks(found, 0.5, "q1_0")


def test_blocks_are_byte_for_byte_those_of_the_package_gguf() -> None:
    need("gguf")
    import gguf

    found = levels((7, 512), 1)
    found[3, 256:] = 0
    weights = (found.float() * 0.0371).numpy()
    for kind in ("tq1_0", "tq2_0"):
        theirs = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[kind.upper()])
        assert torch.equal(pack_blocks(found, 0.0371, kind), torch.from_numpy(theirs))  # type: ignore[arg-type]


def test_blocks_of_four_bits_are_read_by_the_package_gguf() -> None:
    need("gguf")
    import gguf

    found = levels((7, 96), 1)
    found[3, 32:64] = 0
    packed = pack_blocks(found, 0.25, "q4_0")
    theirs = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(theirs), found * 0.25)


def test_two_bits_of_a_matrix_are_what_transformers_unpacks() -> None:
    need("transformers")
    from transformers.integrations.bitnet import pack_weights

    found = levels((8, 6), 2)
    theirs = pack_weights(found.clone().float())
    assert torch.equal(pack_two_bits(found).view(2, 6), theirs)


@given(columns=st.integers(1, 40), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_rows_are_packed_neighbour_by_neighbour(columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for bits in (1, 2, 4, 8):
        top = max(1, 2 ** (bits - 1) - 1)
        found = torch.randint(-top, top + 1, (3, columns), generator=generator, dtype=torch.int8)
        found = torch.where(found > 0, 1, -1).to(torch.int8) if bits == 1 else found
        for excess in (False, True) if bits > 1 else (False,):
            packed = packed_rows(found, bits, excess=excess)
            assert packed.shape == (3, -(-columns * bits // 8))
            places = torch.arange(8 // bits) * bits
            codes = ((packed.int()[..., None] >> places) & (2**bits - 1)).flatten(1)[:, :columns]
            if bits == 1:
                again = 2 * codes - 1
            elif excess:
                again = codes - 2 ** (bits - 1)
            else:
                again = codes - 2**bits * (codes >= 2 ** (bits - 1))
                if bits < 8:
                    by_table = level_table(bits)[packed.long()].flatten(1)[:, :columns]
                    assert torch.equal(by_table, found)
            assert torch.equal(again.to(torch.int8), found)


def test_bytes_of_one_bit_become_bytes_of_two() -> None:
    assert torch.equal(two_bit_table(), packed_rows(level_table(1), 2, excess=True))
    with pytest.raises(ValueError, match="levels are"):
        packed_rows(torch.tensor([[2]], dtype=torch.int8), 2)


@pytest.mark.parametrize("places", PACKERS)
def test_bytes_that_mean_nothing_are_refused(places: int) -> None:
    _, unpack = PACKERS[places]
    for count, shape in ((3, (4,)), (1, (-1, -4)), (1, (2, 9))):
        with pytest.raises(ValueError, match="do not hold|no shape"):
            unpack(torch.zeros(count, dtype=torch.uint8), shape)
    with pytest.raises(ValueError, match="no level"):
        unpack(torch.full((1,), 255, dtype=torch.uint8), (places,))
    with pytest.raises(ValueError, match="behind the last"):
        unpack(torch.zeros(1, dtype=torch.uint8), (1,))
    with pytest.raises(ValueError, match="no level"):
        unpack_blocks(torch.full((1, 66), 255, dtype=torch.uint8), 256, "tq2_0")
    with pytest.raises(ValueError, match="no level"):
        unpack_blocks(torch.zeros((1, 18), dtype=torch.uint8), 32, "q4_0")


def model() -> nn.Module:
    torch.manual_seed(0)
    return convert_linears(nn.Sequential(nn.Linear(33, 7), nn.LayerNorm(7)), lambda name: True)[0]


@pytest.mark.spec("D19")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_file_gives_the_applied_weights_back(layout: Any, tmp_path: Path) -> None:
    network = model()
    write_packed(tmp_path / "m", *pack_model(network, layout), layout)
    back = read_packed(tmp_path / "m")
    assert torch.equal(back["0.weight"], network[0].applied_weight())  # type: ignore[index,operator]
    assert torch.equal(back["0.bias"], network.get_parameter("0.bias"))


def test_the_scale_is_that_of_the_latent_weights() -> None:
    network = model()
    latent = network.get_parameter("0.weight").detach()
    scale = read_layers(network)["0"].scale
    assert float(1 / scale) == pytest.approx(float(latent.abs().mean()), rel=1e-5)


HOSTILE: dict[str, dict[str, Any]] = {
    "no shapes": {"about": {"layout": LAYOUTS["two_bits"]}},
    "shapes that are no JSON": {"shapes": "{"},
    "shapes that are a list": {"shapes": "[1]"},
    "a negative size": {"shapes": json.dumps({"w": [-4, -1]})},
    "a size that is no number": {"shapes": json.dumps({"w": ["4"]})},
    "a shape beyond memory": {"shapes": json.dumps({"w": [2**40, 2**40]})},
    "more levels than bytes": {"shapes": json.dumps({"w": [400]})},
    "nested without end": {"shapes": "[" * 100_000},
    "no levels": {"drop": "w.levels"},
    "no scale": {"drop": "w.scale"},
    "a scale of zero": {"scale": torch.zeros(1)},
    "a scale that is no number": {"scale": torch.full((1,), float("nan"))},
    "two scales": {"scale": torch.ones(2)},
    "a code that means nothing": {"levels": torch.full((1,), 3, dtype=torch.uint8)},
    "another layout": {"about": {"layout": "x", "shapes": "{}"}},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case: str, tmp_path: Path) -> None:
    wrong = HOSTILE[case]
    tensors = {
        "w.levels": wrong.get("levels", torch.full((1,), 85, dtype=torch.uint8)),
        "w.scale": wrong.get("scale", torch.ones(1)),
    }
    tensors.pop(wrong.get("drop", ""), None)
    shapes = wrong.get("shapes", json.dumps({"w": [4]}))
    about = wrong.get("about", {"layout": LAYOUTS["two_bits"], "shapes": shapes})
    save_file(tensors, tmp_path / "m", about)
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_packed(tmp_path / "m")


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    write_packed(tmp_path / "m", *pack_model(model()))
    raw = (tmp_path / "m").read_bytes()
    (tmp_path / "m").write_bytes(raw[:-3])
    with pytest.raises(ValueError, match="no intact"):
        read_packed(tmp_path / "m")
