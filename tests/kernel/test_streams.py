"""Random streams: of a run, of its loader and of its validation, each by itself."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_parts import make_plugin
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    TensorDataset,
)

from forge_kernel import resume, run
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import RunError
from forge_kernel.storage.random_state import (
    StreamState,
    ambient_seed,
    process_state_kept,
    read_random_state,
    seed_everything,
    write_random_state,
)
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_kernel.training.loaders.random_streams import RunStreams

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(40, 4, generator=GENERATOR)
Y = torch.randint(3, (40,), generator=GENERATOR)
PIPELINE = """forge: 1
run: {{name: t, seed: 0, device: cpu, max_steps: {steps}, log_every: 1{more}}}
optimizer: {{use: sgd, with: {{lr: 0.1}}}}
loss: {{use: cross_entropy}}
"""


def network(dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(dropout), nn.ReLU(), nn.Linear(16, 3))


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def pipeline(folder: Path, steps: int = 10, more: str = "") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "p.yaml"
    file.write_text(PIPELINE.format(steps=steps, more=more))
    return file


def trained(folder: Path, data: Any, steps: int = 10, more: str = "", **options: Any) -> Tensor:
    result = run(
        pipeline(folder, steps, more), model=network(), data=data, output_dir=folder / "out",
        quiet=True, **options,
    )  # fmt: skip
    return weights(result.model)


class StopAt:
    """Stops a run after so many steps."""

    def __init__(self, step: int) -> None:
        self.step, self.reached = step, False

    def is_set(self) -> bool:
        return self.reached

    def __call__(self, event: dict[str, Any]) -> None:
        self.reached = event["step"] >= self.step


class Augmented(Dataset[Any]):
    """Adds a number to each sample when it is read."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return X[index] + self.draw(), Y[index]


class Held:
    """A transform with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self) -> float:
        if isinstance(self.generator, torch.Generator):
            return float(torch.rand((), generator=self.generator))
        return float(self.generator.random())


class ByName:
    """Transforms by name, one after the other."""

    def __init__(self, **transforms: Callable[[], float]) -> None:
        self.transforms = transforms

    def __call__(self) -> float:
        return sum(one() for one in self.transforms.values())


class Lazy(Sampler[int]):
    """Draws each index only when it is asked for, from torch's ambient stream."""

    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        for _ in range(40):
            yield int(torch.randint(40, ()))


class Shuffled(IterableDataset[Any]):
    """Samples in an order drawn from python's ambient stream, one swap at a time."""

    def __iter__(self) -> Iterator[Any]:
        rest = list(range(40))
        while rest:
            index = rest.pop(random.randrange(len(rest)))
            yield X[index], Y[index]


LOADERS: dict[str, Callable[[], Any]] = {
    "random": lambda: DataLoader(Augmented(random.random), 10),
    "numpy": lambda: DataLoader(Augmented(np.random.rand), 10),
    "torch": lambda: DataLoader(Augmented(lambda: float(torch.rand(()))), 10, shuffle=True),
    "own torch generator": lambda: DataLoader(
        TensorDataset(X, Y), 10, shuffle=True, generator=torch.Generator().manual_seed(3)
    ),
    "sampler's generator": lambda: DataLoader(
        TensorDataset(X, Y), 10,
        sampler=RandomSampler(range(40), generator=torch.Generator().manual_seed(3)),
    ),
    "transform's numpy Generator": lambda: DataLoader(
        Subset(Augmented(Held(np.random.default_rng(7))), range(40)), 10, shuffle=True
    ),
    "transform's RandomState": lambda: DataLoader(Augmented(Held(np.random.RandomState(7))), 10),
    "transform's MT19937": lambda: DataLoader(
        Augmented(Held(np.random.Generator(np.random.MT19937(7)))), 10
    ),
    "transform's random.Random": lambda: DataLoader(Augmented(Held(random.Random(7))), 10),
    "transform's torch.Generator": lambda: DataLoader(
        ConcatDataset([Augmented(Held(torch.Generator().manual_seed(7)))]), 10
    ),
    "a random.Random of transforms by name": lambda: DataLoader(
        Augmented(ByName(none=lambda: 0.0, noise=Held(random.Random(7)))), 10
    ),
    "an order drawn late": lambda: DataLoader(TensorDataset(X, Y), 10, sampler=Lazy()),
    "an iterable's own order": lambda: DataLoader(Shuffled(), 10),
    "workers": lambda: DataLoader(
        Augmented(lambda: float(torch.rand(()))), 10, shuffle=True, num_workers=1,
        multiprocessing_context="fork",
    ),
    "a list": lambda: [(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)],
}  # fmt: skip


