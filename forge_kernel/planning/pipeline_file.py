"""From a file to a checked pipeline: read, lay over, check, bind. Imports no torch."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path as FilePath
from typing import Any, Final

import msgspec

from forge_kernel.config.check import check, plugin_at
from forge_kernel.config.document import Document, Path, look_up, show_path, show_word, walk
from forge_kernel.config.layers import apply_settings, read_layers, without_nulls
from forge_kernel.config.pipeline import PipelineConfig, notes_in, takes_many, uses_in
from forge_kernel.config.schema import bind_config, config_data, config_schema, pipeline_schema
from forge_kernel.config.spelling import did_you_mean
from forge_kernel.config.use import Use
from forge_kernel.contract.plugin import Kind, PluginInfo
from forge_kernel.contract.plugin_rules import PluginRules
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError, Fault, Mark, PluginError
from forge_kernel.planning.catalog import Catalog

PIPELINES: Final = "forge_kernel.pipelines"
MAX_NESTING: Final = 8


def shipped_pipelines() -> dict[str, FilePath]:
    """The pipelines that installed distributions ship, by name; in folders, as `folder/name`."""
    result: dict[str, FilePath] = {}
    for entry in entry_points(group=PIPELINES):
        package, _, folder = entry.value.partition(":")[0].rpartition(".")
        spec = find_spec(package) if package else None
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            top = _in_checkout(FilePath(place), folder)
            for file in sorted(top.rglob("*.yaml")):
                result.setdefault(file.relative_to(top).with_suffix("").as_posix(), file)
    return result


def _in_checkout(package: FilePath, folder: str) -> FilePath:
    """A folder in a package; of one that is installed editable, at the root of its checkout."""
    root = package.parent.parent
    if (package / folder).is_dir() or not (root / "pyproject.toml").is_file():
        return package / folder
    return root / folder


def find_pipeline(name: str) -> FilePath:
    """The file that a user means: a path, or the name of a shipped pipeline.

    Raises:
        ConfigError: neither.
    """
    file = FilePath(name)
    if "\0" not in name and (file.suffix in (".yaml", ".yml") or os.path.exists(name)):
        return file
    shipped = shipped_pipelines()
    if name in shipped:
        return shipped[name]
    if "\0" not in name and "/" in name:
        return file
    hints = (*did_you_mean(name, shipped), f"shipped pipelines: {', '.join(sorted(shipped))}")
    message = f"there is no file '{show_word(name)}' and no shipped pipeline of that name"
    raise ConfigError([Fault(message, hints=hints)])


def _nested_kinds(info: PluginInfo) -> set[Kind]:
    """The kinds that a composite's settings nest, read off its schema.

    Raises:
        PluginError: a setting is of a type that has no schema.
    """
    own, inner = config_schema(info.config, info.key)
    references = [part["$ref"] for _, part in walk([own, inner]) if _refers(part)]
    start = "#/$defs/use."
    return {Kind(ref.removeprefix(start)) for ref in references if ref.startswith(start)}


def _refers(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("$ref"), str)


def _named(document: Document, kinds_inside: Mapping[Kind, bool]) -> list[tuple[Path, Kind, str]]:
    """Every plugin that a document names, with the kinds that it may be of."""
    result: list[tuple[Path, Kind, str]] = []
    for path, value in walk(document.data):
        if not path or path[-1] != "use" or not isinstance(value, str):
            continue
        top = str(path[0])
        if len(path) == (3 if top in set(Kind) and takes_many(Kind(top)) else 2):
            if top in set(Kind):
                result.append((path, Kind(top), value))
        else:
            result += [(path, kind, value) for kind in kinds_inside if kinds_inside[kind]]
    return result


def _load_fault(document: Document, path: Path, error: PluginError) -> Fault:
    """The fault of a plugin that cannot be used, where the document names it."""
    fault = error.faults[0]
    return Fault(fault.message, show_path(path), document.mark(path), fault.hints)


def load_named(
    document: Document, catalog: Catalog
) -> tuple[dict[tuple[Kind, str], type[Any]], list[Fault]]:
    """Load the plugins that a document names and allows, nested ones too.

    Returns:
        Classes by kind and name, and the faults of those that cannot be loaded.
    """
    catalog = catalog.under(_plugin_rules(document))
    classes: dict[tuple[Kind, str], type[Any]] = {}
    faults: dict[Path, Fault] = {}
    inside: dict[Kind, bool] = {}
    for _ in range(MAX_NESTING):
        before = len(classes), len(inside)
        for path, kind, name in _named(document, inside):
            if (kind, name) in classes or path in faults or name not in catalog.names(kind):
                continue  # an unknown name is the schema's to tell, with the nearest one
            try:
                result = catalog.load(kind, name)
                config_schema(result.info.config, result.info.key)  # that it has one
            except PluginError as error:
                faults[path] = _load_fault(document, path, error)
                continue
            classes[kind, name] = result
            for nested in _nested_kinds(result.info):
                inside[nested] = True
        if (len(classes), len(inside)) == before:
            break
    return classes, list(faults.values())


def compose_schema(
    catalog: Catalog,
    classes: Mapping[tuple[Kind, str], type[Any]],
    live: Iterable[Kind] = (),
) -> dict[str, Any]:
    """The pipeline's schema with the settings of these plugins spelled out."""
    names = {kind: catalog.names(kind) for kind in Kind}
    configs = {key: result.info.config for key, result in classes.items()}
    return pipeline_schema(names, configs, live=live)


