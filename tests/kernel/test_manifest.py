"""A checkpoint's manifest: altered nowhere unseen, and of the step that its folder says."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forge_kernel import resume, run
from forge_kernel.config.changes import changed_settings
from forge_kernel.errors import CheckpointError
from forge_kernel.storage import tensor_file
from forge_kernel.storage.atomic_files import manifest_of
from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot
from forge_kernel.storage.hashes import sha256
from forge_kernel.storage.manifest import check_files, entry, write_manifest
from forge_kernel.storage.seal import is_as_written, sealed

PIPELINE = """
forge: 1
run: {name: small, seed: 3, max_steps: 2, save_every: 1, validate_every: null}
data: {use: modular_arithmetic, with: {modulus: 7, batch_size: 8}}
model: {use: mlp, with: {hidden: [4], embedding: 4}}
optimizer: {use: adamw, with: {lr: 0.01}}
loss: {use: cross_entropy}
"""


def saved(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder / "checkpoints", keep=9)
    for step in steps:
        model = {"w": torch.full((8,), float(step))}
        store.save(Snapshot(step, model, {"plugins": {"n": step}}, {"a": "b"}, config="run: {}\n"))
    return store


def test_each_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    """Also those that JSON reads the same: blanks, and keys that nothing here needs."""
    store = saved(tmp_path, 1)
    manifest = store.path(1) / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        altered = bytearray(whole)
        altered[place] ^= 1 << random.Random(place).randrange(8)
        manifest.write_bytes(altered)
        with pytest.raises(CheckpointError):
            store.load(store.path(1))
    for altered in (whole + b" ", whole[:-1], whole.replace(b'"step"', b'"step": 1, "step"')):
        manifest.write_bytes(altered)
        with pytest.raises(CheckpointError, match="not as it was written"):
            store.load(store.path(1))
    manifest.write_bytes(whole)
    assert store.load(store.path(1)).step == 1


def test_what_was_sealed_before_still_is() -> None:
    """The text itself is sealed: red when JSON is written with other blanks or escapes."""
    text = '{\n "name": "größer",\n "steps": [\n  1\n ],\n "sha256": "HASH"\n}\n'
    digest = "98020b5874fce733dc2f298b250d441bf60f3f1257a58e8fb18f859f513857f5"
    content = text.replace("HASH", digest).encode()
    assert sealed({"name": "größer", "steps": [1]}) == content
    assert is_as_written(content, json.loads(content))
    assert not is_as_written(content + b" ", json.loads(content))
    with pytest.raises(ValueError, match="nan"):
        sealed({"steps": [float("nan")]})
    never = content.replace(b"  1\n", b"  NaN\n")
    assert not is_as_written(never, json.loads(never))


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_a_manifest_that_lacks_a_required_file_is_damage(tmp_path: Path, name: str) -> None:
    """Red when only what is listed is looked at: the file would be read unchecked."""
    store = saved(tmp_path, 1)
    facts = json.loads((store.path(1) / "manifest.json").read_text())
    del facts["files"][name]
    write_manifest(store.path(1), facts)
    with pytest.raises(CheckpointError, match=f"does not list {name}"):
        store.load(store.path(1))


def test_an_unsealed_manifest_of_todays_format_is_damage(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    facts = json.loads((store.path(1) / "manifest.json").read_text())
    del facts["sha256"]
    (store.path(1) / "manifest.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="not as it was written"):
        store.load(store.path(1))


def test_a_folder_under_another_steps_name_is_not_taken(tmp_path: Path) -> None:
    """Planted: the folder's name is not compared. A run would go back untold."""
    store = saved(tmp_path, 1, 2, 3)
    shutil.rmtree(store.path(3))
    store.path(1).rename(store.path(3))
    with pytest.raises(CheckpointError, match="holds step 1.*would be step-1"):
        store.load(store.path(3))
    snapshot, folder, problems = store.newest()
    assert (snapshot.step, folder.name, len(problems)) == (2, "step-2", 1)


def test_a_file_that_is_not_of_the_checkpoint_is_told(tmp_path: Path) -> None:
    store = saved(tmp_path, 1)
    (store.path(1) / "notes.txt").write_text("mine")
    _, _, problems = store.newest()
    assert len(problems) == 1
    assert "notes.txt" in problems[0]