@pytest.mark.spec("G3")
@pytest.mark.parametrize("stop", [2, 4, 6])
@pytest.mark.parametrize("name", LOADERS)
def test_a_run_that_was_interrupted_draws_what_it_would_have_drawn(
    tmp_path: Path, name: str, stop: int
) -> None:
    """In an epoch, at its end, in a later one; the model draws too (dropout)."""
    made = LOADERS[name]
    whole = trained(tmp_path / "whole", made())
    cut = StopAt(stop)
    _ = trained(tmp_path / "cut", made(), cancel=cut, on_progress=cut)
    torch.manual_seed(99)
    random.seed(99)
    result = resume(tmp_path / "cut" / "out", model=network(), data=made(), quiet=True)
    assert result.steps == 10
    assert torch.equal(weights(result.model), whole)


@pytest.mark.parametrize(
    ("first", "second"),
    [("log_every: 1", "log_every: 7"), (", save_every: 1", ""), (", validate_every: 1", "")],
)
@pytest.mark.parametrize("name", ["torch", "random", "own torch generator", "workers"])
def test_what_is_done_beside_training_changes_no_weight(
    tmp_path: Path, name: str, first: str, second: str
) -> None:
    """Validation data draws too: it shuffles, augments, and shares a generator with training."""
    generator = torch.Generator().manual_seed(11)

    def data() -> Any:
        generator.manual_seed(11)
        augmented = Augmented(lambda: random.random() + float(np.random.rand()))
        validation = DataLoader(augmented, 8, shuffle=True, generator=generator)
        return LOADERS[name](), validation

    found = []
    for number, setting in enumerate((first, second)):
        if setting.startswith("log_every"):
            file = pipeline(tmp_path / str(number))
            file.write_text(file.read_text().replace("log_every: 1", setting))
            result = run(
                file, model=network(), data=data(), output_dir=tmp_path / f"o{number}", quiet=True
            )
            found.append(weights(result.model))
        else:
            found.append(trained(tmp_path / str(number), data(), more=setting))
    assert torch.equal(*found)


def test_validations_draw_the_same_each_time(tmp_path: Path) -> None:
    """Unless training moves them, the metrics of a model that stays are the same."""
    seen: list[float] = []

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "validation":
            seen.append(event["metrics"]["loss"])

    file = pipeline(tmp_path, 6, ", validate_every: 2")
    file.write_text(file.read_text().replace("lr: 0.1", "lr: 1.0e-30"))
    validation = DataLoader(Augmented(lambda: float(torch.rand(()))), 8, shuffle=True)
    data = (DataLoader(TensorDataset(X, Y), 10, shuffle=True), validation)
    run(
        file, model=network(0.0), data=data, output_dir=tmp_path / "o", on_progress=note, quiet=True
    )
    assert len(seen) == 3
    assert len(set(seen)) == 1


