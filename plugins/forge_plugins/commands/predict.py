"""`forge predict`: a trained classifier's or regressor's answers for the samples of a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor


def predict(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="a run folder, or a model's folder")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="samples, as the run's data file")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Lines; the screen otherwise")
    ] = None,
    device: Annotated[str, typer.Option(help="as run.device")] = "cpu",
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="also run code that the run's file names")
    ] = False,
) -> None:
    """Predict labels or numbers for a file's samples. One JSON object each, in the file's order."""
    from forge_kernel import load_run
    from forge_kernel.errors import ConfigError, Fault
    from forge_kernel.storage.atomic_files import write_text
    from forge_plugins.uses.file_inputs import file_inputs, sample_names, unknown_words

    run = load_run(folder, device=device, allow_code=allow_code)
    lines: list[str] = []
    files = iter(sample_names(run, file))
    try:
        for inputs in file_inputs(run, file):
            outputs = _in_its_unit(run, run.predict(inputs))
            answers = rows(outputs, classes=_is_classifier(run), names=_label_names(run))
            named = [{**_file(next(files, None)), **answer} for answer in answers]
            lines += [json.dumps(answer, ensure_ascii=False) for answer in named]
    except (ValueError, RuntimeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError([Fault(f"{folder} cannot predict for {file}: {error}")]) from error
    for column, words in unknown_words(run, file).items():
        message = f"{file}: {column} holds what training never saw, and counts as none: {words[:8]}"
        typer.echo(message, err=True)
    text = "".join(f"{line}\n" for line in lines)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        typer.echo(f"{out}: {len(lines)} predictions")


def _file(name: str | None) -> dict[str, str]:
    return {} if name is None else {"file": name}


def _in_its_unit(run: Any, outputs: Any) -> Any:
    """Numbers as the target's column has them."""
    preparation = run.preparation
    return outputs if preparation is None else preparation.unscaled(outputs)


def _is_classifier(run: Any) -> bool:
    """Whether outputs are logits: of a run that was trained on labels, or of a model's folder."""
    if run.preparation is not None:
        return run.spec.labels is not None
    if run.data.get("use") == "file":
        return bool(run.data["with"].get("target") != "number")
    return bool(run.spec.classes != 1)


def _label_names(run: Any) -> dict[int, str]:
    """What the data or a model of transformers (`id2label`) calls the labels, by number."""
    if run.spec.labels:
        return dict(enumerate(run.spec.labels))
    known = getattr(getattr(run.model, "config", None), "id2label", None) or {}
    return {
        int(number): str(name)
        for number, name in known.items()
        if str(name) != f"LABEL_{number}"  # what the library fills in where there are none
    }


def rows(
    outputs: Tensor, *, classes: bool, names: Mapping[int, str] | None = None
) -> list[dict[str, Any]]:
    """What a line holds of each sample.

    Args:
        outputs: shape (samples, classes), (samples, numbers), or with positions in between.
        classes: whether they are logits.
        names: of the labels, where they have any.

    Returns:
        `label`, its `name` where it has one, and its `probability` for logits (lists where there
        are positions), else `value`.
    """
    if not classes:
        values = outputs.squeeze(-1) if outputs.ndim > 1 and outputs.shape[-1] == 1 else outputs
        return [{"value": value} for value in values.tolist()]
    best = outputs.softmax(-1).max(-1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    known = names or {}

    def name_of(label: int | list[int]) -> str | list[str | None] | None:
        return [known.get(each) for each in label] if isinstance(label, list) else known.get(label)

    return [
        {
            "label": label,
            **({"name": name_of(label)} if known else {}),
            "probability": probability,
        }
        for label, probability in pairs
    ]
