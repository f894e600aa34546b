"""Checkpoints: whole or absent, checked before use, rotated, never fewer than two."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_kernel.errors import CheckpointError
from forge_kernel.storage.atomic_files import (
    clear_abandoned_folders,
    committed_folder,
    make_folder,
    remove_folder,
    write_bytes,
    write_json,
)
from forge_kernel.storage.checkpoint_store import CheckpointReader, CheckpointStore, Snapshot
from forge_kernel.storage.state_tree import join_tree, split_tree
from forge_plugins.formats.open_table import open_table
from forge_plugins.observers.line_file import LineFile


def snapshot(step: int, **trees: Any) -> Snapshot:
    model = {"weight": torch.full((64, 32), float(step)), "bias": torch.arange(32.0)}
    return Snapshot(step, model, {"plugins": {"a": {"count": step}}, **trees}, {"note": "test"})


def test_a_snapshot_comes_back_as_it_was(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    given_tree = {"deep": [{"t": torch.tensor([1.5, float("nan")])}, None, True, 3, "x", 0.5]}
    store.save(snapshot(3, extra=given_tree))
    loaded, folder, problems = store.newest()
    assert (loaded.step, folder.name, problems) == (3, "step-3", [])
    assert torch.equal(loaded.model["weight"], torch.full((64, 32), 3.0))
    back = loaded.trees["extra"]["deep"]
    assert back[1:] == [None, True, 3, "x", 0.5]
    assert torch.equal(back[0]["t"].isnan(), torch.tensor([False, True]))


def test_tied_tensors_are_stored_once_and_come_back_in_both_places(tmp_path: Path) -> None:
    shared = torch.randn(256, 256)
    store = CheckpointStore(tmp_path / "c")
    store.save(Snapshot(1, {"a": shared, "b": shared, "c": shared[:1]}, {}, {}))
    loaded, folder, _ = store.newest()
    assert torch.equal(loaded.model["a"], shared)
    assert torch.equal(loaded.model["b"], shared)
    assert torch.equal(loaded.model["c"], shared[:1])
    assert (folder / "model.safetensors").stat().st_size < 2 * shared.numel() * 4


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    folder = CheckpointStore(tmp_path / "c").save(snapshot(1))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["manifest.json", "model.safetensors", "state.json", "state.safetensors"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), object(), {1: 2}, b"bytes", {1, 2}])
def test_state_that_cannot_be_kept_is_named(bad: Any) -> None:
    with pytest.raises(CheckpointError, match="plugins/x"):
        split_tree({"x": bad}, "plugins")


leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=5)
leaves |= st.floats(allow_nan=False, allow_infinity=False)
leaves |= st.integers(0, 3).map(lambda size: torch.arange(float(size)))
keys = st.text(max_size=4).filter(lambda key: key != "$tensor")
trees = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3)
)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@given(tree=trees)
@settings(max_examples=100, deadline=None)
def test_any_tree_of_state_survives(tree: Any) -> None:
    plain, tensors = split_tree(tree, "p")
    assert _same(tree, join_tree(plain, tensors))


def test_rotation_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.save(snapshot(1), ("best",))
    for step in range(2, 7):
        store.save(snapshot(step))
    assert store.steps() == [1, 5, 6]
    store.save(snapshot(7), ("best",))
    store.save(snapshot(8))
    store.save(snapshot(9))
    assert store.steps() == [7, 8, 9]
    pinned = store.pinned("best")
    assert pinned is not None
    assert pinned.name == "step-7"


def test_every_one_of_several_tags_is_pinned(tmp_path: Path) -> None:
    """Planted: the first of them only."""
    store = CheckpointStore(tmp_path / "c", keep=2)
    store.save(snapshot(1), ("best", "consolidation", "early_stopping"))
    for step in range(2, 6):
        store.save(snapshot(step))
    found = [store.pinned(tag) for tag in ("best", "consolidation", "early_stopping")]
    assert [path.name if path else None for path in found] == ["step-1"] * 3
    store.save(snapshot(6), ("best",))
    assert store.steps() == [1, 5, 6], "two tags still hold the first one"


DAMAGES = ["flip", "truncate", "zero", "missing", "swap", "manifest"]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "state.json"])
def test_damage_is_found_before_use_and_the_older_one_is_taken(
    tmp_path: Path, damage: str, name: str
) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.save(snapshot(1, extra={"t": torch.ones(100)}))
    newest = store.save(snapshot(2, extra={"t": torch.ones(100) * 2}))
    file = newest / name
    raw = bytearray(file.read_bytes())
    if damage == "flip":
        raw[random.Random(name).randrange(len(raw))] ^= 1 << 3
        file.write_bytes(raw)
    elif damage == "truncate":
        file.write_bytes(raw[:-1])
    elif damage == "zero":
        file.write_bytes(bytes(len(raw)))
    elif damage == "missing":
        file.unlink()
    elif damage == "swap":
        file.write_bytes((store.path(1) / name).read_bytes())
    else:
        (newest / "manifest.json").write_text("{}")
    loaded, folder, problems = store.newest()
    assert folder.name == "step-1"
    assert loaded.step == 1
    assert len(problems) == 1
    assert "step-2" in problems[0]


def test_every_single_bit_flip_of_a_hundred_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    folder = store.save(snapshot(1, extra={"t": torch.randn(50)}))
    files = sorted(folder.glob("*.safetensors")) + [folder / "state.json"]
    chance = random.Random(0)
    found = 0
    for _ in range(100):
        file = chance.choice(files)
        raw = bytearray(file.read_bytes())
        place, bit = chance.randrange(len(raw)), 1 << chance.randrange(8)
        raw[place] ^= bit
        file.write_bytes(raw)
        with pytest.raises(CheckpointError):
            store.load(folder)
        found += 1
        raw[place] ^= bit
        file.write_bytes(raw)
    assert found == 100
    assert store.load(folder).step == 1


def test_an_error_while_writing_leaves_nothing_under_the_final_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"), committed_folder(tmp_path / "out") as partial:
        (partial / "half").write_text("half")
        raise OSError("disk full")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_is_one_named_error_and_the_last_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.save(snapshot(1))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot save .*step-2.*No space left"):
        store.save(snapshot(2))
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["step-1", "latest"] or sorted(
        path.name for path in (tmp_path / "c").iterdir()
    ) == ["latest", "step-1"]
    assert store.newest()[0].step == 1


def test_what_has_its_name_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted, each alone: no sync of a file, of its folder, of a checkpoint's files; red each time.

    The suite's own `os.fsync` does not wait: this test is what holds the product to calling it.
    """
    synced: set[int] = set()
    early: list[str] = []

    def watched(rename: Any) -> Any:
        def renamed(self: Path, target: Any) -> Path:
            below = [self, *self.rglob("*")] if self.is_dir() else [self]
            unfinished = any(".partial-" in part for part in Path(target).parts)  # not yet named
            if not unfinished and not self.name.startswith(".building-"):  # its files are, below
                early.extend(path.name for path in below if path.stat().st_ino not in synced)
            synced.discard(Path(target).parent.stat().st_ino)  # it has a new entry
            return rename(self, target)  # type: ignore[no-any-return]

        return renamed

    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.fstat(number).st_ino))
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, watched(getattr(Path, name)))

    write_json(tmp_path / "status.json", {"state": "running"})
    assert (early, tmp_path.stat().st_ino in synced) == ([], True)
    write_bytes(tmp_path / "status.json", b"{}")
    assert (early, tmp_path.stat().st_ino in synced) == ([], True)
    folder = CheckpointStore(tmp_path / "c").save(snapshot(1))
    assert (early, folder.parent.stat().st_ino in synced) == ([], True)

    make_folder(tmp_path / "a" / "b")
    with committed_folder(tmp_path / "a" / "b" / "c") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "file").write_text("text")
    assert early == []
    for place in ("", "a", "a/b"):
        assert (tmp_path / place).stat().st_ino in synced
    assert tmp_path.parent.stat().st_ino not in synced, "it was there and has no new entry"
    with committed_folder(tmp_path / "a" / "b" / "c"):  # in the place of the first
        pass
    assert (early, (tmp_path / "a" / "b").stat().st_ino in synced) == ([], True)

    file = tmp_path / "data.jsonl"
    file.write_text('{"input": [1.0, 2.0], "target": 1}\n' * 9)
    open_table(file, cache_dir=tmp_path / "cache")
    (kept,) = (path.parent for path in (tmp_path / "cache").rglob("manifest.json"))
    assert early == []
    assert {path.stat().st_ino for path in kept.iterdir()} <= synced

    lines = LineFile()
    lines.begin(tmp_path / "metrics.jsonl")
    lines.write("{}")
    lines.sync()
    lines.close()
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced


