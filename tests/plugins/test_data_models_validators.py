"""Modular arithmetic, the networks, cross-entropy, whole-set accuracy, the state-dict export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import loss_and_weight
from torch import nn

from forge_kernel import run
from forge_kernel.contract.values import Batch
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.training.session import Session
from forge_plugins.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from forge_plugins.mathematics.networks.mlp import Mlp
from forge_plugins.mathematics.networks.modular_arithmetic import (
    is_prime,
    operation_table,
    split_pairs,
)
from forge_plugins.mathematics.networks.transformer import Decoder
from forge_plugins.validators.classification import AccuracyMetric

PRIMES = [2, 3, 5, 7, 11, 13, 97]


@pytest.mark.parametrize("operation", ["add", "sub", "mul", "div"])
@pytest.mark.parametrize("modulus", [5, 7, 13])
def test_every_equation_of_the_table_is_true(operation: Any, modulus: int) -> None:
    tokens, answers = operation_table(operation, modulus)
    first = 1 if operation in ("mul", "div") else 0
    pairs = {(int(x), int(y)) for x, _, y, _ in tokens}
    assert pairs == {(x, y) for x in range(modulus) for y in range(first, modulus)}
    for (x, operator, y, equals), z in zip(tokens.tolist(), answers.tolist(), strict=True):
        assert (operator, equals) == (modulus, modulus + 1)
        expected = {"add": x + y, "sub": x - y, "mul": x * y, "div": 0}[operation]
        if operation == "div":
            assert (z * y) % modulus == x
        else:
            assert z == expected % modulus


def test_division_needs_a_prime() -> None:
    with pytest.raises(ValueError, match="not prime"):
        operation_table("div", 9)
    assert [n for n in range(14) if is_prime(n)] == [2, 3, 5, 7, 11, 13]


@given(count=st.integers(2, 300), share=st.floats(0.05, 0.95), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_a_split_is_disjoint_exhaustive_and_reproducible(
    count: int, share: float, seed: int
) -> None:
    left, right = split_pairs(count, share, seed)
    assert sorted([*left.tolist(), *right.tolist()]) == list(range(count))
    assert len(left) == round(count * share)
    again, _ = split_pairs(count, share, seed)
    assert torch.equal(left, again)


def test_an_epoch_holds_every_training_pair_once_and_the_next_has_another_order(
    tmp_path: Path,
) -> None:
    seen: list[list[tuple[int, ...]]] = [[], []]

    from kernel_parts import make_plugin

    from forge_kernel.api import Kind

    def on_batch(self: Any, run: Any, step: Any, batch: Batch) -> None:
        seen[run.progress.epoch] += [tuple(row) for row in batch.inputs.tolist()]

    plugin = make_plugin("watch", Kind.OBSERVERS, on_batch=on_batch)
    settings_ = [
        "run.max_steps=null", "run.max_epochs=2", "run.validate_every=null",
        "data={use: modular_arithmetic, with: {modulus: 23, operation: add, train_fraction: 0.8}}",
    ]  # fmt: skip
    run(load_pipeline("smoke", settings_), plugins=[plugin], output_dir=tmp_path / "r", quiet=True)
    assert len(set(seen[0])) == len(seen[0]) == round(23 * 23 * 0.8)
    assert set(seen[0]) == set(seen[1])
    assert seen[0] != seen[1]


class Reference(nn.Module):
    """The network of the paper with torch's own attention: the stream starts after the norm."""

    def __init__(self, width: int = 32, heads: int = 4, tokens: int = 11, length: int = 5) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.last = nn.LayerNorm(width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(len(tokens))).unsqueeze(1)
        mask = torch.triu(torch.full((len(x), len(x)), -float("inf")), diagonal=1)
        x = self.first(x)
        x = x + self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        x = x + self.feed(self.second(x))
        return self.head(self.last(x))


