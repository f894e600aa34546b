"""Adapters of low rank: the base stays to the byte, and PEFT reads what is written."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from kernel_parts import StopAfter, make_session
from live_exports import batches, live_run, manifest
from model_folders import edit_config, library, make_folder, settings
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from forge_kernel import RunResult, load_pipeline, load_run, resume, run
from forge_kernel.config.use import Use
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, PlanError, PluginError
from forge_kernel.planning.plan import plan
from forge_kernel.training.session import Session
from forge_plugins.interchange.adapters.peft_folder import CONFIG, WEIGHTS
from forge_plugins.mathematics.networks.low_rank_adapter import adapters

TOKENS = torch.randint(260, (2, 12), generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """With running means, and a layer that is called by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.inner = nn.ModuleDict({"up": nn.Linear(8, 16), "down": nn.Linear(16, 8)})
        self.last = nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = self.norm(self.first(inputs))
        stream = stream + self.inner["down"](functional.relu(self.inner["up"](input=stream)))
        result: Tensor = self.last(stream)
        return result


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return Batch(torch.randn(6, 4, generator=generator), torch.arange(6) % 3)


def session_of(model: nn.Module | None = None, quantizer: bool = False, **lora: Any) -> Session:
    uses: dict[str, Any] = {"wrappers": (Use("lora", lora),)}
    if quantizer:
        uses["quantizer"] = Use("bitnet")
    return make_session(model or Net(), [batch()], uses=uses)


# -- the arithmetic --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [False, True])
def test_the_base_stays_to_the_byte_and_adapters_are_trained(quantizer: bool) -> None:
    """Planted: running means that go on; a base that is not frozen."""
    before = {name: value.clone() for name, value in Net().state_dict().items()}
    session = session_of(quantizer=quantizer, rank=2, targets=("inner.*", "last"))
    model = session.run.model
    assert set(adapters(model)) == {"inner.up", "inner.down", "last"}
    drawn = {name: part.A.detach().clone() for name, part in adapters(model).items()}
    assert all(not part.B.any() for part in adapters(model).values())
    for _ in range(3):
        session.step(batch())
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    for name, part in adapters(model).items():
        assert part.B.any()
        assert not torch.equal(part.A, drawn[name])
    assert session.run.parameters["first.weight"].grad is None


def test_what_is_added_is_alpha_by_rank_times_the_product() -> None:
    model = session_of(rank=2, alpha=6.0, dropout=0.5, targets=("last",)).run.model.eval()
    part = adapters(model)["last"]
    with torch.no_grad():
        part.B.normal_(generator=torch.Generator().manual_seed(2))
        inputs = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
        plain = functional.linear(inputs, model.last.weight, model.last.bias)
        torch.testing.assert_close(model.last(inputs), plain + 3.0 * inputs @ part.A.T @ part.B.T)
        part.train()
        assert not torch.equal(model.last(inputs), model.last(inputs))  # drawn anew
        half = model.last.to(torch.bfloat16)
        assert half(inputs.bfloat16()).dtype is torch.bfloat16


def test_targets_are_all_linear_layers_but_what_cannot_have_one() -> None:
    model = nn.Sequential(
        nn.Linear(4, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)
    )
    # nn.MultiheadAttention reads the weight of its last layer past it
    assert set(adapters(session_of(model).run.model)) == {"0", "1.linear1", "1.linear2", "2"}


