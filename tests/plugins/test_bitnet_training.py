"""The quantizer plugin in runs: warm-up, sparsity, metrics, the account, exact resume."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from kernel_parts import make_session
from torch import Tensor, nn
from torch.nn import functional

from forge_kernel import run
from forge_kernel.config.schema import bind_config
from forge_kernel.config.use import UseQuantizer, UseRegularizer
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.values import Batch
from forge_kernel.errors import ConfigError, PlanError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import load_pipeline
from forge_kernel.planning.plan import plan
from forge_kernel.storage.checkpoint_store import CheckpointStore
from forge_kernel.testing.compare import differences
from forge_kernel.testing.trial import Trial
from forge_kernel.training.session import Session
from forge_plugins.mathematics.quantization import bit_linear
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.bit_linear import BitLinear
from forge_plugins.mathematics.quantization.quantizers import (
    quantize_activation,
    quantize_weight,
    straight_through,
)
from forge_plugins.mathematics.quantization.scheme import Scheme
from forge_plugins.mathematics.quantization.warmup import fitting, warmup_lambda
from forge_plugins.mathematics.quantization.weight_statistics import (
    bars,
    weight_metrics,
    weight_sums,
)
from forge_plugins.quantizers.bitnet import BitNetConfig


def uses(**options: Any) -> dict[str, Any]:
    return {"quantizer": UseQuantizer("bitnet", options)}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))


def batches(count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        Batch(torch.randn(6, 4, generator=generator), torch.randint(3, (6,), generator=generator))
        for _ in range(count)
    ]


def session_of(model: nn.Module | None = None, **options: Any) -> Session:
    settings = {
        key: options.pop(key)
        for key in ("max_steps", "accumulate", "folder", "precision", "log_every", "max_seconds")
        if key in options
    }
    return make_session(model or net(), batches(1), uses=uses(**options), **settings)


def layers_of(session: Session) -> list[Any]:
    return [module for module in session.run.model.modules() if isinstance(module, BitLayer)]


class Textbook(nn.Linear):
    """Quantizers and estimator as published, nothing kept and nothing shared."""

    def forward(self, input: Tensor) -> Tensor:
        weight = straight_through(self.weight, quantize_weight(self.weight.detach()))
        value = straight_through(input, quantize_activation(input.detach()))
        return functional.linear(value, weight, self.bias)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_default_run_has_the_weights_of_the_textbook_bit_for_bit(
    accumulate: int, precision: str
) -> None:
    plain = net()
    for index in (0, 2):
        old = plain[index]
        assert isinstance(old, nn.Linear)
        plain[index] = Textbook(old.in_features, old.out_features)
        plain[index].load_state_dict(old.state_dict())
    first = session_of(accumulate=accumulate, precision=precision)
    second = make_session(plain, batches(1), accumulate=accumulate, precision=precision)
    for index in range(8):
        window = batches(16)[index * accumulate : (index + 1) * accumulate]
        first.step(*window)
        second.step(*window)
    for mine, theirs in zip(first.run.model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# -- warm-up and sparsity --------------------------------------------------------------------------


@pytest.mark.spec("D7", "D17")
@pytest.mark.parametrize("curve", ["linear", "exponential", "sigmoid"])
def test_the_warmup_begins_with_the_model_as_it_is_and_ends_on_levels(curve: str) -> None:
    """Planted fault: the blend read from the length of the run instead of the steps done."""
    plain = net()
    session = session_of(warmup_steps=4, warmup_curve=curve, weight_bits=1, max_steps=100)
    x = batches(1)[0].inputs
    assert torch.equal(session.run.model(x), plain(x))
    layer, *_ = layers_of(session)
    shares = []
    for batch in batches(4):
        shares.append(layer.warmup_lambda)
        latent = layer.weight.detach()
        levels, scale = layer.levels()
        wanted = latent + shares[-1] * (levels / scale - latent)
        assert torch.allclose(layer.applied_weight(), wanted, atol=1e-6)
        assert not layer.trained_quantized
        session.step(batch)
    assert shares == [warmup_lambda(step, 4, curve) for step in range(4)]
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert layer.warmup_lambda == 1.0
    assert len(layer.applied_weight().unique()) == 2
    session.step(batches(1)[0])
    assert layer.trained_quantized


@pytest.mark.parametrize("curve", ["linear", "exponential", "sigmoid"])
def test_every_curve_rises_from_zero_to_one(curve: Any) -> None:
    found = [warmup_lambda(step, 50, curve) for step in range(60)]
    assert found[0] == 0.0
    assert found == sorted(found)
    assert found[50:] == [1.0] * 10
    assert found[49] < 1.0
    assert warmup_lambda(0, 0, curve) == 1.0


def test_the_curves_differ_as_their_names_say() -> None:
    assert warmup_lambda(25, 100, "linear") == 0.25
    assert warmup_lambda(25, 100, "exponential") == pytest.approx(1 - 0.75**4)
    assert warmup_lambda(25, 100, "sigmoid") < 0.05
    assert warmup_lambda(50, 100, "sigmoid") == pytest.approx(0.5)


@pytest.mark.spec("D7")
def test_a_short_run_ends_quantized_and_says_that_it_shortened_the_warmup(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Planted fault: `fitting` returned what was asked for."""
    with caplog.at_level(logging.WARNING):
        result = run(
            load_pipeline("smoke", ["run.max_steps=10", "quantizer.with.warmup_steps=1000"]),
            output_dir=tmp_path / "run", quiet=True,
        )  # fmt: skip
    assert result.model is not None
    layers = [layer for layer in result.model.modules() if isinstance(layer, BitLayer)]
    assert all(len(layer.applied_weight().unique()) == 3 for layer in layers)
    assert layers[0].quantization.steps == 5
    account = json.loads((tmp_path / "run/quantization.json").read_text())
    assert account["warmup_steps"] == 5
    assert "shortened to 5" in account["notices"][0]
    assert "shortened to 5" in caplog.text
    assert fitting(7, None, 0.5) == 7
    session = session_of(warmup_steps=80, warmup_fraction=0.75, max_steps=100)
    for _ in range(75):
        assert layers_of(session)[0].warmup_lambda < 1
        session.step(batches(1)[0])
    assert layers_of(session)[0].warmup_lambda == 1


