"""Packed files of every grid, dtype and tie; what state_dict and phase6 make of the same models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from live_exports import batches, live_run, manifest
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from forge_plugins.interchange.packed_ternary import pack_model, read_packed, write_packed
from forge_plugins.interchange.safetensors_state import read_state
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.packing import (
    pack_eight_bits,
    pack_four_bits,
    pack_one_bit,
    unpack_eight_bits,
    unpack_four_bits,
    unpack_one_bit,
)
from forge_plugins.mathematics.quantization.scheme import Scheme

PACKERS = {
    1: (pack_one_bit, unpack_one_bit, 1),
    4: (pack_four_bits, unpack_four_bits, 7),
    8: (pack_eight_bits, unpack_eight_bits, 127),
}
FILE = "exports/packed_ternary/model.safetensors"


class Tied(nn.Module):
    """An embedding that is the head as well, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 64)
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.out = nn.Linear(64, 4, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, inputs: Tensor) -> Tensor:
        return self.out(self.b(self.a(self.embed(inputs.argmax(-1)))))


def wide() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 3))


def applied(layer: BitLayer) -> Tensor:
    return layer.eval().applied_weight()


@pytest.mark.parametrize("bits", PACKERS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 64])
def test_levels_of_each_width_come_back_and_take_their_bits(bits: int, count: int) -> None:
    pack, unpack, top = PACKERS[bits]
    generator = torch.Generator().manual_seed(count)
    levels = torch.randint(-top, top + 1, (count,), generator=generator, dtype=torch.int8)
    if bits == 1:
        levels[levels == 0] = 1
    packed = pack(levels)
    assert packed.dtype is torch.uint8
    assert packed.numel() == -(-count * bits // 8)
    assert torch.equal(unpack(packed, (count,)), levels)


@pytest.mark.parametrize(
    ("bits", "levels", "code", "shape"),
    [
        (1, [0], [2], (1,)),
        (4, [8], [0x0F], (1,)),
        (8, [-128], [0x80], (1,)),
        (4, [-9], [0x10], (1,)),
    ],
)
def test_what_is_no_level_is_neither_packed_nor_unpacked(
    bits: int, levels: list[int], code: list[int], shape: tuple[int, ...]
) -> None:
    pack, unpack, _ = PACKERS[bits]
    with pytest.raises(ValueError, match="level"):
        pack(torch.tensor(levels, dtype=torch.int8))
    with pytest.raises(ValueError, match="level"):
        unpack(torch.tensor(code, dtype=torch.uint8), shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "part"), [(1, 32), (2, 16), (4, 8), (8, 4), (1.58, 16)])
def test_a_run_packs_its_bits_at_their_size_in_the_dtype_of_the_model(
    bits: float, part: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    done = live_run(
        wide().to(dtype), batches(dtype), tmp_path / "run",
        "{use: packed_ternary}, {use: state_dict, with: {weights: applied}}",
        f"quantizer.with.weight_bits={bits}",
    )  # fmt: skip
    assert done.failed_exports == {}
    told = manifest(tmp_path / "run", "packed_ternary")
    assert told["ternary_weights"] == 4 * 64 + 64 * 64 + 64 * 3
    assert told["ternary_bytes"] * part == told["ternary_weights"] * 4
    assert told["bytes"] == (tmp_path / "run" / FILE).stat().st_size
    assert told["bytes_fp32"] == 4 * sum(p.numel() for p in wide().parameters())
    assert done.model is not None
    packed = read_packed(tmp_path / "run" / FILE)
    plain = load_file(tmp_path / "run/exports/state_dict/model.safetensors")
    for name in ("0", "2", "3"):
        layer = done.model.get_submodule(name)
        assert isinstance(layer, BitLayer)
        for found in (packed[f"{name}.weight"], plain[f"{name}.weight"]):
            assert found.dtype is dtype
            assert torch.equal(found, applied(layer))


@pytest.mark.parametrize(
    "scheme",
    [
        {"granularity": "row"},
        {"granularity": "group", "group_size": 4},
        {"weight_bits": 4, "granularity": "row"},
        {"weight_bits": 1, "granularity": "group", "group_size": 2},
        {"weight_bits": 1, "target": 0.3},
        {"rounding": "learned_threshold"},
        {"rounding": "stochastic"},
        {"activation_bits": 4},
        {"parity": "torchao"},
    ],
)
@pytest.mark.parametrize("layout", ["two_bits", "base_three"])
def test_every_grid_comes_back(scheme: dict[str, Any], layout: Any, tmp_path: Path) -> None:
    scheme = dict(scheme)
    target = scheme.pop("target", 0.0)
    model, report = convert_model_to_bitnet(wide(), Scheme(**scheme))
    for layer in report.layers.values():
        layer.quantization.sparsity = target
    write_packed(tmp_path / "m", *pack_model(model, layout), layout)
    back = read_packed(tmp_path / "m")
    for name, layer in report.layers.items():
        assert torch.equal(back[f"{name}.weight"], applied(layer))
    wide().load_state_dict(back)  # plain layers take them


def test_a_continued_weight_whose_step_no_mean_gives_comes_back(tmp_path: Path) -> None:
    """Planted: level / (1 / step) instead of level * step."""
    for seed in range(12):
        torch.manual_seed(seed)
        first = nn.Linear(64, 32)
        with torch.no_grad():
            first.weight.copy_(first.weight.sign() * (torch.rand(32, 64) > 0.3) * torch.rand(32, 1))
        model, report = convert_model_to_bitnet(nn.Sequential(first), Scheme(granularity="row"))
        file = tmp_path / str(seed)
        write_packed(file, *pack_model(model))
        assert torch.equal(read_packed(file)["0.weight"], applied(report.layers["0"]))


def test_convolutions_are_packed_as_they_are_applied(tmp_path: Path) -> None:
    """Planted: the latent weight of a convolution in a packed file."""
    model, report = convert_model_to_bitnet(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)), convolutions=True
    )
    tensors, contents = pack_model(model)
    assert "0.weight.levels" in tensors
    write_packed(tmp_path / "m", tensors, contents)
    assert torch.equal(read_packed(tmp_path / "m")["0.weight"], applied(report.layers["0"]))


