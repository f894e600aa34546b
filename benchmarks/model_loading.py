"""Memory and time of loading a model folder, as shares of the files' size.

    python benchmarks/model_loading.py [--megabytes 600]

A model of that size is drawn and saved in float32 and in bfloat16. Each is loaded in a process of
its own, by `model.transformers` and by transformers itself: the peak of the resident memory above
what the process had after it loaded a tiny model of the same family, by the files' size. The mark for float32 files is
1.1: the weights stay mapped from them. Weights that change their type are a second copy.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MARK = 1.1
WIDTH, HIDDEN, VOCABULARY = 1024, 2816, 32000


def status(entry: str) -> float:
    """A number of /proc/self/status, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) / 1e3
    raise LookupError(entry)


def make(folder: Path, megabytes: int) -> None:
    """Save a model of about so many MB, once in each type."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    layer = (2 * WIDTH * WIDTH + WIDTH * WIDTH + 3 * WIDTH * HIDDEN) * 4 / 1e6
    layers = max(1, round((megabytes - 2 * VOCABULARY * WIDTH * 4 / 1e6) / layer))
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4,
    }  # fmt: skip
    tiny = {**sizes, "vocab_size": 32, "hidden_size": 64, "intermediate_size": 64}
    LlamaForCausalLM(LlamaConfig(**tiny)).save_pretrained(folder / "tiny")
    for name in ("float32", "bfloat16"):
        config = LlamaConfig(**sizes)
        model = LlamaForCausalLM(config).to(getattr(torch, name))
        model.save_pretrained(folder / name, max_shard_size="200MB")


def loaded(folder: Path, way: str, dtype: str) -> Any:
    """The model of a folder."""
    import torch

    from forge_plugins.interchange.model_folder import read_model_folder
    from forge_plugins.interchange.transformers_model import load_model

    if way == "forge":
        return load_model(read_model_folder(str(folder)), seed=0, dtype=dtype).model
    from transformers import AutoModelForCausalLM

    kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True)
    total = sum(float(parameter.detach().sum()) for parameter in model.parameters())  # all is read
    assert total == total
    return model


def load(name: str, way: str, dtype: str) -> None:
    """Load in this process and print what it took."""
    folder = Path(name)
    loaded(folder.parent / "tiny", way, dtype)
    before, begun = status("VmRSS"), time.process_time()
    model = loaded(folder, way, dtype)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    print(json.dumps({
        "peak": (status("VmHWM") - before) * 1e6 / size,
        "seconds": time.process_time() - begun,
        "megabytes": size / 1e6,
        "dtype": str(next(model.parameters()).dtype),
    }))  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=600)
    parser.add_argument("--load", nargs=3, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load is not None:
        load(*options.load)
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), options.megabytes)
        print(f"{'file':<10}{'loaded as':<11}{'by':<14}{'MB':>7}{'peak / file':>13}{'CPU s':>8}")
        for stored, dtype in (
            ("float32", "float32"),
            ("bfloat16", "auto"),
            ("bfloat16", "float32"),
        ):
            for way in ("forge", "transformers"):
                command = [
                    sys.executable,
                    __file__,
                    "--load",
                    str(Path(place) / stored),
                    way,
                    dtype,
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                got = json.loads(done.stdout.splitlines()[-1])
                print(
                    f"{stored:<10}{dtype:<11}{way:<14}{got['megabytes']:>7.0f}{got['peak']:>13.3f}"
                    f"{got['seconds']:>8.2f}"
                )
                if way == "forge" and dtype in ("auto", stored):
                    worst = max(worst, got["peak"])
    print(f"largest without a change of type: {worst:.3f} (mark {MARK})")
    return int(worst > MARK)


if __name__ == "__main__":
    sys.exit(main())
