"""A teacher's likeliest answers to all that a run will read, made before its first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.api import Batch, LazyModule, PluginError, Run
from forge_plugins.losses.teacher import counted_rows, keys_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from forge_plugins.mathematics.losses import answer_store, chunked_distillation
    from forge_plugins.mathematics.losses.answer_store import AnswerStore
    from forge_plugins.mathematics.losses.chunked_distillation import TopAnswers
else:
    torch = LazyModule("torch")
    answer_store = LazyModule("forge_plugins.mathematics.losses.answer_store")
    chunked_distillation = LazyModule("forge_plugins.mathematics.losses.chunked_distillation")

_FIRST: Final = 64
"""Samples by which a run's data are told from other data."""
_MORE: Final = 8
"""Optimizer steps beyond the run's last, for those that will be dropped."""

Rows = Callable[[Batch], tuple["Tensor", Callable[["Tensor"], "Tensor"]]]
"""Gives a batch's rows, and what makes logits of some of them."""


def order_of(run: Run) -> Iterator[Batch]:
    """All that a run will read, in its order, on its device; counted as the loss will see it.

    Raises:
        PluginError: the run's length in steps is not known.
    """
    total = run.total_steps
    if total is None:
        raise PluginError(
            "distillation: a cache holds the answers to all that the run reads, and its length in "
            "steps is not known: set run.max_steps or run.max_epochs"
        )
    windows = total + run.progress.skipped + _MORE
    size, done = run.settings.accumulate, 0
    for epoch in range(windows):
        count = 0
        for batch in run.data.batches(epoch, 0):
            batch.ignore_index = run.settings.ignore_index
            yield batch.to(run.device)
            count += 1
            done += count % size == 0
            if done >= windows:
                return
        done += count % size != 0
        if not count or done >= windows:
            return


