"""`forge pot10`: planted breaches are found where they stand, and our own code has none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from forge_plugins.power_of_ten.checks import check_all
from forge_plugins.power_of_ten.source import read_module

ROOT = Path(__file__).parents[2]
LONG = "\n".join(f"    x += {number}" for number in range(60))

PLANTED = {
    "direct recursion": (1, 1, "def f(n):\n    return f(n - 1)\n"),
    "mutual recursion": (1, 1, "def a(n):\n    return b(n)\ndef b(n):\n    return a(n)\n"),
    "recursion of a method": (1, 2, "class A:\n    def f(self):\n        return self.f()\n"),
    "recursion of an inner function": (1, 2, "def f():\n    def g(n):\n        return g(n)\n    return g\n"),
    "while true": (2, 2, "def f():\n    while True:\n        pass\n"),
    "while one": (2, 1, "while 1:\n    print()\n"),
    "an endless iterator": (2, 3, "from itertools import count\ndef f():\n    for i in count():\n        print(i)\n"),
    "a condition that stays": (2, 2, "def f(n):\n    while n:\n        print('x')\n"),
    "61 lines": (4, 1, f"def _f(x):\n{LONG}\n"),
    "too deep": (4, 1, "def f(a):\n if a:\n  for b in a:\n   if b:\n    with b:\n     if a:\n      pass\n"),
    "a long public function without a check": (5, 1, f"def f(x):\n{LONG[: LONG.index('50')].rsplit(chr(10), 1)[0]}\n"),
    "global": (6, 3, "N = 1\ndef f():\n    global N\n    N = 2\n"),
    "module state": (6, 1, "cache = {}\n"),
    "module state made by a call": (6, 1, "seen: set[int] = set()\n"),
    "a dropped answer": (7, 4, "def ok() -> bool:\n    return True\ndef f():\n    ok()\n"),
    "a swallowed exception": (7, 4, "def f():\n    try:\n        print()\n    except Exception:\n        pass\n"),
    "a bare except": (7, 4, "def f():\n    try:\n        print()\n    except:\n        raise\n"),
    "a lost cause": (7, 5, "def f():\n    try:\n        print()\n    except KeyError as e:\n        raise ValueError('x')\n"),
    "eval": (8, 2, "def f(x):\n    return eval(x)\n"),
    "exec": (8, 1, "exec('1')\n"),
    "a metaclass": (8, 1, "class A(metaclass=type):\n    pass\n"),
    "a patched module": (8, 2, "import os\nos.sep = '/'\n"),
    "a mutable default": (9, 1, "def f(x=[]):\n    return x\n"),
    "a mutable keyword default": (9, 1, "def f(*, x=dict()):\n    return x\n"),
    "an ignored type": (10, 1, "x = 1  # type: ignore\n"),
    "an ignored rule": (10, 1, "x = 1  # noqa\n"),
    "all warnings silenced": (10, 2, "import warnings\nwarnings.simplefilter('ignore')\n"),
}  # fmt: skip

FINE = """
import itertools
import warnings
from typing import Final

LIMIT: Final = {"a": 1}
NAMES = ["constant by its name"]


def walk(tree):
    todo = [tree]
    while todo:
        todo.extend(todo.pop())


def bounded(n):
    while n > 0:
        n -= 1


def ask() -> bool:
    return True


def use():
    if ask():
        for _, name in zip(range(3), itertools.count()):
            print(name)
    _ = ask()


class Other:
    def use(self):
        use()  # the module's function, not this method


def chained():
    try:
        print()
    except KeyError as error:
        raise ValueError("x") from error
    except TypeError:
        raise


def flat(a):
    if a == 1:
        return 1
    elif a == 2:
        return 2
    elif a == 3:
        return 3
    elif a == 4:
        return 4
    elif a == 5:
        return 5


