"""CPU time of a ternary training step of a transformers model, by our layers and by its own.

    python benchmarks/transformers_step.py [--rounds 15] [--compiled]

The same Llama, loaded from one folder: once with `quantizer.bitnet`'s layers (exact, and int8 where
the processor has whole-number products), once with transformers' own AutoBitLinear (online). A step
is a forward pass, a backward pass and AdamW; rounds are interleaved, the median of the ratios
counts. Marks: exact at most 1.03, int8 at most 0.85. `--compiled`: transformers' quantizers stay
compiled, as their decorators ask (minutes before the first step).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from forge_plugins.interchange.model_folder import read_model_folder
from forge_plugins.interchange.transformers_model import load_model
from forge_plugins.mathematics.quantization.conversion import convert_model_to_bitnet
from forge_plugins.mathematics.quantization.quantized_linear import lacks_int8
from forge_plugins.mathematics.quantization.scheme import Scheme

MARKS = {"exact": 1.03, "int8": 0.85}
SIZES = {
    "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 256,
}  # fmt: skip


def make(folder: Path) -> None:
    """A model folder, and the same with online quantization in its configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    for name in ("plain", "online"):
        model.save_pretrained(folder / name)
    file = folder / "online" / "config.json"
    about = {"quant_method": "bitnet", "linear_class": "autobitlinear",
             "quantization_mode": "online", "modules_to_not_convert": ["lm_head"]}  # fmt: skip
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": about}))


class Trainer:
    """A model and its optimizer."""

    def __init__(self, folder: Path, scheme: Scheme | None) -> None:
        model: Any = load_model(read_model_folder(str(folder)), seed=0).model
        if scheme is not None:
            model, report = convert_model_to_bitnet(model, scheme)
            assert len(report.layers) == 7 * SIZES["num_hidden_layers"]
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def step(self, tokens: torch.Tensor) -> tuple[float, float]:
        """CPU seconds and the loss."""
        begun = time.process_time()
        logits = self.model(tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.process_time() - begun, float(loss.detach())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.compiled:
        torch.compiler.set_stance("force_eager")
    with tempfile.TemporaryDirectory() as place:
        make(Path(place))
        kinds: dict[str, Scheme | None] = {"theirs": None, "exact": Scheme()}
        if lacking := lacks_int8("cpu"):
            print(f"int8 is not measured: {lacking}")
        else:
            kinds["int8"] = Scheme(arithmetic="int8")
        trainers = {
            name: Trainer(Path(place) / ("plain" if scheme else "online"), scheme)
            for name, scheme in kinds.items()
        }
        tokens = torch.randint(SIZES["vocab_size"], (4, 129))
        first = {name: trainer.step(tokens)[1] for name, trainer in trainers.items()}
        apart = abs(first["exact"] - first["theirs"]) / first["theirs"]
        assert apart <= (1e-3 if options.compiled else 0.0), "another function is measured"
        ratios: dict[str, list[float]] = {name: [] for name in MARKS if name in trainers}
        for _ in range(options.rounds):
            seconds = {name: trainer.step(tokens)[0] for name, trainer in trainers.items()}
            for name, values in ratios.items():
                values.append(seconds[name] / seconds["theirs"])
    worst = 0
    for name, values in ratios.items():
        median = statistics.median(values)
        worst |= median > MARKS[name]
        print(f"{name}: {median:.3f} of transformers' own step (mark {MARKS[name]})")
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
