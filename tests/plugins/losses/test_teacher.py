"""A teacher of language models: in pieces, from a cache, by its layers, and none that does not fit."""

from __future__ import annotations

import gc
import json
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import SgdPart, StopAfter, make_plugin, make_session
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from forge_kernel import load_pipeline, resume, run
from forge_kernel.config.use import Use, UseLoss, UseQuantizer
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, ForgeError, PluginError
from forge_kernel.training.loaders.data_loaders import LoaderData
from forge_kernel.training.session import Session
from forge_plugins.mathematics.losses.attention_relations import relation_divergences, segments_of
from forge_plugins.mathematics.losses.chunked_distillation import (
    PIECE,
    LossFactors,
    chunked_distillation,
    top_answers,
    top_divergences,
)
from forge_plugins.mathematics.losses.distillation import divergences

CLASSES, LENGTH, SAMPLES = 11, 6, 4


# -- pieces ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kept", ["logits", "all classes"])
@pytest.mark.parametrize("head_kind", ["plain", "nested", "frozen"])
def test_value_and_gradients_in_pieces_are_those_of_the_whole(
    smoothing: float, weighted: bool, kept: str, head_kind: str
) -> None:
    """Planted: T for T squared; the smoothing left out of the gradient; a piece's mean."""
    torch.manual_seed(2)
    linear = nn.Linear(5, 23)
    linear.requires_grad_(head_kind != "frozen")
    head = nn.Sequential(linear) if head_kind == "nested" else linear
    hidden, teacher = torch.randn(40, 5, requires_grad=True), torch.randn(40, 23) * 2
    targets = torch.randint(23, (40,))
    targets[3] = -100
    weights = torch.rand(40) * (torch.rand(40) > 0.3) if weighted else None
    own = torch.ones(40) if weights is None else weights
    logits = head(hidden)
    entropy = functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    each = 0.3 * entropy + 0.7 * divergences(logits, teacher, 2.5)
    leaves = [hidden, *(p for p in linear.parameters() if p.requires_grad)]
    wanted = torch.autograd.grad((each * own).sum() / own.sum() * 3.0, leaves)
    factors = LossFactors(target=0.3, teacher=0.7, temperature=2.5, label_smoothing=smoothing)
    means = chunked_distillation(
        hidden, targets, head,
        lambda rows: teacher[rows] if kept == "logits" else top_answers(teacher[rows], 23, 2.5),
        factors, piece=17, weights=weights,
    )  # fmt: skip
    found = torch.autograd.grad(means.loss * 3.0, leaves)
    torch.testing.assert_close(means.cross_entropy, ((entropy * own).sum() / own.sum()).detach())
    for one, two in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 4, 22, 23])
def test_what_was_kept_in_part_is_compared_with_the_rest_as_one_class(count: int) -> None:
    """Value by hand, gradient by autograd. Planted: the rest left out, the kept made to sum to 1."""
    torch.manual_seed(3)
    student, teacher = torch.randn(9, 23, requires_grad=True), torch.randn(9, 23)
    kept = top_answers(teacher, count, 2.0)
    p, q = (teacher / 2).softmax(1), (student / 2).softmax(1)
    order = teacher.argsort(1, descending=True)
    joined = []
    for one in (p, q):
        sorted_ = one.gather(1, order)
        joined.append(torch.cat([sorted_[:, :count], sorted_[:, count:].sum(1, True)], 1))
    terms = joined[0] * (joined[0].clamp_min(1e-30) / joined[1].clamp_min(1e-30)).log()
    by_hand = terms.sum(1) * 4
    found = top_divergences(student, kept, 2.0)
    torch.testing.assert_close(found, by_hand, atol=1e-6, rtol=1e-4)
    assert (found <= divergences(student, teacher, 2.0) + 1e-6).all()
    wanted = torch.autograd.grad(found.sum(), student)[0]
    identity = nn.Linear(23, 23, bias=False)
    with torch.no_grad():
        identity.weight.copy_(torch.eye(23))
    factors = LossFactors(target=0.0, teacher=1.0, temperature=2.0)
    targets = torch.zeros(9, dtype=torch.int64)
    means = chunked_distillation(
        student, targets, identity, lambda rows: type(kept)(*(part[rows] for part in kept)), factors
    )
    mine = torch.autograd.grad(means.loss * 9, student)[0]
    torch.testing.assert_close(mine, wanted, atol=1e-6, rtol=1e-4)


