"""A model of the transformers library, from its folder."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, Literal

from msgspec import Meta

from forge_kernel.api import (
    DataSpec,
    Fault,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    hookimpl,
    stream_seed,
)

if TYPE_CHECKING:
    from torch import nn

    from forge_plugins.interchange import gguf_families, model_folder, transformers_model
else:
    gguf_families = LazyModule("forge_plugins.interchange.gguf_families")
    model_folder = LazyModule("forge_plugins.interchange.model_folder")
    transformers_model = LazyModule("forge_plugins.interchange.transformers_model")


PACKS: Final = (
    "llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3", "gpt2", "bitnet", "mixtral",
)  # fmt: skip
"""Architectures whose attention ends where `position_ids` begins anew: those that a test compares
with sequences one by one. Others (recurrent ones, ALiBi) would see their neighbours."""


@dataclass(frozen=True, kw_only=True)
class TransformersConfig:
    """Which model, what it is for, and how its weights begin."""

    path: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        Meta(
            description="the model's folder, with config.json and safetensors files, relative to "
            "where the command runs; it must be given",
            extra_json_schema={"format": "path"},
        ),
    ] = None
    task: Annotated[
        Literal[
            "causal_lm", "sequence_classification", "token_classification", "image_classification"
        ]
        | None,
        Meta(
            description="what the model is for; null: what its architecture is for; another one "
            "gets a new head, drawn from the run's seed, with as many classes as the data"
        ),
    ] = None
    random: Annotated[
        bool,
        Meta(description="draw new weights from the run's seed: of the folder only config.json is "
             "read"),
    ] = False  # fmt: skip
    sub_norms: Annotated[
        bool,
        Meta(description="set BitNet's norms before the outputs of attention and perceptron "
             "(SubLN) of a Llama, Mistral or Qwen 2, which makes it a BitNetForCausalLM"),
    ] = False  # fmt: skip
    attention: Annotated[
        Literal["sdpa", "eager"],
        Meta(description="the attention's arithmetic: torch's fused one, or the plain one"),
    ] = "sdpa"
    dtype: Annotated[
        Literal["float32", "bfloat16", "auto"],
        Meta(description="of the weights that are trained; auto: as in the files, which for half "
             "precision loses small updates (run.precision makes the products fast)"),
    ] = "float32"  # fmt: skip


def _need_folder(config: TransformersConfig) -> model_folder.ModelFolder:
    """The folder that settings name.

    Raises:
        PluginError: there is none, or it is wrong.
    """
    if config.path is None:
        hint = "model: {use: transformers, with: {path: FOLDER}}"
        raise PluginError([Fault("it needs the path of a model's folder", "path", hints=(hint,))])
    try:
        folder = model_folder.read_model_folder(config.path, config.task, random=config.random)
        if config.sub_norms:
            model_folder.check_sub_norms(folder)
        return folder
    except model_folder.FolderError as error:
        raise PluginError([Fault(str(error), "path")]) from error


def required(config: TransformersConfig) -> tuple[str, ...]:
    """What the data must be.

    Raises:
        PluginError: the folder is wrong.
    """
    folder = _need_folder(config)
    return ("data:features",) if folder.task == "image_classification" else ("data:tokens",)


def provided(config: TransformersConfig) -> tuple[str, ...]:
    """What exporters need to know before anything is built."""
    if config.path is None:
        return ()
    try:
        folder = _need_folder(config)
    except PluginError:  # `required` says why: no exporter need complain as well
        return (
            "model:transformers", "model:llama_cpp", "model:rows_of_256", "model:columns_of_4",
        )  # fmt: skip
    kind = str(folder.text.get("model_type", "")).replace("-", "_")
    about = folder.config
    if config.sub_norms:
        activation = gguf_families.activation_of(about)
        kind, about = "bitnet", {"model_type": "bitnet", "hidden_act": activation}
    result = ["model:transformers", f"model:transformers_{kind}"]
    if folder.task == "causal_lm" and kind in PACKS:
        result.append("model:packed_sequences")
    if folder.task == "causal_lm" and gguf_families.is_computed(about):
        result.append("model:llama_cpp")
    columns, rows = folder.rows()
    if columns and not any(size % 256 for size in columns):
        result.append("model:rows_of_256")  # of the weights: their second dimension
    if rows and not any(size % 4 for size in rows):
        result.append("model:columns_of_4")  # their first
    return tuple(result)


class Transformers:
    """A model of the transformers library, from its folder.

    Loads what `AutoModelForCausalLM`, `...ForSequenceClassification`, `...ForTokenClassification`
    or `...ForImageClassification` load from there, also packed and online BitNet, which a quantizer
    trains on from its own levels. Models are not fetched by name, and code in the folder is not
    run. Images come as rows of numbers (channels, height, width).
    """

    info = PluginInfo(
        name="transformers",
        kind=Kind.MODEL,
        config=TransformersConfig,
        provides=provided,
        requires=required,
        packages={"transformers": "pip install 'forge-kernel[transformers]'"},
    )

    def __init__(self, config: TransformersConfig) -> None:
        self.config = config

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network.

        Raises:
            PluginError: the folder's parts do not fit each other, or not the data.
        """
        config, spec = self.config, run.data.spec
        folder = _need_folder(config)
        try:
            loaded = transformers_model.load_model(
                folder,
                seed=stream_seed(run.seed, "model"),
                random=config.random,
                attention=config.attention,
                dtype=config.dtype,
                classes=spec.classes,
                sub_norms=config.sub_norms,
            )
            _check_data(folder, loaded.model, spec)
        except ValueError as error:
            raise PluginError(f"model.transformers: {error}") from error
        transformers_model.prepare_inputs(loaded.model, folder)
        _emit_notices(run, folder, loaded)
        return loaded.model


