"""The recipe's list of stages: each a search with its share of the budget and what it begins with.

How a chain runs is in ``ecotone.search.stages``. Nothing here knows an algorithm: each declares whether it can
begin with found merges, and how fine its segments are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.space import Space
from ecotone.search.coefficients import Parts
from ecotone.search.kinds import APART, Context, Fineness, Pair, beyond, takes_number
from ecotone.search.registry import SEARCHES, AnySearch
from ecotone.search.stages import Stage, StagedSearch, Start, stage_seed
from ecotone.search.starts.placing import begun
from ecotone.settings import Part


class StageSettings(Part):
    """One search of a chain, written as a search with these keys beside its own.

    Attributes:
        search: The search of the stage. Its fields are written beside ``evaluations``, ``start`` and ``starts``.
        evaluations: Evaluations that the stage may spend of the budget. The last stage may leave them out and has the
            rest.
        start: The merges of the stage before that this stage begins with: its ``front``, its ``best`` merge, its
            ``archive`` (the members of its population) or ``none``. A mapping, ``{solve: ...}``, is the search's own
            ``start``. By default ``front``, where the algorithm can begin with given merges. Merges of the stage before
            are not scored again. M2N2, NSGA and Optuna's samplers begin with them in place of the models. CMA-ES takes
            the best of them as its mean.
        starts: The most merges to begin with: the best merge, and others spread over the scores. By default 4 for
            searches by gradient, which learn from each, and all merges for others.
    """

    search: AnySearch
    evaluations: int | None = Field(default=None, ge=1)
    start: Start | None = None
    starts: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _sorted(cls, value: Any) -> Any:
        """Tell the stage's keys from the search's.

        A ``start`` that is a mapping is the search's own, as it is where the search stands alone. So is a number, where
        the algorithm takes one.
        """
        if not isinstance(value, Mapping) or "search" in value:
            return value
        start = value.get("start")
        placed = isinstance(start, Mapping | Part) or (
            isinstance(start, int | float) and _takes_number(value.get("algorithm"))
        )
        of_stage = {"evaluations", "starts"} | (set() if placed else {"start"})
        rest = {key: setting for key, setting in value.items() if key not in of_stage}
        return {"search": rest, **{key: value[key] for key in of_stage if key in value}}

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        search = fields.pop("search")
        start = fields.pop("start")
        return {**search, **fields, "start": search.get("start") if start is None else start}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON Schema of what is written: every kind of search, with the stage's keys beside its own."""
        whole = super().__get_pydantic_json_schema__(schema, handler)
        shape = handler.resolve_ref_schema(whole)
        keys = dict(shape.pop("properties"))
        search = keys.pop("search")
        stages = []
        for one in search["oneOf"]:
            kind = handler.resolve_ref_schema(one)
            own = kind["properties"]
            both = {"start": {"anyOf": [own["start"], keys["start"]]}} if "start" in own else {}
            stages.append({**kind, "properties": {**own, **keys, **both}})
        for key in ("type", "required", "additionalProperties"):
            shape.pop(key, None)
        shape["oneOf"] = stages
        return whole

    @property
    def begins(self) -> Start:
        """The kind of merges that the stage begins with, unless it is the first stage."""
        if self.start is not None:
            return self.start
        begins = self.search.begins()
        return "none" if begins.placed or begins.refusal or self.search.solvers else "front"

    @property
    def most(self) -> int | None:
        """The most merges that it begins with; None means all."""
        begins = self.search.begins()
        return begins.most if begins.fixed or self.starts is None else self.starts


