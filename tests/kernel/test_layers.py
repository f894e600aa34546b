"""Layers: a file, what it extends, and `--set` on top; each part remembers where it was set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from forge_kernel.config.document import Document, look_up, show_path
from forge_kernel.config.layers import MAX_LAYERS, apply_settings, parse_key, read_layers
from forge_kernel.config.yaml_file import parse_yaml
from forge_kernel.contract.plugin import Kind
from forge_kernel.errors import ConfigError
from forge_kernel.planning.pipeline_file import load_pipeline, read_document

BASE = """forge: 1
run: {name: base, max_steps: 10, seed: 1}
data: {use: modular_arithmetic, with: {modulus: 23}}
model: {use: mlp, with: {hidden: [8, 4], dropout: 0.5}}
quantizer: {use: bitnet}
optimizer: {use: adamw, with: {lr: 1e-2, betas: [0.9, 0.98]}}
loss: {use: cross_entropy}
gradients:
  - {use: grokfast, with: {alpha: 0.9, lambda_reg: 1.0}}
  - {use: clip_norm, with: {max_norm: 2.0}}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    file = tmp_path / "base.yaml"
    file.write_text(BASE)
    return file


def layer(base: Path, text: str, name: str = "top.yaml") -> Path:
    file = base.parent / name
    file.write_text(f"extends: base.yaml\n{text}")
    return file


def place(document: Document, *path: str | int) -> tuple[str, int, int]:
    mark = document.mark(path)
    return Path(mark.source).name, mark.line, mark.column