def test_the_files_of_two_steps_cannot_be_mixed(tmp_path: Path) -> None:
    """Every file of one step in the other's place; `config.yaml` is the same in both."""
    store = saved(tmp_path, 1, 2)
    names = ["manifest.json", "model.safetensors", "state.json"]
    for name in names:
        here, there = (store.path(step) / name for step in (1, 2))
        kept = here.read_bytes()
        here.write_bytes(there.read_bytes())
        with pytest.raises(CheckpointError):
            store.load(store.path(1))
        here.write_bytes(kept)
    assert store.load(store.path(1)).config == "run: {}\n"


def as_before(folder: Path, number: int) -> None:
    """Make a checkpoint one of an older format: SHA-256 of each file, no seal, no configuration."""
    facts = json.loads((folder / "manifest.json").read_text())
    del facts["sha256"]
    (folder / "manifest.json").unlink()
    (folder / "config.yaml").unlink(missing_ok=True)
    facts |= {"format": number, "files": manifest_of(folder)}
    (folder / "manifest.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_of_an_older_format_is_read_and_checked(tmp_path: Path, number: int) -> None:
    store = saved(tmp_path, 1)
    before = {"policies[0] early_stopping": 3, "penalties[1] l2": 4}
    store.save(Snapshot(2, {"w": torch.ones(8)}, {"plugins": before}, {"plugins": dict(before)}))
    as_before(store.path(2), number)
    loaded, _, problems = store.newest()
    assert (loaded.step, loaded.config, problems) == (2, "", [])
    today = {"callbacks[0] early_stopping": 3, "regularizers[1] l2": 4}
    assert loaded.trees["plugins"] == loaded.about["plugins"] == (today if number == 1 else before)
    for name in ("model.safetensors", "state.safetensors", "state.json"):
        file = store.path(2) / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"content of {name} has changed"):
            store.load(store.path(2))
        file.write_bytes(whole)


