"""`forge data FILE`, from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest


def forge_data(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_kernel", "data", *words]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cwd / "cache")}
    return forked.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.spec("B14")
def test_it_tells_counts_reasons_and_labels(tmp_path: Path) -> None:
    rows = [{"input": [i + 0.5, 2.0], "target": i % 2} for i in range(6)]
    rows += [rows[3], {"input": [1.0], "target": 1}]  # type: ignore[list-item]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    told = json.loads(forge_data("x.jsonl", "--json", cwd=tmp_path).stdout)
    assert (told["format"], told["records"], told["kept"], told["length"]) == ("json", 8, 6, 2)
    assert told["left_out"] == {"duplicate": 1, "wrong length": 1}
    assert told["reasons"]["duplicate"]["first"] == [6]
    assert told["labels"] == {"0": 3, "1": 3}
    assert told["fields"]["input"] == {
        "shape": [2], "type": "float32", "smallest": 0.5, "largest": 5.5, "mean": pytest.approx(2.535714),
    }  # fmt: skip
    text = forge_data("x.jsonl", cwd=tmp_path).stdout
    assert "found, duplicate: 1 records: 6" in text
    all_kept = forge_data("x.jsonl", "--json", "--threshold", "0", cwd=tmp_path)
    assert json.loads(all_kept.stdout)["kept"] == 8
    fewer = forge_data("x.jsonl", "--json", "--classes", "1", cwd=tmp_path)
    assert json.loads(fewer.stdout)["reasons"]["label out of range"]["first"] == [1, 3, 5, 6]


def test_tokens_and_their_options(tmp_path: Path) -> None:
    np.arange(21, dtype=np.uint8).tofile(tmp_path / "t.bin")
    words = [
        "t.bin",
        "--json",
        "--format",
        "tokens",
        "--token-dtype",
        "uint8",
        "--sequence-length",
        "5",
    ]
    words += ["--input", "tokens", "--target", "next", "--vocabulary", "20"]
    told = json.loads(forge_data(*words, cwd=tmp_path).stdout)
    assert (told["records"], told["length"]) == (4, 5)
    assert told["reasons"]["token out of range"]["records"] == 1


def test_a_broken_file_ends_with_2_and_its_place(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('[{"input": [1]}, {"input": [1], "input": [2]}]')
    result = forge_data("x.json", cwd=tmp_path)
    assert result.returncode == 2
    assert "x.json, record 1, field 'input': an object names the field twice" in result.stderr
    assert "Traceback" not in result.stderr
    for words in (("x.json", "--format", "xml"), ("none.json",), ("x.json", "--integers", "u3")):
        assert forge_data(*words, cwd=tmp_path).returncode == 2


def test_the_shipped_digits_are_found_from_anywhere(tmp_path: Path) -> None:
    told = json.loads(forge_data("shipped:digits.h5", "--json", cwd=tmp_path).stdout)
    assert told["records"] == 1797
    assert len(told["labels"]) == 10
    assert (tmp_path / "cache" / "forge-kernel" / "data").is_dir()
    other = forge_data("shipped:digits.h5", "--cache-dir", "mine", cwd=tmp_path)
    assert other.returncode == 0
    kept = [entry for entry in (tmp_path / "mine").iterdir() if entry.name != "memos"]
    assert len(kept) == 1


def test_it_draws_counts_as_bars_in_the_terminal(tmp_path: Path) -> None:
    rows = [{"input": [i + 0.5, 2.0], "target": int(i > 3)} for i in range(12)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = forge_data("x.jsonl", cwd=tmp_path).stdout
    assert f"  0  4  {'█' * 20}\n  1  8  {'█' * 40}\n" in text
    assert "numbers of inputs by size:" in text


def test_it_draws_a_page_that_needs_nothing_beside_itself(tmp_path: Path) -> None:
    rows = [{"input": [i + 0.5, 2.0], "target": i % 3} for i in range(12)] + [{"input": [1.0, 2.0]}]
    (tmp_path / "<b>.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done = forge_data("<b>.jsonl", "--page", "p.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "p.html").read_text()
    assert "&lt;b&gt;.jsonl" in page
    assert "<b>" not in page
    assert "default-src 'none'" in page
    assert 'aria-label="Labels of the kept records; 0: 4; 1: 4; 2: 4"' in page
    assert "missing field" in page
    assert page.count("<svg") == 3
    refused = forge_data("<b>.jsonl", "--page", "nowhere/p.html", cwd=tmp_path)
    assert refused.returncode == 2
    assert "cannot write the page" in refused.stderr


def test_texts_are_told_by_document(tmp_path: Path) -> None:
    rows = [{"text": "ab" * n} for n in (1, 4, 4, 200)] + [{"text": ""}, {"x": 1}, 3]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["x.jsonl", "--input", "text"]
    told = json.loads(forge_data(*words, "--json", cwd=tmp_path).stdout)
    assert (told["records"], told["kept"], told["length"]) == (7, 3, 2 + 8 + 400)
    assert told["left_out"] == {"duplicate": 1, "length": 1, "missing field": 1, "wrong type": 1}
    assert told["reasons"]["duplicate"] == {"records": 1, "first": [2]}
    assert sum(told["spread"]["counts"]) == 3
    text = forge_data(*words, "--page", "p.html", cwd=tmp_path).stdout
    assert "up to 512" in text
    assert "Documents by their characters" in (tmp_path / "p.html").read_text()
    (tmp_path / "plain.txt").write_text("one line\nand another\n")
    plain = json.loads(forge_data("plain.txt", "--input", "text", "--json", cwd=tmp_path).stdout)
    assert (plain["records"], plain["length"]) == (1, 21)
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    assert forge_data("bad.txt", "--input", "text", cwd=tmp_path).returncode == 2


def test_formats_are_told_with_whose_they_are(tmp_path: Path) -> None:
    lines = forge_data("--formats", cwd=tmp_path).stdout.splitlines()
    assert len(lines) >= 10
    assert all(line.split()[-1] == "forge-kernel" for line in lines)
    assert forge_data(cwd=tmp_path).returncode == 2
