"""Wrong model folders: each is refused with one line that says where, what and how to mend it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import edit_config, library, make_folder, settings
from safetensors.torch import load_file, save_file

from forge_kernel import load_pipeline, run
from forge_kernel.errors import FaultsError, PlanError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import check_document, read_document
from forge_kernel.planning.plan import plan
from forge_plugins.interchange.model_folder import (
    INDEX,
    FolderError,
    largest_token,
    read_model_folder,
)
from forge_plugins.interchange.safetensors_header import read_header

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 20,
    "hidden_size": 8, "intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip
EMBEDDING, LAYER = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"


def plain_folder(folder: Path) -> Path:
    """What is looked at before anything is loaded: two tensors in two shards."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    save_file({EMBEDDING: torch.zeros(20, 8)}, folder / "a.safetensors")
    save_file({LAYER: torch.zeros(16, 8)}, folder / "b.safetensors")
    write_index(folder, {EMBEDDING: "a.safetensors", LAYER: "b.safetensors"})
    return folder


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def cut(folder: Path) -> None:
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def cut_in_header(folder: Path) -> None:
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:30])


def empty(folder: Path) -> None:
    (folder / "b.safetensors").write_bytes(b"")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "b.safetensors").write_text(text)


def broken_header(folder: Path) -> None:
    header = b'{"x": {"dtype": "F32"}}'
    (folder / "b.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def without_shard(folder: Path) -> None:
    (folder / "b.safetensors").unlink()


def other_shard(folder: Path) -> None:
    save_file({"other.weight": torch.zeros(2)}, folder / "b.safetensors")


def half_shard(folder: Path) -> None:
    write_index(
        folder, {EMBEDDING: "a.safetensors", LAYER: "b.safetensors", "head.weight": "b.safetensors"}
    )


def doubled(folder: Path) -> None:
    save_file({LAYER: torch.zeros(1), EMBEDDING: torch.zeros(20, 8)}, folder / "b.safetensors")


def outside(folder: Path) -> None:
    write_index(folder, {EMBEDDING: "../a.safetensors"})


def no_weights(folder: Path) -> None:
    (folder / INDEX).unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def half_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",\n "vocab')


def no_text(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def no_type(folder: Path) -> None:
    edit_config(folder, model_type=None)


def other_architecture(folder: Path) -> None:
    edit_config(folder, architectures=["LlamaModel"])


def no_architecture(folder: Path) -> None:
    edit_config(folder, architectures=None)


def other_vocabulary(folder: Path) -> None:
    edit_config(folder, vocab_size=24)


def no_map(folder: Path) -> None:
    (folder / INDEX).write_text("[]")


def map_in_a_row(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": ["a.safetensors"]}')


def empty_map(folder: Path) -> None:
    write_index(folder, {})


WRONG: dict[Callable[[Path], None], tuple[str, ...]] = {
    cut: ("b.safetensors is not whole", "of", "download it again"),
    cut_in_header: ("b.safetensors", "cut off", "download it again"),
    empty: ("b.safetensors", "cut off"),
    pointer: ("b.safetensors is a pointer of Git LFS", "git lfs pull"),
    broken_header: ("b.safetensors has a header that cannot be read",),
    without_shard: (INDEX, "names b.safetensors, which is not there", "copy all shards"),
    other_shard: ("b.safetensors holds other.weight", "does not name", "different models"),
    half_shard: ("b.safetensors does not hold head.weight", "different models"),
    doubled: ("b.safetensors holds model.embed_tokens.weight", "looks for in a.safetensors"),
    outside: ("../a.safetensors", "outside of the folder"),
    no_weights: ("has no weights", "random: true"),
    no_config: ("no config.json", "no model folder"),
    adapter: ("holds an adapter", "merge_and_unload"),
    half_config: ("config.json:2:2 is no JSON", "copy the file again"),
    no_text: ("config.json is no UTF-8",),
    no_type: ("names no model_type",),
    other_architecture: ("LlamaModel", "set task"),
    no_architecture: ("(none)", "set task"),
    other_vocabulary: ("model.embed_tokens.weight has 20 rows", "a vocabulary of 24"),
    no_map: (INDEX, "has no weight_map"),
    map_in_a_row: (INDEX, "has no weight_map"),
    empty_map: (INDEX, "has no weight_map"),
}


@pytest.mark.parametrize("change", WRONG, ids=lambda change: change.__name__)
def test_a_wrong_folder_is_refused_before_anything_is_loaded(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    """Planted: the file's size not compared with the header's."""
    folder = plain_folder(tmp_path / "model")
    assert read_model_folder(str(folder)).files == ["a.safetensors", "b.safetensors"]
    change(folder)
    with pytest.raises(FolderError) as caught:
        read_model_folder(str(folder))
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    for words in WRONG[change]:
        assert words in message


def test_a_config_that_cannot_be_opened_is_refused_with_the_systems_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = plain_folder(tmp_path / "model")
    real = Path.read_text

    def read_text(self: Path, *given: Any, **named: Any) -> str:
        if self.name == "config.json":
            raise PermissionError(13, "Permission denied")
        return real(self, *given, **named)

    monkeypatch.setattr(Path, "read_text", read_text)
    with pytest.raises(FolderError, match="model cannot be read: Permission denied"):
        read_model_folder(str(folder))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (
            "HuggingFaceTB/SmolLM2-135M",
            "hf download HuggingFaceTB/SmolLM2-135M --local-dir SmolLM2-135M",
        ),
        ("gpt2", "hf download gpt2 --local-dir gpt2"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        (__file__, "is a file: name the folder"),
    ],
)
def test_a_name_or_a_place_without_a_folder_is_refused_at_its_line(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (fault,) = planned_faults(tmp_path, f"path: {path}")
    assert words in fault.message
    assert fault.path == "model.with.path"
    assert fault.mark is not None
    assert fault.mark.line == 3


def test_a_model_without_a_path_is_refused(tmp_path: Path) -> None:
    (fault,) = planned_faults(tmp_path, "random: true")
    assert "needs the path" in fault.message
    assert fault.hints == ("model: {use: transformers, with: {path: FOLDER}}",)


def pipeline_file(place: Path, chosen: str, exporters: str = "null") -> Path:
    """A whole pipeline; the model's settings stand in its third line."""
    file = place / "pipeline.yaml"
    file.write_text(
        "forge: 1\nmodel: {use: transformers, with:\n"
        f"  {{{chosen}}}}}\n"
        "run: {name: tiny, max_steps: 2}\ndata: {use: text}\nloss: {use: cross_entropy}\n"
        f"optimizer: {{use: adamw}}\nquantizer: {{use: bitnet}}\nexporters: {exporters}\n"
    )
    return file


def planned_faults(place: Path, chosen: str) -> Any:
    document = read_document(pipeline_file(place, chosen))
    catalog = Catalog.installed()
    with pytest.raises(PlanError) as caught:
        plan(check_document(document, catalog), catalog, document=document)
    return caught.value.faults


def test_a_check_knows_the_sizes_and_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "model")
    file = pipeline_file(tmp_path, f"path: {folder}", "[{use: gguf}]")
    code = (
        "import sys\nfrom forge_kernel.cli import main\n"
        f"sys.argv = ['forge', 'check', {str(file)!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('loaded', sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loaded []" in done.stdout
    shown = done.stdout + done.stderr
    assert "gguf needs weights whose rows are multiples of 256" in shown
    assert "model:" not in shown.replace("model: {use", "")  # words between plugins


def test_sizes_are_those_of_the_family(tmp_path: Path) -> None:
    folder = plain_folder(tmp_path / "model")
    found = read_model_folder(str(folder))
    assert (found.longest, found.vocabulary, found.image) == (64, 20, None)
    assert found.rows() == ({8}, {16})
    edit_config(folder, model_type="roberta", pad_token_id=1, max_position_embeddings=514)
    assert read_model_folder(str(folder)).longest == 512
    edit_config(folder, text_config={"vocab_size": 20, "max_position_embeddings": 32})
    assert read_model_folder(str(folder)).longest == 32
    edit_config(folder, image_size=[8, 6])
    assert read_model_folder(str(folder)).image == (3, 8, 6)


def test_a_header_tells_all_tensors_and_an_empty_file_none(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)}, file)
    found = read_header(file)
    assert {name: (one.shape, one.dtype, one.file) for name, one in found.items()} == {
        "a": ((2, 3), "F32", "x.safetensors"), "b": ((4,), "BF16", "x.safetensors"),
    }  # fmt: skip
    file.write_bytes((2).to_bytes(8, "little") + b"{}")
    assert read_header(file) == {}


def test_the_largest_token_of_a_tokenizer_counts_added_ones(tmp_path: Path) -> None:
    assert largest_token(tmp_path) is None
    content = {"model": {"vocab": {"a": 0, "b": 5}}, "added_tokens": [{"id": 9}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert largest_token(tmp_path) == 9
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", 0.0]] * 4}}))
    assert largest_token(tmp_path) == 3
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(FolderError, match="no tokenizer"):
        largest_token(tmp_path)


# -- what shows when the model is loaded -----------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("whole") / "model", "llama")


def changed_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


NORM = "model.norm.weight"


def lost(folder: Path) -> None:
    changed_weights(folder, lambda state: state.pop(NORM))


def further(folder: Path) -> None:
    changed_weights(folder, lambda state: state.update(extra=torch.zeros(1)))


def reshaped(folder: Path) -> None:
    changed_weights(folder, lambda state: state.update({NORM: torch.ones(31)}))


def not_a_number(folder: Path) -> None:
    changed_weights(folder, lambda state: state[LAYER].view(-1)[-1].fill_(float("nan")))


def infinite(folder: Path) -> None:
    changed_weights(folder, lambda state: state[LAYER].view(-1)[0].fill_(float("-inf")))


def own_code(folder: Path) -> None:
    (folder / "modeling_own.py").write_text("raise SystemExit('the code ran')")
    edit_config(
        folder, model_type="my_own", auto_map={"AutoConfig": "modeling_own.Config",
                                               "AutoModelForCausalLM": "modeling_own.Model"},
    )  # fmt: skip


def unknown(folder: Path) -> None:
    edit_config(folder, model_type="my_own")


class Harm:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["FORGE_TEST_HARM"],)


def harmful(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with (folder / "pytorch_model.bin").open("wb") as file:
        torch.save({"weight": Harm()}, file, pickle_module=pickle)


def wrong_config(folder: Path) -> None:
    edit_config(folder, num_attention_heads="many")


LOADED: dict[Callable[[Path], None], tuple[str, ...]] = {
    lost: (f"{NORM} of LlamaForCausalLM is not in the weights", "copy all files"),
    further: ("extra is in the weights", "no place for it", "different models"),
    reshaped: (NORM, "shape"),
    not_a_number: (f"{LAYER} holds a number that is not finite", "earlier checkpoint"),
    infinite: (f"{LAYER} holds a number that is not finite",),
    own_code: ("my_own", "its code lies in the folder, and is never run"),
    unknown: ("knows no model_type my_own", "install a version"),
    harmful: ("hold more than tensors, and are not run", "safetensors"),
    wrong_config: ("config.json", "num_attention_heads"),
}


@pytest.mark.parametrize("change", LOADED, ids=lambda change: change.__name__)
def test_a_model_that_does_not_fit_itself_is_refused_before_the_first_step(
    change: Callable[[Path], None], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: finite numbers not looked for."""
    monkeypatch.setenv("FORGE_TEST_HARM", str(tmp_path / "harm"))
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    change(folder)
    with pytest.raises(FaultsError) as caught:
        run(
            load_pipeline("smoke", settings("llama", folder, tmp_path)),
            output_dir=tmp_path / "run", quiet=True,
        )  # fmt: skip
    message = str(caught.value)
    assert "model.transformers" in message
    assert str(folder) in message
    for words in LOADED[change]:
        assert words in message
    assert not (tmp_path / "harm").exists()


def test_code_of_a_known_architecture_is_passed_over_with_a_line(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(whole, folder)
    (folder / "modeling_own.py").write_text("raise SystemExit('the code ran')")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_own.Model"})
    chosen = settings("llama", folder, tmp_path, "run.max_steps=1")
    result = run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
    assert type(result.model).__module__.startswith("transformers.")
    assert "is not run" in caplog.text


UNFIT: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "positions": (
        "llama", "data={use: text, with: {sequence_length: 65, validation_split: 0.001}}",
        ("sequences of 65 tokens", "64 positions", "sequence_length"),
    ),
    "vocabulary": (
        "llama", "data={use: text, with: {tokenizer: characters, sequence_length: 16}}",
        ("tokens", "a vocabulary of 40", "tokenizer.json"),
    ),
    "pixels": ("vit", "data={use: file}", ("3 x 8 x 8 = 192 numbers", "64 in a sample")),
    "classes": ("vit", "data={use: file}", ("10 classes", "the head of", "3", "set task")),
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "vocabulary": {"vocab_size": 40}, "pixels": {"num_channels": 3}, "classes": {"num_labels": 3},
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_data_that_the_model_has_no_place_for_is_refused(name: str, tmp_path: Path) -> None:
    family, data, expected = UNFIT[name]
    folder = make_folder(tmp_path / "model", family, **CHANGES.get(name, {}))
    with pytest.raises(PluginError) as caught:
        run(
            load_pipeline("smoke", settings(family, folder, tmp_path, data)),
            output_dir=tmp_path / "run", quiet=True,
        )  # fmt: skip
    for words in expected:
        assert words in str(caught.value)


def test_a_longer_sequence_of_live_data_is_refused_where_it_comes(whole: Path) -> None:
    from forge_plugins.interchange.transformers_model import load_model, prepare_inputs

    library()
    folder = read_model_folder(str(whole))
    model = load_model(folder, seed=1).model
    prepare_inputs(model, folder)
    with pytest.raises(ValueError, match="65 tokens for a model with 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))


@pytest.mark.parametrize("random", ["true", "false"])
def test_an_architecture_without_fused_attention_says_what_to_set(
    random: str, tmp_path: Path
) -> None:
    transformers = library()
    config = transformers.MambaConfig(
        vocab_size=260, hidden_size=32, num_hidden_layers=1, pad_token_id=0
    )
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    chosen = settings("llama", tmp_path / "model", tmp_path, f"model.with.random={random}")
    with pytest.raises(PluginError, match="MambaForCausalLM has no fused attention.*eager"):
        run(load_pipeline("smoke", chosen), output_dir=tmp_path / "run", quiet=True)