class Listening:
    """Anything with `set_epoch`."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class ListeningData(Listening, IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(X[i], Y[i]) for i in range(40)])


class ListeningBatches(Listening):
    def __iter__(self) -> Iterator[Any]:
        return iter([(X[i : i + 10], Y[i : i + 10]) for i in range(0, 40, 10)])


class ListeningSampler(Listening, Sampler[int]):
    def __len__(self) -> int:
        return 40

    def __iter__(self) -> Iterator[int]:
        return iter(range(40))


def heard(where: str) -> tuple[Any, Listening]:
    tensors = TensorDataset(X, Y)
    if where == "sampler":
        sampler = ListeningSampler()
        return DataLoader(tensors, 10, sampler=sampler), sampler
    if where == "batch sampler":
        sampler = ListeningSampler()
        return DataLoader(tensors, batch_sampler=BatchSampler(sampler, 10, False)), sampler
    if where == "iterable data":
        data = ListeningData()
        return DataLoader(data, 10), data
    batches = ListeningBatches()
    return batches, batches


@pytest.mark.parametrize(
    "where", ["sampler", "batch sampler", "iterable data", "the loader itself"]
)
def test_the_epoch_is_told_wherever_somebody_listens(tmp_path: Path, where: str) -> None:
    data, listener = heard(where)
    _ = trained(tmp_path, data, steps=9)
    assert listener.epochs == [0, 1, 2]


def test_torchs_distributed_sampler_in_a_batch_sampler_hears_the_epoch(tmp_path: Path) -> None:
    sampler: Any = DistributedSampler(TensorDataset(X, Y), num_replicas=1, rank=0)
    loader = DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(sampler, 10, False))
    _ = trained(tmp_path, loader, steps=9)
    assert sampler.epoch == 2


@pytest.mark.parametrize(
    ("change", "stop"), [("system", 2), ("data", 2), ("data", 1), ("generators", 2)]
)
def test_an_epoch_that_cannot_be_replayed_is_refused_by_name(
    tmp_path: Path, change: str, stop: int
) -> None:
    """Red when other batches are passed off as the rest of the epoch."""

    def loader(number: int) -> Any:
        if change == "system":
            return DataLoader(Augmented(Held(random.SystemRandom())), 10)
        if change == "data":
            return DataLoader(TensorDataset(X + number, Y), 10)
        held = {"generator": torch.Generator()} if number else {}
        return DataLoader(TensorDataset(X, Y), 10, shuffle=True, **held)

    cut = StopAt(stop)
    _ = trained(tmp_path, loader(0), cancel=cut, on_progress=cut)
    named = {"system": "SystemRandom", "data": "DataLoader", "generators": "other generators"}
    with pytest.raises(RunError, match=named[change]):
        resume(tmp_path / "out", model=network(), data=loader(1), quiet=True)
    if change == "data":
        told = LoaderData(loader(1), exact=False)
        assert resume(tmp_path / "out", model=network(), data=told, quiet=True).steps == 10


@pytest.mark.parametrize("augments", [False, True])
def test_another_number_of_workers_is_told_and_the_order_stays(
    tmp_path: Path, augments: bool
) -> None:
    told: list[str] = []

    def note(event: dict[str, Any]) -> None:
        if event.get("name") == "workers_changed":
            told.append(event["message"])

    def loader(workers: int) -> Any:
        data = Augmented((lambda: float(torch.rand(()))) if augments else (lambda: 0.0))
        context = {"multiprocessing_context": "fork"} if workers else {}
        return DataLoader(data, 10, shuffle=True, num_workers=workers, **context)

    cut = StopAt(2)
    whole = trained(tmp_path / "whole", loader(0))
    _ = trained(tmp_path / "cut", loader(0), cancel=cut, on_progress=cut)
    folder = tmp_path / "cut" / "out"
    result = resume(folder, model=network(), data=loader(1), quiet=True, on_progress=note)
    assert torch.equal(weights(result.model), whole) == (not augments)
    assert len(told) == 1
    assert "1 workers, and had 0" in told[0]


@pytest.mark.parametrize("once", [zip, lambda x, y: iter([(x[0], y[0])])], ids=["zip", "iterator"])
def test_data_that_can_be_read_once_is_not_read_twice(tmp_path: Path, once: Any) -> None:
    batches = [X[:10], X[10:20]], [Y[:10], Y[10:20]]
    loader = [(x, y) for x, y in zip(*batches, strict=True)]
    with pytest.raises(RunError, match="validation data is a .*read only once"):
        trained(tmp_path / "validation", (loader, once(*batches)))
    with pytest.raises(RunError, match=r"training data is a .*second pass"):
        trained(tmp_path / "training", once(*batches))
    one = run(
        pipeline(tmp_path / "one", 10, ", max_epochs: 1"), model=network(), data=once(*batches),
        output_dir=tmp_path / "one" / "o", quiet=True,
    )  # fmt: skip
    assert one.epochs == 1


@pytest.mark.parametrize("seeds", [(1, 2), (3, 3)])
def test_runs_in_threads_are_each_what_they_are_alone(
    tmp_path: Path, seeds: tuple[int, int]
) -> None:
    """Red when both draw from one stream; the process's streams are left as they were found."""
    loader = LOADERS["torch"]

    def one(place: str, seed: int, meet: Callable[[], Any] | None = None) -> Tensor:
        file = pipeline(tmp_path / place, 30, ", validate_every: 3")
        file.write_text(file.read_text().replace("seed: 0", f"seed: {seed}"))
        model = models.pop()
        plugins = (
            []
            if meet is None
            else [make_plugin("meet", Kind.OBSERVERS, on_run_start=lambda self, run: meet())]
        )
        out = tmp_path / place / "o"
        return weights(
            run(
                file,
                model=model,
                data=(loader(), LOADERS["random"]()),
                output_dir=out,
                quiet=True,
                plugins=plugins,
            ).model
        )

    models = [network() for _ in range(4)]
    alone = [one(f"alone{place}", seed) for place, seed in enumerate(seeds)]
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    barrier = threading.Barrier(2)
    together: dict[int, Any] = {}

    def job(place: int) -> None:
        together[place] = one(f"thread{place}", seeds[place], lambda: barrier.wait(30))

    threads = [threading.Thread(target=job, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(2):
        assert torch.equal(together[place], alone[place])
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_between_two_parts_of_a_validation_another_thread_has_its_turn_and_moves_nothing() -> None:
    """Red when it finds the validation's streams, or the validation goes on with what it leaves."""

    def draws() -> list[float]:
        return [float(torch.rand(())), random.random(), float(np.random.rand())]

    def stand() -> Any:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    def job() -> None:
        with RunStreams():
            draws()
        done.set()

    streams, done = RunStreams(), threading.Event()
    with streams.drawing(StreamState.seeded(5)):
        alone = [draws(), draws()]
    before, thread = stand(), threading.Thread(target=job)
    with streams.drawing(StreamState.seeded(5)) as turn:
        first = draws()
        thread.start()
        for _ in range(30_000):
            if done.wait(1e-3):
                break
            turn()
        second = draws()
    thread.join()
    assert [first, second] == alone
    assert stand() == before


def test_a_run_inside_a_callback_changes_nothing_of_the_outer_one(tmp_path: Path) -> None:
    inner: list[Tensor] = []
    models = [network(), network()]  # made here: making one seeds the ambient stream

    def nested(event: dict[str, Any]) -> None:
        if event["event"] == "log" and event["step"] in (2, 5):
            folder = tmp_path / f"inner{len(inner)}"
            result = run(
                pipeline(folder, 3), model=models.pop(), data=LOADERS["torch"](),
                output_dir=folder / "out", quiet=True,
            )  # fmt: skip
            inner.append(weights(result.model))

    plain = trained(tmp_path / "plain", LOADERS["torch"]())
    with_inner = trained(tmp_path / "outer", LOADERS["torch"](), on_progress=nested)
    assert torch.equal(plain, with_inner)
    assert torch.equal(inner[0], inner[1])


@pytest.mark.parametrize("other", [3 + 64, 3 + 2**31, 4, 3 + 2**33 + 1])
def test_each_seed_has_streams_of_its_own(other: int) -> None:
    """Of Python, numpy and torch alike. Red when a part of the seed is dropped."""

    def draws(seed: int) -> list[float]:
        seed_everything(seed)
        return [random.random(), float(np.random.random()), float(torch.rand(()))]

    with process_state_kept():
        first, again, second = draws(3), draws(3), draws(other)
    assert first == again
    assert all(mine != theirs for mine, theirs in zip(first, second, strict=True))
    streams = [StreamState.seeded(seed) for seed in (3, 3, other)]
    with process_state_kept():
        seen = []
        for state in streams:
            state.write()
            seen.append([random.random(), float(np.random.random()), float(torch.rand(()))])
    assert seen[0] == seen[1]
    assert all(mine != theirs for mine, theirs in zip(seen[0], seen[2], strict=True))


def test_what_a_seed_draws_stays() -> None:
    """A run of before is repeated by its seed: red when streams are started in another way."""

    def draws() -> list[int]:
        return [random.getrandbits(32), np.random.randint(2**31), int(torch.randint(2**31, ()))]

    with process_state_kept():
        seed_everything(3 + 2**32)
        assert draws() == [4086009037, 218175338, 303761048]
        StreamState.seeded(3 + 2**32).write()
        assert draws() == [4086009037, 1695811068, 303761048]
        assert float(np.random.normal()) == pytest.approx(0.2768884642258385)
        torch.manual_seed(3)
        assert ambient_seed() == ambient_seed() == 56736075737176768
        assert int(torch.randint(2**31, ())) == 303761048, "the ambient seed draws nothing"


def test_a_checkpoint_keeps_the_second_half_of_a_pair_of_normal_draws() -> None:
    """Python and numpy draw two at a time; red when what is left over is dropped."""

    def draws() -> list[float]:
        return [random.gauss(0, 1), float(np.random.normal()), float(torch.rand(()))]

    with process_state_kept():
        seed_everything(3)
        draws()
        kept = read_random_state()
        second = draws()
        draws()
        write_random_state(kept)
        assert draws() == second


def test_the_streams_of_every_device_are_kept_where_there_are_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two stand-ins for devices; a checkpoint of theirs is taken up where there are none too."""
    known = [torch.arange(4, dtype=torch.uint8), torch.arange(4, 8, dtype=torch.uint8)]
    devices = list(known)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(devices))
    monkeypatch.setattr(
        torch.cuda, "set_rng_state_all", lambda new: devices.__setitem__(slice(2), new)
    )
    kept: list[Any] = []
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda there=there: there)
        kept.append(read_random_state())
    assert "cuda" not in kept[0], "asking a device that nothing uses would start it"
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        devices[:] = [torch.zeros(4, dtype=torch.uint8)] * 2
        write_random_state(kept[1])
        expected = [state.tolist() for state in known] if there else [[0] * 4] * 2
        assert [state.tolist() for state in devices] == expected


@pytest.mark.parametrize("warn_only", [False, True])
def test_streams_and_settings_of_torch_are_left_as_they_were_found(warn_only: bool) -> None:
    """By a block that fails, and of settings that are not torch's own at first."""

    def found() -> list[Any]:
        return [
            random.getstate(), float(np.random.random()), torch.get_rng_state().tolist(),
            torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_num_threads(),
        ]  # fmt: skip

    with process_state_kept():
        torch.use_deterministic_algorithms(True, warn_only=warn_only)
        torch.set_grad_enabled(False)
        seed_everything(3)
        before = found()
        seed_everything(3)
        with contextlib.suppress(ArithmeticError), process_state_kept():
            seed_everything(4)
            torch.use_deterministic_algorithms(False)
            torch.set_grad_enabled(True)
            torch.set_num_threads(torch.get_num_threads() + 1)
            raise ArithmeticError
        assert found() == before
