"""`forge data`: what a data file holds, and how good its samples are."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from forge_plugins.formats.columns.table import Table
    from forge_plugins.formats.format import Reading
    from forge_plugins.formats.inspection.profile import Profile


class InputForm(StrEnum):
    """What inputs are."""

    FEATURES = "features"
    TOKENS = "tokens"
    TEXT = "text"


class TargetForm(StrEnum):
    """What targets are; `auto`: classes when there is a target of integers."""

    AUTO = "auto"
    CLASS = "class"
    NUMBER = "number"
    NEXT = "next"
    NONE = "none"


TokenType = Annotated[str, typer.Option(metavar="TYPE", help="as data.with.token_dtype")]


def data(  # noqa: PLR0913, PLR0917  as many as the command has options
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="a data file, a folder of pictures, or shipped:NAME"),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="as data.with.format")
    ] = "auto",
    inputs: Annotated[
        InputForm, typer.Option("--input", help="as data.with.input; text: documents")
    ] = (InputForm.FEATURES),
    target: Annotated[TargetForm, typer.Option(help="as data.with.target")] = TargetForm.AUTO,
    input_column: Annotated[
        str, typer.Option(metavar="NAME", help="as data.with.input_column")
    ] = "input",
    target_column: Annotated[
        str, typer.Option(metavar="NAME", help="as data.with.target_column")
    ] = "target",
    ignore_index: Annotated[int, typer.Option(help="as run.ignore_index")] = -100,
    classes: Annotated[int | None, typer.Option(min=1, help="labels are below it")] = None,
    vocabulary: Annotated[int | None, typer.Option(min=1, help="tokens are below it")] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="as data.with.quality_threshold")
    ] = 0.5,
    token_dtype: TokenType = "uint16",  # noqa: S107  no password
    sequence_length: Annotated[int, typer.Option(min=1, help="as data.with.sequence_length")] = 128,
    field: Annotated[
        str, typer.Option(help="field of the text in objects, with --input text")
    ] = "text",
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="as data.with.cache_dir")
    ] = None,
    trust_pickle: Annotated[
        bool, typer.Option("--trust-pickle", help="run a pickle as it is")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write it as an HTML page")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as one JSON object")] = False,
    formats: Annotated[bool, typer.Option("--formats", help="list the installed formats")] = False,
) -> None:
    """Show what a data file holds. Columns or fields, counts, quality, balance, what to write."""
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.formats.format import Reading

    if formats:
        typer.echo("\n".join(_formats()))
        return
    if file is None:
        raise ConfigError([Fault("no file is named", hints=("forge data FILE, or --formats",))])
    _check_words(form, token_dtype)
    reading = Reading(
        input=input_column, target=None if target is TargetForm.NONE else target_column,
        lenient=True, trust_pickle=trust_pickle, integers=token_dtype, length=sequence_length,
    )  # fmt: skip
    meant = _ScanOptions(
        form=form, inputs=inputs, target=target, classes=classes, vocabulary=vocabulary,
        threshold=threshold, ignore=ignore_index, field=field, cache_dir=cache_dir,
    )  # fmt: skip
    if not _shown_by_columns(meant, file, reading, page, as_json=as_json):
        _show(_answer(meant, file, reading), page, as_json=as_json)


def _shown_by_columns(
    meant: _ScanOptions, file: str, reading: Reading, page: Path | None, *, as_json: bool
) -> bool:
    """Whether data have columns with names, or are pictures, and are shown so.

    Raises:
        ConfigError: they cannot be read.
    """
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.commands.columns import columns_of, columns_page, write_lines
    from forge_plugins.formats.errors import DataError
    from forge_plugins.formats.format import Reading

    plain = reading == Reading(lenient=True, target=reading.target)
    if not plain or meant.form != "auto" or meant.inputs is not InputForm.FEATURES:
        return False
    try:
        suggestion = columns_of(file, meant.cache_dir)
    except DataError as fault:
        hints = (fault.hint,) if fault.hint else ()
        message = str(fault).removesuffix(f"; {fault.hint}")
        raise ConfigError([Fault(message, hints=hints)]) from fault
    if suggestion is None:
        return False
    if page is not None:
        _write_page(page, columns_page(suggestion, file))
    if as_json:
        told = {
            "file": file, "kind": suggestion.kind, "records": suggestion.samples,
            "columns": suggestion.columns, "baseline": suggestion.baseline,
            "data": {"use": suggestion.plugin, "with": suggestion.settings},
        }  # fmt: skip
        typer.echo(json.dumps(told))
    else:
        typer.echo("\n".join([*suggestion.seen, *write_lines(suggestion, file)]))
    return True


def _show(profile: Profile, page: Path | None, *, as_json: bool) -> None:
    if page is not None:
        _write(profile, page)
    typer.echo(json.dumps(profile.to_data()) if as_json else "\n".join(_lines(profile)))


def _check_words(form: str, token_dtype: str) -> None:
    """Whether there are such a format and such integers.

    Raises:
        ConfigError: there are not.
    """
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.formats.readers.tokens import TYPES
    from forge_plugins.formats.registry import names

    for word, known in ((form, ("auto", *names())), (token_dtype, TYPES)):
        if word not in known:
            hint = f"there are: {', '.join(known)}"
            raise ConfigError([Fault(f"'{word}' is unknown", hints=(hint,))])


def _answer(meant: _ScanOptions, file: str, reading: Reading) -> Profile:
    """What the file says.

    Raises:
        ConfigError: it cannot be read as asked.
    """
    from forge_kernel.errors import ConfigError, Fault
    from forge_plugins.data.file import data_file
    from forge_plugins.formats.errors import DataError

    try:
        return meant.asked_of(data_file(file), reading)
    except DataError as fault:
        hints = (fault.hint,) if fault.hint else ()
        message = str(fault).removesuffix(f"; {fault.hint}")
        raise ConfigError([Fault(message, hints=hints)]) from fault


@dataclass(frozen=True, kw_only=True)
class _ScanOptions:
    """What is asked of a file."""

    form: str
    inputs: InputForm
    target: TargetForm
    classes: int | None
    vocabulary: int | None
    threshold: float
    ignore: int
    field: str
    cache_dir: Path | None

    def asked_of(self, file: Path, reading: Reading) -> Profile:
        """Look at every record.

        Raises:
            DataError: the file cannot be read as asked.
        """
        from forge_plugins.formats.columns.source_file import Source
        from forge_plugins.formats.inspection.profile import profile_of, profile_of_texts
        from forge_plugins.formats.inspection.quality import assess, check_floats
        from forge_plugins.formats.open_table import open_table

        if self.inputs is InputForm.TEXT:
            Source(file).close()  # says what is wrong with the path itself
            return profile_of_texts(file, self.field)
        table = open_table(file, self.form, reading, cache_dir=self.cache_dir)
        if reading.target not in (None, "target") and "target" not in table.columns:
            raise table.without("target")
        meant = _meant(table) if self.target is TargetForm.AUTO else self.target.value
        assessment = assess(
            table,
            inputs=self.inputs.value,  # type: ignore[arg-type]  # checked by the enumeration
            target=meant,  # type: ignore[arg-type]
            classes=self.classes,
            vocabulary=self.vocabulary,
            ignore=self.ignore,
        )
        check_floats(table, self.inputs.value, meant)  # type: ignore[arg-type]
        return profile_of(table, assessment, meant, self.threshold, self.ignore)


def _meant(table: Table) -> str:
    column = table.columns.get("target")
    if column is None:
        return "none"
    labels = column.dtype.kind in "iub" and all(size == 1 for size in column.shape[1:])
    return "class" if labels else "number"


def _formats() -> list[str]:
    """One line for each format, and what is wrong with those that cannot be used."""
    from forge_plugins.formats import registry

    known, wrong = registry.known()
    lines = []
    for item in known:
        how = (
            "in place" if item.read is None else "converted" if item.layouts is None else "in part"
        )
        names = ", ".join(item.suffixes) or "must be named"
        lines.append(f"{item.name:<12} {names:<24} {how:<10} {registry.origin(item.name)}")
    return [*lines, *wrong]


def _write(profile: Profile, page: Path) -> None:
    from forge_plugins.reports.profile_page import profile_page

    _write_page(page, profile_page(profile.to_data()))


def _write_page(page: Path, text: str) -> None:
    from forge_kernel.errors import ConfigError, Fault

    try:
        page.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError([Fault(f"cannot write the page {page}: {error}")]) from error


def _lines(profile: Profile) -> list[str]:
    from forge_plugins.reports.bars import text_bars

    texts = profile.format == "texts"
    what = "documents" if texts else "records"
    lines = [f"{profile.file}: {profile.format}, {profile.records:,} {what}"]
    for name, about in profile.fields.items():
        shape = f"shape {about['shape']} in each record, " if about["shape"] else ""
        metrics = "no finite number"
        if about["mean"] is not None:
            metrics = f"{about['smallest']:.6g} to {about['largest']:.6g}, mean {about['mean']:.6g}"
        unit = " characters" if texts else ""
        lines.append(f"  {name}: {about['type']}, {shape}{metrics}{unit}")
    if profile.others:
        lines.append(f"  not read: {', '.join(profile.others)}")
    if texts:
        lines += [f"  characters in all: {profile.length:,}", f"kept: {profile.kept:,}"]
    else:
        lines.append(f"  numbers in an input: {profile.length}")
        lines.append(f"kept at quality {profile.threshold:g} and above: {profile.kept:,}")
    lines += [f"  left out, {reason}: {count:,}" for reason, count in profile.left_out.items()]
    for reason, about in profile.reasons.items():
        first = ", ".join(map(str, about["first"]))
        lines.append(f"found, {reason}: {about['records']:,} {what}: {first}")
    if profile.labels:
        lines.append("labels among the kept:")
        lines += _indented(text_bars([*profile.labels], [*profile.labels.values()]))
    if profile.spread is not None:
        lines.append("documents by their characters:" if texts else "numbers of inputs by size:")
        lines += _indented(text_bars(profile.spread.names, profile.spread.counts))
    if profile.scores is not None and profile.reasons:
        lines.append("records by quality:")
        lines += _indented(text_bars(profile.scores.names, profile.scores.counts))
    return lines


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
