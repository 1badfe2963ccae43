"""Metrics of a pool, which Ray exports to Prometheus."""

from __future__ import annotations

from typing import Any

from ecotone.fitness.ray.events import log
from ecotone.populations.trial import Evaluation

_BORDERS = [0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]  # seconds, of histograms


class Meters:
    """Evaluations, failures by kind, workers, utilisation, queue and seconds, as metrics of Ray.

    A search does not depend on them: where they cannot be made or sent, there are none.
    """

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def make(self) -> None:
        """Register them with Ray, which must be initialised."""
        try:
            from ray.util.metrics import Counter, Gauge, Histogram

            self._made = {
                "evaluations": Counter("ecotone_evaluations", "Candidates measured."),
                "failures": Counter("ecotone_failures", "Candidates without scores, by kind.", ("kind",)),
                "workers": Gauge("ecotone_workers", "Workers that are ready."),
                "utilisation": Gauge("ecotone_utilisation", "Share of the ready workers that have work."),
                "queue": Gauge("ecotone_queue", "Batches that wait for a worker."),
            } | {
                name: Histogram(f"ecotone_{name}", text, boundaries=_BORDERS)
                for name, text in (
                    ("evaluation_seconds", "Worker seconds a candidate."),
                    ("merge_seconds", "Of these, to form its weights."),
                    ("forward_seconds", "Of these, the rest: forward passes and scoring."),
                )
            }
        except Exception as error:
            log.debug("no metrics: %s", error)

    def count(self, evaluation: Evaluation) -> None:
        """Count one evaluation."""
        self._tell("evaluations", "inc")
        if evaluation.failure is not None:
            self._tell("failures", "inc", 1.0, {"kind": evaluation.failure.kind})
            return
        self._tell("evaluation_seconds", "observe", evaluation.seconds)
        merge = evaluation.details.get("merge_seconds")
        if isinstance(merge, float):
            self._tell("merge_seconds", "observe", merge)
            self._tell("forward_seconds", "observe", evaluation.seconds - merge)

    def state(self, workers: int, utilisation: float, queue: int) -> None:
        """Set the gauges: ready workers, the share of them that has work, and batches that wait."""
        self._tell("workers", "set", workers)
        self._tell("utilisation", "set", utilisation)
        self._tell("queue", "set", queue)

    def _tell(self, name: str, verb: str, *arguments: Any) -> None:
        if name not in self._made:
            return
        try:
            getattr(self._made[name], verb)(*arguments)
        except Exception as error:
            log.debug("metric %s: %s", name, error)
