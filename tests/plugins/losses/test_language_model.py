"""Cross-entropy in pieces: torch's numbers, and never more logits than a piece."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_parts import make_session
from torch import Tensor, nn
from torch.nn import functional

from forge_kernel.config.use import UseLoss, UseValidator
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.tensor_data import TensorData
from forge_kernel.contract.values import Batch
from forge_kernel.errors import PluginError
from forge_plugins.mathematics.losses.chunked_cross_entropy import chunked_cross_entropy
from forge_plugins.mathematics.losses.deferred_logits import (
    DeferredLogits,
    changes_after_head,
    head_name,
    without_head,
)
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.scheme import Scheme


def close(one: torch.Tensor | None, two: torch.Tensor | None) -> None:
    assert one is not None
    torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-4)


@given(
    rows=st.integers(1, 40), piece=st.integers(1, 50), smoothing=st.sampled_from([0.0, 0.2]),
    ignored=st.sampled_from([3, -100]), weighted=st.booleans(), factor=st.sampled_from([1.0, 7.0]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_value_and_gradients_are_torchs(
    rows: int, piece: int, smoothing: float, ignored: int, weighted: bool, factor: float
) -> None:
    """Planted faults: a piece's mean for its sum; backward that forgets the factor before it."""
    torch.manual_seed(rows * 100 + piece)
    head = nn.Linear(5, 9)
    hidden = torch.randn(rows, 5, requires_grad=True)
    targets = torch.randint(9, (rows,))
    weights = torch.rand(rows) if weighted else None
    each = functional.cross_entropy(
        head(hidden), targets, reduction="none", label_smoothing=smoothing,
        ignore_index=ignored,
    )  # fmt: skip
    own = torch.ones(rows) if weights is None else weights
    own = own * (targets != ignored)
    expected = (each * own).sum() / own.sum().clamp_min(1e-30)
    (expected * factor).backward()
    wanted = [hidden.grad, head.weight.grad, head.bias.grad]
    hidden.grad = head.weight.grad = head.bias.grad = None
    found = chunked_cross_entropy(
        hidden, targets, head, piece=piece, label_smoothing=smoothing, ignored=ignored,
        weights=own,
    )  # fmt: skip
    (found * factor).backward()
    close(found.detach(), expected.detach())
    for one, two in zip([hidden.grad, head.weight.grad, head.bias.grad], wanted, strict=True):
        close(one, two)


def test_nothing_to_average_is_zero_without_a_gradient() -> None:
    head, hidden = nn.Linear(2, 3), torch.randn(4, 2, requires_grad=True)
    targets, nothing = torch.full((4,), 1), torch.zeros(4)
    loss = chunked_cross_entropy(hidden, targets, head, piece=2, ignored=1, weights=nothing)
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not head.weight.grad.any()  # type: ignore[union-attr]


def test_a_ternary_head_and_a_frozen_one_get_what_is_theirs() -> None:
    torch.manual_seed(0)
    head: Any = BitLinear(16, 8, scheme=Scheme(weight_bits=1.58, activation_bits=8))
    hidden, targets = torch.randn(12, 16, requires_grad=True), torch.randint(8, (12,))
    functional.cross_entropy(head(hidden), targets).backward()
    wanted = [hidden.grad, head.weight.grad.clone()]
    hidden.grad = head.weight.grad = None
    chunked_cross_entropy(hidden, targets, head, piece=5).backward()
    close(hidden.grad, wanted[0])
    close(head.weight.grad, wanted[1])
    head.weight.grad = None
    head.requires_grad_(False)
    chunked_cross_entropy(hidden, targets, head, piece=5).backward()
    assert head.weight.grad is None


def test_under_autocast_the_head_works_in_bf16_and_the_loss_in_fp32() -> None:
    torch.manual_seed(0)
    head, hidden = nn.Linear(16, 64), torch.randn(32, 16, requires_grad=True)
    targets = torch.randint(64, (32,))
    with torch.autocast("cpu", torch.bfloat16):
        plain = functional.cross_entropy(head(hidden).float(), targets)
        found = chunked_cross_entropy(hidden, targets, head, piece=7)
    plain.backward()
    wanted, hidden.grad = hidden.grad, None
    weight, head.weight.grad = head.weight.grad, None
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden.grad, wanted, rtol=0.02, atol=1e-4)
    torch.testing.assert_close(head.weight.grad, weight, rtol=0.02, atol=2e-4)


class Model(nn.Module):
    """Answers at the positions that it is asked for, or, `everywhere`, at all of them."""

    def __init__(self, everywhere: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.trunk = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.rows: list[int] = []
        self.head.register_forward_pre_hook(lambda _, given: self.rows.append(len(given[0])))
        if everywhere:
            self.forward = self._everywhere  # type: ignore[method-assign]

    def _everywhere(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.trunk(self.embedding(tokens))))  # type: ignore[no-any-return]

    def forward(self, tokens: torch.Tensor, positions: Any = None) -> torch.Tensor:
        hidden = torch.tanh(self.trunk(self.embedding(tokens)))
        return self.head(hidden if positions is None else hidden[:, positions])  # type: ignore[no-any-return]


def data(positions: Any = None, count: int = 4) -> TensorData:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (10, 4), generator=generator)
    targets = torch.randint(11, (10, count), generator=generator)
    return TensorData(
        tokens, targets, batch_size=4, seed=1, validation=(tokens, targets), positions=positions,
        spec=DataSpec(vocabulary=11, sequence=4, classes=11),
    )  # fmt: skip


