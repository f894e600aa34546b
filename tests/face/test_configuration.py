"""Groups of settings: checked on each assignment, closed when in use, plain when saved."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

import agent_forge.phases.phase5_training as phase5
from agent_forge.phases.phase5_training import (
    BitNetConfig,
    GrokfastConfig,
    PipelineConfig,
    QuantizationMode,
    TrainingConfig,
    ValidationConfig,
)
from agent_forge.phases.phase5_training.configuration import Configuration
from forge_kernel.errors import ConfigError

GROUPS = [
    value
    for name in phase5.__all__
    if inspect.isclass(value := getattr(phase5, name)) and issubclass(value, Configuration)
]


@pytest.mark.parametrize("group", GROUPS, ids=lambda one: one.__name__)
def test_each_group_refuses_what_it_does_not_know(group: type[Configuration]) -> None:
    """Spec: D1, E1, F1, G1, H1"""
    with pytest.raises(ConfigError, match="has no setting 'wrongname'"):
        group(wrongname=1)
    made = group()
    with pytest.raises(AttributeError, match="has no setting 'wrongname'"):
        made.wrongname = 1
    with pytest.raises(AttributeError):
        _ = made.wrongname


def fields_without_meaning() -> Iterator[tuple[type[Configuration], str]]:
    for group in GROUPS:
        for name in group.without_meaning:
            yield group, name


def other_than(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int | float) else "another"


@pytest.mark.parametrize(
    ("group", "name"), list(fields_without_meaning()), ids=lambda one: getattr(one, "__name__", one)
)
def test_a_field_without_a_meaning_takes_its_default_and_nothing_else(
    group: type[Configuration], name: str
) -> None:
    """Spec: D1, E1, H1, C10"""
    default = getattr(group(), name)
    assert getattr(group(**{name: default}), name) == default
    with pytest.raises(ValueError, match=r"only: \w+"):
        group(**{name: other_than(default)})


def test_a_misspelt_field_is_answered_with_the_nearest_one() -> None:
    """Spec: D1"""
    with pytest.raises(TypeError, match="did you mean 'weight_bits'"):
        BitNetConfig(weight_bit=1)


def test_the_originals_names_are_aliases_both_ways() -> None:
    """Spec: D9, E1, E4"""
    config = GrokfastConfig(acceleration_lr_multiplier=7.0)
    assert config.acceleration_multiplier == config.acceleration_lr_multiplier == 7.0
    bitnet = BitNetConfig(target_sparsity=0.3)
    assert bitnet.sparsity_target == 0.3
    bitnet.sparsity_target = 0.1
    assert bitnet.target_sparsity == 0.1
    with pytest.raises(ConfigError, match="given twice"):
        BitNetConfig(target_sparsity=0.3, sparsity_target=0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: GrokfastConfig(alpha=1.0), "< 1"),
        (lambda: TrainingConfig(epochs=0), ">= 1"),
        (lambda: TrainingConfig(epochs=2.5), "Expected `int`"),
        (lambda: TrainingConfig(amp_dtype="half"), "expected dtype"),
        (lambda: BitNetConfig(quantization_mode="WRONG"), "DETERMINISTIC, STOCHASTIC"),
        (lambda: PipelineConfig(training_config={"epoch": 3}), "did you mean 'epochs'"),
        (lambda: setattr(TrainingConfig(), "max_grad_norm", -1.0), "> 0"),
    ],
)
def test_a_value_out_of_bounds_is_refused_when_it_is_set(change: Any, message: str) -> None:
    """Spec: E1, D1"""
    with pytest.raises(ConfigError, match=message):
        change()


def test_nothing_can_be_changed_behind_a_lock() -> None:
    """Spec: I8. Red when a list stays a list."""
    config = PipelineConfig(grokfast_config=GrokfastConfig())
    config.lock("is closed")
    for group, name in ((config, "seed"), (config.grokfast_config, "alpha")):
        with pytest.raises(ValueError, match="is closed"):
            setattr(group, name, 0)
    with pytest.raises(AttributeError):
        config.validation_config.metrics_to_track.append("recall")
    opened = copy.deepcopy(config)
    opened.grokfast_config.alpha = 0.5
    opened.validation_config.metrics_to_track.append("recall")
    assert config.grokfast_config.alpha == 0.98


def test_a_wrong_value_put_into_a_list_is_found_at_the_lock() -> None:
    """Spec: H6, H7"""
    config = ValidationConfig()
    config.metrics_to_track.append("accurracy")
    with pytest.raises(ConfigError, match="there is no metric 'accurracy'"):
        config.lock("is closed")
    assert not config.locked


def test_a_saved_group_is_plain_for_a_process_that_knows_nothing(tmp_path: Path) -> None:
    """Spec: J3. Red when the class is saved."""
    config = PipelineConfig(
        bitnet_config=BitNetConfig(quantization_mode=QuantizationMode.STOCHASTIC)
    )
    torch.save({"training_config": config}, tmp_path / "held.pt")
    code = (
        f"import torch; held = torch.load({str(tmp_path / 'held.pt')!r})['training_config']\n"
        "print(type(held).__name__, held['bitnet_config']['quantization_mode'], held['seed'])"
    )
    done = forked.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd="/", check=False
    )
    assert done.stdout.split() == ["OrderedDict", "STOCHASTIC", "0"], done.stderr


def test_other_pickling_and_copies_keep_the_class() -> None:
    config = GrokfastConfig(alpha=0.5)
    for again in (pickle.loads(pickle.dumps(config)), copy.copy(config), copy.deepcopy(config)):
        assert again == config
        assert again.given("alpha")
        assert not again.given("lambda_reg")
    assert isinstance(pickle.loads(pickle.dumps(config, protocol=2)), OrderedDict)


def test_a_configuration_error_is_a_value_error() -> None:
    """Planted: the pipeline's own errors an Exception only, those of settings a ValueError."""
    with pytest.raises(ValueError, match="amp_dtype"):
        TrainingConfig(amp_dtype=torch.float64).check()
    with pytest.raises(ValueError, match="without weights"):
        phase5.load_phase4({"epoch": 3})
    assert issubclass(ConfigError, ValueError)
