"""JSON is cut into blocks where records end, whatever the block's size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers import json as json_reader
from forge_plugins.formats.readers import json_text
from forge_plugins.formats.readers.field_values import row_of, rows_of
from forge_plugins.formats.readers.json_text import cut

values = st.recursive(
    st.one_of(st.integers(), st.text(alphabet='a",[]{}\\:é', max_size=6), st.none()),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('a"}\\', max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def walked(text: str) -> tuple[int, bool]:
    """The model of `cut`: one character after the other."""
    depth, inside, escaped, comma = 0, False, False, -1
    for place, sign in enumerate(text):
        if inside:
            inside = escaped or sign != '"'
            escaped = sign == "\\" and not escaped
        elif sign == '"':
            inside = True
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
            if depth < 0:
                return place, True
        elif sign == "," and depth == 0:
            comma = place
    return comma, False


@given(rows=st.lists(values, max_size=5), share=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_a_block_is_cut_where_a_walk_by_character_says(rows: list[Any], share: float) -> None:
    """Planted fault: without the replacement of escapes, a quote in a text was its end."""
    raw = (json.dumps(rows, ensure_ascii=True)[1:] + ", 3]").encode()
    block = raw[: round(share * len(raw))]
    assert cut(block) == walked(block.decode())


@pytest.mark.parametrize("form", ["array", "lines", "columns"])
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(-9, 9), min_size=2, max_size=2), st.floats(-9, 9, width=16)),
        min_size=1,
        max_size=30,
    ),
    size=st.integers(1, 200),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_the_columns_do_not_depend_on_the_blocks(
    form: str, rows: Any, size: int, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path_factory.mktemp("blocks")
    file = folder / "x.json"
    objects = [{"input": left, "target": right} for left, right in rows]
    text = {
        "array": json.dumps(objects),
        "lines": "\n".join(map(json.dumps, objects)) + "\n",
        "columns": json.dumps({"input": [r[0] for r in rows], "target": [r[1] for r in rows]}),
    }[form]
    file.write_text(text)
    monkeypatch.setattr(json_text, "BLOCK", size)
    monkeypatch.setattr("forge_plugins.formats.readers.json.BLOCK", size)
    columns = open_table(file, cache_dir=folder / "cache").columns
    assert columns["input"].tolist() == [row[0] for row in rows]
    assert columns["target"].tolist() == [row[1] for row in rows]


numbers = st.one_of(
    st.integers(-(2**64), 2**64),
    st.floats(allow_nan=False),
    st.none(),
    st.booleans(),
    st.just(2**53),
)


@given(
    rows=st.one_of(
        st.lists(numbers, min_size=1, max_size=4),
        st.lists(st.lists(numbers, min_size=2, max_size=2), min_size=1, max_size=4),
        st.lists(
            st.lists(st.lists(st.integers(0, 3), max_size=2), max_size=2), min_size=1, max_size=3
        ),
    )
)
@settings(max_examples=300, deadline=None)
def test_many_rows_at_once_are_the_rows_one_by_one(rows: list[Any]) -> None:
    found = rows_of(rows)
    if found is None:
        return  # they are looked at one by one
    singles = [row_of(row, 100, lenient=False) for row in rows]
    assert found.shape == (len(rows), *singles[0].shape)
    whole = np.stack(singles)
    assert found.dtype == (np.int64 if whole.dtype == np.int64 else np.float32)
    assert np.array_equal(found, whole.astype(found.dtype))


@pytest.mark.parametrize(
    "bad",
    [
        "[0.5, [0.5]]",
        "[0.5, 1]",
        '[0.5, "1.5"]',
        '[0.5, {"a": 0.5}]',
        "[0.5]",
    ],
)
@pytest.mark.parametrize("key", ["target", "a.b"])
def test_dots_elsewhere_do_not_pass_for_floats(bad: str, key: str, tmp_path: Path) -> None:
    """Planted fault: without the count of the names' dots, `true` was read as 1.0."""
    good = f'{{"input": [0.5, 0.25], "{key}": 1}}'
    text = f'[{good}, {{"input": {bad}, "{key}": 1}}]'
    (tmp_path / "x.json").write_text(text)
    if bad == "[0.5, 1]":
        column = open_table(tmp_path / "x.json", cache_dir=tmp_path / "c").columns["input"]
        assert column.tolist() == [[0.5, 0.25], [0.5, 1.0]]
        return
    with pytest.raises(DataError, match="record 1, field 'input'"):
        open_table(tmp_path / "x.json", cache_dir=tmp_path / "c")


