"""`forge tokenizer`: a vocabulary of one's own texts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make a tokenizer.", no_args_is_help=True, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)  # fmt: skip


@app.callback()
def _root() -> None:
    """Make a tokenizer."""


@app.command("train")
def train(
    texts: Annotated[
        str,
        typer.Argument(
            metavar="PATH",
            help="as data.with.path of data.text: a file, a folder or a glob pattern",
        ),
    ],
    output: Annotated[
        Path, typer.Option(metavar="FILE", help="where it is written; none may be there")
    ] = Path("tokenizer.json"),
    vocabulary: Annotated[int, typer.Option(min=1, help="tokens, special ones included")] = 8192,
    field: Annotated[str, typer.Option(help="the text's field in an object")] = "text",
    end_token: Annotated[str, typer.Option(help="the token that ends a text")] = "<|endoftext|>",  # noqa: S107  no password
    special: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="another token that stands for itself, such as <|im_start|>; may be repeated",
        ),
    ] = None,
) -> None:
    """Learn a byte-level BPE tokenizer from texts. Writes tokenizer.json, which data.text and
    data.chat take.
    """  # fmt: skip
    from forge_kernel.errors import ConfigError, Fault
    from forge_kernel.storage.atomic_files import write_text
    from forge_plugins.formats.columns.source_file import Source
    from forge_plugins.formats.errors import DataError
    from forge_plugins.formats.readers.documents import SUFFIXES, Account, Documents
    from forge_plugins.formats.source_files import source_files
    from forge_plugins.mathematics.text.tokenizer_training import train_byte_pairs

    def read() -> Iterator[str]:
        account = Account()
        for file in source_files(texts, SUFFIXES):
            source = Source(file)
            for text, _ in Documents(file=file, key=field).parts(account):
                yield text
            source.check_whole()

    if output.exists():
        raise ConfigError([Fault(f"{output} is there already: name another file by --output")])
    try:
        content = train_byte_pairs(read(), vocabulary, end_token, special or [])
    except ImportError as error:
        hint = "pip install 'forge-kernel[tokenizers]'"
        raise ConfigError([Fault(f"tokenizers is not installed: {hint}")]) from error
    except (DataError, OSError, ValueError) as error:
        raise ConfigError([Fault(f"{texts}: {error}")]) from error
    try:
        write_text(output, content)
    except OSError as error:
        raise ConfigError([Fault(f"{output}: cannot be written: {error}")]) from error
    made = len(json.loads(content)["model"]["vocab"])
    typer.echo(f"{output}: {made} tokens")
    typer.echo(f"data: {{use: text, with: {{tokenizer: library, tokenizer_file: {output}}}}}")