def _bind_fault(document: Document, path: Path, error: msgspec.ValidationError) -> Fault:
    """A contradiction that only the configuration object knows."""
    message, inside = str(error), re.search(r" - at `\$([^`]*)`$", str(error))
    inner: list[str | int] = []
    if inside is not None:
        message = message[: inside.start()]
        steps = re.findall(r"\.([A-Za-z_]\w*)|\[(\d+)\]", inside[1])
        inner = [int(index) if index else name for name, index in steps]
    full = (*path, *inner)
    result = plugin_at(document.data, (*path, "")) if path[-1:] == ("with",) else None
    hints = (f"see: forge plugins {result[1]}",) if result else ()
    return Fault(message, show_path(full), document.mark(full), hints)


def _bind_settings(config: type[Any], values: Any) -> Any:
    """The settings of one plugin; a default of a composite may be bound already.

    Raises:
        msgspec.ValidationError: they contradict each other, or the plugin's own check failed.
    """
    if isinstance(values, config):
        return values
    try:
        return bind_config(config, values)
    except msgspec.ValidationError:
        raise
    except Exception as error:  # a check of a plugin may raise anything
        message = f"{config.__name__} cannot be made: {type(error).__name__}: {error}"
        raise msgspec.ValidationError(message) from error


def _bind_use(
    document: Document, path: Path, use: Use[Any], catalog: Catalog
) -> tuple[Use[Any], list[Fault]]:
    """Bind the settings of one plugin and of those nested in it."""
    faults: list[Fault] = []
    bound: dict[Path, Any] = {}
    todo = [(path, use)]
    order: list[tuple[Path, Use[Any]]] = []
    while todo:
        where, current = todo.pop()
        try:
            config = catalog.load(current.kind, current.name).info.config
            bound[where] = _bind_settings(config, current.config)
        except PluginError as error:  # named by a composite's default, not by the document
            faults.append(_load_fault(document, (*where, "use"), error))
            continue
        except msgspec.ValidationError as error:
            faults.append(_bind_fault(document, (*where, "with"), error))
            continue
        order.append((where, current))
        todo += [((*where, "with", *inner), part) for inner, part in nested_uses(bound[where])]
    if faults:
        return use, faults
    for where, current in reversed(order):
        config = bound[where]
        parts = {
            inner: bound[(*where, "with", *inner)] for inner, _ in nested_uses(config)
        }  # innermost first, so each part is complete
        bound[where] = type(current)(current.name, replace_uses(config, parts))
    finished = bound[path]
    assert isinstance(finished, Use)
    return finished, faults


def nested_uses(config: Any) -> list[tuple[Path, Use[Any]]]:
    """The plugins that a configuration object nests, with their paths inside it."""
    result: list[tuple[Path, Use[Any]]] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Use):
            result.append(((field.name,), value))
        else:
            result += [
                ((field.name, key), item) for key, item in _items(value) if isinstance(item, Use)
            ]
    return result


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    """The entries of a list or mapping by index or key; of anything else, none."""
    if isinstance(value, Mapping):
        return value.items()
    return enumerate(value) if isinstance(value, tuple | list) else ()


def replace_uses(config: Any, parts: Mapping[Path, Any]) -> Any:
    """The configuration object with its nested plugins replaced, path by path.

    Its cross-field checks do not run again: they read settings, and a part may be an instance.
    """
    changed: dict[str, Any] = {}
    for path, part in parts.items():
        name = str(path[0])
        if len(path) == 1:
            changed[name] = part
            continue
        entries = changed.setdefault(name, dict(_items(getattr(config, name))))
        entries[path[1]] = part
    new = copy.copy(config)
    for name, value in changed.items():
        was_mapping = isinstance(getattr(config, name), Mapping)
        is_list = isinstance(value, dict) and not was_mapping
        object.__setattr__(new, name, tuple(value.values()) if is_list else value)
    return new


