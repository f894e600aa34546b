"""From a file to a checked pipeline: read, lay over, check, bind. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path as FilePath
from typing import Any, Final, get_args, get_type_hints

import msgspec

from forge_kernel.catalog import Catalog
from forge_kernel.config.check import check, plugin_at
from forge_kernel.config.document import Document, Path, look_up, show_path, walk
from forge_kernel.config.layers import apply_settings, read_layers, without_nulls
from forge_kernel.config.pipeline import PipelineConfig, pipeline_from_data, takes_many
from forge_kernel.config.schema import bind_config, config_data, pipeline_schema
from forge_kernel.config.spelling import did_you_mean
from forge_kernel.config.use import Use
from forge_kernel.errors import ConfigError, Fault, Mark, PluginError
from forge_kernel.plugin import Kind

PIPELINES: Final = "forge_kernel.pipelines"
MAX_NESTING: Final = 8


def shipped_pipelines() -> dict[str, FilePath]:
    """The pipelines that installed distributions ship, by name."""
    found: dict[str, FilePath] = {}
    for entry in entry_points(group=PIPELINES):
        package, _, folder = entry.value.partition(":")[0].rpartition(".")
        spec = find_spec(package) if package else None
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            for file in sorted((FilePath(place) / folder).glob("*.yaml")):
                found.setdefault(file.stem, file)
    return found


def find_pipeline(name: str) -> FilePath:
    """The file that a user means: a path, or the name of a shipped pipeline.

    Raises:
        ConfigError: neither.
    """
    file = FilePath(name)
    if "\0" not in name and (file.suffix in (".yaml", ".yml") or "/" in name or file.exists()):
        return file
    shipped = shipped_pipelines()
    if name in shipped:
        return shipped[name]
    hints = (*did_you_mean(name, shipped), f"shipped pipelines: {', '.join(sorted(shipped))}")
    message = f"there is no file '{name}' and no shipped pipeline of that name"
    raise ConfigError([Fault(message, hints=hints)])


def _nested_kinds(config: type[Any]) -> set[Kind]:
    """The kinds that a composite's settings nest."""
    kinds: set[Kind] = set()
    stack = list(get_type_hints(config, include_extras=False).values())
    while stack:
        annotation = stack.pop()
        if isinstance(annotation, type) and issubclass(annotation, Use):
            kinds.add(annotation.kind)
        origin = getattr(annotation, "__origin__", None)
        if isinstance(origin, type) and issubclass(origin, Use):
            kinds.add(origin.kind)
        stack.extend(get_args(annotation))
    return kinds


def _named(document: Document, kinds_inside: Mapping[Kind, bool]) -> list[tuple[Path, Kind, str]]:
    """Every plugin that a document names, with the kinds that it may be of."""
    found: list[tuple[Path, Kind, str]] = []
    for path, value in walk(document.data):
        if not path or path[-1] != "use" or not isinstance(value, str):
            continue
        top = str(path[0])
        if len(path) == (3 if top in set(Kind) and takes_many(Kind(top)) else 2):
            if top in set(Kind):
                found.append((path, Kind(top), value))
        else:
            found += [(path, kind, value) for kind in kinds_inside if kinds_inside[kind]]
    return found


def load_named(
    document: Document, catalog: Catalog
) -> tuple[dict[tuple[Kind, str], type[Any]], list[Fault]]:
    """Load the plugins that a document names, nested ones too.

    Returns:
        Classes by kind and name, and the faults of those that cannot be loaded.
    """
    classes: dict[tuple[Kind, str], type[Any]] = {}
    faults: dict[Path, Fault] = {}
    inside: dict[Kind, bool] = {}
    for _ in range(MAX_NESTING):
        before = len(classes), len(inside)
        for path, kind, name in _named(document, inside):
            if (kind, name) in classes or path in faults or name not in catalog.names(kind):
                continue  # an unknown name is the schema's to tell, with the nearest one
            try:
                classes[kind, name] = catalog.load(kind, name)
            except PluginError as error:
                fault = error.faults[0]
                faults[path] = Fault(
                    fault.message, show_path(path), document.mark(path), fault.hints
                )
                continue
            for nested in _nested_kinds(classes[kind, name].info.config):
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
    configs = {key: found.info.config for key, found in classes.items()}
    return pipeline_schema(names, configs, live=live)


def _bind_fault(document: Document, path: Path, error: msgspec.ValidationError) -> Fault:
    """A contradiction that only the configuration object knows."""
    message, _, where = str(error).partition(" - at `$")
    inner: list[str | int] = [
        int(index) if index else name
        for name, index in re.findall(r"\.([A-Za-z_]\w*)|\[(\d+)\]", where)
    ]
    full = (*path, *inner)
    found = plugin_at(document.data, (*path, "")) if path[-1:] == ("with",) else None
    hints = (f"see: forge plugins {found[1]}",) if found else ()
    return Fault(message, show_path(full), document.mark(full), hints)


def _bind_use(
    document: Document, path: Path, use: Use[Any], classes: Mapping[tuple[Kind, str], type[Any]]
) -> tuple[Use[Any], list[Fault]]:
    """Bind the settings of one plugin and of those nested in it."""
    faults: list[Fault] = []
    bound: dict[Path, Any] = {}
    todo = [(path, use)]
    order: list[tuple[Path, Use[Any]]] = []
    while todo:
        where, current = todo.pop()
        config = classes[current.kind, current.name].info.config
        try:
            bound[where] = bind_config(config, current.config)
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
    found: list[tuple[Path, Use[Any]]] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, Use):
            found.append(((field.name,), value))
        elif isinstance(value, tuple | list):
            found += [
                ((field.name, index), item)
                for index, item in enumerate(value)
                if isinstance(item, Use)
            ]
    return found


def replace_uses(config: Any, parts: Mapping[Path, Any]) -> Any:
    """The configuration object with its nested plugins replaced, path by path."""
    changed: dict[str, Any] = {}
    for path, part in parts.items():
        name = str(path[0])
        if len(path) == 1:
            changed[name] = part
        else:
            entries = list(changed.get(name, getattr(config, name)))
            entries[int(path[1])] = part
            changed[name] = tuple(entries)
    return replace(config, **changed) if changed else config


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
    classes, faults = load_named(document, catalog)

    def advice(path: Path, values: Mapping[str, Any]) -> str | None:
        name = str(look_up(document.data, (*path, "use")))
        for (_, known), found in classes.items():
            if known == name and hasattr(found.info.config, "advice"):
                hint = found.info.config.advice(values)
                return None if hint is None else str(hint)
        return None

    faults += check(document, compose_schema(catalog, classes, live), advice)
    if faults:
        raise ConfigError(faults)
    try:
        pipeline = pipeline_from_data(document.data)
    except msgspec.ValidationError as error:
        raise ConfigError([_bind_fault(document, ("run",), error)]) from error
    changed: dict[str, Any] = {}
    for path, kind, use in pipeline.entries():
        bound, found = _bind_use(document, path, use, classes)
        faults += found
        if takes_many(kind):
            changed.setdefault(kind.value, []).append(bound)
        else:
            changed[kind.value] = bound
    if faults:
        raise ConfigError(faults)
    lists = {key: tuple(value) for key, value in changed.items() if isinstance(value, list)}
    return replace(pipeline, **{**changed, **lists})


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
