"""All that a run needs to go on, collected from its owners and given back to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final

import torch

from forge_kernel.config.changes import changed_settings, config_digest
from forge_kernel.contract.data import place_after
from forge_kernel.contract.plugin import Stateful
from forge_kernel.contract.values import Progress
from forge_kernel.errors import CheckpointError, NonFiniteError, RunError
from forge_kernel.storage.checkpoint_store import Snapshot
from forge_kernel.storage.random_state import read_random_state, write_random_state
from forge_kernel.training.events import pass_events
from forge_kernel.training.extra_state import extra_states, load_extra_states
from forge_kernel.training.guards.finite_check import (
    in_words,
    non_finite_names,
    state_of_parameters,
)
from forge_kernel.training.optimizer_state import load_optimizer_state, optimizer_state
from forge_kernel.training.session_state import SessionState

MAX_ROLLBACKS: Final = 10
_TREES: Final = frozenset({"optimizer", "plugins", "random", "progress", "metrics", "loop"})


def take_snapshot(session: SessionState) -> Snapshot:
    """Everything that the run needs to go on."""
    run = session.run
    data = run.data
    session.clock.accumulate_elapsed()
    with session.streams:
        random = read_random_state()
    trees: dict[str, Any] = {
        "optimizer": optimizer_state(run),
        "plugins": {entry.label: plugin.state_dict() for entry, plugin in session.bus.stateful()},
        "random": random,
        "data": data.state_dict() if isinstance(data, Stateful) else None,
        "progress": asdict(run.progress),
        "metrics": run.metrics.state_dict(),
        "extra_state": extra_states(run),
        "loop": _loop_state(session),
    }
    versions = {entry.label: entry.origin for entry, _ in session.bus.stateful()}
    about = {
        **session.about,
        **({"config": config_digest(session.config)} if session.config else {}),
        "torch": torch.__version__,
        "optimizer": type(run.optimizer).__name__,
        "plugins": versions,
    }
    model = run.strategy.model_state(run)
    return Snapshot(run.progress.step, model, trees, about, config=session.config)


def _loop_state(session: SessionState) -> dict[str, Any]:
    """What the session's parts remember, in one tree."""
    return {
        **session.optimizer_step.state_dict(),
        "total_steps": session.run.total_steps,
        "validated_at": session.validation.at,
        "validation_cut": session.validation.cut,
        "logged_at": session.logged_at,
    }


def load_snapshot(session: SessionState, snapshot: Snapshot, *, random: bool = True) -> None:
    """Bring the run to the state of a snapshot.

    Args:
        session: set up.
        snapshot: what `take_snapshot` gave.
        random: also the random streams and the place in the data.

    Raises:
        RunError: it is of another model or of other plugins.
    """
    run, trees = session.run, snapshot.trees
    lacking = sorted(_TREES - trees.keys())
    if lacking:
        raise CheckpointError(f"the checkpoint of step {snapshot.step} has no {', '.join(lacking)}")
    try:
        run.strategy.load_model_state(run, snapshot.model)
    except (KeyError, ValueError) as error:
        raise RunError(f"the checkpoint is of another model: {error.args[0]}") from error
    theirs, mine = snapshot.about.get("optimizer"), type(run.optimizer).__name__
    if theirs not in (None, mine):
        raise RunError(f"the checkpoint holds the memory of {theirs}, and this run has {mine}")
    load_extra_states(run, trees.get("extra_state", {}))
    load_optimizer_state(run, trees["optimizer"])
    known = trees["plugins"]
    for entry, plugin in session.bus.stateful():
        if entry.label not in known:
            raise RunError(f"the checkpoint has no state of {entry.label}; it has {sorted(known)}")
        plugin.load_state_dict(known[entry.label])
    batches = _load_progress(run.progress, trees["progress"], place=random)
    run.metrics.load_state_dict(trees["metrics"])
    loop = {**_loop_state(session), **trees["loop"]}  # what an older one lacks stays as it is
    session.optimizer_step.load_state_dict(loop)
    session.validation.at, session.logged_at = loop["validated_at"], loop["logged_at"]
    session.validation.cut = loop["validation_cut"]
    if random:
        data = run.data
        if isinstance(data, Stateful) and trees.get("data"):
            data.load_state_dict(trees["data"])
        if batches is not None:
            run.progress.place = place_after(data, run.progress.epoch, batches)
        with session.streams:
            write_random_state(trees["random"])
    for notify in session.bus.calls("on_weights_changed"):
        notify(run)


def _load_progress(progress: Progress, tree: Mapping[str, Any], *, place: bool) -> int | None:
    """Take counts up, the epoch and the place in it only where asked.

    Returns:
        Batches consumed in the epoch, of a checkpoint from before places counted samples.
    """
    counts = dict(tree)
    batches: int | None = counts.pop("batch", None)
    for name, value in counts.items():
        if not hasattr(progress, name):
            raise CheckpointError(f"the checkpoint's progress has an unknown part '{name}'")
        if place or name not in ("epoch", "place"):
            setattr(progress, name, value)
    return batches


