"""The pipeline, from outside."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import jsonschema
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from agent_forge.phases.phase5_training import (
    BitNetConfig,
    GrokfastConfig,
    GrokfastTrainer,
    PipelineConfig,
    QuantizationMode,
    TrainingLoop,
    create_training_pipeline,
    load_phase4,
)
from agent_forge.phases.phase5_training.phase_controller import Phase5Controller
from forge_kernel.errors import ConfigError
from forge_kernel.storage.random_state import read_random_state
from forge_plugins.mathematics.quantization.bit_layer import BitLayer
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet

ROOT = Path(__file__).resolve().parents[2]
Make = Callable[..., Any]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10))


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def written(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


def test_everything_is_there_from_construction(make_pipeline: Make) -> None:
    """Spec: I1, I9, I5, H13"""
    pipeline = make_pipeline()
    assert isinstance(pipeline.trainer, TrainingLoop)
    status = pipeline.get_status()
    assert status["state"] == "initializing"
    assert status["training_summary"] is not None
    assert pipeline.validator.get_validation_summary()["best_metric_value"] is None
    assert pipeline.metrics.get_summary()["training_summary"] == {}
    json.dumps(status, allow_nan=False)


@pytest.mark.parametrize("grokfast", [False, True])
def test_states_follow_the_life_of_a_pipeline(make_pipeline: Make, grokfast: bool) -> None:
    """Spec: I3, I4, I5, I10, H13, H19. Red when the summary is given by one kind of trainer only."""
    pipeline = make_pipeline(use_grokfast=grokfast)
    pipeline.setup()
    assert pipeline.get_status()["state"] == "ready"
    seen = []
    listen = pipeline.validator.record
    pipeline.validator.record = lambda *a: (seen.append(pipeline.state.value), listen(*a))
    result = pipeline.train()
    assert set(seen) == {"training"}
    status = pipeline.get_status()
    assert (status["state"], result.outcome) == ("completed", "completed")
    assert status["training_summary"]["global_step"] == result.steps == 3 * 4
    summary = pipeline.validator.get_validation_summary()
    assert summary["best_metric_value"] == pytest.approx(result.best["accuracy"])
    assert summary["total_validations"] >= 3
    metrics = pipeline.metrics.get_summary()
    assert metrics["training_summary"]["loss"]["latest"] == result.final["loss"]
    assert metrics["validation_summary"]["accuracy"]["count"] >= 3


def test_setup_twice_is_setup_once(make_pipeline: Make) -> None:
    """Spec: I2"""
    pipeline = make_pipeline()
    pipeline.setup()
    declared = pipeline._pipeline
    pipeline.setup()
    assert pipeline._pipeline is declared


def test_setup_names_the_file_that_is_not_there(workplace: Path) -> None:
    """Spec: I2"""
    pipeline = create_training_pipeline(network(), "data/nothing.json", output_dir="out")
    with pytest.raises(ConfigError, match=r"train_data_path: there is no file data/nothing\.json"):
        pipeline.setup()
    assert not Path("out").exists()


def test_setup_names_the_record_that_is_wrong(workplace: Path) -> None:
    """Spec: I2"""
    rows = [{"input": [0.5] * 128, "target": 0}] * 30 + [{"input": ["x"] * 128, "target": 0}]
    Path("bad.json").write_text(json.dumps(rows))
    pipeline = create_training_pipeline(
        network(), "bad.json", output_dir="out", data_config={"quality_threshold": 0.0}
    )
    with pytest.raises(Exception, match=r"bad\.json"):
        pipeline.setup()


def test_a_setting_changed_before_setup_takes_effect(make_pipeline: Make) -> None:
    """Spec: I7. Red when the settings are read at construction."""
    pipeline = make_pipeline(use_bitnet=True, use_grokfast=True)
    pipeline.config.bitnet_config.quantization_mode = QuantizationMode.STOCHASTIC
    pipeline.config.bitnet_config.sparsity_target = 0.1
    pipeline.config.grokfast_config.acceleration_multiplier = 3.0
    pipeline.setup()
    declared = pipeline._pipeline
    assert declared.quantizer.config.rounding == "stochastic"
    assert declared.quantizer.config.target_sparsity == 0.1
    assert declared.schedule.config.acceleration_multiplier == 3.0


def test_a_group_exchanged_as_a_whole_before_setup_takes_effect(make_pipeline: Make) -> None:
    """Spec: I7"""
    pipeline = make_pipeline(use_grokfast=True)
    pipeline.trainer.register_capability("any", lambda metrics: 1.0)
    pipeline.config.grokfast_config = GrokfastConfig(alpha=0.5)
    pipeline.setup()
    assert pipeline._pipeline.gradients[0].config.alpha == 0.5
    assert pipeline.trainer.config.alpha == 0.5
    assert "any" in pipeline.trainer.capabilities.status()


def test_a_setting_changed_after_setup_is_refused(make_pipeline: Make) -> None:
    """Spec: I8. Red when setup() does not lock."""
    pipeline = make_pipeline(use_bitnet=True)
    pipeline.setup()
    with pytest.raises(ValueError, match=r"BitNetConfig\.weight_bits was changed after setup\(\)"):
        pipeline.config.bitnet_config.weight_bits = 2
    with pytest.raises(ValueError, match=r"was changed after setup\(\)"):
        pipeline.config.training_config = None
    with pytest.raises(AttributeError):
        pipeline.config.validation_config.metrics_to_track.append("recall")


def test_a_failed_setup_leaves_the_settings_open(make_pipeline: Make) -> None:
    """Spec: I8"""
    pipeline = make_pipeline()
    pipeline.train_data_path = Path("nowhere.json")
    with pytest.raises(ConfigError):
        pipeline.setup()
    pipeline.train_data_path = Path("data/train.json")
    pipeline.config.training_config.epochs = 1
    assert pipeline.train().steps == 4


def test_capability_functions_survive_setup_and_are_called(make_pipeline: Make) -> None:
    """Spec: E7, E11, E15. Red when the tracker is not handed to the run."""
    seen: list[dict[str, Any]] = []

    def metric(metrics: dict[str, Any]) -> float:
        seen.append(dict(metrics))
        return 1.0 if "accuracy" in metrics else 0.0

    pipeline = make_pipeline(use_grokfast=True)
    pipeline.trainer.register_capability("known", metric)
    pipeline.setup()
    result = pipeline.train()
    steps = [one for one in seen if "learning_rate" in one]
    assert len(steps) == result.steps
    assert len(seen) > len(steps)  # and at each evaluation
    status = pipeline.get_status()["training_summary"]["capability_status"]["known"]
    assert status["acquired"]
    assert 0 < status["acquired_step"] <= result.steps


def test_a_capability_that_raises_is_told_once_and_training_goes_on(
    make_pipeline: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """Spec: E16"""

    def metric(metrics: dict[str, Any]) -> float:
        raise KeyError("no such metric")

    pipeline = make_pipeline(use_grokfast=True)
    pipeline.trainer.register_capability("broken", metric)
    assert pipeline.train().outcome == "completed"
    assert sum("cannot be scored" in record.message for record in caplog.records) == 1
    known = pipeline.trainer.get_training_summary()["capability_status"]["broken"]
    assert known["score"] is None
    assert "no such metric" in known["error"]


def test_bitnet_and_grokfast_work_together(make_pipeline: Make) -> None:
    """Spec: I11, D7. Red when the warm-up is not shortened to the run."""
    pipeline = make_pipeline(use_bitnet=True, use_grokfast=True)
    pipeline.setup()
    declared = pipeline._pipeline
    assert [use.name for use in declared.gradients] == ["grokfast", "adaptive_scale", "clip_norm"]
    assert [use.name for use in declared.regularizers] == ["quantization_distance"]
    assert declared.optimizer.config.lr == BitNetConfig().learning_rate
    pipeline.train()
    layers = [one for one in pipeline.model.modules() if isinstance(one, BitLayer)]
    assert len(layers) == 2
    pipeline.model.eval()
    probe = torch.eye(128, device=layers[0].weight.device)
    applied = layers[0](probe) - layers[0](torch.zeros_like(probe[:1]))
    assert len({f"{value:.4f}" for value in applied.abs().flatten().tolist()}) == 1


def test_the_log_has_the_metrics_of_bitnet_and_grokfast_where_they_work(
    make_pipeline: Make,
) -> None:
    """Spec: H15, H16, H17, H18. Red when the Grokfast path logs no accuracy or norm."""
    plain, both = make_pipeline(experiment_name="plain"), make_pipeline(
        experiment_name="both", use_bitnet=True, use_grokfast=True
    )  # fmt: skip
    both.trainer.register_capability("skill", lambda metrics: metrics.get("accuracy", 0.0))
    both.config.training_config.log_interval = plain.config.training_config.log_interval = 4
    quantized = {"quantization_distance", "weight_sparsity", "latent_std", "level_1"}
    slow = {"slow_gradient_norm", "capability/skill", "retention/skill"}
    for pipeline, there in ((plain, set()), (both, quantized | slow)):
        folder = pipeline.train().folder
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged = [line for line in lines if line["kind"] == "log"]
        assert [line["step"] for line in logged] == [4, 8, 12]
        for line in logged:
            assert there <= line.keys()
            assert {"samples_per_second", "memory_bytes", "cpu_percent"} <= line.keys()
            for name in ("loss", "accuracy", "learning_rate", "grad_norm"):
                assert isinstance(line[name], float), name
            # absent, not 0, where there is no such device
            assert (line["device_percent"] is None) is not torch.cuda.is_available()
            assert bool(line.keys() & (quantized | slow)) is bool(there)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"training_config": {"learning_rate": 1e-2},
          "bitnet_config": {"learning_rate": 1e-3}}, "they mean the same"),
        ({"training_config": {"grokfast_enabled": True}}, "use_grokfast=True"),
        ({"training_config": {"bitnet_enabled": True},
          "bitnet_config": None}, "use_bitnet=True"),
        ({"model_config": {"hidden": 3}}, "only num_classes is read"),
        ({"validation_config": {"metrics_to_track": ["bleu_score"]}}, "bleu needs texts"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused(
    make_pipeline: Make, settings: dict[str, Any], message: str
) -> None:
    """Spec: I8, I13"""
    settings = {"training_config": {"epochs": 1}, **settings}
    bitnet = settings.get("bitnet_config") is not None
    pipeline = make_pipeline(use_bitnet=bitnet, **settings)
    with pytest.raises(ConfigError, match=message):
        pipeline.setup()


def test_several_processes_are_refused_at_once(workplace: Path) -> None:
    """Spec: I1"""
    with pytest.raises(ConfigError, match="one process trains"):
        create_training_pipeline(network(), "data/train.json", distributed=True)


def test_an_unknown_field_is_refused_with_the_nearest_name(workplace: Path) -> None:
    """Spec: I13, D1"""
    with pytest.raises(ConfigError, match="did you mean 'output_dir'"):
        create_training_pipeline(network(), "data/train.json", outputdir="x")


def test_everything_is_written_below_the_output_folder(make_pipeline: Make) -> None:
    """Spec: I12, I14. Red when the data's cache lies in the user's folder."""
    pipeline = make_pipeline(experiment_name="here")
    before = written(Path.cwd())
    pipeline.train()
    fresh = written(Path.cwd()) - before
    assert {name.split("/")[0] for name in fresh} == {"out"}
    own = {name for name in fresh if name.count("/") == 1}
    assert own == {
        "out/here.log", "out/here_final_model.pt", "out/here_metrics.json",
        "out/here_validation.json",
    }  # fmt: skip
    runs = {name.split("/")[2] for name in fresh if name.startswith("out/runs/")}
    assert len(runs) == 1


def test_the_files_load_with_the_safe_loader_in_a_process_that_knows_nothing(
    make_pipeline: Make,
) -> None:
    """Spec: J3, I14, H12"""
    pipeline = make_pipeline(experiment_name="here", use_bitnet=True, use_grokfast=True)
    pipeline.train()
    code = (
        "import json, sys, torch\n"
        "held = torch.load('out/here_final_model.pt')\n"
        "assert not [m for m in sys.modules if m.startswith(('forge_', 'agent_forge'))]\n"
        "print(json.dumps([sorted(held), held['config']['bitnet_config']['quantization_mode'],\n"
        "                  held['config']['grokfast_config']['alpha']]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    keys, mode, alpha = json.loads(done.stdout)
    assert keys == ["config", "metrics_summary", "model_state_dict"]
    assert (mode, alpha) == ("DETERMINISTIC", 0.98)


@pytest.mark.parametrize("name", ["metrics", "validation"])
def test_the_json_files_follow_their_schemas(make_pipeline: Make, name: str) -> None:
    """Spec: H12, I14"""
    make_pipeline(experiment_name="here").train()
    text = Path(f"out/here_{name}.json").read_text()
    data = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    schemas = ROOT / "schemas"
    schema = json.loads((schemas / "phase5" / f"{name}.json").read_text())
    if "result" in data:
        result = json.loads((schemas / "run" / "result.json").read_text())
        jsonschema.validate(data["result"], result)
        schema["properties"]["result"] = {}
    jsonschema.validate(data, schema)


def test_cleanup_twice_leaves_no_thread_and_no_handler(make_pipeline: Make) -> None:
    """Spec: I6, I14"""
    handlers, threads = list(logging.root.handlers), set(threading.enumerate())
    pipeline = make_pipeline()
    pipeline.train()
    pipeline.validator.start_monitoring()
    pipeline.cleanup()
    pipeline.cleanup()
    assert set(threading.enumerate()) == threads
    assert logging.root.handlers == handlers
    assert pipeline.get_status()["state"] == "completed"


def test_the_process_is_left_as_it_was(make_pipeline: Make) -> None:
    """Spec: I14"""
    pipeline = make_pipeline(use_bitnet=True)
    torch.manual_seed(77)
    before, threads, place = read_random_state(), torch.get_num_threads(), os.getcwd()
    pipeline.train()
    after = read_random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert (before["python"], threads, place) == (
        after["python"], torch.get_num_threads(), os.getcwd(),
    )  # fmt: skip


def test_a_failure_is_raised_and_no_result_is_written(make_pipeline: Make) -> None:
    """Spec: I3. Red when results are written in a `finally`."""

    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(128, 10)
            self.calls = 0

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 5:
                raise ArithmeticError("broken on purpose")
            return self.inner(inputs)

    pipeline = make_pipeline(Breaks(), experiment_name="here")
    with pytest.raises(ArithmeticError, match="broken on purpose"):
        pipeline.train()
    assert pipeline.get_status()["state"] == "error"
    assert not list(Path("out").glob("here_*"))
    assert "broken on purpose" in Path("out/here.log").read_text()


def test_two_pipelines_at_once_are_each_what_it_is_alone(workplace: Path) -> None:
    """Spec: I14. Deterministic models, so that threads cannot share what they draw."""

    def made(name: str) -> Any:
        torch.manual_seed(5)
        return create_training_pipeline(
            network(), "data/train.json", name, "data/val.json", use_grokfast=True,
            output_dir=f"out_{name}", training_config={"epochs": 4},
        )  # fmt: skip

    alone = made("alone")
    alone.train()
    both = [made("one"), made("two")]
    errors: list[BaseException] = []

    def train(pipeline: Any) -> None:
        try:
            pipeline.train()
        except BaseException as error:  # noqa: BLE001  told below
            errors.append(error)

    threads = [threading.Thread(target=train, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert equal(state(both[0].model), state(alone.model))
    assert equal(state(both[1].model), state(alone.model))


def test_a_stopped_pipeline_is_taken_up_by_the_next_one(workplace: Path) -> None:
    """Spec: I3. Red when a run of other settings is taken up, or none."""

    def made() -> Any:
        torch.manual_seed(5)
        return create_training_pipeline(
            network(), "data/train.json", "again", "data/val.json", output_dir="out",
            training_config={"epochs": 6},
        )  # fmt: skip

    whole = made()
    whole.config.output_dir = "elsewhere"
    whole.train()
    first = made()
    first.validator.record = lambda *a: first.cancel()
    assert first.train().outcome == "stopped"
    assert first.get_status()["state"] == "paused"
    second = made()
    result = second.train()
    assert result.outcome == "completed"
    assert len(list(Path("out/runs").iterdir())) == 1
    assert equal(state(second.model), state(whole.model))


def test_the_yaml_trains_to_the_same_weights_bit_for_bit(workplace: Path) -> None:
    """Spec: I13, I15, I16. Red when the class draws its weights from the run's random stream."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        from face_models import Classifier
    finally:
        sys.path.pop(0)
    pipeline = create_training_pipeline(
        Classifier(), "data/train.json", "same", "data/val.json", use_bitnet=True,
        use_grokfast=True, output_dir="out", training_config={"epochs": 3},
    )  # fmt: skip
    pipeline.config.bitnet_config.quantization_mode = QuantizationMode.STOCHASTIC
    pipeline.config.grokfast_config.acceleration_multiplier = 3.0
    pipeline.to_yaml("same.yaml")
    pipeline.train()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    done = forked.run(
        [
            sys.executable, "-m", "forge_kernel", "run", "same.yaml", "--output-dir", "byfile",
            "--quiet", "--allow-code",  # the class lies neither here nor in an installed package
        ],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = Path("byfile/checkpoints").glob("step-*")
    newest = max(folders, key=lambda one: int(one.name.partition("-")[2]))
    assert equal(load_file(newest / "model.safetensors"), state(pipeline.model))


def test_a_model_that_no_other_process_can_make_is_refused_with_the_mend(
    make_pipeline: Make,
) -> None:
    """Spec: I13"""

    class Local(nn.Linear):
        pass

    with pytest.raises(ConfigError, match="cannot be imported elsewhere") as caught:
        make_pipeline(Local(128, 10)).to_yaml("x.yaml")
    assert "factory='module:Class'" in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be made by"):
        make_pipeline(nn.Linear(128, 10)).to_yaml("x.yaml")
    text = make_pipeline(nn.Linear(128, 10)).to_yaml(
        "x.yaml", arguments={"in_features": 128, "out_features": 10}
    )
    assert "torch.nn.modules.linear:Linear" in text


# -- Phase 4 ---------------------------------------------------------------------------------------


def compressed() -> nn.Module:
    torch.manual_seed(3)
    return convert_model_to_bitnet(network())[0]


def test_a_module_of_phase_4_is_continued_and_never_converted_twice(make_pipeline: Make) -> None:
    """Spec: J1, J2. Red when a converted layer is converted again."""
    model = compressed()
    inputs = torch.randn(16, 128)
    wanted = model.eval()(inputs)
    torch.save(model, "compressed_model.pt")
    again = torch.load("compressed_model.pt")
    assert torch.equal(again.eval()(inputs), wanted)
    layers = [name for name, one in again.named_modules() if isinstance(one, BitLayer)]
    latents = state(again)
    pipeline = make_pipeline(again, use_bitnet=True, training_config={"epochs": 1})
    at_step_0: list[dict[str, torch.Tensor]] = []
    again.register_forward_pre_hook(lambda one, _: at_step_0.append(state(one)))
    pipeline.train()
    found = [name for name, one in pipeline.model.named_modules() if isinstance(one, BitLayer)]
    assert found == layers
    assert equal(at_step_0[0], latents)


@pytest.mark.parametrize(
    "content",
    [
        lambda state: state,
        lambda state: {"model_state_dict": state, "bitnet_config": {"bits": 1}},
        lambda state: {"state_dict": state, "compression_stats": {}},
        lambda state: {"model_state": state, "quality_metrics": {}},
        lambda state: {"model": state, "phase4_metadata": {}},
    ],
    ids=["bare", "model_state_dict", "state_dict", "model_state", "model"],
)
def test_weights_without_an_architecture_are_refused_and_loaded_into_a_model(
    make_pipeline: Make, content: Callable[[Any], Any]
) -> None:
    """Spec: J1"""
    half = {name: value.half() for name, value in state(network()).items()}
    torch.save(content(half), "phase4.pt")
    held = torch.load("phase4.pt")
    with pytest.raises(ConfigError, match="weights without an architecture") as caught:
        make_pipeline(held)
    assert "load_phase4(content, model)" in str(caught.value)
    assert all(key in str(caught.value) for key in list(held)[:2])
    model = load_phase4("phase4.pt", network())
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert equal(state(model), {name: value.float() for name, value in half.items()})


@pytest.mark.parametrize(
    "content",
    [
        lambda model: model,
        lambda model: {"model": model},
        lambda model: {"model": model, "bitnet_config": {"bits": 1.58}, "phase4_metadata": {}},
        lambda model: {"model_state": model, "compression_stats": {"ratio": 0.1}},
    ],
    ids=["module", "model", "model_and_more", "model_state"],
)
def test_a_dictionary_with_a_whole_module_is_that_module(
    make_pipeline: Make, content: Callable[[Any], Any]
) -> None:
    """Spec: J1, J2. Red when only tensors are looked for under the known keys."""
    model = compressed()
    torch.save(content(model), "phase4.pt")
    held = torch.load("phase4.pt")
    pipeline = make_pipeline(held, use_bitnet=True, training_config={"epochs": 1})
    assert equal(state(pipeline.model), state(model))
    assert pipeline.trainer.model is pipeline.validator.model is pipeline.model
    assert pipeline.train().outcome == "completed"
    assert equal(state(load_phase4("phase4.pt")), state(model))
    controller = Phase5Controller(
        "data/train.json", output_dir="by_controller", training_config={"epochs": 1}
    )
    assert controller.validate_input(held)
    result = controller.execute(held)
    assert result.success, result.error


def test_a_file_of_something_else_says_which_keys_were_found(make_pipeline: Make) -> None:
    """Spec: J1"""
    with pytest.raises(ConfigError, match="its keys: epoch, weights") as caught:
        make_pipeline({"epoch": 3, "weights": None})
    assert "model_state_dict, state_dict, model_state, model" in str(caught.value)
    with pytest.raises(ConfigError, match=r"missing \['0\.bias'"):
        load_phase4({"0.weight": torch.zeros(1)}, network())


def test_the_trainer_of_a_grokfast_pipeline_is_a_grokfast_trainer(make_pipeline: Make) -> None:
    """Spec: E15, I9"""
    pipeline = make_pipeline(use_grokfast=True)
    trainer = pipeline.trainer
    assert isinstance(trainer, GrokfastTrainer)
    pipeline.setup()
    pipeline.train()
    assert pipeline.trainer is trainer
    assert trainer.optimizer is not None
    assert isinstance(PipelineConfig().to_dict(), dict)
