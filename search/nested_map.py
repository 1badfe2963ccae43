"""Nested MAP: many tasks by a tree of two-dimensional fronts.

A quadratic in K variables has (K+1)(K+2)/2 coefficients, so plain MAP grows dear beyond a handful of models. Nested
MAP (Li et al. 2024, "MAP: Low-compute model merging with amortized Pareto fronts via quadratic approximation") merges
two nodes at a time instead: it takes the two whose scores are closest, finds the front of their two scores over two
coefficients, keeps the point that the user prefers, and goes on with it as one node. K models take K-1 such fronts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats
from ecotone.populations.population import ElitistArchive, Population
from ecotone.populations.trial import Evaluation, Goal, Outcome, Trial
from ecotone.search.coefficients import CoefficientBox
from ecotone.search.designs import design
from ecotone.search.kinds import Begins, Context
from ecotone.search.map import Surrogates, by_objective, copied, measured_scores, predicted_front, spread
from ecotone.search.protocol import Search, trial_rng
from ecotone.search.surrogates import SurrogateSettings, checked_links, flat, minimum

SAMPLES = 12  # a pair: twice the coefficients of a quadratic in two variables
FRONT = 4  # members of a pair's predicted front that are evaluated
GENERATIONS, FILLING = 30, 2  # of a pair's optimiser
STREAM = 2_246_822_507  # spawn key of a pair's generators, with the number of its first trial
UNIT = CoefficientBox(np.array([0, 1]), 2, 0.0, 1.0)


class NestedMapSettings(SurrogateSettings):
    """Nested MAP: a tree of pairwise MAPs, for many models with one coefficient each.

    Attributes:
        algorithm: ``nested_map``: a tree of pairwise MAPs, for many models with one coefficient each.
        samples: Points of each pair's design; None means 12. Two of them are the pair's own nodes, which are already
            scored.
        owners: For each objective, the name of the model that it belongs to. None means that objectives and models are
            in the same order.
        preference: For each objective, its weight, at least 0; 1 where not given.
        front: Members of each pair's predicted front to score, the preferred member first; None means 4.
        caution: Standard errors subtracted from each predicted score before fronts are compared.
    """

    algorithm: Literal["nested_map"] = "nested_map"
    owners: dict[str, str] | None = None
    preference: dict[str, float] | None = None
    front: int | None = Field(default=None, ge=1)
    caution: float = Field(default=1.0, ge=0)

    searches_settings: ClassVar[bool] = False

    def begins(self) -> Begins:
        """It cannot."""
        return Begins("nested_map builds its tree from the models themselves")

    def make(self, context: Context) -> tuple[Search, Population]:
        """The search, and an archive of the best."""
        box, sources = self.box(context), context.space.sources
        search = NestedMapSearch(box, context.goals, context.seed, sources, self, context.evaluations)
        return search, ElitistArchive(context.goals, self.archive)

    def describe(self, search: Search | None, context: Context) -> str:
        """The bounds, and how many pairs are merged with how many evaluations each."""
        pairs, bounds = context.space.dimension - 1, super().describe(search, context)
        if not isinstance(search, NestedMapSearch):
            return bounds
        return f"{bounds}; {pairs} pairs of {search.samples} samples and {search.front} members of a front"


@dataclass(frozen=True)
class Pair:
    """Two nodes being merged. Nodes 0..K-1 are the models; node K+p is the outcome of pair p.

    Args:
        first: A node.
        second: Another.
        begin: Number of the pair's first trial.
        fitted: Number of the first trial on its predicted front; -1 before there is one.
    """

    first: int
    second: int
    begin: int
    fitted: int = -1


class NestedMapSearch:
    """A tree of pairwise MAPs, led by preferences.

    The score of a node is the preference-weighted mean of the scores of its models' objectives, in units that make
    them comparable: as they are where all models score within [0, 1] on everything, else in ranges over the models.
    A pair has one surrogate an objective, over its two coefficients. Its outcome is the merge that the preferences
    value most, of all that were scored for it. Every trial is an ordinary merge of all K models. While an objective is
    the same for every model and for the first pair, that pair's design grows by as many points again, as far as the
    budget has room beyond the tree. One that is still the same guides nothing, and the report says so.

    Args:
        box: The bounds of the coefficients: one segment, with 0 and 1 within its bounds.
        goals: The objectives, each of which belongs to one model.
        seed: The recipe's seed.
        sources: K names of the models, two at least.
        settings: The owners of objectives, the preferences, and the size of each pair; None means the defaults.
        evaluations: The budget, which must be enough for the whole tree; None means no limit.

    Raises:
        InputError: The objectives do not belong to the models one by one, the box has several segments or lacks 0
            or 1, a preference is negative or of no objective, or there are too few samples or evaluations.

    Example::

        from ecotone.populations.population import ElitistArchive
        from ecotone.search.nested_map import NestedMapSearch, NestedMapSettings

        archive = ElitistArchive(goals, capacity=20)
        preference = {goals[0].name: 2.0}
        search = NestedMapSearch(box, goals, 0, space.sources, NestedMapSettings(preference=preference))
        while not search.done:
            for trial in search.ask(4):
                evaluation = score(trial.genome)
                search.tell(trial, evaluation, archive.add(trial, evaluation))
        preferred = search.report()["tree"][0]["coefficients"]  # by model
    """

    box: CoefficientBox
    goals: tuple[Goal, ...]
    seed: int
    sources: tuple[str, ...]
    settings: NestedMapSettings

    def __init__(
        self,
        box: CoefficientBox,
        goals: Sequence[Goal],
        seed: int,
        sources: Sequence[str],
        settings: NestedMapSettings | None = None,
        evaluations: int | None = None,
    ) -> None:
        self.box, self.goals, self.seed, self.sources = box, tuple(goals), seed, tuple(sources)
        self.settings = settings = settings or NestedMapSettings()
        _check_box(box, self.sources)
        self.owned: list[int] = _owned(self.goals, self.sources, settings.owners)
        self.weights: Floats = _weights(self.goals, settings.preference)
        self.samples: int = SAMPLES if settings.samples is None else settings.samples
        self.front: int = FRONT if settings.front is None else settings.front
        self.links: dict[str, str] = checked_links(settings.links, goals)
        needed = _check_size(len(self.sources), self.samples, self.front, evaluations)
        room = self.samples if evaluations is None else evaluations - needed
        self._again = min(self.samples, room)  # the most points to add to the first design
        self._points: list[Floats] = []  # (K,) by trial number
        self._shares: list[Floats] = []  # (2,) of a pair's nodes, by trial number
        self._scores: dict[int, Floats | None] = {}  # (M,) as measured, by trial number; None is a failure
        self._pairs: list[Pair] = []
        self._plan = np.zeros((0, 2))  # shares to be asked for next

    @property
    def done(self) -> bool:
        """True when the last pair's front has been evaluated."""
        whole = len(self._pairs) == len(self.sources) - 1 and self._pairs[-1].fitted >= 0
        return whole and not len(self._plan) and len(self._scores) == len(self._points)

    def ask(self, n: int) -> list[Trial]:
        """Up to ``n`` trials of a pair's running step; none while the step waits for results."""
        first, models = len(self._points), len(self.sources)
        if first < models:
            new = np.eye(models)[first : first + n]
            self._shares += [np.zeros(2) for _ in new]
        else:
            if not len(self._plan) and len(self._scores) == first and not self.done:
                self._plan = self._step()
            taken, self._plan = self._plan[:n], self._plan[n:]
            new = taken @ self._directions() if len(taken) else np.zeros((0, models))
            self._shares += list(taken)
        new = self.box.clip(new)
        self._points += list(new)
        return [Trial(first + i, self.box.genome(point), self._parents()) for i, point in enumerate(new)]

    def tell(self, trial: Trial, evaluation: Evaluation, outcome: Outcome) -> None:
        """Note the scores."""
        self._scores[trial.number] = measured_scores(evaluation, self.goals)

    def state(self) -> dict[str, Any]:
        """Points, scores, the pairs so far, and the trials to ask for next."""
        return {
            "points": [point.copy() for point in self._points],
            "shares": [share.copy() for share in self._shares],
            "scores": copied(self._scores),
            "pairs": [[pair.first, pair.second, pair.begin, pair.fitted] for pair in self._pairs],
            "plan": self._plan.copy(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self._points = [point.copy() for point in state["points"]]
        self._shares = [share.copy() for share in state["shares"]]
        self._scores = copied(state["scores"])
        self._pairs = [Pair(*row) for row in state["pairs"]]
        self._plan = state["plan"].copy().reshape(-1, 2)

    # -- a pair --------------------------------------------------------------------------------------------

    def _step(self) -> Floats:
        """(R, 2) shares to evaluate next, when everything asked is told: a design, its repair, or a front."""
        begin = len(self._points)
        if not self._pairs or self._pairs[-1].fitted >= 0:
            self._pairs.append(Pair(*self._closest(), begin))
            return self._design(begin)
        missing = minimum(2) - len(self._known(len(self._pairs) - 1))
        if missing <= 0 and len(self._pairs) == 1 and self._is_blind():
            missing = self._pairs[0].begin + self.samples - 2 + self._again - begin
        if missing > 0:
            low, high = self._reach()
            return np.array([trial_rng(self.seed, begin + i).uniform(low, high) for i in range(missing)])
        chosen = self._front(begin)
        self._pairs[-1] = replace(self._pairs[-1], fitted=begin)
        return chosen

    def _closest(self) -> tuple[int, int]:
        """The two nodes whose scores differ least; the earlier ones of equals."""
        values = {node: self._worth(node) for node in self._roots()}
        return min(combinations(values, 2), key=lambda pair: abs(values[pair[0]] - values[pair[1]]))

    def _worth(self, node: int) -> float:
        """A node's score; one that failed counts as 0."""
        scores = self._measured(node)
        return 0.0 if scores is None else self._value(scores[None], self._leaves(node)).item()

    def _design(self, begin: int) -> Floats:
        """(samples - 2, 2) shares of the pair's nodes: a mixed design without the nodes themselves, which are known."""
        low, high = self._reach()
        nodes = (np.eye(2) - low) / (high - low)
        words = np.random.SeedSequence(self.seed, spawn_key=(begin, STREAM)).generate_state(1)
        return low + (high - low) * design("mixed", self.samples, UNIT, int(words[0]), nodes)[2:]

    def _reach(self) -> tuple[Floats, Floats]:
        """(2,) smallest and (2,) largest shares with which a node alone stays in the box."""
        low, high = np.full(2, self.box.low), np.full(2, self.box.high)
        for side, direction in enumerate(self._directions()):
            for value in direction[direction != 0]:
                ends = sorted((self.box.low / value, self.box.high / value))
                low[side], high[side] = max(low[side], ends[0]), min(high[side], ends[1])
        return low, high

    def _front(self, begin: int) -> Floats:
        """(F, 2) shares on the pair's predicted front: the preferred one, then well-spread others."""
        index = len(self._pairs) - 1
        model = self._surrogates(index)
        rng = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(begin, STREAM)))

        def predict(shares: Floats) -> Floats:
            return self._pair_values(index, model.cautious(shares, self.settings.caution))

        low, high = self._reach()
        shares, scores = predicted_front(predict, low, high, rng, GENERATIONS, FILLING)
        order = spread(scores, self.front)
        best = int(np.argmax(scores @ self._pair_weights(index)))
        return np.asarray(shares[list(dict.fromkeys([best, *order.tolist()]))[: self.front]])

    def _surrogates(self, index: int) -> Surrogates:
        """A surrogate of each objective of the pair's models over the two shares, fitted before the front."""
        known = self._known(index)
        columns = self._columns(self._leaves(len(self.sources) + index))
        values = np.array([scores for _, _, scores in known])[:, columns]
        shares = np.array([share for _, share, _ in known])
        return Surrogates.fit(shares, values, [self.goals[j] for j in columns], self.links)

    def _known(self, index: int, front: bool = False) -> list[tuple[int, Floats, Floats]]:
        """Trials, shares and scores of a pair: of its nodes and its design, and of its front if wanted."""
        pair = self._pairs[index]
        end = len(self._points) if index + 1 == len(self._pairs) else self._pairs[index + 1].begin
        if not front and pair.fitted >= 0:
            end = pair.fitted
        nodes = [(self._number(node), np.eye(2)[side]) for side, node in enumerate((pair.first, pair.second))]
        trials = nodes + [(number, self._shares[number]) for number in range(pair.begin, end)]
        scored = [(number, share, self._scores.get(number)) for number, share in trials]
        return [(number, share, scores) for number, share, scores in scored if scores is not None]

    def _is_blind(self) -> bool:
        """Whether an objective has been the same for every model and every merge so far."""
        known = np.array([scores for scores in self._scores.values() if scores is not None])
        return bool(flat(known, self.goals))

    # -- the tree ------------------------------------------------------------------------------------------

    def _roots(self) -> list[int]:
        """Nodes that are not merged yet."""
        merged = {node for pair in self._pairs for node in (pair.first, pair.second)}
        return [node for node in range(len(self.sources) + len(self._pairs)) if node not in merged]

    def _leaves(self, node: int) -> list[int]:
        """The models below a node."""
        if node < len(self.sources):
            return [node]
        pair = self._pairs[node - len(self.sources)]
        return sorted(self._leaves(pair.first) + self._leaves(pair.second))

    def _number(self, node: int) -> int:
        """The number of a node's trial: a model itself, or the trial of a pair that the preferences value most."""
        if node < len(self.sources):
            return node
        index = node - len(self.sources)
        known = self._known(index, front=True)
        values = self._value(np.array([scores for _, _, scores in known]), self._leaves(node))
        return known[int(np.argmax(values))][0]

    def _measured(self, node: int) -> Floats | None:
        return self._scores.get(self._number(node))

    def _directions(self) -> Floats:
        """(2, K) coefficients of the running pair's nodes."""
        pair = self._pairs[-1]
        return np.array([self._points[self._number(node)] for node in (pair.first, pair.second)])

    def _parents(self) -> tuple[int, ...]:
        return (self._number(self._pairs[-1].first), self._number(self._pairs[-1].second)) if self._pairs else ()

    # -- scores and preferences ----------------------------------------------------------------------------

    def _columns(self, leaves: Sequence[int]) -> list[int]:
        """Objectives of the models ``leaves``, in the order of the goals."""
        return [j for j in range(len(self.goals)) if self.owned[j] in leaves]

    def _value(self, scores: Floats, leaves: Sequence[int]) -> Floats:
        """(N,) preference-weighted mean of the comparable (N, M) ``scores`` over the objectives of ``leaves``."""
        columns = self._columns(leaves)
        signs = np.array([self.goals[j].sign for j in columns])
        return self._mean(scores[:, columns] * signs, columns)

    def _mean(self, oriented: Floats, columns: Sequence[int]) -> Floats:
        """(N,) mean of oriented scores (N, J) of the objectives ``columns``, by preference, in comparable units."""
        weights = self.weights[list(columns)]
        weights = weights if weights.sum() > 0 else np.ones(len(columns))
        return np.asarray(oriented / self._units()[list(columns)] @ (weights / weights.sum()))

    def _units(self) -> Floats:
        """(M,) the divisors of scores: 1, or the range over the models where some score is not in [0, 1]."""
        rows = [self._scores.get(number) for number in range(len(self.sources))]
        known = np.array([row for row in rows if row is not None]).reshape(-1, len(self.goals))
        if not len(known) or (known.min() >= 0 and known.max() <= 1):
            return np.ones(len(self.goals))
        extent = np.ptp(known, axis=0)
        return np.where(extent > 0, extent, 1.0)

    def _pair_values(self, index: int, oriented: Floats) -> Floats:
        """(N, 2) scores of a pair's two nodes from oriented scores (N, J) of the objectives of both."""
        columns = self._columns(self._leaves(len(self.sources) + index))
        sides = []
        for node in (self._pairs[index].first, self._pairs[index].second):
            own = self._columns(self._leaves(node))
            sides.append(self._mean(oriented[:, [columns.index(j) for j in own]], own))
        return np.stack(sides, axis=1)

    def _pair_weights(self, index: int) -> Floats:
        """(2,) preference of a pair's nodes: the sum of that of their objectives."""
        nodes = (self._pairs[index].first, self._pairs[index].second)
        weights = np.array([self.weights[self._columns(self._leaves(node))].sum() for node in nodes])
        return weights if weights.sum() > 0 else np.ones(2)

    # -- report --------------------------------------------------------------------------------------------

    def report(self) -> dict[str, Any]:
        """The tree, from its roots down (one, when it is finished); plain values.

        A node has its ``models``, the ``number`` of its trial, its ``coefficients`` by model, its ``scores`` by
        objective and its ``value`` (preference-weighted, in comparable units); a merged one also the ``shares`` of its
        two ``children``, its ``leave_one_out`` errors by objective, and as ``members`` its predicted front, with the
        two nodes' values as ``predicted`` and ``measured``. ``warnings`` name objectives that guided nothing.
        """
        fitted = [self._surrogates(index).warnings for index, pair in enumerate(self._pairs) if pair.fitted >= 0]
        # Of one objective the number of points differs from pair to pair.
        warnings = {text.split(":")[0]: text for found in fitted for text in found}
        return {
            **({"warnings": list(warnings.values())} if warnings else {}),
            "algorithm": "nested_map",
            "objectives": [goal.name for goal in self.goals],
            "owners": {goal.name: self.sources[owner] for goal, owner in zip(self.goals, self.owned, strict=True)},
            "preference": {goal.name: float(w) for goal, w in zip(self.goals, self.weights, strict=True)},
            "tree": [self._node(node) for node in self._settled()],
        }

    def _settled(self) -> list[int]:
        """Nodes to show: the roots; where one is still being merged, the two that it is merged of."""
        nodes = [node for node in self._roots() if node >= len(self.sources) or node < len(self._points)]
        if self._pairs and self._pairs[-1].fitted < 0:
            nodes[-1:] = [self._pairs[-1].first, self._pairs[-1].second]
        return nodes

    def _node(self, node: int) -> dict[str, Any]:
        number, scores = self._number(node), self._measured(node)
        entry: dict[str, Any] = {
            "models": [self.sources[leaf] for leaf in self._leaves(node)],
            "number": number,
            "coefficients": dict(zip(self.sources, self._points[number].tolist(), strict=True)),
            "scores": by_objective(self.goals, scores),
            "value": None if scores is None else self._worth(node),
        }
        return entry if node < len(self.sources) else entry | self._merged(node)

    def _merged(self, node: int) -> dict[str, Any]:
        index = node - len(self.sources)
        pair, model = self._pairs[index], self._surrogates(index)
        shares = {number: share for number, share, _ in self._known(index, front=True)}
        return {
            "children": [self._node(pair.first), self._node(pair.second)],
            "shares": shares[self._number(node)].tolist(),
            "leave_one_out": model.leave_one_out(),
            "members": self._members(index, model),
        }

    def _members(self, index: int, model: Surrogates) -> list[dict[str, Any]]:
        pair = self._pairs[index]
        end = len(self._points) if index + 1 == len(self._pairs) else self._pairs[index + 1].begin
        numbers = range(pair.fitted, end)
        predicted = self._pair_values(
            index, model.cautious(np.array([self._shares[n] for n in numbers]).reshape(-1, 2))
        )
        members = []
        for number, row in zip(numbers, predicted, strict=True):
            scores = self._scores.get(number)
            leaves = (self._leaves(pair.first), self._leaves(pair.second))
            measured = None if scores is None else [self._value(scores[None], side).item() for side in leaves]
            members.append({"number": number, "predicted": row.tolist(), "measured": measured})
        return members


