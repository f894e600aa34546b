"""Pickles and files of torch that want more than to be read."""

from __future__ import annotations

import io
import itertools
import pickle
import random
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import torch
from battery import Battery, Trial
from data_files import opening
from plugin_run import scratch

sys.path.insert(2, str(Path(__file__).parent.parent / "plugins" / "formats"))

from test_hostile_pickles import REFUSED_AT_ONCE, ROUTES, pickled


def whole_pickle() -> bytes:
    numbers = np.random.default_rng(1).random((64, 3), np.float32)
    return pickle.dumps({"input": numbers, "target": np.arange(64)})


def whole_records() -> bytes:
    return pickle.dumps([{"input": [1.0, 2.0], "target": 1, "more": {"a": (1, None)}}] * 50)


def whole_torch() -> bytes:
    stream = io.BytesIO()
    torch.save({"input": torch.rand(64, 3), "target": torch.arange(64)}, stream)
    return stream.getvalue()


def torch_with(payload: bytes, *, repeated: int = 1) -> bytes:
    """A file of torch whose pickle is another one."""
    stream = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(whole_torch())) as source,
        zipfile.ZipFile(stream, "w") as target,
    ):
        for name in source.namelist():
            raw = payload if name.endswith("data.pkl") else source.read(name)
            for _ in range(repeated):
                target.writestr(name, raw)
    return stream.getvalue()


def torch_bomb() -> bytes:
    stream = io.BytesIO()
    source = zipfile.ZipFile(io.BytesIO(whole_torch()))
    with source, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            big = bytes(2**28) if "/data/" in name else source.read(name)
            target.writestr(name, big)
    return stream.getvalue()


def mutant(draw: random.Random, raw: bytes) -> bytes:
    """A file with some bytes changed, cut out, doubled or cut off."""
    body = bytearray(raw)
    for _ in range(draw.randint(1, 6)):
        place = draw.randrange(len(body) or 1)
        if not body:
            break
        what = draw.random()
        if what < 0.6:
            body[place] = draw.randrange(256)
        elif what < 0.75:
            del body[place : place + draw.randint(1, 8)]
        elif what < 0.9:
            body[place:place] = body[place : place + draw.randint(1, 64)]
        else:
            del body[max(1, place) :]
    return bytes(body)


CRAFTED: Final[dict[str, tuple[str, Callable[[], bytes]]]] = {
    **{
        f"{name}, in the input": ("x.pkl", lambda raw=raw: pickled(raw, "input"))
        for name, (raw, _) in ROUTES.items()
    },
    **{
        name: ("x.pkl", lambda raw=raw: pickled(raw, "more"))
        for name, raw in REFUSED_AT_ONCE.items()
    },
    **{
        f"{name}, in a file of torch": ("x.pt", lambda raw=raw: torch_with(pickled(raw, "input")))
        for name, (raw, _) in ROUTES.items()
    },
    "a file of torch that expands": ("x.pt", torch_bomb),
    "a file of torch with members twice": ("x.pt", lambda: torch_with(whole_pickle(), repeated=2)),
    "a file of torch of old": ("x.pt", whole_pickle),
    "many empty lists": ("x.pkl", lambda: b"\x80\x04(" + b"]" * 2**21 + b"l."),
    "many empty tuples in a list": ("x.pkl", lambda: b"\x80\x04](" + b")" * 2**21 + b"e."),
    "many dicts": ("x.pkl", lambda: b"\x80\x04](" + b"}" * 2**20 + b"e."),
}


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """Half of them crafted ones in a drawn order, the others mutants of whole files."""
    crafted = list(CRAFTED)
    draw.shuffle(crafted)
    wholes = [("x.pkl", whole_pickle()), ("x.pkl", whole_records()), ("x.pt", whole_torch())]
    for number, name in enumerate(itertools.islice(itertools.cycle(crafted), count)):
        if number % 2 and number < 2 * len(crafted):
            suffix, raw = wholes[number % len(wholes)]
            what, raw = f"mutant {number} of {suffix}", mutant(draw, raw)
        else:
            suffix, make = CRAFTED[name]
            what, raw = name, make()
        with scratch() as folder:
            (folder / suffix).write_bytes(raw)
            yield Trial(what, opening(folder / suffix))


BATTERY = Battery(
    "hostile-pickles",
    "no code runs, at most twice the file's size of memory and the fixed room, refused by name",
    ci=240,
    deep=2_000,
    trials=trials,
)
