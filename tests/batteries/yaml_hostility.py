"""Pipeline files that are broken, huge or made to hang whoever reads them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from battery import Battery, Trial
from commands import finish
from hostile_pickles import mutant
from plugin_run import scratch

from forge_kernel.errors import ForgeError
from forge_kernel.planning.pipeline_file import load_pipeline, shipped_pipelines

BROKEN: Final = Path(__file__).parent.parent / "kernel" / "broken"
WHOLE: Final = "forge: 1\nrun: {max_steps: 2}\ndata: {use: modular_arithmetic}\nmodel: {use: mlp}\n"
CRAFTED: Final[dict[str, Callable[[], bytes]]] = {
    "aliases that double": lambda: (
        b"a: &a [x]\n"
        + b"".join(
            b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in range(98, 118)
        )
    ),
    "aliases in a key": lambda: b"&a x: 1\n*a : 2\n",
    "lists in lists": lambda: b"a: " + b"[" * 100_000,
    "mappings in mappings": lambda: b"{a: " * 50_000,
    "steps in steps": lambda: b"\n".join(b" " * n + b"a:" for n in range(5000)),
    "dashes": lambda: b"a: " + b"- " * 100_000,
    "quotes": lambda: b'a: "' + b"\\" * 500_000,
    "escapes": lambda: b'a: "\\UFFFFFFFF\\xZZ"',
    "a megabyte of blanks": lambda: b" " * (2**20 - 1),
    "more than a megabyte": lambda: b"#" * (2**20 + 5),
    "many keys": lambda: b"".join(b"k%d: 1\n" % n for n in range(60_000)),
    "many entries": lambda: b"a: [" + b"1," * 400_000 + b"]",
    "a long key": lambda: b"a" * 900_000 + b": 1\n",
    "a long plain text": lambda: b"name: " + b"word " * 180_000,
    "one key again and again": lambda: b"a: 1\n" * 50_000,
    "tags": lambda: b"a: " + b"!a" * 100_000,
    "a tag of Python": lambda: b"a: !!python/object/apply:os.system [touch ran]\n",
    "a tag directive": lambda: (
        b"%TAG ! tag:yaml.org,2002:python/\n---\na: !object/apply:os.system []\n"
    ),
    "merge keys": lambda: b"a: &a {b: 1}\nc: {<<: *a, <<: [*a, *a]}\n",
    "bad UTF-8": lambda: b"forge: 1\nrun: \xff\xfe\n",
    "UTF-16": lambda: "forge: 1\n".encode("utf-16"),
    "UTF-32": lambda: "forge: 1\n".encode("utf-32"),
    "NUL": lambda: b"forge: 1\x00\n",
    "signs of control": lambda: bytes(range(1, 32)) * 100,
    "a mark of order": lambda: b"\xef\xbb\xbf" * 3 + WHOLE.encode(),
    "halves of characters": lambda: b"a: \xed\xa0\x80\n",
    "a huge whole number": lambda: b"forge: 1\nrun: {seed: " + b"9" * 100_000 + b"}\n",
    "a huge hexadecimal number": lambda: b"a: 0x" + b"f" * 500_000,
    "a huge exponent": lambda: b"a: 1e" + b"9" * 100_000,
    "a number of many points": lambda: b"a: " + b"1." * 200_000,
    "sexagesimal": lambda: b"a: 1:" + b"59:" * 100_000,
    "1e999": lambda: WHOLE.replace("2", "1e999").encode(),
    "no": lambda: WHOLE.replace("2", "no").encode(),
    "1e-3": lambda: WHOLE.replace("2", "1e-3").encode(),
    "NaN": lambda: WHOLE.replace("2", ".nan").encode(),
    "two documents": lambda: WHOLE.encode() * 2 + b"---\n" * 1000,
    "many documents": lambda: b"--- a\n" * 100_000,
    "directives": lambda: b"%YAML 99999999999999999999.1\n---\na: 1\n",
    "a block text": lambda: b"a: |999999999\n  b\n",
    "anchors": lambda: b"".join(b"k%d: &a%d x\n" % (n, n) for n in range(9_000)),
    "a complex key": lambda: b"? [a, {b: c}]\n: 1\n" * 1000,
    "flow in flow": lambda: b"[{" * 40_000,
    "comments": lambda: b"a: 1 # x\n#" * 90_000,
    "tabs": lambda: b"a:\n\t- b\n",
    "carriage returns": lambda: b"a: 1\r" * 100_000,
    "line ends of old": lambda: "a: 1\u2028\u0085b: 2".encode(),
    "an override of itself": lambda: b"extends: p.yaml\n",
    "a device below": lambda: b"extends: /dev/zero\n",
    "a folder below": lambda: b"extends: .\n",
    "nothing": bytes,
}


def judged(file: Path, said: Path) -> tuple[str, dict[str, float]]:
    def work() -> None:
        try:
            load_pipeline(file)
        except ForgeError as error:
            print(f"refused: {error}"[:2000])
        if (file.parent / "ran").exists():
            raise AssertionError("code ran")

    done = finish(work, said, limit=30.0)
    wrong = done.wrong or (f"exit status {done.status}" if done.status else "")
    return wrong, {"CPU seconds": done.cpu, "megabytes": done.megabytes}


def trials(draw: random.Random, count: int) -> Iterator[Trial]:
    """The crafted ones and those of the tests in a drawn order, then mutants of shipped ones."""
    files = dict(CRAFTED)
    files |= {path.stem: path.read_bytes for path in sorted(BROKEN.glob("*.yaml"))}
    names = list(files)
    draw.shuffle(names)
    wholes = {name: path.read_bytes() for name, path in sorted(shipped_pipelines().items())}
    load_pipeline("smoke")  # imported before the children are forked
    mutants = (
        (f"mutant {number} of {name}", mutant(draw, wholes[name]))
        for number, name in enumerate(itertools.cycle(wholes))
    )
    chosen = itertools.chain(((name, files[name]()) for name in names), mutants)
    for name, raw in itertools.islice(chosen, count):
        with scratch() as folder:
            (folder / "p.yaml").write_bytes(raw)
            wrong, figures = judged(folder / "p.yaml", folder / "said")
            yield Trial(name, wrong, figures)


BATTERY = Battery(
    "yaml-hostility",
    "read or refused, without a traceback, a crash or a hang",
    ci=340,
    deep=50_000,
    trials=trials,
)