# -- refusals ------------------------------------------------------------------------------------------------


def _check_box(box: CoefficientBox, sources: tuple[str, ...]) -> None:
    if len(sources) < 2 or len(sources) != box.sources:
        raise InputError(f"models: nested MAP merges two or more models, found {len(sources)}.")
    if box.settings:
        raise InputError(
            f"merge: nested MAP searches over coefficients alone, found bounds for {box.settings[0].name}.",
            "Give one value, or use another algorithm: map, bayesian_map, nsga2 or cma_es search over settings, too.",
        )
    if box.rows != 1:
        raise InputError(
            f"search.granularity: nested MAP has one coefficient a model, found {box.parts}.",
            "Use granularity: model, or another algorithm: nsga2 or cma_es have no such limit.",
        )
    if not box.low <= 0 <= 1 <= box.high:
        raise InputError(
            "search.low and search.high: nested MAP starts from each model by itself, so 0 and 1 must lie between "
            f"them, found {box.low:g} and {box.high:g}.",
            "Use low: 0 and high: 1 or more.",
        )


def _owned(goals: tuple[Goal, ...], sources: tuple[str, ...], owners: Mapping[str, str] | None) -> list[int]:
    """The model of each objective.

    Raises:
        InputError: Objectives and models do not match, or a name is unknown.
    """
    names = [goal.name for goal in goals]
    if owners is None:
        if len(goals) != len(sources):
            raise InputError(
                "search.owners: nested MAP must know which model each objective belongs to; without it there must be "
                f"one objective a model in the same order, found {len(goals)} objectives for {len(sources)} models.",
                "Give owners, with a line objective: model for every objective.",
            )
        return list(range(len(sources)))
    _check_names("search.owners", "objective", list(owners), names)
    _check_names("search.owners", "model", list(owners.values()), list(sources))
    idle = [name for name in sources if name not in owners.values()]
    unowned = [name for name in names if name not in owners]
    if idle or unowned:
        what = f"model {idle[0]!r} has no objective" if idle else f"objective {unowned[0]!r} has no model"
        raise InputError(f"search.owners: every objective needs a model and every model an objective; {what}.")
    return [sources.index(owners[name]) for name in names]


