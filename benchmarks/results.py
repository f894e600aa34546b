"""Writes docs/results.md and the README's table from the JSON files of docs/results/.

Figures reach a reader only through this script: none is typed by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"
sys.path.insert(0, str(Path(__file__).parent))

import accelerators  # noqa: E402  neighbours in this folder
import grokking  # noqa: E402
import healing  # noqa: E402
import quality  # noqa: E402
import training_time  # noqa: E402


def load(name: str) -> Any:
    """A benchmark's figures, or None when it has not been run."""
    file = FOLDER / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def accelerators_section(found: dict[str, Any]) -> list[str]:
    words = {"mul": "Multiplication", "div": "Division", "add": "Addition"}
    lines = [
        "## Accelerators of grokking, side by side",
        "",
        "The pipelines of `pipelines/grokking/` (pre-norm network of 2 layers, width 128). Every",
        "method had the same tuning budget: eight settings on seed 100, the best of them on seed 101",
        "too, up to 1,500 steps; ternary and fp32 apart, on multiplication modulo 97. Division and",
        'addition use those settings: the best three and the two yardsticks. "never" is not within',
        "4,000 steps; CPU seconds are given where every seed got there.",
    ]
    for task, title in words.items():
        for precision in ("ternary", "fp32"):
            rows = accelerators.table(found, precision, task)
            if rows:
                lines += ["", f"{title}, {precision}:", "", *rows]
    return lines


def _medians_of_time(found: dict[str, Any]) -> dict[str, float]:
    """The median ratio of each recipe that reached the accuracy on all seeds."""
    return {
        recipe.title: statistics.median(share)
        for recipe in training_time.RECIPES
        if (share := training_time.ratios(found, recipe.name)) is not None
    }


def training_time_section(found: dict[str, Any]) -> list[str]:
    shares = _medians_of_time(found)
    best = min(shares, key=shares.__getitem__)
    return [
        "## Training time to the same accuracy",
        "",
        "The target of the Phase 5 document, half of the baseline's training time at equal quality:",
        "95 % on multiplication modulo 97 against the fp32 network with AdamW at its tuned rate, in",
        "the same loop, every recipe with the same tuning budget; CPU seconds, one thread, recipes",
        "interleaved seed by seed; median and range of the ratios. All compute the answer position",
        "only.",
        "",
        *training_time.table(found),
        "",
        f"The best: {shares[best]:.2f} x the baseline's time ({best}).",
    ]


def overhead(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Overhead of the loop",
        "",
        "A step of a tiny perceptron (128-64-10, batch 32, AdamW), CPU time as a ratio to a bare",
        "hand-written loop in the same process: median over interleaved pairs. The figures are the",
        "medians of five fresh processes and their range (where a process's memory lies moves them).",
        "Goals: 1.05 without and 1.08 with the finite check, 1.10 for the typical set-up.",
    ]
    titles = {
        "plain": "Nothing but the training (ten plugins that each listen to one event)",
        "typical": "With clipping, a log line every 50 steps and a progress bar on both sides",
    }
    for key, title in titles.items():
        lines += ["", f"{title}:", "", "| | ratio | range |", "|---|---|---|"]
        for name, (median, low, high) in found[key].items():
            lines.append(f"| {name} | {median:.3f} | {low:.3f} - {high:.3f} |")
    equal = "equal" if found["bit_equal"] else "NOT equal"
    lines += ["", f"Final weights after 100 steps are {equal} to the bare loop's, bit for bit."]
    return lines


def dispatch(found: dict[str, Any]) -> list[str]:
    lines = [
        "## One event",
        "",
        "| listeners | compiled, us | live pluggy call, us | times cheaper |",
        "|---|---|---|---|",
    ]
    for name, row in found.items():
        lines.append(
            f"| {name} | {row['compiled_us']:.3f} | {row['pluggy_us']:.3f} | {row['ratio']:.0f} |"
        )
    return lines


def low_bits(found: dict[str, Any]) -> list[str]:
    return [
        "## Low-bit networks beside fp32 at equal steps",
        "",
        "The same pipeline, steps and settings, tuned for the ternary network; only the quantizer",
        "differs. fp32 likes another rate: the second row has the best of four for it (tried on a",
        "seed of its own, the last table), and is what the others are to be compared with. Text: a Llama of 1.8 M weights on the help texts of Python, bytes as tokens,",
        "200 steps (`char_llama_gguf`). Digits: a perceptron on handwritten digits (`digits_npy`).",
        *quality.table(found),
        *quality.rates_table(found),
    ]


