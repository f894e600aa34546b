"""Strict YAML: what a scalar means, what is refused, where each key and value stands."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_kernel.config.document import walk
from forge_kernel.config.yaml_file import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_NODES,
    parse_yaml,
    read_yaml,
    resolve,
    write_yaml,
)
from forge_kernel.errors import ConfigError

QUICK = settings(deadline=None, max_examples=150)

SAFE_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | SAFE_TEXT
    | st.text("0123456789+-._eExo:~ \t\n'\"#&*!|>%@`,[]{}?yYnNtrufalsn", max_size=12)
)
KEYS = SAFE_TEXT.filter(lambda key: key != "<<")
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=15,
)


def value(text: str) -> Any:
    """What a value in a file means."""
    return parse_yaml(f"value: {text}\n", "test").data["value"]


def faults(text: str) -> list[tuple[int, int, str]]:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "test")
    return [
        (fault.mark.line, fault.mark.column, fault.message)
        for fault in caught.value.faults
        if fault.mark is not None
    ]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-3", 0.001),
        ("1E5", 100000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("+.5e+1", 5.0),
        ("-0.0", 0.0),
        ("5e-324", 5e-324),
        ("0e999", 0.0),
        ("12", 12),
        ("-12", -12),
        ("+12", 12),
        ("0123", 123),
        ("0o17", 15),
        ("0x1F", 31),
        ("9223372036854775807", 2**63 - 1),
        ("-9223372036854775808", -(2**63)),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_a_plain_word_means_what_the_core_schema_of_yaml_1_2_says(text: str, meant: Any) -> None:
    found = value(text)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    "text",
    ["yes", "no", "on", "off", "Y", "n", "1_000", "1:30", "0b101", "1,000", "2024-01-31", "nan",
     "inf", "None", "tRue", "1e", "e5", "0x", "0o8", "--1", "1.2.3", ".", "=", "cuda:0"],
)  # fmt: skip
def test_everything_else_is_text(text: str) -> None:
    assert value(text) == text


@pytest.mark.parametrize("text", ["1", "true", "null", "1e-3", ".nan", "~"])
def test_what_is_quoted_is_text(text: str) -> None:
    assert value(f"'{text}'") == text
    assert value(f'"{text}"') == text


@pytest.mark.parametrize("text", [".nan", ".NaN", ".inf", "-.inf", "+.INF", "1e999", "-1e999"])
def test_a_number_that_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"finite|too large"):
        resolve(text)


@pytest.mark.parametrize("digits", [19, 20, 30, 40, 41, 300, 5000])
def test_a_whole_number_beyond_64_bits_is_refused_however_long(digits: int) -> None:
    with pytest.raises(ValueError, match="does not fit 64 bits") as caught:
        resolve("9" * digits + "9")
    assert len(str(caught.value)) < 100


def test_a_number_that_would_be_rounded_to_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="too small"):
        resolve("1e-400")


def test_an_empty_text_is_an_empty_mapping() -> None:
    for text in ("", "\n\n", "# only a comment\n", "---\n", "~\n"):
        assert parse_yaml(text, "test").data == {}


def test_keys_and_values_keep_their_places_in_code_points() -> None:
    document = parse_yaml('größe: {"𝔘": 1, b: [x, yy]}\nc:\n  - d: "e f"\n', "test")
    places = {path: (mark.line, mark.column) for path, mark in document.values.items()}
    assert places == {
        (): (1, 1),
        ("größe",): (1, 8),
        ("größe", "𝔘"): (1, 14),
        ("größe", "b"): (1, 20),
        ("größe", "b", 0): (1, 21),
        ("größe", "b", 1): (1, 24),
        ("c",): (3, 3),
        ("c", 0): (3, 5),
        ("c", 0, "d"): (3, 8),
    }
    keys = {path: (mark.line, mark.column, mark.length) for path, mark in document.keys.items()}
    assert keys[("größe",)] == (1, 1, 5)
    assert keys[("größe", "𝔘")] == (1, 9, 3)
    assert keys[("c", 0, "d")] == (3, 5, 1)


def test_a_duplicate_key_is_refused_at_its_second_place() -> None:
    assert faults("a: 1\nb: 2\na: 3\n") == [
        (3, 1, "the key 'a' stands here twice (first in line 1)")
    ]


def test_a_duplicate_key_inside_a_part_that_is_refused_is_told_with_its_whole_path() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml("run: {a: 1}\nrun: {b: 1, b: 2}\n", "test")
    assert [fault.path for fault in caught.value.faults] == ["run", "run.b"]


def test_the_same_key_in_two_mappings_is_no_duplicate() -> None:
    data = parse_yaml("a: {x: 1}\nb: {x: 2}\nc: [{x: 3}, {x: 4}]\n", "test").data
    assert data == {"a": {"x": 1}, "b": {"x": 2}, "c": [{"x": 3}, {"x": 4}]}


def test_an_alias_of_a_scalar_is_its_value() -> None:
    data = parse_yaml("a: &rate 1e-3\nb: *rate\nc: [*rate, *rate]\n&key d: *key\n", "test").data
    assert data == {"a": 1e-3, "b": 1e-3, "c": [1e-3, 1e-3], "d": "d"}


def test_an_anchor_means_the_last_part_that_was_given_it() -> None:
    assert parse_yaml("a: &x 1\nb: &x 2\nc: *x\n", "test").data["c"] == 2
    assert faults("a: &x 1\nb: &x [2]\nc: *x\n")[0][:2] == (3, 4)


def test_an_alias_of_a_part_and_one_of_nothing_are_told_apart() -> None:
    told = faults("a: &x [1]\nb: *x\nc: *y\n")
    assert "repeats a mapping or list" in told[0][2]
    assert told[1] == (3, 4, "there is no anchor &y above this alias")


def test_depth_is_bounded_exactly() -> None:
    inside = MAX_DEPTH - 1  # the mapping at the top is a level too
    assert parse_yaml("a: " + "[" * inside + "]" * inside, "test").data
    deeper = "a: " + "[" * (inside + 1) + "]" * (inside + 1)
    assert faults(deeper) == [(1, 3 + MAX_DEPTH, f"nested deeper than {MAX_DEPTH} levels")]


def test_the_number_of_values_is_bounded_exactly() -> None:
    room = MAX_NODES - 3  # the mapping, the key and the list
    assert len(parse_yaml("a:\n" + "- b\n" * room, "test").data["a"]) == room
    assert faults("a:\n" + "- b\n" * (room + 1))[0][0] == room + 2


def test_the_size_is_bounded_exactly(tmp_path: Path) -> None:
    file = tmp_path / "large.yaml"
    file.write_bytes(b"a: 1\n" + b"#" * (MAX_BYTES - 5))
    assert read_yaml(file).data == {"a": 1}
    file.write_bytes(b"a: 1\n" + b"#" * (MAX_BYTES - 4))
    with pytest.raises(ConfigError, match="larger than"):
        read_yaml(file)


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "marked.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    document = read_yaml(file)
    assert document.data == {"a": 1}
    assert document.keys["a",].column == 1


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_of_all_systems_count_alike(line_end: str) -> None:
    document = parse_yaml(line_end.join(["a: 1", "# b", "c: 2", ""]), "test")
    assert (document.keys["c",].line, document.keys["c",].text) == (3, "c: 2")


def test_all_faults_of_structure_are_told_at_once() -> None:
    text = "a: 1\na: 2\nb: !!int 3\nc: *d\ne: .inf\n<<: {f: 1}\n"
    assert [(line, column) for line, column, _ in faults(text)] == [
        (2, 1), (3, 4), (4, 4), (5, 4), (6, 1),
    ]  # fmt: skip


def test_an_unclosed_part_is_told_where_it_begins() -> None:
    assert faults("a: 1\nb: [1, 2\n")[0][:2] == (2, 4)
    assert faults("a: 1\nb: [\n")[0][:2] == (2, 4)
    assert faults("a: 1\nb: {c: {d: 1}\n")[0][:2] == (2, 4)
    assert faults("a: 'b\nc: 1\n")[0][:2] == (1, 4)


def test_half_of_a_character_is_refused_in_keys_and_values() -> None:
    assert [fault[:2] for fault in faults('a: "\\ud800"\n"\\udfff": 1\n')] == [(1, 4), (2, 1)]
    with pytest.raises(ConfigError, match="U\\+D800"):
        parse_yaml("a: \ud800\n", "test")


@QUICK
@given(st.dictionaries(KEYS, TREES, max_size=5))
def test_what_is_written_is_read_back_equal(data: dict[str, Any]) -> None:
    text = write_yaml(data)
    found = parse_yaml(text, "test").data
    assert found == data
    types = [(path, type(inner)) for path, inner in walk(found)]
    assert types == [(path, type(inner)) for path, inner in walk(data)]


def test_a_part_that_stands_in_two_places_is_written_twice() -> None:
    part = {"x": [1, 2]}
    data = {"a": part, "b": part, "c": [part["x"], part["x"]]}
    assert parse_yaml(write_yaml(data), "test").data == data


FRAGMENTS = [
    *"[]{}:,-?&*!|>'\"%@`#\\ \t\n\r~.0aé𝔘\0\x07\x1b\x7f\x85\u2028\ufeff",
    "\n  ", "\n- ", ": ", "<<: ", "&a ", "*a", "!!int ", "---\n", "...\n", "%YAML 1.1\n", "\\u",
    '"\\U00110000"', '"\\x', "1e999", "key", "? ", "|2\n", ">-\n",
]  # fmt: skip


@settings(deadline=None, max_examples=400)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join))
def test_no_text_is_answered_with_anything_but_a_document_or_a_config_error(text: str) -> None:
    lines = text.replace("\r\n", "\n").replace("\r", "\n").replace("\x85", "\n")
    count = len(lines.replace("\u2028", "\n").split("\n"))
    try:
        document = parse_yaml(text, "test")
    except ConfigError as error:
        for fault in error.faults:
            assert fault.mark is not None
            assert 1 <= fault.mark.line <= count
            assert fault.mark.column >= 1
            assert str(fault).replace("\n", "").isprintable()
    else:
        assert isinstance(document.data, dict)
        assert all(path in document.values for path, _ in walk(document.data) if path)


@QUICK
@given(st.binary(max_size=60))
def test_no_bytes_are_answered_with_anything_but_a_document_or_a_config_error(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    file = tmp_path_factory.getbasetemp() / "bytes.yaml"
    file.write_bytes(b"a: " + raw)
    try:
        document = read_yaml(file)
    except ConfigError:
        return
    assert isinstance(document.data, dict)


@QUICK
@given(st.text(string.printable, max_size=12))
def test_a_plain_scalar_is_never_a_number_that_python_reads_otherwise(text: str) -> None:
    try:
        found = resolve(text)
    except ValueError:
        return
    if isinstance(found, float):
        assert found == float(text)
    elif isinstance(found, int) and not isinstance(found, bool) and text[:2] not in ("0o", "0x"):
        assert found == int(text)


def test_a_path_with_bytes_that_are_no_text_is_written_all_the_same() -> None:
    """libyaml refuses what UTF-8 does not hold. Planted: no second writer."""
    assert write_yaml({"path": "x\udc80", "other": ["é"]}) == 'path: "x\\uDC80"\nother:\n- é\n'
