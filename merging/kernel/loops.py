# mypy: ignore-errors
# ruff: noqa: ARG001
"""Loops that numba compiles; imported only by ``ecotone.merging.kernel.compiled``.

Stretches of memory are passed as addresses, so that any number of sources and candidates have one compiled form.
bfloat16 is a uint16 here. numba knows no annotations, so mypy is not asked.
Compiled code is kept in numba's cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

BLOCK = 16_384  # elements formed at a time; a few blocks fit in a core's own cache
SHORT = 4_096  # elements whose task vectors are held in float32 at a time
ROWS = 4  # rows of lanes for which the base and the gradient stay in the nearest cache
LINE = 64  # bytes of a cache line
_LOW = np.uint32(0x7FFF)
_ONE = np.uint32(1)
_HALF = np.uint32(16)
_NAN = np.uint16(0x7FC0)


def _jit(function: Callable[..., Any], cache: bool = False) -> Any:
    return njit(nogil=True, error_model="numpy", cache=cache)(function)


@intrinsic
def _pointer(_context: Any, _address: Any) -> Any:
    """A pointer from an address."""
    return types.voidptr(types.intp), lambda _c, builder, _s, args: builder.inttoptr(args[0], cgutils.voidptr_t)


@intrinsic
def _as_float(_context: Any, _bits: Any) -> Any:
    """The float32 of 32 bits."""
    return types.float32(types.uint32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.FloatType())


@intrinsic
def _as_bits(_context: Any, _value: Any) -> Any:
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda _c, builder, _s, args: builder.bitcast(args[0], ir.IntType(32))


@intrinsic
def _stream(_context: Any, _target: Any, _source: Any) -> Any:
    """Copy one cache line past the caches; ``target`` must be a multiple of 64."""

    def generate(_c: Any, builder: Any, _s: Any, args: Any) -> Any:
        line = ir.VectorType(ir.IntType(64), 8).as_pointer()
        value = builder.load(builder.inttoptr(args[1], line), align=1)
        store = builder.store(value, builder.inttoptr(args[0], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return ir.Constant(ir.IntType(64), 0)

    return types.int64(types.intp, types.intp), generate


def _wide(value):
    """A float32 from a float32 or from a bfloat16 (uint16)."""
    raise NotImplementedError("compiled only")


@overload(_wide)
def _wide_compiled(value):
    if value == types.uint16:
        return lambda value: _as_float(np.uint32(np.uint32(value) << _HALF))
    return lambda value: value


def _store(out, index, value):
    """Write a float32 as the type of ``out``, rounding to nearest even."""
    raise NotImplementedError("compiled only")


@overload(_store)
def _store_compiled(out, index, value):
    def narrow(out, index, value):
        bits = _as_bits(value)
        rounded = np.uint16((bits + _LOW + ((bits >> _HALF) & _ONE)) >> _HALF)
        out[index] = rounded if value == value else _NAN  # NaN differs from itself

    def same(out, index, value):
        out[index] = value

    return narrow if out.dtype == types.uint16 else same


@_jit
def _set1(out, a, u):
    for i in range(len(out)):
        _store(out, i, u * _wide(a[i]))


@_jit
def _set2(out, a, u, b, v):
    for i in range(len(out)):
        _store(out, i, u * _wide(a[i]) + v * _wide(b[i]))


@_jit
def _set3(out, a, u, b, v, c, w):
    for i in range(len(out)):
        _store(out, i, u * _wide(a[i]) + v * _wide(b[i]) + w * _wide(c[i]))


@_jit
def _set4(out, a, u, b, v, c, w, d, x):
    for i in range(len(out)):
        _store(out, i, u * _wide(a[i]) + v * _wide(b[i]) + w * _wide(c[i]) + x * _wide(d[i]))


@_jit
def _end1(out, total, a, u):
    for i in range(len(out)):
        _store(out, i, total[i] + u * _wide(a[i]))


@_jit
def _end2(out, total, a, u, b, v):
    for i in range(len(out)):
        _store(out, i, total[i] + u * _wide(a[i]) + v * _wide(b[i]))


@_jit
def _end3(out, total, a, u, b, v, c, w):
    for i in range(len(out)):
        _store(out, i, total[i] + u * _wide(a[i]) + v * _wide(b[i]) + w * _wide(c[i]))


@_jit
def _end4(out, total, a, u, b, v, c, w, d, x):
    for i in range(len(out)):
        _store(out, i, total[i] + u * _wide(a[i]) + v * _wide(b[i]) + w * _wide(c[i]) + x * _wide(d[i]))


@_jit
def _more1(total, a, u):
    for i in range(len(total)):
        total[i] = total[i] + u * _wide(a[i])


@_jit
def _more4(total, a, u, b, v, c, w, d, x):
    for i in range(len(total)):
        total[i] = total[i] + u * _wide(a[i]) + v * _wide(b[i]) + w * _wide(c[i]) + x * _wide(d[i])


@_jit
def _blend(out, total, sources, kind, offset, weights, terms, residual):
    """One candidate in one stretch of one segment. ``terms`` and ``total`` are scratch, ``offset`` is in bytes."""
    n = len(out)
    count = 0
    for j in range(len(weights)):
        if weights[j] != 0:
            terms[count] = j
            count += 1
    if residual != 0:
        if count == 0:
            total[:] = np.float32(-0.0)  # -0.0 + r is r for every r
        for t in range(count):
            a, u = carray(_pointer(sources[terms[t]] + offset), (n,), kind), weights[terms[t]]
            if t == 0:
                _set1(total, a, u)
            else:
                _more1(total, a, u)
        _end1(out, total, carray(_pointer(residual), (n,), np.float32), np.float32(1.0))
        return
    if count == 0:
        for i in range(n):
            _store(out, i, np.float32(0.0))
        return
    done = 0
    while True:
        i, j, k, m = terms[done], terms[done + 1], terms[done + 2], terms[done + 3]
        left = count - done
        # Addresses are formed for the terms that exist only; the others repeat the first.
        a, u = carray(_pointer(sources[i] + offset), (n,), kind), weights[i]
        j = j if left > 1 else i
        b, v = carray(_pointer(sources[j] + offset), (n,), kind), weights[j]
        k = k if left > 2 else i
        c, w = carray(_pointer(sources[k] + offset), (n,), kind), weights[k]
        m = m if left > 3 else i
        d, x = carray(_pointer(sources[m] + offset), (n,), kind), weights[m]
        if left > 4:
            if done == 0:
                _set4(total, a, u, b, v, c, w, d, x)
            else:
                _more4(total, a, u, b, v, c, w, d, x)
            done += 4
            continue
        if done == 0:
            if left == 1:
                _set1(out, a, u)
            elif left == 2:
                _set2(out, a, u, b, v)
            elif left == 3:
                _set3(out, a, u, b, v, c, w)
            else:
                _set4(out, a, u, b, v, c, w, d, x)
        elif left == 1:
            _end1(out, total, a, u)
        elif left == 2:
            _end2(out, total, a, u, b, v)
        elif left == 3:
            _end3(out, total, a, u, b, v, c, w)
        else:
            _end4(out, total, a, u, b, v, c, w, d, x)
        return


def _mix(sources, outs, kind, width, start, size, edges, first, weights, residuals):
    """Fill one flat stretch of every candidate.

    Args:
        sources: (J,) addresses of the stretch in each checkpoint.
        outs: (B,) addresses of the stretch in each candidate.
        kind: Their type, float32 or uint16 (bfloat16).
        width: Bytes of an element.
        start: The stretch's first position in the flat vector.
        size: Its length.
        edges: Segment borders of all candidates, one after the other.
        first: (B+1,) where each candidate's borders begin.
        weights: (sum of S_b, J) float32 weights of all candidates' segments.
        residuals: (B,) addresses of the candidates' residuals at position 0 of the flat vector, 0 for none.
    """
    total = np.empty(BLOCK, np.float32)
    formed = np.empty(BLOCK, kind)
    terms = np.zeros(len(sources) + 4, np.int64)
    segment = np.empty(len(outs), np.int64)
    for b in range(len(outs)):
        own = edges[first[b] : first[b + 1]]
        segment[b] = first[b] + np.searchsorted(own, start, side="right") - 1
    for low in range(0, size, BLOCK):
        high = min(low + BLOCK, size)
        for b in range(len(outs)):
            target, nbytes = outs[b] + width * low, width * (high - low)
            past = target % LINE == 0 and nbytes % LINE == 0
            at = low
            while at < high:
                edge = edges[segment[b] + 1] - start
                end = min(edge, high)
                # Whole lines go past the caches, as in a large copy: an ordinary store reads the line first.
                place = formed.ctypes.data + width * (at - low) if past else outs[b] + width * at
                out = carray(_pointer(place), (end - at,), kind)
                residual = residuals[b] + 4 * (start + at) if residuals[b] != 0 else 0
                row = weights[segment[b] - b]
                _blend(out, total[: end - at], sources, kind, width * at, row, terms, residual)
                at = end
                if at == edge:
                    segment[b] += 1
            if past:
                for offset in range(0, nbytes, LINE):
                    _stream(target + offset, formed.ctypes.data + offset)


@_jit
def _trim_and_add(vector, total, magnitude, expert, base, threshold):
    for i in range(len(expert)):
        value = _wide(expert[i]) - _wide(base[i])
        vector[i] = value
        kept = np.float32(0.0) if abs(value) < threshold else value
        total[i] += kept
        magnitude[i] += abs(kept)


@_jit
def _select(out, vector, signs, expert, base, threshold):
    for i in range(len(out)):
        out[i] = base[i] if vector[i] * signs[i] < threshold else expert[i]


@_jit
def _distilled(terms):
    """The leading part of the exact sum of ``terms``; see ``ecotone.merging.operators.ties_vectors``."""
    for _ in range(len(terms)):
        for low in range(len(terms) - 1):
            a, b = terms[low + 1], terms[low]
            total = a + b
            part = total - a
            terms[low + 1] = total
            terms[low] = (a - (total - part)) + (b - part)
    return terms[-1]


def _choose(stored, outs, kind, width, size, thresholds, majority, doubt):
    """Trim task vectors and elect signs, as ``ecotone.merging.operators.ties_vectors`` does.

    Args:
        stored: (K+1,) addresses of a stretch of the base and of every expert.
        outs: (K,) addresses of what is mixed in place of the experts.
        kind: Their type, float32 or uint16 (bfloat16).
        width: Bytes of an element.
        size: Length of the stretch.
        thresholds: (K,) float32 magnitudes below which entries are trimmed.
        majority: The sign of positions that sum to zero, float32.
        doubt: Share of the sum of magnitudes, float32, within which the sign of a sum is found without rounding.
    """
    experts = len(outs)
    vectors = np.empty((experts, SHORT), np.float32)
    total, magnitude = np.empty(SHORT, np.float32), np.empty(SHORT, np.float32)
    terms = np.empty(experts, np.float32)
    for low in range(0, size, SHORT):
        n = min(SHORT, size - low)
        base = carray(_pointer(stored[0] + width * low), (n,), kind)
        total[:n] = 0.0
        magnitude[:n] = 0.0
        for k in range(experts):
            expert = carray(_pointer(stored[k + 1] + width * low), (n,), kind)
            _trim_and_add(vectors[k], total, magnitude, expert, base, thresholds[k])
        if experts > 2:
            for i in range(n):
                if magnitude[i] > 0 and abs(total[i]) <= magnitude[i] * doubt:
                    for k in range(experts):
                        value = vectors[k, i]
                        terms[k] = np.float32(0.0) if abs(value) < thresholds[k] else value
                    total[i] = _distilled(terms)
        for i in range(n):
            value = total[i]
            total[i] = np.float32(1.0) if value > 0 else (np.float32(-1.0) if value < 0 else majority)
        for k in range(experts):
            expert = carray(_pointer(stored[k + 1] + width * low), (n,), kind)
            out = carray(_pointer(outs[k] + width * low), (n,), kind)
            _select(out, vectors[k], total, expert, base, thresholds[k])


@_jit
def _add_products(lanes, a, g):
    for i in range(len(a)):
        lanes[i] = lanes[i] + _wide(a[i]) * _wide(g[i])


@_jit
def _add_differences(lanes, a, b, g):
    for i in range(len(a)):
        lanes[i] = lanes[i] + (_wide(a[i]) - _wide(b[i])) * _wide(g[i])


@_jit
def _any(g):
    found = False
    for i in range(len(g)):
        found |= _wide(g[i]) != 0
    return found


def _products(sources, gradient, kind, kind_of_gradient, width, width_of_gradient, size, plus, minus, lanes):
    """Inner products of a gradient with K directions over one stretch, as partial sums.

    Sources are not read where the gradient is zero, as an embedding's is for all words that a batch has not.

    Args:
        sources: (J,) addresses of the stretch in each checkpoint.
        gradient: The gradient's address.
        kind: Type of the sources, float32 or uint16 (bfloat16).
        kind_of_gradient: The gradient's, one of the same two.
        width: Bytes of an element of the sources.
        width_of_gradient: Bytes of an element of the gradient.
        size: Length of the stretch.
        plus: (K,) the source that each direction is.
        minus: (K,) the source that is subtracted from it, -1 for none.
        lanes: (K, L) float32; the product at position i is added to lane i modulo L.
    """
    step = lanes.shape[1]
    live = np.zeros(ROWS, np.bool_)
    for low in range(0, size, ROWS * step):
        high = min(low + ROWS * step, size)
        for at in range(low, high, step):
            n = min(step, size - at)
            live[(at - low) // step] = _any(carray(_pointer(gradient + width_of_gradient * at), (n,), kind_of_gradient))
        for k in range(len(plus)):
            for at in range(low, high, step):
                if not live[(at - low) // step]:
                    continue
                n = min(step, size - at)
                a = carray(_pointer(sources[plus[k]] + width * at), (n,), kind)
                g = carray(_pointer(gradient + width_of_gradient * at), (n,), kind_of_gradient)
                if minus[k] < 0:
                    _add_products(lanes[k], a, g)
                else:
                    _add_differences(lanes[k], a, carray(_pointer(sources[minus[k]] + width * at), (n,), kind), g)


@_jit
def _more2(total, a, u, b, v):
    for i in range(len(total)):
        total[i] = total[i] + u * a[i] + v * b[i]


def _add_product(out, left, right, start):
    """Add a stretch of the flattened product ``left @ right``, summed over the ranks in their order.

    Args:
        out: (N,) float32 or float64.
        left: (R, r) of that type.
        right: (r, C) of that type.
        start: Position of the stretch in the flattened (R, C) matrix.
    """
    rank, columns = right.shape
    sums = np.empty(SHORT, out.dtype)
    at = 0
    while at < len(out):
        row, column = (start + at) // columns, (start + at) % columns
        n = min(SHORT, columns - column, len(out) - at)
        total, last = sums[:n], column + n
        total[:] = -0.0  # what leaves every other number as it is
        for k in range(0, rank - 1, 2):
            _more2(total, right[k, column:last], left[row, k], right[k + 1, column:last], left[row, k + 1])
        if rank % 2:
            _more1(total, right[rank - 1, column:last], left[row, rank - 1])
        for i in range(n):
            out[at + i] = out[at + i] + total[i]
        at += n


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return _jit(function, cache=True)
    except RuntimeError:  # no directory to keep compiled code in
        return _jit(function)


mix: Any = _compiled(_mix)
products: Any = _compiled(_products)
add_product: Any = _compiled(_add_product)
choose: Any = _compiled(_choose)