def healing_section(found: dict[str, Any]) -> list[str]:
    return [
        "## Healed: from full precision to ternary",
        "",
        f"A Llama of 0.3 M weights (`small_llm`, {healing.STEPS} steps; bytes of Python's help texts), and",
        f"`heal_llm` in {healing.STEPS // 2} steps from it, each part of the recipe left out once. The network in",
        "full precision has not converged: the last row is what the further steps alone give it.",
        "",
        *healing.table(found),
    ]


def gpu_speed(found: dict[str, Any]) -> list[str]:
    lines = [
        "## BitNet layers on a GPU",
        "",
        f"{found['device']}, torch {found['torch']}; two blocks, {found['tokens']} tokens in",
        "sequences of 2048, fp32 latent weights under bf16 autocast, fused AdamW; time of a training",
        "step between events on the device, waits for the host included, as a ratio to `nn.Linear`,",
        "median (range) of the rounds, all interleaved; beside it the growth of memory within a",
        "step. *compiled*: `torch.compile` on both sides; torchao's layers are made for it; *graphs*:",
        "the same in mode `reduce-overhead`. Those",
        "marked *not ternary* multiply full-precision weights in int8 or float8, for comparison.",
        "",
        "| width | layers | time | memory |",
        "|---|---|---|---|",
    ]
    for width, rows in found.items():
        if not width[0].isdigit():
            continue
        for name, row in rows.items():
            lines.append(
                f"| {width} | {name} | {row['median']:.3f} ({row['least']:.3f} - {row['most']:.3f}) "
                f"| {row['peak_ratio']:.2f} |"
            )
    return lines


def gradient_parity(found: dict[str, Any]) -> list[str]:
    runs = found["runs"]
    losses = {
        arm: [run["loss"] for run in runs if run["arm"] == arm]
        for arm in ("exact", "int8 backward")
    }
    means = {arm: statistics.fmean(values) for arm, values in losses.items()}
    lines = [
        "## Gradients in int8: where training ends",
        "",
        f"{found['device']}, torch {found['torch']}; a ternary byte-level network of four blocks,",
        f"width 256, 2,000 steps of 8,192 tokens, {len(losses['exact'])} seeds, the same batches; "
        "validation",
        "loss, and how far the weights' gradients of one batch are off at the end (of their norm,",
        "against the same layers in exact arithmetic), as they are and with planted outliers of",
        "100 sigma.",
        "",
        "| arithmetic | validation loss of each seed | mean |",
        "|---|---|---|",
    ]
    for arm, values in losses.items():
        message = ", ".join(f"{value:.3f}" for value in values)
        lines.append(f"| {arm} | {message} | {means[arm]:.3f} |")
    lines += [
        "",
        "| outliers | worst layer of all seeds | mean | least cosine |",
        "|---|---|---|---|",
    ]
    for how, name in (("none", "none"), ("numbers", "20 numbers"), ("token", "a token")):
        rows = [run["errors"][how] for run in runs if "errors" in run]
        lines.append(
            f"| {name} | {max(row['worst'] for row in rows):.2%} "
            f"| {statistics.fmean(row['mean'] for row in rows):.2%} "
            f"| {min(row['least_cosine'] for row in rows):.5f} |"
        )
    return lines


def startup(found: dict[str, float]) -> list[str]:
    lines = [
        "## Start of the command line",
        "",
        "CPU time as a share of `import torch`, measured side by side, none of them imports torch:",
        "",
        "| command | share |",
        "|---|---|",
    ]
    return lines + [f"| `{name}` | 1/{value:.1f} |" for name, value in found.items()]


def filters(found: dict[str, float]) -> list[str]:
    lines = [
        "## The Grokfast filter on 25 million fp32 parameters",
        "",
        "CPU time as a ratio to the memory floor (read and write gradient and average once):",
        "",
        "| | ratio |",
        "|---|---|",
    ]
    together = "filter and AdamW as one, "
    for name, value in found.items():
        if not name.startswith(together):
            lines.append(f"| {name} | {value:.2f} |")
    if f"{together}compiled" in found:
        lines += [
            "",
            "Filter and AdamW as one update (`optimizer: {use: grokfast_adamw}`), compiled into one loop:",
            f"{found[f'{together}compiled']:.2f} x the two apart (filter in pieces, torch's fused "
            "kernel); without a",
            f"compiler {found[f'{together}not compiled']:.2f} x. Goal: 0.75. Apart they move eleven "
            "arrays, together nine: at one",
            "and the same rate of memory that is 0.82 x.",
        ]
    return lines


