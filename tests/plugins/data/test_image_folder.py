"""`data.image_folder`: pictures of any make become numbers of one shape; `conv_net` learns of them.

Planted faults: pictures that are not turned as the camera says; a place's draws taken from the
batch's number; the deviation of all pictures instead of the training share's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forge_kernel import load_pipeline, load_run, run
from forge_kernel.contract.run_config import RunConfig
from forge_kernel.errors import ConfigError, PluginError
from forge_kernel.runner import resume
from forge_kernel.testing.compare import differences
from forge_kernel.trained_run import evaluate_run
from forge_kernel.training.one_process import OneProcess
from forge_plugins.data.image_batches import PictureData
from forge_plugins.data.image_folder import ImageFolder
from forge_plugins.data.image_folder_config import ImageFolderConfig
from forge_plugins.formats.readers.pictures import pillow_library, read_picture
from forge_plugins.mathematics.networks.conv_net import ConvNet
from forge_plugins.uses.file_inputs import file_inputs, sample_names

Image = pytest.importorskip("PIL.Image")


class Seeded:
    strategy, settings, folder = OneProcess(), RunConfig(), None

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.told: list[str] = []

    def emit_event(self, name: str, message: str, **facts: Any) -> None:
        self.told.append(message)


def dealt(folder: Path, told: Seeded | None = None, **chosen: Any) -> PictureData:
    settings = {"path": str(folder), "cache_dir": str(folder.parent / "cache"), **chosen}
    plugin = ImageFolder(ImageFolderConfig(**settings))
    data: Any = plugin.make_data(told or Seeded())  # type: ignore[arg-type]
    return data


def save(file: Path, pixels: np.ndarray, **how: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file, **how)
    return file


def bright(value: int, seed: int) -> np.ndarray:
    """Grey 6 x 6 pixels about a brightness."""
    noise = np.random.default_rng(seed).integers(-20, 20, (6, 6))
    return np.clip(value + noise, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dark and light pictures, twenty each."""
    place = tmp_path_factory.mktemp("pictures") / "x"
    for at in range(20):
        save(place / "dark" / f"{at:02}.png", bright(60, at))
        save(place / "light" / f"{at:02}.png", bright(180, 100 + at))
    return place