def load_pinned_weights(session: SessionState, tag: str) -> None:
    """Put the weights of a pinned checkpoint into the model.

    The plugin that names the evaluation model, if one does, takes up its memory too: what was
    validated then is what is restored. Nothing else changes.

    Raises:
        RunError: nothing is pinned under the tag.
    """
    result = session.store.pinned(tag) if session.store is not None else None
    if session.store is None or result is None:
        raise RunError(f"there is no checkpoint pinned as '{tag}' to restore")
    run, snapshot = session.run, session.store.load(result)
    run.strategy.load_model_state(run, snapshot.model)
    namers = {entry.path for entry in session.plan.answering("compute_evaluation_model")}
    for entry, plugin in session.bus.stateful():
        if entry.path in namers:
            plugin.load_state_dict(snapshot.trees["plugins"][entry.label])
    session.validation.at = -1
    for notify in session.bus.calls("on_weights_changed"):
        notify(run)


def roll_back(session: SessionState, where: str) -> None:
    """Back to the newest checkpoint, on with the data: the windows after it are lost.

    Where that one was gone back to already and nothing was kept since, what came of it is known:
    back to the one before it.
    """
    store = session.owned_store
    assert store is not None
    progress = session.run.progress
    rollbacks, skipped = progress.rollbacks + 1, progress.skipped
    if rollbacks > MAX_ROLLBACKS:
        raise NonFiniteError(f"not finite {where}, after {MAX_ROLLBACKS} rollbacks")
    epoch, place = progress.epoch, progress.place
    steps, last = store.steps(), session.rolled_back_to
    again = last is not None and bool(steps) and steps[0] < last and steps[-1] <= last
    snapshot, _, _ = store.newest(before=last if again else None)
    session.rolled_back_to = snapshot.step
    store.drop_after(snapshot.step)
    load_snapshot(session, snapshot, random=False)
    progress.epoch, progress.place = epoch, place
    progress.rollbacks, progress.skipped = rollbacks, skipped
    session.optimizer_step.open()


def non_finite_parts(session: SessionState, snapshot: Snapshot) -> list[str]:
    """What of a snapshot is no number: of the model, and of all memories that follow a parameter.

    A buffer that held infinities from the start (a mask) is as it should be.
    """
    shapes = {parameter.shape for parameter in session.run.parameters.values()}
    kept = {name: snapshot.trees[name] for name in ("optimizer", "plugins")}
    tensors = {**snapshot.model, **state_of_parameters(kept, shapes)}
    for name in session.never_finite:
        tensors.pop(name, None)
    return non_finite_names(tensors)


def may_be_kept(session: SessionState, snapshot: Snapshot) -> bool:
    """Whether a snapshot is made of numbers; else the policy is applied.

    Raises:
        NonFiniteError: it is not, and the policy is neither to go back nor to go on.
    """
    names = non_finite_parts(session, snapshot)
    if not names:
        return True
    policy, store = session.settings.non_finite, session.owned_store
    what = (
        f"not finite after step {snapshot.step}: {in_words(names)}. The gradients were finite, so "
        "a filter, the optimizer or a callback made it: lower the learning rate, or look at them"
    )
    if policy == "off":
        session.run.emit_event("not_saved", f"The checkpoint was not written: {what}.")
        pass_events(session.run, session.bus)
    elif policy == "rollback" and store is not None and store.steps():
        roll_back(session, f"after step {snapshot.step}: {in_words(names)}")
    else:
        raise NonFiniteError(what)
    return False


def need_finite_weights(session: SessionState, step: int) -> None:
    """No run completes with weights that are no numbers.

    Args:
        session: at its end.
        step: at which it ended.

    Raises:
        NonFiniteError: they are not finite, or the run went back from where it ended.
    """
    names = non_finite_names(session.run.strategy.model_state(session.run))
    names = [name for name in names if name not in session.never_finite]
    if names:
        raise NonFiniteError(f"not finite at the end, after step {step}: {in_words(names)}")
    if session.run.progress.step != step:
        raise NonFiniteError(
            f"not finite at the end, after step {step}: the weights are those of step "
            f"{session.run.progress.step}, which the run went back to"
        )


def differences(session: SessionState, snapshot: Snapshot) -> list[str]:
    """What a checkpoint was made with that is another now: a line for each.

    Args:
        session: set up.
        snapshot: from the checkpoint.
    """
    result, about = [], snapshot.about
    if about.get("torch") not in (None, torch.__version__):
        result.append(f"it was saved with torch {about['torch']}, this is {torch.__version__}")
    origins = {entry.label: entry.origin for entry, _ in session.bus.stateful()}
    for label, origin in about.get("plugins", {}).items():
        if label in origins and origins[label] != origin:
            result.append(f"{label} was {origin} when it was saved, and is {origins[label]}")
    if not session.config or about.get("config") in (None, config_digest(session.config)):
        return result
    then = f"since the checkpoint of step {snapshot.step}"
    changed = changed_settings(snapshot.config, session.config) if snapshot.config else []
    lines = [f"changed {then}: {line}" for line in changed]
    return [*result, *(lines or [f"the configuration has changed {then}"])]
