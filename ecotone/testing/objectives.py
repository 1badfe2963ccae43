"""Conformance suites for kinds of objectives and for calibration losses.

The author of a kind gives its tests a subclass with cases::

    from ecotone.testing.objectives import Case, ObjectiveConformance
    from my_package import MineSettings

    class TestMine(ObjectiveConformance):
        cases = {"mine": lambda folder: Case(MineSettings(name="mine", type="mine"), model_of_a_seed)}
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ecotone.fitness.kinds import CalibrationSettings, ObjectiveContext, ObjectiveSettings
from ecotone.fitness.protocol import CalibrationTask, Divisible, Objective
from ecotone.fitness.registry import LOSSES, OBJECTIVES, AnyCalibration, AnyObjective
from ecotone.populations.errors import EcotoneError

CPU = ObjectiveContext(torch.device("cpu"))
SettingsT = TypeVar("SettingsT", bound="ObjectiveSettings | CalibrationSettings")


@dataclass(frozen=True)
class Case(Generic[SettingsT]):
    """One kind under test.

    Args:
        settings: The settings, with small data.
        model: Gives a model that can be scored, for a seed: a module in evaluation mode, or tensors by name. Models of
            different seeds must score differently.
        context: The context it is built for.
        names: For losses: names of the experts, of which ``model`` gives the first for seed 0 and so on.
    """

    settings: SettingsT
    model: Callable[[int], Any]
    context: ObjectiveContext = CPU
    names: tuple[str, ...] = ("one", "two")


ObjectiveCase: TypeAlias = Callable[[Path], Case[ObjectiveSettings]]
"""Gives a case; the folder is a new one, for its files."""

LossCase: TypeAlias = Callable[[Path], Case[CalibrationSettings]]


class _Kinds:
    """Base of both suites: cases by name, and the tests of settings."""

    cases: ClassVar[Mapping[str, Any]] = {}
    adapter: ClassVar[TypeAdapter[Any]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Run every test over every case."""
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", list(self.cases), indirect=True)

    @pytest.fixture
    def case(self, request: pytest.FixtureRequest, tmp_path: Path) -> Case[Any]:
        """One case."""
        made: Case[Any] = type(self).cases[request.param](tmp_path)
        return made

    def test_a_record_is_taken_back(self, case: Case[Any]) -> None:
        """JSON, which runs record, and a pickle, which workers get, both give the same settings back."""
        record = self.adapter.dump_python(case.settings, mode="json")
        assert self.adapter.validate_python(json.loads(json.dumps(record))) == case.settings
        assert pickle.loads(pickle.dumps(case.settings)) == case.settings  # noqa: S301 (made here)

    def test_paths_that_are_whole_stay(self, case: Case[Any]) -> None:
        """Settings whose texts are located as they are do not change."""
        assert case.settings.located(str) == case.settings
        assert type(case.settings.located(str)) is type(case.settings)

    def test_it_is_told_in_one_line(self, case: Case[Any]) -> None:
        """``ecotone validate`` shows it."""
        told = case.settings.describe()
        assert told.strip()
        assert "\n" not in told


class ObjectiveConformance(_Kinds):
    """Inherit it, and give ``cases``; the kinds must be registered.

    Attributes:
        cases: The cases by name.
    """

    cases: ClassVar[Mapping[str, ObjectiveCase]] = {}
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(AnyObjective)

    @pytest.fixture
    def objective(self, case: Case[ObjectiveSettings]) -> Objective:
        """The objective that the case's settings build."""
        return case.settings.build(case.context)

    def test_it_is_registered_and_declares_all(self, case: Case[ObjectiveSettings]) -> None:
        """The registry checks its declarations."""
        assert OBJECTIVES.get(case.settings.type, "type") is type(case.settings)
        assert set(case.settings.paths) <= type(case.settings).model_fields.keys()
        assert case.settings.with_paths(str) == case.settings

    def test_it_measures_what_its_settings_say(self, case: Case[ObjectiveSettings], objective: Objective) -> None:
        """Name, direction, a finite number, and the declarations on examples and limits."""
        assert isinstance(objective, Objective)
        assert objective.goal == case.settings.goal
        score = objective.score(case.model(0))
        assert type(score.value) is float
        assert math.isfinite(score.value)
        given = score.per_example is not None
        assert case.settings.by_example in (None, given)
        if score.per_example is not None:
            assert score.per_example.shape == (score.items,)
        if case.settings.limits is not None:
            least, most = case.settings.limits
            assert score.per_example is not None
            assert least <= score.per_example.min() <= score.per_example.max() <= most
            assert score.value == pytest.approx(float(score.per_example.mean(dtype=np.float64)), rel=1e-6)

    def test_models_score_differently_and_each_the_same_whenever(
        self, case: Case[ObjectiveSettings], objective: Objective
    ) -> None:
        """Scores depend neither on earlier scores nor on the object that scores."""
        first, second = (_scored(objective, case.model(seed)) for seed in range(2))
        assert first != second
        assert _scored(objective, case.model(0)) == first
        assert _scored(case.settings.build(case.context), case.model(1)) == second

    def test_it_leaves_the_model_and_the_generators_as_they_are(
        self, case: Case[ObjectiveSettings], objective: Objective
    ) -> None:
        """Other objectives score the same model, and a user's random numbers are the user's."""
        model = case.model(0)
        weights, before = copy.deepcopy(_tensors(model)), _generators()
        objective.score(model)
        assert _generators() == before
        assert all(torch.equal(tensor, weights[name]) for name, tensor in _tensors(model).items())

    def test_weights_that_are_no_numbers_have_no_score(
        self, case: Case[ObjectiveSettings], objective: Objective
    ) -> None:
        """NaN in, NaN out, or an error; never a number that a search would believe."""
        try:
            found = objective.score(_broken(case.model(0))).value
        except (EcotoneError, ArithmeticError, ValueError, RuntimeError):
            return
        assert not math.isfinite(found)

    def test_parts_make_up_the_whole(self, case: Case[ObjectiveSettings], objective: Objective) -> None:
        """The scores of examples are the same asked in parts, and pooled they are the score."""
        if not isinstance(objective, Divisible):
            pytest.skip("it cannot be asked of some of its examples")
        model = case.model(0)
        whole = objective.score(model)
        assert whole.per_example is not None
        assert objective.count == whole.items
        numbers = np.random.default_rng(4).permutation(objective.count)
        for part in np.array_split(numbers, 3):
            score = objective.subset(part).score(model)
            assert score.per_example == pytest.approx(whole.per_example[part], rel=1e-6)
            value, error = objective.pooled(score.per_example, part)
            assert value == pytest.approx(score.value, rel=1e-6)
            assert error >= 0
        value, error = objective.pooled(whole.per_example, np.arange(objective.count))
        assert value == pytest.approx(whole.value, rel=1e-12)
        assert error == 0


