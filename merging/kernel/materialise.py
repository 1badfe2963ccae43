"""The chunk kernel: any number of merges of the same tensors in one pass over them.

    out_b[p] = round(sum_j weights_b[segment_b(p), j] * source_j[p] + residual_b[p])

Each product and each sum is rounded to float32 (float64 for float64 sources), in the order of the sources, and
terms of weight zero are left out; then comes one rounding to the type of the output. No fused multiply-add and no
matrix product: every backend, chunk size, thread count and set of candidates gives the same bits.

Backends: numpy, one thread, on chunks that stay in cache, for small models, where overhead counts; for large ones
loops compiled by numba where it is installed (``ecotone.merging.kernel.compiled``), otherwise and on CUDA devices
torch.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ecotone.merging.kernel import compiled
from ecotone.merging.kernel.lazy import Source, formed
from ecotone.populations.genome import Floats, Integers

CHUNK = 32_640  # elements: the float32 copies stay in L2, and torch splits nothing below 32,768 over threads
COMPILED_SPAN = 262_144  # elements a call of a compiled loop; it blocks for the cache itself
TORCH_SPAN = 131_072  # elements a thread
DEVICE_SPAN = 4_194_304
SMALL = 16_777_216  # elements of all sources together below which compiling or loading loops does not pay

Part = TypeVar("Part")
Transform: TypeAlias = Callable[[Sequence[Tensor], int], list[Tensor]]
"""A function that an operator applies to J flat pieces that begin at a position of the flat vector.

It returns as many pieces of the same size on the same device. Their types depend only on the types of the given pieces.
Every element depends only on its position and on the J elements there, so pieces may be cut anywhere. Pieces that
differ in type are widened to the accumulator's type before they are changed.
"""


def unchanged(pieces: Sequence[Tensor], _start: int) -> list[Tensor]:
    """The pieces as the checkpoints hold them."""
    return list(pieces)


@dataclass(frozen=True, eq=False)
class Stretch:
    """J flat tensors of one length, which the operator changes where and when they are read.

    Args:
        stored: J flat tensors as the checkpoints hold them, in main memory or on one device.
        transform: The function that makes the mixed pieces from them.
        start: Their first position in the flat vector.
    """

    stored: Sequence[Source]
    transform: Transform = unchanged
    start: int = 0

    @property
    def size(self) -> int:
        """Length of each tensor."""
        return self.stored[0].numel()

    def __getitem__(self, part: slice) -> Stretch:
        return Stretch([tensor[part] for tensor in self.stored], self.transform, self.start + (part.start or 0))

    def sample(self) -> Sequence[Source]:
        """J flat tensors, short ones where that takes work, of the types that are mixed."""
        return self.stored if self.transform is unchanged else self[:1].tensors()

    def tensors(self, device: torch.device | None = None) -> list[Tensor]:
        """J flat tensors to mix, on a device or (None) where they are.

        Those that were moved are valid until the same thread moves others.
        """
        pieces = [formed(piece) for piece in (self.stored if device is None else _moved(self.stored, device))]
        if self.transform is not unchanged and len({piece.dtype for piece in pieces}) > 1:
            kind = accumulator(pieces)
            pieces = [piece.to(kind) for piece in pieces]
        return self.transform(pieces, self.start)


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
    def single(self) -> NDArray[np.float32]:
        """The weights in float32."""
        return self.weights.astype(np.float32)

    def between(self, start: int, stop: int) -> tuple[slice, Integers]:
        """The segments that meet positions start to stop, and their borders there, counted from start."""
        first, last = bisect_right(self.edges, start) - 1, bisect_left(self.edges, stop)
        borders = self.borders[first : last + 1] - start
        borders[0], borders[-1] = 0, stop - start
        return slice(first, last), borders


def mix(sources: Stretch, start: int, mixtures: Sequence[Mixture], outs: Sequence[Tensor], large: bool = False) -> None:
    """Fill one flat stretch of every candidate.

    Args:
        sources: The stretch of each checkpoint, in main memory or on the outputs' device.
        start: The stretch's first position in the flat vector.
        mixtures: B candidates.
        outs: B flat contiguous tensors of that length, on one device; they must not overlap the sources.
        large: Whether the stretch is part of a model large enough for compiled loops.
    """
    size, threads, device = sources.size, torch.get_num_threads(), outs[0].device
    kernel: Callable[[list[Tensor], int, list[Tensor]], None] = partial(_by_torch, mixtures)
    if device.type != "cpu":
        chunk, workers = DEVICE_SPAN, 1
    elif large and compiled.supports(sources.sample(), outs):
        chunk, workers, kernel = COMPILED_SPAN, threads, compiled.Batch(mixtures).mix
    elif large and len({source.dtype for source in sources.sample()}) > 1:  # as where 16 bits are widened for some
        chunk, workers, kernel = CHUNK, threads, partial(_in_cache, mixtures)
    elif large:
        chunk, workers = TORCH_SPAN * threads, 1  # torch splits each operation over its own threads
    else:
        chunk, workers, kernel = CHUNK, 1, partial(_in_cache, mixtures)

    def work(part: slice) -> None:
        kernel(sources[part].tensors(device), start + part.start, [out[part] for out in outs])

    over_threads(work, [slice(low, min(low + chunk, size)) for low in range(0, size, chunk)], workers)


def over_threads(work: Callable[[Part], None], parts: Sequence[Part], threads: int) -> None:
    """Call ``work`` on every part, spread over threads; the first exception is raised here."""
    if threads <= 1 or len(parts) < 2:
        for part in parts:
            work(part)
        return
    queue, lock = iter(parts), threading.Lock()

    def run(_: int) -> None:
        while True:
            with lock:
                part = next(queue, None)
            if part is None:
                return
            work(part)

    for _ in _pool(threads).map(run, range(threads)):
        pass


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="merging")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


class _Scratch(threading.local):
    """Buffers of one thread, reused from chunk to chunk."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def get(self, name: str, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        key = (name, dtype, device)
        if key not in self.buffers or self.buffers[key].numel() < size:
            self.buffers[key] = torch.empty(size, dtype=dtype, device=device)
        return self.buffers[key][:size]


