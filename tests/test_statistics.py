"""Statistics as trials: known answers, the cache and its damages, workers that are killed, and the command."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from managing import begun, ended
from processes import Ecotone, killed
from test_adamerging_recipes import toy_recipe
from torch import Tensor, nn

from ecotone.experiments import compose
from ecotone.experiments.compare import compare
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import resume
from ecotone.experiments.runs import Run
from ecotone.experiments.statistics import gather
from ecotone.fitness.data import Examples
from ecotone.fitness.pools import Batch, Pool, SerialPool
from ecotone.fitness.runtime import Runtime
from ecotone.fitness.statistics.cache import Cache, digest_of
from ecotone.fitness.statistics.kinds import STATISTICS, Data, Gathering
from ecotone.fitness.statistics.layers import linear_layers
from ecotone.fitness.statistics.magnitude import Magnitude
from ecotone.fitness.worker import Worker
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.journal import Journal
from ecotone.populations.population import ElitistArchive
from ecotone.populations.trial import Evaluation, Goal, Gradient, Outcome, Scores, Statistics, Trial
from ecotone.search.manager import Schedule, measure

WANTS = Statistics("magnitude", ("task 0", "task 1"))
# What kills the process once, while it gathers: the file says that it is to be done.
KILLS = """
import os, signal, time
from torch import nn


class Kills(nn.Sequential):
    def __init__(self, file, delay):
        super().__init__(nn.Linear(6, 5), nn.Tanh())
        self.file, self.delay = file, delay

    def forward(self, inputs):
        time.sleep(self.delay if len(inputs) > 1 else 0)
        if len(inputs) > 1 and os.path.exists(self.file):
            os.remove(self.file)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(inputs)


def encoder(file="", delay=0.0):
    return Kills(file, delay)
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; what recipes name can be imported."""
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ada_toys", "kills"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path / "cache" / "statistics"


def recipe_of(folder: Path, **others: Any) -> Recipe:
    folder.mkdir(exist_ok=True)
    (folder / "kills.py").write_text(KILLS)
    return Recipe.from_yaml(toy_recipe(folder, **others))


def worker_of(folder: Path, **others: Any) -> Worker:
    return Worker(compose.worker_spec(recipe_of(folder, **others), None))


def data(*inputs: Tensor) -> list[Data]:
    return [Data(str(number), Examples(one), None) for number, one in enumerate(inputs)]


def merge(*coefficients: float) -> Genome:
    return Genome.uniform(35, np.array(coefficients))


def asked(worker: Worker, genome: Genome, wants: Statistics = WANTS) -> Evaluation:
    [found] = worker.measure([Trial(0, genome, wants=wants)])
    return found


# -- known answers -------------------------------------------------------------------------------------------


def test_magnitudes_by_hand() -> None:
    """Two layers: x -> relu(Ax + b) -> Bx."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [1.0, -1.0]])
    model[0].bias.data = torch.tensor([0.0, 1.0])
    inputs = torch.tensor([[1.0, -2.0], [-3.0, 0.0], [2.0, 5.0]])
    found = Magnitude(Gathering()).gather(model, data(inputs))
    assert {name: values.dtype for name, values in found.items()} == {"0": torch.float64, "2": torch.float64}
    assert found["0"].tolist() == [6 / 3, 7 / 3]
    assert found["2"].tolist() == [3 / 3, 4 / 3]  # relu gives (1, 4), (0, 0), (2, 0)
    for batch in (1, 2):
        again = Magnitude(Gathering(batch=batch)).gather(model, data(inputs))
        assert all(torch.equal(again[name], values) for name, values in found.items())


def test_tasks_weigh_by_their_rows() -> None:
    model = nn.Sequential(nn.Linear(1, 1))
    found = Magnitude(Gathering()).gather(model, data(torch.full((1, 3, 1), 2.0), torch.full((9, 1), -6.0)))
    assert found["0"].tolist() == [(3 * 2 + 9 * 6) / 12]


