"""Live models and batches in the forms that people have them, and what cannot be trained."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_parts import make_session
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from forge_kernel import resume, run
from forge_kernel.config.use import UseLoss
from forge_kernel.contract.data import DataSpec
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, ForgeError, RunError
from forge_kernel.training.loaders.data_loaders import LoaderData, batch_from
from forge_kernel.training.loaders.in_memory import InMemoryData, InMemoryModel
from forge_kernel.training.session import Session
from forge_plugins.losses.cross_entropy import CrossEntropy, CrossEntropyConfig
from forge_plugins.optimizers.sgd import Sgd, SgdConfig

GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(12, 4, generator=GENERATOR)
Y = torch.randint(3, (12,), generator=GENERATOR)
B = [(X[i : i + 4], Y[i : i + 4]) for i in range(0, 12, 4)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def trained(
    folder: Path, model: Any, data: Any, *, steps: int = 3, exports: str = "", **options: Any
) -> Any:
    file = folder / "p.yaml"
    file.write_text(
        f"forge: 1\nrun: {{name: t, seed: 0, device: cpu, max_steps: {steps}}}\n"
        f"optimizer: {{use: sgd, with: {{lr: 0.1}}}}\nloss: {{use: cross_entropy}}\n{exports}\n"
    )
    return run(file, model=model, data=data, output_dir=folder / "out", quiet=True, **options)


@pytest.fixture
def expected(tmp_path: Path) -> Tensor:
    (tmp_path / "plain").mkdir()
    return weights(trained(tmp_path / "plain", network(), B).model)


Pair = namedtuple("Pair", "inputs targets")
FORMS: dict[str, Any] = {
    "a list": lambda x, y: [x, y],
    "a named tuple": lambda x, y: Pair(x, y),
    "input, target": lambda x, y: {"input": x, "target": y},
    "inputs, targets": lambda x, y: {"inputs": x, "targets": y},
    "inputs, labels": lambda x, y: {"inputs": x, "labels": y},
    "x, y": lambda x, y: {"x": x, "y": y},
    "features, label": lambda x, y: {"features": x, "label": y},
    "weights": lambda x, y: {"inputs": x, "labels": y, "weights": torch.ones(len(x))},
    "arguments, labels": lambda x, y: {"input_values": x, "labels": y},
    "mapping of arguments": lambda x, y: ({"input_values": x}, y),
    "a Batch": lambda x, y: Batch(x, y),
}


class Named(nn.Module):
    """A model whose argument has a name, as tokenizers' outputs have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, input_values: Tensor) -> Tensor:
        return self.inner(input_values)


@pytest.mark.parametrize("form", FORMS)
def test_batches_are_read_in_the_forms_that_loaders_give(
    tmp_path: Path, form: str, expected: Tensor
) -> None:
    data = [FORMS[form](x, y) for x, y in B]
    assert torch.equal(weights(trained(tmp_path, Named(), data).model), expected)


class Output(nn.Module):
    """Gives its logits in some form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.inner, self.form = network(), form

    def forward(self, inputs: Tensor) -> Any:
        logits = self.inner(inputs)
        if self.form == "object":
            return HasLogits(logits)
        return {
            "tuple": (logits, None), "list": [logits, inputs], "mapping": {"loss": None, "logits": logits},
            "named tuple": Given(None, logits), "ordered": OrderedDict(logits=logits),
        }[self.form]  # fmt: skip


@dataclass
class HasLogits:
    logits: Tensor


Given = namedtuple("Given", "loss logits")


@pytest.mark.parametrize("form", ["object", "tuple", "list", "mapping", "named tuple", "ordered"])
def test_logits_are_found_in_what_models_give(tmp_path: Path, form: str, expected: Tensor) -> None:
    result = trained(tmp_path, Output(form), (B, B), exports="validators: [{use: classification}]")
    assert torch.equal(weights(result.model), expected)
    assert result.final["validation_accuracy"] is not None


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, a: Tensor, b: Tensor, scale: float = 1.0) -> Tensor:
        return self.inner(a + b * scale)


@pytest.mark.parametrize("form", ["by name", "by place", "positional list"])
def test_a_model_of_several_inputs_gets_them(tmp_path: Path, form: str, expected: Tensor) -> None:
    zeros = torch.zeros(4, 4)
    chosen: Any = {
        "by name": lambda x: {"a": x, "b": zeros}, "by place": lambda x: (x, zeros),
        "positional list": lambda x: [x, zeros],
    }[form]  # fmt: skip
    data = [(chosen(x), y) for x, y in B]
    assert torch.equal(weights(trained(tmp_path, Two(), data).model), expected)


class Dictionary(nn.Module):
    """Takes a mapping as its one input."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["left"])