def test_classes_are_folders_and_channels_are_scaled_by_the_training_share(folder: Path) -> None:
    data = dealt(folder, validation_split=0.25)
    assert data.spec.shape == (1, 6, 6)
    assert data.spec.labels == ("dark", "light")
    assert data.spec.samples == 30
    held = [batch.targets for batch in data.validation()]
    assert torch.bincount(torch.cat(held)).tolist() == [5, 5]
    training = data.samples(data.sampler.all_training()).inputs.double()
    assert training.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert training.std(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    colour = dealt(folder, channels=3, size=(4, 8))
    assert colour.spec.shape == (3, 4, 8)


def test_hidden_files_and_others_are_passed_over(folder: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "y" / name / "deep" / "1.png", bright(60, 1))
        (tmp_path / "y" / name / ".DS_Store").write_bytes(b"x")
        (tmp_path / "y" / name / "Thumbs.db").write_bytes(b"x")
        (tmp_path / "y" / name / "linked.png").symlink_to(folder / "dark" / "00.png")
    (tmp_path / "y" / "a" / "notes.txt").write_text("x")
    told = Seeded()
    assert len(dealt(tmp_path / "y", told).table) == 4
    assert told.told == [f"data.image_folder: 1 files of {tmp_path / 'y'} are no pictures"]


def test_pictures_of_any_make_are_read_as_they_look(tmp_path: Path) -> None:
    pillow = pillow_library(tmp_path)
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    grey = read_picture(pillow, save(tmp_path / "l.png", ramp), None, 1)
    assert grey.shape == (1, 8, 8)
    assert np.array_equal(grey[0], ramp)
    assert read_picture(pillow, tmp_path / "l.png", None, 3).shape == (3, 8, 8)
    wide = save(tmp_path / "16.png", ramp.astype(np.uint16) * 257)
    assert np.array_equal(read_picture(pillow, wide, None, 1)[0], ramp)
    clear = np.zeros((8, 8, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    seen = read_picture(pillow, save(tmp_path / "rgba.png", clear), None, 3)
    assert seen[:, 0, 0].tolist() == [10, 20, 30]
    assert (seen[:, 1:] == 255).all()
    Image.fromarray(ramp).convert("P").save(tmp_path / "p.gif")
    assert np.array_equal(read_picture(pillow, tmp_path / "p.gif", None, 1)[0], ramp)
    red = Image.new("RGB", (8, 8), (250, 0, 0)).convert("CMYK")
    red.save(tmp_path / "cmyk.jpg", quality=95)
    assert read_picture(pillow, tmp_path / "cmyk.jpg", None, 3)[0].min() > 240
    turned = Image.Exif()
    turned[274] = 6  # the camera was held upright
    tall = np.zeros((4, 8), np.uint8)
    tall[:, :4] = 255
    Image.fromarray(tall).save(tmp_path / "exif.jpg", exif=turned, quality=95)
    upright = read_picture(pillow, tmp_path / "exif.jpg", None, 1)
    assert upright.shape == (1, 8, 4)
    assert upright[0, :4].mean() > 240
    assert read_picture(pillow, tmp_path / "exif.jpg", (5, 5), 1).shape == (1, 5, 5)


def damaged(place: Path) -> None:
    file = save(place / "a" / "9.png", np.zeros((64, 64), np.uint8) + bright(9, 1)[0, 0])
    file.write_bytes(file.read_bytes()[:-30])


def no_picture(place: Path) -> None:
    (place / "a" / "9.jpg").write_text("hello")


def other_size(place: Path) -> None:
    save(place / "b" / "9.png", np.zeros((7, 6), np.uint8))


def empty_class(place: Path) -> None:
    (place / "c").mkdir()


def lost_link(place: Path) -> None:
    (place / "a" / "9.png").symlink_to(place / "gone.png")


def one_class(place: Path) -> None:
    (place / "b" / "1.png").unlink()
    (place / "b").rmdir()


def shares(place: Path) -> None:
    (place / "a").rename(place / "train")
    (place / "b").rename(place / "val")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "9.png: cannot be read"),
        (no_picture, "9.jpg: is no picture, or a damaged one"),
        (other_size, "9.png: has 6 x 7 pixels, and the first one 6 x 6; set size"),
        (empty_class, "c: the class's folder has no picture"),
        (lost_link, "9.png: there is no such file"),
        (one_class, "has one class, a"),
        (shares, "shares and no classes; name"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said_in_its_place(
    tmp_path: Path, spoil: Any, message: str
) -> None:
    place = tmp_path / "x"
    for name in ("a", "b"):
        save(place / name / "1.png", bright(60, 1))
    spoil(place)
    with pytest.raises(PluginError) as refused:
        dealt(place)
    assert message in str(refused.value)


def test_damaged_pictures_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "x"
    for name in ("a", "b"):
        for at in range(2):
            save(place / name / f"{at}.png", bright(60, at))
    damaged(place)
    told = Seeded()
    data = dealt(place, told, unreadable="leave_out")
    assert len(data.table) == 4
    assert "1 of 5 pictures are left out" in told.told[0]
    for wrong, message in ((tmp_path / "none", "there is no such folder"), (tmp_path, "cache")):
        with pytest.raises(PluginError, match=message):
            dealt(wrong, cache_dir=str(tmp_path / "x"))


def test_a_table_of_paths_is_a_folder_too(folder: Path) -> None:
    table = folder.parent / "table.csv"
    rows = [f"x/{name}/0{at}.png,{name}" for name in ("dark", "light") for at in range(3)]
    table.write_text("\n".join(["picture,what", *rows]))
    chosen = {"file_column": "picture", "label_column": "what"}
    assert len(dealt(table, **chosen).table) == 6
    with pytest.raises(PluginError, match="there is no field 'file'"):
        dealt(table)
    table.write_text("picture,what\nx/dark/00.png,a\nx/dark/99.png,b\n")
    with pytest.raises(PluginError, match="record 1, field 'picture': there is no file"):
        dealt(table, **chosen)


def test_moves_are_of_seed_epoch_and_place_alone(folder: Path) -> None:
    chosen: dict[str, Any] = {"flip": True, "shift": 2, "validation_split": 0.0}
    whole = dealt(folder, batch_size=40, **chosen)
    parts = dealt(folder, batch_size=7, **chosen)
    first = next(iter(whole.batches(3, 0))).inputs
    assert torch.equal(torch.cat([batch.inputs for batch in parts.batches(3, 0)]), first)
    assert torch.equal(whole.take(3, range(5, 30, 4)).inputs, first[5:30:4])
    assert torch.equal(next(iter(parts.batches(3, 14))).inputs, first[14:21])
    still = dealt(folder, batch_size=40, validation_split=0.0)
    plain = next(iter(still.batches(3, 0))).inputs
    same = [torch.equal(left, right) for left, right in zip(first, plain, strict=True)]
    assert sum(same) < 10
    flipped = dealt(folder, batch_size=40, validation_split=0.0, flip=True)
    moved = next(iter(flipped.batches(3, 0))).inputs
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(moved, plain, strict=True)]
    assert 8 < sum(mirrored) < 32


def pipeline(folder: Path, *settings: str) -> Any:
    own = [
        f"data={{use: image_folder, with: {{path: {folder}, cache_dir: {folder.parent / 'cache'}, "
        "batch_size: 10, validation_split: 0.25, flip: true}}",
        "model={use: conv_net, with: {widths: [4, 8], depth: 1}}",
        "quantizer={use: bitnet, with: {convolutions: true}}", "observers=null", "callbacks=null",
        "exporters=[{use: state_dict}, {use: packed_ternary}]", "schedule=null",
        "gradients=null", "run.validate_every=5", "run.save_every=3", *settings,
    ]  # fmt: skip
    return load_pipeline("smoke", own)


def test_a_run_resumes_in_mid_epoch_and_reads_new_pictures(folder: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(pipeline(folder, "run.max_steps=20"), output_dir=whole, quiet=True)
    run(pipeline(folder, "run.max_steps=7"), output_dir=cut, quiet=True)
    resume(cut, ["run.max_steps=20"], quiet=True)
    assert not differences(*(each / "checkpoints" / "step-20" for each in (whole, cut)))
    used = load_run(whole)
    assert evaluate_run(whole, folder)["accuracy"] == 1.0
    inputs = torch.cat(list(file_inputs(used, folder / "light")))
    assert used.predict(inputs).argmax(1).tolist() == [1] * 20
    assert sample_names(used, folder / "light")[0].endswith("00.png")
    one = torch.cat(list(file_inputs(used, folder / "dark" / "03.png")))
    assert used.predict(one).argmax(1).tolist() == [0]
    save(tmp_path / "big" / "a.png", np.zeros((9, 9), np.uint8))
    with pytest.raises(ConfigError, match="pictures of 9 x 9 pixels, and the run 6 x 6"):
        list(file_inputs(used, tmp_path / "big"))
    assert json.loads((whole / "preparation.json").read_text())["target"]["labels"]


@pytest.mark.parametrize(
    ("shape", "layout", "channels"),
    [((3, 9, 8), "first", 3), ((9, 8, 3), "last", 3), ((9, 8), "none", 1)],
)
def test_a_network_reads_channels_where_they_stand(
    shape: tuple[int, ...], layout: Any, channels: int
) -> None:
    network = ConvNet(channels=channels, widths=(4, 8), outputs=5, layout=layout)
    assert network(torch.zeros(2, *shape)).shape == (2, 5)


@pytest.mark.parametrize("chosen", [{}, {"layout": "last"}])
def test_pictures_of_a_file_of_numbers_are_convolved(
    tmp_path: Path, chosen: dict[str, Any]
) -> None:
    draws = np.random.default_rng(0)
    shape = (40, 6, 5, 2) if chosen else (40, 2, 6, 5)
    np.savez(tmp_path / "x.npz", input=draws.normal(size=shape), target=draws.integers(0, 2, 40))
    settings = [
        f"data={{use: file, with: {{path: {tmp_path / 'x.npz'}, cache_dir: {tmp_path / 'c'}}}}}",
        f"model={{use: conv_net, with: {json.dumps({'widths': [4], 'dropout': 0.1, **chosen})}}}",
        "quantizer=null", "observers=null", "callbacks=null", "exporters=null",
        "run.max_steps=2", "run.validate_every=2",
    ]  # fmt: skip
    assert run(load_pipeline("smoke", settings), output_dir=tmp_path / "run", quiet=True).steps == 2


def test_rows_of_numbers_are_pictures_where_their_shape_is_told(tmp_path: Path) -> None:
    settings = [
        "data={use: file}", "model={use: conv_net}", "observers=null", "exporters=null",
        "run.max_steps=2",
    ]  # fmt: skip
    place: dict[str, Any] = {"output_dir": tmp_path / "run", "quiet": True}
    with pytest.raises(PluginError, match="samples are of 64 numbers: take data.image_folder"):
        run(load_pipeline("smoke", settings), **place)
    with pytest.raises(PluginError, match=r"shape \[8, 9\] has 72 numbers, and the data 64"):
        run(load_pipeline("smoke", [*settings, "model.with.shape=[8, 9]"]), **place)
    told = [*settings, "model.with.shape=[1, 8, 8]", "quantizer.with.convolutions=true"]
    assert run(load_pipeline("smoke", told), output_dir=tmp_path / "told", quiet=True).steps == 2
