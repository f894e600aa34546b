"""From a pipeline to a finished run: the arrows of the design, one line each."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.yaml_file import write_yaml
from forge_kernel.contract.plugin import Kind
from forge_kernel.contract.plugin_rules import under_rules
from forge_kernel.contract.result import RunResult
from forge_kernel.errors import ConfigError, Fault, RunError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.migration import migrated
from forge_kernel.planning.path_settings import with_absolute_paths
from forge_kernel.planning.pipeline_file import (
    check_document,
    check_pipeline,
    fill,
    load_pipeline,
    read_document,
)
from forge_kernel.planning.plan import Plan, plan
from forge_kernel.recorded_run import recorded
from forge_kernel.run_folder.folder import CHECKPOINTS, CONFIG, RunFolder
from forge_kernel.run_folder.owner import Owner
from forge_kernel.run_folder.record import (
    RunRecord,
    discarded_if_refused,
    new_run_folder,
    write_config,
)
from forge_kernel.storage.atomic_files import clear_abandoned_files
from forge_kernel.training.loaders.in_memory import (
    InMemoryData,
    InMemoryModel,
    ProgressCallback,
    ProgressObserver,
)
from forge_kernel.training.rehearsal.placed_faults import placed
from forge_kernel.trust import code_allowed

if TYPE_CHECKING:
    from torch import nn

    from forge_kernel.config.document import Document
    from forge_kernel.contract.cancel import Cancel
    from forge_kernel.contract.strategy import Strategy
    from forge_kernel.training.session import Session


def run(  # noqa: PLR0913  keyword-only, each a wish of its own
    pipeline: PipelineConfig | str | Path,
    *,
    model: nn.Module | None = None,
    data: Any = None,
    plugins: Sequence[Any] = (),
    catalog: Catalog | None = None,
    output_dir: str | Path | None = None,
    on_progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
    strategy: Strategy | None = None,
    quiet: bool = False,
    allow_code: bool = False,
) -> RunResult:
    """Run a pipeline to its end.

    May be called from any thread and several times in one process; random streams, grad mode and
    settings of torch are left as they were found.

    Args:
        pipeline: from `load_pipeline`, built by hand, or the name of a file.
        model: a live module instead of the file's model.
        data: live data instead of the file's: `Data`, an iterable of batches (tuples, mappings or
            `Batch`), or a pair (training, validation) of them.
        plugins: plugin objects beside the file's.
        catalog: plugins to choose from; the installed ones otherwise.
        output_dir: the run folder, which must be new or empty; made below `runs/` otherwise.
        on_progress: called with each event (a dict) in this thread.
        cancel: asked at each step's edge whether to stop; the run is then resumable.
        strategy: how to spread the run; one process otherwise.
        quiet: observers that write to the screen keep silent.
        allow_code: also run code that the file names (functions, pickles as they are).

    Raises:
        ConfigError, PlanError, PluginError: nothing was run and nothing written.
        Exception: what a part of the run raised, after the run folder says why.
    """
    live = _live_parts(model, data)
    catalog = catalog or Catalog.installed()
    checked = _made_definite(_checked(pipeline, catalog, _kinds(live, plugins), live))
    record = RunRecord()
    handed_in = _handed_in(live, plugins, record, on_progress)
    with code_allowed(allow_code):
        decided = plan(checked, catalog, plugins=handed_in)
    names = tuple(kind.value for kind in live) + (("plugins",) if plugins else ())
    with (
        code_allowed(allow_code),
        under_rules(checked.plugins),
        closing(_new_folder(checked, output_dir, names)) as owner,
    ):
        session = _session_in(owner.folder, decided, cancel=cancel, strategy=strategy, quiet=quiet)
        with session.streams.kept():
            return recorded(session, record)


def run_document(
    document: Document,
    *,
    output_dir: str | None,
    cancel: Cancel,
    quiet: bool,
    planned: Callable[[PipelineConfig], None],
) -> RunResult:
    """Run a file that has been read: checked and planned once, with faults at their places in it.

    Args:
        document: the file, with its layers and overrides.
        output_dir: see `run`.
        cancel: see `run`.
        quiet: see `run`.
        planned: called with the pipeline when it has no fault, before anything is written.

    Raises:
        ConfigError, PlanError, PluginError: nothing was run and nothing written.
        Exception: what a part of the run raised, after the run folder says why.
    """
    catalog = Catalog.installed()
    checked = _definite_document(document, catalog)
    record = RunRecord()
    decided = plan(checked, catalog, plugins=[record], document=document)
    planned(checked)
    with (
        under_rules(checked.plugins),
        closing(new_run_folder(checked.run.name, output_dir)) as owner,
        discarded_if_refused(owner) as accept,
    ):
        write_config(owner.folder, with_absolute_paths(fill(checked), checked), ())
        from forge_kernel.training.rehearsal.dry_run import rehearse

        with placed(decided.entries, document):
            session = _session_in(owner.folder, decided, cancel=cancel, quiet=quiet)

        def prepare(session: Session) -> None:
            rehearse(session, document)
            accept()

        with session.streams.kept():
            return recorded(session, record, prepare)


def _definite_document(document: Document, catalog: Catalog) -> PipelineConfig:
    """The pipeline of a file as it will run here; what this machine lacks is told at its place."""
    checked = check_document(document, catalog)
    with placed((), document):
        return _made_definite(checked)


def _made_definite(pipeline: PipelineConfig) -> PipelineConfig:
    """The pipeline as it will run here: with its arithmetic and its seed."""
    pipeline = _with_precision(pipeline)
    if pipeline.run.seed is not None:
        return pipeline
    return replace(pipeline, run=replace(pipeline.run, seed=secrets.randbits(32)))


def _new_folder(
    pipeline: PipelineConfig, output_dir: str | Path | None, live: tuple[str, ...] = ()
) -> Owner:
    """A run folder that holds the filled configuration, owned by this process."""
    owner = new_run_folder(pipeline.run.name, output_dir)
    try:
        write_config(owner.folder, with_absolute_paths(fill(pipeline), pipeline), live)
    except BaseException:
        owner.close()
        raise
    return owner


def resume(  # noqa: PLR0913  keyword-only, each a wish of its own
    folder: str | Path,
    settings: Sequence[str] = (),
    *,
    model: nn.Module | None = None,
    data: Any = None,
    plugins: Sequence[Any] = (),
    catalog: Catalog | None = None,
    on_progress: ProgressCallback | None = None,
    cancel: Cancel | None = None,
    strategy: Strategy | None = None,
    quiet: bool = False,
    take_over: bool = False,
    allow_code: bool = False,
    on_notice: Callable[[str], None] | None = None,
) -> RunResult:
    """Go on with a run from its newest intact checkpoint.

    Args:
        folder: the run folder.
        settings: overrides of its configuration (`run.max_steps=4000`); they are kept.
        model: the live module again, if the run was given one; likewise `data` and `plugins`.
        catalog: as for `run`, like the arguments that follow.
        on_progress: see `run`.
        cancel: see `run`.
        strategy: see `run`.
        quiet: see `run`.
        take_over: also of a process on another machine, which did not end the run.
        allow_code: see `run`.
        on_notice: called before the first step with each sentence about the checkpoint (damage of
            newer ones, settings that have changed since); `forge.log` has them all the same.

    Raises:
        ConfigError: the folder is no run folder, live parts are missing, or another process is
            writing it.
        PlanError: a changed setting does not fit the run, which stays as it was.
        CheckpointError: there is no intact checkpoint.
    """
    folder = Path(folder)
    live = _live_parts(model, data)
    catalog = catalog or Catalog.installed()
    given = set(live) | ({"plugins"} if plugins else set())
    document = _recorded_document(folder, settings, catalog)
    pipeline = _with_precision(
        _with_live_parts(check_document(document, catalog, _kinds(live, plugins)), given)
    )
    record = RunRecord()
    handed_in = _handed_in(live, plugins, record, on_progress)
    with code_allowed(allow_code):
        decided = plan(pipeline, catalog, plugins=handed_in)
    need_no_links(folder)
    session = _session_in(folder, decided, cancel=cancel, strategy=strategy, quiet=quiet)
    with (
        code_allowed(allow_code),
        under_rules(pipeline.plugins),
        closing(Owner(folder)) as owner,
        session.streams.kept(),
    ):
        owner.acquire(take_over=take_over)
        from forge_kernel.training.rehearsal.dry_run import unfit_change

        try:
            session.opened(resume=True)
        except BaseException as error:
            owner.release(unused=True)  # what is refused has changed nothing in the folder
            if settings and isinstance(error, Exception):
                raise unfit_change(error, session, document, settings) from error
            raise
        if on_notice is not None:
            for problem in session.problems:
                on_notice(problem)
        clear_abandoned_files(folder)
        if session.owned_store is not None:
            session.owned_store.clear_unfinished()
        if settings:
            names = tuple(pipeline.notes.get("x-live", ()))
            write_config(folder, with_absolute_paths(fill(pipeline), pipeline), names)
        return recorded(session, record)


def need_no_links(folder: Path) -> None:
    """Refuse to write into a run folder that holds links: what is written would be elsewhere.

    Raises:
        ConfigError: naming the first.
    """
    rooms = [folder, folder / CHECKPOINTS, folder / EXPORTS]
    links = [
        path for room in rooms if room.is_dir() for path in room.iterdir() if path.is_symlink()
    ]
    if links:
        first = min(links)
        hint = "put what it leads to in its place, or copy the folder with: cp -rL"
        message = f"{first} is a link to {first.readlink()}: a run is kept in its own folder"
        raise ConfigError([Fault(message, hints=(hint,))])


def recorded_pipeline(
    folder: Path,
    settings: Sequence[str],
    given: Iterable[str],
    catalog: Catalog,
    kinds: Iterable[Kind],
) -> PipelineConfig:
    """The pipeline of a run folder, when all its live parts are given again."""
    document = _recorded_document(folder, settings, catalog)
    return _with_live_parts(check_document(document, catalog, kinds), given)


def _recorded_document(folder: Path, settings: Sequence[str], catalog: Catalog) -> Document:
    """The configuration of a run folder with overrides, as today's names have it."""
    RunFolder(folder).check()
    return migrated(read_document(folder / CONFIG, settings), catalog)


