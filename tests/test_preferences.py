"""Preferences: what they pick on fronts with known answers, and the words for those that contradict themselves."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import Ecotone
from safetensors.numpy import save_file

from ecotone.experiments.preferences import choose, in_words, parse, shortfalls
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal, oriented

GOALS = (Goal("a"), Goal("b"))
#  A concave knee that no weighted sum of normalised scores picks, between two ends.
FRONT = np.array([[1.0, 0.0], [0.4, 0.4], [0.0, 1.0]])


def pick(text: str, points: np.ndarray = FRONT, goals: tuple[Goal, ...] = GOALS) -> int:
    return choose(points, goals, parse(text, goals))


@pytest.mark.parametrize(
    ("text", "expected"), [("a=0.7,b=0.3", 0), ("a=0.3, b=0.7", 2), ("b=1", 2), ("a=1,b=1", 0), ("a=5", 0)]
)
def test_weights_pick_the_best_weighted_sum_and_the_first_of_equals(text: str, expected: int) -> None:
    assert pick(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("at:a=0.5,b=0.5", 1), ("at:a=0.9,b=0.05", 0), ("at:a=0.0,b=0.9", 2), ("at:a=0.9", 0), (" at: b=1 ", 2)],
)
def test_a_point_to_reach_also_picks_members_inside_the_hull(text: str, expected: int) -> None:
    assert pick(text) == expected


@given(st.integers(0, 2**32), st.floats(0.1, 1000), st.floats(-5, 5))
def test_a_choice_depends_on_no_objectives_unit(seed: int, scale: float, shift: float) -> None:
    points = np.random.default_rng(seed).random((8, 2))
    other = points * [scale, 1.0] + [shift, 0.0]
    for text in ("a=0.6,b=0.4", "a=2"):
        assert pick(text, points) == pick(text, other)
    aim = f"at:a={0.7 * scale + shift!r},b=0.6"
    assert pick("at:a=0.7,b=0.6", points) == pick(aim, other)


@given(st.integers(0, 2**32), st.floats(0.01, 100))
def test_scaling_all_weights_changes_nothing(seed: int, scale: float) -> None:
    points = np.random.default_rng(seed).random((8, 2))
    assert pick("a=0.6,b=0.4", points) == pick(f"a={0.6 * scale!r},b={0.4 * scale!r}", points)


def test_minimised_objectives_are_stated_in_their_own_units() -> None:
    goals = (Goal("accuracy"), Goal("loss", "minimize"))
    members = [{"accuracy": 0.9, "loss": 2.0}, {"accuracy": 0.8, "loss": 1.0}, {"accuracy": 0.6, "loss": 0.5}]
    points = np.array([oriented(scores, goals) for scores in members])
    assert pick("loss=1", points, goals) == 2  # a weight is how much it matters
    assert pick("at:accuracy=0.75,loss=1.2", points, goals) == 1
    wanted = parse("at:accuracy=0.95,loss=1.5", goals)
    chosen = choose(points, goals, wanted)
    missing = shortfalls(points[chosen], goals, wanted)
    assert chosen == 0
    assert missing == pytest.approx({"accuracy": 0.05, "loss": 0.5})
    assert in_words(wanted, missing).startswith("no member reaches at:accuracy=0.95,loss=1.5")


def test_a_point_within_reach_is_said_to_be_reached() -> None:
    wanted = parse("at:a=0.3,b=0.4", GOALS)
    assert shortfalls(FRONT[choose(FRONT, GOALS, wanted)], GOALS, wanted) == {}
    assert in_words(wanted, {}).startswith("reaches at:a=0.3,b=0.4")


def test_an_objective_in_which_all_are_equal_decides_nothing() -> None:
    points = np.array([[0.5, 0.1], [0.5, 0.9]])
    assert pick("a=0.9,b=0.1", points) == 1
    assert pick("at:a=0.2,b=0.5", points) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected OBJECTIVE=NUMBER, found ''"),
        ("0.7", "expected OBJECTIVE=NUMBER, found '0.7'"),
        ("a=0.7,", "expected OBJECTIVE=NUMBER, found ''"),
        ("=0.7", "expected OBJECTIVE=NUMBER"),
        ("a=0.7,c=0.3", "no objective 'c'"),
        ("a=0.7,a=0.3", "expected 'a' once, found it twice"),
        ("a=-1,b=2", "expected weights of 0 or more, found -1 for 'a'"),
        ("a=0,b=0", "at least one weight above 0"),
        ("a=much", "expected a number for 'a', found 'much'"),
        ("a=nan", "expected a number for 'a'"),
        ("a=0.7,at:b=0.3", "found both"),
        ("at:", "expected OBJECTIVE=NUMBER, found ''"),
        ("at:a=0.1,at:b=0.2", "found both"),
    ],
)
def test_contradictory_preferences_are_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(InputError) as refused:
        parse(text, GOALS)
    assert words in refused.value.message
    assert refused.value.remedy


def test_a_misspelt_objective_is_told_its_nearest_name() -> None:
    with pytest.raises(InputError, match="Did you mean 'accuracy'"):
        parse("acuracy=1", (Goal("accuracy"), Goal("loss")))


def test_an_empty_front_has_nothing_to_choose() -> None:
    with pytest.raises(InputError, match="nothing to choose from"):
        pick("a=1", np.zeros((0, 2)))


# -- on the command line -------------------------------------------------------------------------------------


TOYS = '''
import numpy as np

def near(model, target):
    """How near all weights are to a target: two targets make two objectives."""
    return float(np.exp(-abs(np.mean([tensor.mean() for tensor in model.values()]) - target)))
'''


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose merges trade nearness to 0 off against nearness to 1."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "preference_toys.py").write_text(TOYS)
    for name, value in (("zero", 0.0), ("one", 1.0)):
        save_file({"w": np.full((4, 2), value, np.float32)}, folder / f"{name}.safetensors")
    objectives = [
        {"name": name, "type": "call", "call": "preference_toys:near", "arguments": {"target": target}}
        for name, target in (("zero", 0.0), ("one", 1.0))
    ]
    recipe = {
        "name": "toy",
        "models": {"experts": [str(folder / "zero.safetensors"), str(folder / "one.safetensors")]},
        "objectives": {"search": objectives},
        "search": {"algorithm": "random"},
        "budget": {"evaluations": 24},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    before = list(sys.path)
    launch(Recipe.from_record(recipe), folder / "run", folders=(str(folder),))
    sys.path[:] = before
    return folder / "run"


def test_a_preference_marks_and_exports_a_member(ecotone: Ecotone, finished: Path, tmp_path: Path) -> None:
    said = ecotone("front", finished, "--preference", "zero=1", "--json")
    front = said.json
    best = max(front["members"], key=lambda member: member["scores"]["zero"])
    assert said.code == 0
    assert front["chosen"]["id"] == best["id"]
    assert front["chosen"]["export"] == f"ecotone export {finished} --member {best['id']} --to merged-{best['id']}"
    assert front["hypervolume"] > 0
    assert front["reference_point"] == {"zero": 0.0, "one": 0.0}
    said = ecotone("front", finished, "--preference", "at:zero=2,one=2", "--reference", "one=0.1")
    assert said.code == 0
    assert "no member reaches at:zero=2,one=2" in said.out
    assert "reference point zero=0, one=0.1" in said.out
    assert "> " in said.out
    said = ecotone("export", finished, "--preference", "zero=1", "--to", tmp_path / "merged", "--json")
    assert said.code == 0
    assert said.json["member"] == best["id"]
    assert (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("front", "RUN", "--preference", "zro=1"), "Did you mean 'zero'?"),
        (("export", "RUN", "--preference", "zero=-1", "--to", "NEW"), "weights of 0 or more"),
        (("export", "RUN", "--preference", "zero=1", "--member", "3", "--to", "NEW"), "found both"),
        (("front", "RUN", "--reference", "zero"), "--reference: expected OBJECTIVE=NUMBER"),
    ],
)
def test_a_preference_that_cannot_be_followed_ends_in_words(
    ecotone: Ecotone, finished: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    places = {"RUN": finished, "NEW": tmp_path / "new"}
    said = ecotone(*(places.get(argument, argument) for argument in arguments))
    assert said.code == 1
    assert words in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "new").exists()