def test_a_module_is_trained_in_full_by_name() -> None:
    session = session_of(also=("la*",))
    model = session.run.model
    assert set(adapters(model)) == {"first", "inner.up", "inner.down"}
    before = model.last.weight.detach().clone()
    session.step(batch())
    assert not torch.equal(model.last.weight, before)
    assert "lora.A" in str(list(session.run.parameters))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (
            {"targets": ("nor.*", "inner.*", "no", "norm", "inner")},
            "no linear layer is named by 'nor.*' (no layer has such a name), 'no' (no layer has "
            "such a name), 'norm' (norm is of type BatchNorm1d), 'inner' (inner is of type "
            "ModuleDict); linear layers are such as first, inner.up, inner.down, last "
            "(wrappers.lora.targets)",
        ),
        (
            {"also": ("last", "x", "y*")},
            "no module with parameters is named by 'x', 'y*' (wrappers.lora.also)",
        ),
        ({"also": ("last",), "targets": ("*",)}, "last is trained in full (also), and needs no"),
    ],
)
def test_each_name_that_cannot_be_is_named(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(PluginError, match=re.escape(message)):
        session_of(**lora)


def test_a_network_without_linear_layers_is_refused() -> None:
    with pytest.raises(PluginError, match="has no linear layer to set an adapter beside"):
        session_of(nn.Sequential(nn.Conv1d(1, 3, 4), nn.Flatten()))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ("exporters=[{use: gguf}]", "wrappers.lora cannot run beside exporters.gguf"),
        ("wrappers=[{use: lora}, {use: lora}]", "wrappers.lora cannot run beside wrappers.lora"),
        ("wrappers=[{use: lora, with: {targets: []}}]", "targets"),
        ("wrappers=[{use: lora, with: {rank: 0}}]", "rank"),
    ],
)
def test_what_cannot_work_is_refused_in_the_plan(parts: str, message: str) -> None:
    with pytest.raises((PlanError, ConfigError), match=message):
        plan(load_pipeline("smoke", ["wrappers=[{use: lora}]", parts]))


def test_a_run_resumes_to_the_bit(tmp_path: Path) -> None:
    """With dropout, several micro-batches and an average of the weights."""
    chosen = [
        "run={max_steps: 7, accumulate: 2, save_every: 3, seed: 4}", "quantizer={use: bitnet}",
        "callbacks=[{use: weight_average}]", "exporters=null",
        "wrappers=[{use: lora, with: {rank: 2, dropout: 0.3}}]",
    ]  # fmt: skip
    whole = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "a", quiet=True)
    stop = StopAfter(4)
    run(load_pipeline("smoke", chosen), output_dir=tmp_path / "b", quiet=True, plugins=[stop],
        cancel=stop.event)  # fmt: skip
    again = resume(tmp_path / "b", quiet=True, plugins=[StopAfter(100)])
    assert whole.model is not None
    assert again.model is not None
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.endswith("lora.B") and one[name].any() for name in one)


# -- merged ----------------------------------------------------------------------------------------


def test_merged_weights_compute_what_base_and_adapter_do(tmp_path: Path) -> None:
    done = live_run(
        Net(), batches(), tmp_path / "run", "{use: lora, with: {layout: merged}}",
        "quantizer=null", "wrappers=[{use: lora}]",
    )  # fmt: skip
    assert done.model is not None
    plain = Net()
    plain.load_state_dict(load_file(tmp_path / "run/exports/lora/model.safetensors"))
    with torch.no_grad():
        inputs = batches()[0][0]
        merged, apart, bare = plain.eval()(inputs), done.model.eval()(inputs), Net().eval()(inputs)
    torch.testing.assert_close(merged, apart)
    assert (bare - apart).norm() > 1e-3 * apart.norm()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.head.weight = self.first.weight

    def forward(self, inputs: Tensor) -> Tensor:
        result: Tensor = self.head(self.first(inputs))
        return result


@pytest.mark.parametrize(
    ("model", "quantizer", "message"),
    [
        (Net, "{use: bitnet}", "first has its weight on few levels, and the sum of levels and an"),
        (Tied, "null", "first.weight and head.weight are one weight"),
    ],
)
def test_what_cannot_hold_the_sum_is_refused_before_the_first_step(
    model: type[nn.Module], quantizer: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PluginError, match=message):
        live_run(
            model(), batches(), tmp_path / "run", "{use: lora, with: {layout: merged}}",
            f"quantizer={quantizer}", "wrappers=[{use: lora}]",
        )  # fmt: skip


# -- models of transformers, and PEFT --------------------------------------------------------------