def _with_live_parts(pipeline: PipelineConfig, given: Iterable[str]) -> PipelineConfig:
    """The pipeline, when all live parts that it was run with are given."""
    missing = sorted(set(pipeline.notes.get("x-live", ())) - set(given))
    if missing:
        raise ConfigError([Fault(f"this run was given live parts: hand in {', '.join(missing)}")])
    return pipeline


def export(
    folder: str | Path,
    use: str,
    settings: Sequence[str] = (),
    *,
    model: nn.Module | None = None,
    data: Any = None,
    catalog: Catalog | None = None,
    allow_code: bool = False,
) -> dict[str, Path]:
    """Run an exporter on what a run has learned: its newest intact checkpoint.

    Nothing is trained and no observer is told; an export of the same name is replaced.

    Args:
        folder: the run folder.
        use: the exporter's name.
        settings: of the exporter (`layout=online`), or of the pipeline by their whole path
            (`run.device=cpu`); they are not kept in the run's configuration.
        model: the live module again, if the run was given one; likewise `data`.
        catalog: plugins to choose from; the installed ones otherwise.
        allow_code: see `run`.

    Returns:
        The folders written, by exporter.

    Raises:
        ConfigError: the folder is no run folder, live parts are missing, or a setting is wrong.
        PlanError: the run lacks what the exporter needs.
        CheckpointError: there is no intact checkpoint.
        RunError: the files cannot be written.
    """
    folder = Path(folder)
    need_no_links(folder)
    chosen = [f"exporters=[{{use: {json.dumps(use)}}}]", "observers=null"]
    chosen += [setting if _is_whole(setting) else f"{_EXPORTER}{setting}" for setting in settings]
    live = _live_parts(model, data)
    with (
        code_allowed(allow_code),
        restored(folder, chosen, live=live, catalog=catalog) as session,
    ):
        written = session.export()
        for name, failed in session.failed_exports.items():
            if isinstance(failed, OSError):
                why = f"{type(failed).__name__}: {failed}"
                raise RunError(f"cannot write the export {name} in {folder}: {why}") from failed
            raise failed
    return {name: folder / place for name, place in written.items()}