def _weights(goals: tuple[Goal, ...], preference: Mapping[str, float] | None) -> Floats:
    """(M,) how much each objective matters."""
    names, given = [goal.name for goal in goals], dict(preference or {})
    _check_names("search.preference", "objective", list(given), names)
    weights = np.array([float(given.get(name, 1.0)) for name in names])
    if (weights < 0).any() or weights.sum() == 0:
        shown = ", ".join(f"{name}={weight:g}" for name, weight in zip(names, weights, strict=True))
        raise InputError(f"search.preference: expected weights of at least 0, one of them above, found {shown}.")
    return weights


def _check_names(field: str, what: str, found: Sequence[str], known: Sequence[str]) -> None:
    for name in found:
        if name not in known:
            raise InputError(f"{field}: there is no {what} {name!r}.", nearest(name, tuple(known)))


def _check_size(models: int, samples: int, front: int, evaluations: int | None) -> int:
    """The evaluations of the whole tree.

    Raises:
        InputError: There are too few samples, or too few evaluations.
    """
    fewest = minimum(2)
    if samples < fewest:
        raise InputError(
            f"search.samples: expected at least {fewest} a pair, the coefficients of a quadratic in two variables, "
            f"found {samples}.",
            f"Use {2 * fewest} or more.",
        )
    needed = models + (models - 1) * (samples - 2 + front)
    if evaluations is not None and evaluations < needed:
        least = models + (models - 1) * (fewest - 1)
        raise InputError(
            f"budget.evaluations: nested MAP of {models} models needs {needed}: {models} models, then "
            f"{models - 1} pairs of {samples} samples (two of them known) and {front} members of the front, "
            f"found {evaluations}.",
            f"Raise the budget, or lower search.samples (to no less than {fewest}) and search.front; the least for "
            f"{models} models is {least}.",
        )
    return needed
