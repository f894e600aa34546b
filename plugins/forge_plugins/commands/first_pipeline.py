"""The text of a pipeline file for data that were looked at."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from forge_plugins.commands.suggestion import Suggestion

_STEPS: Final = 600
"""Optimizer steps of a first run, about; larger data get one epoch or more of them."""
_MOST: Final = 4000
_HELD: Final = 0.2


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Args:
        batch: samples of it.
        steps: optimizer steps.
    """

    batch: int
    steps: int


def length_of(samples: int) -> Length:
    """Small batches for few samples; at least an epoch, at most `_MOST` steps."""
    batch = next(size for size, most in ((16, 1000), (32, 10_000), (64, 2**62)) if samples < most)
    epoch = max(1, round(samples * (1 - _HELD)) // batch)
    return Length(batch, min(_MOST, max(_STEPS, 2 * epoch)))


def _flow(values: dict[str, Any]) -> str:
    """Settings in one line of YAML."""
    parts = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items()]
    return f"{{{', '.join(parts)}}}"


def _network(suggestion: Suggestion) -> list[str]:
    if suggestion.kind == "text":
        return [
            "model: {use: llama_decoder, with: {layers: 2, width: 128, heads: 4, hidden: 256}}",
            "quantizer: {use: bitnet}    # ternary weights; leave it out to train in fp32",
        ]
    if suggestion.shape is not None and len(suggestion.shape) in (2, 3):
        return [
            "model: {use: conv_net, with: {widths: [32, 64]}}",
            "quantizer: {use: bitnet, with: {convolutions: true}}    # ternary; without: fp32",
        ]
    return [
        "model: {use: mlp, with: {hidden: [64, 64]}}",
        "quantizer: {use: bitnet}    # ternary weights; leave it out to train in fp32",
    ]


def _ends(suggestion: Suggestion) -> list[str]:
    """What is learned and how it is measured."""
    if suggestion.target == "number":
        return [
            "loss: {use: regression}",
            "validators: [{use: regression}]    # r2: the share of the variance that is explained",
            "callbacks: [{use: best_checkpoint, with: {metric: r2, mode: max}}]",
        ]
    if suggestion.target == "next":
        return [
            "loss: {use: cross_entropy}",
            "validators: [{use: language_model}]",
            "callbacks: [{use: best_checkpoint, with: {metric: loss, mode: min}}]",
        ]
    return [
        "loss: {use: cross_entropy}",
        "validators: [{use: classification}]",
        "callbacks: [{use: best_checkpoint, with: {metric: accuracy, mode: max}}]",
    ]


def _data(suggestion: Suggestion, length: Length) -> list[str]:
    settings = dict(suggestion.settings)
    if suggestion.kind == "text":
        settings |= {"tokenizer": "bytes", "sequence_length": 128, "batch_size": 16}
        if suggestion.samples < 4000:
            settings["validation_split"] = 0.1
    else:
        settings |= {"batch_size": length.batch, "validation_split": _HELD}
    lines = [f"data:    # all settings: forge plugins data.{suggestion.plugin}"]
    lines += [f"  use: {suggestion.plugin}", "  with:"]
    lines += [
        f"    {name}: {json.dumps(value, ensure_ascii=False)}" for name, value in settings.items()
    ]
    return lines


def pipeline_text(suggestion: Suggestion, name: str, schema: str) -> str:
    """A commented pipeline.

    Args:
        suggestion: of a look at the data.
        name: of the run.
        schema: where the schema lies, seen from the file.
    """
    length = length_of(suggestion.samples)
    steps = 400 if suggestion.kind == "text" else length.steps
    run = {
        "name": name, "seed": 0, "max_steps": steps, "validate_every": max(1, steps // 10),
        "log_every": max(1, steps // 30), "save_every": max(1, steps // 5),
    }  # fmt: skip
    rate = {"text": "4e-3", "pictures": "5e-3"}.get(suggestion.kind, "5e-3")
    lines = [
        f"# yaml-language-server: $schema={schema}",
        f"# To beat: {suggestion.baseline}.",
        f"# Next:    forge run {name}.yaml",
        "# Then:    forge predict RUN_DIR FILE; another setting: --set optimizer.with.lr=1e-3",
        "forge: 1",
        f"run: {_flow(run)}",
        *_data(suggestion, length),
        *_network(suggestion),
        f"optimizer: {{use: adamw, with: {{lr: {rate}, weight_decay: 0.01}}}}",
        "schedule: {use: warmup_cosine, with: {warmup_steps: 20, floor: 0.02}}",
        "gradients: [{use: clip_norm, with: {max_norm: 1.0}}]",
        *_ends(suggestion),
        "exporters: [{use: packed_ternary}, {use: state_dict}]    # what others can load",
        "observers: [{use: progress_bar}, {use: metrics_jsonl}, {use: html_report}]",
    ]
    return "\n".join(lines) + "\n"
