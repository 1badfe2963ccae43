"""Methods side by side, and one of several: columns, sums, beginnings, bases that runs share, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from ecotone.experiments import compose
from ecotone.experiments.exports import verify
from ecotone.experiments.fingerprints import readers
from ecotone.experiments.merge import Merge
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch, resume
from ecotone.fitness.gradients.calibration import EntropyLossSettings
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging import operators
from ecotone.merging.basis import Bases
from ecotone.merging.gradient import Slopes
from ecotone.merging.operators.own import own_merges
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.settings import Call
from ecotone.testing.operators import bits, materialised, model, opened_under

REGMEAN = {"operator": "regmean", "ridge": 1e-2}
NAMES = ("one", "two", "three")


def stack(*methods):
    return operators.get("stack", {"methods": methods})


def opened(operator, folder, dtype=torch.float64, count=3):
    paths = [folder / f"{seed}.safetensors" for seed in range(count + 1)]
    for seed, path in enumerate(paths):
        if not path.exists():
            save_file(model(seed, dtype), path)
    return opened_under(operator, paths[1:], paths[0], folder)


def alone(method):
    given = dict(method) if isinstance(method, dict) else {"operator": method}
    return operators.get(given.pop("operator"), given)


def genome_of(sources, seed=0):
    """Two segments, whose border lies inside a tensor."""
    columns = len(sources.operator.columns(sources.names))
    rows = np.random.default_rng(seed).normal(size=(2, columns))
    return Genome(np.array([0, 11, sources.layout.size]), rows)


# -- numerics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "method", ["task_arithmetic", "ties", "ties_vectors", "dare", "iso_cts", "tsv_m", "kfac", REGMEAN], ids=str
)
def test_a_stack_of_one_method_is_that_method_bit_for_bit(tmp_path, method, dtype):
    plain, one = opened(alone(method), tmp_path, dtype), opened(stack(method), tmp_path, dtype)
    genome = genome_of(plain)
    expected, found = (materialised(sources, genome, dtype) for sources in (plain, one))
    for name, values in expected.items():
        assert torch.equal(bits(found[name]), bits(values))
    np.testing.assert_array_equal(one.space().gram.prefix, plain.space().gram.prefix)
    assert [name.partition(":")[2] for name in one.space().sources] == list(plain.space().sources)


def test_where_one_method_has_coefficients_the_merge_is_that_methods_bit_for_bit(tmp_path):
    methods = ("task_arithmetic", "ties", "kfac")
    whole = opened(stack(*methods), tmp_path, torch.bfloat16)
    for place, method in enumerate(methods):
        plain = opened(alone(method), tmp_path, torch.bfloat16)
        genome = genome_of(plain)
        rows = np.zeros((2, 9))
        rows[:, 3 * place : 3 * place + 3] = genome.coefficients
        expected = materialised(plain, genome, torch.bfloat16)
        for name, values in materialised(whole, Genome(genome.boundaries, rows), torch.bfloat16).items():
            torch.testing.assert_close(values, expected[name], rtol=0, atol=0)


def test_a_mixture_is_the_base_and_the_sum_of_what_each_method_adds(tmp_path):
    methods = ("dare", "task_arithmetic", "iso_cts", "kfac", REGMEAN, "ties_vectors")
    whole = opened(stack(*methods), tmp_path)
    genome = genome_of(whole)
    base = model(0, torch.float64)
    expected, low = {name: values.clone() for name, values in base.items()}, 0
    for method in methods:
        plain = opened(alone(method), tmp_path)
        high = low + len(plain.operator.columns(plain.names))
        own = materialised(plain, Genome(genome.boundaries, genome.coefficients[:, low:high]), torch.float64)
        for name in expected:
            expected[name] += own[name] - base[name]
        low = high
    assert low == genome.coefficients.shape[1] == 16
    for name, values in materialised(whole, genome, torch.float64).items():
        torch.testing.assert_close(values, expected[name], rtol=1e-9, atol=1e-9)


def test_gradients_are_along_the_vectors_of_each_method(tmp_path):
    whole, plain = opened(stack("task_arithmetic", "kfac"), tmp_path), opened(alone("kfac"), tmp_path)
    slopes, own = Slopes(whole, genome_of(whole)), Slopes(plain, genome_of(plain))
    for name, info in whole.layout.parameters.items():
        gradient = torch.randn(info.shape, generator=torch.manual_seed(1), dtype=torch.float64)
        slopes.add(name, gradient)
        own.add(name, gradient)
    np.testing.assert_allclose(slopes.values[:, 3:], own.values, rtol=1e-12)


def test_columns_are_named_after_method_and_expert():
    operator = stack("task_arithmetic", REGMEAN, "regmean", "iso_cts")
    assert operator.columns(("odd", "even")) == (
        *("task_arithmetic:odd", "task_arithmetic:even", "regmean:odd", "regmean:even"),
        *("regmean-2:odd", "regmean-2:even", "iso_cts:merged"),
    )
    assert operator.members["regmean"].ridge == 1e-2
    assert operator.members["regmean-2"].ridge is None


def test_the_experts_are_those_of_task_arithmetic_or_else_of_the_first_method():
    np.testing.assert_array_equal(stack("kfac", "task_arithmetic").seeds(2), [[0, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(stack("kfac", "ties").seeds(2), [[1, 0, 0, 0], [0, 1, 0, 0]])


def test_columns_that_no_number_of_experts_has_are_refused():
    with pytest.raises(InputError, match="genome: expected columns of task_arithmetic, kfac, found 5 in all"):
        stack("task_arithmetic", "kfac").weights(np.zeros((1, 5)))


# -- where searches begin ------------------------------------------------------------------------------------


def rows_of(operator, experts=2):
    """By name, the coefficients of an operator's own merges."""
    found = own_merges(operator, experts, 10)
    assert all(one.boundaries.tolist() == [0, 10] for one in found.values())
    return {name: one.coefficients[0].tolist() for name, one in found.items()}