@pytest.mark.parametrize("bits", [1, 1.58, 4])
def test_what_is_tied_stands_and_counts_once_and_comes_back_tied(
    bits: float, tmp_path: Path
) -> None:
    done = live_run(
        Tied(), batches(), tmp_path / "run", "{use: packed_ternary}, {use: state_dict}, {use: phase6}",
        f"quantizer.with.weight_bits={bits}",
    )  # fmt: skip
    assert done.failed_exports == {}
    ties = {"b.weight": "a.weight", "out.weight": "embed.weight"}
    for name in ("packed_ternary", "state_dict"):
        assert manifest(tmp_path / "run", name)["tied"] == ties
    told = manifest(tmp_path / "run", "packed_ternary")
    assert told["ternary_weights"] == 64 * 64
    assert told["bytes_fp32"] == 4 * (4 * 64 + 64 * 64 + 2 * 64)
    packed = read_packed(tmp_path / "run" / FILE)
    file = tmp_path / "run/exports/state_dict/model.safetensors"
    whole = read_state(file)
    assert sorted(load_file(file)) == ["a.bias", "a.weight", "b.bias", "embed.weight"]
    pickled = torch.load(tmp_path / "run/exports/phase6/trained_model.pt")["model_state_dict"]
    for found in (packed, whole, pickled):
        for name, first in ties.items():
            assert found[name].data_ptr() == found[first].data_ptr()
    assert load_model(Tied(), str(file)) == (set(), [])


def test_equal_weights_that_are_not_tied_stay_two(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].load_state_dict(model[0].state_dict())
    converted, _ = convert_model_to_bitnet(model)
    tensors, contents = pack_model(converted)
    assert contents.ties == {}
    assert {"0.weight.levels", "1.weight.levels"} <= tensors.keys()


def test_one_weight_applied_in_two_ways_is_stored_in_both(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    converted, report = convert_model_to_bitnet(model, skip=["1"])
    write_packed(tmp_path / "m", *pack_model(converted))
    back = read_packed(tmp_path / "m")
    assert torch.equal(back["0.weight"], applied(report.layers["0"]))
    assert torch.equal(back["1.weight"], model[1].weight)


class Kept(nn.Module):
    """Beside its weights: plain data, a whole-number parameter, a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.steps = nn.Parameter(torch.arange(3), requires_grad=False)
        self.register_buffer("mask", torch.tensor([float("nan"), float("-inf"), 1.0]))
        self.what: Any = {"scale": 2, "names": ["a", "b"]}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(inputs) + self.steps

    def get_extra_state(self) -> Any:
        return self.what

    def set_extra_state(self, state: Any) -> None:
        self.what = state


@pytest.mark.parametrize("weights", ["latent", "applied"])
def test_extra_state_and_whole_number_parameters_go_through_every_exporter(
    weights: str, tmp_path: Path
) -> None:
    how = f"with: {{weights: {weights}}}"
    done = live_run(
        Kept(), batches(), tmp_path / "run",
        f"{{use: packed_ternary}}, {{use: state_dict, {how}}}, {{use: phase6, {how}}}",
    )  # fmt: skip
    assert done.failed_exports == {}
    for name in ("packed_ternary", "state_dict"):
        assert manifest(tmp_path / "run", name)["left_out"] == ["_extra_state"]
    packed = read_packed(tmp_path / "run" / FILE)
    assert torch.equal(packed["steps"], torch.arange(3))
    fresh = Kept()
    fresh.what = None
    pickled = torch.load(tmp_path / "run/exports/phase6/trained_model.pt")["model_state_dict"]
    fresh.load_state_dict(pickled)
    assert fresh.what == {"scale": 2, "names": ["a", "b"]}