class TeacherCache:
    """Answers in a folder, for the samples of one run.

    Args:
        folder: where they lie, or will.
        about: what they are of: teacher, temperature, k.
    """

    def __init__(self, folder: str, about: dict[str, Any]) -> None:
        self.folder, self._about = Path(folder), about
        self._store: AnswerStore | None = None

    def known_digest(self, run: Run) -> str:
        """The teacher's weights as the answers were made, where the folder says it has them all.

        Empty: there is nothing yet, or not enough for so long a run, or it is damaged, which
        `open` tells: a run that is only read needs no cache.
        """
        try:
            about = answer_store.read_manifest(self.folder)
        except answer_store.StoreError:
            return ""
        needed = (run.total_steps or 0) * run.settings.accumulate
        if about is None or about.get("micro_batches", 0) < needed:
            return ""
        return str(about["digest"])

    def open(self, run: Run) -> bool:
        """Look at the folder, and whether it has the answers to all that the run will read.

        Raises:
            PluginError: it is damaged, or of another teacher, other settings or other data.
        """
        try:
            store = answer_store.AnswerStore.opened(self.folder)
        except answer_store.StoreError as error:
            raise PluginError(f"distillation: {error}") from error
        self._store = store
        if store is None:
            return False
        self._compare(store)
        with _undrawn():
            first, whole = self._look_through(run, store)
        kept = str(store.about["first"])
        if not whole and not (first.startswith(kept) or kept.startswith(first)):
            raise PluginError(
                f"distillation: the cache {self.folder} was made for other data than this run "
                "reads (another file, split, sequence length, seed or order): name another folder "
                "for it (loss.with.cache), or remove it"
            )
        return whole

    def _compare(self, store: AnswerStore) -> None:
        names = {"source": "other weights of the teacher", "k": "another cache_top_k",
                 "temperature": "another temperature"}  # fmt: skip
        if not self._about["source"]:  # the teacher's folder is not here: its name tells it
            names = {**names, "teacher": "another teacher"}
            del names["source"]
        for name, words in names.items():
            own, kept = self._about[name], store.about.get(name)
            if own != kept:
                shown = "" if name == "source" else f" ({kept}, here {own})"
                raise PluginError(
                    f"distillation: the cache {self.folder} is of {words}{shown}: name another "
                    "folder for it (loss.with.cache), or remove it"
                )

    @staticmethod
    def _look_through(run: Run, store: AnswerStore) -> tuple[str, bool]:
        """What the run's first samples are told by, and whether all are there."""
        first: list[str] = []
        for batch in order_of(run):
            keys, _ = keys_of(batch)
            first += _shown(keys, len(first))
            if (store.places(keys) < 0).any():
                if len(first) >= _FIRST:
                    return _joined(first), False
                return _first_of(run), False
        return _joined(first), True

    def make(self, run: Run, digest: str, rows: Rows) -> None:
        """Ask the teacher about what is not there yet, and write it.

        Args:
            run: whose data are gone through.
            digest: of the teacher's weights.
            rows: of a batch.

        Raises:
            PluginError: there are fewer classes than answers to be kept.
        """
        store = self._store
        if store is None:
            about = {**self._about, "digest": digest, "first": ""}
            store = answer_store.AnswerStore(self.folder, about)
        elif store.about["digest"] != digest:
            raise PluginError(
                f"distillation: the cache {self.folder} is of other weights of the teacher: name "
                "another folder for it (loss.with.cache), or remove it"
            )
        first: list[str] = []
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(run.settings.precision)
        context = torch.autocast(run.device.type, precision) if precision else nullcontext()
        count = 0
        with _undrawn(), store.writer() as writer, torch.no_grad(), context:
            for batch in order_of(run):
                keys, counts = keys_of(batch)
                first += _shown(keys, len(first))
                count += 1
                chosen = writer.new(keys)
                if len(chosen):
                    answers = self._asked(batch, counts, chosen, rows)
                    writer.add(keys[chosen], counts[chosen], answers)
            store.about["first"] = _joined(first)
            store.about["micro_batches"] = max(count, store.about.get("micro_batches", 0))
        self._store = answer_store.AnswerStore.opened(self.folder)
        assert self._store is not None, "written a moment ago"
        run.emit_event(
            "teacher_cache",
            f"The teacher's answers to {len(self._store):,} samples are in {self.folder} "
            f"({self._store.bytes / 1e6:,.1f} MB).",
            samples=len(self._store),
            bytes=self._store.bytes,
        )

    def _asked(self, batch: Batch, counts: Any, chosen: Any, rows: Rows) -> TopAnswers:
        """The likeliest answers to the rows that count of some samples."""
        whole, logits_of = rows(batch)
        counted = counted_rows(batch)
        if counted is not None:
            whole = whole[counted]
        wanted = torch.zeros(len(counts), dtype=torch.bool)
        wanted[torch.from_numpy(chosen)] = True
        whole = whole[wanted.repeat_interleave(torch.from_numpy(counts)).to(whole.device)]
        parts = []
        k, temperature = int(self._about["k"]), float(self._about["temperature"])
        for piece in torch.split(whole, chunked_distillation.PIECE):
            logits = logits_of(piece)
            if k > logits.shape[-1]:
                raise PluginError(
                    f"distillation: cache_top_k {k} is more than the {logits.shape[-1]} classes "
                    "that the teacher answers with"
                )
            parts.append(chunked_distillation.top_answers(logits, k, temperature))
        if not parts:
            return chunked_distillation.TopAnswers(
                torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
            )
        return chunked_distillation.TopAnswers(
            *(torch.cat(each) for each in zip(*parts, strict=True))
        )

    @property
    def digest(self) -> str:
        """Of the weights of the teacher that answered."""
        assert self._store is not None, "opened at the run's start"
        return str(self._store.about["digest"])

    def answers(self, batch: Batch) -> TopAnswers:
        """Those to the rows that count, on the batch's device.

        Raises:
            PluginError: a sample has none.
        """
        assert self._store is not None, "opened at the run's start"
        keys, _ = keys_of(batch)
        try:
            answers = self._store.answers(keys)
        except KeyError as error:
            raise PluginError(
                f"distillation: the cache {self.folder} has no answers to {error.args[0]} of "
                f"{len(keys)} samples: the run reads other data than it read through at its start. "
                "Data that are drawn anew each time have no cache: take loss.with.cache out"
            ) from error
        device = batch.targets.device
        return type(answers)(*(part.to(device) for part in answers))


def _undrawn() -> Any:
    """Reading ahead leaves torch's random stream where it was."""
    return torch.random.fork_rng(devices=[])


def _first_of(run: Run) -> str:
    first: list[str] = []
    for batch in order_of(run):
        first += _shown(keys_of(batch)[0], len(first))
        if len(first) >= _FIRST:
            break
    return _joined(first)


def _shown(keys: Any, before: int) -> list[str]:
    return [f"{int(key):016x}" for key in keys[: max(0, _FIRST - before), 0]]


def _joined(first: list[str]) -> str:
    return "".join(first[:_FIRST])
