"""Comparing runs: numbers with known answers, what is refused, and a page that works without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html import unescape
from itertools import starmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import Ecotone

from ecotone.experiments.compare import compare, search_seconds
from ecotone.experiments.pages import page
from ecotone.experiments.runs import Run, front_rows, reference_point
from ecotone.populations.errors import InputError
from ecotone.populations.facts import Note
from ecotone.populations.fronts import non_dominated
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal, Row
from ecotone.populations.trial import Evaluation, Goal, Scores, Trial

AB = [["a", "maximize"], ["b", "maximize"]]
MODELS = ["left", "right"]
# Front (0.2, 0.6), (0.4, 0.4), (0.6, 0.2) after four evaluations: hypervolumes .04, .16, .20, .24 from the origin.
STAIRS = [(0.2, 0.2), (0.4, 0.4), (0.6, 0.2), (0.2, 0.6)]
GOOD = [(0.1, 0.1), (0.8, 0.4), (0.4, 0.8)]  # .01, .32, .48


def genome(number: int) -> Genome:
    return Genome.uniform(10, [number / 10, 1 - number / 10])


def write_run(
    directory: Path,
    points: Sequence[Sequence[float] | None],
    goals: Sequence[Sequence[str]] = AB,
    genomes: Any = genome,
    held_out: Sequence[Sequence[str]] = (),
    seeds: Mapping[str, Sequence[float]] = {},
    **facts: Any,
) -> Run:
    """A finished run whose trials scored ``points``; None is a failure."""
    recipe = {"objectives": {"search": goals}, "search": {"algorithm": facts.get("algorithm", "random")}}
    record = {
        "name": "toy",
        "algorithm": "random",
        "seed": "0",
        "goals": json.dumps(goals),
        "held_out_goals": json.dumps(held_out),
        "models": json.dumps(MODELS),
        "recipe": json.dumps({**recipe, "seed": facts.get("seed", "0"), **facts.pop("recipe", {})}),
        "state": "finished",
        "elapsed": "100.0",
        **facts,
    }

    def evaluation(point: Sequence[float] | None) -> Evaluation:
        if point is None:
            return Evaluation.failed("exception", "no luck")
        return Evaluation({name: float(value) for (name, _), value in zip(goals, point, strict=True)})

    with Journal.create(directory / "journal.sqlite", starmap(Note, record.items())) as journal:
        for number, point in enumerate(points):
            trial = Trial(number, genomes(number))
            journal.asked(number, 1, [trial])
            journal.arrived([(trial, evaluation(point))])
            journal.told(number)
            journal.keep([trial], [])
            if held_out and point is not None:
                scores = {name: value / 2 for (name, _), value in zip(held_out, point, strict=True)}
                journal.measured(trial.genome, Scores("held_out"), Evaluation(scores))
        for index, (name, point) in enumerate(seeds.items()):
            merge = Genome.uniform(10, [index + 5, 0])
            journal.refer(name, merge)
            journal.measured(merge, Scores(), evaluation(point))
    return Run(directory)


@pytest.fixture
def two(tmp_path: Path) -> list[Run]:
    return [
        write_run(tmp_path / "stairs", STAIRS, held_out=AB),
        write_run(tmp_path / "good", GOOD, held_out=AB, algorithm="map"),
    ]


# -- the numbers ---------------------------------------------------------------------------------------------


def test_a_comparison_of_two_runs_has_known_numbers(two: list[Run]) -> None:
    found = compare(two, reach="50%")
    good, stairs = (line.record() for line in found.lines)
    assert (good["label"], stairs["label"]) == ("good", "stairs")  # the largest hypervolume first
    assert found.reference_point == {"a": 0.0, "b": 0.0}
    assert [good["hypervolume"], stairs["hypervolume"]] == pytest.approx([0.48, 0.24])
    assert [good["share_of_best"], stairs["share_of_best"]] == pytest.approx([1.0, 0.5])
    assert found.target == pytest.approx(0.24)
    assert (good["evaluations_to_reach"], stairs["evaluations_to_reach"]) == (2, 4)
    assert (good["front_size"], stairs["front_size"]) == (2, 3)
    # The union front is GOOD's: (0.8, 0.4) and (0.4, 0.8), its range 0.4 in both; (0.6, 0.2) and (0.4, 0.4) are both
    # 0.4 or sqrt(0.2**2 + 0.2**2) away from (0.8, 0.4), the nearer of which counts.
    assert [(label, member.id) for label, member in found.union] == [("good", 1), ("good", 2)]
    assert (good["igd_plus"], good["epsilon"]) == (0.0, 0.0)
    assert stairs["igd_plus"] == pytest.approx(np.sqrt(0.08) / 0.4)
    assert stairs["epsilon"] == pytest.approx(0.2 / 0.4)
    # Held-out scores are halves.
    assert [good["held_out_hypervolume"], stairs["held_out_hypervolume"]] == pytest.approx([0.12, 0.06])


def test_the_user_sets_the_reference_point_and_the_hypervolume_to_reach(two: list[Run]) -> None:
    found = compare(two, reference="b=0.2, a=0.1", reach="0.2")
    good, stairs = found.lines
    assert found.reference_point == {"a": 0.1, "b": 0.2}
    # (0.2, 0.6) and (0.4, 0.4) above (0.1, 0.2): .1 x .4 + .2 x .2; the other lies on the border.
    assert stairs.hypervolume == pytest.approx(0.08)
    assert good.hypervolume == pytest.approx(0.3 * 0.6 + 0.4 * 0.2)
    assert found.target == 0.2
    assert (good.evaluations_to_reach, stairs.evaluations_to_reach, stairs.seconds_to_reach) == (3, None, None)
    assert found.held_out_reference == {"a": 0.1, "b": 0.2}


def test_failed_evaluations_cost_what_others_cost(tmp_path: Path) -> None:
    (line,) = compare([write_run(tmp_path / "run", [None, (0.2, 0.2), None, (0.5, 0.5)])], reach="100%").lines
    assert line.record()["evaluations"] == 4
    assert line.evaluations_to_reach == 4
    assert line.volumes == pytest.approx([0.04, 0.25])


def test_minimised_objectives_are_measured_from_the_worst_seed_model(tmp_path: Path) -> None:
    goals = [["a", "maximize"], ["loss", "minimize"]]
    seeds = {"left": (0.5, 3.0), "right": (0.2, 2.0)}
    found = compare([write_run(tmp_path / "run", [(0.5, 1.0), (0.8, 2.0), (0.9, 50.0)], goals, seeds=seeds)])
    assert found.reference_point == {"a": 0.0, "loss": 3.0}  # an outlier of 50 does not stretch the scale
    assert found.lines[0].hypervolume == pytest.approx(0.5 * 2 + 0.3 * 1)
    given = compare([found.lines[0].searched.run], reference="loss=4")
    assert given.reference_point == {"a": 0.0, "loss": 4.0}
    assert given.lines[0].hypervolume == pytest.approx(0.5 * 3 + 0.3 * 2)


def test_without_seed_models_the_worst_of_everything_is_the_reference() -> None:
    goals = [Goal("margin"), Goal("share")]
    points = np.array([[-3.0, 0.5], [2.0, 0.1]])
    assert reference_point(points, np.zeros((0, 2)), goals).tolist() == [-3.0, 0.0]
    assert reference_point(np.zeros((0, 2)), np.zeros((0, 2)), [Goal("a"), Goal("b", "minimize")]).tolist() == [0, 0]


def test_objectives_may_be_listed_in_another_order(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", STAIRS)
    second = write_run(tmp_path / "second", [(b, a) for a, b in STAIRS], AB[::-1])
    lines = compare([first, second], reference="a=0.1,b=0").lines
    assert lines[0].hypervolume == pytest.approx(lines[1].hypervolume)


def test_a_run_given_twice_counts_once(two: list[Run]) -> None:
    assert len(compare([*two, Run(two[0].directory)]).lines) == 2


def test_status_has_the_same_hypervolume(two: list[Run]) -> None:
    status = two[0].status()
    assert status["hypervolume"] == pytest.approx(0.24)
    assert status["reference_point"] == {"a": 0.0, "b": 0.0}


def test_time_that_a_run_was_stopped_for_does_not_count() -> None:
    def row(number: int, clock: float) -> Row:
        return Row(number, "", (), {}, None, 0.0, clock)

    steady = search_seconds([row(i, 1000.0 + 2 * (i + 1)) for i in range(5)], 1000.0, 10.0)
    assert steady == pytest.approx([2, 4, 6, 8, 10])
    clocks = [1002.0, 1004.0, 1007.0, 5009.0, 5011.0]  # stopped for 4000 s after the third
    paused = search_seconds([row(i, clock) for i, clock in enumerate(clocks)], 1000.0, 11.0)
    assert paused == pytest.approx([2, 4, 7, 9, 11])
    late = search_seconds([row(0, 1006.0), row(1, 1002.0), row(2, 1008.0)], 1000.0, 8.0)
    assert late == pytest.approx([6, 6, 8])  # the second was there early, but counted only after the first


def test_the_front_of_a_journal_is_moocores(tmp_path: Path) -> None:
    points: list[Any] = np.random.default_rng(3).integers(0, 6, (200, 3)).tolist()
    points[::9] = [None] * len(points[::9])  # failed
    run = write_run(tmp_path / "run", points, goals_of(3))
    scored = [number for number, point in enumerate(points) if point is not None]
    signs = [1, -1, 1]
    kept = non_dominated(np.array([points[number] for number in scored]) * signs)
    with run.journal() as journal:
        found = [row.number for row in front_rows(list(journal.rows()), run.goals)]
    assert found == [number for number, keep in zip(scored, kept, strict=True) if keep]


# -- groups and notes ----------------------------------------------------------------------------------------


def test_seeds_of_one_search_are_grouped_with_their_median_front(tmp_path: Path) -> None:
    fronts = [[(0.2, 0.2)], [(0.4, 0.4)], [(0.6, 0.6)]]
    runs = [
        write_run(tmp_path / f"m{seed}", points, seed=str(seed), algorithm="map") for seed, points in enumerate(fronts)
    ]
    runs += [write_run(tmp_path / f"r{seed}", [(0.1, 0.1)], seed=str(seed)) for seed in range(2)]
    other = write_run(tmp_path / "alone", [(0.3, 0.3)], seed="9", algorithm="map", recipe={"scoring": {"batch": 2}})
    found = compare([*runs, other], reach="0.16")
    assert [group.label for group in found.groups] == ["map", "random"]
    record = found.groups[0].record()
    assert record["runs"] == ["m0", "m1", "m2"]
    assert record["hypervolume"] == pytest.approx({"median": 0.16, "low": 0.04, "high": 0.36})
    assert record["median_front_hypervolume"] == pytest.approx(0.16)
    assert (record["reached"], record["evaluations_to_reach"]) == (2, 1)
    assert found.groups[1].record()["reached"] == 0
    assert found.groups[1].record()["evaluations_to_reach"] is None
    # Of two seeds, what most reach is what both reach.
    assert found.groups[1].surface.tolist() == [[0.1, 0.1]]


def test_what_makes_runs_less_alike_is_said(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", STAIRS, geometry="[[1]]", held_out=AB)
    second = write_run(tmp_path / "second", STAIRS, geometry="[[2]]", state="running", held_out=[["c", "maximize"]] * 2)
    third = write_run(tmp_path / "third", STAIRS, geometry="[[1]]", recipe={"objectives": {"search": "others"}})
    found = compare([first, second, third])
    notes = "\n".join(found.notes)
    assert "third: other objectives than first" in notes
    assert "second: other weights than first" in notes
    assert "Not finished: second (running)." in notes
    assert "held-out objectives differ" in notes
    assert all(line.held_out_hypervolume is None for line in found.lines)
    assert not compare([first]).notes


def test_runs_of_equal_directory_names_are_told_apart(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / str(i) / "run", STAIRS) for i in range(2)]
    labels = {line.searched.label for line in compare(runs).lines}
    assert labels == {str(run.directory) for run in runs}


# -- what searches with surrogates report ------------------------------------------------------------------------


def told(number: int, predicted: tuple[float, float], measured: tuple[float, float] | None) -> dict[str, Any]:
    both = {"predicted": predicted, "std": (0.01, 0.02), "measured": measured}
    return {
        "number": number,
        **{key: None if two is None else dict(zip("ab", two, strict=True)) for key, two in both.items()},
    }


def test_a_front_is_shown_as_predicted_and_as_measured(ecotone: Ecotone, tmp_path: Path) -> None:
    report = {
        "links": {"a": "sigmoid", "b": "identity"},
        "leave_one_out": {"a": 0.0123, "b": None},
        "gap": {"a": {"mean": -0.1, "rms": 0.1}, "b": {"mean": 0.0, "rms": 0.0321}},
        "members": [told(1, (0.5, 0.4), (0.4, 0.4)), told(2, (0.7, 0.1), None)],
    }
    run = write_run(tmp_path / "run", STAIRS, report=json.dumps(report))
    said = ecotone("front", run.directory).out
    for words in ("0.0123", "sigmoid", "-0.1000", "0.0321", "0.5000 ±0.010", "0.7000 ±0.010"):
        assert words in said
    assert "Hypervolume of the front as predicted 0.2000; of the same members as measured 0.1600." in said
    assert ecotone("front", run.directory, "--json").json["report"] == report
    text = page(compare([run]))
    assert "Open circles: a search's predictions" in text
    assert "The search of run" in text
    assert "The search of" not in page(compare([write_run(tmp_path / "plain", STAIRS)]))


def test_nested_map_shows_its_tree(ecotone: Ecotone, tmp_path: Path) -> None:
    def leaf(name: str, number: int) -> dict[str, Any]:
        return {"models": [name], "number": number, "scores": {"a": 0.25, "b": 0.5}, "value": 0.4}

    root = {
        **leaf("left", 4),
        "models": ["left", "right"],
        "children": [leaf("left", 0), {**leaf("right", 1), "scores": None}],
        "shares": [0.75, 0.5],
        "leave_one_out": {"a": 0.0123, "b": None},
        "members": [
            {"number": 2, "predicted": [0.5, 0.5], "measured": [0.8, 0.1]},
            {"number": 3, "predicted": [0.5, 0.5], "measured": None},
        ],
    }
    run = write_run(tmp_path / "run", STAIRS, report=json.dumps({"tree": [root]}))
    said = ecotone("front", run.directory).out
    assert "left + right (member 4): a=0.25, b=0.5" in said
    assert "0.750 of left and 0.500 of right" in said
    assert "leave-one-out errors a 0.0123, b -; gap to the predicted front 0.3536 (rms)" in said
    assert re.search(r"├── left \(member 0\)[^\n]*\n *└── right \(member 1\): failed", said)
    assert "├── left (member 0)" in page(compare([run]))


# -- what is refused -----------------------------------------------------------------------------------------


def test_runs_of_other_objectives_are_refused(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", STAIRS)
    for index, goals in enumerate(([["a", "maximize"], ["c", "maximize"]], [["a", "maximize"], ["b", "minimize"]])):
        other = write_run(tmp_path / f"other{index}", STAIRS, goals)
        with pytest.raises(InputError, match=r"other\d: its objectives are a \(maximize\), .* those of .*first are"):
            compare([first, other])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"reference": "a=0,c=0"}, "--reference: there is no objective 'c'"),
        ({"reference": "0,0"}, "--reference: expected OBJECTIVE=NUMBER, found '0'"),
        ({"reach": "120%"}, "--reach: expected a share"),
        ({"reach": "much"}, "--reach: expected a share"),
        ({"reach": "-1"}, "--reach: expected a share"),
        ({"reach": "nan"}, "--reach: expected a share"),
    ],
)
def test_options_that_cannot_be_read_are_refused(two: list[Run], options: dict[str, str], words: str) -> None:
    with pytest.raises(InputError) as refused:
        compare(two, **options)
    assert words in refused.value.message
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("points", "words"),
    [([], "nothing has been scored yet"), ([None, None], "none of its 2 evaluations has scores")],
)
def test_a_run_without_a_front_is_refused(tmp_path: Path, points: list[None], words: str) -> None:
    with pytest.raises(InputError, match=f"run: there is no front, as {words}"):
        compare([write_run(tmp_path / "run", points)])


def test_no_runs_at_all_are_refused() -> None:
    with pytest.raises(InputError, match="at least one run"):
        compare([])


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_json_and_a_page(ecotone: Ecotone, two: list[Run], tmp_path: Path) -> None:
    directories, file = [run.directory for run in two], tmp_path / "page.html"
    said = ecotone("compare", *directories, "--html", file)
    assert said.code == 0
    for words in ("stairs", "good", "0.4800", "0.2400", "reference point a=0, b=0", "90% of the best run's", str(file)):
        assert words in said.out
    assert file.stat().st_size > 1_000_000
    assert [run["label"] for run in ecotone("compare", *directories, "--json").json["runs"]] == ["good", "stairs"]


def test_the_command_fails_in_words(ecotone: Ecotone, two: list[Run], tmp_path: Path) -> None:
    for arguments, words in (
        ((tmp_path,), "no journal there"),
        ((two[0].directory, "--html", tmp_path / "no" / "page.html"), "cannot be written"),
        ((two[0].directory, "--reach", "0%"), "--reach"),
    ):
        said = ecotone("compare", *arguments)
        assert said.code == 1
        assert words in said.err
        assert "Traceback" not in said.err


# -- the page ------------------------------------------------------------------------------------------------


def many(columns: int, count: int = 12) -> list[list[float]]:
    return np.random.default_rng(columns).random((count, columns)).tolist()


def goals_of(columns: int) -> list[list[str]]:
    return [[f"score {index}", "maximize" if index % 2 == 0 else "minimize"] for index in range(columns)]


def charts(text: str) -> list[str]:
    return [unescape(found) for found in re.findall(r"<h2>(.*?)</h2>", text)]


def test_the_page_needs_no_network(two: list[Run]) -> None:
    text = page(compare(two))
    assert text.count("<html") == 1
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=", text)
    assert charts(text) == [
        "Fronts on search data",
        "Hypervolume over evaluations",
        "Coefficients of the fronts' members",
    ]
    assert "ecotone export" in text
    assert "--member 2 --to merged-2" in text
    assert "coefficients: left 0.200, right 0.800" in text
    assert "a (higher is better)" in text


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (1, ["Fronts"]),
        (3, ["Fronts on search data", "Fronts, two objectives at a time"]),
        (4, ["Fronts, two objectives at a time", "Scores of the fronts' members"]),
        (6, ["Scores of the fronts' members"]),
    ],
)
def test_the_page_draws_any_number_of_objectives(tmp_path: Path, columns: int, expected: list[str]) -> None:
    text = page(compare([write_run(tmp_path / "run", many(columns), goals_of(columns))]))
    assert charts(text)[: len(expected)] == expected
    assert "lower is better" in text or columns == 1


def test_names_cannot_break_the_page(tmp_path: Path) -> None:
    goals = [["<script>alert(1)</script>", "maximize"], ["b & c", "maximize"]]
    text = page(compare([write_run(tmp_path / "<b>run</b>", STAIRS, goals)]))
    assert "<script>alert" not in text
    assert "<b>run</b>" not in text


def test_coefficients_are_averaged_where_segments_differ_and_absent_from_dense_genomes(tmp_path: Path) -> None:
    def cut(number: int) -> Genome:
        return Genome(np.array([0, number + 1, 10]), np.array([[1.0, 0.0], [0.0, 1.0]]))

    def dense(number: int) -> Genome:
        return Genome.dense(np.full(10, number), sources=2)

    runs = [write_run(tmp_path / "cut", STAIRS, genomes=cut), write_run(tmp_path / "dense", STAIRS, genomes=dense)]
    text = page(compare(runs))
    assert "mean over the parameters" in text
    assert "0.0% to 40.0% of the parameters: left 1.000, right 0.000" in text
    assert "dense: evolved from scratch as dense weights, which have no coefficients" in text
    only = page(compare(runs[1:]))
    assert "which have no coefficients" in only
    assert "mean over the parameters" not in only


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.slow
def test_a_browser_draws_every_chart_and_keeps_what_is_clicked(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, many(2, count), held_out=AB) for name, count in (("one", 20), ("two", 30))]
    file = tmp_path / "page.html"
    # Hover over the first member of a front and click it, once the page is there.
    pointed = """<script>setTimeout(() => {
      const chart = document.querySelector('.plotly-graph-div');
      const run = chart.data.findIndex(trace => trace.name == 'two' && trace.customdata);
      Plotly.Fx.hover(chart, [{curveNumber: run, pointNumber: 0}]);
      chart.emit('plotly_click', {points: [{customdata: chart.data[run].customdata[0]}]});
    }, 2000);</script></body>"""
    file.write_text(page(compare(runs)).replace("</body>", pointed), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=8000", "--dump-dom"]
    drawn = subprocess.run(
        ["chromium", *options, f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    body = drawn[drawn.index("<body") :]
    assert len(re.findall(r'class="main-svg"', body)) >= 6  # two layers a chart
    assert body.count("hypervolume of the front so far (higher is better)</text>") == 1
    assert body.count("a (higher is better)</text>") == 1
    member = re.search(r"two</tspan> \(random\), member (\d+)</tspan>", body)
    assert member is not None, "hovering shows nothing"
    chosen = re.search(r'<div id="chosen">(.*?)</div>', body, re.DOTALL)
    assert chosen is not None
    for words in (f"two (random), member {member[1]}", "coefficients: left ", f"--member {member[1]} --to merged-"):
        assert words in chosen[1]
