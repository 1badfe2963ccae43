"""Expert Merging: merge coefficients learned so that on each task the merge behaves as that task's expert.

Zhang et al. 2025, "Expert Merging: Model Merging with Unsupervised Expert Alignment and Importance-Guided Layer
Chunking" (arXiv:2509.25712). In

    theta = theta_0 + sum_k alpha_k tau_k,    alpha = sigmoid(raw)

each tensor has an alpha of its own for each expert, but for norms, embeddings, biases and heads, which stay as the base
has them. Adam moves raw against the gradient of

    mean over tasks of the distance to the expert's logits and hidden layers (``ecotone.fitness.gradients.calibration``)
        + regulariser * mean |alpha - alpha at the start|

Expert Merging++ then cuts the tensors that matter most into chunks, shares a number of coefficients out among them by
importance, and learns on. How lines, steps, checks and restarts go is AdaMerging's (``ecotone.search.adamerging``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats, Integers
from ecotone.populations.space import Space
from ecotone.populations.trial import Goal
from ecotone.search.adamerging import Adam, AdaMerging, Line
from ecotone.search.surrogates import sigmoid

EXCLUDED = (
    *("*norm*", "*ln_*", "*layer_norm*"),
    *("*embed*", "*wte.*", "*wpe.*", "shared.*"),
    "*bias",
    *("*lm_head*", "*classifier*", "score.*", "*.score.*", "cls.*", "*qa_outputs*", "head.*", "*.head.*", "fc.*"),
)
"""Names of tensors that are left as the base has them unless others are given: norms, embeddings, biases, heads."""

_EDGE = 1e-3  # starts are kept so far from 0 and 1, where the sigmoid is flat


class ExpertMerging(AdaMerging):
    """Adam on the logits of coefficients between 0 and 1, one a tensor and expert; with ``chunks``, ++.

    Args:
        space: The models; ++ takes the length of task vectors from its Gram table.
        tasks: Names of the T calibration tasks.
        goals: The objectives of the checks.
        seed: The recipe's seed, for restarts.
        init: Every coefficient's start when there are no ``starts``; between 0 and 1.
        starts: (S, K) coefficients of the S tensors to start from; clipped to between 0.001 and 0.999, and 0 where a
            tensor is excluded.
        rate: Adam's step size, in logits.
        regulariser: Weight of the mean distance of the coefficients from the line's start.
        clip: Longest gradient (Euclidean, over all raw coefficients); a longer one is shortened to it.
        exclude: Patterns of the names of tensors that stay as the base has them, as for file names, in any case; None
            means ``EXCLUDED``.
        chunks: After ``steps`` steps (or when ``patience`` ends them) tensors are cut into so many chunks each on
            average, and a line takes up to ``steps`` more. Tensor l gets floor(chunks S I_l^steepness / sum_j
            I_j^steepness) of equal size, none meaning that its coefficients stay as they are. Its importance I_l is
            sum_k alpha_k ||tau_k|| sqrt(n_l) over its n_l parameters: coefficient, root-mean-square of the task vector
            and number of parameters (the paper takes the mean absolute value for the root-mean-square). None leaves
            this stage out.
        steepness: How much more chunks go to important tensors; 0 shares them out evenly.
        **settings: ``steps``, ``accumulate``, ``weights``, ``sweep``, ``restarts``, ``spread`` (in logits),
            ``check_every`` and ``patience`` as for AdaMerging. Weights of tasks count relative to their sum.

    Raises:
        InputError: A setting is out of its range, a pattern matches no tensor, or no tensor is left to learn on.
    """

    algorithm = "expert_merging"

    def __init__(
        self,
        space: Space,
        tasks: Sequence[str],
        goals: Sequence[Goal],
        seed: int,
        *,
        init: float = 0.1,
        starts: Sequence[Floats] | None = None,
        rate: float = 0.5,
        steps: int = 100,
        regulariser: float = 5.0,
        clip: float = 1.0,
        exclude: Sequence[str] | None = None,
        chunks: float | None = None,
        steepness: float = 1.0,
        spread: float = 0.5,
        **settings: Any,
    ) -> None:
        _check(init, regulariser, clip, chunks, steepness)
        self.regulariser, self.clip, self.chunks, self.steepness = regulariser, clip, chunks, steepness
        self._space = space
        self._excluded = _excluded(space.tensors, exclude)
        borders = np.asarray(space.tensor_borders)
        super().__init__(
            *(borders, space.dimension, tasks, goals, seed),
            **{"init": init, "starts": starts, "rate": rate, "steps": steps, "spread": spread, **settings},
        )

    @property
    def most_steps(self) -> int:
        """Steps of a line that takes them all."""
        return self.steps if self.chunks is None else 2 * self.steps

    # -- what Adam moves: logits, minus infinity where the coefficient is 0 and stays so ------------------------

    def _point(self, coefficients: Floats) -> Floats:
        inside = np.clip(coefficients, _EDGE, 1 - _EDGE)
        raw = np.log(inside / (1 - inside))
        raw[self._excluded] = -math.inf
        return raw

    def _exact(self, coefficients: Floats) -> Floats | None:
        exact: Floats = np.clip(coefficients, _EDGE, 1 - _EDGE)
        exact[self._excluded] = 0.0
        return exact

    def _used(self, point: Floats) -> Floats:
        return sigmoid(point)

    def _pulled(self, line: Line, gradient: Floats) -> Floats:
        """Gradient by the logits of mean task loss and regulariser, at most ``clip`` long."""
        alpha = self._used(line.adam.point)
        learned = np.isfinite(line.adam.point)
        learned[line.held] = False
        away = np.sign(alpha - self._used(line.start)) / np.count_nonzero(learned)
        pulled: Floats = (gradient / line.weights.sum() + self.regulariser * away) * alpha * (1 - alpha)
        pulled[~learned] = 0.0
        pulled *= min(1.0, self.clip / max(float(np.linalg.norm(pulled)), 1e-300))
        return pulled

    def _outside(self, line: Line) -> Any:
        return np.zeros(line.adam.point.shape, bool)  # nothing is clamped

    # -- Expert Merging++ ----------------------------------------------------------------------------------------

    def _grown(self, line: Line) -> bool:
        """Cut the tensors into chunks, once; unless that would leave nothing to learn."""
        if self.chunks is None or line.grown:
            return False
        importance = self.importance(self._used(line.adam.point))
        counts = shares(importance**self.steepness * (importance > 0), self.chunks * len(importance))
        if not counts.any():
            return False
        borders, owners = self._cut(counts)
        line.grown, line.before, line.last = True, line.step, line.step + self.steps
        line.borders, line.held = borders, np.flatnonzero(counts[owners] == 0).tolist()
        line.adam, line.start = Adam(line.adam.point[owners], self.rate), line.start[owners]
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
        """AdaMerging's, with the names of the tensors that stay the base's as ``excluded``.

        A line also has ``chunks``: by tensor, where ++ cut it, the number of its coefficients an expert; 0 where they
        are those of the first stage.
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


def _check(init: float, regulariser: float, clip: float, chunks: float | None, steepness: float) -> None:
    if not 0 < init < 1:
        raise InputError(f"search.init: expected a number between 0 and 1, found {init}.", "The authors' is 0.1.")
    wanted: Mapping[str, float] = {"regulariser": regulariser, "steepness": steepness}
    for name, value in wanted.items():
        if not 0 <= value < math.inf:
            raise InputError(f"search.{name}: expected a number of at least 0, found {value}.")
    if not clip > 0:
        raise InputError(f"search.clip: expected a number above 0, found {clip}.")
    if chunks is not None and not 0 < chunks < math.inf:
        raise InputError(f"search.chunks: expected a number above 0, found {chunks}.", "The authors' are 0.9 to 1.2.")