def large_vocabulary(found: dict[str, Any]) -> list[str]:
    whole, pieces = found["peak_mib"]["all at once"], found["peak_mib"]["in pieces"]
    return [
        "## A large vocabulary",
        "",
        "Head and cross-entropy for 2,048 tokens over 32,000 classes, forward and backward, in",
        f"pieces of 512 rows (`loss: {{use: language_model}}`): {found['time_ratio']:.2f} x the CPU "
        "time of all at once,",
        f"{pieces:.0f} MiB at the peak in the place of {whole:.0f} (the logits alone are "
        f"{found['logits_mib']:.0f}).",
    ]


def positions(found: dict[str, float]) -> list[str]:
    lines = [
        "## Answer positions only",
        "",
        "A training step of the grokking task that computes all four positions, as a multiple of",
        "one that computes in the last block, norm and head only the position that the loss reads:",
        "",
        "| | times dearer |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {value:.2f} |" for name, value in found.items()]


def packing_section(found: dict[str, Any]) -> list[str]:
    equal = "the same bytes as" if found["bytes_equal"] else "OTHER BYTES than"
    ratios = found["times_the_package"]
    lines = [
        "## Packing ternary weights",
        "",
        "4096 x 4096 levels, one thread: gigabytes of the fp32 weights that they stand for, in a",
        "second of CPU time. Goal: 10 for two bits.",
        "",
        "| | GB/s |",
        "|---|---|",
    ]
    lines += [f"| {name} | {value:.1f} |" for name, value in found["gigabytes"].items()]
    lines += [
        "",
        f"The blocks of llama.cpp are {equal} those of the package `gguf`, and are packed "
        f"{ratios['TQ2_0']:.1f} times (TQ2_0, goal 3)",
        f"and {ratios['TQ1_0']:.1f} times (TQ1_0) as fast: it starts from fp32, we from levels.",
    ]
    return lines


def data_section(found: dict[str, Any]) -> list[str]:
    samples, tokens = found["samples"], found["tokens"]
    lines = [
        "## Batches from files",
        "",
        "Shuffled batches of 256 from 200,000 x 128 float32 and a label, later passes, no workers: the",
        "share of the limit (one numpy `take` a batch from memory into memory that is used again) and",
        "of a `take` into fresh memory from a mapped file, and times torch's `DataLoader` sample by",
        f"sample; CPU time, one interleaved run, {found['rounds']} rounds of {found['batches']} batches "
        "(peers: 12).",
        "Goals: 70 % of the limit, 90 % of fresh, 10 x; chunks of HDF5 in place 40 %.",
        "",
        "| | share of the limit | share of fresh | times `DataLoader` |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {share:.1%} | {samples['shares_of_fresh'][name]:.1%} | "
        f"{samples['times_loader'][name]:.2f} |"
        for name, share in samples["share_of_limit"].items()
    ]
    lines += [
        "",
        "JSON, pickle, npz, Parquet and packed HDF5 come from the cache, but for `HDF5, gzip,",
        "streaming`, which unpacks chunk by chunk: "
        f"{samples['gzip_beside_slices']:.2f} x the rate of h5py's slices in the file's order",
        "(goal 0.9).",
        "",
        "Tokens: 32 random windows of 1,024 of 50 million uint16; the limit copies each window into",
        "memory that is used again. The common loop slices, widens and stacks x and y by themselves.",
        "Goals: 10 x the common loop; 45 % of the limit as int64, 90 % as uint16.",
        "",
        "| | share of the limit | times the common loop |",
        "|---|---|---|",
    ]
    return lines + [
        f"| {name} | {share:.0%} | {tokens['times_common'][name]:.1f} |"
        for name, share in tokens["share_of_limit"].items()
    ]