@contextmanager
def restored(
    folder: Path,
    settings: Sequence[str],
    *,
    live: Mapping[Kind, Any] | None = None,
    catalog: Catalog | None = None,
) -> Iterator[Session]:
    """A run as its newest intact checkpoint has it, for those that read it; nothing is written.

    The process's random state is left as it was.

    Args:
        folder: the run folder.
        settings: overrides of its configuration, for this reading alone.
        live: the live parts that the run was given, again.
        catalog: plugins to choose from; the installed ones otherwise.

    Raises:
        ConfigError: it is no run folder, or live parts are missing.
        PlanError: a plugin of the run is missing here.
        CheckpointError: there is no intact checkpoint.
    """
    live = live or {}
    catalog = catalog or Catalog.installed()
    pipeline = recorded_pipeline(folder, settings, live, catalog, {*live, Kind.OBSERVERS})
    written_then = [f"file:{file.name}" for file in folder.iterdir() if file.is_file()]
    decided = plan(pipeline, catalog, plugins=list(live.values()), given=written_then)
    session = _session_in(folder, decided, quiet=True, reads=True)
    with (
        under_rules(pipeline.plugins),
        session.streams.kept(),
        closing(session.opened(resume=True)),
    ):
        yield session


EXPORTS: Final = "exports"
_EXPORTER: Final = "exporters[0].with."


