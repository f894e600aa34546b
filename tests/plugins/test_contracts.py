"""Every first-party plugin through the battery that third parties run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from chats import add_tokenizer, write_chats
from model_folders import make_folder

from forge_kernel.testing.contracts import *  # noqa: F403  pytest collects what is imported

CHOSEN: dict[str, dict[str, Any]] = {
    "model.conv_net": {"shape": [2, 2, 2]},
    "validators.bleu": {"prompt": 1, "tokens": 2},  # windows of the trial are short
    "model.python_class": {
        "factory": "torch.nn:Linear",
        "arguments": {"in_features": 8, "out_features": 5},
    },
    "loss.language_model": {"head": "4"},  # the last layer of the trial's model
}


def write_pictures(place: Path) -> Path:
    """Two classes of a few pictures."""
    image = pytest.importorskip("PIL.Image")
    for at in range(24):
        (place / "ab"[at % 2]).mkdir(parents=True, exist_ok=True)
        image.new("L", (4, 4), 9 * at).save(place / "ab"[at % 2] / f"{at}.png")
    return place


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Makes a tiny model folder, once."""

    @cache
    def made() -> Path:
        return make_folder(tmp_path_factory.mktemp("models") / "llama", "llama")

    return made


@pytest.fixture
def forge_config(
    forge_plugin: str, forge_config: dict[str, Any], model_folder: Callable[[], Path]
) -> dict[str, Any]:
    """Settings where the defaults cannot train."""
    if forge_plugin == "model.transformers":
        return {"path": str(model_folder())}
    if forge_plugin == "data.chat":
        place = model_folder().parent
        tokenizer, file = add_tokenizer(place / "tokenizer"), write_chats(place / "a.jsonl")
        return {"path": str(file), "tokenizer": str(tokenizer), "packing": False}
    if forge_plugin == "data.image_folder":
        place = write_pictures(model_folder().parent / "pictures")
        return {"path": str(place), "batch_size": 4}
    return CHOSEN.get(forge_plugin, forge_config)
