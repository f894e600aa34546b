"""From a network in full precision to a ternary one, by the two shipped pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clients import need
from kernel_parts import StopAfter
from live_exports import manifest
from model_folders import library, make_folder, settings
from safetensors.torch import load_file

from forge_kernel import load_pipeline, load_run, resume, run
from forge_kernel.errors import PlanError, PluginError
from forge_kernel.planning.plan import plan
from forge_plugins.mathematics.quantization.conversion import packed_form

QUIET = ("run.device=cpu", "run.save_every=null", "observers=null")
TINY = (
    "run.max_steps=3", "run.validate_every=null", "data.with.sequence_length=16",
    "data.with.validation_split=0.001",
)  # fmt: skip


def trained(name: str, folder: Path, *more: str) -> Any:
    return run(load_pipeline(name, [*QUIET, *more]), output_dir=folder, quiet=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run in full precision, with its folder of transformers."""
    library()
    folder = tmp_path_factory.mktemp("small") / "run"
    size = "model.with={layers: 1, width: 32, heads: 2, hidden: 48}"
    trained("small_llm", folder, *TINY, size, "exporters[0].with.verify=false")
    return folder


def test_a_network_without_levels_is_a_folder_of_transformers(plain: Path) -> None:
    """Planted: a tensor under its own name; a `quantization_config`."""
    one, two = load_run(plain), load_run(plain / "exports/transformers")
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(one.model(tokens), two.model(tokens).logits)
    assert manifest(plain, "transformers")["format"] == "transformers plain"
    text = "Größe of a list:\n"
    assert one.tokenizer.encode(text).tolist() == two.tokenizer.encode(text).tolist()


def test_it_is_healed_and_its_folder_is_packed(plain: Path, tmp_path: Path) -> None:
    start = plain / "exports/transformers"
    healing = [
        *TINY, f"model.with.path={start}", f"data.with.tokenizer_file={start}",
        "quantizer.with.warmup_start=1", "quantizer.with.warmup_steps=1",
    ]  # fmt: skip
    done = trained("heal_llm", tmp_path / "run", *healing, "exporters[0].with.verify=false")
    assert done.failed_exports == {}
    tensors = load_file(tmp_path / "run/exports/transformers/model.safetensors")
    packed = {name for name, value in tensors.items() if value.dtype is torch.uint8}
    assert len(packed) == 7
    opened = load_run(tmp_path / "run/exports/transformers")
    assert not any(packed_form(module) for module in opened.model.modules())
    assert isinstance(opened.generate("The ", max_tokens=2), str)


def test_a_plain_folder_of_a_model_of_transformers_has_its_names(tmp_path: Path) -> None:
    folder, text = make_folder(tmp_path / "model", "qwen2"), tmp_path / "text.txt"  # tied
    text.write_text("one and two are three. " * 40)
    exporter = "exporters=[{use: transformers, with: {layout: plain, dtype: DTYPE, verify: false}}]"
    for dtype in ("float32", "bfloat16"):
        chosen = settings(
            "qwen2", folder, tmp_path, "quantizer=null", "run.max_steps=1", "run.save_every=null",
            f"data.with.path={text}", "data.with.validation_split=0.1", exporter.replace("DTYPE", dtype),
        )  # fmt: skip
        done = run(load_pipeline("smoke", chosen), output_dir=tmp_path / dtype, quiet=True)
        again = load_file(tmp_path / dtype / "exports/transformers/model.safetensors")
        assert again.keys() == load_file(folder / "model.safetensors").keys()
        assert done.model is not None
        state = done.model.state_dict()
        assert all(torch.equal(value, state[name].to(value.dtype)) for name, value in again.items())
        assert {value.dtype for value in again.values()} == {getattr(torch, dtype)}


def test_a_quantized_network_is_not_written_plainly(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "model", "llama")
    chosen = settings(
        "llama", folder, tmp_path, "exporters=[{use: transformers, with: {layout: plain}}]"
    )
    with pytest.raises(PluginError, match="q_proj is quantized, and the layout plain would lose"):
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)


def test_without_the_first_run_the_healing_says_which_folder_is_missing() -> None:
    with pytest.raises(PlanError, match="runs/small-llm/exports/transformers"):
        plan(load_pipeline("heal_llm"))


def test_a_healing_with_blend_cache_and_adapters_resumes_to_the_bit(tmp_path: Path) -> None:
    """In the middle of the blend and of an epoch, from the teacher's kept answers."""
    folder, text = make_folder(tmp_path / "model", "llama"), tmp_path / "text.txt"
    text.write_text("".join(f"{number} is less than {number + 1}. " for number in range(40)))

    def chosen(place: str) -> Any:
        loss = (
            f"loss={{use: distillation, with: {{teacher: {folder}, cache: {tmp_path / place}, "
            "cache_top_k: 8, loss: {use: language_model}}}"
        )
        return load_pipeline("smoke", settings(
            "llama", folder, tmp_path, loss, "run.max_steps=7", "run.save_every=2",
            "run.accumulate=2", "quantizer={use: bitnet, with: {warmup_start: 1, warmup_steps: 4}}",
            "wrappers=[{use: lora, with: {rank: 2, dropout: 0.2}}]",
            f"data.with.path={text}", "data.with.validation_split=0.1",
        ))  # fmt: skip

    whole = run(chosen("one"), output_dir=tmp_path / "a", quiet=True)
    stop = StopAfter(3)
    run(chosen("two"), output_dir=tmp_path / "b", quiet=True, plugins=[stop], cancel=stop.event)
    again = resume(tmp_path / "b", quiet=True, plugins=[StopAfter(100)])
    assert whole.model is not None
    assert again.model is not None
    one, two = whole.model.state_dict(), again.model.state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(name.endswith("lora.B") and value.any() for name, value in one.items())


@pytest.mark.deep
def test_ternary_is_within_a_tenth_of_full_precision_in_half_of_its_steps(tmp_path: Path) -> None:
    need("transformers", "accelerate")
    first = trained("small_llm", tmp_path / "first", "run.max_steps=400")
    start = tmp_path / "first/exports/transformers"
    healed = trained(
        "heal_llm", tmp_path / "healed", "run.max_steps=200", f"model.with.path={start}",
        f"data.with.tokenizer_file={start}",
    )  # fmt: skip
    assert healed.failed_exports == {}
    name = "validation_perplexity"
    assert healed.final[name] <= 1.10 * first.final[name]
