"""Overhead of the loop per step, beside a bare loop and the peers installed here.

All subjects are alive at once. Rounds are interleaved: in each, every subject trains the same
number of steps on the same batches, in turn with a bare loop; the figure is the ratio of process
CPU time of the pair, the median over rounds, in several fresh processes. Set-up, data loading and
the first steps are outside. One thread. Final weights of the kernel's run are compared with the
bare loop's bit for bit.

Spec: C16
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
from torch import nn

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.use import UseGradients, UseObserver
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.hookspecs import hookimpl
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.contract.values import Batch
from forge_kernel.planning.plan import plan
from forge_kernel.training.loaders.in_memory import InMemoryModel, NoConfig
from forge_kernel.training.session import Session

torch.set_num_threads(1)
EVENTS = (
    "on_run_start", "on_batch", "on_gradients", "on_weights", "on_weights_changed",
    "on_step_end", "on_validation", "on_log", "on_checkpoint", "on_epoch_end",
)  # fmt: skip
LR = 1e-3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def make_batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(32, 128, generator=generator), torch.randint(10, (32,), generator=generator))
        for _ in range(count)
    ]


class Endless:
    """Live data that never ends; the session stops by its step count."""

    spec = DataSpec(features=128, classes=10)
    batches_per_epoch = None

    def __init__(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._batches = [Batch(*pair) for pair in batches]

    def batches(self, epoch: int, place: int) -> Iterator[Batch]:
        del epoch
        position = place // self._batches[0].samples
        while True:
            yield self._batches[position % len(self._batches)]
            position += 1

    def validation(self) -> list[Batch]:
        return []


def listener(event: str, number: int) -> Any:
    """A plugin object that listens to one event and does nothing."""

    import inspect

    from forge_kernel.contract import hookspecs

    kind = Kind.GRADIENTS if event == "on_gradients" else Kind.CALLBACKS
    arguments = ", ".join(inspect.signature(getattr(hookspecs, event)).parameters)
    scope: dict[str, Any] = {"hookimpl": hookimpl, "NoConfig": NoConfig}
    source = (
        f"class Listener:\n    config = NoConfig()\n"
        f"    @hookimpl\n    def {event}(self, {arguments}): pass\n"
    )
    exec(source, scope)
    scope["Listener"].info = PluginInfo(name=f"listener_{number}", kind=kind, config=NoConfig)
    return scope["Listener"]()


class PlainLoss:
    """Cross-entropy, as in the bare loop."""

    info = PluginInfo(name="plain_loss", kind=Kind.LOSS, config=NoConfig)
    config = NoConfig()

    @hookimpl
    def compute_loss(self, run: Any, step: Any, batch: Any, outputs: Any) -> Any:
        return nn.functional.cross_entropy(outputs, batch.targets)


class PlainOptimizer:
    """AdamW, as in the bare loop."""

    info = PluginInfo(name="plain_adamw", kind=Kind.OPTIMIZER, config=NoConfig)
    config = NoConfig()

    @hookimpl
    def make_optimizer(self, run: Any, parameters: Any) -> Any:
        return torch.optim.AdamW([p for _, p in parameters], lr=LR)


class BareData:
    info = PluginInfo(name="bare_data", kind=Kind.DATA, config=NoConfig)
    config = NoConfig()

    def __init__(self, data: Endless) -> None:
        self._data = data

    @hookimpl
    def make_data(self, run: Any) -> Any:
        return self._data


def kernel(
    batches: list[Any], *, non_finite: str, plugins: int = 10, typical: bool = False,
    folder: Path | None = None,
) -> tuple[Callable[[int], None], nn.Module]:  # fmt: skip
    """A session; the returned function trains n more steps through the kernel's own loop."""
    model = make_model()
    live = [
        BareData(Endless(batches)), InMemoryModel(model), PlainLoss(), PlainOptimizer(),
        *[listener(EVENTS[i % len(EVENTS)], i) for i in range(plugins)],
    ]  # fmt: skip
    uses: dict[str, Any] = {}
    if typical:
        uses["gradients"] = (UseGradients("clip_norm", {"max_norm": 1.0}),)
        uses["observers"] = (UseObserver("progress_bar"), UseObserver("metrics_jsonl"))
    run = RunConfig(
        max_seconds=1e9, non_finite=non_finite, device="cpu", log_every=50 if typical else 10**9
    )  # type: ignore[arg-type]
    from forge_kernel.planning.catalog import Catalog
    from forge_kernel.planning.pipeline_file import check_pipeline

    catalog = Catalog.installed()
    kinds = {plugin.info.kind for plugin in live}
    pipeline = check_pipeline(PipelineConfig(run=run, **uses), catalog, kinds)
    session = Session(plan(pipeline, catalog, plugins=live), folder=folder)
    session.opened().start()
    return _resumable(session), model


def _resumable(session: Session) -> Callable[[int], None]:
    """Trains n more steps of `Session.train`, which runs on in a greenlet.

    Its data hands control back when the n batches have been trained on.
    """
    from greenlet import getcurrent, greenlet

    bench = getcurrent()
    data = session.run.data
    inner = data.batches

    def batches(epoch: int, place: int) -> Iterator[Batch]:
        left = 0
        for batch in inner(epoch, place):
            if left == 0:
                left = bench.switch()
            left -= 1
            yield batch

    data.batches = batches  # type: ignore[method-assign]
    training = greenlet(session.train)
    training.switch()
    return training.switch


