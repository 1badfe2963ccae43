"""Whether checkpoints can be merged, from their headers: the same names, shapes and types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merging.checkpoint import Checkpoint, TensorInfo
from merging.layout import Layout, natural
from populations.errors import CheckpointError

_REMEDY = "All models of a merge must be fine-tuned from one architecture and saved in the same way."


def check(checkpoints: Sequence[Checkpoint]) -> Layout:
    """Refuse checkpoints that do not fit together before a weight is read.

    Args:
        checkpoints: Two or more, the one the others are compared with first.

    Returns:
        The layout they share.

    Raises:
        CheckpointError: Two of them differ; the first difference in flat order is named.
    """
    first = checkpoints[0]
    layout = Layout.of(first)
    expected = {**layout.parameters, **layout.buffers}
    for other in checkpoints[1:]:
        theirs = Layout.of(other)
        _compare(first, expected, other, {**theirs.parameters, **theirs.buffers})
    return layout


def _compare(
    first: Checkpoint, expected: Mapping[str, TensorInfo], other: Checkpoint, found: Mapping[str, TensorInfo]
) -> None:
    for name in sorted({*expected, *found}, key=natural):
        if name not in found:
            raise _differ(
                f"tensor {name!r} is in {_label(first)} but not in {_label(other)}{_how_many(expected, found)}"
            )
        if name not in expected:
            raise _differ(
                f"tensor {name!r} is in {_label(other)} but not in {_label(first)}{_how_many(found, expected)}"
            )
        ours, theirs = expected[name], found[name]
        if ours.shape != theirs.shape:
            raise _differ(
                f"tensor {name!r} has shape {ours.shape} in {_label(first)} and {theirs.shape} in {_label(other)}"
            )
        if ours.dtype != theirs.dtype:
            raise _differ(
                f"tensor {name!r} is {ours.dtype} in {_label(first)} and {theirs.dtype} in {_label(other)}",
                f"Save one of them again as the other's type, for example model.to({ours.dtype}).",
            )


def _differ(message: str, remedy: str = _REMEDY) -> CheckpointError:
    return CheckpointError(f"The models differ: {message}.", remedy)


def _label(checkpoint: Checkpoint) -> str:
    return f"{checkpoint.name!r} ({checkpoint.path})"


def _how_many(more: Mapping[str, TensorInfo], less: Mapping[str, TensorInfo]) -> str:
    return f" (the first of {len(set(more) - set(less))} such)"
