"""`forge pot10`: the Power of Ten, as honestly adapted to Python."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from forge_plugins.power_of_ten.finding import Finding
    from forge_plugins.power_of_ten.source import Module
    from forge_plugins.power_of_ten.waivers import Waiver


def pot10(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="files and folders")],
    waivers: Annotated[
        Path | None,
        typer.Option(help="accepted breaches with their reasons; pot10.toml here, if it is there"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
    sarif: Annotated[
        Path | None, typer.Option(metavar="FILE", help="also write the findings as SARIF 2.1.0")
    ] = None,
) -> None:
    """Check Python code by NASA's Power of Ten rules. Exit status 1 when something is found."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.power_of_ten.checks import check_all
    from forge_plugins.power_of_ten.source import python_files
    from forge_plugins.power_of_ten.waivers import FILE_NAME, apply_waivers, read_waivers

    file = waivers or (Path(FILE_NAME) if Path(FILE_NAME).is_file() else None)
    try:
        accepted = read_waivers(file) if file is not None else []
    except (OSError, ValueError) as error:
        raise ConfigError([Fault(f"the waivers cannot be read: {error}")]) from error
    modules = _read(paths)
    folder = file.resolve().parent if file is not None else Path()
    left, used, idle = apply_waivers(
        check_all(modules),
        accepted,
        [module.file for module in modules],
        lambda: python_files([folder]),
    )
    if sarif is not None:
        sarif.write_text(json.dumps(sarif_of(left), indent=1) + "\n", encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(_data(modules, left, used, idle), indent=1))
    else:
        _show(modules, left, used, idle)
    if left or idle:
        raise typer.Exit(1)


def _read(paths: list[Path]) -> list[Module]:
    """All files parsed, or all faults at once."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.power_of_ten.source import python_files, read_module

    try:
        files = python_files(paths)
    except FileNotFoundError as error:
        raise ConfigError([Fault(f"there is no file or folder {error.args[0]}")]) from error
    if not files:
        raise ConfigError([Fault(f"no Python files in {', '.join(map(str, paths))}")])
    modules: list[Module] = []
    faults: list[Fault] = []
    for file in files:
        try:
            modules.append(read_module(file))
        except (SyntaxError, ValueError, OSError) as error:
            faults.append(Fault(f"{file} cannot be read as Python: {error}"))
    if faults:
        raise ConfigError(faults)
    return modules


def _data(
    modules: list[Module], left: list[Finding], used: list[Waiver], idle: list[Waiver]
) -> dict[str, Any]:
    import dataclasses

    from forge_plugins.power_of_ten.finding import NOT_CARRIED_OVER, RULES

    return {
        "files": len(modules),
        "functions": sum(len(module.functions) for module in modules),
        "findings": [dataclasses.asdict(result) for result in left],
        "waivers_used": [dataclasses.asdict(each) for each in used],
        "waivers_of_nothing": [dataclasses.asdict(each) for each in idle],
        "rules": {str(rule): text for rule, text in RULES.items()},
        "not_carried_over": {str(rule): why for rule, why in NOT_CARRIED_OVER.items()},
    }


def _show(
    modules: list[Module], left: list[Finding], used: list[Waiver], idle: list[Waiver]
) -> None:
    from forge_plugins.power_of_ten.finding import NOT_CARRIED_OVER, RULES

    for result in left:
        typer.echo(result.text())
    for each in idle:
        typer.echo(f"waiver of nothing: rule {each.rule} in {each.path} {each.function}: remove it")
    counts = Counter(result.rule for result in left)
    functions = sum(len(module.functions) for module in modules)
    typer.echo(f"{len(modules)} files, {functions} functions, {len(used)} waivers used")
    for rule, text in RULES.items():
        typer.echo(f"  rule {rule:2}: {counts[rule]:3} found  ({text})")
    for rule, why in NOT_CARRIED_OVER.items():
        typer.echo(f"  rule {rule:2}: not checked  ({why})")


def sarif_of(findings: list[Finding]) -> dict[str, Any]:
    """The findings in the form that code hosts show (SARIF 2.1.0)."""
    from forge_plugins.power_of_ten.finding import RULES

    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "forge pot10",
                        "rules": [
                            {"id": f"POT{rule}", "shortDescription": {"text": text}}
                            for rule, text in RULES.items()
                        ],
                    }
                },
                "results": [
                    {
                        "ruleId": f"POT{result.rule}",
                        "level": "error",
                        "message": {"text": result.message},
                        "locations": [
                            {
                                "physicalLocation": {
                                    "artifactLocation": {"uri": Path(result.file).as_posix()},
                                    "region": {"startLine": result.line},
                                }
                            }
                        ],
                    }
                    for result in findings
                ],
            }
        ],
    }
