"""Colours of runs: MLflow draws from a few dozen by chance, so that two fronts in one chart may look the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

TAG = "mlflow.runColor"
PALETTE = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#bcbd22", "#7f7f7f"),
    *("#0b3c5d", "#9c4a00", "#0f5a0f", "#7a0f10", "#4b2a7b", "#0a5c66", "#d4a017", "#8b1a62", "#4d5b00", "#333333"),
)


def free_colour(used: Iterable[str]) -> str:
    """The first colour of the palette that is ``used`` least."""
    counts = Counter(used)
    return min(PALETTE, key=lambda colour: counts[colour])
