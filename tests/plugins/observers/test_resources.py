"""Throughput, MFU, processor, memory and device: against counting by hand and the counters."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pytest
import torch
from kernel_parts import make_plugin, make_session
from torch import Tensor, nn
from torch.nn import functional

from forge_kernel.api import Kind
from forge_kernel.config.use import UseObserver
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.runner import run
from forge_kernel.storage.random_state import process_state_kept
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_plugins.mathematics.metrics.batch_size import samples_in
from forge_plugins.mathematics.metrics.flops import FlopCount, product_peak, training_flops
from forge_plugins.observers import resources
from forge_plugins.observers.system_stats import Driver, SystemStats

ROOT = Path(__file__).resolve().parents[3]
PEAK = 1e12


def metrics(session: Any) -> dict[str, float | None]:
    return dict(session.log().metrics)


def session_of(model: nn.Module, batches: list[Batch], **settings: Any) -> Any:
    uses = {"observers": (UseObserver("resources", {"peak_flops": PEAK, **settings}),)}
    return make_session(model, LoaderData(batches, spec=DataSpec(classes=3)), uses=uses)


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: Any) -> Clock:
    found = Clock()
    monkeypatch.setattr(resources, "time", SimpleNamespace(perf_counter=found))
    return found


def plain(count: int = 4) -> Batch:
    return Batch(torch.randn(count, 4), torch.randint(3, (count,)))


@pytest.mark.spec("H11", "H16")
def test_throughput_is_of_the_whole_interval(linear: nn.Module, clock: Clock) -> None:
    """Red when validation and saving are left out, or a window's micro-batches are one."""
    session = session_of(linear, [])
    session.step(plain(4), plain(2))
    clock.now += 1.0
    session.step(plain(3))
    clock.now += 2.0  # a validation, say
    found = metrics(session)
    assert found["samples_per_second"] == pytest.approx(9 / 3)
    assert found["steps_per_second"] == pytest.approx(2 / 3)
    assert found["tokens_per_second"] is None
    clock.now += 1.0
    assert metrics(session)["samples_per_second"] is None  # nothing was trained
    session.step(plain(5))
    clock.now += 0.5
    assert metrics(session)["samples_per_second"] == pytest.approx(10.0)


def test_tokens_are_counted_where_samples_are_rows_of_them(clock: Clock) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 3))
    session = session_of(model, [])
    session.step(Batch(torch.randint(7, (5, 3)), torch.randint(3, (5,))))
    clock.now += 3.0
    found = metrics(session)
    assert found["tokens_per_second"] == pytest.approx(5.0)
    assert found["samples_per_second"] == pytest.approx(5 / 3)


@pytest.mark.spec("H16")
def test_mfu_is_three_forward_passes_against_the_peak(clock: Clock) -> None:
    """Red when the backward pass is left out, or the operations are of the whole batch."""
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    session = session_of(model, [])
    for _ in range(3):
        session.step(plain(6))
    clock.now += 2.0
    per_sample = 2 * (4 * 16 + 16 * 3)
    assert metrics(session)["mfu"] == pytest.approx(3 * per_sample * 18 / 2.0 / PEAK)


def test_what_is_given_is_not_counted(clock: Clock, linear: nn.Module) -> None:
    session = session_of(linear, [], flops_per_sample=5e9)
    session.step(plain(6))
    clock.now += 2.0
    assert metrics(session)["mfu"] == pytest.approx(3 * 5e9 * 3 / PEAK)
    session = session_of(linear, [], flops_per_sample=5e9, peak_flops=2 * PEAK)
    session.step(plain(6))
    clock.now += 2.0
    assert metrics(session)["mfu"] == pytest.approx(3 * 5e9 * 3 / PEAK / 2)


def test_of_a_network_without_products_and_of_compiled_code_mfu_is_not_known(clock: Clock) -> None:
    class Sums(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, inputs: Tensor) -> Tensor:
            return (inputs * self.weight)[:, :3]

    compiled = nn.Linear(4, 3)
    compiled._compiled_call_impl = compiled._call_impl  # type: ignore[assignment]
    for model in (Sums(), compiled):
        session = session_of(model, [])
        session.step(plain())
        clock.now += 1.0
        found = metrics(session)
        assert found["mfu"] is None
        assert found["samples_per_second"] == pytest.approx(4.0)