def test_many_small_numbers_are_added_in_float64() -> None:
    inputs = torch.full((40_000, 1), 0.1)
    found = Magnitude(Gathering(batch=40_000)).gather(nn.Sequential(nn.Linear(1, 1)), data(inputs))
    assert found["0"].item() == pytest.approx(float(np.float32(0.1)), rel=1e-14)


class Texts(nn.Module):
    """Each token is its number; a layer for tokens, one for flat tokens, one for the first token of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.flat, self.pooled, self.unused = (nn.Linear(1, 1) for _ in range(4))
        self.twice = self.tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        values = input_ids[..., None].float()
        self.tokens(values)
        self.flat(values.reshape(-1, 1))
        return self.pooled(input=values[:, 0])  # type: ignore[no-any-return]


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_masked_tokens_are_left_out(batch: int) -> None:
    ids = torch.tensor([[1, 2, 100, 100], [3, 100, 100, 100], [4, 5, 6, 100]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    tasks = [Data("texts", Examples({"input_ids": ids, "attention_mask": mask}), None)]
    found = Magnitude(Gathering(batch=batch)).gather(Texts(), tasks)
    assert {name: values.item() for name, values in found.items()} == {
        "tokens": 21 / 6,
        "flat": 21 / 6,
        "pooled": 8 / 3,
    }


def test_conv1d_of_transformers_is_a_linear_layer() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(3, 2))
    assert list(linear_layers(model)) == ["0"]
    assert Magnitude(Gathering()).gather(model, data(torch.tensor([[1.0, -3.0]])))["0"].tolist() == [1.0, 3.0]


def test_a_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(RuntimeError):
        Magnitude(Gathering()).gather(model, data(torch.ones(2, 2), torch.ones(2, 7)))
    assert not any(module._forward_pre_hooks for module in model.modules())


# -- trials --------------------------------------------------------------------------------------------------


def test_a_worker_gathers_for_the_merge_of_a_genome(tmp_path: Path, cache: Path) -> None:
    worker, genome = worker_of(tmp_path), merge(0.5, 0.4, 0.1)
    found = asked(worker, genome)
    assert found.failure is None
    assert found.statistics is not None
    assert (found.items, found.scores, found.details["cached"]) == (80, {}, 0)
    import ada_toys

    inputs = np.concatenate([ada_toys.examples(task)[0] for task in range(2)])
    tensors = Cache().read(found.statistics)
    assert list(tensors) == ["0"]
    assert np.allclose(tensors["0"].numpy(), np.abs(inputs.astype(np.float64)).mean(0), rtol=1e-14)
    assert found.statistics.digest == digest_of(tensors)
    assert (found.statistics.layers, found.statistics.nbytes) == (1, 6 * 8)
    assert found.details["file"] == str(cache / f"{found.statistics.key}.safetensors")
    assert [path.name for path in cache.iterdir()] == [f"{found.statistics.key}.safetensors"]


def test_a_second_request_is_answered_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = asked(worker_of(tmp_path), merge(0.5, 0.4, 0.1))
    monkeypatch.setattr(Magnitude, "gather", lambda *_: pytest.fail("it was gathered again"))
    for worker in (worker_of(tmp_path), worker_of(tmp_path, scoring={"batch": 1})):
        again = asked(worker, merge(0.5, 0.4, 0.1))
        assert (again.statistics, again.items, again.details["cached"]) == (first.statistics, 0, 1)


def test_wishes_of_all_sorts_in_one_batch(tmp_path: Path) -> None:
    worker, genome = worker_of(tmp_path), merge(0.5, 0.4, 0.1)
    wishes = [WANTS, Scores(), Gradient.of("task 0", 1), Scores("held_out"), WANTS, Gradient.of("task 1", 1)]
    together = worker.measure([Trial(number, genome, wants=wish) for number, wish in enumerate(wishes)])
    for wish, found in zip(wishes, together, strict=True):
        [alone] = worker.measure([Trial(0, genome, wants=wish)])
        assert (found.scores, found.statistics, found.ok) == (alone.scores, alone.statistics, True)
        assert (found.gradient is None) == (wish.gradient is None)


def test_the_key_has_all_that_statistics_depend_on(tmp_path: Path) -> None:
    recipe_of(tmp_path)  # the functions
    genome = merge(0.5, 0.4, 0.1)
    first = asked(worker_of(tmp_path / "one"), genome).statistics
    assert first is not None
    keys = {first.key}

    def another(found: Evaluation) -> None:
        assert found.statistics is not None, found.failure
        assert found.statistics.key not in keys
        keys.add(found.statistics.key)

    worker = worker_of(tmp_path / "one")
    another(asked(worker, merge(0.5, 0.4, 0.2)))
    another(asked(worker, genome, replace(WANTS, tasks=("task 0",))))
    another(asked(worker, genome, replace(WANTS, tasks=("task 1", "task 0"))))
    another(asked(worker, genome, replace(WANTS, settings={"examples": 8})))
    another(asked(worker, genome, replace(WANTS, settings={"batch": 8})))
    another(asked(worker_of(tmp_path / "one", merge={"operator": "ties", "density": 0.5}), genome))
    another(asked(worker_of(tmp_path / "one", merge={"operator": "task_arithmetic", "dtype": "bfloat16"}), genome))
    same = asked(worker, genome, replace(WANTS, settings={"batch": 32, "examples": None}))  # the defaults
    assert same.statistics == first
    shutil.copy(tmp_path / "one" / "left.safetensors", tmp_path / "one" / "right.safetensors")
    another(asked(Worker(compose.worker_spec(Recipe.from_yaml(tmp_path / "one" / "toy.yaml"), None)), genome))
    assert asked(worker_of(tmp_path / "two"), genome).statistics == first  # the same files elsewhere


@pytest.mark.parametrize(
    ("wants", "said"),
    [
        (
            replace(WANTS, kind="magnitud"),
            "kind: expected one of magnitude, inputs, slopes, fisher, found 'magnitud'. Did you mean",
        ),
        (replace(WANTS, tasks=("task 3",)), "expected a calibration task of that name, found 'task 3'."),
        (
            replace(WANTS, settings={"example": 8}),
            "statistics magnitude: example: unknown key. Did you mean 'examples'",
        ),
        (replace(WANTS, settings={"examples": 0}), "examples: Input should be greater than or equal to 1, found 0"),
    ],
)
def test_wishes_that_cannot_be_fulfilled(tmp_path: Path, wants: Statistics, said: str) -> None:
    worker = worker_of(tmp_path)
    found, fine = worker.measure([Trial(0, merge(1, 0, 0), wants=wants), Trial(1, merge(1, 0, 0), wants=WANTS)])
    assert found.failure is not None
    assert said in found.failure.message
    assert fine.ok


def test_statistics_that_are_no_numbers(tmp_path: Path, cache: Path) -> None:
    path = toy_recipe(tmp_path, models={**two_layers(tmp_path)})
    worker = Worker(compose.worker_spec(Recipe.from_yaml(path), None))
    found = asked(worker, Genome.uniform(53, np.array([1e300, 0, 0])))
    assert found.failure is not None
    assert found.failure.kind == "not finite"
    assert "layer '2': expected finite statistics, found NaN or infinity; the merged weights hold NaN" in (
        found.failure.message
    )
    assert not cache.exists()


def two_layers(folder: Path) -> dict[str, Any]:
    """Models of two layers, so that what the first gives reaches the second."""
    from safetensors.numpy import save_file

    (folder / "deep.py").write_text(
        "from torch import nn\ndef encoder(): return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 5))\n"
    )
    names = ("base", "a", "b", "c")
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        shapes = {"0.weight": (4, 6), "0.bias": (4,), "2.weight": (5, 4), "2.bias": (5,)}
        tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in shapes.items()}
        save_file(tensors, folder / f"deep-{name}.safetensors")
    return {
        "base": "deep-base.safetensors",
        "experts": [f"deep-{name}.safetensors" for name in names[1:]],
        "architecture": {"call": "deep:encoder"},
    }


# -- kinds ---------------------------------------------------------------------------------------------------


class Counted:
    """A kind of a user's own: how many examples there are, for one layer."""

    class Settings(Gathering):
        """As the others, and one more.

        Attributes:
            times: What they are multiplied by.
        """

        times: int = 1

    settings: ClassVar[type[Gathering]] = Settings
    version: ClassVar[int] = 1

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def gather(self, model: nn.Module, tasks: Any) -> dict[str, Tensor]:
        count = sum(len(task.examples) for task in tasks) * self._settings.times
        return {next(iter(linear_layers(model))): torch.tensor([float(count)])}