def refusal(file: Path, *settings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_pipeline(file, settings)
    return str(caught.value)


def test_the_upper_file_wins_and_the_rest_of_the_lower_stays(base: Path) -> None:
    top = layer(base, "run: {seed: 7}\noptimizer: {with: {lr: 1e-3}}\n")
    data = read_layers(top).data
    assert data["run"] == {"name": "base", "max_steps": 10, "seed": 7}
    assert data["optimizer"] == {"use": "adamw", "with": {"lr": 1e-3, "betas": [0.9, 0.98]}}
    assert "extends" not in data


def test_every_part_keeps_the_place_where_it_was_set(base: Path) -> None:
    document = read_layers(layer(base, "run: {seed: 7}\n"))
    assert place(document, "run", "seed") == ("top.yaml", 2, 13)
    assert place(document, "run", "max_steps") == ("base.yaml", 2, 30)
    assert place(document, "run") == ("top.yaml", 2, 6)
    assert place(document, "gradients", 1, "with", "max_norm") == ("base.yaml", 10, 39)


def test_a_list_is_replaced_and_not_mixed(base: Path) -> None:
    document = read_layers(layer(base, "gradients: [{use: clip_norm}]\n"))
    assert document.data["gradients"] == [{"use": "clip_norm"}]
    inside = [path for path in document.values if path[:2] == ("gradients", 1)]
    assert inside == []


def test_another_plugin_does_not_inherit_the_settings_of_the_first(base: Path) -> None:
    document = read_layers(layer(base, "optimizer: {use: sgd}\n"))
    assert document.data["optimizer"] == {"use": "sgd"}
    assert place(document, "optimizer", "with", "lr")[0] == "top.yaml"


def test_another_plugin_takes_its_own_settings_only(base: Path) -> None:
    top = layer(base, "optimizer: {use: sgd, with: {momentum: 0.9}}\n")
    assert read_layers(top).data["optimizer"] == {"use": "sgd", "with": {"momentum": 0.9}}


def test_the_same_plugin_named_again_keeps_its_settings(base: Path) -> None:
    top = layer(base, "optimizer: {use: adamw, with: {lr: 1.0}}\n")
    assert read_layers(top).data["optimizer"]["with"] == {"lr": 1.0, "betas": [0.9, 0.98]}


def test_three_layers_are_laid_in_their_order(base: Path) -> None:
    layer(base, "run: {seed: 2, name: middle}\n", "middle.yaml")
    top = base.parent / "deep" / "top.yaml"
    top.parent.mkdir()
    top.write_text("extends: ../middle.yaml\nrun: {name: top}\n")
    assert read_layers(top).data["run"] == {"name": "top", "max_steps": 10, "seed": 2}


def test_a_chain_has_at_most_so_many_files(tmp_path: Path) -> None:
    for number in range(MAX_LAYERS + 1):
        (tmp_path / f"{number}.yaml").write_text(f"extends: {number + 1}.yaml\nx-{number}: 1\n")
    (tmp_path / f"{MAX_LAYERS}.yaml").write_text("x-last: 1\n")
    assert len(read_layers(tmp_path / "1.yaml").data) == MAX_LAYERS
    with pytest.raises(ConfigError, match=f"at most {MAX_LAYERS} files") as caught:
        read_layers(tmp_path / "0.yaml")
    mark = caught.value.faults[0].mark
    assert mark is not None
    assert (Path(mark.source).name, mark.line) == (f"{MAX_LAYERS - 1}.yaml", 1)


def test_large_layers_are_laid_over_each_other_in_a_moment(tmp_path: Path) -> None:
    lines = "".join(f"  k{number}: 1\n" for number in range(4900))
    (tmp_path / "base.yaml").write_text(f"x-many:\n{lines}")
    (tmp_path / "top.yaml").write_text(f"extends: base.yaml\nx-many:\n{lines}")
    document = read_layers(tmp_path / "top.yaml")
    looked_at = [place(document, "x-many", f"k{number}")[0] for number in (0, 2000, 4899)]
    assert looked_at == ["top.yaml"] * 3


def test_set_overrides_what_files_say(base: Path) -> None:
    pipeline = load_pipeline(base, ["run.seed=3", "optimizer.with.lr=5e-4", "run.name=other"])
    assert (pipeline.run.seed, pipeline.run.name) == (3, "other")
    assert pipeline.optimizer is not None
    assert pipeline.optimizer.config.lr == 5e-4


def test_the_last_set_of_a_key_wins(base: Path) -> None:
    assert load_pipeline(base, ["run.seed=3", "run.seed=4"]).run.seed == 4


def test_set_reads_values_as_files_do(base: Path) -> None:
    data = read_document(
        base, ["x-a=1e-3", "x-b='1'", "x-c=[1, {d: no}]", "x-e=null", "x-f=~", "x-g=a=b"]
    ).data
    assert data["x-a"] == 1e-3
    assert data["x-b"] == "1"
    assert data["x-c"] == [1, {"d": "no"}]
    assert (data["x-e"], data["x-f"]) == (None, None)
    assert data["x-g"] == "a=b"


@pytest.mark.parametrize(
    "typed",
    [
        "/x/d #2.json", "#first", "a: b", "a:", "*.json", "&here", "!now", "%percent", "@home",
        "`tick`", "| bar", "> more", "- dash", "? what", "trailing  ", "C:\\data\\x.json", "~/data",
        "1_000", "0x", "1.2.3", "it's", "'tis", '"', 'say "yes"', "'a' or 'b'", "[a] b.json", "{x}-[y]", "a, b",
        "two\nlines", "tab\t.json", "läufe/ü", "null.json", "true story", "=", "---", "...", "yes",
    ],
)  # fmt: skip
def test_text_is_what_was_typed(base: Path, typed: str) -> None:
    """Planted fault: the value read as the rest of a YAML line."""
    assert read_document(base, [f"x-text={typed}"]).data["x-text"] == typed
    assert read_document(base, [f"x-text = {typed}"]).data["x-text"] == typed


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ("null", None), ("~", None), ("'null'", "null"), ('""', ""), ("''", ""), ("' a '", " a "),
        ("7", 7), (" 7 ", 7), ("-0.5", -0.5), ("1e-3", 1e-3), ("true", True), ("0x10", 16),
        ('"a\\tb"', "a\tb"), ("[1, two, null]", [1, "two", None]), ("[]", []), ("{}", {}),
        ("{use: sgd, with: {lr: 1}}", {"use": "sgd", "with": {"lr": 1}}),
        ('{"a": [1.5, "#x"]}', {"a": [1.5, "#x"]}),
    ],
)  # fmt: skip
def test_a_whole_scalar_list_or_mapping_is_one(base: Path, typed: str, value: Any) -> None:
    found = read_document(base, [f"x-value={typed}"]).data["x-value"]
    assert found == value
    assert type(found) is type(value)


