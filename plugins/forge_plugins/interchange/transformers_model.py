"""A model of the transformers library from its folder, without a trace in the process."""

from __future__ import annotations

import inspect
import logging
import random as python_random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from forge_plugins.interchange.model_folder import (
    FolderError,
    ModelFolder,
    Task,
    bitnet_fields,
)

AUTO_CLASSES: Final[dict[Task, str]] = {
    "causal_lm": "AutoModelForCausalLM",
    "sequence_classification": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "image_classification": "AutoModelForImageClassification",
}
_LOOKED_AT: Final = 2**22
"""Numbers that are looked at together for one that is not finite."""


class LoadedModel(NamedTuple):
    """A model, and what of it the folder did not have.

    Args:
        model: on the CPU, in evaluation mode.
        drawn: names of the tensors that were drawn, since the folder's task is another.
        left: names of the folder's tensors that the model has no place for, for the same reason.
    """

    model: nn.Module
    drawn: list[str]
    left: list[str]


class InputForm:
    """Brings a batch's inputs into the form that a model reads; a hook before its forward pass.

    Args:
        image: channels, height and width: images come as one row of numbers each. None: tokens.
        longest: tokens that there are positions for; None: any number.
        takes_cache: whether the model would keep keys and values for a next token, which nobody
            asks for in training.
    """

    def __init__(
        self, image: tuple[int, int, int] | None, longest: int | None, *, takes_cache: bool
    ) -> None:
        self.image, self.longest, self.takes_cache = image, longest, takes_cache

    def __call__(
        self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the forward pass, by place and by name.

        Raises:
            ValueError: a sequence is longer than there are positions for.
        """
        del module
        if given and isinstance(given[0], Tensor):
            given = (self._formed(given[0]), *given[1:])
        for name in ("input_ids", "pixel_values"):
            if isinstance(named.get(name), Tensor):
                named[name] = self._formed(named[name])
        if self.takes_cache:
            named.setdefault("use_cache", False)
        return given, named

    def _formed(self, inputs: Tensor) -> Tensor:
        if self.image is not None:
            return inputs.reshape(-1, *self.image) if inputs.ndim == 2 else inputs
        if self.longest is not None and inputs.ndim == 2 and inputs.shape[1] > self.longest:
            raise ValueError(
                f"sequences of {inputs.shape[1]} tokens for a model with {self.longest} positions"
            )
        return inputs


@contextmanager
def _without_trace(seed: int) -> Iterator[None]:
    """Draw by a seed; random streams, default dtype and the library's messages stay as before."""
    from transformers.utils import logging as theirs

    loud = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loud]
    for logger in loud:  # of what the library looks for, and does not need
        logger.setLevel(logging.ERROR)
    dtype, level = torch.get_default_dtype(), theirs.get_verbosity()
    bars = theirs.is_progress_bar_enabled()
    of_python, of_numpy = python_random.getstate(), np.random.get_state()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.compiler.set_stance("force_eager"),  # its unpacking is compiled: seconds for once
        ):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        for logger, before in zip(loud, levels, strict=True):
            logger.setLevel(before)
        torch.set_default_dtype(dtype)
        python_random.setstate(of_python)
        np.random.set_state(of_numpy)
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def load_model(
    folder: ModelFolder,
    *,
    seed: int,
    random: bool = False,
    attention: str = "sdpa",
    dtype: str = "float32",
    classes: int | None = None,
    sub_norms: bool = False,
) -> LoadedModel:
    """Load a model, or draw a new one of the same configuration.

    Weights that are kept as they are stay mapped from their files until they are written to, so
    that loading needs no second copy of them.

    Args:
        folder: looked at already.
        seed: of what is drawn.
        random: draw all weights.
        attention: the library's name of the attention's arithmetic.
        dtype: of the weights, or `auto`: as in the files.
        classes: of the data; what a head that is drawn has.
        sub_norms: make it BitNet's, with norms that are new (see `check_sub_norms`).

    Raises:
        FolderError: the library does not know the architecture, the tensors are not those of the
            model, or one holds a number that is not finite.
    """
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", kind)  # of optional parts that the library looks for
        import transformers
    with _without_trace(seed):
        config = _read_config(transformers, folder, classes if random else None)
        auto = getattr(transformers, AUTO_CLASSES[folder.task])
        options: dict[str, Any] = {"attn_implementation": attention, "trust_remote_code": False}
        if dtype != "auto":
            options["dtype"] = getattr(torch, dtype)
        if random and sub_norms:
            config = _bitnet_config(transformers, config)
        if random:
            return LoadedModel(_drawn(auto, folder, config, options).eval(), [], [])
        if not folder.has_head and classes is not None and folder.task != "causal_lm":
            config.num_labels = classes
        loaded = _loaded(auto, folder, config, options)
        return _with_sub_norms(transformers, loaded.model, attention) if sub_norms else loaded


def _bitnet_config(transformers: Any, config: Any) -> Any:
    """The configuration of the same model with the norms."""
    made = transformers.BitNetConfig(**bitnet_fields(config.to_dict()))
    made._name_or_path = config._name_or_path
    return made


def _with_sub_norms(transformers: Any, plain: Any, attention: str) -> LoadedModel:
    """BitNet's model with the very parameters of one that lacks its norms; these begin at 1.

    So does a bias that the plain model does not have, at 0.
    """
    config = _bitnet_config(transformers, plain.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, dtype=plain.dtype
        )
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    state = dict(plain.state_dict(keep_vars=True))
    drawn = []
    for name, parameter in model.named_parameters():
        if name not in state:
            first = 0.0 if name.endswith("bias") else 1.0
            state[name] = nn.Parameter(
                torch.full(parameter.shape, first, dtype=parameter.dtype, device="cpu")
            )
            drawn.append(name)
    model.load_state_dict(state, assign=True)  # what is tied is one parameter here too
    model.generation_config = plain.generation_config
    return LoadedModel(model.eval(), drawn, [])