class Logits(TorchDispatchMode):
    """How many numbers are alive at most in tensors with a column for each class."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes, self.most = classes, 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), named: Any = None
    ) -> Any:
        result = function(*args, **(named or {}))
        for each in result if isinstance(result, list | tuple) else (result,):
            if isinstance(each, Tensor) and each.ndim and each.shape[-1] == self.classes:
                storage = each.untyped_storage()
                key = storage._cdata
                if key not in self._alive:
                    self._alive[key] = storage.nbytes() // 4
                    weakref.finalize(storage, self._alive.pop, key, None)
        self.most = max(self.most, sum(self._alive.values()))
        return result


@pytest.mark.spec("E10")
def test_no_more_logits_of_both_are_there_than_2_times_512_rows() -> None:
    """Forward and backward, with all that is in between. Planted: pieces of 512 rows."""
    torch.manual_seed(0)
    classes = 8192
    student, teacher = nn.Linear(4, classes), nn.Linear(4, classes)
    hidden, theirs = torch.randn(1500, 4, requires_grad=True), torch.randn(1500, 4)
    targets = torch.randint(classes, (1500,))
    counting = Logits(classes)

    def answers(rows: slice) -> Tensor:
        return teacher(theirs[rows])  # type: ignore[no-any-return]

    with counting:
        factors = LossFactors(target=0.5, teacher=0.5, temperature=2.0)
        chunked_distillation(hidden, targets, student, answers, factors).loss.backward()
    assert 2 * PIECE * classes <= counting.most <= 2 * 512 * classes


# -- in training -----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width // 2)
        self.v_proj, self.o_proj = nn.Linear(width, width // 2), nn.Linear(width, width)

    def forward(self, rows: Tensor) -> Tensor:
        q, k, v = self.q_proj(rows), self.k_proj(rows).repeat(1, 1, 2), self.v_proj(rows)
        mixed = functional.scaled_dot_product_attention(q, k, v.repeat(1, 1, 2), is_causal=True)
        return self.o_proj(mixed)  # type: ignore[no-any-return]


class Network(nn.Module):
    """One block of causal attention between an embedding and a head."""

    def __init__(self, seed: int = 0, width: int = 8, classes: int = CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(CLASSES, width)
            self.attention = Attention(width)
            self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.embedding(tokens)
        return self.head(rows + self.attention(rows))  # type: ignore[no-any-return]


def drawn(seed: int = 4, *, ignored: bool = True) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(CLASSES, (SAMPLES, LENGTH + 1), generator=generator)
    targets = tokens[:, 1:].clone()
    if ignored:
        targets[:, 0] = targets[1, 4:] = -100
    return Batch(tokens[:, :-1], targets, torch.tensor([1.0, 0.5, 0.0, 2.0]))


def session_of(
    batches: list[Batch],
    inner: str = "language_model",
    *,
    wrappers: tuple[Any, ...] = (),
    model: nn.Module | None = None,
    quantizer: dict[str, Any] | None = None,
    max_steps: int = 2,
    accumulate: int = 1,
    plugins: Sequence[Any] = (),
    **config: Any,
) -> Session:
    spec = DataSpec(vocabulary=CLASSES, sequence=LENGTH, classes=CLASSES)
    config = {"loss": {"use": inner}, **config}
    return make_session(
        model or Network(), LoaderData(batches, spec=spec),
        optimizer=SgdPart(0.5), own_loss=True, max_steps=max_steps, accumulate=accumulate,
        plugins=plugins, uses={
            "loss": UseLoss("distillation", config), "wrappers": wrappers,
            "quantizer": UseQuantizer("bitnet", quantizer or {"skip": ["head"]}),
        },
    )  # fmt: skip


def weights_after(session: Session, *windows: list[Batch]) -> tuple[list[float], list[Tensor]]:
    losses = [float(session.step(*window)) for window in windows]
    return losses, [p.detach().clone() for p in session.run.model.parameters()]


def alike(one: tuple[list[float], list[Tensor]], two: tuple[list[float], list[Tensor]]) -> None:
    """Weights moved by the rate 0.5 times the gradients: these agree to 1e-5."""
    assert one[0] == pytest.approx(two[0], abs=1e-5)
    for mine, theirs in zip(one[1], two[1], strict=True):
        torch.testing.assert_close(mine, theirs, atol=5e-6, rtol=0)


@pytest.mark.parametrize("more", [{}, {"relations": ["attention"], "relation_heads": 2}, {"hidden": ["attention"]}])  # fmt: skip
def test_pieces_teach_what_whole_logits_teach(more: dict[str, Any]) -> None:
    """With ignored targets, sample weights and two micro-batches of different weight."""
    windows = [[drawn(4), drawn(5, ignored=False)], [drawn(6), drawn(7)]]
    found = [
        weights_after(session_of(windows[0], inner, accumulate=2, **more), *windows)
        for inner in ("language_model", "cross_entropy")
    ]
    alike(*found)
    without = weights_after(session_of(windows[0], accumulate=2), *windows)
    assert (without[0] != found[0][0]) == bool(more)
    if "relations" in more:
        twice = session_of(windows[0], accumulate=2, relation_weight=2.0, **more)
        first = [float(twice.step(*windows[0])), found[0][0][0], without[0][0]]
        assert first[0] - first[1] == pytest.approx(first[1] - first[2], abs=1e-6)


def networks() -> int:
    """How many there are in this process."""
    gc.collect()
    return sum(isinstance(item, Network) for item in gc.get_objects())


@pytest.mark.spec("E10")
@pytest.mark.parametrize("inner", ["language_model", "cross_entropy"])
def test_a_cache_of_all_classes_teaches_as_the_teacher_without_one_in_memory(
    tmp_path: Path, inner: str
) -> None:
    """Planted: answers kept in the order of the samples, not found by what they hold."""
    data = [drawn(seed) for seed in range(5)]
    settings = {"cache": str(tmp_path / "cache"), "cache_top_k": CLASSES}
    windows = [[data[place]] for place in (3, 0, 4, 1)]
    plain = weights_after(session_of(data, inner, max_steps=5), *windows)
    for _ in range(2):  # made, then found
        session = None
        before = networks()
        session = session_of(data, inner, max_steps=5, **settings)
        assert networks() == before + 1
        alike(weights_after(session, *windows), plain)
        files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(files) == 4
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    session_of(data, inner, max_steps=5, **settings)
    assert files == first, "made once"
    few = session_of(data, inner, max_steps=5, cache=str(tmp_path / "few"), cache_top_k=2)
    assert weights_after(few, *windows)[0] != plain[0]


def test_a_longer_run_adds_what_is_missing_to_its_cache(tmp_path: Path) -> None:
    """Planted: the parts of before are forgotten."""
    cache = {"cache": str(tmp_path / "cache"), "cache_top_k": CLASSES}
    data = [drawn(seed) for seed in range(40)]
    session_of(data, max_steps=1, **cache)
    parts = len(json.loads((tmp_path / "cache/manifest.json").read_text())["about"]["shards"])
    longer = session_of(data, max_steps=40, **cache)
    alike(
        weights_after(longer, *[[one] for one in data]),
        weights_after(session_of(data, max_steps=40), *[[one] for one in data]),
    )
    about = json.loads((tmp_path / "cache/manifest.json").read_text())["about"]
    assert (parts, len(about["shards"])) == (1, 2)


def test_what_is_frozen_is_held_once() -> None:
    """The teacher is the model before its conversion. Planted: all that is equal, or all that is frozen."""
    freeze = Use("freeze", {"parameters": ["embedding.*", "head.*"]})

    def moves(self: Any, run: Any, model: nn.Module) -> nn.Module:
        model.get_parameter("head.bias").data += 1.0  # as a start from other weights does
        return model

    mover = make_plugin("mover", Kind.WRAPPERS, transform_model=moves)
    session = session_of([drawn()], wrappers=(freeze,), plugins=[mover])
    own = dict(session.run.model.named_parameters())
    place = own["embedding.weight"].data_ptr()
    gc.collect()
    (teacher,) = (
        item
        for item in gc.get_objects()
        if isinstance(item, Network)
        and item is not session.run.model
        and item.embedding.weight.data_ptr() == place
    )
    shared = {n for n, p in teacher.named_parameters() if p.data_ptr() == own[n].data_ptr()}
    assert shared == {"embedding.weight", "head.weight"}
    before = [p.clone() for p in teacher.parameters()]
    weights_after(session, [drawn()], [drawn(5)])
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


@pytest.mark.parametrize("more", [{}, {"relations": ["attention"], "relation_heads": 2}, {"hidden": ["attention"]}])  # fmt: skip
@pytest.mark.parametrize("inner", ["language_model", "cross_entropy"])
def test_what_comes_after_the_last_target_teaches_nothing(more: dict[str, Any], inner: str) -> None:
    """Planted: relations to rows behind; divergences averaged over all rows."""
    batch = drawn(ignored=False)
    batch.targets[:, 4:] = -100
    other = Batch(batch.inputs.clone(), batch.targets, batch.weights)
    other.inputs[:, 5:] = 0
    found = [weights_after(session_of([each], inner, **more), [each]) for each in (batch, other)]
    alike(*found)


# -- relations -------------------------------------------------------------------------------------


def test_relations_are_those_of_the_paper_between_rows_that_see_each_other() -> None:
    torch.manual_seed(1)
    own, other = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    found = relation_divergences([own], [other], 2)
    for sample in range(2):
        for row in range(5):
            total = 0.0
            for head in range(2):
                s = own[sample, :, head * 3 : head * 3 + 3]
                t = other[sample, :, head * 2 : head * 2 + 2]
                q = (s[row] @ s[: row + 1].T / 3**0.5).softmax(0)
                p = (t[row] @ t[: row + 1].T / 2**0.5).softmax(0)
                total += float((p * (p / q).log()).sum()) / 2
            assert float(found[sample, row]) == pytest.approx(total, abs=1e-6)
    assert float(relation_divergences([own], [own], 2).abs().max()) == 0.0


def test_relations_are_taken_in_full_precision_under_autocast() -> None:
    """Red when the products are in half precision: with a scaled loss their gradient overflows."""
    torch.manual_seed(0)
    own = [torch.randn(2, 16, 8).half().requires_grad_() for _ in range(3)]
    other = [torch.randn(2, 16, 8).half() for _ in range(3)]

    def gradients(*, autocast: bool) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.float16, enabled=autocast):
            loss = relation_divergences(own, other, 4).mean() * 65536.0
        return torch.autograd.grad(loss, own)

    found = gradients(autocast=True)
    pairs = zip(found, gradients(autocast=False), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    assert all(bool(one.isfinite().all()) for one in found)


def test_packed_sequences_relate_to_themselves_alone() -> None:
    """Planted: segments by the first position alone."""
    torch.manual_seed(1)
    own, other = torch.randn(1, 7, 4), torch.randn(1, 7, 4)
    segments = segments_of(torch.tensor([[0, 1, 2, 0, 1, 0, 0]]))
    assert segments.tolist() == [[0, 0, 0, 1, 1, 2, 3]]
    packed = relation_divergences([own], [other], 2, segments)
    alone = [
        relation_divergences([own[:, a:b]], [other[:, a:b]], 2)
        for a, b in ((0, 3), (3, 5), (5, 6), (6, 7))
    ]
    torch.testing.assert_close(packed, torch.cat(alone, 1))


# -- what does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"relations": ["none.*"]}, "no layer 'none.*' (relations)"),
        ({"relations": ["head"]}, "head (relations) of Network has no layers of its own"),
        ({"relations": ["attention"], "relation_heads": 3}, "cannot be cut into 3 relation heads"),
        ({"cache": "c", "cache_top_k": CLASSES + 1}, "cache_top_k 12 is more than the 11 classes"),
        ({"teacher": "nowhere"}, "nowhere is no run folder and no model's folder"),
    ],
)
def test_layers_and_folders_that_are_not_there_are_named(
    config: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForgeError, match=re.escape(message)):
        session_of([drawn()], **config).step(drawn())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("weight: 0", "nothing is learned from the teacher"),
        ("cache_top_k: 5", "read with a cache only"),
        ("cache: c, hidden: ['*']", "need the teacher itself"),
        ("cache: c, relations: ['*']", "need the teacher itself"),
        ("cache: c, cache_top_k: 0", "at least 1"),
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    options: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline("smoke", [f"loss={{use: distillation, with: {{{options}}}}}"])


@pytest.fixture
def made(tmp_path: Path) -> tuple[list[Batch], dict[str, Any]]:
    """Data, and a cache of them."""
    data = [drawn(seed) for seed in range(3)]
    settings = {"cache": str(tmp_path / "cache"), "cache_top_k": 4}
    session_of(data, **settings)
    return data, settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 3.0}, "another temperature (2.0, here 3.0)"),
        ({"cache_top_k": 5}, "another cache_top_k (4, here 5)"),
        ({"model": Network(seed=1)}, "other weights of the teacher"),
    ],
)
def test_a_cache_of_other_answers_is_refused(
    made: tuple[list[Batch], dict[str, Any]], change: dict[str, Any], message: str
) -> None:
    data, settings = made
    with pytest.raises(PluginError, match=re.escape(message)):
        session_of(data, **{**settings, **change})


def test_a_cache_of_other_data_is_refused_and_of_the_same_in_another_order_is_not(
    made: tuple[list[Batch], dict[str, Any]],
) -> None:
    """Rows that count where they did not are other data. Planted: keys of the tokens alone."""
    data, settings = made
    changed = [Batch(one.inputs, one.targets.clone(), one.weights) for one in data]
    changed[0].targets[0, 0] = 1
    fewer = [Batch(one.inputs, one.targets[:, 2:], positions=slice(2, None)) for one in data]
    moved = [Batch(one.inputs, one.targets.roll(1, 1), one.weights) for one in data]  # as many
    for other in (
        [drawn(9)],
        changed,
        moved,
        [Batch(one.inputs, one.targets) for one in data],
        fewer,
    ):
        with pytest.raises(PluginError, match="was made for other data than this run reads"):
            session_of(other, **settings)
    session_of(data[::-1], **settings)
    relabelled = [Batch(one.inputs, one.targets.clamp_max(3), one.weights) for one in data]
    session_of(relabelled, **settings).step(relabelled[0])


def test_a_sample_that_was_not_read_through_is_told(
    made: tuple[list[Batch], dict[str, Any]],
) -> None:
    data, settings = made
    session = session_of(data, **settings)
    with pytest.raises(PluginError, match="no answers to 4 of 4 samples"):
        session.step(drawn(9))


@pytest.mark.parametrize("part", ["keys", "values", "classes", "manifest.json"])
def test_a_damaged_cache_is_refused(made: tuple[list[Batch], dict[str, Any]], part: str) -> None:
    data, settings = made
    path = next(each for each in Path(settings["cache"]).iterdir() if each.name.endswith(part))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(PluginError, match="remove the folder, and it is made anew"):
        session_of(data, **settings)


def test_a_cut_off_making_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the manifest written first."""
    data = [drawn(seed) for seed in range(3)]
    settings = {"cache": str(tmp_path / "cache"), "cache_top_k": 4}
    from forge_plugins.losses import teacher_cache

    calls: list[int] = []
    keys_of = teacher_cache.keys_of

    def dies(batch: Batch) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return keys_of(batch)

    monkeypatch.setattr(teacher_cache, "keys_of", dies)
    with pytest.raises(KeyboardInterrupt):
        session_of(data, **settings)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(teacher_cache, "keys_of", keys_of)
    session_of(data, **settings)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine.txt").write_text("mine")
    with pytest.raises(PluginError, match="holds something else"):
        session_of(data, cache=str(tmp_path / "other"), cache_top_k=4)