def _check_data(folder: model_folder.ModelFolder, model: nn.Module, spec: DataSpec) -> None:
    """Refuse data that the model has no place for.

    Raises:
        ValueError: it has tokens, positions, classes or pixels that the model has not.
    """
    size, longest = folder.vocabulary, folder.longest
    if folder.task == "image_classification":
        image = folder.image
        pixels = None if image is None else image[0] * image[1] * image[2]
        if None not in (spec.features, pixels) and spec.features != pixels:
            raise ValueError(
                f"{folder.path} reads images of {' x '.join(map(str, image or ()))} = {pixels} "
                f"numbers, and the data has {spec.features} in a sample"
            )
    else:
        tokens = spec.vocabulary
        beyond = size is not None and tokens is not None and tokens > size
        if beyond and model_folder.largest_token(folder.path) != (tokens or 0) - 1:
            raise ValueError(  # its own tokenizer may have names for what is no token of a text
                f"the data has {tokens} tokens, and {folder.path} a vocabulary of {size}: take "
                "the tokenizer.json of the model's folder"
            )
        if longest is not None and spec.sequence is not None and spec.sequence > longest:
            raise ValueError(
                f"the data has sequences of {spec.sequence} tokens, and {folder.path} has "
                f"{longest} positions: shorten the data's sequence_length"
            )
    labels = size if folder.task == "causal_lm" else int(model.config.num_labels)  # type: ignore[arg-type, union-attr]
    if folder.task != "causal_lm" and spec.classes is not None and spec.classes > (labels or 0):
        raise ValueError(
            f"the data has {spec.classes} classes, and the head of {folder.path} {labels}: give "
            "data of its classes, or name the folder of a model without this head and set task"
        )


def _emit_notices(
    run: Run, folder: model_folder.ModelFolder, loaded: transformers_model.LoadedModel
) -> None:
    """Say what the user may not expect of the folder."""
    if "auto_map" in folder.config:
        _LOG.warning(
            "transformers: the code in %s (auto_map) is not run: the library's own %s is taken",
            folder.path, type(loaded.model).__name__,
        )  # fmt: skip
    if loaded.drawn and not loaded.left and folder.has_head:
        run.emit_event(
            "sub_norms",
            f"{folder.path} is a BitNetForCausalLM now: {len(loaded.drawn)} tensors are new, its "
            "norms at 1.",
            new=len(loaded.drawn),
        )
    elif loaded.drawn or loaded.left:
        run.emit_event(
            "started_from",
            f"{folder.path} is of {folder.architecture}: {len(loaded.drawn)} tensors are new, "
            f"drawn from the run's seed, and {len(loaded.left)} of the folder are left out.",
            new=len(loaded.drawn),
            left_out=len(loaded.left),
        )


_LOG: Final = logging.getLogger("forge_plugins.transformers")
