"""One stable order: constraints are kept, bystanders keep their places, a ring is named."""

from __future__ import annotations

import graphlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_kernel.planning.order import CycleError, stable_order

QUICK = settings(deadline=None, max_examples=200)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[str], dict[str, list[str]]]:
    """Names in an order, and for some of them those that they come after."""
    names = draw(st.permutations([f"n{number}" for number in range(draw(st.integers(0, 8)))]))
    known = st.sampled_from([*names, "unknown"])
    after = draw(st.dictionaries(st.sampled_from([*names, "x"]), st.lists(known, max_size=3)))
    return names, after


def is_ring(names: list[str], after: dict[str, list[str]]) -> bool:
    """Whether the constraints contradict each other, by another's hand."""
    graph = {name: {o for o in after.get(name, ()) if o in names} for name in names}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError:
        return True
    return False


def attempt(names: list[str], after: dict[str, list[str]]) -> list[str] | None:
    try:
        return stable_order(names, after)
    except CycleError:
        return None


@QUICK
@given(problems())
def test_every_constraint_is_kept_and_nobody_is_lost(
    problem: tuple[list[str], dict[str, list[str]]],
) -> None:
    names, after = problem
    found = attempt(names, after)
    if found is None:
        assert is_ring(names, after)
        return
    assert sorted(found) == sorted(names)
    for name in names:
        for other in after.get(name, ()):
            if other in names:
                assert found.index(other) < found.index(name)


@QUICK
@given(problems())
def test_what_is_in_order_already_stays_as_it_is(
    problem: tuple[list[str], dict[str, list[str]]],
) -> None:
    names, after = problem
    found = attempt(names, after)
    if found is not None:
        assert stable_order(found, after) == found


@QUICK
@given(problems())
def test_bystanders_keep_their_places_among_each_other(
    problem: tuple[list[str], dict[str, list[str]]],
) -> None:
    names, after = problem
    found = attempt(names, after)
    if found is None:
        return
    pulled = {other for name in names for other in after.get(name, ())}
    bystanders = [name for name in names if name not in pulled]
    assert [name for name in found if name in bystanders] == bystanders


@QUICK
@given(problems())
def test_the_ring_that_is_named_is_one(
    problem: tuple[list[str], dict[str, list[str]]],
) -> None:
    names, after = problem
    if not is_ring(names, after):
        return
    with pytest.raises(CycleError) as caught:
        stable_order(names, after)
    cycle = caught.value.cycle
    assert cycle[0] == cycle[-1]
    assert len(set(cycle)) == len(cycle) - 1
    for name, other in itertools.pairwise(cycle):
        assert other in after[name]
    assert str(caught.value) == " -> ".join(cycle)


def test_a_predecessor_is_pulled_forward_and_nothing_else_moves() -> None:
    assert stable_order(["a", "b", "c", "d", "e"], {"b": ["d"]}) == ["a", "d", "b", "c", "e"]


@pytest.mark.parametrize("wanted", list(itertools.permutations("abd")))
def test_predecessors_of_one_come_in_their_given_order(wanted: tuple[str, ...]) -> None:
    """However the one that follows them names them."""
    assert stable_order(list("zabcd"), {"z": wanted}) == list("abdzc")


def test_a_predecessor_named_twice_counts_once() -> None:
    assert stable_order(["a", "b"], {"a": ["b", "b"]}) == ["b", "a"]


def test_one_that_follows_itself_is_a_ring() -> None:
    with pytest.raises(CycleError) as caught:
        stable_order(["a", "b"], {"b": ["b"]})
    assert caught.value.cycle == ("b", "b")


def test_a_long_chain_is_sorted_without_recursion() -> None:
    names = [f"n{number}" for number in range(2000)]
    after = {name: [other] for name, other in itertools.pairwise(names)}
    assert stable_order(names, after) == names[::-1]