def _read_config(transformers: Any, folder: ModelFolder, classes: int | None) -> Any:
    kind = folder.config["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        own = " (its code lies in the folder, and is never run)" * ("auto_map" in folder.config)
        raise FolderError(
            f"{folder.path}: transformers {transformers.__version__} knows no model_type {kind}"
            f"{own}: install a version that does, or choose another model"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise FolderError(f"{folder.path / 'config.json'}: {_words(error)}") from error
    if classes is not None and folder.task != "causal_lm":
        config.num_labels = classes
    return config


def _drawn(auto: Any, folder: ModelFolder, config: Any, options: dict[str, Any]) -> nn.Module:
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # new weights are on no levels
    options.setdefault("dtype", getattr(config, "dtype", None) or torch.float32)
    try:
        model: nn.Module = auto.from_config(config, **options)
    except Exception as error:
        raise FolderError(_not_loaded(folder, error)) from error
    return model


def _loaded(auto: Any, folder: ModelFolder, config: Any, options: dict[str, Any]) -> LoadedModel:
    if not hasattr(config, "quantization_config"):
        options["ignore_mismatched_sizes"] = True  # they are named with all others
    options.setdefault("dtype", "auto")
    try:
        model, account = auto.from_pretrained(
            folder.path, config=config, output_loading_info=True, local_files_only=True,
            weights_only=True, use_safetensors=not folder.pickled, **options,
        )  # fmt: skip
    except UnpicklingError as error:
        raise FolderError(_not_only_tensors(folder)) from error
    except Exception as error:
        if "weights_only" in str(error) or isinstance(error.__cause__, UnpicklingError):
            raise FolderError(_not_only_tensors(folder)) from error
        raise FolderError(_not_loaded(folder, error)) from error
    drawn, left = (sorted(map(str, account[key])) for key in ("missing_keys", "unexpected_keys"))
    _check_account(folder, account, drawn, left)
    for name, tensor in model.named_parameters():
        if not _is_finite(tensor.detach()):
            raise FolderError(
                f"{folder.path}: {name} holds a number that is not finite (NaN or infinity): the "
                "model is broken; take an earlier checkpoint of it"
            )
    return LoadedModel(model, drawn, left)


def _check_account(
    folder: ModelFolder, account: Mapping[str, Any], drawn: list[str], left: list[str]
) -> None:
    """Refuse tensors that are not those of the model.

    Raises:
        FolderError: one has another shape; or the folder is of the task that it is loaded for, and
            one is missing or has no place.
    """
    wrong = sorted(map(str, account.get("mismatched_keys") or ()))
    if wrong:
        raise FolderError(f"{folder.path}: the shape in the file is not config.json's: {wrong[0]}")
    errors = list(account.get("error_msgs") or ())
    if errors:
        raise FolderError(f"{folder.path}: {errors[0]}")
    if folder.has_head and drawn:
        raise FolderError(
            f"{folder.path}: {_shown(drawn)} of {folder.architecture} is not in the weights: copy "
            "all files of the model, or set task to what they are of"
        )
    if folder.has_head and left:
        raise FolderError(
            f"{folder.path}: {_shown(left)} is in the weights, and {folder.architecture} with this "
            "config.json has no place for it: the two are of different models"
        )
    if not left and not drawn:
        return
    known = len(folder.tensors)
    if known and len(left) == known:
        raise FolderError(f"{folder.path}: none of its weights is one of {folder.task}'s model")


def _shown(names: list[str]) -> str:
    return f"{names[0]} (and {len(names) - 1} more)" if len(names) > 1 else names[0]


def _not_only_tensors(folder: ModelFolder) -> str:
    return (
        f"{folder.path}: its pickled weights hold more than tensors, and are not run: save the "
        "model as safetensors where you trust it (save_pretrained)"
    )


def _not_loaded(folder: ModelFolder, error: BaseException) -> str:
    if "attention implementation" in str(error):
        return (
            f"{folder.path}: {folder.architecture} has no fused attention in this version of "
            "transformers: set attention: eager"
        )
    return f"{folder.path}: transformers cannot load it: {_words(error)}"


def _words(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


def _is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; looked at in parts, which need no memory to speak of."""
    if not tensor.is_floating_point():
        return True
    parts = torch.split(tensor.reshape(-1), _LOOKED_AT)
    return all(bool(torch.isfinite(part.sum())) or bool(part.isfinite().all()) for part in parts)


def prepare_inputs(model: nn.Module, folder: ModelFolder) -> None:
    """Let a model take the batches of a run: see `InputForm`.

    A classifier of sequences that ends with a decoder reads the last token where no padding token
    is known.

    Args:
        model: of the folder.
        folder: looked at already.
    """
    named = inspect.signature(model.forward).parameters
    form = InputForm(
        folder.image if folder.task == "image_classification" else None,
        None if folder.task == "image_classification" else folder.longest,
        takes_cache="use_cache" in named,
    )
    model.register_forward_pre_hook(form, with_kwargs=True)
    config: Any = model.config
    if folder.task == "sequence_classification" and config.get_text_config().pad_token_id is None:
        config.get_text_config().pad_token_id = -1
