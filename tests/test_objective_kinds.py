"""Kinds of objectives and losses: what each says of itself, in words too, and that others may be added."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from parts import call, context, objective
from pydantic import Field, TypeAdapter, ValidationError, model_validator
from safetensors.torch import save_file
from torch import nn

from ecotone.experiments import compose
from ecotone.experiments.checks import validate
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.backends.resident import ResidentSettings
from ecotone.fitness.gradients.calibration import EntropyLossSettings, Task, parts_of
from ecotone.fitness.kinds import CalibrationSettings, NamedCall, ObjectiveContext, ObjectiveSettings
from ecotone.fitness.objectives import AccuracySettings
from ecotone.fitness.protocol import Objective, Score
from ecotone.fitness.registry import LOSSES, OBJECTIVES, AnyObjective
from ecotone.fitness.worker import Worker
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Goal, Gradient, Trial
from ecotone.search.random_search import RandomSettings
from ecotone.settings import Kind

SMALLEST: dict[str, dict[str, Any]] = {
    "accuracy": {"data": {"call": "m:data"}},
    "entropy": {"data": {"call": "m:data"}},
    "call": {"call": "m:f"},
    "lm_eval": {"task": "arc_easy"},
    "bits_per_byte": {"data": "a.txt"},
    "likelihood": {"data": "a.txt"},
    "perplexity": {"data": "a.txt"},
    "multiple_choice": {"data": "a.jsonl"},
    "tokens_generated": {"data": "a.jsonl"},
    "exact_match": {"data": "a.jsonl"},
}
"""What each kind of ours needs at the least."""


# -- what kinds say of themselves ----------------------------------------------------------------------------


def test_all_of_ours_can_be_used() -> None:
    assert set(OBJECTIVES.usable()) >= set(SMALLEST)
    assert {name for name in OBJECTIVES if name not in SMALLEST} == set()
    assert list(LOSSES.usable()) == ["entropy", "cross_entropy", "distillation"]
    assert all(
        text for kind in (*OBJECTIVES.usable().values(), *LOSSES.usable().values()) for text in kind.texts().values()
    )


@pytest.mark.parametrize("kind", SMALLEST)
def test_a_kind_goes_through_a_recipe_s_record_and_a_pickle(kind: str) -> None:
    made = objective("o", kind, **SMALLEST[kind])
    adapter: TypeAdapter[Any] = TypeAdapter(AnyObjective)
    record = adapter.dump_python(made, mode="json")
    assert record == made.model_dump(mode="json")
    assert list(record)[:3] == ["name", "type", "direction"]
    assert adapter.validate_python(json.loads(json.dumps(record))) == made
    assert pickle.loads(pickle.dumps(made)) == made
    assert made.goal == Goal("o", made.direction)


@pytest.mark.parametrize(
    ("kind", "limits", "by_example", "needs_tokenizer", "paths"),
    [
        ("accuracy", (0.0, 1.0), True, False, ()),
        ("entropy", (0.0, np.inf), True, False, ()),
        ("call", None, None, False, ()),
        ("lm_eval", None, None, True, ("folder",)),
        ("bits_per_byte", None, True, True, ("data",)),
        ("likelihood", None, True, True, ("data",)),
        ("perplexity", None, True, True, ("data",)),
        ("multiple_choice", (0.0, 1.0), True, True, ("data", "examples")),
        ("tokens_generated", (0.0, np.inf), True, True, ("data",)),
        ("exact_match", (0.0, 1.0), True, True, ("data",)),
    ],
)
def test_what_the_search_may_know_of_a_kind(
    kind: str, limits: Any, by_example: bool | None, needs_tokenizer: bool, paths: tuple[str, ...]
) -> None:
    found = OBJECTIVES.get(kind, "type")
    assert (found.limits, found.by_example, found.needs_tokenizer) == (limits, by_example, needs_tokenizer)
    assert found.paths == paths
    assert set(paths) <= found.model_fields.keys()


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("accuracy", {}, "accuracy m:data, maximize"),
        ("entropy", {"head": {"call": "m:head"}}, "entropy m:data with m:head, minimize"),
        ("call", {"direction": "minimize"}, "call m:f, minimize"),
        ("lm_eval", {}, "lm_eval, maximize"),
        ("perplexity", {}, "perplexity, minimize"),
        ("exact_match", {}, "exact_match, maximize"),
    ],
)
def test_an_objective_is_told_in_words(kind: str, fields: dict[str, Any], words: str) -> None:
    assert objective("o", kind, **SMALLEST[kind], **fields).describe() == words


def test_functions_are_told_with_where_they_stand_and_what_they_get() -> None:
    made = objective("o", "entropy", data=call("m:data", {"n": 3}), head=call("m:head"))
    assert list(made.calls()) == [NamedCall("data", call("m:data", {"n": 3})), NamedCall("head", call("m:head"))]
    assert list(objective("o", "accuracy", data=call("m:data")).calls()) == [NamedCall("data", call("m:data"))]
    made = objective("o", "call", call="m:f", arguments={"x": 1})
    assert list(made.calls()) == [NamedCall("", call("m:f", {"x": 1}), given=1)]
    assert list(objective("o", "perplexity", data="a.txt").calls()) == []


def test_paths_are_made_whole_and_nothing_else() -> None:
    made = objective("o", "multiple_choice", data=["a.jsonl", "b.jsonl"], examples="c.jsonl", answer="a")
    whole = made.with_paths(lambda path: f"/data/{path}")
    assert whole == made.model_copy(update={"data": ("/data/a.jsonl", "/data/b.jsonl"), "examples": "/data/c.jsonl"})
    assert objective("o", "lm_eval", task="t").with_paths(lambda path: f"/{path}").model_dump()["folder"] is None
    plain = objective("o", "call", call="m:f", arguments={"data": "a"})
    assert plain.with_paths(lambda path: f"/{path}") == plain


def test_without_a_tokenizer_a_kind_that_needs_one_says_so() -> None:
    with pytest.raises(InputError, match="objective 'o': tokenizer: expected a directory, found nothing"):
        objective("o", "perplexity", data="a.txt").build(context())


def test_the_recipe_and_its_settings_import_neither_lm_eval_nor_transformers() -> None:
    program = """
