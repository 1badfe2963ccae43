"""The recipe: everything a search is made of, in one YAML file or in Python.

Unknown keys are refused with the nearest known one. The recipe's ``signature`` covers what changes results;
where and with how many workers it runs, how long, and how it is tracked do not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

import yaml
from pydantic import (
    Discriminator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationError,
    model_serializer,
    model_validator,
)

from ecotone.experiments.parts import OBJECTIVES, Call, LanguageObjective, Objective, Part
from ecotone.experiments.tracking.settings import TrackingSettings
from ecotone.merging.models.hub import is_repository
from ecotone.populations.errors import InputError, nearest

PREPARED = "prepared:"
RESUMABLE = ("runtime", "tracking", "budget")  # what a resumed run may be given anew: it changes no recorded trial
PATHS = ("data", "examples", "folder")  # fields of objectives of language models that name files


class Models(Part):
    """The models to merge.

    Attributes:
        experts: safetensors files, Hugging Face directories or LoRA adapters (which need the base), relative to the
            recipe's folder, or repositories of the hub (``organisation/name``, ``organisation/name@revision``); a path
            that begins with ``prepared:`` is relative to what the preparation step wrote.
        base: The model they were fine-tuned from; needed by operators that work on task vectors.
        tokenizer: Hugging Face directory of the tokenizer, for objectives of language models; by default the base, or
            else the first expert.
        vocabulary: What to do with models whose vocabularies have other sizes: refuse them (``same``), cut them to the
            ``base``'s, or take the ``union``.
        names: What to call the experts; by default their file names.
        architecture: ``auto`` for Hugging Face directories, a call that returns a ``torch.nn.Module`` whose
            state-dict names match the files, or nothing when objectives take plain tensors.
    """

    experts: tuple[str, ...] = Field(min_length=1)
    base: str | None = None
    tokenizer: str | None = None
    vocabulary: Literal["same", "base", "union"] = "same"
    names: tuple[str, ...] | None = None
    architecture: Call | Literal["auto"] | None = None

    @model_validator(mode="after")
    def _names_fit(self) -> Models:
        if self.names is not None and len(self.names) != len(self.experts):
            raise ValueError(f"names: expected {len(self.experts)}, one an expert, found {len(self.names)}")
        return self


class Range(Part):
    """Bounds between which a search chooses a setting of the merge operator, for every merge anew.

    Attributes:
        low: The smallest value.
        high: The largest value.
        scale: ``linear``, ``log``, or ``integer`` for whole numbers alone.
    """

    low: float
    high: float
    scale: Literal["linear", "log", "integer"] = "linear"

    @model_validator(mode="after")
    def _is_open(self) -> Range:
        if not self.low < self.high:
            raise ValueError(f"low: expected less than high ({self.high}), found {self.low}")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low: expected more than 0 with scale log, found {self.low}")
        return self


def _value_or_range(value: Any) -> str:
    return "range" if isinstance(value, Mapping | Range) else "value"


Density: TypeAlias = Annotated[
    Annotated[Annotated[float, Field(gt=0, le=1)], Tag("value")] | Annotated[Range, Tag("range")],
    Discriminator(_value_or_range),
]
MaskSeed: TypeAlias = Annotated[
    Annotated[Annotated[int, Field(ge=0)], Tag("value")] | Annotated[Range, Tag("range")],
    Discriminator(_value_or_range),
]


class Merge(Part):
    """How sources are made of the models.

    Attributes:
        operator: ``linear`` mixes the experts themselves, ``task_arithmetic`` adds task vectors to the base, ``ties``,
            ``dare`` and ``dare_ties`` add thinned ones, ``ties_vectors`` those of AdaMerging++; ``slerp`` goes from one
            of two models to the other. Each is described in its file in ``merging/operators``.
        density: The share of each task vector that is kept, for operators that thin. With ``{low, high}`` it is
            searched beside the coefficients.
        mask_seed: For ``dare`` and ``dare_ties``: of the draw of what is kept. It, too, may be searched.
        combine: For ``ties`` and ``dare_ties``: the ``mean`` or the ``sum`` of the task vectors that agree.
        per: For ``slerp``: the angle is that of the whole ``model``, or of each ``tensor``.
        dtype: What merged weights are rounded to, scored in and exported in; by default what the experts are stored
            in (float32 when an architecture is given and they mix types).
    """

    operator: str = "linear"
    density: Density | None = None
    mask_seed: MaskSeed | None = None
    combine: Literal["mean", "sum"] | None = None
    per: Literal["model", "tensor"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The operator's settings that are given and the same for all merges."""
        return {name: value for name, value in self._given.items() if not isinstance(value, Range)}

    @property
    def ranges(self) -> dict[str, Range]:
        """Those that are searched."""
        return {name: value for name, value in self._given.items() if isinstance(value, Range)}

    @property
    def _given(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("density", "mask_seed", "combine", "per")}
        return {name: value for name, value in found.items() if value is not None}


class Objectives(Part):
    """What guides the search, and what its results are judged by: data the search has not seen."""

    search: tuple[Objective, ...] = Field(min_length=1)
    held_out: tuple[Objective, ...] = ()

    @model_validator(mode="after")
    def _unique(self) -> Objectives:
        for group, objectives in (("search", self.search), ("held_out", self.held_out)):
            names = [objective.name for objective in objectives]
            if len(set(names)) < len(names):
                raise ValueError(f"{group}: expected objectives of different names, found {names}")
        return self