@pytest.fixture
def counted() -> Iterator[None]:
    STATISTICS.register("counted", Counted)
    yield
    STATISTICS.forget("counted")


def test_a_kind_of_a_user(tmp_path: Path, counted: None) -> None:
    wants = Statistics("counted", ("task 0", "task 1"), {"examples": 7, "times": 3})
    found = asked(worker_of(tmp_path), merge(1, 0, 0), wants)
    assert found.statistics is not None
    assert Cache().read(found.statistics)["0"].item() == 2 * 7 * 3
    assert found.items == 14


@pytest.mark.parametrize("lacks", ["settings", "version", "gather"])
def test_a_kind_that_does_not_say_all_is_refused(lacks: str) -> None:
    said = {"settings": Gathering, "version": 1, "gather": lambda *_: {}}
    kind = type("Half", (), {key: value for key, value in said.items() if key != lacks})
    with pytest.raises(InputError, match=rf"statistics 'half': .*{lacks}"):
        STATISTICS.register("half", kind)


class Untold(Gathering):
    """A field without a text."""

    power: int = 2


class Required(Gathering):
    """A field without a default.

    Attributes:
        power: The power.
    """

    power: int


@pytest.mark.parametrize(
    ("settings", "version", "said"),
    [
        (Untold, 1, "Untold: expected a text for each field, found none for power."),
        (Required, 1, "Required: expected a default of each field, found none for power."),
        (Gathering, True, "version: expected a whole number, found True."),
    ],
)
def test_a_kind_that_is_half_declared_is_refused(settings: Any, version: Any, said: str) -> None:
    kind = type("Half", (), {"settings": settings, "version": version, "gather": lambda *_: {}})
    with pytest.raises(InputError) as refused:
        STATISTICS.register("half", kind)
    assert refused.value.message == f"statistics 'half': {said}"


