"""A folder of the transformers library, looked at without torch and without that library.

What `config.json`, the headers of the weight files and the tokenizer say is enough to know the
architecture, the sizes and most of what can be wrong, before anything is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from forge_plugins.interchange.gguf_families import activation_of
from forge_plugins.interchange.safetensors_header import StoredTensor, read_header

Task = Literal[
    "causal_lm", "sequence_classification", "token_classification", "image_classification"
]
ENDINGS: Final[dict[Task, tuple[str, ...]]] = {
    "causal_lm": ("ForCausalLM", "LMHeadModel"),
    "sequence_classification": ("ForSequenceClassification",),
    "token_classification": ("ForTokenClassification",),
    "image_classification": ("ForImageClassification",),
}
"""How the names of a task's classes end."""
INDEX: Final = "model.safetensors.index.json"
WEIGHTS: Final = "model.safetensors"
PICKLED: Final = ("pytorch_model.bin.index.json", "pytorch_model.bin")
_EMBEDDINGS: Final = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|lm_head|tok_embeddings)\.weight$"
)
_HUB_NAME: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_OFFSET_POSITIONS: Final = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "longformer",
    "data2vec-text", "mpnet", "xmod", "ibert",
)  # fmt: skip
"""Families whose positions begin behind the padding token's."""


class FolderError(ValueError):
    """A folder is no model that can be loaded; the message says why and how to mend it."""


@dataclass(frozen=True)
class ModelFolder:
    """What is known of a model before it is loaded.

    Args:
        path: the folder.
        config: the content of `config.json`.
        task: what it is loaded for.
        tensors: of the safetensors files, by name; empty where there are none.
        pickled: whether the weights are in a pickled file, of which nothing is known.
    """

    path: Path
    config: Mapping[str, Any]
    task: Task
    tensors: Mapping[str, StoredTensor] = field(default_factory=dict)
    pickled: bool = False

    @property
    def architecture(self) -> str:
        """The class that wrote it, or an empty string."""
        return _architecture(self.config)

    @property
    def has_head(self) -> bool:
        """Whether the weights of the task's last layer are those of the folder."""
        return _task_of(self.architecture) == self.task

    @cached_property
    def text(self) -> Mapping[str, Any]:
        """The part of the configuration that is of the language model."""
        own = self.config.get("text_config")
        return own if isinstance(own, Mapping) else self.config

    @property
    def vocabulary(self) -> int | None:
        """Rows of the token embedding."""
        return _whole(self.text, "vocab_size")

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that there are positions for; None: any."""
        size = _whole(self.text, "max_position_embeddings", "n_positions", "max_seq_len")
        if size is not None and self.text.get("model_type") in _OFFSET_POSITIONS:
            return size - 1 - (_whole(self.text, "pad_token_id") or 0)
        return size

    @property
    def image(self) -> tuple[int, int, int] | None:
        """Channels, height and width of an image."""
        size = self.config.get("image_size")
        pair = size if isinstance(size, list) else [size, size]
        if len(pair) != 2 or not all(isinstance(side, int) for side in pair):
            return None
        return (_whole(self.config, "num_channels") or 3, *pair)

    @property
    def files(self) -> list[str]:
        """Names of the safetensors files."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def rows(self) -> tuple[set[int], set[int]]:
        """Columns (length of a row) and numbers of rows of the linear layers' weights.

        From the headers where there are any, else from the configuration's sizes.
        """
        transposed = self.text.get("model_type") in ("gpt2", "gpt-sw3", "openai-gpt", "imagegpt")
        columns: set[int] = set()
        rows: set[int] = set()
        for name, tensor in self.tensors.items():
            if len(tensor.shape) != 2 or not name.endswith(".weight") or _is_outer(name):
                continue
            out, width = tensor.shape[::-1] if transposed else tensor.shape
            columns.add(width)
            rows.add(out * 4 if tensor.dtype == "U8" else out)
        if not columns:
            names = (
                ("hidden_size", "n_embd", "d_model"),
                ("intermediate_size", "n_inner", "ffn_dim"),
            )
            sizes = {size for keys in names if (size := _whole(self.text, *keys)) is not None}
            columns, rows = sizes, set(sizes)
        return columns, rows