def test_a_value_that_is_empty_is_a_fault_that_says_so(base: Path) -> None:
    """Of an unset variable of the shell. Planted: it is null, and the seed is drawn."""
    assert "write null for no value" in refusal(base, "run.seed=")
    assert load_pipeline(base, ["run.seed=null"]).run.seed is None


def test_set_reaches_into_lists_by_index(base: Path) -> None:
    pipeline = load_pipeline(base, ["gradients[1].with.max_norm=0.25", "model.with.hidden[0]=16"])
    assert pipeline.gradients[1].config.max_norm == 0.25
    assert pipeline.gradients[0].config.alpha == 0.9
    assert pipeline.model is not None
    assert pipeline.model.config.hidden == (16, 4)


def test_set_of_another_plugin_drops_the_settings_of_the_first(base: Path) -> None:
    pipeline = load_pipeline(base, ["optimizer.use=sgd"])
    assert pipeline.optimizer is not None
    assert pipeline.optimizer.config.lr == 1e-2, "sgd's own default"


def test_set_of_another_plugin_goes_before_its_settings_in_whatever_order(base: Path) -> None:
    settings = ["optimizer.with.momentum=0.5", "optimizer.use=sgd"]
    for order in (settings, settings[::-1]):
        pipeline = load_pipeline(base, order)
        assert pipeline.optimizer is not None
        assert pipeline.optimizer.config.momentum == 0.5


def test_set_of_the_same_plugin_keeps_its_settings(base: Path) -> None:
    pipeline = load_pipeline(base, ["optimizer.use=adamw"])
    assert pipeline.optimizer is not None
    assert pipeline.optimizer.config.betas == (0.9, 0.98)


def test_set_to_null_takes_a_plugin_out(base: Path) -> None:
    pipeline = load_pipeline(base, ["quantizer=null", "gradients=null"])
    assert pipeline.quantizer is None
    assert pipeline.gradients == ()


def test_set_to_null_of_what_a_run_needs_is_a_missing_key(base: Path) -> None:
    assert "the key 'loss' is missing" in refusal(base, "loss=null")


def test_a_misspelt_section_set_to_null_is_not_passed_over(base: Path) -> None:
    message = refusal(base, "quantiser=null")
    assert "the key 'quantiser' is not known here" in message
    assert "did you mean 'quantizer'?" in message


def test_set_makes_the_sections_that_lead_to_it(base: Path) -> None:
    pipeline = load_pipeline(base, ["schedule.use=linear_warmup", "schedule.with.warmup_steps=3"])
    assert pipeline.schedule is not None
    assert pipeline.schedule.config.warmup_steps == 3