def test_the_papers_network_is_reproduced_to_rounding() -> None:
    torch.manual_seed(0)
    theirs = Reference()
    ours = Decoder(
        vocabulary=11,
        classes=11,
        length=5,
        width=32,
        layers=1,
        heads=4,
        residual="normed",
        xavier=True,
    )
    block = ours.blocks[0]
    attention: Any = block.attention
    pairs = [
        (ours.token_embedding, theirs.tokens), (ours.position_embedding, theirs.places),
        (block.attention_norm, theirs.first), (block.feed_norm, theirs.second),
        (block.expand, theirs.feed[0]), (block.contract, theirs.feed[2]), (ours.norm, theirs.last),
        (ours.head, theirs.head), (attention.output, theirs.attention.out_proj),
    ]  # fmt: skip
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    parts = (attention.query, attention.key, attention.value)
    with torch.no_grad():
        for layer, weight, bias in zip(
            parts, theirs.attention.in_proj_weight.chunk(3), theirs.attention.in_proj_bias.chunk(3),
            strict=True,
        ):  # fmt: skip
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    tokens = torch.randint(11, (5, 8))
    assert torch.allclose(ours(tokens.T).transpose(0, 1), theirs(tokens), atol=2e-6)


@pytest.mark.parametrize("positions", [slice(-1, None), slice(1, 3), torch.tensor([0, 2])])
@pytest.mark.parametrize("residual", ["input", "normed"])
def test_chosen_positions_are_those_of_the_whole_answer(positions: Any, residual: Any) -> None:
    torch.manual_seed(0)
    model = Decoder(
        vocabulary=9, classes=9, length=4, width=16, layers=2, heads=2, residual=residual
    )
    tokens = torch.randint(9, (6, 4))
    whole = model(tokens)[:, positions]
    chosen = model(tokens, positions=positions)
    assert torch.allclose(whole, chosen, atol=1e-6)
    whole.sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    chosen.sum().backward()
    for a, b in zip(gradients, (p.grad for p in model.parameters()), strict=True):
        assert torch.allclose(a, b, atol=1e-5)  # type: ignore[arg-type]


def test_attention_never_looks_ahead() -> None:
    torch.manual_seed(0)
    model = Decoder(vocabulary=9, classes=9, length=4, width=16, heads=2)
    tokens = torch.randint(9, (1, 4))
    changed = tokens.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 9
    assert torch.allclose(model(tokens)[:, :3], model(changed)[:, :3], atol=1e-6)


def test_a_perceptron_reads_features_or_tokens() -> None:
    assert Mlp(features=5, hidden=(7, 6), outputs=3)(torch.randn(2, 5)).shape == (2, 3)
    tokens = Mlp(features=0, hidden=(7,), outputs=3, vocabulary=9, sequence=4, dropout=0.5)
    assert tokens(torch.randint(9, (2, 4))).shape == (2, 3)


def loss_of(config: CrossEntropyConfig, batch: Batch, outputs: torch.Tensor) -> Any:
    return loss_and_weight(CrossEntropy(config), batch, outputs)


def test_cross_entropy_equals_torchs_also_smoothed_weighted_and_by_position() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(5, 4), torch.randint(4, (5,))
    theirs = nn.functional.cross_entropy
    loss, weight = loss_of(CrossEntropyConfig(), Batch(None, targets), outputs)
    assert torch.equal(loss, theirs(outputs, targets))
    assert weight == 5
    smooth, _ = loss_of(CrossEntropyConfig(label_smoothing=0.2), Batch(None, targets), outputs)
    assert torch.equal(smooth, theirs(outputs, targets, label_smoothing=0.2))
    weights = torch.rand(5)
    loss, weight = loss_of(CrossEntropyConfig(), Batch(None, targets, weights), outputs)
    each = theirs(outputs, targets, reduction="none")
    assert torch.allclose(loss, (each * weights).sum() / weights.sum())
    assert torch.allclose(torch.as_tensor(weight), weights.sum())
    zero, weight = loss_of(CrossEntropyConfig(), Batch(None, targets, torch.zeros(5)), outputs)
    assert (float(zero), float(weight)) == (0.0, 0.0)
    sequence = torch.randn(5, 3, 4)
    at_last = Batch(None, targets.unsqueeze(1), None, slice(-1, None))
    loss, _ = loss_of(CrossEntropyConfig(), at_last, sequence)
    assert torch.equal(loss, theirs(sequence[:, -1], targets))