# -- whole runs ------------------------------------------------------------------------------------

TINY = [
    "run.max_steps=8", "run.validate_every=8", "callbacks=null", "exporters=null", "validators=null",
    "data={use: text, with: {sequence_length: 16, batch_size: 4, validation_split: 0.001}}",
    "model={use: llama_decoder, with: {width: 16, heads: 2, layers: 1}}",
    "optimizer={use: adamw, with: {lr: 0.01}}",
    "quantizer={use: bitnet, with: {warmup_start: 2, warmup_steps: 3, warmup_order: last_to_first}}",
]  # fmt: skip


@pytest.mark.parametrize("cached", [False, True])
def test_a_healing_that_is_resumed_is_the_one_that_was_not_interrupted(
    tmp_path: Path, cached: bool
) -> None:
    """To the bit, in the blend, with a text that is cut anew in each epoch."""
    cache = f", cache: {tmp_path / 'cache'}, cache_top_k: 9" if cached else ""
    loss = f"loss={{use: distillation, with: {{loss: {{use: language_model}}{cache}}}}}"
    settings = [*TINY, loss, "wrappers=[{use: freeze, with: {parameters: ['*embedding.*']}}]"]
    whole = run(load_pipeline("smoke", settings), output_dir=tmp_path / "a", quiet=True)
    stop = StopAfter(4)
    run(load_pipeline("smoke", settings), output_dir=tmp_path / "b", quiet=True, plugins=[stop],
        cancel=stop.event)  # fmt: skip
    again = resume(tmp_path / "b", quiet=True, plugins=[StopAfter(100)])
    assert whole.model is not None
    assert again.model is not None
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert again.steps == 8