_scratch = _Scratch()


def accumulator(sources: Sequence[Source]) -> torch.dtype:
    """The type that sums over the sources are taken in: float32, float64 where one of them is."""
    return torch.float64 if any(source.dtype == torch.float64 for source in sources) else torch.float32


def _stager(sources: Sequence[Tensor], device: torch.device) -> Callable[[int], Tensor]:
    """A function that gives source j in the accumulator's type on a device, converted at its first use."""
    kind = accumulator(sources)
    staged: dict[int, Tensor] = {}

    def stage(index: int) -> Tensor:
        if index not in staged:
            source = sources[index]
            if source.dtype == kind and source.device == device:
                staged[index] = source
            else:
                staged[index] = _scratch.get(f"source {index}", source.numel(), kind, device)
                staged[index].copy_(source)
        return staged[index]

    return stage


# -- numpy --------------------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")  # a bad candidate is a result
def _in_cache(mixtures: Sequence[Mixture], sources: Sequence[Tensor], start: int, outs: Sequence[Tensor]) -> None:
    size, kind, here = sources[0].numel(), accumulator(sources), outs[0].device
    stage = _stager(sources, here)
    term = _scratch.get("term", size, kind, here).numpy()
    for mixture, out in zip(mixtures, outs, strict=True):
        total = out if out.dtype == kind else _scratch.get("total", size, kind, here)
        part, edges = mixture.between(start, start + size)
        rows = (mixture.single if kind == torch.float32 else mixture.weights)[part]
        residual = None if mixture.residual is None else mixture.residual[start : start + size]
        _sum(lambda j: stage(j).numpy(), rows, edges[1:] - edges[:-1], total.numpy(), term, residual)
        if total is not out:
            out.copy_(total)


def _sum(
    source: Callable[[int], NDArray[Any]],
    rows: NDArray[Any],
    lengths: Integers,
    total: NDArray[Any],
    term: NDArray[Any],
    residual: NDArray[np.float32] | None,
) -> None:
    """Fill ``total`` with the weighted sum where segment s, of ``lengths[s]`` elements, has the weights ``rows[s]``."""
    absent = rows == 0
    used = np.flatnonzero(~absent.all(axis=0)).tolist()
    for number, j in enumerate(used):
        into = term if number else total
        if len(rows) == 1:
            np.multiply(source(j), rows[0, j], out=into)
        else:
            np.multiply(source(j), rows[:, j].repeat(lengths), out=into)
            if absent[:, j].any():  # -0.0 is what leaves every other number as it is
                np.copyto(into, -0.0, where=absent[:, j].repeat(lengths))
        if number:
            np.add(total, term, out=total)
    if residual is not None:
        if used:
            np.add(total, residual, out=total)
        else:
            np.copyto(total, residual)
    elif not used:
        total.fill(0.0)
    elif len(rows) > 1 and absent.all(axis=1).any():
        np.copyto(total, 0.0, where=absent.all(axis=1).repeat(lengths))


# -- torch: large models without numba, and other devices ---------------------------------------------------


def _by_torch(mixtures: Sequence[Mixture], sources: Sequence[Tensor], start: int, outs: Sequence[Tensor]) -> None:
    size, kind, device = sources[0].numel(), accumulator(sources), outs[0].device
    stage = _stager(sources, device)
    term = _scratch.get("term", size, kind, device)
    for mixture, out in zip(mixtures, outs, strict=True):
        total = out if out.dtype == kind else _scratch.get("total", size, kind, device)
        part, edges = mixture.between(start, start + size)
        rows = (mixture.single if kind == torch.float32 else mixture.weights)[part]
        for row, low, high in zip(rows.tolist(), edges[:-1].tolist(), edges[1:].tolist(), strict=True):
            zero = 0.0 if mixture.residual is None else -0.0
            _sum_terms([(stage(j)[low:high], w) for j, w in enumerate(row) if w], total[low:high], term[low:high], zero)
        if mixture.residual is not None:
            total.add_(torch.from_numpy(mixture.residual[start : start + size].copy()).to(device))
        if total is not out:
            out.copy_(total)


def _moved(sources: Sequence[Source], device: torch.device) -> list[Source]:
    """The sources in their own types on the device. Sources in main memory go through page-locked memory."""
    moved: list[Source] = []
    for index, source in enumerate(sources):
        if not isinstance(source, Tensor):
            moved.append(source if source.device == device else source.to(device))
        elif source.device != device:
            target = _scratch.get(f"moved {index}", source.numel(), source.dtype, device)
            held = source.pin_memory() if device.type == "cuda" and not source.is_pinned() else source
            moved.append(target.copy_(held, non_blocking=True))
        else:
            moved.append(source)
    return moved


def _sum_terms(terms: Sequence[tuple[Tensor, float]], total: Tensor, term: Tensor, zero: float) -> None:
    if not terms:
        total.fill_(zero)
        return
    torch.mul(terms[0][0], terms[0][1], out=total)
    for source, weight in terms[1:]:
        torch.mul(source, weight, out=term)
        total.add_(term)
