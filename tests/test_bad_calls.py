"""Bad values for every parameter of every public callable: each is refused by name, and nothing global changes."""

from __future__ import annotations

import fnmatch
import random
from collections.abc import Iterable

import pytest
from bad_by_design import BY_DESIGN, KNOWN
from bad_calls import Call, _quiet, accepts_numpy, calls, judge, public, targets
from bad_values import KINDS, drawn, kind_of
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.filterwarnings("ignore")


def _known(call: Call) -> bool:
    return any(fnmatch.fnmatchcase(str(call), pattern) for pattern in KNOWN)


def _judged(chosen: Iterable[Call]) -> dict[str, str]:
    """What is wrong, by call; empty where the answer is right."""
    return {str(call): judge(call) for call in chosen}


def _unknown(found: dict[str, str]) -> dict[str, str]:
    stand = [name for name in found if any(fnmatch.fnmatchcase(name, pattern) for pattern in KNOWN)]
    return {name: wrong for name, wrong in found.items() if wrong and name not in stand}


def _mended(found: dict[str, str]) -> list[str]:
    """Entries of `KNOWN` under which nothing is wrong any more, or nothing stands."""
    wrong = [name for name, answer in found.items() if answer]
    return [pattern for pattern in KNOWN if not fnmatch.filter(wrong, pattern)]


def test_every_public_callable_is_called() -> None:
    """What is made public without a valid call here, or without a reason to have none, is noticed."""
    assert set(public()) == {target.name for target in targets()} - {"PrincipalComponents.codes"}


def test_every_parameter_has_a_kind() -> None:
    kinds = {kind_of(parameter) for target in targets() for parameter in target.parameters()}
    assert kinds == set(KINDS), "a kind that no parameter has is dead; one that is not listed has no values"


def test_a_sample_of_bad_calls_is_refused_by_name() -> None:
    """One value for each parameter, the same ones each time; all of them are in the slow test."""
    by_parameter: dict[str, list[Call]] = {}
    for call in calls():
        by_parameter.setdefault(f"{call.target.name}.{call.parameter.name}", []).append(call)
    chance = random.Random(0)
    found = _judged(chance.choice(those) for those in by_parameter.values())
    assert len(found) > 280
    assert not _unknown(found)


@pytest.mark.slow
def test_numbers_of_numpy_serve_where_those_of_python_do() -> None:
    refused = []
    for target, name, value in accepts_numpy():
        try:
            with _quiet():
                target.call(**{name: value})
        except Exception as error:
            refused.append(f"{target.name}({name}={value!r}): {error}")
    assert not refused


@pytest.mark.slow
def test_all_bad_calls_are_refused_by_name() -> None:
    found = _judged(calls())
    assert len(found) > 4000
    assert not _unknown(found)
    assert not _mended(found), "strike these from KNOWN"


@pytest.mark.slow
def test_drawn_values_are_refused_by_name() -> None:
    """Values that nobody thought of, for parameters chosen at random; the draws follow a fixed seed."""
    places = [(target, parameter) for target in targets() for parameter in target.parameters()]

    @seed(0)
    @settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def draw(data: st.DataObject) -> None:
        target, parameter = data.draw(st.sampled_from(places))
        value = data.draw(drawn(parameter))
        call = Call(target, parameter, repr(value), lambda: value)
        if not _known(call):
            assert judge(call) == "", str(call)

    draw()


def test_the_tables_of_exceptions_give_reasons() -> None:
    assert all(len(reason) > 10 for reason in (*BY_DESIGN.values(), *KNOWN.values()))
    assert not set(BY_DESIGN) & set(KNOWN)
