"""`forge plugins`: what is installed, and one page for each plugin."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from forge_kernel.cli.options import AsJson

if TYPE_CHECKING:
    from forge_kernel.contract.plugin import Kind
    from forge_kernel.planning.catalog import Catalog


OURS: Final = "forge-kernel"
"""The distribution whose name does not stand beside each of its plugins."""


def plugins_command(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One plugin.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the plugins, or show one. Its origin, settings, bounds, defaults, hooks, order."""
    from forge_kernel.planning.catalog import Catalog

    catalog = Catalog.installed()
    if name is None:
        rows = [_row(catalog, offer) for offer in catalog.offers()]
        if as_json:
            print(json.dumps({"plugins": rows, "misnamed": list(catalog.misnamed)}, indent=1))
        else:
            _show_list(rows, catalog)
        return
    pages = [_page(catalog, kind, result) for kind, result in _find(catalog, name)]
    if as_json:
        print(json.dumps(pages, indent=1))
        return
    for page in pages:
        _show_page(page)


def _find(catalog: Catalog, name: str) -> list[tuple[Kind, str]]:
    from forge_kernel.config.spelling import did_you_mean
    from forge_kernel.errors import Fault, PluginError

    result = catalog.find(name)
    if not result:
        hints = did_you_mean(name, {offer.name for offer in catalog.offers()})
        hints += ("list them with: forge plugins",)
        raise PluginError([Fault(f"there is no plugin '{name}'", hints=hints)])
    return result


def _row(catalog: Catalog, offer: Any) -> dict[str, Any]:
    from forge_kernel.errors import PluginError

    broken = None
    about = ""
    try:
        plugin = catalog.load(offer.kind, offer.name)
        about = (plugin.__doc__ or "").strip().partition("\n")[0]
    except PluginError as error:
        broken = error.faults[0].message
    return {
        "kind": offer.kind.value,
        "name": offer.name,
        "origin": offer.origin,
        "about": about,
        "broken": broken,
    }


def _show_list(rows: list[dict[str, Any]], catalog: Catalog) -> None:
    width = max((len(row["name"]) for row in rows), default=0)
    margin = " " * (width + 4)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10**6
    kind = None
    for row in rows:
        if row["kind"] != kind:
            kind = row["kind"]
            print(f"\n{kind}" if rows.index(row) else kind)
        text = f"BROKEN: {row['broken']}" if row["broken"] else row["about"]
        if row["origin"].partition(" ")[0] != OURS:
            text = f"{text}  ({row['origin']})"
        about = textwrap.wrap(text, max(columns - width - 4, 20), break_long_words=False)
        print(f"  {row['name']:<{width}}  {f'{chr(10)}{margin}'.join(about)}".rstrip())
    for problem in catalog.misnamed:
        print(f"\nBROKEN: {problem}")


def _page(catalog: Catalog, kind: Kind, name: str) -> dict[str, Any]:
    from forge_kernel.config.schema import config_schema
    from forge_kernel.training.bus import hook_table

    plugin = catalog.load(kind, name)
    offer = catalog.offer(kind, name)
    info = plugin.info
    return {
        "kind": kind.value,
        "name": name,
        "origin": offer.origin,
        "class": offer.target,
        "about": inspect.cleandoc(plugin.__doc__ or ""),
        "settings": config_schema(info.config, info.key)[0],
        "hooks": {hook: list(arguments) for hook, arguments in hook_table(plugin).items()},
        "order": {"before": list(info.order.before), "after": list(info.order.after)},
        "conflicts": list(info.conflicts),
        "packages": dict(info.packages),
        "api": list(info.api),
    }


def _bounds(schema: dict[str, Any]) -> str:
    words = {
        "minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<",
    }  # fmt: skip
    parts: list[str] = []
    for branch in schema.get("anyOf", [schema]):
        if "use." in branch.get("$ref", ""):
            parts.append(f"a plugin of the kind {branch['$ref'].rpartition('use.')[2]}")
        if "enum" in branch:
            parts.append(" | ".join(str(choice) for choice in branch["enum"]))
        elif "type" in branch:
            bounds = [f"{sign} {branch[key]}" for key, sign in words.items() if key in branch]
            parts.append(" ".join([str(branch["type"]), *bounds]))
    return " or ".join(parts)


def _show_page(page: dict[str, Any]) -> None:
    print(f"{page['kind']}.{page['name']}  ({page['origin']}, {page['class']})")
    print(textwrap.indent(page["about"], "  ") + "\n")
    settings = page["settings"].get("properties", {})
    print("  settings:" if settings else "  no settings")
    for name, schema in settings.items():
        required = name in page["settings"].get("required", ())
        default = "required" if required else f"default {json.dumps(schema.get('default'))}"
        print(f"    {name}: {_bounds(schema)}, {default}")
        if schema.get("description"):
            print(f"        {schema['description']}")
    print("\n  hooks:")
    for hook, arguments in page["hooks"].items():
        print(f"    {hook}({', '.join(arguments)})")
    for sense in ("before", "after"):
        if page["order"][sense]:
            print(f"\n  stands {sense} {', '.join(page['order'][sense])}")
    if page["conflicts"]:
        print(f"\n  cannot run beside {', '.join(page['conflicts'])}")
    for module, remedy in page["packages"].items():
        print(f"\n  needs the package {module}: {remedy}")
