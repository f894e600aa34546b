"""`forge tokenizer train`: a vocabulary of one's own texts, which both data plugins take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from chats import CHATML, write_chats
from clients import need

from forge_plugins.data.text import read_row
from forge_plugins.data.text_config import TextConfig
from forge_plugins.interchange.chat_tokenizer import read_chat_tokenizer

WORDS = "the weights of a small network are added, never multiplied: é 漢字 😀\n"


def train(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "forge_kernel", "tokenizer", "train", *words]
    return forked.run(
        command, check=False, cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "true"},
    )  # fmt: skip


def test_texts_of_several_files_become_a_tokenizer_that_data_takes(tmp_path: Path) -> None:
    """Planted: the first file's texts alone; the marks of a chat cut into bytes."""
    need("tokenizers")
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(WORDS * 20, encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps({"text": "quantization " * 30}) + "\n")
    marks = ("--special", "<|im_start|>", "--special", "<|im_end|>")
    done = train("texts", "--vocabulary", "320", *marks, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "tokenizer.json: 320 tokens"
    file = tmp_path / "tokenizer.json"
    again = train("texts", "--vocabulary", "320", *marks, "--output", "again.json", cwd=tmp_path)
    assert again.returncode == 0
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()
    row = read_row(
        TextConfig(
            path=str(folder), tokenizer="library", tokenizer_file=str(file),
            cache_dir=str(tmp_path / "cache"),
        )
    )  # fmt: skip
    text = WORDS * 20 + "quantization " * 30
    assert row.tokenizer.decode(row.tokens) == text
    assert len(row.tokens) < len(text.encode()) / 3
    assert row.tokenizer.decode(row.tokenizer.encode("never seen: ÿ\0")) == "never seen: ÿ\0"
    (tmp_path / "chat.jinja").write_text(CHATML)
    chat = read_chat_tokenizer(file, tmp_path / "chat.jinja", "<|im_end|>", None)
    assert chat.tokenizer.encode("<|im_start|>").tolist() == [1]
    assert chat.tokenizer.end == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("none.txt",), "none.txt: there is no such file"),
        (("*.none",), "*.none: no file has a name like this"),
        (("a.txt", "--vocabulary", "200"), "200 tokens are too few: 256 bytes and 1 special"),
        (("a.txt", "--special", "<|endoftext|>"), "special tokens are empty or named twice"),
        (("chats.jsonl",), "field 'text': is missing"),
        (("a.txt", "--output", "a.txt"), "a.txt is there already: name another file"),
        (("a.txt", "--output", "no/folder.json"), "no/folder.json: cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_is_one_error(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    need("tokenizers")
    (tmp_path / "a.txt").write_text(WORDS)
    write_chats(tmp_path / "chats.jsonl", 2)
    done = train(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tokenizer.json").exists()