def data_use_section(found: dict[str, Any]) -> list[str]:
    first, memory = found["first_use"], found["megabytes"]
    names = {"frec": "binary", "h5": "HDF5", "chunks.h5": "HDF5, chunks", "gzip.h5": "HDF5, gzip",
             "npz": "npz", "pkl": "pickle", "json": "JSON", "jsonl": "JSON Lines"}  # fmt: skip
    lines = [
        "## First use, memory, shuffling and resumption",
        "",
        "200,000 x 128 float32. Opening for the first time hashes the file and looks at every number;",
        "again it does neither while size, times and inode are what they were. The first pass is",
        "beside numpy's over a mapped file.",
        "",
        "| | first pass (goal 80 %) | opened first, ms | again, ms (goal 50) |",
        "|---|---|---|---|",
    ]
    for form, share in first["first_pass_beside_numpy"].items():
        lines.append(
            f"| {names[form]} | {share:.0%} | {first['milliseconds_to_open_first'][form]:.0f} | "
            f"{first['milliseconds_to_open_again'][form]:.1f} |"
        )
    lines += [
        "",
        "Anonymous memory over that at the start, in megabytes (goal: 64 and 3 batches), streaming:",
        "",
        "| | opening and conversion | an epoch |",
        "|---|---|---|",
    ]
    lines += [
        f"| {names[form]} | {own['opening']:.0f} | {own['epoch']:.0f} |"
        for form, own in memory.items()
    ]
    chi, resumption = found["chi_squared"], found["resumption_in_10_million"]
    shuffles = ", ".join(f"{name} {value:.2f}" for name, value in chi.items())
    return [
        *lines,
        "",
        "Labels of a batch of a file in the order of its labels, chi-squared for each degree of",
        f"freedom (1 is perfect; goals 1.1 full, 2.0 streaming): {shuffles}.",
        "",
        f"A position amid 10 million samples: next batch after {resumption['milliseconds']:.1f} ms "
        f"(goal 50), {resumption['bytes']:.0f} bytes (goal 300).",
        f"Packed HDF5 into the cache, hashed and checked: {found['conversion']['gzip_beside_slices']:.2f} "
        "x the rate of h5py's slices alone (goal 0.8).",
        f"Quality with duplicates and outliers adds {found['conversion']['quality_adds']:.0%} to the "
        "reading of JSON Lines (goal 30 %).",
        f"Importing the data part takes {found['seconds_to_import_over_torch']:.2f} s over torch "
        "(goal 0.3).",
    ]


def conversion_section(found: dict[str, Any]) -> list[str]:
    shares, rates = found["share_of_parsing"], found["megabytes_per_second"]
    return [
        "## JSON to columns",
        "",
        f"{found['megabytes']:g} MB of records of 128 numbers to checked float32 columns on disk, in",
        "blocks of a megabyte, beside parsing alone: for an array a scan for the ends of records and",
        f"orjson for each block, for lines orjson for each line; {found['rounds']} rounds.",
        "",
        "| | share of the rate of parsing | MB/s |",
        "|---|---|---|",
        f"| array | {shares['array']:.0%} | {rates['array']:.0f} |",
        f"| lines | {shares['lines']:.0%} | {rates['lines']:.0f} |",
        f"| array, beside orjson for the whole file at once | "
        f"{shares['array beside the whole file at once']:.0%} | {rates['array']:.0f} |",
    ]


def grokking_section(found: dict[str, Any]) -> list[str]:
    return [
        "## Steps to 95 % on multiplication modulo 97",
        "",
        "2 layers, width 128, 4 heads, batch 512, half of the pairs. Ternary: 1.58-bit weights and",
        "int8 activations in all linear layers of the blocks, embeddings and head in fp32. Pre-norm",
        "blocks; the paper's rows use the paper's network. Validated every 20 steps (the paper's: 10);",
        "CPU seconds of training and validation, one thread.",
        "",
        grokking.table(found),
        "",
        *reading(found),
    ]


def _median(found: dict[str, Any], name: str) -> float | None:
    row = next(row for row in grokking.ROWS if row.name == name)
    items = [found.get(f"{name}/{seed}") for seed in row.seeds]
    if any(item is None or not item["reached"] for item in items):
        return None
    return float(statistics.median(item["steps"] for item in items if item is not None))


