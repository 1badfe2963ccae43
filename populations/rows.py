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

from ecotone.populations.genome import Genome
from ecotone.populations.secrets import stripped
from ecotone.populations.trial import WISHES, Evaluation, Failure, Gathered, Trial, Wish

COLUMNS = "scores, shapes, per_example, failure, seconds, items, details, errors, statistics"


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
    record = json.loads(text)
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
        None if failure is None else json.dumps([failure.kind, stripped(failure.message), stripped(failure.details)]),
        float(evaluation.seconds),
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
    return [(name, kind, size, length) for name, kind, size, length in json.loads(text)]


def evaluation_of(row: Sequence[Any]) -> Evaluation:
    """The evaluation in a row of ``COLUMNS``, without its gradient."""
    scores, shapes, blob, failure, seconds, items, details, errors, statistics = row
    per_example, start = {}, 0
    for name, kind, size, length in _shapes(shapes) if shapes else ():
        per_example[name] = _unpacked(kind, size, blob[start : start + length])
        start += length
    return Evaluation(
        scores_of(scores) or {},
        per_example,
        failure_of(failure),
        seconds,
        items,
        json.loads(details) if details else {},
        errors=json.loads(errors) if errors else {},
        statistics=None if statistics is None else Gathered(**json.loads(statistics)),
    )


def _packed(values: NDArray[Any]) -> tuple[str, bytes]:
    if values.dtype == np.bool_:
        return "bit", np.packbits(values).tobytes()
    kind = values.dtype.newbyteorder("<").str
    return kind, zlib.compress(values.astype(kind).tobytes(), 1)


def _unpacked(kind: str, size: int, blob: bytes) -> NDArray[Any]:
    if kind == "bit":
        return np.unpackbits(np.frombuffer(blob, np.uint8), count=size).astype(np.bool_)
    return np.frombuffer(zlib.decompress(blob), kind)


def scores_of(scores: str | None) -> dict[str, float] | None:
    """Scores by objective."""
    return None if scores is None else json.loads(scores)


def failure_of(text: str | None) -> Failure | None:
    """The failure, if there is one."""
    return None if text is None else Failure(*json.loads(text))