class ChainSettings(Part):
    """A chain of searches: a list under ``search``. Each search begins with the merges that the search before it found.

    Attributes:
        stages: The searches, in order.
    """

    stages: tuple[StageSettings, ...]

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, value: Any) -> Any:
        return {"stages": value} if isinstance(value, list | tuple) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """The JSON Schema of what is written: the list."""
        whole = super().__get_pydantic_json_schema__(schema, handler)
        shape = handler.resolve_ref_schema(whole)
        stages = shape["properties"]["stages"]
        shape.clear()
        shape |= {"title": cls.__name__, "description": cls.summary(), **stages, "minItems": 1}
        return whole

    @model_serializer(mode="wrap")
    def _listed(self, handler: SerializerFunctionWrapHandler) -> list[dict[str, Any]]:
        stages: list[dict[str, Any]] = handler(self)["stages"]
        return stages

    @model_validator(mode="after")
    def _fit_each_other(self) -> ChainSettings:
        if not self.stages:
            raise ValueError("expected one stage or more, found none")
        first = self.stages[0]
        if first.start not in (None, "none") or first.starts is not None:
            raise ValueError("stage 0: there is none before it that it could begin with; leave start and starts out")
        without = [i for i, stage in enumerate(self.stages[:-1]) if stage.evaluations is None]
        if without:
            raise ValueError(
                f"stage {without[0]}: expected evaluations, its share of the budget; only the last may leave it out"
            )
        reached = {first.search.fineness()}
        for index, stage in enumerate(self.stages[1:], 1):
            if stage.begins != "none":
                self._check_start(index, reached)
            joined = stage.begins != "none" and stage.search.begins().any_segments
            reached = {stage.search.fineness(), *(reached if joined else ())}
        return self

    def _check_start(self, index: int, reached: Collection[Fineness]) -> None:
        """Refuse a start that the stage cannot take, or whose segments are finer than the stage's own."""
        search, before = self.stages[index].search, self.stages[index - 1].search
        place, begins = f"stage {index} ({search.algorithm})", search.begins()
        if begins.refusal:
            raise ValueError(f"{place}: {begins.refusal}; say start: none")
        if before.needs().vectors:
            raise ValueError(
                f"{place}: it cannot begin with what stage {index - 1} finds: with mutation {before.algorithm} breeds "
                "whole vectors of weights, which have no coefficients; say start: none"
            )
        finer = None if begins.any_segments else beyond(reached, search.fineness())
        if finer is not None:
            cut = "cuts otherwise" if (search.fineness(), finer) in APART else "is coarser"
            raise ValueError(
                f"{place}: its granularity, {search.fineness()}, {cut} than that of the merges of stage "
                f"{index - 1}, {finer}; make this one finer, the other coarser, or say start: none"
            )

    @property
    def algorithm(self) -> str:
        """The algorithms, joined by plus signs."""
        return "+".join(stage.search.algorithm for stage in self.stages)

    @property
    def starts(self) -> tuple[Start, ...]:
        """For each stage, the kind of merges that it begins with."""
        return ("none", *(stage.begins for stage in self.stages[1:]))

    @property
    def shared_out(self) -> int:
        """Evaluations of the stages that say how many."""
        return sum(stage.evaluations or 0 for stage in self.stages)

    def contexts(self, context: Context) -> tuple[Context, ...]:
        """For each stage, the context of its search: its own seed and its share of the budget."""
        rest = None if context.evaluations is None else context.evaluations - self.shared_out
        return tuple(
            replace(context, seed=stage_seed(context.seed, index), evaluations=stage.evaluations or rest, starts=())
            for index, stage in enumerate(self.stages)
        )

    def make(self, context: Context) -> Pair:
        """The chain as one search, and the population of the stage that runs.

        Raises:
            InputError: A stage cannot be made, or its segments lack borders of the merges that it begins with.
        """
        self.check_segments(context.space)
        stages = []
        for index, stage_context in enumerate(self.contexts(context)):
            make = partial(self._begun, index, stage_context)
            if index:  # the first is made at once; what does not fit the others is refused before anything is scored
                make(())
            stage = self.stages[index]
            stages.append(Stage(stage.search.algorithm, make, stage.evaluations, self.starts[index], stage.most))
        search = StagedSearch(stages, context.goals)
        return search, search.population

    def _begun(self, index: int, context: Context, starts: Sequence[Genome]) -> Pair:
        with of_stage(index):
            search, given = self.stages[index].search, replace(context, starts=tuple(starts))
            return search.make(given if self.starts[index] != "none" else begun(search, given))

    def check_segments(self, space: Space) -> None:
        """Refuse a stage whose segments lack borders that the merges of the stage before it may have.

        Raises:
            InputError: There is one.
        """
        reached = Parts(np.array([0, space.size]))
        for index, stage in enumerate(self.stages):
            part = stage.search
            with of_stage(index):
                own = part.parts(space)
            begins = self.starts[index] != "none"
            joined = begins and part.begins().any_segments
            if begins and not joined and not own.holds(reached):
                apart = not np.isin(reached.borders, own.borders).all()
                lack = "borders that its own, {}, lack" if apart else "coefficients apart that its own, {}, share"
                raise InputError(
                    f"search[{index}].granularity: the segments of the merges of stage {index - 1} have "
                    f"{lack.format(part.fineness())}.",
                    "Make it finer, the stage before coarser, or say start: none.",
                )
            reached = Parts(np.union1d(own.borders, reached.borders)) if joined else own

    def placed(self, index: int) -> str:
        """A stage in words: the merges that it begins with, and its share of the budget."""
        stage, start = self.stages[index], self.starts[index]
        most = f", at most {stage.most} merges" if stage.most not in (None, 1) and start in ("front", "archive") else ""
        begins = "" if start == "none" else f"begins with the {start} of stage {index - 1}{most}, "
        share = "the rest of the budget" if stage.evaluations is None else f"{stage.evaluations} evaluations"
        return f"{begins}{share}"


@contextlib.contextmanager
def of_stage(index: int) -> Iterator[None]:
    """Have errors name the stage's fields as the recipe has them."""
    try:
        yield
    except InputError as error:
        place = f"search[{index}]."

        def named(text: str) -> str:
            return text.replace("search.", place).replace("budget.evaluations", f"{place}evaluations")

        raise InputError(named(error.message), named(error.remedy)) from error


def _takes_number(algorithm: Any) -> bool:
    return algorithm in SEARCHES and takes_number(SEARCHES.get(algorithm, "search"))
