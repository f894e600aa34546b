"""The checkpoints of a training loop's folder: gone on from, refused, or set aside."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Final

from agent_forge.phases.phase5_training.training_identity import TrainingIdentity, weights_digest
from forge_kernel.api import RunError
from forge_kernel.embedding import CheckpointStore, Session, Snapshot

log = logging.getLogger("agent_forge.phase5_training")

CHECKPOINTS: Final = "checkpoints"
_ABOUT: Final = "training"


class TrainingFolder:
    """A folder that may hold the checkpoints of an earlier training.

    Args:
        folder: of the training.
        identity: of the training that is to begin; None: only `set_aside` is called.
        epochs: that it is to make.
        own: whether the folder's training is the caller's, stopped in this process.
    """

    def __init__(
        self, folder: Path, identity: TrainingIdentity | None, epochs: int, *, own: bool = False
    ) -> None:
        self._folder, self._identity, self._epochs, self._own = folder, identity, epochs, own
        self._store = CheckpointStore(folder / CHECKPOINTS)

    def about(self) -> dict[str, Any]:
        """What each checkpoint is to keep of the training."""
        return {} if self._identity is None else {_ABOUT: self._identity.to_data()}

    def check(self) -> None:
        """Make sure that checkpoints that are there may be gone on from.

        Those of an ended training of another model or other data are set aside.

        Raises:
            RunError: they are of one that has not ended.
        """
        if self._own or not self._store.steps():
            return
        assert self._identity is not None
        known, _, _ = self._store.newest()
        before = TrainingIdentity.from_data(known.about.get(_ABOUT))
        ended = int(known.trees["progress"]["epoch"]) >= self._epochs
        other = self._other(before)
        mine = before is not None and before.weights == self._identity.weights
        if ended and (other or not mine):
            self.set_aside(f"they are of an ended training of {other or 'other weights'}")
        elif ended:
            log.warning("the training in %s has ended: its weights are taken up", self._folder)
        elif other:
            raise RunError(
                f"{self._folder} holds the checkpoints of a training of {other}, which has not "
                "ended: name another checkpoint_dir, or begin anew with "
                "resume_from_checkpoint=False (they are set aside)"
            )
        elif mine or self._are_of(known):
            log.info("going on from step %d of %s", known.step, self._folder)
        else:
            log.warning(
                "going on from step %d of %s, with its weights in the place of the model's (which "
                "are not those that training began with)", known.step, self._folder,
            )  # fmt: skip

    def _other(self, before: TrainingIdentity | None) -> str:
        """What differs from a training, if something does."""
        if before is None or self._identity is None:
            return ""
        if before.network != self._identity.network:
            return "another model"
        return "other data" if before.data != self._identity.data else ""

    def _are_of(self, known: Snapshot) -> bool:
        """Whether the caller's weights are the checkpoint's."""
        assert self._identity is not None
        return weights_digest(known.model) == self._identity.weights

    def set_aside(self, why: str) -> None:
        """Move the checkpoints to `checkpoints-N`, and say so; without any nothing happens."""
        if not self._store.steps():
            return
        number = 1
        while (self._folder / f"{CHECKPOINTS}-{number}").exists():
            number += 1
        place = self._store.folder.rename(self._folder / f"{CHECKPOINTS}-{number}")
        log.warning("earlier checkpoints now lie in %s (%s): training begins anew", place, why)

    def continues(self, session: Session) -> bool:
        """Whether there is a checkpoint to go on from; its `about` is the session's then."""
        store = session.store
        if store is None or not store.steps():
            return False
        known, _, _ = store.newest()
        session.about.update({name: known.about[name] for name in (_ABOUT,) if name in known.about})
        return True