def test_a_model_that_takes_a_mapping_gets_it_whole(tmp_path: Path, expected: Tensor) -> None:
    data = [({"left": x}, y) for x, y in B]
    assert torch.equal(weights(trained(tmp_path, Dictionary(), data).model), expected)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (network, (X, Y), "data holds tensors"),
        (network, X, "data holds tensors"),
        (network, 7, "cannot be iterated"),
        (network, [{"targets": Y[:4]}], "has no inputs"),
        (network, [{"inputs": X[:4], "x": X[:4]}], "twice"),
        (network, [(X[:4], Y[:4], None, None)], "not 4 parts"),
        (network, [(X[:4], Y[:4], torch.ones(3))], "3 weights for 4 samples"),
        (network, [(X[:4], Y[:4], torch.tensor([1.0, -1, 1, 1]))], "weight below 0"),
        (Two, [({"a": X[:4], "c": X[:4]}, Y[:4])], r"takes \['a', 'b', 'scale'\]"),
        (Two, [((X[:4],) * 4, Y[:4])], "4 inputs"),
        (lambda: network().requires_grad_(False), B, "every parameter of the model is frozen"),
        (lambda: 3, B, "not a torch.nn.Module"),
    ],
)
def test_what_has_no_such_form_is_told_with_the_forms_that_there_are(
    tmp_path: Path, model: Any, data: Any, message: str
) -> None:
    with pytest.raises(ForgeError, match=message):
        trained(tmp_path, model(), data)


def expanded() -> nn.Module:
    model = network()
    model.weight = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    return model


def strided() -> nn.Module:
    model = network()
    model.weight = nn.Parameter(torch.randn(6).as_strided((3, 4), (1, 1)))
    return model


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.to(torch.complex64) @ self.w).abs()