def reading(found: dict[str, Any]) -> list[str]:
    """What the figures say of the filter, computed from them."""
    pairs = [
        ("ternary at 2e-3", "ternary_showcase", "ternary_2e3"),
        ("ternary at 1e-3", "ternary_1e3_filter", "ternary_1e3"),
        ("fp32 at 2e-3", "fp32_2e3_filter", "fp32_2e3"),
    ]
    lines = ["What the filter does at the same settings (steps without / steps with, medians):", ""]
    for title, with_filter, without in pairs:
        a, b = _median(found, without), _median(found, with_filter)
        if a is None or b is None:
            continue
        verdict = "helps" if a > b else "does not help"
        lines.append(f"- {title}: {a / b:.2f} x: it {verdict}.")
    honest, showcase = _median(found, "fp32_3e3"), _median(found, "ternary_showcase")
    tuned = _median(found, "ternary_3e3")
    if honest is not None and showcase is not None:
        lines.append(
            f"- AdamW at its tuned rate (3e-3) without the filter needs {honest:.0f} steps in fp32"
            + (f" and {tuned:.0f} in ternary" if tuned is not None else "")
            + f"; the showcase needs {showcase:.0f}."
        )
    paper = _median(found, "paper_ema")
    if paper is not None:
        lines.append(
            f"- The paper's pipeline needs {paper:.0f} in the median of these seeds. With seed 0 it "
            "takes the steps that the paper's code reports (one run each): 910 (EMA), 790 (MA)."
        )
    return lines