def test_accuracy_is_over_the_whole_set_of_uneven_batches() -> None:
    metric = AccuracyMetric((2,))
    metric.reset()
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(11, 4, generator=generator)
    targets = torch.randint(4, (11,), generator=generator)
    for begin, end in ((0, 8), (8, 10), (10, 11)):
        metric.update(Batch(None, targets[begin:end]), outputs[begin:end], torch.zeros(()), 1.0)
    found = metric.compute(lambda tensor: tensor)
    assert found["accuracy"] == pytest.approx((outputs.argmax(1) == targets).float().mean().item())
    likely = outputs.topk(2).indices
    assert found["top_2_accuracy"] == pytest.approx(
        (likely == targets.unsqueeze(1)).any(1).float().mean().item()
    )
    two_ranks = metric.compute(lambda tensor: tensor + torch.tensor([0, 0, 11]))
    assert two_ranks["accuracy"] == pytest.approx(found["accuracy"] / 2)
    metric.reset()
    assert metric.compute(lambda tensor: tensor) == {}


@pytest.mark.parametrize("dtype", ["keep", "bfloat16"])
def test_the_state_dict_export_loads_and_says_what_it_holds(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import load_file

    settings_ = ["run.max_steps=2", f"exporters=[{{use: state_dict, with: {{dtype: {dtype}}}}}]"]
    result = run(load_pipeline("smoke", settings_), output_dir=tmp_path / "r", quiet=True)
    folder = tmp_path / "r" / result.exports["state_dict"]
    assert result.model is not None
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in result.model.state_dict().items():
        wanted = tensor if dtype == "keep" else tensor.to(torch.bfloat16)
        assert torch.equal(tensors[name], wanted.cpu())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["bytes"] == manifest["bytes"]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
@pytest.mark.parametrize("decay", ["all", "matrices"])
def test_decay_spares_vectors_when_asked(name: str, decay: str) -> None:
    from forge_kernel.config.schema import bind_config
    from forge_kernel.contract.plugin import Kind
    from forge_kernel.planning.catalog import Catalog

    plugin = Catalog.installed().load(Kind.OPTIMIZER, name)
    config = bind_config(plugin.info.config, {"decay": decay, "weight_decay": 0.3, "lr": 0.1})
    model = nn.Linear(3, 2)
    optimizer = plugin(config).make_optimizer(None, list(model.named_parameters()))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays[id(model.weight)] == 0.3
    assert decays[id(model.bias)] == (0.3 if decay == "all" else 0.0)


@pytest.mark.spec("H6", "H7")
def test_metrics_by_class_are_those_of_the_definitions_over_uneven_batches() -> None:
    from forge_plugins.validators.classification import ClassMetric

    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(29, 6, generator=generator)
    targets = torch.randint(4, (29,), generator=generator)  # classes 4 and 5 have no target
    logits[:, 5] = -50.0  # class 5 is never answered either
    metric = ClassMetric(["f1", "precision", "recall", "f1_micro"])
    for chosen in (slice(0, 3), slice(3, 20), slice(20, 29)):
        metric.update(Batch(None, targets[chosen]), logits[chosen], torch.zeros(()), 1)
    found = metric.compute(lambda value: value)
    answers = logits.argmax(-1).tolist()
    pairs = list(zip(answers, targets.tolist(), strict=True))
    each = []
    for label in sorted(set(answers) | set(targets.tolist())):
        hit = sum(a == t == label for a, t in pairs)
        said, is_ = sum(a == label for a, _ in pairs), sum(t == label for _, t in pairs)
        precision, recall = hit / said if said else 0.0, hit / is_ if is_ else 0.0
        f1 = 2 * precision * recall / (precision + recall) if hit else 0.0
        each.append((f1, precision, recall))
    means = [sum(column) / len(each) for column in zip(*each, strict=True)]
    assert 5 not in {a for a, _ in pairs}
    assert [found[name] for name in ("f1", "precision", "recall")] == pytest.approx(means)
    assert found["f1_micro"] == pytest.approx(sum(a == t for a, t in pairs) / 29)
    metric.reset()
    assert metric.compute(lambda value: value) == {}


@pytest.mark.spec("H7")
def test_regression_metrics_are_exact_over_uneven_batches() -> None:
    from forge_plugins.validators.regression import RegressionMetric

    generator = torch.Generator().manual_seed(2)
    outputs = torch.randn(17, 2, generator=generator)
    targets = torch.randn(17, 2, generator=generator) + 3
    metric = RegressionMetric()
    for chosen in (slice(0, 1), slice(1, 12), slice(12, 17)):
        metric.update(Batch(None, targets[chosen]), outputs[chosen], torch.zeros(()), 1)
    found = metric.compute(lambda value: value)
    difference = (outputs - targets).double()
    spread = (targets - targets.mean()).double().square().sum()
    assert found["mse"] == pytest.approx(float(difference.square().mean()))
    assert found["mae"] == pytest.approx(float(difference.abs().mean()))
    assert found["r2"] == pytest.approx(float(1 - difference.square().sum() / spread))
    metric.reset()
    metric.update(Batch(None, torch.ones(3)), torch.zeros(3), torch.zeros(()), 1)
    assert "r2" not in metric.compute(lambda value: value)


class PublishedNetwork(nn.Module):
    """What the Grokfast paper's code makes before it draws anything else: the order is the point."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(99, 128), nn.Embedding(5, 128)
        self.blocks = nn.ModuleList(
            nn.ModuleList([nn.MultiheadAttention(128, 4), nn.Linear(128, 512), nn.Linear(512, 128)])
            for _ in range(2)
        )
        self.head = nn.Linear(128, 99, bias=False)


def test_the_papers_experiment_has_its_weights_split_and_shuffles() -> None:
    """Torch's one stream gives all of them, in this order; a second look at an epoch is the same."""
    torch.manual_seed(5)
    theirs = PublishedNetwork()
    left, right = torch.cartesian_prod(torch.arange(97), torch.arange(1, 97)).T
    equation = torch.stack(
        [left, torch.full_like(left, 98), right, torch.full_like(left, 97), left * right % 97]
    )
    chosen, validation = torch.randperm(9312).split(4656)
    rows, epochs = equation[:, chosen], []
    for _ in range(3):
        rows = rows[:, torch.randperm(4656)]
        epochs.append(rows)

    pipeline = load_pipeline("grokfast_paper", ["run.seed=5", "run.device=cpu", "observers=[]"])
    with Session(plan(pipeline, Catalog.installed())) as session:
        ours: Any = session.run.model
        for mine, block in zip(ours.blocks, theirs.blocks, strict=True):
            attention, expand, contract = block  # type: ignore[misc]
            parts = (mine.attention.query, mine.attention.key, mine.attention.value)
            assert torch.equal(torch.cat([one.weight for one in parts]), attention.in_proj_weight)
            assert all(not one.bias.any() for one in (*parts, mine.attention.output))
            assert torch.equal(mine.attention.output.weight, attention.out_proj.weight)
            assert torch.equal(mine.expand.bias, expand.bias)
            assert torch.equal(mine.contract.weight, contract.weight)
        assert torch.equal(ours.token_embedding.weight, theirs.tokens.weight)
        assert torch.equal(ours.position_embedding.weight, theirs.places.weight)
        assert torch.equal(ours.head.weight, theirs.head.weight)
        for epoch in (0, 2, 1, 2):
            batches = list(session.run.data.batches(epoch, 0))
            assert [len(batch.inputs) for batch in batches] == [512] * 9 + [48]
            assert torch.equal(torch.cat([b.inputs for b in batches]).T, epochs[epoch][:4])
            assert torch.equal(torch.cat([b.targets for b in batches])[:, 0], epochs[epoch][4])
        asked = torch.cat([batch.inputs for batch in session.run.data.validation()])
        assert torch.equal(asked.T, equation[:4, validation])