class LossConformance(_Kinds):
    """Inherit it, and give ``cases`` whose models have parameters with gradients; the losses must be registered.

    Attributes:
        cases: The cases by name.
    """

    cases: ClassVar[Mapping[str, LossCase]] = {}
    adapter: ClassVar[TypeAdapter[Any]] = TypeAdapter(AnyCalibration)

    @pytest.fixture
    def task(self, case: Case[CalibrationSettings]) -> CalibrationTask:
        """The calibration task that the case's settings build."""
        return case.settings.build(case.context, 3)

    def test_it_is_registered_and_declares_all(self, case: Case[CalibrationSettings]) -> None:
        """The registry checks its declarations."""
        assert LOSSES.get(case.settings.loss, "loss") is type(case.settings)
        assert (case.settings.teacher is not None) == case.settings.needs_expert

    def test_it_fits_its_models(self, case: Case[CalibrationSettings], task: CalibrationTask) -> None:
        """And has its settings' name."""
        assert task.name == case.settings.name
        task.fits(case.model(0), case.names)

    def test_a_batch_depends_on_its_number_and_the_seed_alone(
        self, case: Case[CalibrationSettings], task: CalibrationTask
    ) -> None:
        """It depends neither on earlier calls nor on the object that is called."""
        steps = [0, 1, 2, 7]
        first = [_lost(case, task, step) for step in steps]
        assert [_lost(case, task, step) for step in reversed(steps)] == first[::-1]
        assert _lost(case, case.settings.build(case.context, 3), 7) == first[-1]
        other = case.settings.build(case.context, 4)
        assert [_lost(case, other, step) for step in steps] != first

    def test_the_loss_is_differentiated_by_the_weights(
        self, case: Case[CalibrationSettings], task: CalibrationTask
    ) -> None:
        """A finite number with finite gradients, details that are numbers, and examples that are counted."""
        model = case.model(1)
        task.prepare(0, _expert(case))
        loss, details, count = task.loss(model, 0)
        assert loss.shape == ()
        assert math.isfinite(float(loss.detach()))
        assert 1 <= count <= case.settings.batch
        assert all(type(value) is float for value in details.values())
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        given = [gradient for gradient in gradients if gradient is not None]
        assert any(bool(gradient.abs().sum() > 0) for gradient in given)
        assert all(bool(gradient.isfinite().all()) for gradient in given)


def _scored(objective: Objective, model: Any) -> tuple[float, bytes]:
    score = objective.score(model)
    return score.value, b"" if score.per_example is None else score.per_example.tobytes()


def _lost(case: Case[CalibrationSettings], task: CalibrationTask, step: int) -> float:
    task.prepare(step, _expert(case))
    return float(task.loss(case.model(1), step)[0].detach())


def _expert(case: Case[CalibrationSettings]) -> Callable[[str], Any]:
    return lambda name: case.model(case.names.index(name))


def _tensors(model: Any) -> dict[str, Tensor]:
    return dict(model.state_dict()) if isinstance(model, nn.Module) else dict(model)


def _broken(model: Any) -> Any:
    """``model`` with NaN in place of all its weights."""
    for tensor in _tensors(model).values():
        if tensor.is_floating_point():
            tensor.fill_(math.nan)
    return model


def _generators() -> tuple[Any, ...]:
    """The states of the global random number generators."""
    return random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist()
