"""Checkpoints: whole or absent, checked before use, and enough for a bit-exact continuation.

A checkpoint is a folder `step-<n>` with tensors in safetensors, all else in JSON, and a manifest
with the XXH3-128 of each file and the SHA-256 of itself. No pickle. The commit protocol: write
beside, write the manifest, sync each file, rename once, sync the parent, then move the pointers,
then prune.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors.torch import load_file

from forge_kernel.errors import CheckpointError
from forge_kernel.renamed import label_today
from forge_kernel.storage import atomic_files
from forge_kernel.storage.manifest import (
    check_files,
    entry,
    read_manifest,
    unlisted,
    write_manifest,
)
from forge_kernel.storage.state_tree import join_tree, split_tree
from forge_kernel.storage.tensor_file import write_tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FORMAT: Final = 3
UNSEALED: Final = 2  # the same, with the SHA-256 of each file and none of the manifest
BEFORE_WORDS: Final = 1  # the same again, with the names of kinds and plugins of before
MODEL, STATE_TENSORS, STATE = "model.safetensors", "state.safetensors", "state.json"
CONFIG_COPY: Final = "config.yaml"
REQUIRED: Final = (MODEL, STATE_TENSORS, STATE)
_TRIES: Final = 50  # of a reader whose owner saves and prunes faster than it reads
_NAME: Final = re.compile(r"step-([0-9]{1,12})")
_TAG: Final = re.compile(r"[a-z][a-z0-9_]{0,40}")


@dataclass(frozen=True)
class Snapshot:
    """Everything that a run needs to go on.

    Args:
        step: finished optimizer steps.
        model: parameters and buffers by name.
        trees: `optimizer`, `plugins`, `random`, `progress`, ... each a tree of state.
        about: facts for readers: configuration digest, versions.
        config: the run's configuration as text; "" where there is none.
        remarks: of one that was read: what else its folder holds.
    """

    step: int
    model: dict[str, Tensor]
    trees: dict[str, Any]
    about: dict[str, Any]
    config: str = ""
    remarks: tuple[str, ...] = ()


def _untie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each storage once: tensors to write, and aliases (name -> name written)."""
    written: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[tuple[int, int, tuple[int, ...], tuple[int, ...], torch.dtype], str] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            place = (
                tensor.untyped_storage().data_ptr(),
                int(tensor.storage_offset()),
                tuple(tensor.shape),
                tuple(tensor.stride()),
                tensor.dtype,
            )
            if place in places:
                aliases[name] = places[place]
                continue
            places[place] = name
        written[name] = tensor.detach().to("cpu").contiguous()
    return written, aliases


def _load_tensors(file: Path, aliases: Mapping[str, str]) -> dict[str, Tensor]:
    tensors = load_file(file)
    for name, target in aliases.items():
        tensors[name] = tensors[target]
    return tensors


