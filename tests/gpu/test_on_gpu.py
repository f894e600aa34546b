"""What only a GPU can show: the kernels' bits, whole runs on it, and what leaves it again."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import StopAfter
from torch import Tensor

from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import resume, run
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_plugins.mathematics.quantization import (
    device_kernels,
    integer_gradients,
    quantized_linear,
    quantizers,
)
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.scheme import Scheme

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

ROOT = Path(__file__).resolve().parents[2]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(7, 100), (3, 5, 257), (512, 2048), (20, 5504)]


@contextmanager
def plain_forms() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_kernels, "_of", lambda _: None)
        yield


@pytest.fixture(autouse=True)
def kernels() -> Any:
    found = device_kernels.kernels(torch.device("cuda"))
    if found is None:
        pytest.skip(device_kernels.lacks_kernels("cuda"))
    return found


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_have_the_bits_of_the_plain_form(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Red when a kernel multiplies and adds in one rounding, or divides by an approximation."""
    torch.manual_seed(0)
    inputs = (torch.randn(shape, device="cuda") * 3).to(dtype)
    for wanted_type in (torch.float32, torch.bfloat16):
        found = quantizers.activation_levels_and_values(inputs, Scheme(), wanted_type)
        values = quantizers.activation_values(inputs, Scheme(), wanted_type)
        with plain_forms():
            levels, scale = quantizers.activation_levels(inputs, Scheme())
            wanted = quantizers.activation_values(inputs, Scheme(), wanted_type)
        assert torch.equal(found[0], levels)
        assert torch.equal(found[1], scale)
        assert torch.equal(found[2], wanted.view(levels.shape))
        assert torch.equal(values, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(50, 70), (1376, 512), (2048, 2048)])