@pytest.mark.parametrize("wrong", ["sha256", "xxh3_128"])
def test_a_file_with_two_hashes_has_both(tmp_path: Path, wrong: str) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    both = {**entry(file), "sha256": sha256(file)}
    check_files(tmp_path, {"file": both}, ["file"])
    with pytest.raises(CheckpointError, match="content of file has changed"):
        check_files(tmp_path, {"file": {**both, wrong: "0" * 32}}, ["file"])


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_written_to_the_byte_as_safetensors_writes_them(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    bits = torch.randint(0, 2, (3, 8, 16), dtype=torch.uint8)
    tensors = {
        "b": bits.view(dtype),
        "a/\u00e4 \u4e2d": bits[:2].clone().view(dtype),
        "scalar": bits.view(dtype).reshape(-1)[0].clone(),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    tensor_file.write_tensors(tmp_path / "ours", tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_tensors_of_many_types_come_back_aligned(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.ones(3).to(dtype) for dtype in DTYPES}
    tensor_file.write_tensors(tmp_path / "file", tensors)
    content = (tmp_path / "file").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0
    back = load_file(tmp_path / "file")
    assert back.keys() == tensors.keys()
    assert all(back[name].view(torch.uint8).equal(tensors[name].view(torch.uint8)) for name in back)


def test_a_tensor_that_the_format_cannot_hold_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")
    with pytest.raises(CheckpointError, match="z: a tensor of torch.complex128 cannot be kept"):
        store.save(Snapshot(1, {"z": torch.ones(2, dtype=torch.complex128)}, {}, {}))
    assert store.steps() == []


def test_changed_settings_are_told_by_path_with_both_values() -> None:
    before = "run: {max_steps: 4, name: a}\ngradients: [{use: x}, {use: y}]\n"
    after = "run: {max_steps: 4.0, name: a, seed: 1}\ngradients: [{use: x}]\n"
    assert changed_settings(before, before) == []
    assert changed_settings(before, after) == [
        "run.max_steps: 4 -> 4.0",
        "run.seed: (absent) -> 1",
        "gradients[1].use: \"y\" -> (absent)",
    ]  # fmt: skip


def events(folder: Path) -> list[str]:
    lines = (json.loads(line) for line in (folder / "forge.log").read_text().splitlines())
    return [line["problem"] for line in lines if "problem" in line]


def test_a_resumed_run_tells_each_setting_that_was_edited_by_hand(tmp_path: Path) -> None:
    """Red when the digest of the checkpoint is not compared, or the setting is not named."""
    file, folder = tmp_path / "p.yaml", tmp_path / "run"
    file.write_text(PIPELINE)
    run(file, output_dir=folder, quiet=True)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 0.5"))
    resume(folder, ["run.max_steps=3"], quiet=True)
    assert events(folder) == [
        "changed since the checkpoint of step 2: run.max_steps: 2 -> 3",
        "changed since the checkpoint of step 2: optimizer.with.lr: 0.01 -> 0.5",
    ]
    notices: list[str] = []
    resume(folder, ["run.max_steps=4"], quiet=True, on_notice=notices.append)
    assert events(folder)[2:] == notices
    assert notices == ["changed since the checkpoint of step 3: run.max_steps: 3 -> 4"]


def test_a_resumed_run_tells_of_other_versions_and_of_settings_that_are_not_known(
    tmp_path: Path,
) -> None:
    """Of plugins that still run and have another version; of a configuration by its digest alone."""
    file, folder = tmp_path / "p.yaml", tmp_path / "run"
    callbacks = "callbacks: [{use: early_stopping}, {use: best_checkpoint}]\n"
    file.write_text(PIPELINE + callbacks)
    run(file, output_dir=folder, quiet=True)
    newest = folder / "checkpoints" / "step-2"
    manifest = json.loads((newest / "manifest.json").read_text())
    label, origin = "callbacks[1] best_checkpoint", manifest["about"]["plugins"].popitem()[1]
    of_before = {"torch": "1.0", "config": "0" * 64, "plugins": {"gone": "a 1", label: "acme 0.1"}}
    del manifest["files"]["config.yaml"]
    (newest / "config.yaml").unlink()
    write_manifest(newest, {**manifest, "about": {**manifest["about"], **of_before}})
    resume(folder, ["run.max_steps=3"], quiet=True)
    assert events(folder) == [
        f"it was saved with torch 1.0, this is {torch.__version__}",
        f"{label} was acme 0.1 when it was saved, and is {origin}",
        "the configuration has changed since the checkpoint of step 2",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
@pytest.mark.parametrize("place", [-1, -(1 << 20) - 5, 1 << 20, (1 << 20) + 9])
def test_damage_is_found_wherever_it_lies_in_a_large_file(
    tmp_path: Path, name: str, place: int
) -> None:
    """Red when what lies beyond the first block is not in the hash."""
    store = CheckpointStore(tmp_path / "checkpoints")
    large = torch.arange(700_000, dtype=torch.float32)  # 2.8 MB
    store.save(Snapshot(1, {"w": large}, {"plugins": {"memory": large}}, {}))
    assert store.load(store.path(1)).step == 1
    file = store.path(1) / name
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        store.load(store.path(1))


def test_a_step_that_is_saved_again_replaces_the_first(tmp_path: Path) -> None:
    store = saved(tmp_path, 1, 2)
    store.save(Snapshot(2, {"w": torch.zeros(8)}, {"plugins": {"n": 7}}, {}, config="run: {}\n"))
    snapshot, folder, problems = store.newest()
    assert (snapshot.step, snapshot.trees["plugins"]["n"], problems) == (2, 7, [])
    assert torch.equal(snapshot.model["w"], torch.zeros(8))
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "step-1", "step-2"]


@pytest.mark.parametrize("length", [58, 59, 70])
def test_a_changed_value_is_shown_up_to_a_length_and_compared_whole(length: int) -> None:
    """With its quotes a text of 58 characters has the 60 that are shown. Red when texts that
    differ behind that count as equal."""
    before, after = "a" * length + "x", "a" * length + "y"
    (line,) = changed_settings(f"run: {{name: {before}}}\n", f"run: {{name: {after}}}\n")
    shown = ('"' + before, '"' + after)
    cut = [text[:60] + "..." if length >= 58 else text + '"' for text in shown]
    assert line == f"run.name: {cut[0]} -> {cut[1]}"
    assert changed_settings("a: 1\n", "a: 1.0\n") == ["a: 1 -> 1.0"]
    (line,) = changed_settings("a: bbb\n", f"a: {'b' * 58}\n")
    assert line == f'a: "bbb" -> "{"b" * 58}"'