def _is_outer(name: str) -> bool:
    """Whether a weight is of an embedding or of what makes the outputs, which are not quantized."""
    outer = r"(embed|wte|wpe|lm_head|classifier|score|position|cls\.|router|shared\.)"
    return re.search(outer, name) is not None


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _task_of(architecture: str) -> Task | None:
    return next((task for task, ends in ENDINGS.items() if architecture.endswith(ends)), None)


def read_model_folder(path: str, task: Task | None = None, *, random: bool = False) -> ModelFolder:
    """Look at a folder, as far as that needs no torch.

    Args:
        path: the folder.
        task: what it is for; None: what its architecture is for.
        random: the weights are not read.

    Raises:
        FolderError: it is no such folder, or its parts do not fit each other.
    """
    folder = Path(path)
    try:
        _need_folder(path, folder)
        config = _read_config(folder)
        chosen = task or _need_task(folder, config)
        if random:
            return ModelFolder(folder, config, chosen)
        tensors, pickled = _read_tensors(folder)
        result = ModelFolder(folder, config, chosen, tensors, pickled)
        _check_vocabulary(result)
    except OSError as error:
        raise FolderError(f"{path} cannot be read: {error.strerror or error}") from error
    return result


def _need_folder(path: str, folder: Path) -> None:
    if folder.is_file():
        raise FolderError(f"{path} is a file: name the folder that holds config.json and weights")
    if folder.is_dir():
        return
    if _HUB_NAME.fullmatch(path):
        here = path.rpartition("/")[2]
        raise FolderError(
            f"there is no folder {path}, and models are not fetched by name: if it is one of the "
            f"Hugging Face Hub, make a folder of it (hf download {path} --local-dir {here}) and "
            f"set path: {here}"
        )
    raise FolderError(f"there is no folder {path}")


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise FolderError(
                f"{folder} holds an adapter, not a model: merge it into its model first "
                "(merge_and_unload of peft) and save that"
            )
        raise FolderError(f"{folder} has no config.json: it is no model folder of transformers")
    config = _read_json(file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise FolderError(f"{file} names no model_type: it is no configuration of transformers")
    return config


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        place = f"{file}:{error.lineno}:{error.colno}"
        raise FolderError(f"{place} is no JSON ({error.msg}): copy the file again") from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{file} is no UTF-8 text: copy the file again") from error


def _need_task(folder: Path, config: Mapping[str, Any]) -> Task:
    architecture = _architecture(config)
    task = _task_of(architecture)
    if task is None:
        raise FolderError(
            f"{folder / 'config.json'} names the architecture {architecture or '(none)'}, which is "
            f"for none of {', '.join(ENDINGS)}: set task to the one that is meant"
        )
    return task


def _read_tensors(folder: Path) -> tuple[dict[str, StoredTensor], bool]:
    """The tensors of all safetensors files, or whether there is a pickled file instead."""
    try:
        if (folder / INDEX).is_file():
            return _sharded(folder), False
        if (folder / WEIGHTS).is_file():
            return read_header(folder / WEIGHTS), False
    except FolderError:
        raise
    except ValueError as error:
        raise FolderError(f"{folder}: {error}") from error
    if any((folder / name).is_file() for name in PICKLED):
        return {}, True
    raise FolderError(
        f"{folder} has no weights ({WEIGHTS}, or {INDEX} and the files that it names): copy them "
        "too, or set random: true"
    )


def _sharded(folder: Path) -> dict[str, StoredTensor]:
    index = _read_json(folder / INDEX)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise FolderError(f"{folder / INDEX} has no weight_map: copy the file again")
    tensors: dict[str, StoredTensor] = {}
    for name in sorted(set(map(str, places.values()))):
        if Path(name).name != name:
            raise FolderError(f"{folder / INDEX} names {name}, which lies outside of the folder")
        if not (folder / name).is_file():
            raise FolderError(
                f"{folder / INDEX} names {name}, which is not there: copy all shards of the model"
            )
        for key, tensor in read_header(folder / name).items():
            if places.get(key) != name:
                raise FolderError(
                    f"{folder}: {name} holds {key}, which {INDEX} "
                    f"{'looks for in ' + str(places[key]) if key in places else 'does not name'}: "
                    "the shards are of different models; copy all of them from one place"
                )
            tensors[key] = tensor
    missing = sorted(places.keys() - tensors.keys())
    if missing:
        raise FolderError(
            f"{folder}: {places[missing[0]]} does not hold {missing[0]}, as {INDEX} says: the "
            "shards are of different models; copy all of them from one place"
        )
    return tensors


def _check_vocabulary(folder: ModelFolder) -> None:
    """Refuse an embedding, or a tokenizer, that is not as large as the configuration says."""
    size = folder.vocabulary
    if size is None or folder.task == "image_classification":
        return
    for name, tensor in folder.tensors.items():
        if _EMBEDDINGS.search(name) and tensor.shape[0] != size:
            raise FolderError(
                f"{folder.path}: {name} has {tensor.shape[0]} rows, and config.json a vocabulary "
                f"of {size}: vocab_size must be what the weights have (resize_token_embeddings of "
                "transformers sets both)"
            )


def largest_token(folder: Path) -> int | None:
    """The largest token that a folder's `tokenizer.json` gives; None where there is none.

    Raises:
        FolderError: the file is broken.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = _read_json(file)
    try:
        known = content["model"].get("vocab", ())
        ids = list(known.values()) if isinstance(known, dict) else [len(known) - 1]
        ids += [entry["id"] for entry in content.get("added_tokens", ())]
        return max(map(int, ids), default=None)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(f"{file} is no tokenizer of the tokenizers library") from error


_LIKE_BITNET: Final = ("llama", "mistral", "qwen2")
"""Models that are BitNet's but for the norms."""
_OF_BITNET: Final = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    "attention_dropout", "rope_parameters", "rope_theta", "rope_scaling",
)  # fmt: skip