def trained(place: Path, family: str, *more: str, lora: str = "{rank: 4}") -> RunResult:
    """Six steps on the texts of the tests, without a check by PEFT in a process of its own."""
    folder = place / "model"
    if not folder.is_dir():
        make_folder(folder, family)
    chosen = settings(
        family, folder, place, "quantizer=null", "run.max_steps=6", "run.save_every=null",
        "optimizer.with.lr=0.03", f"wrappers=[{{use: lora, with: {lora}}}]",
        "exporters=[{use: lora, with: {verify: false}}]", *more,
    )  # fmt: skip
    return run(load_pipeline("smoke", chosen), output_dir=place / "run", quiet=True)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(TOKENS).logits
    return result


def by_peft(folder: Path) -> tuple[Tensor, Tensor]:
    """Logits of the base, and with the adapters, in the real library."""
    need("peft")
    transformers = library()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import PeftModel

        base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
        with torch.compiler.set_stance("force_eager"):
            model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
            before = logits(model)
            return before, logits(PeftModel.from_pretrained(model, folder).eval())


@pytest.mark.parametrize("family", ["bitnet_autobitlinear", "bitnet_online", "gpt2"])
def test_peft_computes_the_same_beside_the_base(family: str, tmp_path: Path) -> None:
    """Packed levels, latent ones, transposed layers. Planted: alpha where alpha / rank belongs."""
    folder = make_folder(tmp_path / "model", family)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    done = trained(tmp_path, family, lora="{rank: 4, alpha: 12.0, dropout: 0.1}")
    assert done.failed_exports == {}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    export = tmp_path / "run/exports/lora"
    bare, theirs = by_peft(export)
    own = logits(load_run(tmp_path / "run").model)
    opened = load_run(export)
    # int8 activations: another order of sums takes a rounding to the other side now and then
    near = 1e-4 if family == "bitnet_autobitlinear" else 1e-5
    assert (logits(opened.model) - own).norm() <= near * own.norm()
    assert (theirs - own).norm() <= near * own.norm()
    assert (bare - own).norm() > 0.05 * own.norm()  # or it would show nothing
    assert manifest(tmp_path / "run", "lora")["layers"] == (8 if family == "gpt2" else 14)


def test_packed_levels_are_applied_as_the_folder_has_them(tmp_path: Path) -> None:
    """The layout that PEFT cannot take: adapters beside it, written and opened again."""
    done = trained(tmp_path, "bitnet_bitlinear", "exporters=[{use: lora}]", "run.precision=bf16")
    assert done.failed_exports == {}
    note = manifest(tmp_path / "run", "lora")["verified"]["note"]
    assert "export the base with layout: autobitlinear" in note
    bare = load_run(tmp_path / "model").model
    one, two = load_run(tmp_path / "run"), load_run(tmp_path / "run/exports/lora")
    assert torch.equal(logits(one.model), logits(two.model))
    assert not torch.equal(logits(one.model), logits(bare))
    assert one.generate("The", max_tokens=3) == one.generate("The", max_tokens=3)
    assert isinstance(two.generate([1, 2, 3], max_tokens=3), str)
    for part in adapters(one.model).values():
        part.B.data.zero_()
    assert torch.equal(logits(one.model), logits(bare))