def bare(batches: list[Any], *, typical: bool = False) -> tuple[Callable[[int], None], nn.Module]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    position = 0
    sink = io.StringIO()

    def advance(steps: int) -> None:
        nonlocal position
        for _ in range(steps):
            inputs, targets = batches[position % len(batches)]
            loss = nn.functional.cross_entropy(model(inputs), targets)
            loss.backward()
            if typical:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            position += 1
            if typical and position % 50 == 0:
                line = {
                    "step": position,
                    "loss": loss.item(),
                    "lr": optimizer.param_groups[0]["lr"],
                }
                sink.write(json.dumps(line) + "\n")

    return advance, model


def measure(
    subjects: dict[str, Callable[[int], None]],
    reference: Callable[[int], None],
    rounds: int,
    steps: int,
) -> dict[str, tuple[float, float, float]]:
    """Ratio of CPU time to the reference's: median and middle half, over interleaved pairs."""
    for advance in (*subjects.values(), reference):
        advance(steps)
    ratios: dict[str, list[float]] = {name: [] for name in subjects}
    gc.collect()
    gc.disable()
    for number in range(rounds):
        reference(steps)  # warms the caches that the collector has cooled
        for name, advance in subjects.items():
            pair = [("own", advance), ("reference", reference)]
            times: dict[str, float] = {}
            for label, call in pair if number % 2 else reversed(pair):
                begin = time.process_time()
                call(steps)
                times[label] = time.process_time() - begin
            ratios[name].append(times["own"] / times["reference"])
        gc.collect()
    gc.enable()
    result = {}
    for name, values in ratios.items():
        quarters = statistics.quantiles(values, n=4)
        result[name] = (statistics.median(values), quarters[0], quarters[2])
    return result


def check_bits(batches: list[Any]) -> bool:
    """Whether the kernel's weights equal the bare loop's after 100 steps."""
    train, model = kernel(batches, non_finite="stop")
    loop, other = bare(batches)
    train(100)
    loop(100)
    return all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def one_process(rounds: int, steps: int, peers_too: bool) -> dict[str, Any]:
    """The ratios of this process, and whether the weights are equal."""
    batches = make_batches(64)
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stderr(_Terminal()):
        plain: dict[str, Callable[[int], None]] = {
            "bare loop again (the noise)": bare(batches)[0],
            "forge, 10 plugins, finite check off": kernel(batches, non_finite="off")[0],
            "forge, 10 plugins, finite check on": kernel(batches, non_finite="stop")[0],
        }
        typical: dict[str, Callable[[int], None]] = {
            "bare loop again (the noise)": bare(batches, typical=True)[0],
            "forge, clip, log every 50, bar": kernel(
                batches, non_finite="stop", plugins=0, typical=True, folder=Path(scratch)
            )[0],
        }
        if peers_too:
            import peers

            plain.update(peers.plain(make_model, batches, LR, Path(scratch)))
            typical.update(peers.typical(make_model, batches, LR, Path(scratch)))
        return {
            "plain": measure(plain, bare(batches)[0], rounds, steps),
            "typical": measure(typical, bare(batches, typical=True)[0], rounds, steps),
            "bit_equal": check_bits(batches),
        }


def several_processes(count: int, arguments: list[str]) -> dict[str, Any]:
    """Median, least and greatest of the medians of `count` fresh processes.

    Where a process's memory lies moves a ratio by some hundredths, for as long as it lives.
    """
    result: list[dict[str, Any]] = []
    for _ in range(count):
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [
                sys.executable,
                __file__,
                *arguments,
                "--processes",
                "1",
                "--json",
                file.name,
            ]
            _ = subprocess.run(command, check=True, capture_output=True)
            result.append(json.loads(Path(file.name).read_text()))
    results: dict[str, Any] = {"bit_equal": all(item["bit_equal"] for item in result)}
    for title in ("plain", "typical"):
        results[title] = {}
        for name in result[0][title]:
            medians = [item[title][name][0] for item in result]
            results[title][name] = (statistics.median(medians), min(medians), max(medians))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=40, help="in each process")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--peers", action="store_true", help="also the peers that are installed")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.processes == 1:
        results = one_process(options.rounds, options.steps, options.peers)
    else:
        arguments = ["--rounds", str(options.rounds), "--steps", str(options.steps)]
        arguments += ["--peers"] if options.peers else []
        results = several_processes(options.processes, arguments)
    spread = "middle half of the rounds" if options.processes == 1 else "range of the processes"
    for title in ("plain", "typical"):
        print(f"\n{title}: CPU time of a step, ratio to the bare loop (median, {spread})\n")
        for name, (median, low, high) in results[title].items():
            print(f"  {name:<44} {median:5.3f}   {low:5.3f} - {high:5.3f}")
    print(f"\nfinal weights bit-equal to the bare loop's after 100 steps: {results['bit_equal']}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


class _Terminal(io.StringIO):
    """A terminal that shows nobody anything, so that bars are drawn in full."""

    def isatty(self) -> bool:
        return True


if __name__ == "__main__":
    main()
