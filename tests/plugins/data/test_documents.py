"""Texts from files: documents, tokenizers of other programs, tokens that are mapped."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from clients import need
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_kernel import load_pipeline, run
from forge_kernel.errors import PluginError
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data import text_batches as windows_module
from forge_plugins.data.file_config import FileConfig
from forge_plugins.data.text import Text, read_row
from forge_plugins.data.text_batches import Sequences, TokenSequences
from forge_plugins.data.text_config import TextConfig
from forge_plugins.formats.errors import DataError
from forge_plugins.formats.readers.documents import PART, Account, Documents
from forge_plugins.mathematics.text.tokenizers import ByteTokenizer

WORDS = "the ternary weights of a small network are added, never multiplied; "


class Run:
    seed, strategy = 3, OneProcess()

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def emit_event(self, name: str, text: str) -> None:
        self.told.append((name, text))


def write(path: Path, values: list[Any]) -> Path:
    text = "\n".join(map(json.dumps, values))
    if path.suffix == ".json":
        text = json.dumps(values)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def decoded(path: Path, **chosen: Any) -> tuple[str, dict[str, int]]:
    config = TextConfig(path=str(path), cache_dir=str(path.parent / "cache"), **chosen)
    row = read_row(config)
    assert isinstance(row.tokens, np.memmap)
    end = row.tokenizer.end
    parts = "".join("|" if t == end else row.tokenizer.decode([t]) for t in row.tokens.tolist())
    return parts, row.left_out


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz", "x.ndjson"])
@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_the_documents_of_a_file_stand_in_a_row_each_with_its_end(
    tokenizer: str, name: str, tmp_path: Path
) -> None:
    file = write(tmp_path / name, [{"body": "one two", "id": 1}, {"body": "three"}, {"body": "x"}])
    assert decoded(file, field="body", tokenizer=tokenizer) == ("one two|three|x|", {})


def test_documents_that_do_not_serve_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "first"},
        {"body": "no"},
        {"text": 3},
        7,
        {"text": "ab"},
        {"text": "first"},
        {"text": "last"},
    ]
    file = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(PluginError, match=r"line 2, record 1, field 'text': is missing"):
        decoded(file)
    chosen: dict[str, Any] = {"unreadable": "leave_out", "min_chars": 3, "deduplicate": True}
    text, left_out = decoded(file, **chosen)
    assert text == "first|last|"
    assert left_out == {"missing field": 1, "wrong type": 2, "length": 1, "duplicate": 1}
    assert decoded(file, **chosen) == (text, left_out)  # now from the cache
    account = Account()
    list(Documents(file=file, least=3, once=True, lenient=True).parts(account))
    assert account.examples == {
        "missing field": [1],
        "wrong type": [2, 3],
        "length": [4],
        "duplicate": [5],
    }
    assert (account.documents, account.characters) == (2, 9)
    with pytest.raises(PluginError, match="no document is left.*length"):
        decoded(file, unreadable="leave_out", min_chars=100)


ODD = ["NaN", "[1, -Infinity]", "1e400", '{"b": NaN}', '"NaN: 1e400"', "null", "9" * 400]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd[:9])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_what_nobody_reads_is_of_no_matter(name: str, odd: str, tmp_path: Path) -> None:
    """Planted fault: a NaN refused the file, with a setting that this plugin does not have."""
    rows = [f'{{"score": {odd}, "text": "a \\"b\\": c"}}', f'{{"text": "NaN", "a": {odd}}}']
    text = f"[{','.join(rows)}]" if name == "x.json" else "\n".join(rows)
    (tmp_path / name).write_text(text)
    assert decoded(tmp_path / name)[0] == 'a "b": c|NaN|'


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_no_word_of_an_error_names_a_setting_that_texts_do_not_have(
    name: str, tmp_path: Path
) -> None:
    there = {field.name for field in dataclasses.fields(TextConfig)}
    others = {field.name for field in dataclasses.fields(FileConfig)} - there
    for row in ('{"text": NaN}', "NaN", '{"text": nan}', '{"text": 1e999}', '{"text": "a", "b": inf}',
                '{"text": null}', '{"text": "a", "b": 1e', "3"):  # fmt: skip
        (tmp_path / name).write_text(f"[{row}]" if name == "x.json" else f'{{"text": "a"}}\n{row}')
        with pytest.raises(PluginError) as caught:
            decoded(tmp_path / name)
        assert not [word for word in others if word.count("_") and word in str(caught.value)]
        assert "NoNumber" not in str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "first", "text": "b"}', '{"text": "a", "\\u0074ext": "b"}',
        '{"id": 1, "text": "a: \\"b\\": c", "id": 2}', '{"text": "a", "b": {"c": 1, "c": 2}}',
        '{"text": "a", "b\\\\": 1, "c": 1, "c": NaN}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_a_field_that_is_named_twice_is_refused(name: str, row: str, tmp_path: Path) -> None:
    """Planted fault: of two texts in one object the last one was read, without a word."""
    whole = '{"text": "fine"}'
    text = f"[{whole}, {row}]" if name == "x.json" else f"{whole}\n{row}\n"
    (tmp_path / name).write_text(text)
    with pytest.raises(PluginError, match="record 1, field .*: an object names the field twice"):
        decoded(tmp_path / name)


@pytest.mark.parametrize("offset", [2**16 - 1, 2**18 - 2, 2**20 - 3])
def test_the_bytes_of_a_text_are_its_tokens(offset: int, tmp_path: Path) -> None:
    """The mark at the beginning is dropped; ends of lines and characters over blocks are whole."""
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfhi\r\n")
    assert decoded(file)[0] == "hi\r\n|"
    raw = b"x" * offset + "😀".encode() * 10 + b"z"
    file.write_bytes(raw)
    row = read_row(TextConfig(path=str(file), cache_dir=str(tmp_path / "c")))
    assert row.tokens[:-1].tolist() == list(raw)


@pytest.mark.parametrize(
    ("name", "raw", "told"),
    [
        ("x.txt", b"caf\xc3\xa9 \xff", r"byte 6: is no UTF-8"),
        ("x.txt", b"a" * (2**18 + 9) + b"\xfe" + b"b" * 99, rf"byte {2**18 + 9}: is no UTF-8"),
        ("x.txt", b"caf\xc3", "ends within a character"),
        ("x.txt", b"", "the file is empty"),
        ("x.jsonl", b'{"text": "a"}\n{"text": "b"', "line 2 column"),
        ("x.json", b'[{"text": "a"}, {"text": "b"]', "line 1 column"),
        ("x.json", b'[{"text": "a"}] x', "text follows the end"),
        ("x.txt.gz", gzip.compress(b"hello", mtime=0)[:-9], "gzip data are broken"),
        ("x.txt.gz", gzip.compress(bytes(2**26), mtime=0), "expands to more"),
    ],
)  # fmt: skip
def test_a_broken_text_is_refused_by_its_place(
    name: str, raw: bytes, told: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(PluginError, match=told):
        decoded(tmp_path / name)
    assert not list(tmp_path.rglob("*.npy"))


@given(text=st.text(alphabet="aé\n\U0001f600 ", max_size=400), part=st.integers(1, 50))
@settings(max_examples=80, deadline=None)
def test_a_plain_text_is_whole_however_it_is_cut(
    text: str, part: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("text") / "x.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forge_plugins.formats.readers.documents.PART", part)
        patch.setattr("forge_plugins.formats.readers.json_text.BLOCK", part)
        account = Account()
        parts = list(Documents(file=file).parts(account)) if text else []
    assert "".join(piece for piece, _ in parts) == text
    assert [ended for _, ended in parts][-1:] == ([True] if text else [])
    assert account.characters == len(text)


def tokenizer_json(folder: Path) -> Path:
    """A byte-level BPE of 400 tokens, trained here."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    made.train_from_iterator([WORDS * 3], trainer)
    made.enable_truncation(4)  # a file may say so; texts are not cut all the same
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_a_tokenizer_of_the_library_is_what_the_library_makes_of_the_text(tmp_path: Path) -> None:
    """Planted fault: with the file's truncation each document had four tokens."""
    file = tokenizer_json(tmp_path)
    import tokenizers

    texts = [WORDS * 4, "naïve 😀 words", "x"]
    path = write(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    config = TextConfig(
        path=str(path), tokenizer="library", tokenizer_file=str(file), cache_dir=str(tmp_path / "c")
    )
    row = read_row(config)
    plain = tokenizers.Tokenizer.from_file(str(file))
    plain.no_truncation()
    wanted = [token for text in texts for token in [*plain.encode(text).ids, 0]]
    assert row.tokens.tolist() == wanted
    assert row.tokens.dtype == np.uint16
    assert len(wanted) < len("".join(texts).encode())
    assert (row.tokenizer.vocabulary, row.tokenizer.end) == (plain.get_vocab_size(), 0)
    cuts = np.flatnonzero(row.tokens == 0)
    assert row.tokenizer.decode(row.tokens[: cuts[0]]) == texts[0]
    assert row.tokenizer.decode(row.tokens[cuts[0] + 1 : cuts[1]]) == texts[1]


@pytest.mark.parametrize(
    ("content", "chosen", "told"),
    [
        ("{}", {}, "no tokenizer.json"),
        (None, {"end_token": "</nothing>"}, "no token </nothing>"),
        ("no JSON", {}, "no tokenizer.json"),
    ],
)
def test_a_tokenizer_that_is_none_is_refused(
    content: str | None, chosen: Any, told: str, tmp_path: Path
) -> None:
    file = tokenizer_json(tmp_path)
    if content is not None:
        file.write_text(content)
    path = write(tmp_path / "x.jsonl", [{"text": WORDS}])
    with pytest.raises(PluginError, match=told):
        decoded(path, tokenizer="library", tokenizer_file=str(file), **chosen)
    with pytest.raises(PluginError, match=r"none\.json"):
        decoded(path, tokenizer="library", tokenizer_file="none.json")


@pytest.mark.parametrize(
    "chosen", [{"tokenizer": "library"}, {"tokenizer_file": "x"}, {"end_token": "x"}]
)
def test_settings_of_a_tokenizer_file_go_together(chosen: Any) -> None:
    with pytest.raises(ValueError, match="tokenizer_file"):
        TextConfig(**chosen)


def test_another_text_or_tokenizer_is_encoded_anew_and_the_same_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": "abc"}])
    assert decoded(path)[0] == "abc|"
    write(path, [{"text": "xyz"}])
    assert decoded(path)[0] == "xyz|"
    assert decoded(path, tokenizer="characters")[0] == "xyz|"
    monkeypatch.setattr(Documents, "parts", None)
    assert decoded(path)[0] == "xyz|"
    assert decoded(path, tokenizer="characters")[0] == "xyz|"


@pytest.mark.parametrize("few", [0, 2**20])
@given(
    count=st.integers(40, 400), length=st.integers(1, 9), size=st.integers(1, 7),
    world=st.integers(1, 4), epoch=st.integers(0, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_the_windows_of_all_processes_are_those_of_one(
    few: int, count: int, length: int, size: int, world: int, epoch: int
) -> None:
    config = TextConfig(sequence_length=length, batch_size=size)
    tokens = np.arange(count, dtype=np.int32)
    made = [
        TokenSequences(
            tokens, tokens[: count // 2], config, 5, ByteTokenizer(), rank=rank, world=world
        )
        for rank in range(world)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(windows_module, "FEW", few)
        lots = [list(part.batches(epoch, 0)) for part in made]
        assert len({len(lot) for lot in lots}) == 1
        real = [b for lot in lots for b in lot if b.weights is None]
        firsts = sorted(int(row[0]) for batch in real for row in batch.inputs)
        assert len(firsts) == len(set(firsts)) == made[0].spec.samples
        assert {(b - a) for a, b in itertools.pairwise(firsts)} <= {length}
        for start in range(len(lots[0])):
            again = next(made[0].batches(epoch, start * size * world))
            assert torch.equal(again.inputs, lots[0][start].inputs)
    validation = [row[0] for part in made for batch in part.validation() for row in batch.inputs]
    assert sorted(map(int, validation)) == list(
        range(0, (count // 2 - 1) // length * length, length)
    )


def test_windows_keep_the_type_of_the_row_where_they_are_asked_for_as_rows() -> None:
    tokens = np.arange(500, dtype=np.uint16)
    rows = Sequences(tokens, 8).rows(np.array([3, 100]))
    assert rows.dtype == np.uint16
    assert rows.tolist() == [list(range(3, 12)), list(range(100, 109))]


def test_left_out_documents_are_told_in_the_run(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [{"text": WORDS * 9}, {"text": ""}])
    plugin = Text(TextConfig(path=str(path), sequence_length=4, cache_dir=str(tmp_path / "c")))
    here = Run()
    plugin.make_data(here)  # type: ignore[arg-type]
    assert here.told == [("documents_left_out", 'data.text: {"length": 1}')]


SMALL = [
    "run.max_steps=2", "model.with={layers: 1, width: 256, heads: 2, hidden: 256}",
    "data.with.sequence_length=8", "data.with.batch_size=2", "observers=[]", "run.validate_every=null",
    "exporters=[{use: transformers, with: {verify: false}}, {use: gguf, with: {verify: false}}]",
]  # fmt: skip


def test_a_run_with_a_tokenizer_file_exports_that_tokenizer(tmp_path: Path) -> None:
    file = tokenizer_json(tmp_path)
    path = write(tmp_path / "x.jsonl", [{"text": WORDS * 20}])
    pipeline = load_pipeline(
        "char_llama_gguf",
        [*SMALL, f"data.with.path={path}", "data.with.tokenizer=library",
         f"data.with.tokenizer_file={file}", "data.with.validation_split=0.4",
         f"data.with.cache_dir={tmp_path / 'c'}"],
    )  # fmt: skip
    result = run(pipeline, output_dir=tmp_path / "run", quiet=True)
    assert result.model is not None
    assert result.model.head.weight.shape[0] == 400 or result.model.head.weight.shape[0] > 256
    found = tmp_path / "run" / "exports" / "transformers"
    assert json.loads((found / "tokenizer.json").read_text()) == json.loads(file.read_text())
    assert json.loads((found / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    import tokenizers

    assert tokenizers.Tokenizer.from_file(str(found / "tokenizer.json")).encode("the").ids
    assert (tmp_path / "run" / "exports" / "gguf" / "model.gguf").stat().st_size > 0


READER = """
import resource, sys
from forge_plugins.data.text import TextConfig, read_row
import torch
def row(path): return read_row(TextConfig(path=path, cache_dir=sys.argv[3], tokenizer=sys.argv[4]))
row(sys.argv[2])
for line in open("/proc/self/status"):
    if line.startswith("VmData"):
        held = int(line.split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + 56 * 2**20,) * 2)  # beside 14 MB that are free
print(len(row(sys.argv[1]).tokens))
"""


@pytest.mark.spec("B7")
@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_a_text_larger_than_the_memory_is_encoded(
    tokenizer: str, name: str, tmp_path: Path
) -> None:
    """Planted fault: a text read as a whole ended with MemoryError."""
    line, count = WORDS * 12 + "\n", 80 * 2**20 // (12 * len(WORDS))
    with (tmp_path / name).open("w") as stream:
        for _ in range(count):
            stream.write(line if name == "x.txt" else json.dumps({"text": line}) + "\n")
    write(tmp_path / "small.jsonl", [{"text": "ab"}])
    words = [str(tmp_path / part) for part in (name, "small.jsonl", "cache")]
    done = forked.run(
        [sys.executable, "-c", READER, *words, tokenizer],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-1500:]
    ends = 1 if name == "x.txt" else count
    assert int(done.stdout) == len(line) * count + ends
    assert len(line) * count > PART


def test_a_place_beyond_a_byte_order_mark_is_counted_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(DataError, match="byte 5: is no UTF-8"):
        list(Documents(file=tmp_path / "x.txt").parts(Account()))


def test_a_folder_and_a_pattern_are_the_texts_of_their_files_one_after_the_other(
    tmp_path: Path,
) -> None:
    """Planted: repeated texts looked for in each file alone; a count of another file's letters."""
    folder = tmp_path / "texts"
    folder.mkdir()
    write(folder / "a.jsonl", [{"text": text} for text in ("one", "two")])
    (folder / "b.txt").write_text("three")
    write(folder / "c.json", [{"text": text} for text in ("two", "four")])
    (folder / "d.txt").write_text("six")
    (folder / "e.bin").write_bytes(b"\xff")
    for path in (folder, folder / "[a-d].*", tmp_path / "*" / "[a-e].[jt]*"):
        text, left_out = decoded(path, deduplicate=True)
        assert text == "one|two|three|four|six|"
        assert left_out == {"duplicate": 1}
    text, left_out = decoded(folder, min_chars=4)
    assert text == "three|four|"
    assert left_out == {"length": 4}
    before = read_row(TextConfig(path=str(folder), cache_dir=str(tmp_path / "c"))).content
    (folder / "d.txt").write_text("seven")
    assert read_row(TextConfig(path=str(folder), cache_dir=str(tmp_path / "c"))).content != before
    with pytest.raises(PluginError, match="no file has a name like this"):
        decoded(folder / "*.none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(PluginError, match=r"the folder has no such file; files of \.json"):
        decoded(tmp_path / "empty")


def test_a_column_of_parquet_is_read_as_a_field_of_objects_is(tmp_path: Path) -> None:
    """Planted: rows without a text taken as empty ones; the other columns asked for as well."""
    need("pyarrow")
    import pyarrow
    from pyarrow import parquet

    texts = ["first", None, "naïve 😀", "ab", "first", "last"]
    table = pyarrow.table({"body": texts, "id": range(6), "tags": [[], ["a"], None, [], [], []]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=2)
    with pytest.raises(PluginError, match=r"record 1, field 'body': holds a null, not a text"):
        decoded(tmp_path / "x.parquet", field="body")
    with pytest.raises(PluginError, match=r"'text': there is no column of this name.*\['body'"):
        decoded(tmp_path / "x.parquet")
    chosen: dict[str, Any] = {"unreadable": "leave_out", "min_chars": 3, "deduplicate": True}
    text, left_out = decoded(tmp_path / "x.parquet", field="body", **chosen)
    rows = [{"body": text, "id": 0} for text in texts]
    assert (text, left_out) == decoded(write(tmp_path / "x.jsonl", rows), field="body", **chosen)
    assert left_out == {"wrong type": 1, "length": 1, "duplicate": 1}
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "y.parquet").write_bytes(whole[:-9])
    with pytest.raises(PluginError, match=r"y\.parquet, record 0: cannot be read"):
        decoded(tmp_path / "y.parquet", field="body")
    assert not list((tmp_path / "cache").rglob("rows.jsonl"))


def test_the_folder_of_a_tokenizer_is_its_file(tmp_path: Path) -> None:
    file = tokenizer_json(tmp_path)
    path = write(tmp_path / "x.jsonl", [{"text": WORDS}])
    chosen = {"tokenizer": "library", "tokenizer_file": str(file)}
    assert decoded(path, **chosen) == decoded(path, **{**chosen, "tokenizer_file": str(tmp_path)})
    (tmp_path / "none").mkdir()
    with pytest.raises(PluginError, match=r"none/tokenizer\.json"):
        decoded(path, **{**chosen, "tokenizer_file": str(tmp_path / "none")})