def _refuse_nan(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights that an older kernel kept without a look at them."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and bool(tensor.isnan().any()):
            raise CheckpointError(f"{folder} holds a NaN in {name}")


def _config_copy(folder: Path, files: Mapping[str, Any]) -> str:
    """The configuration that a checkpoint keeps, which older ones do not."""
    return (folder / CONFIG_COPY).read_text(encoding="utf-8") if CONFIG_COPY in files else ""


def _remarks(folder: Path, files: Mapping[str, Any]) -> tuple[str, ...]:
    strange = unlisted(folder, files)
    if not strange:
        return ()
    return (f"{folder} holds what is not of the checkpoint, and is not read: {', '.join(strange)}",)


class CheckpointReader:
    """The checkpoints of one run, for whoever reads them; nothing is written.

    Args:
        folder: `checkpoints/` of the run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        if not self.folder.is_dir():
            return []
        result = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if path.is_dir())
        return sorted(int(match[1]) for match in result if match)

    def path(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step-{step}"

    def pinned(self, tag: str) -> Path | None:
        """The checkpoint pinned under a tag, if any."""
        pointer = self.folder / f"{tag}.pin"
        if not pointer.is_file():
            return None
        name = pointer.read_text(encoding="utf-8").strip()
        result = self.folder / name
        return result if _NAME.fullmatch(name) and result.is_dir() else None

    def load(self, folder: Path) -> Snapshot:
        """Read a checkpoint after checking every byte of it.

        Raises:
            CheckpointError: it is damaged, foreign or of another format.
        """
        try:
            manifest = read_manifest(folder)
            self._check(folder, manifest)
            aliases = manifest["aliases"]
            model = _load_tensors(folder / MODEL, aliases[MODEL])
            tensors = _load_tensors(folder / STATE_TENSORS, aliases[STATE_TENSORS])
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            trees = {name: join_tree(tree, tensors) for name, tree in state.items()}
            about = manifest["about"]
            if manifest["format"] == BEFORE_WORDS:
                for tree in (trees, about):
                    tree["plugins"] = {
                        label_today(label): own for label, own in tree.get("plugins", {}).items()
                    }
            if not manifest.get("finite"):
                _refuse_nan(folder, model)
            return Snapshot(
                int(manifest["step"]), model, trees, about,
                config=_config_copy(folder, manifest["files"]),
                remarks=_remarks(folder, manifest["files"]),
            )  # fmt: skip
        except CheckpointError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"{folder} cannot be read: {why}") from error

    @staticmethod
    def _check(folder: Path, manifest: Mapping[str, Any]) -> None:
        """Refuse what is of another format or step or has changed since it was written."""
        if manifest["format"] not in (BEFORE_WORDS, UNSEALED, FORMAT):
            raise CheckpointError(
                f"{folder} has the format {manifest['format']}, this kernel reads {FORMAT}"
            )
        named = _NAME.match(folder.name.removeprefix("."))  # moved aside, it has a dot before
        if named is None or int(named[1]) != manifest["step"]:
            raise CheckpointError(
                f"{folder} is damaged: it holds step {manifest['step']}; "
                f"the folder of that would be step-{manifest['step']}"
            )
        check_files(folder, manifest["files"], REQUIRED)

    def _intact_names(self) -> list[Path]:
        """Folders of whole checkpoints by step; nothing is written.

        Also one that a cut save has moved aside and nothing yet stands in the place of.
        """
        result = {step: self.path(step) for step in self.steps()}
        for path in self.folder.glob(".step-*.replaced-*") if self.folder.is_dir() else ():
            match = _NAME.match(path.name[1:])
            if match and path.is_dir():
                result.setdefault(int(match[1]), path)
        return [result[step] for step in sorted(result)]

    def newest(self, before: int | None = None) -> tuple[Snapshot, Path, list[str]]:
        """The newest checkpoint that is intact.

        Args:
            before: only those of earlier steps than this one.

        Returns:
            Its content, its folder, and what was wrong with newer ones or is strange about it.

        Raises:
            CheckpointError: there is none.
        """
        problems: list[str] = []
        for _ in range(_TRIES):
            names, problems = self._intact_names(), []
            for folder in reversed(names):
                step = int(_NAME.search(folder.name)[1])  # type: ignore[index]
                if before is not None and step >= before:
                    continue
                try:
                    snapshot = self.load(folder)
                    return snapshot, folder, [*problems, *snapshot.remarks]
                except CheckpointError as error:
                    if folder.exists():  # else its owner has pruned it since, for a newer one
                        problems.append(str(error))
            if names == self._intact_names():
                break
        result = "; ".join(problems) or "there is none"
        raise CheckpointError(f"no intact checkpoint in {self.folder}: {result}")


class CheckpointStore(CheckpointReader):
    """The checkpoints of one run, for its owner.

    Args:
        folder: `checkpoints/` of the run folder.
        keep: newest ones that rotation keeps; pinned ones stay besides.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        assert keep >= 2, "pruning never leaves fewer than two"
        super().__init__(folder)
        self.keep = keep

    def save(self, snapshot: Snapshot, tags: tuple[str, ...] = ()) -> Path:
        """Commit a snapshot, move the pointers, prune.

        Raises:
            CheckpointError: it could not be written; the earlier ones are untouched.
        """
        final = self.path(snapshot.step)
        try:
            atomic_files.make_folder(self.folder)
            with atomic_files.committed_folder(final) as partial:
                self._write(partial, snapshot)
            atomic_files.write_text(self.folder / "latest", f"{final.name}\n")
            for tag in tags:
                assert _TAG.fullmatch(tag), tag
                atomic_files.write_text(self.folder / f"{tag}.pin", f"{final.name}\n")
        except CheckpointError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise CheckpointError(f"cannot save {final}: {why}") from error
        self._prune()
        return final

    @staticmethod
    def _write(folder: Path, snapshot: Snapshot) -> None:
        state: dict[str, Any] = {}
        tensors: dict[str, Tensor] = {}
        for name, tree in snapshot.trees.items():
            state[name], result = split_tree(tree, name)
            tensors.update(result)
        files: dict[str, Any] = {}
        aliases: dict[str, Any] = {}
        for name, named in ((MODEL, snapshot.model), (STATE_TENSORS, tensors)):
            written, aliases[name] = _untie(named)
            files[name] = write_tensors(folder / name, written)
        texts = {STATE: atomic_files.json_text(state)}
        if snapshot.config:
            texts[CONFIG_COPY] = snapshot.config
        for name, text in texts.items():
            atomic_files.write_text(folder / name, text, durable=False)
            files[name] = entry(folder / name)
        manifest = {
            "format": FORMAT,
            "step": snapshot.step,
            "about": snapshot.about,
            "finite": True,
            "aliases": aliases,
            "files": files,
        }
        write_manifest(folder, manifest)

    def drop_after(self, step: int) -> None:
        """Remove what a run came to after a step that it goes on from; pinned ones stay.

        Raises:
            CheckpointError: it cannot be read what is pinned; nothing is removed.
        """
        pins = self._pins()
        for later in self.steps():
            if later > step and self.path(later).name not in pins:
                atomic_files.remove_folder(self.path(later))

    def _prune(self) -> None:
        try:
            pins = self._pins()
        except CheckpointError:
            return  # the new one stands; what is too many goes after the next
        for step in self.steps()[: -self.keep]:
            if self.path(step).name not in pins:
                atomic_files.remove_folder(self.path(step))

    def _pins(self) -> set[str]:
        """Names of the checkpoints that are pinned."""
        try:
            pointers = sorted(self.folder.glob("*.pin"))
            return {pointer.read_text(encoding="utf-8").strip() for pointer in pointers}
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(
                f"cannot read what is pinned in {self.folder}: {error}"
            ) from error

    def clear_unfinished(self) -> None:
        """Remove what an interrupted save left; never a committed checkpoint.

        A save that was cut between its two renames left the old folder under a hidden name: it
        is put back.
        """
        if not self.folder.is_dir():
            return
        atomic_files.clear_abandoned_files(self.folder)
        for path in list(self.folder.iterdir()):
            result = re.fullmatch(r"\.(step-\d+)\.(partial|replaced)-[0-9a-f]{8}", path.name)
            if result is None:
                continue
            if result[2] == "replaced" and not (self.folder / result[1]).exists():
                path.rename(self.folder / result[1])
            else:
                shutil.rmtree(path, ignore_errors=True)
