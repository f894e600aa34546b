"""Whatever the schema accepts, binds and runs: random settings for every first-party plugin."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from chats import add_tokenizer, write_chats
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import make_folder

from forge_kernel.config.schema import bind_config, config_schema
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.testing.trial import CLASSES, FEATURES, Trial

SMALL = 32  # sizes are kept small: the point is the meaning, not the memory
ARGUMENTS = {"in_features": FEATURES, "out_features": CLASSES}
DEAR = {
    "exporters.onnx",
    "exporters.gguf",
    "exporters.transformers",
    "model.transformers",
    "observers.mlflow",
    "observers.prometheus",
    "optimizer.adamw_8bit",
}  # seconds for each draw
SLOW = {"wrappers.compile"}  # compiling takes its time: the matrix of pipelines has it


NO_SUCH_PLACE = {
    "path", "teacher", "run", "state", "tracking_uri", "cache_dir", "tokenizer_file", "end_token",
}  # fmt: skip
"""Settings that name files, folders and what is in them."""


def values(schema: dict[str, Any], inner: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field's schema accepts; `inner`: the schemas that it may refer to."""
    if schema.get("$ref") == "#/$defs/use.schedule":
        return st.sampled_from([{"use": "constant"}, {"use": "linear_warmup"}])
    if schema.get("$ref") == "#/$defs/use.loss":
        return st.just({"use": "cross_entropy"})
    if schema.get("$ref") == "#/$defs/use.data":
        return st.just({"use": "file", "with": {"target": "class", "validation_split": 0.0}})
    if schema.get("$ref", "").endswith("Capability"):
        return st.just({"metric": "accuracy", "threshold": 0.1})
    if schema.get("$ref", "").removeprefix("#/$defs/") in inner:
        own = inner[schema["$ref"].removeprefix("#/$defs/")]["properties"]
        return st.fixed_dictionaries(
            {}, optional={name: values(field, inner) for name, field in own.items()}
        )
    if "anyOf" in schema:
        return st.one_of(*[values(branch, inner) for branch in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "boolean":
        return st.booleans()
    if kind == "null":
        return st.none()
    if kind == "integer":
        low = schema.get("minimum", 0)
        return st.integers(low, max(low, min(schema.get("maximum", SMALL), SMALL)))
    if kind == "number":
        low = schema.get("minimum", schema.get("exclusiveMinimum", -1.0))
        high = schema.get("maximum", schema.get("exclusiveMaximum", low + 2.0))
        return st.floats(
            low,
            high,
            exclude_min="exclusiveMinimum" in schema,
            exclude_max="exclusiveMaximum" in schema,
        ).filter(lambda number: number == 0 or abs(number) > 1e-6)
    if kind == "string":
        return st.just(schema.get("default", "accuracy"))
    if kind == "object":
        entries = values(schema["additionalProperties"], inner)
        return st.dictionaries(
            st.just("main"), entries, min_size=schema.get("minProperties", 0), max_size=1
        )
    if kind == "array":
        prefix = schema.get("prefixItems")
        if prefix:
            return st.tuples(*[values(item, inner) for item in prefix]).map(list)
        items = schema.get("items", {"type": "string"})
        if "Until" in items.get("$ref", ""):
            return st.lists(st.fixed_dictionaries({"step": st.integers(1, 9)}), max_size=2)
        return st.lists(values(items, inner), max_size=2)
    raise AssertionError(f"no values for {schema}")


def settings_of(config: type[Any], name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Any subset of a plugin's settings."""
    schema, inner = config_schema(config, name)
    fields = schema.get("properties", {})
    optional = {
        key: st.none()  # no file or run lies about for random settings
        if key in NO_SUCH_PLACE
        else values({**field, "default": field.get("default", "accuracy")}, inner)
        for key, field in fields.items()
    }
    if "phase" in optional:  # one that a clock has
        optional["phase"] = st.sampled_from([None, "consolidation"])
    if "phase_lambda" in optional:
        optional["phase_lambda"] = st.dictionaries(st.just("consolidation"), st.floats(0, 2))
    if "port" in optional:  # a free one: others belong to the machine
        optional["port"] = st.just(0)
    return st.fixed_dictionaries({}, optional=optional)


KEYS = [
    offer.key
    for offer in Catalog.installed().offers()
    if offer.distribution == "forge-kernel" and offer.key not in SLOW
]


@cache
def model_folder() -> str:
    """A tiny model folder, made once."""
    return str(make_folder(Path(tempfile.mkdtemp()) / "model", "llama"))


@cache
def chat_folder() -> str:
    """Conversations beside a tokenizer with a template, made once."""
    folder = add_tokenizer(Path(tempfile.mkdtemp()) / "chat")
    write_chats(folder / "chats.jsonl")
    return str(folder)


@cache
def picture_folder() -> str:
    """Pictures of two classes, made once."""
    from PIL import Image

    place = Path(tempfile.mkdtemp())
    for number in range(12):
        folder = place / f"class {number % 2}"
        folder.mkdir(exist_ok=True)
        Image.new("L", (4, 4), number * 20).save(folder / f"{number}.png")
    return str(place)


def draws(count: int) -> Any:
    """So many settings of a plugin; `make deep` looks for new ones, and twice as many."""
    health = list(HealthCheck)
    count *= 1 if settings.default.derandomize else 2
    return settings(max_examples=count, deadline=None, suppress_health_check=health)


@pytest.mark.parametrize("key", [key for key in KEYS if key not in DEAR])
@draws(4)
@given(data=st.data())
def test_settings_that_validate_bind_and_run_a_step(key: str, data: st.DataObject) -> None:
    a_step(key, data)


@pytest.mark.parametrize("key", sorted(DEAR))
@draws(2)
@given(data=st.data())
def test_settings_whose_plugin_takes_its_time_do_so_too(key: str, data: st.DataObject) -> None:
    a_step(key, data)


def a_step(key: str, data: st.DataObject) -> None:
    catalog = Catalog.installed()
    kind, _, name = key.partition(".")
    plugin = catalog.load(Kind(kind), name)
    chosen = data.draw(settings_of(plugin.info.config, key))
    if chosen.get("class_weights"):  # as many as the trial's data has classes
        chosen["class_weights"] = (chosen["class_weights"] * CLASSES)[:CLASSES]
    if key == "validators.bleu":  # the trial's windows are short
        chosen |= {"prompt": 1, "tokens": 2}
    if key == "gradients.grokfast" and chosen.get("adapt"):
        chosen["adapt"]["metric"] = "loss"  # the log has no accuracy of a lone filter
    if chosen.get("names"):  # of parameters
        chosen["names"] = ["*"]
    if key == "regularizers.delayed_compression" and "metric" in chosen:
        chosen["metric"] = "loss"
    if key == "wrappers.activation_checkpointing":
        chosen.pop("layers", None)  # names that the trial's model has not
    if key == "loss.distillation":
        for field in ("hidden", "relations", "cache", "cache_top_k"):
            chosen.pop(field, None)  # layers and classes that the trial's model has not
    if key == "wrappers.lora":  # layers of the trial's model
        chosen |= {"targets": ["0"], "also": []}
    if key == "wrappers.freeze":
        chosen |= {"parameters": ["0.*"], "but": []}
    if kind == "optimizer" and chosen.get("groups"):
        chosen["groups"] = [{**chosen["groups"][0], "parameters": ["*"]}]
    if key == "model.conv_net":  # the eight numbers of a trial's sample
        chosen |= {"shape": [1, 2, 4], "layout": "first", "widths": [4, 4]}
    if key == "data.image_folder":
        chosen |= {"path": picture_folder(), "file_column": None, "label_column": None}
    if key == "loss.language_model":
        chosen["head"] = "4"  # the last layer of the trial's model
    if key == "model.transformers":
        chosen |= {"path": model_folder(), "task": None}  # which the trial's loss is for
    if key == "data.chat":  # the trial's model takes neither packed sequences nor long ones
        place = Path(chat_folder())
        chosen |= {"path": str(place / "chats.jsonl"), "tokenizer": str(place), "template": None,
                   "packing": False, "sequence_length": 512, "validation_split": 0.1, "today": None}  # fmt: skip
    if key == "data.text":  # a share too small for one window is refused at the start
        chosen.pop("validation_split", None)
    if key == "model.python_class":  # one with weights, that fits the trial's data
        chosen |= {"factory": "torch.nn:Linear", "arguments": ARGUMENTS}
    if chosen.get("workers"):  # two do what many do
        chosen["workers"] = min(chosen["workers"], 2)
    if key == "data.file":  # the trial's loss is of classes
        chosen["target"] = "class"
        for field in ("input_column", "target_column", "trust_pickle"):
            chosen.pop(field, None)  # columns that the file has not, and a permission
        told = ("drop_last", "workers: ")  # what the file and the machine must have room for
    else:
        told = ()
    try:
        bind_config(plugin.info.config, chosen)
    except msgspec.ValidationError:
        return  # a contradiction between fields, told at check time
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": 2, "validate_every": 1, "non_finite": "skip", "max_seconds": 20.0}
        try:
            result = Trial(catalog, Kind(kind), name, chosen).run(Path(folder) / "run", **options)
        except PluginError as error:
            if any(words in str(error) for words in told):
                return
            raise
    assert result.outcome == "completed"
