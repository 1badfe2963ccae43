"""Expert Merging: merge coefficients learned so that on each task the merge behaves as that task's expert.

Zhang et al. 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided Layer
Chunking" (arXiv:2509.25712). In

    theta = theta_0 + sum_k alpha_k tau_k,    alpha = sigmoid(raw)

each tensor has an alpha of its own for each expert. Norms, embeddings, biases and heads have none: they stay as the
base has them. Adam moves raw against the gradient of

    mean over tasks of the distance to the expert's logits and hidden layers
        (``ecotone.fitness.gradients.distillation``)
        + regulariser * mean |alpha - alpha at the start|

With ``coefficients: free`` Adam moves alpha itself, without bounds, regulariser or limit on the gradient's length
unless they are given. That is not the paper's method. It suits prepared sources, whose published merge has alpha = 1.

The authors' code differs from this in three ways. It divides the sum of |alpha - alpha at the start| by the number of
coefficients of one expert, so for K experts its regulariser r is K r here: its 5 is 20 here on four experts. Its
optimiser is AdamW with a decay of 1e-5, whose rate follows a cosine from ``rate`` down to a tenth of it, with restarts
after 50 steps, then after 100, 200 and so on. Here it is Adam at a constant rate. It takes gradients of one example
at a time and adds up 8 of them for a step, in one pass over about five examples a task. Here ``accumulate`` batches of
every task make a step.

Expert Merging++ then cuts the tensors that matter most into chunks. It shares a number of coefficients out among the
tensors by importance, and learns on. ``ecotone.search.descent`` has lines, steps, checks and restarts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from ecotone.fitness.kinds import CalibrationSettings
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats, Integers
from ecotone.populations.population import ElitistArchive
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.coefficients import Parts
from ecotone.search.descent import Adam, Descent, GradientSettings, Line
from ecotone.search.kinds import Context, Fineness, Needs, Pair
from ecotone.search.surrogates import sigmoid

EXCLUDED = (
    *("*norm*", "*ln_*", "*layer_norm*"),
    *("*embed*", "*wte.*", "*wpe.*", "shared.*"),
    "*bias",
    *("*lm_head*", "*classifier*", "score.*", "*.score.*", "cls.*", "*qa_outputs*", "head.*", "*.head.*", "fc.*"),
)
"""Names of tensors that stay as the base has them unless others are given: norms, embeddings, biases, heads."""

_EDGE = 1e-3  # the least distance of starts from 0 and 1, where the sigmoid is flat


FREE: Mapping[str, Any] = MappingProxyType(
    {"init": None, "rate": 0.02, "spread": 0.1, "regulariser": 0.0, "clip": None, "exclude": ()}
)
"""The defaults of free coefficients where they differ from those of bounded ones."""
FIRST = 0.3
"""Free coefficients' first value where the operator publishes no merge: AdaMerging's."""


class ExpertMergingSettings(GradientSettings):
    """Expert Merging: coefficients learned from the experts' outputs; with ``chunks``, Expert Merging++.

    Attributes:
        algorithm: ``expert_merging``: coefficients learned from the experts' outputs.
        coefficients: ``bounded`` keeps coefficients between 0 and 1, as the paper does: Adam moves their logits.
            ``free`` lets Adam move the coefficients themselves. Then the defaults are init null, rate 0.02, spread 0.1,
            regulariser 0, clip null, and exclude [].
        granularity: Always ``tensor``: each tensor has its own coefficients.
        groups: Always 1: this search has no groups of blocks.
        steps: Steps of Adam. Each step uses ``accumulate`` batches of every calibration task. With ``chunks`` there are
            up to as many steps again.
        weights: For each calibration task, the weight of its loss, relative to the sum of all; 1 where not given. A
            task of weight 0 is left out.
        init: The first value of every coefficient, unless the search begins with given merges. Bounded coefficients
            begin above 0 and below 1. None, for free ones alone, means that of the operator's published merge, such as
            1 of ``kfac``, and 0.3 for operators that have none.
        rate: Adam's step size, in logits of the coefficients; in the coefficients where they are free.
        spread: Standard deviation of the normal noise added to the start of every restart but the first, in the units
            of ``rate``.
        regulariser: Weight of the mean distance between the coefficients and their starts, which is added to the loss.
            The authors' code has K times as much for K experts: its 5 is 20 here on four experts.
        clip: The greatest length of a gradient (Euclidean, over all coefficients, in the units of ``rate``). A longer
            gradient is scaled down to it. None scales none.
        exclude: Patterns of names of tensors that keep the base's weights, such as ``*norm*``; upper and lower case
            count as equal. None excludes norms, embeddings, biases and heads.
        chunks: The mean number of chunks that a tensor is cut into, each with its own coefficients (Expert Merging++).
            More important tensors get more chunks. They are cut after ``steps`` steps, or when ``patience`` ends those;
            then up to ``steps`` more steps follow. None cuts no tensors.
        steepness: The power of a tensor's importance by which chunks are shared out; 0 shares them out evenly.
    """

    algorithm: Literal["expert_merging"] = "expert_merging"
    coefficients: Literal["bounded", "free"] = "bounded"
    granularity: Literal["tensor"] = "tensor"
    groups: Literal[1] = 1
    steps: int = Field(default=100, ge=1)
    init: float | None = 0.1
    rate: float = Field(default=0.5, gt=0)
    spread: float = Field(default=0.5, ge=0)
    regulariser: float = Field(default=5.0, ge=0)
    clip: float | None = Field(default=1.0, gt=0)
    exclude: tuple[str, ...] | None = None
    chunks: float | None = Field(default=None, gt=0)
    steepness: float = Field(default=1.0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _free_defaults(cls, given: Any) -> Any:
        free = isinstance(given, Mapping) and given.get("coefficients") == "free"
        return {**FREE, **given} if free else given

    @model_validator(mode="after")
    def _begins_between(self) -> ExpertMergingSettings:
        if self.coefficients == "bounded" and (self.init is None or not 0 < self.init < 1):
            found = "null" if self.init is None else f"{self.init:g}"
            raise ValueError(f"init: expected more than 0 and less than 1, found {found}; or use coefficients: free")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out ``bounded``: records and signatures are those of recipes without the field."""
        fields = super()._without_no_start(handler)
        if fields.get("coefficients") == "bounded":
            del fields["coefficients"]
        return fields

    @property
    def most_steps(self) -> int:
        """Steps of a run that takes them all."""
        return self.steps if self.chunks is None else 2 * self.steps

    def fineness(self) -> Fineness:
        """Tensors; with chunks, any part of them."""
        return "tensor" if self.chunks is None else "element"

    def borders(self, space: Space) -> Integers:
        """(S+1,) borders of the tensors; with chunks, all places where they may be cut."""
        return np.asarray(space.borders(self.fineness()))

    def parts(self, space: Space) -> Parts:
        """The tensors; with chunks, all parts that they may be cut into."""
        return Parts(self.borders(space))

    def segments(self, space: Space) -> int | None:
        """The tensors."""
        return len(space.tensors)

    def needs(self) -> Needs:
        """Gradients, merges linear in their coefficients, and for chunks the models' inner products."""
        return replace(super().needs(), geometry=self.chunks is not None)

    def check(self, operator: str, needs_base: bool, tasks: Sequence[CalibrationSettings]) -> None:
        """Refuse merges without a base, and tasks of which none has the experts' distance for its loss."""
        if not needs_base:
            raise ValueError(
                f"merge.operator: expert_merging leaves tensors as the base has them, found {operator}, which has no "
                "base; use task_arithmetic or ties_vectors, and give models.base"
            )
        if all(task.teacher is None for task in tasks):
            losses = " and ".join(sorted({task.loss for task in tasks}))
            raise ValueError(
                f"calibration: expert_merging learns to be like the experts, found loss {losses} alone; say loss: "
                "distillation, or use algorithm adamerging"
            )

    def make(self, context: Context) -> Pair:
        """The search, and an archive of the best merges of its checks."""
        space = context.space
        starts = [start.refined(space.tensor_borders) for start in context.starts] or None
        if starts is None and self.init is None and context.own:
            starts = [np.tile(context.own[0].coefficients[0], (len(space.tensors), 1))]
        search = ExpertMerging(space, context.tasks, context.goals, context.seed, self, starts)
        return search, ElitistArchive(context.goals, self.archive)