def _is_whole(setting: str) -> bool:
    """Whether an override names a section of the pipeline, not a setting of the exporter."""
    section = re.split(r"[.\[=]", setting, maxsplit=1)[0]
    return section in ("run", "plugins") or section in set(Kind)


async def run_async(pipeline: PipelineConfig | str | Path, **options: Any) -> RunResult:
    """`run` for a running event loop: works in a thread; cancelling the task stops the run."""
    stop = options.pop("cancel", None) or threading.Event()
    task = asyncio.get_running_loop().run_in_executor(
        None, lambda: run(pipeline, cancel=stop, **options)
    )
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if hasattr(stop, "set"):
            stop.set()
        await asyncio.wait([task])
        raise


def _live_parts(model: nn.Module | None, data: Any) -> dict[Kind, Any]:
    live: dict[Kind, Any] = {}
    if data is not None:
        live[Kind.DATA] = InMemoryData(data)
    if model is not None:
        live[Kind.MODEL] = InMemoryModel(model)
    return live


def _kinds(live: Iterable[Kind], plugins: Sequence[Any]) -> set[Kind]:
    """The kinds that the file need not name."""
    return set(live) | {plugin.info.kind for plugin in plugins if hasattr(plugin, "info")}


def _checked(
    pipeline: PipelineConfig | str | Path,
    catalog: Catalog,
    kinds: Iterable[Kind],
    live: Iterable[Kind],
) -> PipelineConfig:
    """Check and bind, whichever way the pipeline came; live parts replace the file's."""
    if not isinstance(pipeline, PipelineConfig):
        pipeline = load_pipeline(pipeline, catalog=catalog, live=kinds)
    dropped: dict[str, Any] = {kind.value: None for kind in live}
    return check_pipeline(replace(pipeline, **dropped), catalog, kinds)


def _with_precision(pipeline: PipelineConfig) -> PipelineConfig:
    """The pipeline with the arithmetic that `precision: auto` is here: a resumed run keeps it."""
    if pipeline.run.precision != "auto":
        return pipeline
    from forge_kernel.training.device import resolve_device
    from forge_kernel.training.precision import resolve_precision

    result = resolve_precision("auto", resolve_device(pipeline.run.device))
    return replace(pipeline, run=replace(pipeline.run, precision=result))


def _handed_in(
    live: dict[Kind, Any],
    plugins: Sequence[Any],
    record: RunRecord,
    on_progress: ProgressCallback | None,
) -> list[Any]:
    """All plugin objects that stand beside the file's."""
    watchers = [ProgressObserver(on_progress)] if on_progress is not None else []
    return [*live.values(), *plugins, record, *watchers]


def _session_in(folder: Path, decided: Plan, **options: Any) -> Session:
    """A session of a plan in a run folder, not opened; the options are those of `Session`."""
    from forge_kernel.training.session import Session

    pipeline = decided.pipeline
    config = write_yaml(with_absolute_paths(fill(pipeline), pipeline))
    return Session(decided, folder=folder, config=config, **options)
