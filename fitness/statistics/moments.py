"""Second moments of linear layers: of their inputs (A), of the slopes at their outputs (B), and the diagonal Fisher.

For a layer y = W x + b let x be its input with a 1 appended, for the bias, and let g be the gradient of log p(y | x) by
its output, the label drawn from the model's own predictions. K-FAC (Martens & Grosse 2015, arXiv:1503.05671) writes the
layer's Fisher information as the Kronecker product of A = E[x xᵀ] and B = E[g gᵀ]. RegMean (Jin et al. 2023,
arXiv:2212.09849) needs A alone, Fisher merging (Matena & Raffel 2022, arXiv:2111.09832) the diagonal E[g² ⊗ x²].

Rows are tokens, or examples where there are no tokens. No labels are read. The expectation over labels is a sum over
the classes c, E[g gᵀ] = sum_c p_c g_c g_cᵀ, and not a label drawn by p: a rare label has large slopes, so draws are
noisy where predictions are sure. It takes ``passes`` backward passes. The classes of a row are dealt out to the passes,
the most probable ones to a pass each, and those of one pass are added with random signs s: the mean of
(sum_c s_c sqrt(p_c) g_c)(...)ᵀ is the sum over them. With as many passes as classes nothing is random, unless there are
predictions by token: those of one example are told apart by the signs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from ecotone.fitness.data import Inputs
from ecotone.fitness.heads import Head, logits_of, outputs
from ecotone.fitness.statistics.kinds import Data, Gathering
from ecotone.fitness.statistics.layers import Observed, Take, mask_of, observable_layers, observe, observed

Layers: TypeAlias = Mapping[str, nn.Module]
PIECE = 2**22
"""Elements of logits that are worked on at a time."""


@dataclass
class Moment:
    """A sum over rows, in float64.

    Args:
        total: The sum.
        rows: Number of rows.
    """

    total: Tensor
    rows: int


@dataclass
class Moments:
    """Sums by the names of layers, added up batch by batch in float64."""

    sums: dict[str, Moment] = field(default_factory=dict)

    def add(self, name: str, total: Tensor, rows: int) -> None:
        """Add the sum of some rows."""
        if name in self.sums:
            self.sums[name].total += total
            self.sums[name].rows += rows
        else:
            self.sums[name] = Moment(total, rows)

    def rows(self) -> dict[str, int]:
        """Numbers of rows."""
        return {name: one.rows for name, one in self.sums.items()}

    def means(self) -> dict[str, Tensor]:
        """The means over rows, on the CPU, of layers that a row has reached. The sums become them, and are gone."""
        sums, self.sums = self.sums, {}
        return {name: one.total.div_(one.rows).cpu() for name, one in sums.items() if one.rows}


def with_one(rows: Tensor) -> Tensor:
    """(N, in + 1): the rows in float64, with a 1 appended for the bias."""
    return torch.cat([rows.double(), rows.new_ones((len(rows), 1), dtype=torch.float64)], dim=1)


def together(found: Iterable[Moments]) -> Moments:
    """The sums over the rows of several tasks."""
    whole = Moments()
    for moments in found:
        for name, one in moments.sums.items():
            whole.add(name, one.total, one.rows)
    return whole


def squares(found: Moments) -> Take:
    """Takes rows of inputs x, and adds up x xᵀ, (in + 1, in + 1)."""

    def take(name: str, rows: Tensor) -> None:
        whole = with_one(rows)
        found.add(name, whole.mT @ whole, len(whole))

    return take


def inputs_of(model: nn.Module, layers: Layers, data: Data, batch: int) -> Moments:
    """Sums of x xᵀ, (in + 1, in + 1), of the inputs of each layer."""
    found = Moments()
    observe(model, layers, data, batch, squares(found))
    return found


def slopes_of(model: nn.Module, layers: Layers, data: Data, settings: SlopeSettings) -> Moments:
    """Sums of g gᵀ, (out, out), of the slopes at the outputs of each layer."""
    found = Moments()

    def take(name: str, slopes: Tensor, _inputs: Tensor, rows: int) -> None:
        found.add(name, slopes.mT @ slopes, rows)

    _each_slope(model, layers, data, settings, take)
    return found


def fisher_of(model: nn.Module, layers: Layers, data: Data, settings: SlopeSettings) -> Moments:
    """Sums of g² ⊗ x², (out, in + 1): the diagonal Fisher information of each weight, the bias as its last column.

    Exact for one row an example. Of many, the products of different rows of one example are left out.
    """
    found = Moments()

    def take(name: str, slopes: Tensor, inputs: Tensor, rows: int) -> None:
        found.add(name, slopes.square().mT @ with_one(inputs).square(), rows)

    _each_slope(model, layers, data, settings, take)
    return found


class SlopeSettings(Gathering):
    """Settings of statistics of slopes.

    Attributes:
        passes: The most backward passes a batch; exact where there are no more classes.
        seed: The seed of the signs.
    """

    passes: int = Field(4, ge=1)
    seed: int = Field(0, ge=0)


_Take: TypeAlias = Callable[[str, Tensor, Tensor, int], None]


def _each_slope(model: nn.Module, layers: Layers, data: Data, settings: SlopeSettings, take: _Take) -> None:
    """Give ``take`` (N, out) slopes and (N, in) inputs of each layer, for one pass after the other.

    Rows are counted with the first pass alone, so that means are over rows.
    """
    for number, inputs in enumerate(data.examples.batches(settings.batch)):
        _slopes_of_batch(model, layers, inputs, data.head, settings, number, take)


def _slopes_of_batch(
    model: nn.Module,
    layers: Layers,
    inputs: Inputs,
    head: Head | None,
    settings: SlopeSettings,
    number: int,
    take: _Take,
) -> None:
    """One batch of ``_each_slope``. What it has made is freed at its end."""
    generator = torch.Generator().manual_seed(settings.seed + number)
    with torch.enable_grad(), observed(layers, mask_of(inputs)) as seen:
        logits = logits_of(outputs(model, inputs), inputs, head, tokens=head is None)
        if not seen:
            return
        probes = [one.probe for one in seen]
        turns = _slopes_of_logits(logits.detach(), mask_of(inputs).predictions, settings, generator)
        count = min(settings.passes, logits.shape[-1])
        for turn, at_logits in enumerate(turns):
            slopes = torch.autograd.grad(logits, probes, at_logits, retain_graph=turn + 1 < count, allow_unused=True)
            del at_logits  # before the next one is made
            for one, slope in zip(seen, slopes, strict=True):
                rows = _double(one, slope)
                take(one.name, rows, one.inputs, 0 if turn else len(rows))


def _double(one: Observed, slope: Tensor | None) -> Tensor:
    return one.rows(torch.zeros_like(one.probe) if slope is None else slope).double()


def _slopes_of_logits(
    logits: Tensor, mask: Tensor | None, settings: SlopeSettings, generator: torch.Generator
) -> Iterator[Tensor]:
    """Slopes at the logits, pass by pass: the squares of what they lead to add up to the expectation over labels.

    They are those of ``sum_c s_c sqrt(p_c) log p_c`` over the classes c of a pass, the factors taken as given. Logits
    of texts are large, so all else is made by pieces of rows.

    Args:
        logits: (n, C), or (n, L, C) with a row for each token.
        mask: (n, L) which tokens count; None for all.
        settings: How many passes there are at most.
        generator: Draws the signs.
    """
    classes = logits.shape[-1]
    count = min(settings.passes, classes)
    exact = count == classes and logits.ndim == 2  # slopes of several tokens need signs to be told apart
    counts = None if mask is None or mask.shape != logits.shape[:-1] else mask.reshape(-1, 1)
    rows, signs, most = logits.reshape(-1, classes), None, torch.empty(0)
    step = max(1, PIECE // classes)
    pieces = [slice(low, low + step) for low in range(0, len(rows), step)]
    if not exact:
        signs = torch.randint(2, rows.shape, generator=generator, dtype=torch.int8).to(rows.device).mul_(2).sub_(1)
        most = torch.cat([rows[piece].softmax(-1).topk(count).indices for piece in pieces])
    dealt = torch.arange(classes, device=rows.device) % count
    for turn in range(count):
        slopes = torch.empty_like(rows)
        for piece in pieces:
            outer = rows[piece].softmax(-1).sqrt_()
            wanted = (dealt == turn).expand(outer.shape)
            if signs is not None:
                ranks = (dealt[:count] == turn).expand(len(outer), count)
                wanted = signs[piece] * wanted.scatter(-1, most[piece], ranks)
            outer *= wanted
            if counts is not None:
                outer *= counts[piece]
            likelihoods = rows[piece].log_softmax(-1)
            slopes[piece] = torch.ops.aten._log_softmax_backward_data(outer, likelihoods, -1, rows.dtype)
        yield slopes.view(logits.shape)
        del slopes


# -- kinds -----------------------------------------------------------------------------------------------------


class InputMoments:
    """A = E[x xᵀ]: (in + 1, in + 1) in float64, for each linear layer; the last row and column are those of the bias.

    Rows of all tasks count alike. Layers that the data do not reach are left out.

    Args:
        settings: How many examples there are in a pass.
    """

    settings: ClassVar[type[Gathering]] = Gathering
    version: ClassVar[int] = 1

    def __init__(self, settings: Gathering) -> None:
        self._settings = settings

    def gather(self, model: nn.Module, tasks: Sequence[Data]) -> Mapping[str, Tensor]:
        """The moments of ``model`` by the names of its layers, on the CPU."""
        layers = observable_layers(model)
        return together(inputs_of(model, layers, task, self._settings.batch) for task in tasks).means()


class _OfSlopes:
    """Statistics of slopes.

    Args:
        settings: How the expectation over labels is taken.
    """

    settings: ClassVar[type[SlopeSettings]] = SlopeSettings
    version: ClassVar[int] = 1

    def __init__(self, settings: SlopeSettings) -> None:
        self._settings = settings

    def gather(self, model: nn.Module, tasks: Sequence[Data]) -> Mapping[str, Tensor]:
        """The statistics of ``model`` by the names of its layers, on the CPU."""
        layers = observable_layers(model)
        return together(self._of(model, layers, task) for task in tasks).means()

    def _of(self, model: nn.Module, layers: Layers, task: Data) -> Moments:
        raise NotImplementedError


class SlopeMoments(_OfSlopes):
    """B = E[g gᵀ]: (out, out) in float64, for each linear layer.

    Args:
        settings: How the expectation over labels is taken.
    """

    def _of(self, model: nn.Module, layers: Layers, task: Data) -> Moments:
        return slopes_of(model, layers, task, self._settings)


class DiagonalFisher(_OfSlopes):
    """E[g² ⊗ x²]: (out, in + 1) in float64, for each linear layer; the last column is that of the bias.

    Args:
        settings: How the expectation over labels is taken.
    """

    def _of(self, model: nn.Module, layers: Layers, task: Data) -> Moments:
        return fisher_of(model, layers, task, self._settings)
