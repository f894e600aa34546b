"""Models of Phase 4 files, and a live model as something that a pipeline file can name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from forge_kernel.api import PluginError
from forge_kernel.embedding import ConfigError, Fault
from forge_plugins.interchange.safetensors_state import read_state
from forge_plugins.models.python_class import load_factory

STATES: Final = ("model_state_dict", "state_dict", "model_state", "model")
"""Keys under which a Phase 4 dictionary keeps its tensors."""


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(item, Tensor) for item in value.values())
    )


def state_in(content: Any) -> Mapping[str, Tensor] | None:
    """The tensors of a Phase 4 file's content: a bare state, or one under a known key."""
    if _is_state(content):
        result: Mapping[str, Tensor] = content
        return result
    if isinstance(content, Mapping):
        for key in STATES:
            if _is_state(content.get(key)):
                inner: Mapping[str, Tensor] = content[key]
                return inner
    return None


def module_in(content: Any) -> nn.Module | None:
    """The whole module of a Phase 4 file's content: itself, or one under a known key."""
    if isinstance(content, nn.Module):
        return content
    if not isinstance(content, Mapping):
        return None
    result = [content[key] for key in STATES if isinstance(content.get(key), nn.Module)]
    return result[0] if result else None


def needs_model(content: Any) -> nn.Module:
    """The model of what a program hands in.

    Raises:
        ConfigError: it carries no architecture; with the keys found, and what is needed.
    """
    module = module_in(content)
    if module is not None:
        return module
    if not isinstance(content, Mapping):
        raise ConfigError(f"model is a {type(content).__name__}: a torch.nn.Module is needed")
    keys = [str(key) for key in content]
    shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
    if state_in(content) is None:
        hint = f"a Phase 4 dictionary has its tensors, or the module, under {', '.join(STATES)}"
        message = f"model is a dictionary without weights; its keys: {shown}"
        raise ConfigError([Fault(message, hints=(hint,))])
    hint = "make the model first, then: load_phase4(content, model), and hand that model in"
    message = f"model is weights without an architecture; its keys: {shown}"
    raise ConfigError([Fault(message, hints=(hint, "or save the whole module in Phase 4"))])


def load_phase4(content: Any, model: nn.Module | None = None) -> nn.Module:
    """The model of a Phase 4 file, however it was saved.

    Args:
        content: what `torch.load` gave, or the path of a `.pt` or `.safetensors` file.
        model: to load into, where the content has no architecture of its own; changed in place,
            half-precision weights become those of the model's own type.

    Raises:
        ConfigError: there is no model to load into, or the weights are of another one.
    """
    if isinstance(content, str | Path):
        content = _read(Path(content))
    module = module_in(content)
    if module is not None:
        return module
    state = state_in(content)
    if model is None or state is None:
        return needs_model(content)
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign:
        raise ConfigError(
            f"the weights are of another model: found {sorted(state)[:5]}, needed "
            f"{sorted(own)[:5]}; missing {missing[:5]}, not known {foreign[:5]}"
        )
    wrong = [name for name in own if own[name].shape != state[name].shape]
    if wrong:
        shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in wrong[:3]]
        raise ConfigError(f"the weights are of another shape: {', '.join(shapes)}")
    model.load_state_dict(dict(state))
    return model


def _read(file: Path) -> Any:
    """A file's content, by the safe loaders."""
    if not file.is_file():
        raise ConfigError(f"there is no file {file}")
    if file.suffix == ".safetensors":
        return read_state(file)
    return torch.load(file, map_location="cpu")


def _named_modules(model: nn.Module) -> list[tuple[str, str]]:
    return [(name, type(module).__qualname__) for name, module in model.named_modules()]


def written_model(
    model: nn.Module, file: Path | None, factory: str | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings of the kernel's `model.python_class` for a live model; its weights are saved.

    Args:
        model: as it is.
        file: of the pipeline, beside which the weights are written; None: they are not.
        factory: `module:Class`; the model's own class otherwise.
        arguments: of the factory.

    Raises:
        ConfigError: another process could not make this model from these names.
    """
    cls = type(model)
    named = factory or f"{cls.__module__}:{cls.__qualname__}"
    mend = (
        "move the class to a module of its own and give to_yaml(factory='module:Class', "
        "arguments={...}); a function that makes the model is fine too"
    )
    if factory is None and (cls.__module__ == "__main__" or "<locals>" in cls.__qualname__):
        raise ConfigError([Fault(f"{named} cannot be imported elsewhere", hints=(mend,))])
    state = torch.get_rng_state()
    try:
        importlib.invalidate_caches()
        again = load_factory(named)(**arguments)
    except (PluginError, TypeError, ValueError) as error:
        fault = Fault(f"the model cannot be made by {named}: {error}", hints=(mend,))
        raise ConfigError([fault]) from error
    finally:
        torch.set_rng_state(state)
    if not isinstance(again, nn.Module) or _named_modules(again) != _named_modules(model):
        message = f"{named} with {dict(arguments)} makes another network than this one"
        raise ConfigError([Fault(message, hints=(mend,))])
    shapes = [{n: v.shape for n, v in item.state_dict().items()} for item in (again, model)]
    if shapes[0] != shapes[1]:
        message = f"{named} with {dict(arguments)} makes a network of other sizes"
        raise ConfigError([Fault(message, hints=(mend,))])
    settings: dict[str, Any] = {"factory": named, "arguments": dict(arguments)}
    if file is not None:
        weights = file.with_suffix(".safetensors")
        file.parent.mkdir(parents=True, exist_ok=True)
        save_model(model, str(weights))
        settings["state"] = str(weights)
    return settings