def test_a_cache_goes_on_without_the_teachers_folder_and_not_with_another_teacher(
    tmp_path: Path,
) -> None:
    """Planted: the path as it was written tells the teacher: a resumed run has another."""
    plain = [*TINY, "quantizer=null", "run.max_steps=1", "loss={use: language_model}"]
    for name, seed in (("one", 1), ("two", 2)):
        chosen = [*plain, f"run.seed={seed}"]
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / name, quiet=True)

    def healed(teacher: Path, place: str) -> Any:
        options = f"teacher: {teacher}, cache: {tmp_path / 'cache'}, cache_top_k: 4"
        loss = f"loss={{use: distillation, with: {{loss: {{use: language_model}}, {options}}}}}"
        return run(load_pipeline("smoke", [*TINY, loss]), output_dir=tmp_path / place, quiet=True)

    first = healed(tmp_path / "one", "a")
    with pytest.raises(PluginError, match="other weights of the teacher"):
        healed(tmp_path / "two", "b")
    (tmp_path / "one").rename(tmp_path / "moved")
    for teacher, place in (("moved", "c"), ("one", "d")):
        again = healed(tmp_path / teacher, place)
        pairs = zip(first.model.parameters(), again.model.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
    with pytest.raises(PluginError, match="another teacher \\(one, here nobody\\)"):
        healed(tmp_path / "nobody", "e")


def test_a_teacher_of_other_tokens_is_refused(tmp_path: Path) -> None:
    """Its run read another tokenizer's tokens of the same text."""
    plain = [*TINY, "quantizer=null", "run.max_steps=1", "loss={use: language_model}"]
    run(load_pipeline("smoke", plain), output_dir=tmp_path / "bytes", quiet=True)
    other = ["data.with.tokenizer=characters"]
    run(load_pipeline("smoke", [*plain, *other]), output_dir=tmp_path / "letters", quiet=True)
    for teacher, own in (("bytes", other), ("letters", [])):
        loss = f"loss={{use: distillation, with: {{loss: {{use: language_model}}, teacher: {tmp_path / teacher}}}}}"
        with pytest.raises(PluginError, match="another tokenizer|vocabular"):
            run(load_pipeline("smoke", [*TINY, loss, *own]), output_dir=tmp_path / "no", quiet=True)
