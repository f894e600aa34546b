"""The corpus of broken pipelines: each is refused, with all its faults, each at its place.

A file in `broken/` begins with what is expected of it, written by hand:

    # fault LINE:COLUMN piece of the message            (0:0: the file as a whole)
    # fault parts/other.yaml LINE:COLUMN piece           (the fault is in a file it builds on)
    #   suggest NAME                                      what is offered first
    #   hint TEXT                                         a piece of one of its hints
    # plugin NAME                                         a plugin of this module that it names

The first part of its name is its class. Files that an editor could not show or that are huge are
made by `MADE` below.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from forge_kernel.api import Kind, PluginInfo, hookimpl
from forge_kernel.errors import ConfigError, Fault, FaultsError, PlanError, PluginError
from forge_kernel.planning.catalog import Catalog
from forge_kernel.planning.pipeline_file import check_document, load_pipeline, read_document
from forge_kernel.planning.plan import plan

BROKEN = Path(__file__).parent / "broken"
BASE = """forge: 1
run: {max_steps: 10}
data: {use: modular_arithmetic}
model: {use: mlp}
optimizer: {use: adamw}
loss: {use: cross_entropy}
"""


@dataclass(frozen=True)
class Expected:
    """One fault as the author of the file wants it told."""

    line: int
    column: int
    message: str
    file: str = ""  # where the file that holds the fault ends; empty: the file itself
    suggest: str = ""
    hints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """A broken file and what is expected of it."""

    name: str
    raw: bytes
    faults: tuple[Expected, ...]
    plugins: tuple[str, ...] = ()
    file: Path | None = None  # None: the test writes it

    @property
    def fault_class(self) -> str:
        return self.name.partition("__")[0]


def _parse_header(lines: Sequence[str]) -> tuple[tuple[Expected, ...], tuple[str, ...], int]:
    """The faults, the plugins, and how many lines they took."""
    faults: list[Expected] = []
    plugins: list[str] = []
    for number, line in enumerate(lines):
        head = re.fullmatch(r"# fault (?:(\S+\.yaml) )?(\d+):(\d+) (.+)", line)
        more = re.fullmatch(r"#   (suggest|hint) (.+)", line)
        if head:
            faults.append(Expected(int(head[2]), int(head[3]), head[4], head[1] or ""))
        elif more:
            last = faults.pop()
            suggest = more[2] if more[1] == "suggest" else last.suggest
            hints = (*last.hints, more[2]) if more[1] == "hint" else last.hints
            faults.append(Expected(last.line, last.column, last.message, last.file, suggest, hints))
        elif line.startswith("# plugin "):
            plugins.append(line.removeprefix("# plugin "))
        else:
            return tuple(faults), tuple(plugins), number
    return tuple(faults), tuple(plugins), len(lines)


def _lying_cases() -> Iterator[Case]:
    for file in sorted(BROKEN.glob("*.yaml")):
        raw = file.read_bytes()
        faults, plugins, _ = _parse_header(raw.decode("utf-8").splitlines())
        yield Case(file.stem, raw, faults, plugins, file)


def _made(name: str, raw: bytes | str, *faults: Expected) -> Case:
    return Case(name, raw.encode() if isinstance(raw, str) else raw, faults)


def _nested(depth: int) -> str:
    """`x-deep` with a list in a list in a list."""
    return BASE + "x-deep: " + "[" * depth + "]" * depth + "\n"


def _blocks(depth: int) -> str:
    """`x-deep` with a mapping in a mapping, each in a line of its own."""
    return BASE + "x-deep:\n" + "".join(f"{' ' * level}a:\n" for level in range(1, depth + 1))


NOT_UTF8 = "is not UTF-8"
NOT_YAML = "is not allowed in YAML"
MADE = (
    # Bytes. BASE has six lines, so what follows it stands in line 7.
    _made(
        "bytes__latin_1",
        BASE.encode() + "x-note: café\n".encode("latin-1"),
        Expected(7, 12, "byte 0xe9 is not UTF-8", hints=("save the file as UTF-8",)),
    ),
    _made(
        "bytes__columns_are_code_points",
        BASE.encode() + "x-note: 𝔘müß ".encode() + b"\xe9\n",
        Expected(7, 14, "byte 0xe9 is not UTF-8"),
    ),
    _made("bytes__cut_in_a_character", BASE.encode() + b"x-note: \xe2\x82", Expected(7, 9, "0xe2")),
    _made("bytes__overlong", BASE.encode() + b"x: \xc0\x80\n", Expected(7, 4, "byte 0xc0")),
    _made("bytes__surrogate", BASE.encode() + b"x: \xed\xa0\x80\n", Expected(7, 4, "byte 0xed")),
    _made("bytes__utf_16", BASE.encode("utf-16-le"), Expected(1, 2, "U+0000")),
    _made("bytes__utf_16_with_mark", BASE.encode("utf-16"), Expected(1, 1, NOT_UTF8)),
    _made("bytes__utf_32", BASE.encode("utf-32"), Expected(1, 1, NOT_UTF8)),
    _made(
        "bytes__mark_and_garbage",
        b"\xef\xbb\xbf\xff\xfe\x00",
        Expected(1, 1, "byte 0xff is not UTF-8"),
    ),
    _made(
        "bytes__mark_and_later_garbage",
        b"\xef\xbb\xbf" + BASE.encode() + b"x-note: \xf5\n",
        Expected(7, 9, "byte 0xf5 is not UTF-8"),
    ),
    _made(
        "bytes__mark_and_misspelling",
        b"\xef\xbb\xbf" + BASE.replace("forge", "forg").encode(),
        Expected(1, 1, "the key 'forg' is not known here", suggest="forge"),
    ),
    _made("bytes__compressed", gzip.compress(BASE.encode(), mtime=0), Expected(1, 2, "byte 0x8b")),
    _made("bytes__zeros", BASE.encode() + b"x-note: a\0b\n", Expected(7, 10, f"U+0000 {NOT_YAML}")),
    _made("bytes__bell", BASE + "x-note: a\x07b\n", Expected(7, 10, f"U+0007 {NOT_YAML}")),
    _made("bytes__escape", BASE + "x-note: \x1b[31mred\n", Expected(7, 9, f"U+001B {NOT_YAML}")),
    _made("bytes__delete", BASE + "x-note: \x7f\n", Expected(7, 9, f"U+007F {NOT_YAML}")),
    _made("bytes__form_feed", BASE + "\x0cx-note: a\n", Expected(7, 1, f"U+000C {NOT_YAML}")),
    _made("bytes__c1_control", BASE + "x-note: \x9b1m\n", Expected(7, 9, f"U+009B {NOT_YAML}")),
    _made(
        "bytes__key_that_a_terminal_obeys",
        BASE + '"\\e[2J": 1\n',
        Expected(7, 1, r"the key '\x1b[2J' is not known here"),
    ),
    _made(
        "bytes__mark_in_the_middle",
        BASE + "\ufeffobservers: []\n",
        Expected(7, 1, r"the key '\ufeffobservers' is not known here", suggest="observers"),
    ),
    _made(
        "bytes__old_mac_line_ends",
        BASE.replace("\n", "\r") + "observer: []\r",
        Expected(7, 1, "the key 'observer' is not known here", suggest="observers"),
    ),
    _made(
        "bytes__windows_line_ends",
        (BASE + "observer: []\n").replace("\n", "\r\n"),
        Expected(7, 1, "the key 'observer' is not known here", suggest="observers"),
    ),
    # Limits. The mapping at the top is the first level, so the 64th bracket is the 65th level.
    _made(
        "limits__one_level_too_deep",
        _nested(64),
        Expected(7, len("x-deep: ") + 64, "nested deeper than 64 levels"),
    ),
    _made(
        "limits__three_thousand_brackets",
        _nested(3000),
        Expected(7, len("x-deep: ") + 64, "nested deeper than 64 levels"),
    ),
    _made(
        "limits__half_a_million_brackets",
        BASE + "x-deep: " + "[" * 500_000,
        Expected(7, len("x-deep: ") + 64, "nested deeper than 64 levels"),
    ),
    _made(
        "limits__blocks_in_blocks",
        _blocks(100),
        # level 1: the top; level 2 begins with the `a` of line 8, column 2
        Expected(8 + 63, 1 + 64, "nested deeper than 64 levels"),
    ),
    _made(
        "limits__dashes_in_one_line",
        BASE + "x-deep:\n  " + "- " * 70 + "a\n",
        Expected(8, 3 + 2 * 63, "nested deeper than 64 levels"),
    ),
    _made(
        "limits__question_marks",
        "? " * 500 + "a\n",
        Expected(1, 3, "a key must be a plain word"),
    ),
    _made(
        # 1 for the top, 2 for forge, 4 for each of the five below it, 2 for x-many and its list
        "limits__too_many_values",
        BASE + "x-many:\n" + "- a\n" * 10_000,
        Expected(7 + 10_001 - 25, 3, "more than 10000 values in one file"),
    ),
    _made(
        "limits__too_many_keys",
        "".join(f"k{number}: v\n" for number in range(6_000)),
        # 1 for the top, then two in each line: the 10,001st is what stands behind k4999
        Expected(5_000, 8, "more than 10000 values in one file"),
    ),
    _made("limits__too_large", BASE + "#" * (1 << 20), Expected(0, 0, "larger than 1048576 bytes")),
    _made(
        "limits__too_large_in_many_lines",
        BASE + "# nothing\n" * 200_000,
        Expected(0, 0, "larger than 1048576 bytes"),
    ),
    _made(
        "limits__long_key",
        BASE + "? " + "k" * 100_000 + "\n: 1\n",
        Expected(7, 3, "the key '" + "k" * 57 + "...' is not known here"),
    ),
    _made(
        "limits__long_value",
        BASE.replace("adamw", "a" * 100_000),
        Expected(5, 18, "aaa... is not known here"),
    ),
    _made(
        "limits__long_number",
        BASE.replace("10", "1" * 100_000),
        Expected(2, 18, "1" * 57 + "... does not fit 64 bits"),
    ),
    _made(
        "limits__long_version",
        "%YAML 1." + "1" * 10_000 + "\n---\n" + BASE,
        Expected(1, 9, "out of range"),
    ),
)
CASES = (*_lying_cases(), *MADE)


@dataclass(frozen=True, kw_only=True)
class NoSettings:
    """None."""


class Pictures:
    """Data without tokens."""

    info = PluginInfo(
        name="pictures",
        kind=Kind.DATA,
        config=NoSettings,
        provides=("data:pictures", "data:classes"),
    )

    def __init__(self, config: NoSettings) -> None:
        self.config = config

    @hookimpl
    def make_data(self, run: Any) -> Any:
        raise AssertionError("nothing is built here")


class Sounds(Pictures):
    """Data without classes."""

    info = PluginInfo(name="sounds", kind=Kind.DATA, config=NoSettings, provides=("data:tokens",))


@dataclass(frozen=True, kw_only=True)
class OneSetting:
    """One that has no default."""

    size: int


class Sized(Pictures):
    """Data that must be told their size."""

    info = PluginInfo(name="sized", kind=Kind.DATA, config=OneSetting, provides=("data:classes",))


@cache
def first_party() -> Catalog:
    """Our own plugins and those of this module; what else is installed changes no suggestion."""
    catalog = Catalog(
        offer for offer in Catalog.installed().offers() if offer.distribution == "forge-kernel"
    )
    catalog.add(Pictures)
    catalog.add(Sounds)
    catalog.add(Sized)
    return catalog


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for case in MADE:
        (folder / f"{case.name}.yaml").write_bytes(case.raw)
    return folder


@pytest.fixture
def file(case: Case, made: Path) -> Path:
    return case.file or made / f"{case.name}.yaml"


@cache
def refusal(file: Path) -> FaultsError:
    """The error with which a pipeline is refused, before anything is built."""
    with pytest.raises(FaultsError) as caught:
        decide(file)
    return caught.value


def decide(file: Path) -> None:
    document = read_document(str(file))
    plan(check_document(document, first_party()), first_party(), document=document)


def place(fault: Fault) -> tuple[str, int, int]:
    assert fault.mark is not None, fault
    return Path(fault.mark.source).name, fault.mark.line, fault.mark.column


def first_suggestion(fault: Fault) -> str:
    for hint in fault.hints:
        found = re.match(r"did you mean '([^']+)'", hint)
        if found:
            return found[1]
    return ""


def missing(expected: Expected, fault: Fault) -> list[str]:
    """What the author expects of a fault and it does not say."""
    found = []
    if expected.message not in fault.message:
        found.append(f"message {expected.message!r}")
    if expected.suggest and first_suggestion(fault) != expected.suggest:
        found.append(f"suggestion {expected.suggest!r}")
    found += [
        f"hint {hint!r}" for hint in expected.hints if not any(hint in h for h in fault.hints)
    ]
    return found


def test_a_broken_pipeline_is_refused_with_all_its_faults_at_their_places(
    case: Case, file: Path
) -> None:
    error = refusal(file)
    wanted = [(Path(e.file or file).name, e.line, e.column) for e in case.faults]
    assert sorted(place(fault) for fault in error.faults) == sorted(wanted)


def test_each_fault_says_what_is_wrong_and_suggests_the_nearest_name_first(
    case: Case, file: Path
) -> None:
    left = list(refusal(file).faults)
    for expected in case.faults:
        where = (Path(expected.file or file).name, expected.line, expected.column)
        here = [fault for fault in left if place(fault) == where]
        said = [fault for fault in here if not missing(expected, fault)]
        assert said, f"{where}: {[missing(expected, fault) for fault in here]} of {here}"
        left.remove(said[0])


def test_the_frame_shows_the_line_with_carets_under_the_place(case: Case, file: Path) -> None:
    error = refusal(file)
    for fault in error.faults:
        assert fault.mark is not None
        if not fault.mark.line:
            assert not fault.mark.frame()
            continue
        source = Path(fault.mark.source).read_bytes().removeprefix(b"\xef\xbb\xbf")
        text = source.decode("utf-8", errors="replace")
        line = re.split("\r\n|\n|\r", text)[fault.mark.line - 1]
        shown, carets = fault.mark.frame()
        assert "\n".join((shown, carets)) in str(error)
        assert shown.startswith(f"    {fault.mark.line} | ")
        assert re.fullmatch(r" +\| *\^+", carets)
        below = shown[carets.index("^") : len(carets)]
        marked = line[fault.mark.column - 1 :]
        assert bool(below) == bool(marked)
        for sign, original in zip(below, marked, strict=False):
            visible = original if original.isprintable() else "\ufffd"  # sign by sign
            assert sign == (" " if original == "\t" else visible)


def test_the_library_refuses_it_with_an_error_of_its_family(
    case: Case, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    with pytest.raises((ConfigError, PlanError, PluginError)) as caught:
        plan(load_pipeline(file, catalog=first_party()), first_party())
    assert caught.value.exit_status == 2
    assert len(caught.value.faults) == len(case.faults)
    assert not list(cwd.iterdir()), "something was written"


def test_messages_hold_nothing_that_a_terminal_obeys(file: Path) -> None:
    text = str(refusal(file)).replace("\n", "")
    assert text.isprintable(), sorted({sign for sign in text if not sign.isprintable()})


def test_the_corpus_covers_every_class_of_faults() -> None:
    classes = Counter(case.fault_class for case in CASES)
    lying = Counter(case.fault_class for case in CASES if case.file is not None)
    assert lying.total() >= 130
    assert set(classes) == {
        "misspelt_key", "misspelt_name", "wrong_type", "out_of_range", "duplicate_key",
        "unknown_plugin", "unmet", "counts", "alias", "limits", "bytes", "missing_file", "syntax",
        "yaml11", "contradiction", "numbers", "several",
    }  # fmt: skip
    assert min(classes.values()) >= 8, classes


def test_every_file_says_what_is_expected_of_it() -> None:
    silent = [case.name for case in CASES if not case.faults]
    assert silent == []
    unread = []
    for case in CASES:
        lines = case.raw.decode("utf-8").splitlines() if case.file is not None else []
        *_, read = _parse_header(lines)
        unread += [
            (case.name, line) for line in lines[read:] if re.match("# (fault|plugin|  )", line)
        ]
    assert unread == []


def test_a_file_that_is_not_there_is_a_fault_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "folder.yaml").mkdir()
    said = {
        "gone.yaml": "there is no such file",
        "loop.yaml": "cannot be read",
        "folder.yaml": "is a folder",
        "a" * 300 + ".yaml": "cannot be read",
        "nul\0.yaml": "there is no file",
    }
    for name, message in said.items():
        with pytest.raises(ConfigError, match=message):
            read_document(str(tmp_path / name))


SCRIPT = """
import contextlib, io, json, sys
from forge_kernel.cli import main
answers = {}
for name in sys.argv[1:]:
    sys.argv = ["forge", "check", "--json", name]
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            status = left.code
    answers[name] = {"status": status, "out": out.getvalue(), "err": err.getvalue()}
answers["torch"] = "torch" in sys.modules
print(json.dumps(answers))
"""


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.deep)])
def test_the_command_line_refuses_them_all_with_status_2(
    step: int, made: Path, tmp_path: Path
) -> None:
    """Each fifth of them before each merge: what is refused is tested for all of them above."""
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    files = {str(case.file or made / f"{case.name}.yaml"): case for case in CASES[::step]}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *files],
        capture_output=True, text=True, cwd=cwd, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    answers: dict[str, Any] = json.loads(done.stdout)
    assert answers.pop("torch") is False
    assert not list(cwd.iterdir()), "something was written"
    for name, answer in answers.items():
        case = files[name]
        assert answer["status"] == 2, (case.name, answer)
        assert "Traceback" not in answer["err"], case.name
        if not case.plugins:  # the plugins of this module are not installed
            told = json.loads(answer["out"])["faults"]
            places = sorted((fault["line"], fault["column"]) for fault in told)
            assert places == sorted((e.line, e.column) for e in case.faults), case.name