def bitnet_speed(found: dict[str, Any]) -> list[str]:
    processor, errors = found["processor"], found["errors"]
    lines = [
        "## A training step with BitNet layers",
        "",
        "CPU time of forward, backward and update (AdamW) as a ratio to the same network with",
        "`nn.Linear`; all variants interleaved in one process, one thread; median over the rounds",
        "(ratio of the minima). Llama-like blocks: width 512, feed-forward 1376, sequences of 256.",
        f"Processor: {processor['name']} with {', '.join(processor['features']) or 'no int8'}.",
        "Goals: exact 1.05, under autocast 1.05, in micro-batches 1.08; int8 0.80 and below torchao,",
        "in micro-batches 0.90; with bf16 backward 0.60; saved for backward 1.25 exact, 1.00 int8;",
        "peak 1.25 exact, 1.15 int8.",
        "",
        "| | fp32, 4 blocks, 2048 tokens | bf16 autocast, 1 block, 2048 tokens "
        "| 8 micro-batches of 256 tokens | saved for backward | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in found["fp32"]:
        cells = []
        for table in ("fp32", "autocast", "micro"):
            row = found[table].get(name, {})
            message = "fails" if "error" in row else "-"
            cells.append(
                f"{row['median']:.2f} ({row['minimum']:.2f})" if "median" in row else message
            )
        row = found["memory"].get(name)
        cells += ["-", "-"] if row is None else [
            f"{row['saved_ratio']:.2f}", f"{row['peak_ratio']:.2f}"
        ]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    low = errors["int8, bf16 backward"]["worst_gradient"]
    return [
        *lines,
        "",
        "Exact is bit-equal to transformers' AutoBitLinear, forward and backward. The integer sums",
        f"of int8 are exact: outputs of a block differ by {errors['int8']['output']:.0e}, gradients",
        f"by {errors['int8']['worst_gradient']:.0e} of their norm; with bf16 products on the way",
        f"back gradients differ by at most {low:.1e}. Where the processor lacks the instructions the",
        "int8 modes say so and take the exact path.",
    ]


def monitors(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Monitors",
        "",
        "CPU time of a step with all monitors that the pipelines name (bar on a terminal, metrics",
        "file, resources, report, status, log; loss, accuracy, norm, rate, figures of BitNet and",
        "Grokfast; a log line every 20 steps), as a ratio to a session without any, interleaved:",
        "median and middle half. Goal for the showcase: 1.02.",
        "",
        "| | CPU time of a step without | with monitors | middle half | none against none |",
        "|---|---|---|---|---|",
    ]
    for title, row in found["cost"].items():
        median, low, high = row["all default monitors"]
        noise = row["none again (the noise)"][0]
        lines.append(
            f"| {title} | {row['step_us'] / 1000:.2f} ms | {median:.3f} | {low:.3f} - {high:.3f} | "
            f"{noise:.3f} |"
        )
    lines += [
        "",
        "Seconds from the telling of an event until another process sees it (20 events; goal: 1):",
        "",
        "| seen in | median | longest |",
        "|---|---|---|",
    ]
    for name, (median, longest) in found["latency"].items():
        lines.append(f"| {name} | {median:.3f} | {longest:.3f} |")
    return lines


def utilization(found: dict[str, Any]) -> list[str]:
    share = found["busy_share"]
    message = "not known" if share is None else f"{share:.1%}"
    each = ", ".join("not known" if item is None else f"{item:.1%}" for item in found["each_epoch"])
    return [
        "## Utilisation of the GPU",
        "",
        f"{found['device']}, {found['workload']}: over {found['epochs']} whole epochs "
        f"({found['seconds']:.0f} s) a kernel was running {message} of the wall time, by the driver's "
        f"counter. By epoch: {each}; a validation falls into the last one.",
    ]


def hash_cost_section(found: dict[str, Any]) -> list[str]:
    machine = found["processor"]
    rows = [
        f"| {size} MiB | {share['xxh3_128']:.1%} | {share['sha256']:.1%} | {share['writing']:.1%} |"
        for size, share in found["shares"].items()
    ]
    return [
        "## Hashing a checkpoint",
        "",
        "CPU time of the hash while tensors are written, as a share of `torch.save` of the same",
        f"tensors; goal: at most 10 %. {machine['name']} with {', '.join(machine['sets'])}. The last",
        "column is the writing itself.",
        "",
        "| tensors | XXH3-128 (ours) | SHA-256 | writing |",
        "|---|---|---|---|",
        *rows,
    ]


SECTIONS = {
    "grokking": grokking_section,
    "accelerators": accelerators_section,
    "training_time": training_time_section,
    "overhead": overhead,
    "dispatch": dispatch,
    "monitors": monitors,
    "utilization": utilization,
    "quality": low_bits,
    "healing": healing_section,
    "startup": startup,
    "filter": filters,
    "answer_positions": positions,
    "large_vocabulary": large_vocabulary,
    "packing": packing_section,
    "bitnet_speed": bitnet_speed,
    "gpu_speed": gpu_speed,
    "gradient_parity": gradient_parity,
    "data": data_section,
    "data_use": data_use_section,
    "conversion": conversion_section,
    "hash_cost": hash_cost_section,
}


def page() -> str:
    """The whole page."""
    lines = [
        "# Results",
        "",
        "Written by `python benchmarks/results.py` from the files in `docs/results/`, which the",
        "scripts of `benchmarks/` wrote (`forge bench NAME`). Machine: 2 shared cores of an AMD EPYC",
        "(AVX-512) virtual machine without a GPU, torch 2.13.0, Python 3.11. Ratios of CPU time,",
        "both sides interleaved in one run; the machine is shared, so read the spread too.",
        "",
    ]
    for name, section in SECTIONS.items():
        result = load(name)
        if result is not None:
            lines += [*section(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def _overhead_rows(found: dict[str, Any]) -> list[str]:
    plain, typical = found["plain"], found["typical"]
    check = plain["forge, 10 plugins, finite check on"][0]
    noise = plain["bare loop again (the noise)"][0]
    bar = typical["forge, clip, log every 50, bar"][0]
    return [
        f"| a step of a tiny network, ten plugins, finite check | {check:.2f} x a bare loop "
        f"(bare against bare: {noise:.2f}) |",
        f"| the same with clipping, log and progress bar on both sides | {bar:.2f} x |",
    ]


def _dispatch_rows(found: dict[str, Any]) -> list[str]:
    return [
        f"| an event nobody listens to / ten listen to | 1/{found['0']['ratio']:.0f} / "
        f"1/{found['10']['ratio']:.0f} of a live pluggy call |"
    ]


def _monitors_rows(found: dict[str, Any]) -> list[str]:
    row = found["cost"]["the showcase"]
    cost, noise = row["all default monitors"][0], row["none again (the noise)"][0]
    longest = found["latency"]["`forge watch`"][1]
    return [
        f"| a step of the showcase with all its monitors | {cost:.3f} x without any (none "
        f"against none: {noise:.3f}) |",
        f"| until `forge watch` shows an event, longest of 20 | {longest:.2f} s |",
    ]


def _startup_rows(found: dict[str, float]) -> list[str]:
    shares = " / ".join(f"1/{value:.0f}" for value in found.values())
    return [f"| `--help` / `plugins` / `check` / `plan` | {shares} of `import torch` |"]


def _data_rows(found: dict[str, Any]) -> list[str]:
    samples = found["samples"]
    formats = ("binary", "HDF5", "HDF5, gzip", "pickle", "JSON", "JSON Lines", "npz", "Parquet")
    ours = [samples["share_of_limit"][name] for name in formats]
    times = samples["times_loader"]["JSON Lines"]
    return [
        f"| shuffled batches from any format, share of a bare gather from memory | "
        f"{min(ours):.0%} - {max(ours):.0%} ({times:.0f} x a per-sample `DataLoader`) |"
    ]


def _bitnet_rows(found: dict[str, Any]) -> list[str]:
    step = {name: row["median"] for name, row in found["fp32"].items() if "median" in row}
    return [
        "| a training step of ternary Llama blocks: exact / int8 / int8 with bf16 back | "
        f"{step['exact']:.2f} / {step['int8']:.2f} / {step['int8, bf16 backward']:.2f} x "
        f"`nn.Linear` (transformers {step['transformers']:.2f}, torchao {step['torchao']:.2f}) |"
    ]


def _quality_rows(found: dict[str, Any]) -> list[str]:
    medians = {
        name: statistics.median(found[f"text/{name}/{seed}"]["figures"]["loss"] for seed in quality.SEEDS)
        for name in ("fp32_own_rate", "ternary", "binary")
    }  # fmt: skip
    return [
        "| validation loss of a 1.8 M Llama at equal steps: fp32 / ternary / 1 bit, fp32 and "
        "ternary each at the best of four rates | "
        f"{medians['fp32_own_rate']:.2f} / {medians['ternary']:.2f} / {medians['binary']:.2f} |"
    ]


def _gpu_rows(found: dict[str, Any]) -> list[str]:
    widths = " and ".join(name for name in found if name.isdigit())
    shares = " and ".join(
        "{:.2f} / {:.2f} / {:.2f} / {:.2f}".format(
            *(
                row[name]["median"]
                for name in ("exact", "int8", "int8, bf16 backward", "int8, int8 backward")
            )
        )
        for width, row in found.items()
        if width.isdigit()
    )
    return [
        f"| the same and int8 both ways, on an {found['device']}, width {widths}, bf16 autocast | {shares} x `nn.Linear` |"
    ]


def _filter_rows(found: dict[str, float]) -> list[str]:
    return [
        f"| Grokfast EMA filter, 25 M parameters | {found['EMA filter']:.2f} x the memory floor "
        f"(published code {found['EMA filter, published code']:.1f} x) |"
    ]


def _grokking_rows(found: dict[str, Any]) -> list[str]:
    names = {
        "ternary_showcase": "ternary, AdamW 2e-3, filter (the showcase)",
        "ternary_2e3": "the same without the filter",
        "fp32_3e3": "fp32, AdamW at its tuned rate, no filter",
        "paper_ema": "the Grokfast paper's pipeline",
    }
    return [
        f"| steps to 95 %, median of the seeds: {title} | {median:.0f} |"
        for name, title in names.items()
        if (median := _median(found, name)) is not None
    ]


def _time_rows(found: dict[str, Any]) -> list[str]:
    shares = _medians_of_time(found)
    best = min(shares, key=shares.__getitem__)
    return [
        f"| CPU time to 95 %, best recipe ({best}) | {shares[best]:.2f} x that of fp32 with AdamW "
        "at its tuned rate |"
    ]


ROWS: dict[str, Callable[[Any], list[str]]] = {
    "overhead": _overhead_rows,
    "dispatch": _dispatch_rows,
    "monitors": _monitors_rows,
    "startup": _startup_rows,
    "data": _data_rows,
    "bitnet_speed": _bitnet_rows,
    "gpu_speed": _gpu_rows,
    "quality": _quality_rows,
    "filter": _filter_rows,
    "grokking": _grokking_rows,
    "training_time": _time_rows,
}


def readme_table() -> str:
    """The few rows that the README shows."""
    lines = ["| | measured |", "|---|---|"]
    for name, rows in ROWS.items():
        result = load(name)
        if result is not None:
            lines += rows(result)
    return "\n".join(lines)


def with_table(text: str) -> str:
    """The README with its table written anew."""
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if END in rest else rest
    return f"{before}{BEGIN}\n{readme_table()}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say whether the files are current")
    options = parser.parse_args()
    texts = {PAGE: page(), README: with_table(README.read_text(encoding="utf-8"))}
    stale = [
        file
        for file, text in texts.items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]
    if options.check:
        for file in stale:
            print(f"{file.relative_to(ROOT)}: not what docs/results/ says")
        sys.exit(1 if stale else 0)
    for file, text in texts.items():
        file.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} and the README's table are written")


if __name__ == "__main__":
    main()