def test_watching_changes_no_bit_of_the_training() -> None:
    def trained(uses: dict[str, Any]) -> list[Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        session = make_session(model, LoaderData([], spec=DataSpec(classes=3)), uses=uses)
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            inputs = torch.randn(6, 4, generator=generator)
            session.step(Batch(inputs, torch.randint(3, (6,), generator=generator)))
            session.log()
        return [parameter.detach() for parameter in model.parameters()]

    watched = trained({"observers": (UseObserver("resources"),)})
    for one, other in zip(watched, trained({}), strict=True):
        assert torch.equal(one, other)


def test_a_forward_pass_that_fails_leaves_no_counting_behind(linear: nn.Module) -> None:
    """Red when the mode is left only where the pass went well."""
    session = session_of(linear, [])
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        session.accumulate(Batch(torch.randn(2, 7), torch.zeros(2).long()))
    [listen] = session.bus.calls("on_error")
    listen(session.run, RuntimeError("told"))
    from torch.utils._python_dispatch import _get_current_dispatch_mode

    assert _get_current_dispatch_mode() is None
    session.step(plain())
    assert metrics(session)["mfu"] is not None


def test_in_a_half_precision_run_the_peak_is_that_of_the_type(
    tmp_path: Path, monkeypatch: Any
) -> None:
    asked: list[Any] = []

    def peak(device: Any, dtype: Any, threads: int) -> float:
        asked.append((str(device), dtype, threads))
        return 1e9

    monkeypatch.setattr("forge_plugins.mathematics.metrics.flops.product_peak", peak)
    monkeypatch.delattr(resources.flops, "product_peak", raising=False)  # what the proxy has kept
    settings = [
        "run.max_steps=2", "run.log_every=1", "run.precision=bf16",
        "observers=[{use: resources}, {use: metrics_jsonl}]",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert asked == [(device, torch.bfloat16, torch.get_num_threads())]
    record = json.loads((tmp_path / "run/resources.json").read_text())
    schema = json.loads((ROOT / "schemas/observers/resources.resources.json").read_text())
    jsonschema.validate(record, schema)
    assert record["flops_per_sample"] > 0
    sources = (record["flops_per_sample_source"], record["peak_flops_source"])
    assert (record["peak_flops"], *sources) == (1e9, "measured", "measured")
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    logged = [line for line in lines if line["kind"] == "log"]
    assert all(line["mfu"] > 0 for line in logged)


# -- operations ---------------------------------------------------------------------------------


def counted(call: Any) -> int:
    count = FlopCount()
    count.begin()
    try:
        call()
    finally:
        count.end()
    return count.total


def test_operations_are_those_of_the_textbook() -> None:
    left, right = torch.randn(3, 4), torch.randn(4, 5)
    assert counted(lambda: left @ right) == 2 * 3 * 4 * 5
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 3, 3)
    assert counted(lambda: functional.conv2d(image, kernel)) == 2 * 2 * 5 * 6 * 6 * 3 * 3 * 3
    whole = torch.ones(32, 16, dtype=torch.int8)
    assert counted(lambda: torch._int_mm(whole, whole.t())) == 2 * 32 * 16 * 32
    assert counted(lambda: left + 1.0) == 0


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_is_scores_and_their_mixture(grouped: bool) -> None:
    query = torch.randn(2, 4, 10, 8)
    key = torch.randn(2, 2 if grouped else 4, 10, 8)

    def attend() -> None:
        functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=grouped)

    assert counted(attend) == 2 * 2 * 4 * 10 * 10 * (8 + 8)


