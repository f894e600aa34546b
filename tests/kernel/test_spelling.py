"""The nearest name to a misspelt one."""

from __future__ import annotations

import string
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from forge_kernel.config.pipeline import PipelineConfig
from forge_kernel.config.spelling import did_you_mean, edit_distance, nearest
from forge_kernel.contract.run_config import RunConfig

QUICK = settings(deadline=None, max_examples=200)
WORDS = st.text("abcd_", max_size=7)
NAMES = sorted({*RunConfig.__annotations__, *PipelineConfig.__annotations__, "lr", "use", "with"})


@cache
def by_definition(left: str, right: str) -> int:
    """Optimal string alignment, as it is defined."""
    if not left or not right:
        return len(left) + len(right)
    found = min(
        by_definition(left[:-1], right) + 1,
        by_definition(left, right[:-1]) + 1,
        by_definition(left[:-1], right[:-1]) + (left[-1] != right[-1]),
    )
    if left[-2:] == right[-2:][::-1] and len(left) > 1 and len(right) > 1:
        found = min(found, by_definition(left[:-2], right[:-2]) + 1)
    return found


@QUICK
@given(WORDS, WORDS)
def test_the_distance_is_what_its_definition_says(left: str, right: str) -> None:
    assert edit_distance(left, right) == by_definition(left, right)


@QUICK
@given(WORDS, WORDS)
def test_the_distance_is_the_same_both_ways_and_zero_only_to_itself(left: str, right: str) -> None:
    assert edit_distance(left, right) == edit_distance(right, left)
    assert (edit_distance(left, right) == 0) == (left == right)


@st.composite
def misspelt(draw: st.DrawFn) -> tuple[str, str]:
    """A known name, and the same with one typing mistake."""
    name = draw(st.sampled_from(NAMES))
    at = draw(st.integers(0, len(name) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    forms = [
        name[:at] + letter + name[at:],
        name[:at] + letter + name[at + 1 :],
        name[:at] + name[at + 1 :],
        name[:at] + name[at : at + 2][::-1] + name[at + 2 :],
        name[:at] + name[at].upper() + name[at + 1 :],
    ]
    return name, draw(st.sampled_from(forms))


@QUICK
@given(misspelt())
def test_a_name_with_one_mistake_is_found_unless_another_is_as_near(pair: tuple[str, str]) -> None:
    name, written = pair
    assume(len(written) > 1)
    distances = {known: edit_distance(written.lower(), known) for known in NAMES}
    rivals = [known for known in NAMES if distances[known] <= distances[name] and known != name]
    assume(not rivals)
    assert nearest(written, NAMES)[0] == name


@QUICK
@given(st.text(max_size=8), st.lists(st.text(max_size=8), max_size=6, unique=True))
def test_the_nearest_come_first_and_are_known(name: str, known: list[str]) -> None:
    found = nearest(name, known)
    distances = [edit_distance(name.lower(), other.lower()) for other in found]
    assert set(found) <= set(known)
    assert distances == sorted(distances)
    assert len(found) <= 3


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("sede", "seed"),
        ("maxsteps", "max_steps"),
        ("max-steps", "max_steps"),
        ("MAX_STEPS", "max_steps"),
        ("optimiser", "optimizer"),
        ("rl", "lr"),
        ("lrr", "lr"),
        ("wiht", "with"),
        ("validate_evrey", "validate_every"),
        ("gradiants", "gradients"),
    ],
)
def test_usual_mistakes_are_seen_through(written: str, meant: str) -> None:
    assert nearest(written, NAMES)[0] == meant


@pytest.mark.parametrize("written", ["", "x", "qq", "telephone", "k" * 10_000])
def test_nothing_is_offered_for_what_resembles_nothing(written: str) -> None:
    assert nearest(written, NAMES) == []
    assert did_you_mean(written, NAMES) == ()


def test_names_that_are_equally_near_are_offered_together() -> None:
    assert did_you_mean("adamx", ["sgd", "adamw", "adamy"]) == ("did you mean 'adamw' or 'adamy'?",)