def test_floats_after_integers_make_the_column_floats(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("forge_plugins.formats.readers.json.BLOCK", 64)
    monkeypatch.setattr(json_text, "BLOCK", 64)
    rows = [{"input": [at]} for at in range(50)] + [{"input": [0.5]}, {"input": [7]}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    column = open_table(tmp_path / "x.jsonl", cache_dir=tmp_path / "c").columns["input"]
    assert column.dtype == np.float32
    assert column[:, 0].tolist() == [row["input"][0] for row in rows]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[{"input": [1]}' + ', {"input": [1]}' * 8_000 + ",]", "record 8001.*(trailing comma|comma without)"),
        ('[{"input": [1]}' + ', {"input": [1]}' * 8_000 + "", "record 8000.*|line 1 column"),
        ('{"input": [1' + ",1" * 150_000 + '], "input": [1]}', "'input'.*twice"),
        ('{"input": [1' + ",1" * 150_000 + '] "target": [1]}', "a comma or the object's end"),
        ('{"input": [1' + ",1" * 150_000 + '], "target": 3}', "'target'.*not a list"),
        ('{"input": [1' + ",1" * 150_000 + '], "target": [1]}', "1 records.*150001"),
        ('[{"input": [' + "1," * 190_000 + "1]}]", "more than 262144 bytes of text"),
        ('{"input": [1]}\n{"input": [' + "1," * 190_000 + "1]}\n", "line 2: .*more than"),
        ('[{"input": "' + "x" * 1_100_000 + '"}]', "record 0: a record has more than"),
    ],
    ids=lambda part: part[-30:],  # a text of megabytes would be a name of megabytes
)  # fmt: skip
def test_what_is_wrong_in_a_long_text_is_told(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (json_reader, json_text):  # an eighth of what they are
        monkeypatch.setattr(module, "BLOCK", 2**15)
        monkeypatch.setattr(module, "MAX_RECORD", 2**18)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=f"(?s){told}"):
        open_table(tmp_path / "x.json", cache_dir=tmp_path / "c")
    assert not [path for path in (tmp_path / "c").iterdir() if path.name != "memos"]


PIECES = [
    '{"input": [1, 0], "target": 2}', '{"input": [3, 0], "target": 4},{"input": [5, 0], "target": 6}',
    '{"input": [7', '8], "target": 9}', '{"input": [{}', '{}], "target": 0}', "", "  ", ",",
    '{"in', 'put": [1, 0], "target": 2}', '{"te', '{xt": 1}', "[1]", "7", '{"input": [1, 0], "target": 2},',
]  # fmt: skip


@example(lines=PIECES[1:4], end="\n")
@example(lines=[PIECES[1], PIECES[4], PIECES[5]], end="\n")
@given(
    lines=st.lists(st.sampled_from(PIECES), min_size=1, max_size=5),
    end=st.sampled_from(["", "\n", "\r\n"]),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_lines_that_are_no_objects_by_themselves_are_refused(
    lines: list[str], end: str, tmp_path: Path
) -> None:
    """Planted fault: without the look at the lines' beginnings `[7` and `8]` became `[7,8]`."""
    (tmp_path / "x.jsonl").write_text('{"input": [1, 0], "target": 2}\n' + "\n".join(lines) + end)
    wanted: list[Any] = []
    try:
        wanted = [json.loads(line) for line in lines if line.strip()]
        fine = all(
            isinstance(value, dict) and value.keys() == {"input", "target"} for value in wanted
        )
        fine = fine and all(
            type(value["input"][0]) is int and len(value["input"]) == 2 for value in wanted
        )
    except ValueError:
        fine = False
    if not fine:
        with pytest.raises(DataError):
            open_table(tmp_path / "x.jsonl", cache_dir=tmp_path / "c")
        return
    found = open_table(tmp_path / "x.jsonl", cache_dir=tmp_path / "c").columns
    assert found["target"].tolist() == [2, *(value["target"] for value in wanted)]
    assert found["input"].tolist() == [[1, 0], *(value["input"] for value in wanted)]