class Sparse(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.table, self.head = kind(10, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.table(inputs.abs().long()).reshape(len(inputs), -1, 4).mean(1))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (expanded, "weight share memory between their own entries"),
        (strided, "weight share memory"),
        (lambda: nn.Sequential(*(expanded() for _ in range(3))), "1.weight, 2.weight share memory"),
        (lambda: nn.Sequential(*(expanded() for _ in range(4))), "2.weight and 1 more share memory"),
        (Complex, "w are complex"),
        (lambda: Sparse(nn.Embedding), "table give sparse gradients"),
        (lambda: Sparse(nn.EmbeddingBag), "table give sparse gradients"),
    ],
)  # fmt: skip
def test_parameters_that_no_step_could_update_are_refused_at_set_up(
    tmp_path: Path, model: Any, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        trained(tmp_path, model(), B)


def test_an_optimizer_that_asks_for_a_closure_is_refused() -> None:
    from kernel_parts import make_plugin

    from forge_kernel.contract.plugin import Kind

    def make_optimizer(self: Any, run: Any, parameters: Any) -> Any:
        return torch.optim.LBFGS([parameter for _, parameter in parameters])

    lbfgs = make_plugin("lbfgs", Kind.OPTIMIZER, make_optimizer=make_optimizer)
    with pytest.raises(RunError, match="LBFGS computes the loss several times"):
        make_session(network(), B, optimizer=lbfgs)


class Extra(nn.Module):
    """Keeps something beside its tensors."""

    def __init__(self, state: Any, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.state = inner or network(), state

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner(inputs)

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


STATES: list[Any] = [
    {"scale": 1.5, "deep": {"list": [1, "two", None]}},
    torch.arange(3),
    [torch.ones(2)],
    7,
]


@pytest.mark.parametrize("state", STATES, ids=["mapping", "tensor", "list", "number"])
def test_extra_state_is_kept_and_comes_back(tmp_path: Path, state: Any) -> None:
    model = nn.Sequential(Extra(copy.deepcopy(state)), Extra(None, nn.Identity()))
    result = trained(tmp_path, model, B, exports="exporters: [{use: state_dict}]")
    assert result.failed_exports == {}
    fresh = nn.Sequential(Extra(torch.zeros(3)), Extra("other", nn.Identity()))
    again = resume(tmp_path / "out", ["run.max_steps=4"], model=fresh, data=B, quiet=True)
    assert str(again.model[0].state) == str(state)
    assert again.model[1].state is None


def test_extra_state_that_no_checkpoint_could_keep_is_told_before_the_first_step(
    tmp_path: Path,
) -> None:
    with pytest.raises(RunError, match=r"extra state of \.: object"):
        trained(tmp_path, Extra(object()), B)


@pytest.mark.parametrize("wrap", ["compiled", "compiled in place", "replicated", "both"])
def test_a_wrapped_model_has_its_own_names_in_every_file(tmp_path: Path, wrap: str) -> None:
    calls: list[int] = []

    def backend(graph: Any, examples: Any) -> Any:
        def compiled(*arguments: Any) -> Any:
            calls.append(1)
            return graph.forward(*arguments)

        return compiled

    plain = network()
    wrapped: Any = plain
    if wrap in ("replicated", "both"):
        wrapped = nn.DataParallel(plain)
    if wrap in ("compiled", "both"):
        wrapped = torch.compile(wrapped, backend=backend)
    if wrap == "compiled in place":
        plain.compile(backend=backend)
    result = trained(tmp_path, wrapped, (B, B), exports="exporters: [{use: state_dict}]")
    file = next((tmp_path / "out/exports").rglob("*.safetensors"))
    assert sorted(load_file(file)) == ["bias", "weight"]
    assert result.model is plain
    again = resume(tmp_path / "out", ["run.max_steps=5"], model=network(), data=(B, B), quiet=True)
    assert again.steps == 5
    if wrap == "compiled":
        assert calls, "it is still compiled"


def by_hand() -> Session:
    return Session.of(
        [
            InMemoryModel(network()),
            InMemoryData(B),
            Sgd(SgdConfig(lr=0.1)),
            CrossEntropy(CrossEntropyConfig()),
        ]
    )


@pytest.mark.parametrize(
    "misuse",
    [
        lambda session: session.step(Batch(*B[0])), lambda session: session.accumulate(Batch(*B[0])),
        lambda session: session.validate(), lambda session: session.start(),
    ],
)  # fmt: skip
def test_a_session_that_is_not_set_up_says_so(misuse: Any) -> None:
    with pytest.raises(RunError, match="not set up"):
        misuse(by_hand())


def test_a_session_takes_batches_in_every_form_and_says_what_is_none() -> None:
    with by_hand() as session:
        for value in (B[0], list(B[0]), {"x": B[0][0], "y": B[0][1]}, Batch(*B[0])):
            session.step(value)  # type: ignore[arg-type]
        with pytest.raises(RunError, match="without a batch"):
            session.step()
        with pytest.raises(RunError, match="without a micro-batch"):
            session.update()


def test_averaged_weights_are_those_of_the_model_that_is_given_back(tmp_path: Path) -> None:
    """The model in hand is the one whose metrics are told and which is exported."""
    for name, more in {
        "average": "callbacks: [{use: weight_average, with: {decay: 0.9}}]\nexporters: [{use: state_dict}]",
        "plain": "exporters: [{use: state_dict}]",
    }.items():
        (tmp_path / name).mkdir()
        model = network()
        result = trained(tmp_path / name, model, (B, B), steps=12, exports=more)
        assert result.model is model
        model.eval()
        loss = sum(nn.functional.cross_entropy(model(x), y, reduction="sum") for x, y in B) / 12
        assert float(loss.detach()) == pytest.approx(result.final["validation_loss"], abs=1e-6)  # type: ignore[union-attr]
        exported = load_file(next((tmp_path / name / "out/exports").rglob("*.safetensors")))
        assert torch.equal(exported["weight"], model.weight.detach())
        if name == "plain":
            assert result.training_model is None
        else:
            assert result.training_model is not None
            assert not torch.equal(result.training_model.weight, model.weight)


def test_batch_from_names_what_it_is_given() -> None:
    batch = batch_from({"input_ids": X, "attention_mask": Y, "labels": Y})
    assert sorted(batch.inputs) == ["attention_mask", "input_ids"]
    assert batch.targets is Y
    loader = DataLoader(TensorDataset(X, Y), 4)
    assert batch_from(next(iter(loader))).targets.tolist() == Y[:4].tolist()


def test_a_pair_of_loaders_is_training_and_validation_and_a_run_says_what_was_handed_in(
    tmp_path: Path,
) -> None:
    loader = DataLoader(TensorDataset(X, Y), 4)
    result = trained(tmp_path, network(), (loader, loader))
    assert result.final["validation_loss"] is not None
    assert "x-live" in (tmp_path / "out/config.yaml").read_text()
    assert json.loads((tmp_path / "out/result.json").read_text())["outcome"] == "completed"
    with pytest.raises(ConfigError, match="the key 'data' is missing"):
        resume(tmp_path / "out")
    spec = LoaderData(loader, loader, DataSpec(classes=3))
    session = make_session(network(), spec, uses={"loss": UseLoss("cross_entropy")}, own_loss=True)
    assert session.run.data is spec