def check_sub_norms(folder: ModelFolder) -> None:
    """Refuse a model that `BitNetForCausalLM` is not with its norms left out.

    That is a Llama with two norms more in each block (SubLN, Wang et al. 2022, arXiv 2210.06423;
    BitNet, arXiv 2310.11453): before the output of the attention and before the perceptron's.

    Raises:
        FolderError: what it has otherwise.
    """
    config, path = folder.config, folder.path
    kind = str(config.get("model_type", "")).replace("-", "_")
    if kind == "bitnet":
        raise FolderError(f"{path} is BitNet's and has its norms already: take sub_norms out")
    if kind not in _LIKE_BITNET or folder.task != "causal_lm":
        raise FolderError(
            f"{path} is of {folder.architecture}, which BitNetForCausalLM is not with its norms "
            f"left out (language models of {', '.join(_LIKE_BITNET)} are): set norms by the "
            "quantizer (quantizer.with.sub_norm), which packed_ternary and state_dict export"
        )
    faults = [what for wrong, what in _sub_norm_faults(kind, config) if wrong]
    if faults:
        raise FolderError(
            f"{path} has {'; '.join(faults)}, which BitNetForCausalLM has not: set norms by the "
            "quantizer (quantizer.with.sub_norm), which packed_ternary and state_dict export"
        )


def _sub_norm_faults(kind: str, config: Mapping[str, Any]) -> list[tuple[bool, str]]:
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    head = config.get("head_dim")
    wide = None not in (heads, width, head) and heads * head != width  # type: ignore[operator]
    window = config.get("sliding_window")
    slides = bool(window) and (kind != "qwen2" or bool(config.get("use_sliding_window")))
    return [
        (wide, f"{heads} heads of {head} for a width of {width}"),
        (bool(config.get("mlp_bias")), "biases in its perceptron (mlp_bias)"),
        (slides, f"a sliding window of {window} tokens"),
        (
            config.get("quantization_config") is not None,
            "quantized weights already (quantization_config)",
        ),
    ]


def bitnet_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a `BitNetConfig` is made with.

    Args:
        config: of the model without the norms, all its fields.
    """
    biased = config.get("model_type") == "qwen2" or bool(config.get("attention_bias"))
    return {
        **{name: config[name] for name in _OF_BITNET if config.get(name) is not None},
        "hidden_act": activation_of(config),
        "attention_bias": biased,
    }