@pytest.fixture(scope="module")
def of_peft(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder that PEFT has written, with its logits."""
    need("peft")
    transformers = library()
    place = tmp_path_factory.mktemp("peft")
    base = make_folder(place / "base", "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from peft import LoraConfig, get_peft_model

        about = LoraConfig(
            r=4, lora_alpha=3, use_rslora=True, init_lora_weights=False, task_type="CAUSAL_LM",
            target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"],
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            plain = transformers.AutoModelForCausalLM.from_pretrained(base)
            model = get_peft_model(plain, about).eval()
            model.base_model.model.lm_head.modules_to_save.default.weight.data.mul_(1.5)
        model.save_pretrained(place / "adapter")
        return place / "adapter", logits(model)


def test_what_peft_has_written_is_opened(of_peft: tuple[Path, Tensor]) -> None:
    folder, theirs = of_peft
    torch.testing.assert_close(logits(load_run(folder).model), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "no/such"}, "its base is 'no/such', which is no folder here"),
        ({"peft_type": "IA3"}, "adapters of the kind IA3 are not read, LORA is"),
        ({"use_dora": True}, "use_dora asks for other arithmetic"),
        ({"r": None}, "r is no number above 0"),
        (None, "adapter_config.json cannot be read"),
        ("a", "q_proj has not two matrices that fit"),
        ("x", "has no linear layer model.layers.0.self_attn.x_proj"),
        ("wide", "they are of different models"),
        ("cut", "adapter_model.safetensors cannot be read"),
    ],
)
def test_a_broken_folder_is_one_clear_error(
    of_peft: tuple[Path, Tensor], changes: Any, message: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(of_peft[0], tmp_path / "adapter"))
    config, file = folder / CONFIG, folder / WEIGHTS
    one = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors = load_file(file)
    if changes is None:
        config.write_text("{")
    elif isinstance(changes, dict):
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    elif changes == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        moved = {name.replace("q_proj", "x_proj"): value for name, value in tensors.items()}
        wide = {**tensors, one: torch.zeros(4, 31)}
        del tensors[one]
        save_file({"a": tensors, "x": moved, "wide": wide}[changes], file)
    with pytest.raises(ConfigError, match=message):
        load_run(folder)


def test_a_base_that_no_folder_has_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """PEFT would set the adapters beside another model. Planted: each of the checks."""
    for more, message in (
        ("quantizer={use: bitnet}", "q_proj is quantized by this run, and not in"),
        ("model.with.sub_norms=true", "the model is of type bitnet now"),
        ("model.with.random=true", "is another than in"),
    ):
        with pytest.raises(PluginError, match=message):
            trained(tmp_path, "llama", more)


def test_a_head_that_was_drawn_is_trained_in_full_and_written(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "bert")
    edit_config(folder, architectures=["BertForMaskedLM"])
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    task = "model.with.task=sequence_classification"
    with pytest.raises(
        PluginError, match=re.escape("frozen. Train it: wrappers: [{use: lora, with")
    ):
        trained(tmp_path, "bert", task)
    done = trained(tmp_path, "bert", task, lora="{also: [classifier], targets: ['*query']}")
    assert done.failed_exports == {}
    tensors = load_file(tmp_path / "run/exports/lora" / WEIGHTS)
    head = tensors["base_model.model.classifier.weight"]
    assert done.model is not None
    assert torch.equal(head, done.model.classifier.weight)  # type: ignore[union-attr, arg-type]
    about = json.loads((tmp_path / "run/exports/lora" / CONFIG).read_text())
    assert about["modules_to_save"] == ["classifier"]
    assert about["target_modules"] == [
        f"bert.encoder.layer.{place}.attention.self.query" for place in range(2)
    ]


def test_merged_it_is_a_folder_of_its_own_kind(tmp_path: Path) -> None:
    merged = "exporters=[{use: lora, with: {layout: merged, verify: false}}]"
    trained(tmp_path, "qwen2", merged, lora="{targets: ['*_proj']}")
    own = logits(load_run(tmp_path / "run").model)
    export = tmp_path / "run/exports/lora"
    torch.testing.assert_close(logits(load_run(export).model), own, rtol=1e-4, atol=1e-5)
    assert not any("lora" in name for name in load_file(export / "model.safetensors"))


@pytest.mark.deep
@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma3", "bert", "bert_tokens", "vit"])
def test_the_exporter_asks_peft(family: str, tmp_path: Path) -> None:
    need("peft")
    done = trained(tmp_path, family, "exporters=[{use: lora}]")
    assert done.failed_exports == {}
    verified = manifest(tmp_path / "run", "lora")["verified"]
    assert verified["client"].startswith("peft")
    assert verified["relative_l2"] < 1e-5