class Calibration(Part):
    """A task that a gradient search learns coefficients on: a stream of batches, and the loss that is differentiated.

    Attributes:
        name: The task's name.
        data: Returns the inputs, or (inputs, labels); labels are used by ``cross_entropy`` alone.
        loss: ``entropy`` of the predictions, ``cross_entropy`` with the labels, or ``distillation``: how far logits and
            hidden layers are from those of an expert (Expert Merging), which needs no labels.
        head: As in objectives of type ``accuracy``.
        batch: Examples in one batch.
        expert: For ``distillation``: the name of the expert to be like; by default the one named as the task.
        temperature: For ``distillation``: what logits are divided by.
        hidden: For ``distillation``: weight of the hidden layers' mean squared error.
        layers: For ``distillation``: which hidden layers: names of the architecture's modules, or positions in a
            Hugging Face model's ``hidden_states``; by default the last of these, or the outputs that the head takes.
    """

    name: str
    data: Call
    loss: Literal["entropy", "cross_entropy", "distillation"] = "entropy"
    head: Call | None = None
    batch: int = Field(default=16, ge=1)
    expert: str | None = None
    temperature: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=1.0, ge=0)
    layers: tuple[int | str, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _distils(self) -> Calibration:
        plain = {"expert": None, "temperature": 1.0, "hidden": 1.0, "layers": None}
        given = [name for name, value in plain.items() if getattr(self, name) != value]
        if given and self.loss != "distillation":
            raise ValueError(f"{given[0]}: belongs to loss: distillation, found loss: {self.loss}")
        return self


class Refine(Part):
    """Refinement of M2N2's children by gradient on the calibration tasks, before they are scored
    (``ecotone.search.refined``).

    Attributes:
        every: Refine every so many children.
        steps: Steps of Adam for each, over one batch of every task.
        rate: Adam's learning rate.
    """

    every: int = Field(default=4, ge=1)
    steps: int = Field(default=5, ge=1)
    rate: float = Field(default=0.01, gt=0)


class Race(Part):
    """Candidates are scored on some of the examples first, and only promising ones on all (``ecotone.search.racing``).

    Attributes:
        fidelities: Shares of the examples after which a group of candidates is cut; none for no cuts.
        eta: One candidate in so many goes on.
        group: Candidates that race one another.
        slices: Parts in which the rest of the examples is scored.
        bound: Whether a candidate ends that could not enter population or front any more, whatever is left.
    """

    fidelities: tuple[float, ...] = (0.1,)
    eta: float = Field(default=3.0, ge=1)
    group: int = Field(default=9, ge=1)
    slices: int = Field(default=3, ge=1)
    bound: bool = True

    @model_validator(mode="after")
    def _ascending(self) -> Race:
        if not all(a < b for a, b in pairwise((0.0, *self.fidelities, 1.0))):
            raise ValueError(f"fidelities: expected ascending shares between 0 and 1, found {list(self.fidelities)}")
        return self


class M2N2Search(Part):
    """M2N2: evolution with niches, attraction and split points (``ecotone.search.m2n2``)."""

    algorithm: Literal["m2n2"] = "m2n2"
    archive: int = Field(default=20, ge=2)
    alpha: float = Field(default=1.0, ge=0)
    resource: Literal["max", "one"] = "max"
    attraction: bool = True
    split: bool = True
    crossover: bool = True
    interpolation: Literal["slerp", "linear"] = "slerp"
    granularity: Literal["element", "tensor", "block"] = "element"
    mutation: float = Field(default=0.0, ge=0)
    max_segments: int = Field(default=1024, ge=2)
    refine: Refine | None = None
    race: Race | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> M2N2Search:
        if self.refine is not None and self.race is not None:
            raise ValueError("race: children that are refined cannot race; leave refine or race out")
        if self.refine is not None and self.mutation > 0:
            raise ValueError("refine: with mutation children are whole vectors, without coefficients; leave one out")
        if not self.crossover and self.mutation == 0:
            raise ValueError("crossover: without it and with mutation 0 every child is a copy; set mutation above 0")
        return self


class Segmented(Part):
    """Coefficients of segments: one set a model, block or tensor, or one of ``groups`` runs of blocks."""

    granularity: Literal["model", "groups", "block", "tensor"] = "block"
    groups: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _groups_are_asked_for(self) -> Segmented:
        if self.groups > 1 and self.granularity != "groups":
            raise ValueError(f"groups: expected granularity: groups with it, found granularity: {self.granularity}")
        return self


class Box(Segmented):
    """Coefficients of segments between two bounds."""

    low: float = 0.0
    high: float = 1.0
    archive: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _box_is_open(self) -> Box:
        if not self.low < self.high:
            raise ValueError(f"low: expected less than high ({self.high}), found {self.low}")
        return self


class RandomBox(Box):
    """Random search: coefficients drawn evenly (``ecotone.search.random_search``)."""

    algorithm: Literal["random"]
    race: Race | None = None


class CmaEsBox(Box):
    """CMA-ES, or its separable form, on the mean of the objectives (``ecotone.search.cma_es``)."""

    algorithm: Literal["cma_es", "sep_cma_es"]
    start: float | None = None
    sigma: float = Field(default=0.2, gt=0)
    population_size: int | None = Field(default=None, ge=2)
    race: Race | None = None

    @model_validator(mode="after")
    def _start_inside(self) -> CmaEsBox:
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start: expected between {self.low} and {self.high}, found {self.start}")
        return self


class FrontBox(Box):
    """What the searches for a front have in common: by default one coefficient a model."""

    granularity: Literal["model", "groups", "block", "tensor"] = "model"


class SurrogateBox(FrontBox):
    """What the searches with a quadratic surrogate have in common.

    Attributes:
        samples: Candidates scored before the first surrogate; None leaves it to the algorithm.
        links: How scores are bent before a quadratic is fitted: ``auto``, ``sigmoid``, ``softplus`` or ``identity``,
            or one of them by objective.
    """

    samples: int | None = Field(default=None, ge=1)
    links: str | dict[str, str] = "auto"


class MapBox(SurrogateBox):
    """MAP: samples, a surrogate an objective, their front, and the part of it that is scored
    (``ecotone.search.map``).
    """

    algorithm: Literal["map"]
    design: Literal["mixed", "sobol", "grid", "random"] = "mixed"
    front: int | None = Field(default=None, ge=1)
    margin: float = Field(default=0.1, ge=0)
    caution: float = Field(default=1.0, ge=0)


class BayesianMapBox(SurrogateBox):
    """Bayesian MAP: batches chosen by surrogates that say how sure they are (``ecotone.search.bayesian_map``).

    Attributes:
        reference: By objective the score from which hypervolume counts; for shares the worst that the models alone
            score unless given.
    """

    algorithm: Literal["bayesian_map"]
    acquisition: Literal["hypervolume", "bins"] = "hypervolume"
    reference: dict[str, float] | None = None
    patience: int | None = Field(default=120, ge=1)
    tolerance: float = Field(default=1e-3, ge=0)
    paths: int = Field(default=32, ge=1)
    candidates: int = Field(default=512, ge=8)


class NestedMapBox(SurrogateBox):
    """Nested MAP: a tree of pairwise MAPs, for many models and one coefficient each (``ecotone.search.nested_map``).

    Attributes:
        owners: By objective the model it belongs to; None when objectives and models are in the same order.
        preference: By objective how much it matters; 1 where not given.
        front: Candidates scored of each pair's predicted front.
    """

    algorithm: Literal["nested_map"]
    owners: dict[str, str] | None = None
    preference: dict[str, float] | None = None
    front: int | None = Field(default=None, ge=1)
    caution: float = Field(default=1.0, ge=0)


class ModelsFirstBox(FrontBox):
    """A search that may begin with given points.

    Attributes:
        models_first: Score the models themselves and their average before anything else.
    """

    models_first: bool = True


class NsgaBox(ModelsFirstBox):
    """NSGA-II or NSGA-III in steady state (``ecotone.search.nsga``)."""

    algorithm: Literal["nsga2", "nsga3"]
    population: int | None = Field(default=None, ge=4)
    crossover: float = Field(default=0.9, ge=0, le=1)
    crossover_index: float = Field(default=20.0, ge=0)
    mutation: float | None = Field(default=None, ge=0, le=1)
    mutation_index: float = Field(default=20.0, ge=0)
    race: Race | None = None


class OptunaBox(ModelsFirstBox):
    """One of Optuna's samplers (``ecotone.search.optuna_search``); a setting that is not given is the sampler's own."""

    algorithm: Literal["optuna"]
    sampler: Literal["tpe", "gp", "nsga2", "nsga3", "cma_es", "random", "qmc"] = "tpe"
    startup: int | None = Field(default=None, ge=1)
    multivariate: bool | None = None
    constant_liar: bool | None = None
    population: int | None = Field(default=None, ge=2)
    separable: bool | None = None
    history: int | None = Field(default=None, ge=2)


class GradientSearch(Segmented):
    """What searches that follow the gradient of the calibration tasks have in common.

    Attributes:
        steps: Steps of Adam, each over ``accumulate`` batches of every task.
        accumulate: Batches of a task in one step.
        together: Have a worker differentiate so many tasks at once: faster where there are fewer workers than tasks.
        weights: By task how much its loss counts; 1 where not given.
        sweep: Learn so many times, each with another weighting of the tasks, for a front.
        restarts: Learn so many times, from ``init`` and from points around it.
        check_every: Score the objectives every so many steps.
        patience: Stop after so many such checks without a better one.
    """

    granularity: Literal["model", "groups", "block", "tensor"] = "tensor"
    steps: int = Field(default=500, ge=1)
    accumulate: int = Field(default=1, ge=1)
    together: int = Field(default=1, ge=1)
    weights: dict[str, float] | None = None
    sweep: int | None = Field(default=None, ge=2)
    restarts: int = Field(default=1, ge=1)
    check_every: int = Field(default=25, ge=1)
    patience: int | None = Field(default=None, ge=1)
    archive: int = Field(default=20, ge=1)


class AdaMergingSearch(GradientSearch):
    """AdaMerging: coefficients learned by gradient on the calibration tasks (``ecotone.search.adamerging``).

    Attributes:
        granularity: ``tensor`` is the paper's layer-wise form, ``model`` its task-wise form.
        groups: With ``granularity: groups``, how many runs of blocks have coefficients of their own.
        init: Where coefficients begin.
        rate: Adam's learning rate.
        clamp: Use coefficients cut off at 0 and 1, as in the paper; their gradient is zero outside.
        spread: Standard deviation of the points around ``init`` at which restarts begin.
    """

    algorithm: Literal["adamerging"]
    init: float = 0.3
    rate: float = Field(default=1e-3, gt=0)
    clamp: bool = False
    spread: float = Field(default=0.1, ge=0)


class ExpertMergingSearch(GradientSearch):
    """Expert Merging, and ++ with ``chunks``: sigmoid coefficients learned from experts
    (``ecotone.search.expert_merging``).

    Attributes:
        granularity: Always ``tensor``.
        init: Where coefficients begin, and what the regulariser draws them to.
        rate: Adam's learning rate, in logits.
        steps: Steps of Adam; with ``chunks`` there are as many again.
        regulariser: Weight of the mean distance of coefficients from where they began.
        clip: Longest gradient; a longer one is shortened.
        exclude: Tensors that stay the base's, as file-name patterns in any case; None means norms, embeddings, biases
            and heads.
        chunks: After ``steps``, split tensors into so many chunks each on average, more where it matters more (++).
        steepness: Power of the importance by which chunks are shared out.
        spread: Standard deviation, in logits, of the points around ``init`` at which restarts begin.
    """

    algorithm: Literal["expert_merging"]
    granularity: Literal["tensor"] = "tensor"
    groups: Literal[1] = 1
    init: float = Field(default=0.1, gt=0, lt=1)
    rate: float = Field(default=0.5, gt=0)
    steps: int = Field(default=100, ge=1)
    regulariser: float = Field(default=5.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    exclude: tuple[str, ...] | None = None
    chunks: float | None = Field(default=None, gt=0)
    steepness: float = Field(default=1.0, ge=0)
    spread: float = Field(default=0.5, ge=0)


SearchPart: TypeAlias = Annotated[
    M2N2Search
    | RandomBox
    | CmaEsBox
    | MapBox
    | BayesianMapBox
    | NestedMapBox
    | NsgaBox
    | OptunaBox
    | AdaMergingSearch
    | ExpertMergingSearch,
    Field(discriminator="algorithm"),
]


Start: TypeAlias = Literal["front", "best", "archive", "none"]
FINENESS = ("model", "groups", "block", "tensor", "element")
LINES = 4  # merges that a search by gradient begins with, unless said otherwise: it follows each one


class Stage(Part):
    """One search of a chain, written as a search with these keys beside its own.

    Attributes:
        search: The search.
        evaluations: Its share of the budget; the last stage may leave it out and has the rest.
        start: What of the stage before it begins with: its ``front``, its ``best`` merge, its ``archive`` (the members
            of its population) or ``none``. By default the front, where the algorithm can begin with given merges. What
            it begins with is not scored again. M2N2, NSGA and Optuna's samplers take it in place of the models
            themselves, CMA-ES takes the best as its mean.
        starts: The most merges to begin with, the best and others spread over the scores; by default 4 for searches by
            gradient, which learn from each, and all for others.
    """

    search: SearchPart
    evaluations: int | None = Field(default=None, ge=1)
    start: Start | None = None
    starts: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _sorted(cls, value: Any) -> Any:
        """Tell the stage's keys from the search's; a ``start`` that is a number is CMA-ES's own."""
        if not isinstance(value, Mapping) or "search" in value:
            return value
        placed = isinstance(value.get("start"), int | float) and value.get("algorithm") in ("cma_es", "sep_cma_es")
        own = {"evaluations", "starts"} | (set() if placed else {"start"})
        rest = {key: one for key, one in value.items() if key not in own}
        return {"search": rest, **{key: value[key] for key in own if key in value}}

    @model_serializer(mode="wrap")
    def _flat(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = handler(self)
        search = fields.pop("search")
        start = fields.pop("start")
        return {**search, **fields, "start": search.get("start") if start is None else start}

    @property
    def begins(self) -> Start:
        """What it begins with when it is not the first."""
        if self.start is not None:
            return self.start
        placed = isinstance(self.search, CmaEsBox) and self.search.start is not None
        return "none" if placed or _cannot_begin(self.search) else "front"

    @property
    def most(self) -> int | None:
        """The most merges that it begins with; None means all."""
        if isinstance(self.search, CmaEsBox):
            return 1
        return LINES if self.starts is None and isinstance(self.search, GradientSearch) else self.starts


class Stages(Part):
    """A chain of searches: a list under ``search``, each of which begins with what the one before it found."""

    stages: tuple[Stage, ...]

    @model_validator(mode="before")
    @classmethod
    def _of_list(cls, value: Any) -> Any:
        return {"stages": value} if isinstance(value, list | tuple) else value

    @model_serializer(mode="wrap")
    def _listed(self, handler: SerializerFunctionWrapHandler) -> list[dict[str, Any]]:
        stages: list[dict[str, Any]] = handler(self)["stages"]
        return stages

    @model_validator(mode="after")
    def _fit_each_other(self) -> Stages:
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
        reach = _reach(first.search)
        for index, stage in enumerate(self.stages[1:], 1):
            if stage.begins != "none":
                self._check_start(index, reach)
            joined = stage.begins != "none" and isinstance(stage.search, M2N2Search)
            reach = max(reach, _reach(stage.search)) if joined else _reach(stage.search)
        return self

    def _check_start(self, index: int, reach: int) -> None:
        """Refuse a start that the stage cannot take, or whose segments are finer than the stage's own."""
        search, before = self.stages[index].search, self.stages[index - 1].search
        place = f"stage {index} ({search.algorithm})"
        if why := _cannot_begin(search):
            raise ValueError(f"{place}: {why}; say start: none")
        if isinstance(before, M2N2Search) and before.mutation > 0:
            raise ValueError(
                f"{place}: it cannot begin with what stage {index - 1} finds: with mutation m2n2 breeds whole vectors "
                "of weights, which have no coefficients; say start: none"
            )
        if not isinstance(search, M2N2Search) and reach > _reach(search):
            raise ValueError(
                f"{place}: its granularity, {search.granularity}, is coarser than that of the merges of stage "
                f"{index - 1}, {FINENESS[reach]}; make this one finer, the other coarser, or say start: none"
            )

    @property
    def algorithm(self) -> str:
        """The algorithms, joined by plus signs."""
        return "+".join(stage.search.algorithm for stage in self.stages)

    @property
    def starts(self) -> tuple[Start, ...]:
        """What each stage begins with."""
        return ("none", *(stage.begins for stage in self.stages[1:]))

    @property
    def shared_out(self) -> int:
        """Evaluations of the stages that say how many."""
        return sum(stage.evaluations or 0 for stage in self.stages)


def _reach(search: SearchPart) -> int:
    """How fine the segments of a search's merges are, by position in ``FINENESS``."""
    if isinstance(search, ExpertMergingSearch) and search.chunks is not None:
        return FINENESS.index("element")
    return FINENESS.index(search.granularity)


def _cannot_begin(search: SearchPart) -> str:
    """Why a search cannot begin with given merges; empty when it can."""
    if isinstance(search, RandomBox):
        return "random search has no use for merges to begin with"
    if isinstance(search, NestedMapBox):
        return "nested_map builds its tree from the models themselves"
    if isinstance(search, M2N2Search) and search.mutation > 0:
        return "with mutation m2n2 breeds whole vectors of weights, beginning with the models"
    return ""


def _one_or_stages(value: Any) -> str:
    return "stages" if isinstance(value, list | tuple | Stages) else "one"


AnySearch: TypeAlias = Annotated[
    Annotated[SearchPart, Tag("one")] | Annotated[Stages, Tag("stages")], Discriminator(_one_or_stages)
]


class Scoring(Part):
    """How candidates are scored; floating-point results depend on it, so it is part of the signature.

    Attributes:
        batch: Candidates asked for and scored together.
        in_flight: The most candidates asked for and not yet learned from, in all; two batches unless said otherwise.
            Strict order keeps workers busy with two to three batches for each, as the slow ones hold up what is asked.
        order: ``strict`` learns in the order of asking, so that results depend on the recipe alone;
            ``arrival`` learns at once, for the highest use of workers.
        threads: CPU threads a worker computes with.
        device: ``auto`` takes a GPU when the worker has one.
        checkpointing: Compute activations again on the way back of a gradient instead of keeping them: less memory,
            more time (Hugging Face models only).
    """

    batch: int = Field(default=8, ge=1)
    in_flight: int | None = Field(default=None, ge=1)
    order: Literal["strict", "arrival"] = "strict"
    threads: int = Field(default=1, ge=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpointing: bool = False

    @model_validator(mode="after")
    def _room(self) -> Scoring:
        if self.in_flight is not None and self.in_flight < self.batch:
            raise ValueError(f"in_flight: expected at least batch ({self.batch}), found {self.in_flight}")
        return self

    @property
    def window(self) -> int:
        """The most candidates in flight: two batches unless said otherwise."""
        return 2 * self.batch if self.in_flight is None else self.in_flight


class Budget(Part):
    """When to stop: after so many evaluations, so many seconds, or whichever comes first."""

    evaluations: int | None = Field(default=None, ge=1)
    seconds: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _some(self) -> Budget:
        if self.evaluations is None and self.seconds is None:
            raise ValueError("expected evaluations, seconds or both, found neither")
        return self


class Runtime(Part):
    """Where it runs. Nothing here changes results under ``order: strict``.

    Attributes:
        pool: ``ray`` for worker processes here or on a cluster, ``serial`` for this process.
        workers: Ray workers.
        address: A Ray cluster's address; None starts a local one.
        cpus_per_worker: Logical CPUs Ray reserves for each worker.
        gpus_per_worker: Logical GPUs, fractions allowed.
        resources: Custom Ray resources of each worker.
        start_timeout: Seconds to wait for a place when no worker has one; loading models is not counted. By default 120
            on this machine and 3600 on a cluster, where machines may have to be started first.
        attempts: How often a batch that killed its worker is tried again before its candidates are tried alone.
        time_limit: Seconds that a candidate may take at a Ray worker; a batch has them for each of its candidates. Past
            it the worker is killed and replaced; the candidates of a batch are then tried alone once, and one alone is
            a failure (at another node, with a limit below 30 s, at the second attempt: the node may be gone). With a
            limit that candidates come near to, results depend on how fast workers are.
        idle_timeout: Seconds after which a Ray worker that has nothing to do while others work is given back to the
            cluster, which may remove its node, until there is work for it again. None keeps it.
        sources: Where a worker keeps the models that it mixes: on the ``device``, in main memory (``host``; with a GPU
            page-locked), or ``mapped`` from their files; ``auto`` is the first of these that free memory has room for,
            and on a CPU, where copies gain nothing, ``mapped`` unless models are small and forming them takes work.
        grace: Seconds for which a run that is told to end waits for what is being evaluated.
        mirror_every: Seconds between two copies, at the least, of a run directory that is a URL.
        lease: Seconds after its last sign of life when the manager of such a run is held for dead.
        log: The level of the run's log: at ``debug`` each trial asked and told is in it, too.
    """

    pool: Literal["serial", "ray"] = "ray"
    workers: int = Field(default=1, ge=1)
    address: str | None = None
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0)
    resources: dict[str, float] = Field(default_factory=dict)
    start_timeout: float | None = Field(default=None, gt=0)
    attempts: int = Field(default=3, ge=1)
    time_limit: float | None = Field(default=None, gt=0)
    idle_timeout: float | None = Field(default=None, gt=0)
    sources: Literal["auto", "device", "host", "mapped"] = "auto"
    grace: float = Field(default=30.0, ge=0)
    mirror_every: float = Field(default=30.0, gt=0)
    lease: float = Field(default=60.0, gt=0)
    log: Literal["info", "debug"] = "info"

    @model_validator(mode="after")
    def _can_be_limited(self) -> Runtime:
        if self.time_limit is not None and self.pool == "serial":
            raise ValueError("time_limit: the serial pool cannot stop a candidate; leave it out, or say pool: ray")
        return self


class Recipe(Part):
    """A search, whole: models, merge operator, objectives, algorithm, scoring, budget, seed, runtime, tracking."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    models: Models
    objectives: Objectives
    budget: Budget
    prepare: Call | None = None
    merge: Merge = Merge()
    calibration: tuple[Calibration, ...] = ()
    search: AnySearch = M2N2Search()
    scoring: Scoring = Scoring()
    seed: int = Field(default=0, ge=0)
    runtime: Runtime = Runtime()
    tracking: TrackingSettings = TrackingSettings()
    _folder: Path | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        for part in self.searches:
            self._check_objectives(part)
            self._check_ranges(part)
        self._check_calibration()
        self._check_shares()
        if self.prepare is None:
            written = self.model_dump(include={"models", "objectives", "calibration"})
            found = next((field for field in written if _mentions_prepared(written[field])), None)
            if found is not None:
                raise ValueError(f"{found}: paths begin with {PREPARED!r} but the recipe has no `prepare` step")
        return self

    @property
    def folder(self) -> Path | None:
        """Of the file it was read from; None for any other."""
        return self._folder

    @property
    def searches(self) -> tuple[SearchPart, ...]:
        """The search, or those of its stages."""
        search = self.search
        return tuple(stage.search for stage in search.stages) if isinstance(search, Stages) else (search,)

    def _check_objectives(self, part: SearchPart) -> None:
        minimised = [o.name for o in self.objectives.search if o.direction == "minimize"]
        if part.algorithm == "m2n2" and minimised:
            raise ValueError(
                f"objectives.search: m2n2 shares out scores to maximise, found direction minimize for {minimised}; "
                "give a score in which more is better, such as exp(-loss), or of texts their likelihood"
            )
        count, needs = len(self.objectives.search), _needs_objectives(part)
        if count < needs:
            raise ValueError(
                f"objectives.search: {part.algorithm} looks for a front of two objectives or more, found "
                f"{count}; for one use algorithm cma_es, or optuna with sampler tpe or gp"
            )

    def _check_ranges(self, part: SearchPart) -> None:
        if self.merge.ranges and (not isinstance(part, Box) or isinstance(part, NestedMapBox)):
            raise ValueError(
                f"merge.{next(iter(self.merge.ranges))}: {part.algorithm} searches coefficients alone, found bounds; "
                "give one value, or use random, cma_es, map, bayesian_map, nsga2 or optuna"
            )

    def _check_shares(self) -> None:
        if not isinstance(self.search, Stages) or self.budget.evaluations is None:
            return
        shares, whole = self.search.shared_out, self.budget.evaluations
        rest = self.search.stages[-1].evaluations is None
        if shares > whole or (rest and shares == whole):
            raise ValueError(
                f"budget.evaluations: expected {'more than' if rest else 'at least'} {shares}, which the stages of the "
                f"search share out, found {whole}"
            )

    def _check_calibration(self) -> None:
        names = [task.name for task in self.calibration]
        if len(set(names)) < len(names):
            raise ValueError(f"calibration: expected tasks of different names, found {names}")
        learning = [part for part in self.searches if isinstance(part, GradientSearch) or _refines(part)]
        if learning and not names:
            what = "m2n2 with refine" if _refines(learning[0]) else learning[0].algorithm
            raise ValueError(f"calibration: {what} learns on tasks given there, found none")
        if names and not learning:
            raise ValueError(
                f"calibration: {self.search.algorithm} does not use it (algorithm adamerging does), found {names}"
            )
        if learning and self.models.architecture is None:
            raise ValueError(
                "models.architecture: expected a function that returns the torch module which calibration "
                "differentiates, found none; name it, or say auto for Hugging Face directories"
            )
        if any(isinstance(part, ExpertMergingSearch) for part in learning):
            _check_expert_merging(self)

    @classmethod
    def from_yaml(cls, path: str | Path, settings: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe file; ``settings`` replaces fields by dotted name, as ``--set`` does.

        Paths of models are made absolute: they are relative to the file's folder, where its own functions are, too.

        Raises:
            InputError: The file is missing or not YAML, a key is unknown, or a value does not fit.
        """
        file = Path(path)
        try:
            record = yaml.safe_load(file.read_text())
        except FileNotFoundError as error:
            raise InputError(f"{file}: no such recipe.", "Ready ones are in experiments/recipes/.") from error
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{file}: cannot be read as YAML: {error}") from error
        if not isinstance(record, dict):
            raise InputError(f"{file}: expected a mapping of recipe fields, found {type(record).__name__}.")
        _check_plain(record, str(file))
        return cls.from_record(apply_settings(record, settings or {}), file.parent.resolve())

    @classmethod
    def from_record(cls, record: Mapping[str, Any], folder: Path | None = None) -> Recipe:
        """Check a nested mapping; model paths are relative to ``folder`` when it is given."""
        try:
            recipe = cls.model_validate(record)
        except ValidationError as error:
            raise InputError(_explained(error)) from error
        if folder is None:
            return recipe
        found = recipe._absolute(folder)
        found._folder = folder
        return found

    def record(self) -> dict[str, Any]:
        """The whole recipe as nested plain values; ``from_record`` takes it back."""
        return self.model_dump(mode="json")

    @property
    def signature(self) -> str:
        """16 hexadecimal digits of all that changes results: not name, budget, runtime and tracking."""
        kept = self.model_dump(mode="json", exclude={"name", "budget", "runtime", "tracking"})
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=8).hexdigest()

    def _absolute(self, folder: Path) -> Recipe:
        def resolved(path: str) -> str:
            return path if path.startswith(PREPARED) else str(folder / Path(path).expanduser())

        def model(path: str) -> str:
            """Of a repository of the hub its name, unless the recipe's folder holds one of its organisation's name."""
            local = not is_repository(path) or (folder / path).parent.exists()
            return resolved(path) if local else path

        models = self.models.model_copy(
            update={
                "experts": tuple(model(path) for path in self.models.experts),
                "base": None if self.models.base is None else model(self.models.base),
                "tokenizer": None if self.models.tokenizer is None else model(self.models.tokenizer),
            }
        )
        objectives = Objectives.model_construct(
            search=tuple(_with_paths(objective, resolved) for objective in self.objectives.search),
            held_out=tuple(_with_paths(objective, resolved) for objective in self.objectives.held_out),
        )
        return self.model_copy(update={"models": models, "objectives": objectives})


def _with_paths(objective: Objective, resolved: Callable[[str], str]) -> Objective:
    """The objective with the paths of its files made absolute."""
    if not isinstance(objective, LanguageObjective):
        return objective
    given = {name: getattr(objective, name) for name in PATHS if getattr(objective, name, None) is not None}
    return objective.model_copy(
        update={
            name: resolved(value) if isinstance(value, str) else tuple(map(resolved, value))
            for name, value in given.items()
        }
    )


def algorithm_of(record: Mapping[str, Any]) -> str:
    """The algorithm of a recorded recipe; those of stages are joined by plus signs."""
    search = record.get("search", {})
    return "+".join(str(one.get("algorithm")) for one in (search if isinstance(search, list) else [search]))


def _refines(part: Part) -> bool:
    return isinstance(part, M2N2Search) and part.refine is not None


def _needs_objectives(part: Part) -> int:
    """The fewest objectives that an algorithm has a meaning for."""
    front = isinstance(part, SurrogateBox) or "nsga3" in (
        getattr(part, "algorithm", ""),
        getattr(part, "sampler", ""),
    )
    return 2 if front else 1


def _check_expert_merging(recipe: Recipe) -> None:
    if recipe.merge.operator == "linear":
        raise ValueError(
            "merge.operator: expert_merging leaves tensors as the base has them, found linear, which has no base; "
            "use task_arithmetic or ties_vectors, and give models.base"
        )
    if all(task.loss != "distillation" for task in recipe.calibration):
        found = sorted({task.loss for task in recipe.calibration})
        raise ValueError(
            f"calibration: expert_merging learns to be like the experts, found loss {' and '.join(found)} alone; "
            "say loss: distillation, or use algorithm adamerging"
        )


def _mentions_prepared(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_mentions_prepared, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_mentions_prepared, value))
    return isinstance(value, str) and value.startswith(PREPARED)


def apply_settings(record: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A deep copy of ``record`` with fields replaced: ``{"search.alpha": 0, "objectives.search.0.name": "a"}``."""
    copy: dict[str, Any] = json.loads(json.dumps(record))
    for key, value in settings.items():
        steps = key.split(".")
        place: Any = copy
        for step in steps[:-1]:
            place = _entered(place, step, key)
        if isinstance(place, list):
            place[_index(place, steps[-1], key)] = value
        else:
            place[steps[-1]] = value
    return copy


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``["seed=3", "budget.evaluations=100"]`` as a mapping; values are read as YAML.

    Raises:
        InputError: A pair has no ``=``, or its value is not YAML.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--set: expected key=value, found {pair!r}.", "For example: --set seed=3")
        try:
            settings[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--set {key}: cannot be read as a YAML value: {value!r}.") from error
        _check_plain(settings[key], f"--set {key}")
    return settings


def check_resumable(settings: Mapping[str, Any]) -> None:
    """Refuse settings that would change what a resumed run's recorded trials are.

    Raises:
        InputError: A key is not of ``RESUMABLE``.
    """
    wrong = [key for key in settings if key.split(".")[0] not in RESUMABLE]
    if wrong:
        raise InputError(
            f"--set {wrong[0]}: a resumed run keeps what its recorded trials depend on.",
            f"Only fields of {', '.join(RESUMABLE)} may change; start a new run for anything else.",
        )


def _check_plain(value: Any, where: str) -> None:
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{where}: expected text, numbers, lists and mappings only ({error}).", "Put dates and the like in quotes."
        ) from error


def _entered(place: Any, step: str, key: str) -> Any:
    if not isinstance(place, list) and place.get(step) is None:
        place[step] = {}
    found = place[_index(place, step, key)] if isinstance(place, list) else place[step]
    if not isinstance(found, dict | list):
        raise InputError(f"--set {key}: {step!r} is {found!r}, it has no fields.")
    return found


def _index(place: list[Any], step: str, key: str) -> int:
    if not step.isdigit() or int(step) >= len(place):
        raise InputError(f"--set {key}: expected a position from 0 to {len(place) - 1}, found {step!r}.")
    return int(step)


def _explained(error: ValidationError) -> str:
    entries: list[dict[str, Any]] = [dict(entry) for entry in error.errors()]
    # Of a list whose items are wrong pydantic also says that it is too short without them.
    deeper = {entry["loc"][:end] for entry in entries for end in range(len(entry["loc"]))}
    told = [entry for entry in entries if not (entry["type"] == "too_short" and entry["loc"] in deeper)]
    lines = [_line(entry) for entry in told[:5]]
    more = len(told) - len(lines)
    return "\n".join(lines + ([f"... and {more} more."] if more > 0 else []))


def _line(entry: dict[str, Any]) -> str:
    """One validation error as: field, what was expected, what was found, what to do."""
    kind, message = entry["type"], entry["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        place, part = _place(entry["loc"][:-1])
        key, known = str(entry["loc"][-1]), list(part.model_fields)
        if "stages" in entry["loc"]:
            known += [name for name in Stage.model_fields if name != "search"]
        return f"{_written([*place, key])}: unknown key. {nearest(key, known)}"
    field = _written(_place(entry["loc"])[0])
    if kind == "missing":
        return f"{field}: missing; {_article(field)}."
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        name = entry["ctx"]["discriminator"].strip("'")
        given = entry["input"].get(name) if isinstance(entry["input"], dict) else None
        hint = f" {nearest(str(given), _TAGS[name])}" if given else ""
        return f"{field}.{name}: expected one of {', '.join(_TAGS[name])}, found {given!r}.{hint}"
    if kind == "value_error":
        return f"{message}." if field == "recipe" else f"{field}: {message}."
    return f"{field}: {message[0].lower()}{message[1:]}, found {entry['input']!r}."


_ALGORITHMS: dict[str, type[Part]] = {
    "m2n2": M2N2Search,
    "random": RandomBox,
    "cma_es": CmaEsBox,
    "sep_cma_es": CmaEsBox,
    "map": MapBox,
    "bayesian_map": BayesianMapBox,
    "nested_map": NestedMapBox,
    "nsga2": NsgaBox,
    "nsga3": NsgaBox,
    "optuna": OptunaBox,
    "adamerging": AdaMergingSearch,
    "expert_merging": ExpertMergingSearch,
}
_TAGS = {"type": tuple(OBJECTIVES), "algorithm": tuple(_ALGORITHMS)}
_PARTS: dict[str, type[Part]] = {
    **OBJECTIVES,
    "Call": Call,
    "range": Range,
    "stages": Stages,
    **_ALGORITHMS,
}


def _article(field: str) -> str:
    return f"a recipe needs `{field}`"


def _place(steps: tuple[int | str, ...]) -> tuple[list[int | str], type[Part]]:
    """The steps that the user wrote, without those that pydantic adds for unions, and the part they lead to."""
    part: type[Part] = Recipe
    written: list[int | str] = []
    for step in steps:
        if isinstance(step, int):
            written.append(step)
        elif step in part.model_fields:
            if (part, step) not in ((Stages, "stages"), (Stage, "search")):
                written.append(step)
            part = _part(part.model_fields[step].annotation) or part
        else:
            part = _PARTS.get(step, part)
    return written, part


def _part(annotation: Any) -> type[Part] | None:
    """The one part that an annotation allows, or None."""
    kinds = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type) and issubclass(kind, Part)]
    return kinds[0] if len(kinds) == 1 else None


def _written(steps: list[int | str]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".") or "recipe"