import sys
import ecotone.experiments.recipe
print("torch" in sys.modules)
from ecotone.fitness.registry import LOSSES, OBJECTIVES
OBJECTIVES.usable(), LOSSES.usable()
print(sorted({"lm_eval", "transformers", "datasets"} & sys.modules.keys()))
"""
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.stdout.split("\n")[:2] == ["False", "[]"], done.stderr


# -- kinds of others -----------------------------------------------------------------------------------------


class Norm:
    """How small the weights are: 1 / (1 + norm / scale)."""

    def __init__(self, goal: Goal, scale: float) -> None:
        self.goal, self._scale = goal, scale

    def score(self, model: Any) -> Score:
        tensors = model.parameters() if isinstance(model, nn.Module) else model.values()
        return Score(1 / (1 + sum(float(tensor.norm()) for tensor in tensors) / self._scale))


class NormSettings(ObjectiveSettings):
    """How small the weights are.

    Attributes:
        scale: The norm of which the score is one half.
        table: A file that nobody reads.
    """

    type: Literal["norm"]
    direction: Literal["maximize"] = "maximize"
    scale: float = Field(default=1.0, gt=0)
    table: str = "table.csv"

    limits: ClassVar[tuple[float, float] | None] = None
    by_example: ClassVar[bool | None] = False
    needs_tokenizer: ClassVar[bool] = False
    paths: ClassVar[tuple[str, ...]] = ("table",)

    def build(self, context: ObjectiveContext) -> Objective:
        return Norm(self.goal, self.scale)

    def examine(self) -> Iterator[tuple[str, str]]:
        yield f"norm {self.name}", f"of {Path(self.table).name}"


class Focal(Task):
    """Cross-entropy whose sure examples count less."""

    def __init__(self, settings: FocalSettings, *arguments: Any) -> None:
        super().__init__(settings.name, *arguments)
        self._power = settings.power

    def loss(self, model: Any, step: int) -> tuple[torch.Tensor, dict[str, float], int]:
        value, details, count = super().loss(model, step)
        return value * (1 - (-value).exp()) ** self._power, details, count


class FocalSettings(CalibrationSettings):
    """Cross-entropy whose sure examples count less.

    Attributes:
        power: How much less.
    """

    loss: Literal["focal"] = "focal"
    power: float = Field(default=2.0, ge=0)

    needs_labels: ClassVar[bool] = True
    needs_expert: ClassVar[bool] = False

    def build(self, context: ObjectiveContext, seed: int) -> Focal:
        examples, head = parts_of(self, context)
        return Focal(self, examples, "cross_entropy", head, self.batch, seed)


@pytest.fixture
def others() -> Iterator[None]:
    OBJECTIVES.register("norm", NormSettings)
    LOSSES.register("focal", FocalSettings)
    yield
    OBJECTIVES.forget("norm")
    LOSSES.forget("focal")


MODULE = """
import torch
from torch import nn
def net(): return nn.Linear(3, 2)
def data(): return torch.eye(3), torch.tensor([0, 1, 1])
"""


def recipe_of(folder: Path, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Recipe:
    (folder / "kinds_recipe.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "kinds_recipe", raising=False)
    for number, name in enumerate(("base", "a", "b")):
        torch.manual_seed(number)
        save_file(nn.Linear(3, 2).state_dict(), folder / f"{name}.safetensors")
    record = {
        "name": "others",
        "models": {
            "base": "base.safetensors",
            "experts": ["a.safetensors", "b.safetensors"],
            "architecture": {"call": "kinds_recipe:net"},
        },
        "merge": {"operator": "task_arithmetic"},
        "objectives": {"search": [{"name": "small", "type": "norm", "scale": 4}]},
        "calibration": [{"name": "t", "data": {"call": "kinds_recipe:data"}, "loss": "focal", "power": 1, "batch": 3}],
        "search": {"algorithm": "adamerging", "steps": 4, "check_every": 2},
        "budget": {"evaluations": 4},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    return Recipe.from_record({**record, **fields}, folder)


@pytest.mark.usefixtures("others", "threads")
def test_kinds_of_others_are_validated_described_and_measured_like_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tmp_path, monkeypatch)
    assert Recipe.from_record(recipe.record()).signature == recipe.signature
    assert recipe.record()["objectives"]["search"][0]["table"] == str(tmp_path / "table.csv")
    told = {finding.subject: finding.text for finding in validate(recipe)}
    assert told["objectives.search.small"] == "norm, maximize"
    assert told["norm small"] == "of table.csv"
    assert told["calibration.t"] == "focal of kinds_recipe:data, 3 examples a step"
    worker = Worker(pickle.loads(pickle.dumps(compose.worker_spec(recipe, None))))
    worker.try_out()
    genome = Genome.uniform(worker._sources.layout.size, [0.5, 0.5])
    batch = Gradient.of("t", 0)
    scored, learned = worker.measure([Trial(0, genome), Trial(1, genome, wants=batch)])
    assert scored.ok
    assert 0 < scored.scores["small"] < 1
    model = next(worker._backend.show([genome]))
    entropy = nn.functional.cross_entropy(model(torch.eye(3)), torch.tensor([0, 1, 1])).item()
    assert learned.scores["t"] == pytest.approx(entropy * (1 - np.exp(-entropy)), rel=1e-5)
    assert learned.gradient is not None


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"objectives": {"search": [{"name": "small", "type": "norm", "scal": 4}]}},
            "objectives.search[0].scal: unknown key. Did you mean 'scale'?",
        ),
        (
            {"objectives": {"search": [{"name": "small", "type": "norm", "scale": 0}]}},
            "objectives.search[0].scale: input should be greater than 0, found 0.",
        ),
        (
            {"objectives": {"search": [{"name": "small", "type": "nrom"}]}},
            "multiple_choice, tokens_generated, exact_match, norm, found 'nrom'. Did you mean 'norm'?",
        ),
        (
            {"calibration": [{"name": "t", "data": {"call": "m:f"}, "power": 3.0}]},
            "calibration[0]: power: belongs to loss: focal, found loss: entropy.",
        ),
        (
            {"calibration": [{"name": "t", "data": {"call": "m:f"}, "loss": "focal", "hidden": 3.0}]},
            "calibration[0]: hidden: belongs to loss: distillation, found loss: focal.",
        ),
        (
            {"calibration": [{"name": "t", "data": {"call": "m:f"}, "loss": "focal", "powr": 3.0}]},
            "calibration[0].powr: unknown key. Did you mean 'power'?",
        ),
    ],
)
def test_mistakes_in_kinds_of_others_are_refused_in_the_same_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as caught:
        recipe_of(tmp_path, monkeypatch, **fields)
    assert words in str(caught.value)


class Half(ObjectiveSettings):
    """Half an objective.

    Attributes:
        depth: How deep.
    """

    type: Literal["half"]
    depth: int = 1

    limits: ClassVar[tuple[float, float] | None] = None
    paths: ClassVar[tuple[str, ...]] = ()


class Unnamed(NormSettings):
    """Of another name."""


class HalfLoss(CalibrationSettings):
    """Half a loss."""

    loss: Literal["half"] = "half"

    needs_labels: ClassVar[bool] = True


@pytest.mark.parametrize(
    ("registry", "kind", "words"),
    [
        (OBJECTIVES, Half, "Half lacks build, by_example, needs_tokenizer. ObjectiveSettings says what each is."),
        (OBJECTIVES, Unnamed, "type: expected a Literal that holds 'half', found 'norm'."),
        (OBJECTIVES, Norm, "expected a class made of ObjectiveSettings, found Norm."),
        (OBJECTIVES, FocalSettings, "expected a class made of ObjectiveSettings, found FocalSettings."),
        (LOSSES, HalfLoss, "HalfLoss lacks build, needs_expert. CalibrationSettings says what each is."),
    ],
)
def test_a_half_declared_kind_is_refused(registry: Any, kind: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        registry.register("half", kind)
    assert str(caught.value).startswith(words)


def test_a_kind_that_is_not_registered_is_refused_from_python_too() -> None:
    with pytest.raises(ValidationError, match="found 'norm'"):
        TypeAdapter(AnyObjective).validate_python(NormSettings(name="n", type="norm"))


CALL = {"data": {"call": "m:f"}}
SETTINGS: dict[type[Kind], tuple[dict[str, Any], str]] = {
    RandomSettings: ({}, "search.algorithm: the search 'random'"),
    AccuracySettings: ({"name": "o", "type": "accuracy", **CALL}, "objective 'o': the objective 'accuracy'"),
    EntropyLossSettings: ({"name": "t", **CALL}, "calibration 't': the calibration loss 'entropy'"),
    ResidentSettings: ({}, "scoring.backend: the scoring backend 'resident'"),
}


def of_a_package(base: type[Kind], method: str, does: Callable[..., Any]) -> Callable[[], Any]:
    """A method of a class that is made from one of ours, as another package makes it."""
    kind = type("Mine", (base,), {method: does, "__module__": __name__})
    return getattr(kind(**SETTINGS[base][0]), method)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("base", "method"), [(base, method) for base in SETTINGS for method in base._answers])
def test_a_method_of_a_package_that_raises_is_told_with_the_package(
    base: type[Kind], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raises(self: Any) -> Any:
        raise OSError("no disk\nat all")

    asked, ours = of_a_package(base, method, raises), getattr(base, method)
    with pytest.raises(OSError, match="no disk"):  # of a class in no package its author sees what was raised
        asked()
    monkeypatch.setattr("ecotone.registry.package_of", lambda kind: "mine 1.0")
    with pytest.raises(InputError) as refused:
        asked()
    said = f"{SETTINGS[base][1]} of the package mine 1.0: {method}() raised OSError: no disk."
    assert (refused.value.message, refused.value.remedy) == (said, "Tell the authors of that package.")
    assert getattr(base, method) is ours


@pytest.mark.parametrize(
    ("base", "method", "answer", "expected"),
    [
        (RandomSettings, "make", None, "a pair of a search and a population"),
        (RandomSettings, "needs", None, "Needs"),
        (RandomSettings, "begins", True, "Begins"),
        (RandomSettings, "fineness", "fine", "one of model, groups, components, block, tensor, element"),
        (RandomSettings, "describe", None, "text"),
        (AccuracySettings, "build", None, "an object with goal and score"),
        (AccuracySettings, "calls", ("m:f",), "a sequence of NamedCall"),
        (AccuracySettings, "examine", None, "an iterator of facts"),
        (EntropyLossSettings, "build", None, "a calibration task"),
        (ResidentSettings, "make", None, "a backend, which has show"),
        (ResidentSettings, "gradients", None, "True or False"),
    ],
)
def test_an_answer_of_a_package_that_does_not_fit_is_refused(
    base: type[Kind], method: str, answer: Any, expected: str
) -> None:
    with pytest.raises(InputError) as refused:
        of_a_package(base, method, lambda self: answer)()
    assert refused.value.message == f"{SETTINGS[base][1]}: {method}(): expected {expected}, found {answer!r}."


def test_what_ecotone_raises_stays_and_a_generator_is_run_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> Any:
        raise InputError("data: expected more.", "Give more.")

    def facts(self: Any) -> Iterator[tuple[str, str]]:
        yield "data", "enough"
        raise OSError("no disk")

    monkeypatch.setattr("ecotone.registry.package_of", lambda kind: "mine 1.0")
    with pytest.raises(InputError, match=r"^data: expected more. Give more.$"):
        of_a_package(AccuracySettings, "build", fails)()
    with pytest.raises(InputError, match=r"examine\(\) raised OSError: no disk"):
        of_a_package(AccuracySettings, "examine", facts)()


class Picky(NormSettings):
    """Its check has a mistake."""

    @model_validator(mode="after")
    def _fits(self) -> Picky:
        raise KeyError("scale") if self.scale < 2 else ValueError("scale: expected less")


def test_what_a_validator_of_a_package_raises_is_told_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ecotone.registry.package_of", lambda kind: "mine 1.0")
    OBJECTIVES.register("norm", Picky)
    try:
        with pytest.raises(
            InputError, match=r"^type: the objective 'norm' of the package mine 1.0: model_validate\(\) "
        ):
            TypeAdapter(AnyObjective).validate_python({"name": "n", "type": "norm"})
        with pytest.raises(ValidationError, match="expected less"):
            TypeAdapter(AnyObjective).validate_python({"name": "n", "type": "norm", "scale": 3})
    finally:
        OBJECTIVES.forget("norm")


def test_a_search_may_refuse_an_operator_with_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(self: Any) -> None:
        raise ValueError("merge.operator: expected linear")

    monkeypatch.setattr("ecotone.registry.package_of", lambda kind: "mine 1.0")
    with pytest.raises(ValueError, match=r"^merge.operator: expected linear$"):
        of_a_package(RandomSettings, "check", refuses)()
