"""The peers of `overhead.py`: the same training in other frameworks, as far as they are installed.

Each function returns subjects: callables that train n more steps. A peer runs in a greenlet; its
data hands control back to the bench after as many batches, so all subjects are alive at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn

warnings.simplefilter("ignore")
Subject = Callable[[int], None]
Batches = list[tuple[torch.Tensor, torch.Tensor]]
loss_function = nn.functional.cross_entropy


class Feed(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Endless batches; control goes back to the bench when as many as it asked for were used."""

    def __init__(self, batches: Batches, *, mapping: bool = False) -> None:
        self._batches = batches
        self._mapping = mapping
        self._bench = getcurrent()

    def __iter__(self) -> Iterator[Any]:
        position = left = 0
        while True:
            if left == 0:
                left = self._bench.switch()
            left -= 1
            inputs, targets = self._batches[position % len(self._batches)]
            yield {"inputs": inputs, "labels": targets} if self._mapping else (inputs, targets)
            position += 1


def driven(train: Callable[[], Any]) -> Subject:
    """A subject that lets `train` go on for n steps."""
    training = greenlet(train)
    training.switch()
    return training.switch


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def ignite(make: Any, batches: Batches, lr: float, *, typical: bool) -> Subject:
    from ignite.contrib.handlers import ProgressBar
    from ignite.engine import Engine, Events
    from ignite.metrics import RunningAverage

    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)

    def update(engine: Any, batch: Any) -> Any:
        loss = loss_function(model(batch[0]), batch[1])
        loss.backward()
        if typical:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item() if typical else loss.detach()

    engine = Engine(update)
    if typical:
        RunningAverage(output_transform=lambda value: value).attach(engine, "loss")
        bar = ProgressBar(file=open("/dev/null", "w"))  # noqa: SIM115  lives as long as the bench
        bar.attach(engine, ["loss"])
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=50), lambda _: None)
    feed = Feed(batches)
    return driven(lambda: engine.run(feed, max_epochs=1, epoch_length=10**9))


def accelerate(make: Any, batches: Batches, lr: float, *, typical: bool) -> Subject:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = make()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    feed = Feed(batches)

    def train() -> None:
        for inputs, targets in feed:
            loss = loss_function(model(inputs), targets)
            accelerator.backward(loss)
            if typical:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return driven(train)


def lightning(make: Any, batches: Batches, lr: float, *, typical: bool, folder: Path) -> Subject:
    import lightning.pytorch as pl
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def training_step(self, batch: Any, index: int) -> Any:
            loss = loss_function(self.model(batch[0]), batch[1])
            if typical:
                self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=lr)

    trainer = pl.Trainer(
        accelerator="cpu", max_steps=10**9, max_epochs=-1, logger=CSVLogger(folder) if typical else False,
        enable_progress_bar=typical, enable_checkpointing=False, enable_model_summary=False,
        gradient_clip_val=1.0 if typical else None, log_every_n_steps=50,
    )  # fmt: skip
    module, feed = Module(), Feed(batches)  # made here: control comes back to whoever makes it
    return driven(lambda: trainer.fit(module, feed))


def transformers(make: Any, batches: Batches, lr: float, *, typical: bool, folder: Path) -> Subject:
    from transformers import Trainer, TrainingArguments

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make()

        def forward(self, inputs: Any, labels: Any) -> Any:
            return {"loss": loss_function(self.model(inputs), labels)}

    feed = Feed(batches, mapping=True)

    class Peer(Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> Any:
            return feed

    arguments = TrainingArguments(
        output_dir=str(folder / "hf"), max_steps=10**9, learning_rate=lr, use_cpu=True,
        lr_scheduler_type="constant", weight_decay=0.01, max_grad_norm=1.0 if typical else 0.0,
        logging_strategy="steps" if typical else "no", logging_steps=50, save_strategy="no",
        report_to=[], disable_tqdm=not typical, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Peer(model=Model(), args=arguments, train_dataset=feed)
    return driven(trainer.train)


def _all(
    make: Any, batches: Batches, lr: float, folder: Path, *, typical: bool
) -> dict[str, Subject]:
    result: dict[str, Subject] = {}
    if installed("ignite"):
        result["Ignite"] = ignite(make, batches, lr, typical=typical)
    if installed("accelerate"):
        result["Accelerate"] = accelerate(make, batches, lr, typical=typical)
    if installed("lightning"):
        result["Lightning Trainer"] = lightning(make, batches, lr, typical=typical, folder=folder)
    if installed("transformers"):
        result["transformers Trainer"] = transformers(
            make, batches, lr, typical=typical, folder=folder
        )
    return result


def plain(make: Any, batches: Batches, lr: float, folder: Path) -> dict[str, Subject]:
    """Training alone."""
    with contextlib.redirect_stdout(None):
        return _all(make, batches, lr, folder, typical=False)


def typical(make: Any, batches: Batches, lr: float, folder: Path) -> dict[str, Subject]:
    """Clipping, a log line every 50 steps, a progress bar."""
    with contextlib.redirect_stdout(None):
        return _all(make, batches, lr, folder, typical=True)