def trained(model: nn.Module, loss: str, source: TensorData, **config: Any) -> tuple[Any, Any]:
    names = ("classification", "language_model")
    session = make_session(
        model, source, own_loss=True, lr=0.5, log_every=1, accumulate=2,
        uses={
            "loss": UseLoss(loss, config),
            "validators": tuple(UseValidator(name) for name in names),
        },
    )  # fmt: skip
    batches = list(source.batches(0, 0))
    losses = [float(session.step(batches[0], batches[2])), float(session.step(batches[1]))]
    return [*losses, session.log().metrics["accuracy"]], session.validate()


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("positions", [None, slice(-1, None), slice(1, 3)], ids=str)
def test_a_run_is_the_one_of_cross_entropy_and_never_has_more_logits_than_a_piece(
    everywhere: bool, positions: slice | None
) -> None:
    """Planted faults: the head in the model's own forward; validators that ask for all rows.

    Red when positions are taken of answers that the model gave at those positions alone.
    """
    source = data(positions, len(range(4)[positions or slice(None)]))
    plain, pieces = Model(everywhere), Model(everywhere)
    wanted = trained(plain, "cross_entropy", source)
    found = trained(pieces, "language_model", source, piece=3)
    assert found[0] == pytest.approx(wanted[0], rel=1e-5)
    assert found[1] == pytest.approx(wanted[1], rel=1e-5)
    for one, two in zip(plain.parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=1e-5)
    assert max(pieces.rows) <= 3
    assert max(plain.rows) > 3


def test_with_nothing_set_512_rows_are_there_at_a_time_and_no_target_is_smoothed() -> None:
    """Red when the settings' values are others than the schema says."""
    generator = torch.Generator().manual_seed(3)
    tokens, targets = torch.randint(11, (2, 150, 4), generator=generator)
    model = Model()
    with torch.no_grad():
        expected = functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    model.rows.clear()
    session = make_session(model, data(), own_loss=True, uses={"loss": UseLoss("language_model")})
    assert float(session.step(Batch(tokens, targets))) == pytest.approx(float(expected), rel=1e-5)
    assert set(model.rows) == {512, 600 - 512}


def test_smoothing_reaches_the_loss() -> None:
    plain, other = Model(), Model()
    trained(plain, "language_model", data())
    trained(other, "language_model", data(), label_smoothing=0.3)
    assert not torch.equal(plain.trunk.weight, other.trunk.weight)


def test_the_head_is_named_and_one_that_is_not_there_is_told() -> None:
    renamed = Model()
    renamed.lm_head, renamed.head = renamed.head, nn.Identity()
    forward = renamed.forward
    renamed.forward = lambda tokens: renamed.lm_head(forward(tokens))  # type: ignore[assignment]
    trained(renamed, "language_model", data(), head="lm_head")
    assert renamed.rows
    with pytest.raises(PluginError, match=r"no layer 'tail' \(loss.with.head\); it has embedding"):
        trained(Model(), "language_model", data(), head="tail")


def test_the_head_is_back_after_a_forward_pass_that_fails() -> None:
    model = Model()
    head = model.head
    with pytest.raises(IndexError), without_head(model, "head"):
        assert model.head is not head
        model(torch.tensor([[99]]))
    assert model.head is head
    assert copy.deepcopy(model).head is not head


def test_to_those_who_do_not_know_of_pieces_it_is_the_tensor_of_all_logits() -> None:
    head, hidden = nn.Linear(3, 5), torch.randn(2, 4, 3)
    deferred: Any = DeferredLogits(hidden, head, 3)
    whole = head(hidden)
    assert torch.equal(deferred.argmax(-1), whole.argmax(-1))
    assert deferred.shape == whole.shape
    assert torch.equal(functional.log_softmax(deferred, -1), functional.log_softmax(whole, -1))
    torch.testing.assert_close(torch.cat(list(deferred.pieces())), whole.flatten(0, 1))


class Scaled(nn.Module):
    """A model that says which layer is its head, and does something to what that gives."""

    def __init__(self, after: Any, *, bias: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.lm_head = nn.Linear(8, 11, bias=bias)
        self.after = after

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens).to(self.lm_head.weight.dtype)
        found: Tensor = self.after(self.lm_head(hidden))
        return found


@pytest.mark.parametrize(
    ("after", "bias", "changed"),
    [
        (lambda logits: logits, True, False),
        (lambda logits: logits * 0.0625, False, False),
        (lambda logits: logits * 0.0625, True, True),
        (lambda logits: 30.0 * torch.tanh(logits / 30.0), False, True),
        (lambda logits: logits[..., :5], False, True),
        (lambda logits: torch.log_softmax(logits, -1), False, True),
    ],
)
def test_what_follows_the_head_is_seen_whatever_the_size_of_the_logits(
    after: Any, bias: bool, changed: bool
) -> None:
    model = Scaled(after, bias=bias).train()
    tokens = torch.randint(11, (1, 4))
    assert head_name(model) == "lm_head"
    assert changes_after_head(model, model.lm_head, lambda: model(tokens)) is changed
    assert model.training
    assert not model.lm_head._forward_hooks
    if not changed:
        wanted = model(tokens)
        with without_head(model, "lm_head") as head:
            hidden = model(tokens)
        torch.testing.assert_close(head(hidden), wanted)