def test_a_run_of_unknown_length_is_told_of_the_risk(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        session_of(warmup_steps=5, max_steps=None, max_seconds=60.0)
    assert "length in steps is not known" in caplog.text


@pytest.mark.spec("D8", "D16")
@pytest.mark.parametrize("bits", [1, 1.58])
def test_sparsity_rises_to_its_target_in_what_is_applied(bits: float) -> None:
    session = session_of(
        weight_bits=bits, target_sparsity=0.75, sparsity_warmup_steps=3, max_steps=20
    )
    layer, *_ = layers_of(session)
    zeros = []
    for batch in batches(5):
        zeros.append(float((layer.applied_weight() == 0).float().mean()))
        session.step(batch)
    assert zeros[3:] == [0.75, 0.75]
    assert zeros[0] < 0.5
    assert zeros == sorted(zeros)
    at_once = session_of(weight_bits=bits, target_sparsity=0.75)
    assert float((layers_of(at_once)[0].applied_weight() == 0).float().mean()) == 0.75


def test_weights_found_on_their_grid_skip_the_warmup() -> None:
    model = net()
    with torch.no_grad():
        for index in (0, 2):
            weight = model[index].weight
            assert isinstance(weight, Tensor)
            weight.copy_(quantize_weight(weight))
    file = [model[index].weight.clone() for index in (0, 2)]
    session = session_of(model, warmup_steps=10, max_steps=100)
    for layer, weight in zip(layers_of(session), file, strict=True):
        assert torch.equal(layer.applied_weight(), weight)  # type: ignore[arg-type]
        assert layer.continued


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.spec("D1")
def test_each_setting_of_the_scheme_reaches_the_layers() -> None:
    options = {
        "weight_bits": 2, "activation_bits": 4, "scale_statistic": "absmedian", "granularity": "group",
        "group_size": 2, "activation_granularity": "tensor", "rounding": "stochastic",
    }  # fmt: skip
    scheme = layers_of(session_of(**options, ste="clipped"))[0].scheme
    assert scheme == Scheme(**options, ste="clipped")  # type: ignore[arg-type]
    fast = layers_of(session_of(arithmetic="int8_bf16_backward"))[0].scheme
    assert fast.arithmetic == "int8_bf16_backward"
    assert layers_of(session_of(parity="torchao"))[0].scheme.parity == "torchao"


def test_norms_convolutions_and_skipped_names_reach_the_conversion() -> None:
    session = session_of(sub_norm=["2"])
    first, second = layers_of(session)
    assert first.sub_norm is None
    assert second.sub_norm is not None
    assert "2.sub_norm.weight" in session.run.parameters
    assert len(layers_of(session_of(skip=["0"]))) == 1
    image = nn.Sequential(nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2), nn.Flatten())
    assert len(layers_of(session_of(image, convolutions=True))) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["weight_bits=1", "scale_statistic=absmedian"], "absmean"),
        (["arithmetic=int8", "activation_bits=16"], "multiplies integers"),
        (["weight_bits=16", "target_sparsity=0.5"], "has none"),
        (["sparsity_warmup_steps=5"], "does nothing"),
        (["weight_bits=16", "activation_bits=16", "warmup_steps=5"], "does nothing"),
        (["weight_bits=3"], "3"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(
    options: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_pipeline("smoke", [f"quantizer.with.{option}" for option in options])


def test_a_scheme_that_does_not_fit_a_layer_names_it() -> None:
    with pytest.raises(PluginError, match="0: rows of 4"):
        session_of(granularity="group", group_size=3)


def test_a_model_with_nothing_to_quantize_says_why() -> None:
    with pytest.raises(PluginError, match="0: an embedding"):
        session_of(nn.Sequential(nn.Embedding(3, 4)))


@pytest.mark.parametrize(
    ("bits", "fact"), [(1, "model:binary"), (1.58, "model:ternary"), (4, "model:quantized")]
)
def test_what_the_model_becomes_is_known_to_the_plan(bits: float, fact: str) -> None:
    from forge_kernel.contract.plugin import facts

    plugin = Catalog.installed().load(Kind.QUANTIZER, "bitnet")
    assert fact in facts(plugin.info.provides, BitNetConfig(weight_bits=bits))
    assert "model:quantized" in facts(plugin.info.provides, BitNetConfig(weight_bits=bits))
    assert facts(plugin.info.provides, BitNetConfig(weight_bits=16)) == ()
    with pytest.raises(PlanError, match=r"needs weights of three levels(.|\n)*weight_bits"):
        plan(load_pipeline("smoke", ["quantizer.with.weight_bits=4", "exporters=[{use: gguf}]"]))


def test_full_precision_leaves_the_model_as_it_is() -> None:
    session = session_of(weight_bits=32, activation_bits=32)
    assert not layers_of(session)
    assert type(session.run.model[0]) is nn.Linear
    session.step(*batches(1))


@pytest.mark.spec("D6")
def test_without_an_estimator_weights_stay_and_a_warning_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        session = session_of(ste="none")
    assert "ste is none" in caplog.text
    before = {name: p.detach().clone() for name, p in session.run.parameters.items()}
    for batch in batches(3):
        session.step(batch)
    for name, parameter in session.run.parameters.items():
        assert torch.equal(parameter, before[name]) == name.endswith("weight")


def test_missing_instructions_are_told_and_the_exact_path_taken(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from forge_plugins.quantizers import bitnet as plugin

    lacks = plugin.quantized_linear  # it keeps what it fetched
    monkeypatch.setattr(lacks, "lacks_int8", lambda device: "no avx512_vnni", raising=False)
    monkeypatch.setattr(bit_linear, "multiplies_integers", lambda device: False)
    with caplog.at_level(logging.WARNING):
        fast = session_of(arithmetic="int8", folder=tmp_path)
    exact = session_of()
    assert "avx512_vnni; the exact path is taken" in caplog.text
    assert "avx512_vnni" in json.loads((tmp_path / "quantization.json").read_text())["notices"][0]
    for batch in batches(3):
        fast.step(batch)
        exact.step(batch)
    assert torch.equal(fast.run.model[0].weight, exact.run.model[0].weight)


def test_the_account_lists_what_was_converted_and_what_was_not(tmp_path: Path) -> None:
    run(load_pipeline("bitnet_grokfast", ["run.max_steps=1", "data.with.batch_size=8"]),
        output_dir=tmp_path / "run", quiet=True)  # fmt: skip
    account = json.loads((tmp_path / "run/quantization.json").read_text())
    assert account["converted"]["blocks.0.attention.query"]["origin"] == "latent"
    assert account["left"]["token_embedding"] == "an embedding"
    assert "head" in account["left"]
    assert account["notices"] == []


# -- metrics ---------------------------------------------------------------------------------------


@pytest.mark.spec("H17", "D18")
@pytest.mark.spec("D18")
def test_metrics_are_those_of_the_weights_that_are_applied() -> None:
    session = session_of(metrics="layers")
    measure = session.bus.calls("log_metrics")[0]
    first = measure(session.run, session.step_state)
    applied = torch.cat([layer.applied_weight().flatten() for layer in layers_of(session)]).double()
    latent = torch.cat([layer.weight.detach().flatten() for layer in layers_of(session)]).double()
    assert float(first["weight_sparsity"]) == pytest.approx(float((applied == 0).double().mean()))
    error = (applied - latent).norm() / latent.norm()
    assert float(first["quantization_error"]) == pytest.approx(float(error), rel=1e-5)
    assert float(first["latent_mean"]) == pytest.approx(float(latent.mean()), rel=1e-6)
    assert float(first["latent_std"]) == pytest.approx(float(latent.std(correction=0)), rel=1e-6)
    kurtosis = ((latent - latent.mean()) ** 4).mean() / latent.var(correction=0) ** 2
    assert float(first["latent_kurtosis"]) == pytest.approx(float(kurtosis), rel=1e-6)
    shares = [float(first[f"level_{level}"]) for level in (-1, 0, 1)]
    assert sum(shares) == pytest.approx(1)
    assert shares[2] == pytest.approx(float((applied > 0).double().mean()))
    assert float(first["weight_flips"]) != float(first["weight_flips"])  # not known yet
    for layer, index in zip(layers_of(session), (0, 2), strict=True):
        own = (layer.applied_weight() == 0).double().mean()
        assert float(first[f"weight_sparsity/{index}"]) == pytest.approx(float(own))
    before = [layer.levels()[0] for layer in layers_of(session)]
    session.step_state.logs = True
    for listen in session.bus.calls("on_gradients"):
        listen(session.run, session.step_state)
    with torch.no_grad():
        session.run.model[0].weight[:, :2].neg_()
    session.run.progress.step += 1
    second = measure(session.run, session.step_state)
    flips = sum(
        int((layer.levels()[0] != old).sum())
        for layer, old in zip(layers_of(session), before, strict=True)
    )
    assert flips > 0
    assert float(second["weight_flips"]) == pytest.approx(flips / len(applied))


def test_totals_alone_are_the_default_and_unknown_flips_are_null() -> None:
    session = session_of(warmup_steps=5, log_every=2, max_steps=100)
    session.step(*batches(1))
    record = session.log()
    assert record.metrics["weight_flips"] is None
    assert record.metrics["warmup_lambda"] == pytest.approx(0.2)
    assert not any("/" in name for name in record.metrics)
    session.step(*batches(1))
    assert session.log().metrics["weight_flips"] is not None


@pytest.mark.parametrize("bits", [1, 1.58, 2, 4, 8])
def test_the_histogram_counts_each_weight_once(bits: float) -> None:
    torch.manual_seed(0)
    layer = BitLinear(64, 64, scheme=Scheme(weight_bits=bits, granularity="row"))
    top = layer.scheme.qmax
    sums = weight_sums(layer, None)
    metrics = weight_metrics(sums, top)
    shares = {int(name[6:]): float(v) for name, v in metrics.items() if name.startswith("level_")}
    assert list(shares) == bars(top)
    assert len(shares) <= 15
    assert sum(shares.values()) == pytest.approx(1)
    assert bars(127)[0] == -119
    assert bars(127)[-1] == 119
    centre = sum(level * share for level, share in shares.items())
    assert centre == pytest.approx(float(layer.levels()[0].double().mean()), abs=top / 15)


# -- exact resume ----------------------------------------------------------------------------------

MODES: dict[str, dict[str, Any]] = {
    "warmup": {"warmup_steps": 4, "warmup_fraction": 0.9, "warmup_curve": "sigmoid"},
    "stochastic": {"rounding": "stochastic", "weight_bits": 4},
    "threshold": {"rounding": "learned_threshold"},
    "sparsity": {"weight_bits": 1, "target_sparsity": 0.5, "sparsity_warmup_steps": 5},
    "int8": {"arithmetic": "int8", "granularity": "row"},
    "norms": {"sub_norm": ["*"], "ste": "clipped"},
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_is_the_uninterrupted_one(mode: str, accumulate: int, tmp_path: Path) -> None:
    """The first part is run with the whole's length known, as a killed run is."""
    trial = Trial(Catalog.installed(), Kind.QUANTIZER, "bitnet", MODES[mode])
    trial.run(tmp_path / "straight", accumulate=accumulate, max_steps=10, save_every=3)
    store = CheckpointStore(tmp_path / "straight" / "checkpoints")
    steps = store.steps()
    assert len(steps) == 2
    trial.run(tmp_path / "cut", accumulate=accumulate, max_steps=10, save_every=3)
    cut = CheckpointStore(tmp_path / "cut" / "checkpoints")
    shutil.rmtree(cut.path(10))
    trial.resume(tmp_path / "cut", "run.max_steps=10")
    assert differences(store.path(10), cut.path(10)) == []


def test_a_stochastic_draw_holds_for_the_whole_window() -> None:
    session = session_of(rounding="stochastic", accumulate=3)
    layer, *_ = layers_of(session)
    seen = []
    for batch in batches(3):
        session.accumulate(batch)
        seen.append(layer.applied_weight().clone())
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    session.update()
    assert not torch.equal(layer.applied_weight(), seen[0])


def test_thresholds_are_trained_by_the_optimizer() -> None:
    session = session_of(rounding="learned_threshold")
    names = [name for name in session.run.parameters if name.endswith("threshold")]
    assert names == ["0.threshold", "2.threshold"]
    for batch in batches(3):
        session.step(batch)
    assert all(float(session.run.parameters[name].detach()) != 0 for name in names)


# -- the regularizer in runs ---------------------------------------------------------------------------


def test_the_distance_needs_a_quantizer() -> None:
    with pytest.raises(PlanError, match="needs weights of few bits"):
        plan(
            load_pipeline(
                "smoke",
                ["quantizer=null", "exporters=[]", "regularizers=[{use: quantization_distance}]"],
            )
        )


@pytest.mark.spec("K11", "D15")
@pytest.mark.spec("D15")
def test_the_distance_shrinks_when_it_is_penalized() -> None:
    def ended(strength: float) -> float:
        session = make_session(
            net(), batches(1), log_every=1,
            uses={**uses(), "regularizers": (UseRegularizer("quantization_distance", {"strength": strength}),)},
        )  # fmt: skip
        for batch in batches(30):
            session.step(batch)
        return float(session.log().metrics["quantization_distance"] or 0.0)

    assert ended(1.0) < 0.5 * ended(0.0)


def test_bad_settings_say_what_to_do() -> None:
    with pytest.raises(msgspec.ValidationError, match="group"):
        bind_config(BitNetConfig, {"arithmetic": "int8", "granularity": "group"})