def test_all_settings_have_a_text() -> None:
    for name in STATISTICS:
        assert all(STATISTICS.get(name, "kind").settings.texts().values()), name


# -- the cache -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["a bit", "half", "empty", "another file"])
def test_damage_is_noticed_and_made_good(
    tmp_path: Path, cache: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    worker, genome = worker_of(tmp_path), merge(0.5, 0.4, 0.1)
    first = asked(worker, genome)
    assert first.statistics is not None
    file = cache / f"{first.statistics.key}.safetensors"
    whole = file.read_bytes()
    harmed = {"a bit": whole[:-1] + bytes([whole[-1] ^ 1]), "half": whole[: len(whole) // 2], "empty": b""}
    if harm == "another file":
        other = asked(worker, merge(0.1, 0.1, 0.1), replace(WANTS, settings={"examples": 5})).statistics
        assert other is not None
        shutil.copy(cache / f"{other.key}.safetensors", file)
    else:
        file.write_bytes(harmed[harm])
    with caplog.at_level(logging.WARNING, "ecotone"), pytest.raises(InputError, match="expected the statistics of"):
        Cache().read(first.statistics)
    if harm != "another file":  # one that is whole in itself is what another model, or version, has left
        assert "it is made again" in caplog.text
        again = asked(worker, genome)
        assert (again.statistics, again.details["cached"]) == (first.statistics, 0)
        assert Cache().holds(first.statistics)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("in the way")
    found = asked(worker_of(tmp_path), merge(1, 0, 0))
    assert found.failure is not None
    assert "cannot be written" in found.failure.message
    assert "$ECOTONE_CACHE names another folder" in found.failure.message


def test_a_write_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecotone.populations.files.os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        Cache(tmp_path / "kept").write("key", {"a": torch.ones(3)}, {})
    assert list((tmp_path / "kept").iterdir()) == []


def test_digests_tell_names_types_shapes_and_numbers() -> None:
    one = torch.arange(4, dtype=torch.float32)
    others = [{"a": one}, {"b": one}, {"a": one.double()}, {"a": one.reshape(2, 2)}, {"a": -one}, {}, {"a": one[:0]}]
    assert len({digest_of(tensors) for tensors in others}) == len(others)
    assert digest_of({"a": one, "b": one}) == digest_of({"b": one, "a": one})
    assert len(digest_of({"a": one.bfloat16()})) == 32


# -- pools, manager, journal ---------------------------------------------------------------------------------


class Alternates:
    """A search that asks for statistics of what it scores."""

    def __init__(self) -> None:
        self.asked = 0
        self.told: list[tuple[int, Evaluation, Outcome]] = []
        self.done = False

    def ask(self, n: int) -> list[Trial]:
        wishes = (Scores(), WANTS)
        first, self.asked = self.asked, self.asked + n
        return [Trial(i, merge(0.1 * (i // 2), 0.3, 0.2), wants=wishes[i % 2]) for i in range(first, first + n)]

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        self.told.append((trial.number, evaluation, outcome))

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


GOALS = (Goal("task 0"), Goal("task 1"))


def test_a_search_may_ask_for_statistics(tmp_path: Path) -> None:
    spec = compose.worker_spec(recipe_of(tmp_path), None)
    told, digests = [], []
    for name, budgets in (("whole", (4,)), ("parts", (2, 4))):
        for budget in budgets:
            with SerialPool(spec) as pool:
                pool.start()
                search, archive = Alternates(), ElitistArchive(GOALS, 10)
                schedule = Schedule(evaluations=budget, batch=2, in_flight=2)
                manager = begun(tmp_path / f"{name}.sqlite", search, archive, GOALS, pool, schedule)
                assert ended(manager) == "evaluations"
        progress = manager.progress
        assert (progress.evaluations, progress.statistics, progress.told, progress.spent) == (4, 3, 7, 4.0)
        assert {member.trial.number for member in archive.members} <= {0, 2, 4, 6}
        told.append([(number, evaluation.scores, evaluation.statistics) for number, evaluation, _ in search.told])
        with Journal.open(tmp_path / f"{name}.sqlite") as journal:
            digests.append(journal.digest())
            assert [row.number for row in journal.rows()] == [0, 2, 4, 6]
    assert told[0] == told[1]
    assert digests[0] == digests[1]


def gathered_by(pool: Pool) -> Evaluation:
    with pool:
        pool.start()
        pool.submit(Batch(0, (Trial(0, merge(0.5, 0.4, 0.1), wants=WANTS),)))
        while True:
            for _, [found] in pool.completed(timeout=1.0):
                return found


@pytest.mark.slow
def test_a_ray_worker_that_is_killed_while_it_gathers(tmp_path: Path) -> None:
    """The trial is tried again by another worker, with the same result."""
    pytest.importorskip("ray")
    from ecotone.fitness.ray.pool import RayPool

    architecture = {"call": "kills:encoder", "arguments": {"file": str(tmp_path / "armed")}}
    recipe = recipe_of(tmp_path)
    models = {**recipe.record()["models"], "architecture": architecture}
    recipe = Recipe.from_record({**recipe.record(), "models": models})
    spec = compose.worker_spec(recipe, None, (str(tmp_path),))
    expected = gathered_by(SerialPool(spec))
    assert expected.statistics is not None
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "armed").touch()
    found = gathered_by(RayPool(spec, Runtime(workers=1, start_timeout=120)))
    assert not (tmp_path / "armed").exists()  # it was killed
    assert found.failure is None
    assert found.statistics == expected.statistics


def test_the_manager_measures_statistics_once(tmp_path: Path, cache: Path) -> None:
    spec = compose.worker_spec(recipe_of(tmp_path), None)
    genomes = [merge(0.1 * i, 0.3, 0.2) for i in range(3)]
    with SerialPool(spec) as pool, Journal.create(tmp_path / "j.sqlite") as journal:
        pool.start()
        first = measure(pool, journal, genomes[:2], WANTS, 2)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(pool, "submit", lambda batch: pytest.fail("it was measured again"))
            assert measure(pool, journal, genomes[:2], WANTS, 2).keys() == first.keys()
        whole = measure(pool, journal, genomes, WANTS, 2)
        assert {genome.digest for genome in genomes} == set(whole)
        assert all(whole[digest].statistics == found.statistics for digest, found in first.items())
        assert measure(pool, journal, genomes[:1], Scores(), 2)[genomes[0].digest].scores  # another wish
        lost = first[genomes[0].digest].statistics
        assert lost is not None
        Cache().file(lost.key).unlink()
        again = measure(pool, journal, genomes, WANTS, 2, lambda e: e.statistics is None or Cache().holds(e.statistics))
        assert again[genomes[0].digest].statistics == lost
        assert Cache().holds(lost)


# -- the command ---------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, ecotone: Ecotone) -> None:
    recipe_of(tmp_path)
    command = ("statistics", tmp_path / "toy.yaml", "--kind", "magnitude", "--out", tmp_path / "out")
    told = ecotone(*command, "--json").json
    assert [one["model"] for one in told["models"]] == ["left", "middle", "right"]
    for one in told["models"]:
        assert one["layers"] == {"0": [6]}
        assert (one["bytes"], one["examples"], one["failure"]) == (48, 80, None)
        assert Path(one["file"]).is_file()
    said = ecotone(*command)
    assert said.code == 0
    for one in told["models"]:
        assert f"{one['model']}: 80 examples in" in said.out
        assert f"48 bytes, digest {one['digest']}" in said.out
        assert one["file"] in said.out
    assert "\n  0: 6\n" in said.out
    more = ecotone(*command, "--model", "average", "--task", "task 1", "--with", "examples=5", "--json").json
    assert [(one["model"], one["examples"]) for one in more["models"]] == [("average", 5)]
    status = ecotone("status", tmp_path / "out", "--json").json
    assert (status["state"], status["statistics"], status["evaluations"]) == ("finished", 4, 0)


def test_commands_that_need_a_search_refuse_statistics(tmp_path: Path, ecotone: Ecotone) -> None:
    recipe, out = recipe_of(tmp_path), tmp_path / "out"
    gather(recipe, WANTS, out, models=["left"])
    before = (out / "journal.sqlite").read_bytes()
    for command in ("resume", "front", "ui", "compare", "sync", "export"):
        refused = ecotone(command, out, *(["--to", tmp_path / "x"] if command == "export" else []))
        assert refused.code == 1
        assert f"error: {out}: expected a search, found statistics alone.\n`ecotone status" in refused.err
    assert "expected no journal, found one of statistics" in ecotone("run", tmp_path / "toy.yaml", "--out", out).err
    run = Run(out)
    for use in (resume, compare_one, Run.front, Run.best, lambda run: run.trial(0)):
        with pytest.raises(InputError, match="found statistics alone"):
            use(run)
    assert (out / "journal.sqlite").read_bytes() == before
    status = ecotone("status", out, "--json").json
    assert (status["holds"], status["best"], status["statistics"]) == ("statistics, no search", None, 1)


def compare_one(run: Run) -> None:
    compare([run])


def test_experts_that_are_called_as_other_models_are(tmp_path: Path, ecotone: Ecotone) -> None:
    recipe_of(tmp_path)
    command = ("statistics", tmp_path / "toy.yaml", "--kind", "magnitude", "--out", tmp_path / "out")
    plain = ecotone(*command, "--json").json["models"]
    called = (*command[:-1], tmp_path / "called", "--set", "models.names=[base,average1,averages]")
    told = ecotone(*called, "--json").json["models"]
    assert [one["model"] for one in told] == ["base", "average1", "averages"]
    assert [one["genome"] for one in told] == [one["genome"] for one in plain]
    assert [one["model"] for one in ecotone(*called, "--model", "average", "--json").json["models"]] == ["average"]
    both = ecotone(*called, "--model", "base", "--model", "base, no expert", "--json").json["models"]
    assert both[0]["genome"] == plain[0]["genome"] != both[1]["genome"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--kind", "magnitudes"], "expected one of magnitude, inputs, slopes, fisher, found 'magnitudes'"),
        (["--kind", "magnitude", "--model", "lift"], "models: expected one of base, left, middle, right, average"),
        (["--kind", "magnitude", "--task", "task 7"], "tasks: expected one of task 0, task 1, found 'task 7'."),
        (["--kind", "magnitude", "--with", "exmples=3"], "exmples: unknown key. Did you mean 'examples'?"),
        (
            ["--kind", "magnitude", "--with", "examples"],
            "--with: expected key=value, found 'examples'. For example: --with",
        ),
        (["--kind", "magnitude", "--with", "batch=[1"], "--with batch: cannot be read as a YAML value"),
        (["--kind", "magnitude", "--with", "batch=0"], "batch: Input should be greater than or equal to 1"),
        (["--kind", "magnitude", "--set", "seed=1"], "another recipe's journal is there"),
    ],
)
def test_what_the_command_refuses(tmp_path: Path, ecotone: Ecotone, options: list[str], said: str) -> None:
    recipe = recipe_of(tmp_path)
    gather(recipe, WANTS, tmp_path / "out", models=["left"])
    refused = ecotone("statistics", tmp_path / "toy.yaml", "--out", tmp_path / "out", *options)
    assert refused.code != 0
    assert said in " ".join(refused.err.split())


def test_a_task_that_is_named_twice_is_gathered_once(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    twice, once = (
        gather(recipe, Statistics("magnitude", tasks), tmp_path / "out", models=["left"])[0]
        for tasks in (("task 0", "task 0"), ("task 0",))
    )
    assert twice == once


def test_tasks_need_not_be_the_searchs_own(tmp_path: Path, ecotone: Ecotone) -> None:
    toy_recipe(tmp_path, search={"algorithm": "cma_es"})
    assert "cma_es does not use it" in ecotone("validate", tmp_path / "toy.yaml").err
    said = ecotone("statistics", tmp_path / "toy.yaml", "--kind", "magnitude", "--out", tmp_path / "out", "--json")
    assert [one["failure"] for one in said.json["models"]] == [None] * 3


def test_a_recipe_without_calibration_tasks(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, calibration=[], search={"algorithm": "random"})
    with pytest.raises(InputError, match="the recipe has none"):
        gather(recipe, Statistics("magnitude", ()), tmp_path / "out")


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on(tmp_path: Path, ecotone: Ecotone, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe_of(tmp_path)
    slow = "models.architecture=" + json.dumps({"call": "kills:encoder", "arguments": {"delay": 0.2}})
    arguments = ("--kind", "magnitude", "--set", slow, "--with", "batch=8", "--json")
    command = ("statistics", tmp_path / "toy.yaml", *arguments)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def one_is_there() -> bool:
        return any((tmp_path / "cache" / "statistics").glob("[0-9a-f]*.safetensors"))

    killed(*command, "--out", tmp_path / "out", when=one_is_there)
    with Journal.open(tmp_path / "out" / "journal.sqlite") as journal:
        before = [found for _, _, found in journal.statistics()]
    assert len(before) < 3
    told = ecotone(*command, "--out", tmp_path / "out").json
    with Journal.open(tmp_path / "out" / "journal.sqlite") as journal:
        after = {found.statistics: found.seconds for _, _, found in journal.statistics()}
    assert len(after) == 3
    assert all(after[found.statistics] == found.seconds for found in before)  # it was not gathered again
    shutil.rmtree(tmp_path / "cache")
    whole = ecotone(*command, "--out", tmp_path / "whole").json
    assert [one["digest"] for one in whole["models"]] == [one["digest"] for one in told["models"]]