def test_a_folder_that_cannot_be_replaced_keeps_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def held(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError("held")
        return rename(self, target)

    store = CheckpointStore(tmp_path / "c")
    folder = store.save(snapshot(1))
    with monkeypatch.context() as during:
        during.setattr(Path, "rename", held)
        with pytest.raises(CheckpointError, match="held"):
            store.save(snapshot(1))
    assert store.load(folder).step == 1
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["latest", "step-1"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="where open files can be counted")
def test_a_save_and_a_load_leave_no_file_open(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.load(store.save(snapshot(1)))
    before = os.listdir("/proc/self/fd")
    store.load(store.save(snapshot(2)))
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_folder_that_another_makes_in_the_same_moment_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mkdir = Path.mkdir

    def second(self: Path, *given: Any, **options: Any) -> None:
        os.mkdir(self)
        mkdir(self, *given, **options)

    with monkeypatch.context() as during:
        during.setattr(Path, "mkdir", second)
        make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_file_that_cannot_take_its_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(OSError, match="status.json"):
        write_json(tmp_path / "status.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.parametrize("written", ["../elsewhere", "elsewhere", "step-9", "step-1/../step-1", ""])
def test_a_pin_names_a_checkpoint_that_is_there_or_nothing(tmp_path: Path, written: str) -> None:
    """Red when a folder that is no checkpoint's is loaded because a file names it."""
    store = CheckpointStore(tmp_path / "c")
    store.save(snapshot(1), ("best",))
    for folder in (tmp_path / "elsewhere", tmp_path / "c" / "elsewhere"):
        folder.mkdir()
    assert store.pinned("best") == store.path(1)
    (tmp_path / "c" / "best.pin").write_text(f"{written}\n")
    assert store.pinned("best") is None


def test_what_an_interrupted_save_left_is_cleared_and_a_replaced_one_put_back(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path / "c")
    store.save(snapshot(1))
    folder = store.save(snapshot(2))
    (tmp_path / "c" / ".step-3.partial-0badf00d").mkdir()
    (tmp_path / "c" / ".latest.0badf00d").write_text("st")
    folder.rename(tmp_path / "c" / ".step-2.replaced-0badf00d")  # cut between two renames
    store.clear_unfinished()
    assert store.steps() == [1, 2]
    assert not [path for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("step", "target", "left"),
    [(2, "step-2", 1), (1, "step-1", 2), (2, "latest", 1)],
    ids=["the folder", "a folder that is replaced", "a file"],
)
def test_what_a_cut_save_leaves_is_known_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, target: str, left: int
) -> None:
    """Cut at the rename that gives a name, and before anything is cleared, as by a kill."""
    store = CheckpointStore(tmp_path / "c")
    store.save(snapshot(1))

    def cut(rename: Any) -> Any:
        def renamed(self: Path, to: Path) -> Any:
            if to.name == target:
                raise OSError("cut")
            return rename(self, to)

        return renamed

    def hidden() -> list[str]:
        return [path.name for path in (tmp_path / "c").iterdir() if path.name.startswith(".")]

    with monkeypatch.context() as during:
        for name in ("rename", "replace"):
            during.setattr(Path, name, cut(getattr(Path, name)))
        during.setattr(Path, "unlink", lambda *_, **__: None)
        during.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(CheckpointError, match="cut"):
            store.save(snapshot(step))
    assert len(hidden()) == left
    store.clear_unfinished()
    assert hidden() == []
    assert store.load(store.path(1)).step == 1
    assert (tmp_path / "c" / "latest").read_text() == "step-1\n"


def test_a_file_that_cannot_be_removed_keeps_no_other_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where another program holds it: red when what is cleared ends a save, or stays whole."""
    unlink, held = os.unlink, list[str]()

    def held_once(path: Any, **options: Any) -> None:
        if not held:
            held.append(str(path))
            raise PermissionError(13, "held", str(path))
        unlink(path, **options)

    def filled(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for letter in "abc":
            (folder / letter).write_text(letter)
        held.clear()
        return folder

    def one_is_left() -> bool:
        left = [path for path in tmp_path.rglob("?") if path.parent.name.startswith(".")]
        for path in left:
            shutil.rmtree(path.parent)
        return bool(held) and len(left) == 1

    monkeypatch.setattr(os, "unlink", held_once)
    remove_folder(filled("out"))
    assert one_is_left()
    filled(".out.partial-0badf00d")
    clear_abandoned_folders(tmp_path / "out")
    assert one_is_left()
    filled("out")
    filled(".out.replaced-0badf00d")
    clear_abandoned_folders(tmp_path / "out")
    assert one_is_left()
    held.clear()
    with committed_folder(tmp_path / "out"):  # the one of before goes
        pass
    assert one_is_left()
    with pytest.raises(OSError, match="disk full"), committed_folder(tmp_path / "other") as partial:
        filled(f"{partial.name}/inner")
        raise OSError("disk full")
    assert held
    store = CheckpointStore(tmp_path)
    filled(".step-3.partial-0badf00d")
    store.clear_unfinished()
    assert one_is_left()


def test_a_checkpoint_that_is_pruned_is_never_seen_half_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when its files go one by one under its name: a kill between them leaves a damaged one."""
    removed: list[str] = []
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: removed.append(Path(path).name))
    store = CheckpointStore(tmp_path / "c", keep=2)
    for step in range(1, 5):
        store.save(snapshot(step))
    store.drop_after(3)
    assert len(removed) == 3
    assert all(name.startswith(".step-") for name in removed)
    assert store.steps() == [3]


def test_a_reader_whose_checkpoints_are_pruned_as_it_reads_takes_the_newer_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red when the first list of them is all that is tried, or what is gone is told as damage."""
    store, reader = CheckpointStore(tmp_path / "c"), CheckpointReader(tmp_path / "c")
    for step in (1, 2):
        store.save(snapshot(step))
    load = reader.load

    def overtaken(folder: Path) -> Snapshot:
        newest = store.steps()[-1]
        for step in (newest + 1, newest + 2) if newest < 6 else ():
            store.save(snapshot(step))
        return load(folder)

    monkeypatch.setattr(reader, "load", overtaken)
    loaded, _, problems = reader.newest()
    assert (loaded.step, problems) == (6, [])


def test_an_export_that_was_cut_is_cleared_by_the_next_and_a_live_one_is_not(
    tmp_path: Path,
) -> None:
    final = tmp_path / "out"
    kinds = ("partial", "replaced", "partial", "replaced")
    cut = [tmp_path / f".out.{what}-0badf00{digit}" for digit, what in enumerate(kinds)]
    for folder in cut:
        folder.mkdir()
    with committed_folder(final) as live:
        clear_abandoned_folders(final)
        assert live.is_dir()
        assert cut[1].is_dir()
    clear_abandoned_folders(final)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    final.rename(cut[1])  # cut between two renames
    clear_abandoned_folders(final)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


_SAVER = """
import sys, torch
from pathlib import Path
from forge_kernel.storage.checkpoint_store import CheckpointStore, Snapshot
store = CheckpointStore(Path(sys.argv[1]))
step = max(store.steps(), default=0)
while True:
    step += 1
    store.save(Snapshot(step, {"w": torch.full((512, 512), float(step))}, {"s": {"n": step}}, {}))
    print("saved", flush=True)
"""


def kill_while_saving(folder: Path, trials: int) -> None:
    chance = random.Random(1)
    for _ in range(trials):
        process = forked.Popen(
            [sys.executable, "-c", _SAVER, str(folder)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "saved\n"
        time.sleep(chance.uniform(0.02, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = CheckpointStore(folder)
        store.clear_unfinished()
        loaded, _, problems = store.newest()
        assert problems == []
        assert torch.equal(loaded.model["w"], torch.full((512, 512), float(loaded.step)))
        assert loaded.trees["s"]["n"] == loaded.step


def test_a_kill_at_any_moment_of_a_save_loses_nothing(tmp_path: Path) -> None:
    kill_while_saving(tmp_path / "c", 3)


@pytest.mark.deep
def test_fifty_kills_at_any_moment_lose_nothing(tmp_path: Path) -> None:
    kill_while_saving(tmp_path / "c", 50)