def test_a_fault_in_a_set_value_is_told_with_the_argument(base: Path) -> None:
    message = refusal(base, "run.seed=-1", "run.maxsteps=3")
    assert "--set run.seed=-1  run.seed\n  -1 must be at least 0" in message
    assert "--set run.maxsteps=3  run.maxsteps\n" in message
    assert "did you mean 'max_steps'?" in message


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("run.seed", "has the form"),
        ("=3", "has the form"),
        ("run..seed=3", "has the form"),
        ("run.seed.=3", "has the form"),
        ("run seed=3", "has the form"),
        ("run[a]=3", "has the form"),
        ("run.seed=[1", "not valid YAML"),
        ("run.seed={a: 1", "not valid YAML"),
        ("run.seed={a: 1, a: 2}", "twice"),
        ("run.seed=", "no value after the equals sign"),
        ("run.seed=   ", "no value after the equals sign"),
        ("run.name=a\0b", "U\\+0000 is not allowed"),
        ("run.seed=1e999", "too large"),
        ("gradients[2].with.alpha=1", r"there is no entry \[2\] \(the list has 2 entries\)"),
        ("gradients[2]={use: grokfast}", r"there is no entry \[2\]"),
        ("run[0]=3", r"there is no entry \[0\]"),
        ("run.seed.x=3", "its parent is not a mapping"),
        ("gradients.use=grokfast", "its parent is not a mapping"),
        ("extends=other.yaml", "only a file can say what it extends"),
        ("a\x1b[2Jb=3", "has the form"),
    ],
)
def test_a_set_that_has_no_place_is_refused(base: Path, setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        read_document(base, [setting])
    (fault,) = caught.value.faults
    assert fault.mark is not None
    assert (fault.mark.source, fault.mark.line) == (f"--set {setting}", 0)


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("a", ("a",)),
        ("a.b", ("a", "b")),
        ("a[0].b", ("a", 0, "b")),
        ("a[0][12]", ("a", 0, 12)),
        ("x-note.my-key_2", ("x-note", "my-key_2")),
        ("", None),
        (".", None),
        ("a.", None),
        (".a", None),
        ("a b", None),
        ("a[", None),
        ("a[-1]", None),
        ("a[0]b", None),
        ("a[99999]", None),
        ("ä", None),
    ],
)
def test_a_key_has_one_form(text: str, path: tuple[Any, ...] | None) -> None:
    assert parse_key(text) == path


def test_a_part_that_is_replaced_takes_its_old_places_with_it() -> None:
    document = parse_yaml("a: {b: [1, 2, 3]}\n", "test")
    apply_settings(document, ["a.b=4"])
    assert document.data == {"a": {"b": 4}}
    assert {path for path in document.values if path[:2] == ("a", "b")} == {("a", "b")}
    assert document.mark(("a", "b")).source == "--set a.b=4"
    assert look_up(document.data, ("a", "b")) == 4


@pytest.mark.parametrize("path", [("a", 2), ("a", -1), ("b",), ("a", "0"), ("a", 0, "c"), (0,)])
def test_where_there_is_nothing_a_look_up_says_so(path: tuple[Any, ...]) -> None:
    data = {"a": [{"b": 1}, 2]}
    assert [look_up(data, one) for one in ((), ("a", 1), ("a", 0, "b"))] == [data, 2, 1]
    with pytest.raises(KeyError):
        look_up(data, path)


def test_what_a_program_hands_in_need_not_be_named(base: Path) -> None:
    base.write_text(BASE.replace("model: {use: mlp, with: {hidden: [8, 4], dropout: 0.5}}\n", ""))
    assert "the key 'model' is missing" in refusal(base)
    assert load_pipeline(base, live=[Kind.MODEL]).model is None


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("a" * 60, "a" * 60), ("a" * 61, "a" * 57 + "..."), ("a\x1b[2J", "a\\x1b[2J"),
        ("é漢", "é漢"), ("a\nb", "a\\nb"),
    ],
)  # fmt: skip
def test_a_word_of_the_users_is_shown_in_bounds_and_obeyed_by_no_terminal(
    word: str, shown: str
) -> None:
    assert show_path((word, 3, "x")) == f"{shown}[3].x"


def test_what_set_makes_on_its_way_has_its_place(base: Path) -> None:
    """Red when a fault in a section that `--set` has begun points nowhere."""
    document = apply_settings(read_layers(base), ["schedule.with.warmup_steps=3"])
    assert document.mark(("schedule", "with")).source.startswith("--set schedule.with.warmup")
    assert document.mark(("schedule",)).source.startswith("--set schedule.with.warmup")
