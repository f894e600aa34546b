"""A network of the user's own, named by its Python class or a function that makes it."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from forge_kernel.api import (
    ALLOW_CODE_HINT,
    Kind,
    LazyModule,
    PluginError,
    PluginInfo,
    Run,
    code_is_allowed,
    hookimpl,
)

if TYPE_CHECKING:
    import torch
    from safetensors import torch as safetensors_torch
    from torch import nn
else:
    torch = LazyModule("torch")
    nn = LazyModule("torch.nn")
    safetensors_torch = LazyModule("safetensors.torch")


@dataclass(frozen=True, kw_only=True)
class PythonClassConfig:
    """Which class, and what it begins with."""

    factory: Annotated[
        str,
        Meta(
            pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
            description="module:Class, or module:function; the module is imported, which runs it",
        ),
    ] = "torch.nn:Identity"
    arguments: Annotated[
        dict[str, bool | int | float | str | list[int] | None],
        Meta(description="of the class, by name; plain values"),
    ] = field(default_factory=dict)
    state: Annotated[
        str | None,
        Meta(
            description="safetensors file with the initial weights, relative to where the "
            "command runs; null: the class's own initialization",
            extra_json_schema={"format": "path"},
        ),
    ] = None


def origin(module: str) -> tuple[str, bool]:
    """Where a module comes from, without importing it, and whether that needs a permission.

    None is needed for a package that was installed, which has been trusted then, nor for a file
    below the folder that the command runs in.
    """
    top = module.partition(".")[0]
    if packages_distributions().get(top):
        return f"{module} of the installed package {top}", False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        return module, False  # there is nothing to run; `load_factory` says so
    place = spec.origin if spec.has_location else "".join(spec.submodule_search_locations or ())
    if not place:  # built in, or frozen
        return f"{module} of Python itself", True
    here = Path(place).resolve().is_relative_to(Path.cwd().resolve())
    return f"{module} from {place}", not here


def foreign_code(config: PythonClassConfig) -> list[tuple[str, bool]]:
    """What a configuration would run."""
    module, _, name = config.factory.partition(":")
    place, needs = origin(module)
    return [(f"{name} of the module {place}", needs)]


def load_factory(name: str) -> Callable[..., Any]:
    """The class or function that `module:name` means.

    Raises:
        PluginError: there is none; or it is no network's class, and nobody has allowed more.
    """
    module, _, inner = name.partition(":")
    try:
        result: Any = importlib.import_module(module)
        for part in inner.split("."):
            result = getattr(result, part)
    except (ImportError, AttributeError) as error:
        missing = getattr(error, "name", None)
        mend = "the module must lie where Python looks for modules (PYTHONPATH)"
        if isinstance(error, ModuleNotFoundError) and missing and not f"{module}.".startswith(
            f"{missing}."
        ):  # fmt: skip
            mend = f"{module} itself imports {missing}: install that, or leave the import out"
        raise PluginError(f"python_class: {name} cannot be imported ({error}); {mend}") from error
    if not callable(result):
        raise PluginError(f"python_class: {name} is a {type(result).__name__}, not a class")
    network = isinstance(result, type) and issubclass(result, nn.Module)
    if not network and not code_is_allowed():
        raise PluginError(
            f"python_class: {name} is not the class of a network (an nn.Module), and what else it "
            f"does nobody knows; {ALLOW_CODE_HINT}"
        )
    return result  # type: ignore[no-any-return]


class PythonClass:
    """A network of the user's own, named by its Python class or a function that makes it.

    Makes the network and loads its weights.

    With `state`, what the class draws for its own initial weights is not taken from the run's
    random stream, so that the run is that of a live model with these weights.
    """

    info = PluginInfo(
        name="python_class", kind=Kind.MODEL, config=PythonClassConfig, foreign_code=foreign_code
    )

    def __init__(self, config: PythonClassConfig) -> None:
        self.config = config

    @hookimpl
    def make_model(self, run: Run) -> nn.Module:
        """The network.

        Raises:
            PluginError: it cannot be made, is no network, or the weights are not its own.
        """
        del run
        config = self.config
        kept = torch.get_rng_state() if config.state is not None else None
        try:
            model = load_factory(config.factory)(**config.arguments)
        except TypeError as error:
            raise PluginError(f"python_class: {config.factory}: {error}") from error
        finally:
            if kept is not None:
                torch.set_rng_state(kept)
        if not isinstance(model, nn.Module):
            raise PluginError(
                f"python_class: {config.factory} gave a {type(model).__name__}, not an nn.Module"
            )
        if config.state is not None:
            self._load(model, Path(config.state))
        return model

    @staticmethod
    def _load(model: nn.Module, file: Path) -> None:
        if not file.is_file():
            raise PluginError(f"python_class: there is no file {file} (model.with.state)")
        try:
            _ = safetensors_torch.load_model(model, str(file), strict=True)
        except RuntimeError as error:
            raise PluginError(f"python_class: the weights of {file} do not fit: {error}") from error
