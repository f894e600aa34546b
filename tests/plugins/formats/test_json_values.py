"""What Python, pandas and people write into JSON: fine where nobody reads it, told where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_plugins.formats.errors import DataError
from forge_plugins.formats.format import Reading
from forge_plugins.formats.open_table import open_table
from forge_plugins.formats.readers.field_values import NoNumber
from forge_plugins.formats.readers.json_values import exactly, parsed

Form = Callable[[list[str]], str]
FORMS: dict[str, Form] = {
    "array": lambda rows: f"[{','.join(rows)}]",
    "lines": lambda rows: "\r\n\r\n".join(rows) + "\r\n",
    "columns": lambda rows: columns([json.loads(row) for row in rows]),
}


def columns(rows: list[Any]) -> str:
    return json.dumps({name: [row[name] for row in rows] for name in rows[0]})


def opened(folder: Path, text: str, **chosen: Any) -> Any:
    (folder / "x.json").write_text(text)
    return open_table(folder / "x.json", "auto", Reading(**chosen), cache_dir=folder / "c")


ODD = [
    "NaN",
    "-Infinity",
    "1e400",
    "9" * 5000,
    "[[1], [NaN, 2]]",
    '{"a": [1, {"b": NaN}]}',
    '"NaN, \\"1e400"',
]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:12])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_number_is_of_no_matter_where_nobody_reads(
    form: str, odd: str, tmp_path: Path
) -> None:
    """Planted fault: one NaN in a field that nobody asks for refused the file."""
    if form == "columns" and len(odd) > 4000:
        text = f'{{"a": [{odd}, 1], "input": [[1.5], [2.5]], "target": [0, 1]}}'
    else:
        text = FORMS[form](
            [
                f'{{"a": {odd}, "input": [1.5], "target": 0}}',
                '{"a": 1, "input": [2.5], "target": 1}',
            ]
        )
    table = opened(tmp_path, text)
    assert table.columns["input"].tolist() == [[1.5], [2.5]]
    assert table.columns["target"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("odd", "told"),
    [("NaN", "NaN and Infinity are not JSON"), ("-Infinity", "NaN and Infinity"), ("1e400", "1e400 is beyond")],
)  # fmt: skip
@pytest.mark.parametrize("form", ["array", "lines"])
def test_where_it_is_read_it_is_told_by_record_and_field(
    form: str, odd: str, told: str, tmp_path: Path
) -> None:
    row = '{"a": NaN, "input": [%s, 1.0], "target": 0}'
    text = FORMS[form]([row % "2.0", row % odd])
    with pytest.raises(DataError, match=f"record 1, field 'input': {told}.*quality_threshold"):
        opened(tmp_path, text)
    lenient = opened(tmp_path, text, lenient=True)
    assert np.isnan(lenient.columns["input"][1, 0])


@pytest.mark.parametrize("form", FORMS)
def test_integers_of_any_length_are_what_they_are(form: str, tmp_path: Path) -> None:
    """Planted fault: the fast parser makes floats of integers of 65 bits: two became one."""
    rows = [json.dumps({"a": 2**70, "input": [2**64 + at], "target": 0}) for at in (1, 2)]
    with pytest.raises(DataError, match="record 0, field 'input': an integer does not fit 64 bits"):
        opened(tmp_path, FORMS[form](rows))
    rows = [json.dumps({"a": 2**70, "input": [1e20], "target": 0})]
    assert opened(tmp_path, FORMS[form](rows)).columns["input"].tolist() == [[np.float32(1e20)]]


@pytest.mark.parametrize(
    "text",
    [
        '[{"input": [1.0], "input": [3.0]}]', '[{"input": [1.0], "\\u0069nput": [2.0]}]',
        '{"input": [1.0], "a": 1, "a": 2}\n{"input": [1.0]}', '{"input": [[1.0]], "input": [[2.0]]}',
        '{"input": [[1.0]], "a": {"b": 1, "b": 2}}', '[{"input": [1.0], "a": "b: \\"c\\": d", "a": NaN}]',
    ],
)  # fmt: skip
def test_a_field_that_is_named_twice_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="names the field twice"):
        opened(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        '[{"input": [1.0]},]', '[{"input": [1.0], "a": nan}]', '[{"input": [1.0], "a": "\\ud800"}]',
        '[{"input": [1.0], "a": [1,}]', '{"input": [[1.0]], "a": tru}', '{"input": [[1.0]], "a": }',
        '[{"input": [1.0], "a": NaN}', '{"input": [[1.0]], "a": ' + '{"b": ' * 99 + "1" + "}" * 100,
        '{"input": [1.0], "a": [{}\n{}]}\n{"input": [1.0]},{"input": [1.0]}',
    ],
)  # fmt: skip
def test_what_is_broken_is_refused_wherever_it_stands(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not JSON|nested too deeply"):
        opened(tmp_path, text)


def test_a_text_with_colons_dots_and_quotes_changes_no_number(tmp_path: Path) -> None:
    texts = ['a "b": c', ":-)", "0.5, 0.5", "\\", '"', "{", "]}", "1.5 2.5 3.5"]
    rows = [{"input": [at, 1], "target": at % 2, "a.b": text} for at, text in enumerate(texts)]
    for form in FORMS.values():
        table = opened(tmp_path, form([json.dumps(row) for row in rows]))
        assert table.columns["input"].tolist() == [row["input"] for row in rows]


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(), st.text(max_size=8)
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


def plain(value: Any) -> Any:
    """For comparison: NaN is equal to itself, and what is no number is its name."""
    if isinstance(value, list):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    return value.text if isinstance(value, NoNumber) else repr(value)


@given(value=values)
@settings(max_examples=300, deadline=None)
def test_all_that_python_writes_is_read_as_it_was(value: Any) -> None:
    raw = json.dumps(value).encode()
    named = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}

    def told(part: Any) -> Any:
        if isinstance(part, list):
            return [told(one) for one in part]
        if isinstance(part, dict):
            return {name: told(one) for name, one in part.items()}
        return named.get(repr(part), repr(part)) if isinstance(part, float) else repr(part)

    try:
        assert plain(parsed(raw)) == told(value)
        assert plain(exactly(raw)) == told(value)
    except orjson.JSONDecodeError:
        assert "\\ud" in raw.decode()  # half a character