class ExpertMerging(Descent[ExpertMergingSettings]):
    """Adam on coefficients or their logits, one a tensor and expert; ``Descent`` says how lines, steps and checks go.

    With ``chunks`` (Expert Merging++), S tensors are cut into ``chunks`` S in all. Tensor l gets

        floor(chunks S I_l^steepness / sum_j I_j^steepness)

    of equal size; with none its coefficients stay as they are. Its importance I_l is ``sum_k alpha_k ||tau_k||
    sqrt(n_l)`` over its n_l parameters: coefficient times root-mean-square of the task vector times number of
    parameters. (The paper takes the mean absolute value for the root-mean-square.)

    Args:
        space: The models; Expert Merging++ takes the length of task vectors from its Gram table.
        tasks: Names of the T calibration tasks.
        goals: The objectives of the checks.
        seed: The recipe's seed, for restarts.
        settings: Step size, regulariser, chunks and so on; None for the defaults.
        starts: (S, K) coefficients of the S tensors for each merge to start from, moved to between 0.001 and 0.999
            unless they are free, and to 0 where a tensor is excluded. None for ``settings.init`` everywhere.

    Raises:
        InputError: As for ``Descent``; or a pattern matches no tensor, or no tensor is left to learn on.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.populations.trial import Outcome
        from ecotone.search.expert_merging import ExpertMerging, ExpertMergingSettings

        archive = ElitistArchive(goals, capacity=20)
        settings = ExpertMergingSettings(steps=20, exclude=(), chunks=1.2)
        search = ExpertMerging(space, ["left", "right"], goals, 0, settings)
        while not search.done:
            for trial in search.ask(4):
                if trial.gradient is None:  # a check
                    evaluation = score(trial.genome)
                    outcome = archive.add(trial, evaluation)
                else:  # a gradient by the coefficients
                    evaluation, outcome = gradient(trial), Outcome(accepted=False)
                search.tell(trial, evaluation, outcome)
        chunks = search.report()["lines"][0]["chunks"]  # by tensor
    """

    def __init__(
        self,
        space: Space,
        tasks: Sequence[str],
        goals: Sequence[Goal],
        seed: int,
        settings: ExpertMergingSettings | None = None,
        starts: Sequence[Floats] | None = None,
    ) -> None:
        settings = settings or ExpertMergingSettings()
        if starts is None and settings.init is None:
            starts = [np.full((len(space.tensors), space.dimension), FIRST)]
        self._space = space
        self._excluded = _excluded(space.tensors, settings.exclude)
        super().__init__(space.tensor_borders, space.dimension, tasks, goals, seed, settings, starts)

    # -- what Adam moves: coefficients or logits, minus infinity where the coefficient is 0 and stays so ---------

    @property
    def _free(self) -> bool:
        return self.settings.coefficients == "free"

    def _point(self, coefficients: Floats) -> Floats:
        inside = np.clip(coefficients, _EDGE, 1 - _EDGE)
        raw = np.array(coefficients, np.float64) if self._free else np.log(inside / (1 - inside))
        raw[self._excluded] = -math.inf
        return raw

    def _exact(self, coefficients: Floats) -> Floats | None:
        if self._free:
            return None
        exact: Floats = np.clip(coefficients, _EDGE, 1 - _EDGE)
        exact[self._excluded] = 0.0
        return exact

    def _used(self, point: Floats) -> Floats:
        return np.where(np.isfinite(point), point, 0.0) if self._free else sigmoid(point)

    def _pulled(self, line: Line, gradient: Floats) -> Floats:
        """The gradient by Adam's point of the mean task loss and the regulariser, at most ``clip`` long."""
        alpha, clip = self._used(line.adam.point), self.settings.clip
        learned = np.isfinite(line.adam.point)
        learned[line.held] = False
        away = np.sign(alpha - self._used(line.start)) / np.count_nonzero(learned)  # of mean |alpha - alpha at start|
        pulled: Floats = gradient / line.weights.sum() + self.settings.regulariser * away
        if not self._free:  # times d alpha / d raw, in this order: recorded searches have its rounding
            pulled = pulled * alpha * (1 - alpha)
        pulled[~learned] = 0.0
        pulled *= 1.0 if clip is None else min(1.0, clip / max(float(np.linalg.norm(pulled)), 1e-300))
        return pulled

    # -- Expert Merging++ ----------------------------------------------------------------------------------------

    def _grown(self, line: Line) -> bool:
        """Cut the tensors into chunks, once; unless that would leave nothing to learn."""
        settings = self.settings
        if settings.chunks is None or line.grown:
            return False
        importance = self.importance(self._used(line.adam.point))
        counts = shares(importance**settings.steepness * (importance > 0), settings.chunks * len(importance))
        if not counts.any():
            return False
        borders, owners = self._cut(counts)
        line.grown, line.before, line.last = True, line.step, line.step + settings.steps
        line.borders, line.held = borders, np.flatnonzero(counts[owners] == 0).tolist()
        line.adam, line.start = Adam(line.adam.point[owners], settings.rate), line.start[owners]
        line.stale = 0
        return True

    def importance(self, coefficients: Floats) -> Floats:
        """(S,) shares of the tensors in sum_k alpha_k ||tau_k|| sqrt(n), for ``coefficients`` (S, K)."""
        borders = np.asarray(self._space.tensor_borders)
        squares = np.diagonal(self._space.gram.between(borders), axis1=1, axis2=2)
        whole = (np.abs(coefficients) * np.sqrt(np.maximum(squares, 0.0) * np.diff(borders)[:, None])).sum(1)
        return np.asarray(whole / max(float(whole.sum()), 1e-300))

    def _cut(self, counts: Integers) -> tuple[Integers, Integers]:
        """Borders (S'+1,) that cut tensor l evenly into ``counts[l]``, and (S',) the tensor of each segment.

        Cuts are at regions of the Gram table, so that M2N2 may go on from there; a tensor of few regions has fewer.
        """
        regions, edges = np.asarray(self._space.gram.borders), np.asarray(self._space.tensor_borders)
        borders = [
            regions[np.searchsorted(regions, start + (stop - start) * np.arange(count) // count)]
            for start, stop, count in zip(edges[:-1], edges[1:], np.maximum(counts, 1), strict=True)
        ]
        cuts = np.unique(np.concatenate([*borders, edges]))
        return cuts, np.searchsorted(edges, cuts[:-1], side="right") - 1

    # -- report ----------------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """As ``Descent.report``, with the names of the tensors that stay as the base has them (``excluded``).

        A line that Expert Merging++ has cut also has ``chunks``: by tensor, the number of its coefficients for each
        expert; 0 where they stay those of the first stage.
        """
        excluded = [name for name, out in zip(self._space.tensors, self._excluded, strict=True) if out]
        return {**super().report(), "excluded": excluded}

    def _told(self, line: Line) -> dict[str, Any]:
        return {**super()._told(line), "start": self._used(line.start), "chunks": self._chunks(line)}

    def _chunks(self, line: Line) -> dict[str, int]:
        if not line.grown:
            return {}
        edges = np.asarray(self._space.tensor_borders)
        owners = np.searchsorted(edges, line.borders[:-1], side="right") - 1
        counts = np.bincount(owners, minlength=len(edges) - 1)
        counts[owners[line.held]] = 0
        return {
            name: int(count)
            for name, count, out in zip(self._space.tensors, counts, self._excluded, strict=True)
            if not out
        }


def shares(importance: Floats, budget: float) -> Integers:
    """(S,) whole numbers, the ``budget`` split in proportion to ``importance`` (S,) and rounded down."""
    total = float(importance.sum())
    if not total:
        return np.zeros(len(importance), np.int64)
    return np.floor(budget * importance / total * (1 + 1e-12)).astype(np.int64)


# -- arguments -------------------------------------------------------------------------------------------------


def _excluded(tensors: Sequence[str], exclude: Sequence[str] | None) -> NDArray[np.bool_]:
    """(S,) True for tensors that stay as the base has them."""
    patterns = EXCLUDED if exclude is None else tuple(exclude)
    table = np.array([[fnmatchcase(name.lower(), pattern.lower()) for pattern in patterns] for name in tensors], bool)
    table = table.reshape(len(tensors), len(patterns))
    if exclude is not None and not table.any(0).all():
        unused = patterns[int(np.argmin(table.any(0)))]
        raise InputError(f"search.exclude: the pattern {unused!r} matches no tensor.", nearest(unused, tuple(tensors)))
    out = np.asarray(table.any(1))
    if out.all():
        raise InputError(
            f"search.exclude: all {len(tensors)} tensors are excluded, nothing would be learned.",
            "Give fewer patterns; [] excludes none.",
        )
    return out