x = 1  # type: ignore[assignment]
y = 2  # noqa: E501
warnings.filterwarnings("ignore", "one message")
"""


@pytest.mark.spec("J6")
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_breach_is_found_in_its_line(name: str, tmp_path: Path) -> None:
    rule, line, text = PLANTED[name]
    file = tmp_path / "planted.py"
    file.write_text(text)
    found = check_all([read_module(file)])
    assert [(each.rule, each.line) for each in found] == [(rule, line)], found


def test_what_is_fine_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "fine.py"
    file.write_text(FINE)
    assert check_all([read_module(file)]) == []


def test_a_ring_over_two_files_is_found(tmp_path: Path) -> None:
    package = tmp_path / "ring"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("from ring.two import b\ndef a():\n    return b()\n")
    (package / "two.py").write_text("from ring import one\ndef b():\n    return one.a()\n")
    found = check_all([read_module(file) for file in sorted(package.glob("*.py"))])
    assert [each.rule for each in found] == [1]
    assert "a -> b" in found[0].message


def pot10(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_kernel", "pot10", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)


WAIVER = '[[waiver]]\nrule = {}\npath = "bad.py"\nfunction = "f"\nreason = "{}"\n'


def test_the_command_counts_waivers_and_tells_idle_ones(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(x=[]):\n    return x\n")
    done = pot10("bad.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "bad.py:1: rule 9 in f" in done.stdout
    (tmp_path / "pot10.toml").write_text(WAIVER.format(9, "shown in a lesson"))
    done = pot10("bad.py", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert (data["findings"], len(data["waivers_used"])) == ([], 1)
    assert "3" in data["not_carried_over"]
    (tmp_path / "pot10.toml").write_text(WAIVER.format(2, "of nothing"))
    done = pot10("bad.py", cwd=tmp_path)
    assert done.returncode == 1
    assert "waiver of nothing" in done.stdout


BREACH = "def f(x=[]):\n    return x\n"
OF = '[[waiver]]\nrule = 9\npath = "{}"\nfunction = "f"\nreason = "shown in a lesson"\n'


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three accepted breaches in two folders."""
    for file in ("one/a.py", "one/b.py", "two/c.py"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(BREACH)
    waivers = "".join(OF.format(file) for file in ("one/a.py", "one/b.py", "c.py"))
    (tmp_path / "pot10.toml").write_text(waivers)
    return tmp_path


@pytest.mark.parametrize("part", ["one", "two", "one/a.py", "two/c.py", ".", "./one"])
def test_waivers_of_files_that_were_not_looked_at_are_not_judged(tree: Path, part: str) -> None:
    """Planted fault: each waiver without a finding counts as one of nothing."""
    done = pot10(part, cwd=tree)
    assert (done.returncode, "waiver of nothing" in done.stdout) == (0, False), done.stdout


def test_a_waiver_holds_from_whichever_folder_its_file_is_seen(tree: Path) -> None:
    assert pot10(".", "--waivers", "../pot10.toml", cwd=tree / "one").returncode == 0


@pytest.mark.parametrize("looked_at", ["one", "."])
def test_a_waiver_of_a_file_that_is_gone_or_mended_is_one_of_nothing(
    tree: Path, looked_at: str
) -> None:
    (tree / "one" / "b.py").write_text("x = 1\n")
    (tree / "two" / "c.py").unlink()
    done = pot10(looked_at, cwd=tree)
    assert done.returncode == 1
    assert "rule 9 in one/b.py f" in done.stdout
    assert "rule 9 in c.py f" in done.stdout
    assert "a.py" not in done.stdout


@pytest.mark.parametrize(
    ("waivers", "message"),
    [
        (WAIVER.format(9, " "), "must say something"),
        (WAIVER.format(3, "x"), "there is no rule 3"),
        ("[[waiver]]\nrule = 9\n", "needs exactly"),
        ("[other]\n", "only [[waiver]]"),
        ("rule =", "no TOML"),
    ],
)
def test_a_wrong_file_of_waivers_is_refused(waivers: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("x = 1\n")
    (tmp_path / "pot10.toml").write_text(waivers)
    done = pot10("bad.py", cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr


def test_what_cannot_be_read_is_told_at_once(tmp_path: Path) -> None:
    assert pot10("nothing", cwd=tmp_path).returncode == 2
    (tmp_path / "one.py").write_text("def (\n")
    (tmp_path / "two.py").write_bytes(b"\xff\xfe\x00")
    done = pot10(".", cwd=tmp_path)
    assert done.returncode == 2
    assert "one.py" in done.stderr
    assert "two.py" in done.stderr


def test_findings_are_written_as_sarif(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("while True:\n    pass\n")
    pot10("bad.py", "--sarif", "found.sarif", cwd=tmp_path)
    data = json.loads((tmp_path / "found.sarif").read_text())
    (result,) = data["runs"][0]["results"]
    assert result["ruleId"] == "POT2"
    place = result["locations"][0]["physicalLocation"]
    assert (place["artifactLocation"]["uri"], place["region"]["startLine"]) == ("bad.py", 1)
    known = {rule["id"] for rule in data["runs"][0]["tool"]["driver"]["rules"]}
    assert result["ruleId"] in known


@pytest.mark.spec("J6")
def test_our_own_code_passes_without_a_waiver_in_the_kernel() -> None:
    done = pot10("forge_kernel", "plugins", "--json", cwd=ROOT)
    data = json.loads(done.stdout)
    assert done.returncode == 0, data["findings"]
    assert data["functions"] > 900
    assert len(data["waivers_used"]) <= 10
    assert not [each for each in data["waivers_used"] if each["path"].startswith("forge_kernel")]