def test_a_training_step_counts_three_forward_passes_as_autograd_does() -> None:
    """The convention against torch's own count of a whole step, but for the first layer's input."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(20)])
    inputs = torch.randn(7, 32, requires_grad=True)
    forward = counted(lambda: model(inputs))
    assert counted(lambda: model(inputs).sum().backward()) == training_flops(forward)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_peak_is_measured_once_in_a_process_and_leaves_its_settings(threads: int) -> None:
    with process_state_kept():
        torch.set_num_threads(threads)
        before = torch.get_rng_state()
        peak = product_peak(torch.device("cpu"), torch.float32, threads)
        assert peak > 0
        assert peak == product_peak(torch.device("cpu"), torch.float32, threads)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (torch.zeros(3, 2), 3), ({"mask": 1, "ids": torch.zeros(5, 2)}, 5),
        ((torch.zeros(4),), 4), ([1, 2], 1), (torch.zeros(()), 1),
    ],
)  # fmt: skip
def test_samples_are_counted_in_whichever_form_a_batch_comes(value: Any, count: int) -> None:
    assert samples_in(value) == count


# -- the machine --------------------------------------------------------------------------------


@pytest.mark.spec("H9", "H16")
def test_processor_and_memory_are_what_the_operating_system_counts() -> None:
    machine = SystemStats(torch.device("cpu"))
    process = psutil.Process()
    found = machine.memory()
    assert found["memory_bytes"] == pytest.approx(process.memory_info().rss, rel=0.05)
    assert found["memory_share"] == pytest.approx(psutil.virtual_memory().percent / 100, abs=0.05)
    start, busy = time.perf_counter(), process.cpu_times()
    machine.load()
    while time.perf_counter() - start < 0.3:
        sum(range(1000))
    passed, now = time.perf_counter() - start, process.cpu_times()
    counted_ = 100 * (now.user + now.system - busy.user - busy.system) / passed
    assert machine.load()["cpu_percent"] == pytest.approx(counted_, abs=25)


@pytest.mark.spec("H16")
def test_a_device_that_is_not_there_is_null_and_never_zero(tmp_path: Path) -> None:
    settings = ["run.max_steps=2", "run.log_every=1", "run.device=cpu"]
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    lines = map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    for line in (line for line in lines if line["kind"] == "log"):
        for name in (
            "device_percent", "device_memory_bytes", "device_memory_peak_bytes",
            "device_memory_share",
        ):  # fmt: skip
            assert line[name] is None
        assert line["memory_bytes"] > 1e6
    text = (tmp_path / "run/report.html").read_text()
    told = re.search(r"Not measured: ([^.]*)\.", text)
    assert told is not None
    assert {"device_percent", "device_memory_bytes"} <= set(told[1].split(", "))


class Nvml:
    """A driver that knows one device."""

    class NVMLError(Exception):
        pass

    def __init__(self, known: str) -> None:
        self.known = known
        self.busy = 87

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:
        if name != self.known:
            raise self.NVMLError
        return "handle"

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if self.busy < 0:
            raise self.NVMLError
        assert handle == "handle"
        return SimpleNamespace(gpu=self.busy, memory=3)


@pytest.mark.parametrize("known", ["GPU-1f2e", "MIG-1f2e"])
def test_the_drivers_counter_is_read_of_the_device_that_torch_uses(
    monkeypatch: Any, known: str
) -> None:
    """Red when the device is looked up by its number: CUDA_VISIBLE_DEVICES changes that."""
    nvml = Nvml(known)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1f2e")
    )
    driver = Driver(torch.device("cuda", 3))
    assert driver.there
    assert driver.busy_percent() == 87.0
    nvml.busy = 0
    assert driver.busy_percent() == 0.0  # a device that does nothing is measured to do so
    nvml.busy = -1
    assert driver.busy_percent() is None
    monkeypatch.setitem(sys.modules, "pynvml", Nvml("GPU-other"))
    assert Driver(torch.device("cuda", 3)).busy_percent() is None
    assert Driver(torch.device("cpu")).busy_percent() is None


def test_memory_of_the_device_is_torchs_and_the_drivers(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (25, 100))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 11)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 17)
    found = SystemStats(torch.device("cuda", 0)).memory()
    assert found["device_memory_bytes"] == 11.0
    assert found["device_memory_peak_bytes"] == 17.0
    assert found["device_memory_share"] == 0.75


def test_the_first_reading_of_the_processor_is_of_the_time_since_it_began() -> None:
    """Red when psutil's first answer, always 0.0, is taken for a measurement."""
    machine = SystemStats(torch.device("cpu"))
    begun = time.process_time()
    while time.process_time() - begun < 0.2:
        os.getpid()
    assert machine.load()["cpu_percent"] > 10.0  # type: ignore[operator]


def test_in_too_short_a_time_the_processor_is_not_read(monkeypatch: Any) -> None:
    """Red when psutil is asked each time: over a hundredth of a second it says 0 or 100."""
    from forge_plugins.observers import system_stats as module

    now = [50.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    machine = SystemStats(torch.device("cpu"))
    now[0] += module.LEAST_SECONDS / 2
    assert machine.load()["cpu_percent"] is None
    assert machine.load()["system_cpu_percent"] is None
    now[0] += module.LEAST_SECONDS
    found = machine.load()
    assert found["cpu_percent"] is not None
    assert found["system_cpu_percent"] is not None
    assert machine.load()["cpu_percent"] is None


def test_events_and_metrics_of_others_are_left_alone(linear: nn.Module) -> None:
    other = make_plugin("other", Kind.OBSERVERS, log_metrics=lambda self, run, step: {"own": 1.0})
    uses = {"observers": (UseObserver("resources", {"peak_flops": PEAK}),)}
    session = make_session(
        linear, LoaderData([], spec=DataSpec(classes=3)), uses=uses, plugins=[other]
    )
    session.step(plain())
    assert metrics(session)["own"] == 1.0
    assert session.run.events == []


@pytest.mark.parametrize(
    ("setting", "gone"),
    [
        ("throughput", {"samples_per_second", "tokens_per_second", "steps_per_second", "mfu"}),
        ("memory", {"memory_bytes", "memory_share"}),
        ("device", {"device_percent", "device_memory_bytes", "device_memory_peak_bytes",
                    "device_memory_share"}),
    ],
)  # fmt: skip
def test_what_nobody_asks_for_is_not_told(linear: nn.Module, setting: str, gone: set[str]) -> None:
    """Planted: the setting not read; memory left out of the device's metrics too."""
    found = []
    for chosen in ({}, {setting: False}):
        session = session_of(linear, [], **chosen)
        session.step(plain(4))
        found.append(metrics(session).keys())
    assert found[0] - found[1] == gone


def test_without_throughput_nothing_is_measured_for_it(linear: nn.Module, monkeypatch: Any) -> None:
    monkeypatch.setattr(resources, "_measured_peak", lambda *_: pytest.fail("measured"))
    session = session_of(linear, [], throughput=False, peak_flops=None)
    session.step(plain(4))
    assert "mfu" not in metrics(session)
