"""Rows of the journal: writing trials and evaluations into them, and reading them back."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ecotone.populations.arrays import numbers, packed_numbers
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.populations.parsing import json_object, json_value
from ecotone.populations.secrets import stripped
from ecotone.populations.trial import WISHES, Evaluation, Failure, Gathered, Trial, Wish

COLUMNS = "scores, shapes, per_example, failure, seconds, items, details, errors, statistics"
UNDECODABLE = (
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    zlib.error,
    InputError,
)
"""All that reading a damaged value may raise."""


@lru_cache(maxsize=8)
def _dense_text(size: int, sources: int) -> str:
    """The text that all genomes without a mixture share."""
    return Genome.dense(np.zeros(size), sources).to_json(residual=False)


def trial_row(trial: Trial, batch: int) -> tuple[Any, ...]:
    """The row of ``trials``."""
    genome = trial.genome
    text = _dense_text(genome.size, genome.sources) if genome.is_dense else genome.to_json(residual=False)
    parents, dense, wants = json.dumps(trial.parents), int(genome.residual is not None), wish_text(trial.wants)
    return trial.number, batch, text, genome.digest, parents, dense, wants, int(trial.scored)


def wish_text(wish: Wish) -> str:
    """A wish as the journal stores it. Equal wishes have equal texts."""
    return json.dumps({"sort": wish.sort, **wish.record()}, sort_keys=True)


@lru_cache(maxsize=64)
def wish_of(text: str) -> Wish:
    """The wish that ``text`` describes, without its sample."""
    record = json_object(text)
    return WISHES[record["sort"]].recorded(record)


def evaluation_row(evaluation: Evaluation, now: float) -> tuple[Any, ...]:
    """The row of ``evaluations`` without its number, with ``now`` as its time."""
    shapes, blobs = [], []
    for name, values in evaluation.per_example.items():
        kind, blob = _packed(np.asarray(values))
        shapes.append((name, kind, int(np.size(values)), len(blob)))
        blobs.append(blob)
    failure = evaluation.failure
    return (
        json.dumps({name: float(value) for name, value in evaluation.scores.items()}),
        _shapes_text(tuple(shapes)) if shapes else None,
        b"".join(blobs) if blobs else None,
        # Stripped once more: a worker's process does not know all secrets of this one.
        None if failure is None else json.dumps([failure.kind, stripped(failure.message), stripped(failure.details)]),
        float(evaluation.seconds) + 0.0,  # SQLite stores -0.0 as 0.0
        int(evaluation.items),
        json.dumps(dict(evaluation.details)) if evaluation.details else None,
        json.dumps(dict(evaluation.errors)) if evaluation.errors else None,
        now,
        None if evaluation.statistics is None else json.dumps(asdict(evaluation.statistics)),
    )


@lru_cache(maxsize=64)
def _shapes_text(shapes: tuple[tuple[str, str, int, int], ...]) -> str:
    return json.dumps(shapes)


@lru_cache(maxsize=64)
def _shapes(text: str) -> list[tuple[str, str, int, int]]:
    found = [(name, kind, size, length) for name, kind, size, length in _list(text)]
    for name, kind, size, length in found:
        _expect(type(name) is str and type(kind) is str, "names of objectives and types", text)
        _expect(type(size) is int and type(length) is int and min(size, length) >= 0, "sizes", text)
    return found


def sizes_of(shapes: str) -> dict[str, int]:
    """The number of examples by objective, of the column ``shapes``."""
    return {name: size for name, _, size, _ in _shapes(shapes)}


def evaluation_of(row: Sequence[Any]) -> Evaluation:
    """The evaluation in a row of ``COLUMNS``, without its gradient.

    Raises:
        One of ``UNDECODABLE``: A value is damaged.
    """
    scores, shapes, blob, failure, seconds, items, details, errors, statistics = row
    per_example, start = {}, 0
    for name, kind, size, length in _shapes(shapes) if shapes else ():
        per_example[name] = _unpacked(kind, size, blob[start : start + length])
        start += length
    _expect(start == len(blob or b""), f"{start} bytes of scores by example", len(blob or b""))
    _expect(type(seconds) is float and type(items) is int, "seconds and items", (seconds, items))
    return Evaluation(
        scores_of(scores) or {},
        per_example,
        failure_of(failure),
        seconds,
        items,
        _object(details) if details else {},
        errors=scores_of(errors) or {},
        statistics=statistics_of(statistics),
    )


def _packed(values: NDArray[Any]) -> tuple[str, bytes]:
    if values.dtype == np.bool_:
        return "bit", np.packbits(values).tobytes()
    kind = values.dtype.newbyteorder("<").str
    return kind, zlib.compress(values.astype(kind).tobytes(), 1)


def _unpacked(kind: str, size: int, blob: bytes) -> NDArray[Any]:
    if kind == "bit":
        _expect(len(blob) == (size + 7) // 8, f"{size} bits", f"{len(blob)} bytes")
        return np.unpackbits(np.frombuffer(blob, np.uint8), count=size).astype(np.bool_)
    values = packed_numbers(blob, kind, size)
    _expect(values.dtype.kind in "fiu", "a type of numbers", kind)
    return values


def gradient_of(segments: int, blob: bytes) -> NDArray[np.float64]:
    """The (S, K) gradient in a row of ``gradients``."""
    return numbers(blob, "<f8").astype(np.float64).reshape(segments, -1)


def scores_of(scores: str | None) -> dict[str, float] | None:
    """Scores by objective."""
    if scores is None:
        return None
    found = _object(scores)
    for value in found.values():
        _expect(type(value) is float or type(value) is int, "scores that are numbers", value)
    return found


def failure_of(text: str | None) -> Failure | None:
    """The failure, if there is one."""
    if text is None:
        return None
    kind, message, details = _list(text)
    _expect(all(type(one) is str for one in (kind, message, details)), "three texts of a failure", text)
    return Failure(kind, message, details)


@lru_cache(maxsize=256)
def parents_of(text: str) -> tuple[int, ...]:
    """The numbers of a trial's parents."""
    found = tuple(_list(text))
    _expect(all(type(one) is int for one in found), "numbers of parents", text)
    return found


def statistics_of(text: str | None) -> Gathered | None:
    """The place of statistics, if they were wanted."""
    return None if text is None else Gathered(**_object(text))


def _object(text: str) -> dict[str, Any]:
    return json_object(text, finite=False)


def _list(text: str) -> list[Any]:
    found = json_value(text)
    _expect(type(found) is list, "a JSON list", text)
    return list(found)


def _expect(true: bool, what: str, found: object) -> None:
    """Refuse a damaged value.

    Raises:
        ValueError: It is not ``true`` that it is ``what``.
    """
    if not true:
        raise ValueError(f"expected {what}, found {str(found)[:60]!r}")
