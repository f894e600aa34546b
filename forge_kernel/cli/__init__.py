"""The command line `forge`: one file per command; only those that train import torch."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import entry_points

import typer

from forge_kernel.cli import (
    bench,
    check,
    doctor,
    explain,
    export,
    lock,
    new,
    plan,
    plugins,
    resume,
    run,
    schema,
    status,
    watch,
)
from forge_kernel.cli.interrupt import ended_by_signals
from forge_kernel.errors import FaultsError, ForgeError
from forge_kernel.secrecy import without_secrets

COMMANDS = "forge_kernel.commands"


def build_app() -> typer.Typer:
    """The application with the kernel's commands and those that distributions add."""
    app = typer.Typer(
        name="forge",
        help="Train small 1-bit and ternary networks from a YAML file, and run them afterwards.",
        epilog="Exit status: 0 done; 2 a fault of the command line, the file or the folder; "
        "3 the run, an export or the disk failed; 128 + n ended by signal n, resumable.",
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.command("run")(run.run_command)
    app.command("resume")(resume.resume_command)
    app.command("export")(export.export_command)
    app.command("check")(check.check_command)
    app.command("plan")(plan.plan_command)
    app.command("explain")(explain.explain_command)
    app.command("lock")(lock.lock_command)
    app.command("plugins")(plugins.plugins_command)
    app.command("schema")(schema.schema_command)
    app.command("status")(status.status_command)
    app.command("watch")(watch.watch_command)
    app.command("doctor")(doctor.doctor_command)
    app.command("bench")(bench.bench_command)
    app.add_typer(new.app, name="new")
    taken = {command.name for command in app.registered_commands} | {"new"}
    for entry in sorted(entry_points(group=COMMANDS), key=lambda entry: entry.name):
        if entry.name in taken:
            where = f"'{entry.name}' ({entry.value})"
            print(f"forge: a second command {where} is left out", file=sys.stderr)
            continue
        taken.add(entry.name)
        try:
            command = entry.load()
            if isinstance(command, typer.Typer):  # of several commands under one name
                app.add_typer(command, name=entry.name)
            else:
                app.command(entry.name)(command)
        except (Exception, SystemExit) as error:  # noqa: BLE001  a foreign command must not break the others
            print(f"forge: the command '{entry.name}' is broken: {error}", file=sys.stderr)
    app.callback()(_root)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"forge-kernel {version('forge-kernel')}")
        raise typer.Exit


def _root(
    version: bool = typer.Option(
        False, "--version", callback=_show_version, is_eager=True, help="Show the version."
    ),
) -> None:
    del version


def _show_every_name() -> None:
    """Escape what the terminal's encoding lacks: a name must not end a command.

    JSON is ASCII wherever it is printed, so that it is never escaped twice.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _part_with_readers() -> None:
    """A reader that has gone (`| head`) is no error: what was to be done is done."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def main() -> None:
    """Run the command line; errors of ours and of the system are told without a traceback."""
    _show_every_name()
    with ended_by_signals():
        try:
            build_app()()
        except FaultsError as error:
            count = len(error.faults)
            faults = "fault" if count == 1 else "faults"
            print(without_secrets(f"{error}\n\n{count} {faults}"), file=sys.stderr)
            sys.exit(error.exit_status)
        except ForgeError as error:
            print(f"forge: {without_secrets(str(error))}", file=sys.stderr)
            sys.exit(error.exit_status)
        except BrokenPipeError:
            raise
        except OSError as error:  # a disk that is full, a folder that may not be read
            print(f"forge: {type(error).__name__}: {error}", file=sys.stderr)
            sys.exit(ForgeError.exit_status)
        finally:
            _part_with_readers()
