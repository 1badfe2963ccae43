"""The chunk kernel: any number of merges of the same tensors in one pass over them.

    out_b[p] = round(sum_j weights_b[segment_b(p), j] * source_j[p] + residual_b[p])

Each product and each sum is rounded to float32 (float64 for float64 sources), in the order of the sources, and
terms of weight zero are left out; then one rounding to the type of the output. No fused multiply-add and no matrix
product: every backend, chunk size, thread count and set of candidates gives the same bits.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from populations.genome import Floats, Integers

CHUNK = 32_640  # elements; below torch's threshold for splitting an operation over threads, and small enough for L2


@dataclass(frozen=True, eq=False)
class Mixture:
    """One candidate over the J checkpoints.

    Args:
        borders: (S+1,) segment borders.
        weights: (S, J) float64 weights; they are rounded to the accumulator's type.
        residual: (n,) added to the sum, or None.
    """

    borders: Integers
    weights: Floats
    residual: NDArray[np.float32] | None = None

    @cached_property
    def edges(self) -> list[int]:
        """The borders as a list."""
        edges: list[int] = self.borders.tolist()
        return edges

    @cached_property
    def rows(self) -> list[list[tuple[int, float]]]:
        """By segment, the sources of weight other than zero and their weights, as float32 has them."""
        return _terms(self.weights.astype(np.float32))

    @cached_property
    def exact_rows(self) -> list[list[tuple[int, float]]]:
        """As ``rows``, in float64."""
        return _terms(self.weights)

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(segment, from, to) of the segments that meet positions start to stop."""
        edges = self.edges
        segment = bisect_right(edges, start) - 1
        while start < stop:
            end = min(edges[segment + 1], stop)
            yield segment, start, end
            start, segment = end, segment + 1


def mix(sources: Sequence[Tensor], start: int, mixtures: Sequence[Mixture], outs: Sequence[Tensor]) -> None:
    """Fill one flat stretch of every candidate.

    Args:
        sources: J flat tensors of one length, the stretch of each checkpoint.
        start: The stretch's first position in the flat vector.
        mixtures: B candidates.
        outs: B flat contiguous tensors of that length, on one device; they must not overlap the sources.
    """
    size, chunk = sources[0].numel(), CHUNK
    if outs[0].is_cuda:
        chunk = 1 << 24
    spans = [(low, min(low + chunk, size)) for low in range(0, size, chunk)]

    def work(span: tuple[int, int]) -> None:
        low, high = span
        _mix_chunk([s[low:high] for s in sources], start + low, mixtures, [o[low:high] for o in outs])

    over_threads(work, spans, 1 if outs[0].is_cuda else torch.get_num_threads())


def over_threads(work: Callable[[tuple[int, int]], None], spans: Sequence[tuple[int, int]], threads: int) -> None:
    """Call ``work`` on every span, spread over threads; the first exception is raised here."""
    if threads <= 1 or len(spans) < 2 * threads:
        for span in spans:
            work(span)
        return

    def run(part: Sequence[tuple[int, int]]) -> None:
        for span in part:
            work(span)

    for _ in _pool(threads).map(run, [spans[i::threads] for i in range(threads)]):
        pass


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="merging")


class _Scratch(threading.local):
    """Buffers of one thread, reused from chunk to chunk."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def get(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, dtype, device)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self.buffers[key][:size]


_scratch = _Scratch()


def _mix_chunk(sources: Sequence[Tensor], start: int, mixtures: Sequence[Mixture], outs: Sequence[Tensor]) -> None:
    size, device = sources[0].numel(), outs[0].device
    kind = torch.float64 if any(s.dtype == torch.float64 for s in sources) else torch.float32
    staged: dict[int, Tensor] = {}

    def stage(index: int) -> Tensor:
        if index not in staged:
            source = sources[index]
            if source.dtype == kind and source.device == device:
                staged[index] = source
            else:
                staged[index] = _scratch.get(f"source {index}", size, kind, device)
                staged[index].copy_(source)
        return staged[index]

    term = _scratch.get("term", size, kind, device)
    for mixture, out in zip(mixtures, outs, strict=True):
        total = out if out.dtype == kind else _scratch.get("total", size, kind, device)
        rows = mixture.rows if kind == torch.float32 else mixture.exact_rows
        zero = 0.0 if mixture.residual is None else -0.0  # -0.0 + r is r for every r
        for segment, low, high in mixture.pieces(start, start + size):
            part = slice(low - start, high - start)
            _sum_terms([(stage(j)[part], w) for j, w in rows[segment]], total[part], term[part], zero)
        if mixture.residual is not None:
            _add(mixture.residual[start : start + size], total)
        if total is not out:
            out.copy_(total)


def _sum_terms(terms: Sequence[tuple[Tensor, float]], total: Tensor, term: Tensor, zero: float) -> None:
    if not terms:
        total.fill_(zero)
        return
    torch.mul(terms[0][0], terms[0][1], out=total)
    for source, weight in terms[1:]:
        torch.mul(source, weight, out=term)
        total.add_(term)


def _add(residual: NDArray[np.float32], total: Tensor) -> None:
    if total.is_cuda:
        total.add_(torch.from_numpy(residual.copy()).to(total.device))
    else:
        view = total.numpy()
        np.add(view, residual, out=view)  # torch cannot read the frozen arrays of a genome without a warning


def _terms(weights: NDArray[np.floating]) -> list[list[tuple[int, float]]]:
    return [[(j, w) for j, w in enumerate(row) if w != 0.0] for row in weights.tolist()]