def test_published_merges_of_a_stack_are_the_methods_own_and_their_equal_parts():
    found = rows_of(stack("task_arithmetic", "kfac"))
    assert found == {"methods in equal parts": EQUAL, "task_arithmetic": AVERAGE, "kfac": [0, 0, 1, 1]}
    assert next(iter(found.values())) == EQUAL
    assert rows_of(stack("kfac")) == {"kfac": [1, 1]}
    assert rows_of(operators.get("iso_cts"), 3) == {"at 1": [1]}
    assert rows_of(stack("dare", "ties"))["dare"] == AVERAGE
    assert rows_of(stack("dare", "ties"))["ties"] == [0, 0, 1, 1]
    assert rows_of(operators.get("task_arithmetic")) == {}


@pytest.mark.parametrize(
    ("methods", "bounds"),
    [(("kfac",), (0, 2)), (("task_arithmetic", "ties"), None), (("task_arithmetic", "kfac"), (0, 1))],
)
def test_bounds_are_shared_out_and_hold_each_published_merge(methods, bounds):
    assert stack(*methods).bounds == bounds


TOYS = """
def near(model, axis):
    return 1 / (1 + float((model["w"][axis] - 0.3 * (axis + 1)).square().mean()))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "toys.py").write_text(TOYS)
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(8, 10, generator=rng)
    for number, name in enumerate(["base", "one", "two"]):
        save_file({"w": base + number * 0.3 * torch.randn(8, 10, generator=rng)}, tmp_path / f"{name}.safetensors")
    return tmp_path


def recipe_of(folder, merge, search, evaluations=12):
    objectives = [
        {"name": f"axis-{axis}", "type": "call", "call": "./toys.py:near", "arguments": {"axis": axis}}
        for axis in (0, 1)
    ]
    record = {
        "name": "stack",
        "models": {"base": "base.safetensors", "experts": ["one.safetensors", "two.safetensors"]},
        "merge": merge,
        "objectives": {"search": objectives},
        "search": search,
        "scoring": {"batch": 2},
        "budget": {"evaluations": evaluations},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    return Recipe.from_yaml(folder / "recipe.yaml")


def stopping_at(evaluations):
    def observe(progress):
        if progress.evaluations >= evaluations:
            raise KeyboardInterrupt

    return observe


STACK = {"operator": "stack", "methods": ["task_arithmetic", {"operator": "iso_c", "cut": 1e-4}]}
EQUAL, AVERAGE, ISO_C = [0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 0, 0], [0, 0, 1, 1]


def space_of(recipe):
    return compose._outline(recipe, compose.check_operator(recipe), 1)


@pytest.mark.parametrize(
    ("search", "rows"),
    [
        ({"algorithm": "nsga2"}, [EQUAL, AVERAGE, ISO_C]),
        ({"algorithm": "optuna"}, [EQUAL, AVERAGE, ISO_C]),
        ({"algorithm": "bayesian_map"}, [EQUAL, AVERAGE, ISO_C, [1, 0, 0, 0]]),
        ({"algorithm": "map", "samples": 16}, [EQUAL, AVERAGE, ISO_C]),
        ({"algorithm": "m2n2", "granularity": "tensor"}, [EQUAL, AVERAGE, ISO_C, [1, 0, 0, 0], [0, 1, 0, 0]]),
        ({"algorithm": "cma_es", "sigma": 1e-9}, [EQUAL]),
        ({"algorithm": "cma_es", "sigma": 1e-9, "start": 0.1}, [[0.1] * 4]),
        ({"algorithm": "cma_es", "sigma": 1e-9, "start": {"solve": "one_shot"}}, [EQUAL]),
        ({"algorithm": "nsga2", "start": {"solve": "average"}}, [AVERAGE, EQUAL, ISO_C]),
    ],
    ids=str,
)
def test_searches_begin_with_the_methods_merges(folder, search, rows):
    recipe = recipe_of(folder, STACK, search, 60)
    made, _ = compose.make_search(recipe, space_of(recipe))
    trials = [trial for _ in rows for trial in made.ask(1)]
    np.testing.assert_allclose([one.genome.coefficients[0] for one in trials], rows, atol=1e-6)


def test_surrogates_still_need_a_budget_beyond_their_first_candidates(folder):
    recipe = recipe_of(folder, STACK, {"algorithm": "bayesian_map", "samples": 9}, 12)
    with pytest.raises(InputError, match=r"budget\.evaluations: expected more than 12"):
        compose.make_search(recipe, space_of(recipe))


# -- recipes and runs ----------------------------------------------------------------------------------------


def test_bounds_of_an_operator_are_those_of_a_run_that_is_resumed(folder):
    recipe = recipe_of(folder, {"operator": "iso_c"}, {"algorithm": "random", "granularity": "tensor"}, 3)
    assert (recipe.search.low, recipe.search.high) == (0, 2)
    assert Recipe.from_record(recipe.record()).search == recipe.search
    given = {"algorithm": "random", "high": 1.0}
    assert recipe_of(folder, {"operator": "iso_c"}, given).search.high == 1
    assert recipe_of(folder, {"operator": "ties"}, {"algorithm": "random"}).search.high == 1
    stages = [{**given, "evaluations": 5}, {"algorithm": "nsga2", "granularity": "block"}]
    chain = recipe_of(folder, {"operator": "iso_c"}, stages)
    assert [(one.low, one.high) for one in chain.searches] == [(0, 1), (0, 2)]
    assert Recipe.from_record(chain.record()).search == chain.search


def test_a_run_is_resumed_exported_and_verified(folder):
    recipe = recipe_of(folder, STACK, {"algorithm": "nsga2"}, 14)
    whole = launch(recipe, folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        launch(recipe, folder / "run", observe=stopping_at(6))
    run = resume(folder / "run")
    digests = [[one.trial(number).genome.digest for number in range(14)] for one in (whole, run)]
    assert digests[0] == digests[1]
    target = run.export("best", folder / "best")
    assert all(one.difference == 0 for one in verify(target))
    record = json.loads((target / "ecotone.json").read_text())
    assert record["operator"] == {"name": "stack", "methods": STACK["methods"]}
    assert "`stack` (methods task_arithmetic and `iso_c` (cut 0.0001))" in (target / "README.md").read_text()
    with run.journal() as journal:
        names = [name for name, _ in journal.references()]
    assert names[-3:] == ["methods in equal parts (stack)", "task_arithmetic (stack)", "iso_c (stack)"]


def test_a_recipe_keeps_its_methods(folder):
    recipe = recipe_of(folder, STACK, {"algorithm": "nsga2"})
    assert recipe.record()["merge"]["methods"] == STACK["methods"]
    again = Recipe.from_record(yaml.safe_load(recipe.text()))
    assert again.merge == recipe.merge
    assert again.signature == recipe.signature
    other = recipe_of(folder, {**STACK, "methods": ["task_arithmetic", "iso_c"]}, {"algorithm": "nsga2"})
    assert other.signature != recipe.signature
    spec = compose.worker_spec(recipe, None)
    kinds = {one.where: one.kind for one in readers(recipe, spec)}
    assert kinds["merge.methods.iso_c"] is operators.OPERATORS.get("iso_c", "operator")


def test_files_that_a_methods_settings_name_are_those_of_the_stack():
    methods = ["kfac", {"operator": "ota", "second_moments": {"one": "prepared:one.safetensors"}}]
    merge = Merge.model_validate({"operator": "stack", "methods": methods})
    spec = merge.with_paths(lambda path: path.replace("prepared:", "/there/"))
    assert [str(path) for path in operators.files("stack", spec.settings)] == ["/there/one.safetensors"]
    assert spec.settings["methods"][0] == merge.settings["methods"][0]
    assert Merge.model_validate(spec.model_dump(mode="json")) == spec


def test_reading_data_is_what_a_method_does():
    assert not Merge.model_validate(STACK).reads_data
    assert Merge.model_validate({**STACK, "methods": ["task_arithmetic", "kfac"]}).reads_data


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        ("kfac", r"expected a list of operators, found 'kfac'"),
        ([], r"expected a list of operators, found \[\]"),
        (["kfac", 3], r"expected names of operators, or mappings with the key operator, found 3"),
        ([{"ridge": 1.0}], r"or mappings with the key operator, found \{'ridge': 1.0\}"),
        (["kfac", "regmeen"], r"expected one of .*, found 'regmeen'. Did you mean 'regmean'"),
        (["kfac", {"operator": "kfac"}], r"expected different methods, found kfac twice"),
        ([{"operator": "kfac", "ridge": -1}], r"kfac: ridge: expected a number at least 1e-08, found -1"),
        ([{"operator": "ties", "densty": 0.1}], r"ties: densty: the operator 'ties' has no such setting. Did you mean"),
        (["kfac", "slerp"], r"found 'slerp': its merges are not linear in their coefficients"),
        (["linear"], r"found 'linear': it adds to no base. Use task_arithmetic"),
        (["ties", "stack"], r"found 'stack': a stack has no others in it"),
    ],
)
def test_methods_that_do_not_fit_are_refused_in_words(methods, said):
    with pytest.raises(InputError, match=f"merge.methods: .*{said}"):
        operators.checked("stack", {"methods": methods})
    with pytest.raises(ValueError, match=f"methods\n.*{said}"):
        Merge.model_validate({"operator": "stack", "methods": methods})


# -- bases ---------------------------------------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def inputs(name):
    generator = torch.Generator().manual_seed(NAMES.index(name))
    return torch.randn(40, 4, generator=generator).double()


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate(("base", *NAMES[:2])):
        torch.manual_seed(number)
        save_file(net().state_dict(), tmp_path / f"{name}.safetensors")
    tasks = [
        EntropyLossSettings(name=name, data=Call(call=f"{__file__}:inputs", arguments={"name": name}), batch=8)
        for name in NAMES[:2]
    ]
    return WorkerSpec(
        tuple(str(tmp_path / f"{name}.safetensors") for name in NAMES[:2]),
        str(tmp_path / "base.safetensors"),
        "stack",
        operators.checked("stack", {"methods": ["task_arithmetic", "kfac", REGMEAN]}),
        architecture=Call(call=f"{__file__}:net"),
        calibration=tuple(tasks),
    )


@pytest.mark.slow
def test_methods_share_their_bases_with_runs_that_use_them_alone(spec):
    kfac = basis_of(replace(spec, operator="kfac", settings={}))
    found = basis_of(spec)
    assert list(found.bases) == ["kfac", "regmean"]
    assert found.bases["kfac"].folder == kfac.folder
    assert [one.name for one in found.models()] == ["kfac:one", "kfac:two", "regmean:one", "regmean:two"]
    assert {one.key for one in Bases().all()} == {one.key for one in found.bases.values()}
    assert len(list(Bases().folder.rglob("*.safetensors"))) == 4
    regmean = basis_of(replace(spec, operator="regmean", settings={"ridge": 1e-2}))
    assert regmean.key == found.bases["regmean"].key
    plain = {"methods": operators.checked("stack", {"methods": ["task_arithmetic", "ties"]})["methods"]}
    assert basis_of(replace(spec, settings=plain)) is None


def test_making_room_for_one_method_removes_no_other_of_the_stack(spec):
    basis_of(replace(spec, operator="fisher", settings={}))
    found = basis_of(replace(spec, cache_bytes=1))
    assert {one.key for one in Bases().all()} == {one.key for one in found.bases.values()}
    with found.hold():
        assert all(Bases().in_use(one.key) for one in found.bases.values())
    assert not any(Bases().in_use(one.key) for one in found.bases.values())


def test_a_worker_mixes_the_prepared_vectors_of_all_methods(spec):
    worker = Worker(spec)
    space = worker.space()
    assert space.sources[2:4] == ("kfac:one", "kfac:two")
    assert {"models.base", "merge.operator: kfac:one", "merge.operator: regmean:two"} <= set(space.contents)
    sources = worker._sources
    found = basis_of(spec)
    base = sources.base.tensor("0.weight")
    for label, row in (("kfac", [0, 0, 1, 1, 0, 0]), ("regmean", [0, 0, 0, 0, 1, 1])):
        merged = materialised(sources, Genome.uniform(space.size, row), torch.float64)["0.weight"]
        expected = base + sum(one.tensor("0.weight") for one in found.bases[label].models())
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)


def test_without_its_bases_a_stack_can_be_looked_at_and_not_merged(spec):
    sources = Sources.open(spec.experts, spec.base, "stack", settings=spec.settings)
    assert len(sources.checkpoints) == 7
    rows = sources.memory.row_bytes
    assert rows == 7 * sources.layout.size * 8
    with pytest.raises(InputError, match="operator 'stack': expected the vectors that it prepares, found none"):
        sources.space()


# -- one of several ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", [0, 1, 2, 3])
def test_one_of_several_is_the_chosen_method_bit_for_bit(tmp_path, chosen):
    methods = ("ties", "task_arithmetic", REGMEAN, {"operator": "regmean", "targets": "weights"})
    plain = opened(alone(methods[chosen]), tmp_path, torch.bfloat16)
    fixed = opened(operators.get("one_of", {"methods": methods, "chosen": chosen}), tmp_path, torch.bfloat16)
    other = opened(operators.get("one_of", {"methods": methods, "chosen": (chosen + 1) % 4}), tmp_path, torch.bfloat16)
    genome = genome_of(plain)
    own = Genome(genome.boundaries, genome.coefficients, {"chosen": chosen})
    expected = materialised(plain, genome, torch.bfloat16)
    for sources, merge in ((fixed, genome), (other, own)):
        for name, values in materialised(sources, merge, torch.bfloat16).items():
            assert torch.equal(bits(values), bits(expected[name]))
    assert other.names == plain.names
    assert fixed.space().sources == plain.space().sources
    np.testing.assert_array_equal(fixed.space().gram.prefix, plain.space().gram.prefix)
    with pytest.raises(InputError, match="chosen: expected the number of a method, 0 to 3, found 4"):
        materialised(fixed, Genome(genome.boundaries, genome.coefficients, {"chosen": 4}), torch.bfloat16)


CHOICES = {"operator": "iso_c", "cut": {"choices": [1e-6, 0.5]}}


@pytest.mark.parametrize(
    ("search", "rows"),
    [
        ({"algorithm": "nsga2"}, [([1, 1], 0), ([1, 1], 1)]),
        ({"algorithm": "bayesian_map"}, [([1, 1], 0), ([1, 1], 1)]),
        ({"algorithm": "cma_es", "sigma": 1e-9}, [([1, 1], 0)]),
    ],
    ids=str,
)
def test_searches_begin_with_the_merge_of_each_choice(folder, search, rows):
    recipe = recipe_of(folder, CHOICES, search, 60)
    made, _ = compose.make_search(recipe, space_of(recipe))
    for coefficients, chosen in rows:
        [trial] = made.ask(1)
        np.testing.assert_allclose(trial.genome.coefficients[0], coefficients, atol=1e-6)
        assert trial.genome.parameters == {"chosen": chosen}


def test_each_combination_of_choices_is_prepared_once_and_searched(folder):
    recipe = recipe_of(folder, CHOICES, {"algorithm": "random"}, 10)
    assert recipe.record()["merge"]["cut"] == {"choices": [1e-6, 0.5], "most": 8}
    again = Recipe.from_record(yaml.safe_load(recipe.text()))
    assert (again.merge, again.signature) == (recipe.merge, recipe.signature)
    run = launch(recipe, folder / "run")
    assert len(Bases().all()) == 2
    assert {run.trial(number).genome.parameters["chosen"] for number in range(10)} == {0, 1}
    target = run.export("best", folder / "best")
    assert all(one.difference == 0 for one in verify(target))
    assert [one.id for one in run.references()][-2:] == ["cut 1e-06 (iso_c)", "cut 0.5 (iso_c)"]


def test_choices_of_several_settings_are_combined():
    merge = Merge.model_validate(
        {"operator": "regmean", "ridge": {"choices": [1e-6, 1]}, "targets": {"choices": ["own", "weights"]}, "batch": 8}
    )
    operator, settings = merge.combined
    made = [one.settings for one in settings["methods"]]
    assert operator == "one_of"
    assert [(one["ridge"], one["targets"], one["batch"]) for one in made] == [
        *((1e-6, "own", 8), (1e-6, "weights", 8), (1.0, "own", 8), (1.0, "weights", 8))
    ]
    assert merge.ranges["chosen"].high == 3
    assert merge.reads_data


@pytest.mark.parametrize(
    ("merge", "said"),
    [
        ({**CHOICES, "cut": {"choices": [0.1]}}, "merge.cut: expected a list of 2 or more"),
        ({**CHOICES, "cut": {"choices": [0.1, 2]}}, "merge.cut: expected .*, found 2"),
        ({**CHOICES, "cut": {"choices": [0.1, 0.1]}}, "merge.cut: expected different choices, found 0.1, 0.1"),
        ({**CHOICES, "cut": {"choices": [0.1, 0.2], "mots": 3}}, "merge.cut: mots: .*Did you mean 'most'"),
        (
            {**CHOICES, "cut": {"choices": [n / 100 for n in range(1, 10)]}},
            "merge.cut: expected at most 8 combinations",
        ),
        ({"operator": "ties", "density": {"choices": [0.1, 0.2]}}, r"merge.density: .* found ties; give bounds"),
        ({"operator": "one_of", "methods": ["ties", "iso_cts"]}, "merge.methods: .*as many coefficients as each other"),
        (
            {"operator": "one_of", "methods": ["ties", "iso_c"], "chosen": {"low": 0, "high": 2, "scale": "integer"}},
            "merge.chosen: expected the number of a method, 0 to 1, found 2",
        ),
    ],
)
def test_choices_that_do_not_fit_are_refused_in_words(folder, merge, said):
    with pytest.raises(InputError, match=said):
        compose.check_operator(recipe_of(folder, merge, {"algorithm": "random"}))


def test_a_search_over_coefficients_alone_takes_no_choices(folder):
    with pytest.raises(InputError, match=r"merge\.cut: m2n2 searches coefficients alone, found choices"):
        recipe_of(folder, CHOICES, {"algorithm": "m2n2"})


# -- digits --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_digits_search_goes_from_task_arithmetic_to_kfac(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    changes = {
        "merge": {"operator": "stack", "methods": ["task_arithmetic", "kfac"]},
        "search": {"algorithm": "bayesian_map"},
        "budget.evaluations": 32,
        "tracking.mlflow": False,
    }
    recipe = Recipe.from_yaml("digits-adamerging", changes)
    whole = launch(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        launch(recipe, tmp_path / "run", observe=stopping_at(24))
    run = resume(tmp_path / "run")
    assert [run.trial(n).genome.digest for n in range(32)] == [whole.trial(n).genome.digest for n in range(32)]
    scores = {one.id: np.mean(list(one.scores.values())) for one in run.references()}
    with run.journal() as journal:
        best = max(np.mean(list(row.scores.values())) for row in journal.rows())
    assert scores["kfac (stack)"] > scores["methods in equal parts (stack)"] > scores["task_arithmetic (stack)"]
    assert best >= scores["kfac (stack)"]
    target = run.export("best", tmp_path / "best")
    assert all(one.difference == 0 for one in verify(target, trust=True))
    assert len(list(Path(tmp_path / "cache" / "bases").rglob("v-*.safetensors"))) == 4
