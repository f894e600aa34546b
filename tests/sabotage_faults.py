"""Which guards are taken away, and which battery must notice; `sabotage.py` runs them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Fault:
    """A guard that is taken away.

    Args:
        name: of the fault.
        file: where the guard is.
        guard: its text, which the file has once.
        instead: what stands there with the fault.
        battery: must find a trial wrong.
        count: so many trials are enough.
    """

    name: str
    file: str
    guard: str
    instead: str
    battery: str
    count: int


_ATOMIC: Final = "forge_kernel/storage/atomic_files.py"
_STORE: Final = "forge_kernel/storage/checkpoint_store.py"
_CACHE: Final = "plugins/forge_plugins/formats/columns/cache.py"
_MEMOS: Final = "plugins/forge_plugins/formats/columns/metadata_cache.py"
_MANIFEST: Final = "forge_kernel/storage/manifest.py"

FAULTS: Final[tuple[Fault, ...]] = (
    Fault(
        "no-fsync-of-files", _ATOMIC,
        "            sync_file(Path(place) / name)\n", "            pass\n",
        "power-loss", 300,
    ),
    Fault(
        "no-fsync-of-a-new-folders-entries", _ATOMIC,
        "        sync_folder(Path(place))\n", "        pass\n",
        "power-loss", 300,
    ),
    Fault(
        "no-fsync-of-the-parent", _ATOMIC,
        "                partial.rename(final)\n                sync_folder(final.parent)\n",
        "                partial.rename(final)\n",
        "power-loss", 600,
    ),
    Fault(
        "a-replaced-folder-goes-first", _ATOMIC,
        "    sync_folder(final.parent)\n    shutil.rmtree(old, ignore_errors=True)\n",
        "    shutil.rmtree(old, ignore_errors=True)\n",
        "power-loss", 600,
    ),
    Fault(
        "no-fsync-of-the-run-folders-parent", _ATOMIC,
        "        sync_folder(made.parent)\n", "        pass\n",
        "power-loss", 300,
    ),
    Fault(
        "lines-not-synced", "plugins/forge_plugins/observers/jsonl_writer.py",
        "            self._file.sync()\n", "            pass\n",
        "power-loss", 600,
    ),
    Fault(
        "hash-unchecked", _MANIFEST,
        "    if any(_HASHES[kind](file) != known[kind] for kind in kinds):\n", "    if False:\n",
        "damage", 100,
    ),
    Fault(
        "manifest-seal-unchecked", _MANIFEST,
        "    if needs_seal and not is_as_written(content, facts):\n", "    if False:\n",
        "damage", 300,
    ),
    Fault(
        "step-of-the-folder-unchecked", _STORE,
        "        if named is None or int(named[1]) != manifest[\"step\"]:\n", "        if False:\n",
        "damage", 300,
    ),
    Fault(
        "status-unchecked", "forge_kernel/run_folder/folder.py",
        " or (SEAL in data and not is_as_written(content, data)):\n", ":\n",
        "damage", 300,
    ),
    Fault(
        "changed-configuration-untold", "forge_kernel/training/snapshot.py",
        "        return result\n    then = ", "        pass\n    return result\n    then = ",
        "damage", 300,
    ),
    Fault(
        "pruned-file-by-file", _ATOMIC,
        "        folder.rename(gone)\n        shutil.rmtree(gone, ignore_errors=True)\n",
        "        shutil.rmtree(folder, ignore_errors=True)\n",
        "kill-points", 340,
    ),
    Fault(
        "replaced-before-the-new-one-stands", _ATOMIC,
        "                final.rename(old)\n",
        "                final.rename(old)\n                shutil.rmtree(old)\n",
        "kill-points", 340,
    ),
    Fault(
        "leftovers-stay", "forge_kernel/runner.py",
        "            session.owned_store.clear_unfinished()\n", "            pass\n",
        "kill-points", 60,
    ),
    Fault(
        "errors-of-the-disk-as-they-are", _STORE,
        "            raise CheckpointError(f\"cannot save {final}: {why}\") from error\n",
        "            raise\n",
        "io-errors", 60,
    ),
    Fault(
        "lock-not-heeded", "forge_kernel/run_folder/owner.py",
        "        if not locked or (foreign and not take_over):\n",
        "        if foreign and not take_over:\n",
        "owners", 10,
    ),
    Fault(
        "a-reader-cleans-up", "forge_kernel/training/session.py",
        "        snapshot, _, problems = self.store.newest()\n",
        "        from forge_kernel.storage.checkpoint_store import CheckpointStore\n"
        "        CheckpointStore(self.store.folder).clear_unfinished()\n"
        "        snapshot, _, problems = self.store.newest()\n",
        "owners", 100,
    ),
    Fault(
        "life-judged-by-the-clock", "forge_kernel/run_folder/status.py",
        '    gone = owned == "free"\n', "    gone = age is None or age > SILENT_AFTER\n",
        "owners", 30,
    ),
    Fault(
        "cached-columns-unchecked", _CACHE,
        "    if [file_hash(file) for file in files] != hashes:\n", "    if False:\n",
        "caches", 100,
    ),
    Fault(
        "stamps-of-cached-columns-unchecked", _CACHE,
        "known is not None and known[\"stamps\"] == stamps and", "known is not None and",
        "caches", 100,
    ),
    Fault(
        "cached-manifest-unchecked", _CACHE,
        "        if text != _sealed(manifest):\n", "        if False:\n",
        "caches", 200,
    ),
    Fault(
        "memo-unchecked", _MEMOS,
        "            if head != _hashed(body):\n", "            if False:\n",
        "caches", 200,
    ),
    Fault(
        "kept-numbers-unchecked", _MEMOS,
        "known is None or known.get(\"xxh3_128\") != file_hash(path):\n", "False:\n",
        "caches", 1_500,
    ),
    Fault(
        "weights-unchecked-at-save", "forge_kernel/training/snapshot.py",
        "    names = non_finite_parts(session, snapshot)\n", "    names: list[str] = []\n",
        "non-finite", 160,
    ),
    Fault(
        "rollback-to-the-newest-only", "forge_kernel/training/snapshot.py",
        "store.newest(before=last if again else None)", "store.newest()",
        "non-finite", 352,
    ),
    Fault(
        "an-observer-ends-the-run", "forge_kernel/training/bus.py",
        "            failures += 1\n            if failures == 1:\n", "            raise\n            if failures == 1:\n",
        "misbehaviour", 450,
    ),
    Fault(
        "hang-up-kills", "forge_kernel/cli/interrupt.py",
        "signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)", "signal.SIGTERM, signal.SIGUSR1)",
        "signals", 60,
    ),
    Fault(
        "a-signal-is-not-asked-for", "forge_kernel/cli/interrupt.py",
        "        return self.signal is not None\n", "        return False\n",
        "signals", 30,
    ),
    Fault(
        "any-global-of-a-pickle", "plugins/forge_plugins/formats/readers/unpickler.py",
        "        return NAMES.get((module_name, global_name)) or placeholder_class(f\"it names {name}\")\n",
        "        return super().find_class(module_name, global_name)\n",
        "hostile-pickles", 60,
    ),
    Fault(
        "weights-only-off", "plugins/forge_plugins/formats/readers/torch.py",
        "weights_only=not trusted)", "weights_only=False)",
        "hostile-pickles", 120,
    ),
    Fault(
        "code-without-permission", "forge_kernel/planning/plan.py",
        "                if needs and not allowed:\n", "                if False:\n",
        "hostile-pipelines", 105,
    ),
    Fault(
        "names-unescaped-in-pages", "plugins/forge_plugins/reports/markup.py",
        "html.escape(_FORBIDDEN.sub(\"\\ufffd\", str(text)), quote=True)", "str(text)",
        "viewers", 7,
    ),
    Fault(
        "any-host-is-served", "plugins/forge_plugins/reports/live.py",
        "        if self.headers.get(\"Host\") not in self.server.hosts():\n", "        if False:\n",
        "viewers", 7,
    ),
    Fault(
        "no-room-looked-for", "forge_kernel/training/set_up.py",
        "    try_checkpoint(session)\n", "    pass\n",
        "full-disk", 60,
    ),
    Fault(
        "no-watch", "forge_kernel/training/guards/hang_watch.py",
        "    if session.settings.hang_minutes is None:\n", "    if True:\n",
        "hangs", 1,
    ),
    Fault(
        "a-counted-step-is-halved-again", "forge_kernel/training/optimizer_step.py",
        "if report is error or updates or not halves:", "if report is error or not halves:",
        "short-memory", 132,
    ),
)  # fmt: skip