def test_weights_have_the_bits_of_the_plain_form(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = BitLinear(*shape, bias=False, device="cuda", dtype=dtype)
    for whole in (False, True):
        found = layer.quantized(torch.bfloat16, as_int8=whole)
        with plain_forms():
            wanted = layer.quantized(torch.bfloat16, as_int8=whole)
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) is (other is None)
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("shape", [(70, 112, 48), (4, 64, 64), (1024, 2048, 5504), (300, 100, 36)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tiles", [True, False], ids=["by the copy engine", "by pointers"])
def test_products_have_the_bits_of_exact_sums(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    tiles: bool,
    kernels: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not tiles:
        monkeypatch.setattr(kernels, "_fetches_tiles", lambda *_: False)
    torch.manual_seed(0)
    rows, width, out = shape
    values = torch.randint(-127, 128, (rows, width), dtype=torch.int8, device="cuda")
    levels = torch.randint(-1, 2, (out, width), dtype=torch.int8, device="cuda")
    each, bias = torch.rand(rows, 1, device="cuda") + 0.5, torch.randn(out, device="cuda")
    sums = (values.double() @ levels.double().t()).float()
    for scale in (torch.tensor(3.7, device="cuda"), torch.rand(out, 1, device="cuda") + 0.5):
        for added in (None, bias):
            found = kernels.integer_linear(values, each, levels, scale, added, dtype)
            wanted = (
                sums * (1.0 / each) * (1.0 / scale).reshape(1, -1)
                if scale.dim()
                else sums * (1.0 / (each * scale))
            )
            assert torch.equal(found, (wanted if added is None else wanted + added).to(dtype))
    found = kernels.dequantized_rows(values, each, dtype)
    assert torch.equal(found, (values.float() / each).to(dtype))


@pytest.mark.parametrize("shape", [(300, 104, 40), (1024, 2048, 5504), (40, 64, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_in_whole_numbers_have_the_bits_of_the_plain_form(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens, width, out = shape
    rows = (torch.randn(tokens, out, device="cuda") * 1e-6).to(dtype)
    rows[tokens // 2] = 0
    values = torch.randint(-127, 128, (tokens, width), dtype=torch.int8, device="cuda")
    levels = torch.randint(-1, 2, (out, width), dtype=torch.int8, device="cuda")
    rows[tokens // 3] *= 100
    sizes = rows.float().abs().amax(1, keepdim=True)
    each, of_outputs = (torch.rand(size, 1, device="cuda") + 0.5 for size in (tokens, out))

    def both() -> list[Tensor]:
        return [
            integer_gradients.weight_gradient(rows, sizes, values, each, torch.float32),
            integer_gradients.input_gradient(
                integer_gradients.gradient_rows(rows, of_outputs.reshape(-1)),
                levels,
                of_outputs,
                dtype,
            ),
        ]

    found = both()
    with plain_forms():
        for one, other in zip(found, both(), strict=True):
            assert torch.equal(one, other)


def gradients(layer: BitLinear, inputs: Tensor, *, autocast: bool) -> list[Tensor]:
    inputs = inputs.clone().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        outputs = layer(inputs)
    loss = outputs.float().square().sum()
    return [outputs.detach(), *torch.autograd.grad(loss, [inputs, *layer.parameters()])]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("arithmetic", ["int8", "int8_bf16_backward", "int8_backward"])
def test_whole_numbers_give_the_gradients_of_the_exact_form(
    arithmetic: Any, autocast: bool
) -> None:
    """Red when the scale of a row is dropped on the way back."""
    assert quantized_linear.lacks_int8("cuda") == ""
    torch.manual_seed(0)
    layer = BitLinear(256, 384, device="cuda", scheme=Scheme(arithmetic=arithmetic))
    exact = BitLinear.from_linear(layer)
    inputs = torch.randn(4, 100, 256, device="cuda")
    found = gradients(layer, inputs, autocast=autocast)
    with plain_forms():
        wanted = gradients(exact, inputs, autocast=autocast)
    near = 1e-5 if arithmetic == "int8" and not autocast else 1e-2
    near = 1.5e-2 if arithmetic == "int8_backward" else near
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= near * other.norm()


def test_a_layer_is_bit_equal_to_autobitlinear_of_transformers_here_too() -> None:
    bitnet_of_transformers = pytest.importorskip("transformers.integrations.bitnet")
    torch.manual_seed(0)
    layer = BitLinear(512, 256, bias=False, device="cuda")
    theirs = bitnet_of_transformers.AutoBitLinear(512, 256, bias=False, online_quant=True)
    theirs.weight = layer.weight
    inputs = torch.randn(64, 512, device="cuda")
    with torch.compiler.set_stance("force_eager"):
        wanted = gradients(theirs, inputs, autocast=False)
    for one, other in zip(gradients(layer, inputs, autocast=False), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.spec("K2")
def test_the_share_of_busy_time_is_that_of_the_drivers_counter(tmp_path: Path) -> None:
    """What it was: docs/results.md. Red when memory in use takes the counter's place."""
    metrics = tmp_path / "metrics.json"
    command = [sys.executable, "benchmarks/utilization.py", "--epochs", "1", "--json", str(metrics)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    found = json.loads(metrics.read_text())
    assert 0 < found["busy_share"] <= 1
    assert found["each_epoch"] == [found["busy_share"]]
    assert found["seconds"] > 0


SETTINGS = [
    "run.max_steps=12", "run.validate_every=4", "run.log_every=3", "run.keep_checkpoints=50",
    "run.save_every=3", "quantizer={use: bitnet, with: {arithmetic: int8}}",
    "gradients=[{use: grokfast, with: {alpha: 0.8}}, {use: clip_norm}]",
    "observers=[{use: resources}, {use: metrics_jsonl}]",
]  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_goes_on_bit_for_bit_and_what_it_wrote_serves_a_cpu(
    precision: str, tmp_path: Path
) -> None:
    """Red when the scaler's or the device's random state is not saved."""
    settings = [*SETTINGS, f"run.precision={precision}", "run.device=cuda"]
    pipeline = load_pipeline("digits_npy", settings)
    straight = run(pipeline, output_dir=tmp_path / "straight", quiet=True)
    assert next(straight.model.parameters()).is_cuda
    stop = StopAfter(7)
    run(pipeline, output_dir=tmp_path / "run", plugins=[stop], cancel=stop, quiet=True)
    resume(tmp_path / "run", plugins=[StopAfter(12)], quiet=True)
    first, second = (
        CheckpointStore(tmp_path / name / "checkpoints").path(12) for name in ("straight", "run")
    )
    assert differences(first, second) == []
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    logged = [line for line in map(json.loads, lines) if line["kind"] == "log"]
    assert all(0 <= line["device_percent"] <= 100 for line in logged)
    assert all(line["device_memory_bytes"] > 0 for line in logged)
    if precision == "fp32":
        further = ["run.max_steps=14", "run.device=cpu"]
        longer = resume(tmp_path / "straight", further, quiet=True)
        assert longer.steps == 14
        assert not next(longer.model.parameters()).is_cuda


def test_compiled_layers_take_the_kernel_of_the_product(
    kernels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when traced code falls back to the product that writes its sums out."""
    assert quantized_linear.lacks_int8("cuda") == ""
    torch.manual_seed(0)
    layer = BitLinear(256, 128, device="cuda", scheme=Scheme(arithmetic="int8"))
    inputs = torch.randn(200, 256, device="cuda")
    eager = gradients(layer, inputs, autocast=True)
    calls = []
    real = kernels.integer_linear
    monkeypatch.setattr(kernels, "integer_linear", lambda *them: calls.append(1) or real(*them))
    traced = gradients(torch.compile(layer, fullgraph=True), inputs, autocast=True)
    assert calls == [1]
    for one, other in zip(traced, eager, strict=True):
        assert (one - other).norm() <= 1e-2 * other.norm()