def check_document(
    document: Document, catalog: Catalog, live: Iterable[Kind] = ()
) -> PipelineConfig:
    """Check a document and bind it.

    Args:
        document: the merged layers.
        catalog: the installed plugins.
        live: kinds that a program hands in.

    Returns:
        The pipeline with bound settings, every default filled in.

    Raises:
        ConfigError: with all faults at once.
    """
    without_nulls(document)
    rules = _plugin_rules(document)
    catalog = catalog.under(rules)
    classes, faults = load_named(document, catalog)
    schema = compose_schema(catalog, classes, live)
    faults += check(document, schema, _advice_of(document, classes))
    run, result = _bind_run(document, faults)
    named: dict[str, Any] = {}
    for path, kind, use in uses_in(document.data):
        if not _is_clean(path, faults):
            continue
        bound, contradictions = _bind_use(document, path, use, catalog)
        result += contradictions
        named[kind.value] = (*named.get(kind.value, ()), bound) if takes_many(kind) else bound
    if faults or result:
        raise ConfigError([*faults, *result])
    assert run is not None, "a run without a fault is bound"
    return PipelineConfig(run=run, plugins=rules, notes=notes_in(document.data), **named)


def _plugin_rules(document: Document) -> PluginRules:
    """The rules that the document has; what is wrong in them is the schema's to tell.

    Until it is told, nothing of others is imported.
    """
    given = document.data.get("plugins")
    if given is None:
        return PluginRules()
    try:
        rules: PluginRules = bind_config(PluginRules, given)
    except (msgspec.ValidationError, TypeError, ValueError):
        return PluginRules(allow=())
    return rules


def _is_clean(path: Path, faults: Iterable[Fault]) -> bool:
    """Whether the part at `path` can be bound: no fault is in it."""
    place = show_path(path)
    inside = (f"{place}.", f"{place}[")
    return not any(fault.path == place or fault.path.startswith(inside) for fault in faults)


def _bind_run(document: Document, faults: Iterable[Fault]) -> tuple[RunConfig | None, list[Fault]]:
    if "run" not in document.data or not _is_clean(("run",), faults):
        return None, []  # told already, perhaps as a misspelt key
    try:
        run: RunConfig = bind_config(RunConfig, document.data["run"])
    except msgspec.ValidationError as error:
        return None, [_bind_fault(document, ("run",), error)]
    if not run.ends:
        message = "the run has no end: set max_steps, max_epochs or max_seconds"
        return None, [Fault(message, "run", document.mark(("run",)))]
    return run, []


def _advice_of(
    document: Document, classes: Mapping[tuple[Kind, str], type[Any]]
) -> Callable[[Path, Mapping[str, Any]], str | None]:
    """What plugins say about settings that are wrong in a way they know."""

    def advice(path: Path, values: Mapping[str, Any]) -> str | None:
        name = str(look_up(document.data, (*path, "use")))
        top = str(path[0]) if "with" not in path else None  # a nested part may be of any kind
        for (kind, known), result in classes.items():
            ask = getattr(result.info.config, "advice", None)
            if known == name and top in (None, kind) and ask is not None:
                try:
                    hint = ask(values)
                except Exception as error:  # noqa: BLE001  a plugin's code may raise anything
                    hint = f"(the advice of {name} failed: {type(error).__name__}: {error})"
                return None if hint is None else str(hint)
        return None

    return advice


def read_document(name: str | FilePath, settings: Sequence[str] = ()) -> Document:
    """Read a pipeline file with its layers and overrides, unchecked."""
    return apply_settings(read_layers(find_pipeline(str(name))), settings)


def load_pipeline(
    name: str | FilePath,
    settings: Sequence[str] = (),
    *,
    catalog: Catalog | None = None,
    live: Iterable[Kind] = (),
) -> PipelineConfig:
    """Read, check and bind a pipeline file.

    Args:
        name: a path, or the name of a shipped pipeline.
        settings: overrides of the form `run.seed=3`.
        catalog: plugins to choose from; the installed ones otherwise.
        live: kinds (`Kind.MODEL`, `Kind.DATA`) that will be handed in, so need not be named.

    Raises:
        ConfigError: with all faults at once, each with its place.
    """
    return check_document(read_document(name, settings), catalog or Catalog.installed(), live)


def check_pipeline(
    pipeline: PipelineConfig, catalog: Catalog, live: Iterable[Kind] = ()
) -> PipelineConfig:
    """Check and bind a pipeline that a program built, as a file would be.

    Raises:
        ConfigError: with all faults at once.
    """
    document = Document("the pipeline", pipeline.to_data())
    document.values[()] = Mark("the pipeline")
    return check_document(document, catalog, live)


def fill(pipeline: PipelineConfig) -> dict[str, Any]:
    """The pipeline as plain data with every default of every plugin written out."""
    data = pipeline.to_data()
    for path, _, use in pipeline.entries():
        target: Any = data
        for part in path:
            target = target[part]
        values = config_data(use.config) if not isinstance(use.config, Mapping) else use.config
        target["with"] = dict(values)
        if not values:
            del target["with"]
    return data
