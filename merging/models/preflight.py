"""Whether models can be merged, from their headers: the same names and shapes, and types that can be mixed.

Floating-point types other than float64 mix: sums are taken in float32, and merged tensors have the types of the first
model (the base) unless others are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from ecotone.merging.models import refused
from ecotone.merging.models.layout import Layout, natural, token_axis
from ecotone.merging.models.matching import NONE_APART, Apart
from ecotone.merging.models.model import Model, TensorInfo
from ecotone.populations.errors import CheckpointError

_REMEDY = "All models of a merge must be fine-tuned from one architecture and saved in the same way."


def check(checkpoints: Sequence[Model], apart: Apart = NONE_APART) -> Layout:
    """Refuse checkpoints that do not fit together before a weight is read.

    Args:
        checkpoints: Two or more, the one the others are compared with first.
        apart: Their tensors that are not merged; in these they may differ.

    Returns:
        The layout they share.

    Raises:
        CheckpointError: Two of them differ; the first difference in flat order is named.
    """
    first = checkpoints[0]
    layout = Layout.of(first, apart.kept, apart.dropped)
    expected = _compared(layout, apart)
    for other in checkpoints[1:]:
        with _explained(first, other):
            _compare(first, expected, other, _compared(Layout.of(other, {}, apart.dropped), apart))
    return layout


def _compared(layout: Layout, apart: Apart) -> dict[str, TensorInfo]:
    return {name: info for name, info in {**layout.parameters, **layout.buffers}.items() if name not in apart.kept}


@contextmanager
def _explained(first: Model, other: Model) -> Iterator[None]:
    """Add to an error the fields of two configurations that explain why tensors differ, if there are any."""
    try:
        yield
    except CheckpointError as error:
        ours, theirs = first.config or {}, other.config or {}
        families = ours.get("model_type"), theirs.get("model_type")
        if None not in families and families[0] != families[1]:
            raise CheckpointError(
                f"The models are of other families: model_type is {families[0]!r} in {_label(first)} and "
                f"{families[1]!r} in {_label(other)}.",
                f"Models of one merge must be of one family. ({error.message})",
            ) from error
        classes = ours.get("architectures"), theirs.get("architectures")
        if None not in classes and classes[0] != classes[1]:
            text = f"{error.message} Their architectures: {classes[0]} and {classes[1]}."
            raise CheckpointError(text, "Give models with the same head, or leave out the base.") from error
        if ours.get("num_hidden_layers") != theirs.get("num_hidden_layers"):
            both = ((first, ours), (other, theirs))
            counts = [f"{config.get('num_hidden_layers')} in {model.name!r}" for model, config in both]
            text = f"{error.message} Their num_hidden_layers: {', '.join(counts)}."
            raise CheckpointError(text, error.remedy) from error
        raise


def _compare(first: Model, expected: Mapping[str, TensorInfo], other: Model, found: Mapping[str, TensorInfo]) -> None:
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
        axis = None if ours.shape == theirs.shape else token_axis(name, (first, other))
        if axis is not None:
            raise _differ(
                f"{name!r} has {ours.shape[axis]} {'columns' if axis else 'rows'}, one a token, in {_label(first)} and "
                f"{theirs.shape[axis]} in {_label(other)}",
                "Choose with the option vocabulary: 'base' cuts all to the base's tokens, 'union' gives all as many as "
                "the largest has.",
            )
        if ours.shape != theirs.shape and (0,) in (ours.shape, theirs.shape):
            label = _label(first if ours.shape == (0,) else other)
            raise CheckpointError(f"{label}: {refused.ungathered(name, 1)}.", refused.GATHER)
        if ours.shape != theirs.shape:
            raise _differ(
                f"tensor {name!r} has shape {ours.shape} in {_label(first)} and {theirs.shape} in {_label(other)}"
            )
        if not _mixes(ours.dtype, theirs.dtype):
            raise _differ(
                f"tensor {name!r} is {ours.dtype} in {_label(first)} and {theirs.dtype} in {_label(other)}",
                f"Save one of them again as the other's type, for example model.to({ours.dtype}).",
            )


def _mixes(ours: torch.dtype, theirs: torch.dtype) -> bool:
    return ours == theirs or all(kind.is_floating_point and kind != torch.float64 for kind in (ours, theirs))


def _differ(message: str, remedy: str = _REMEDY) -> CheckpointError:
    return CheckpointError(f"The models differ: {message}.", remedy)


def _label(checkpoint: Model) -> str:
    return f"{checkpoint.name!r} ({checkpoint.path})"


def _how_many(more: Mapping[str, TensorInfo], less: Mapping[str, TensorInfo]) -> str:
    return f" (the first of {len(set(more) - set(less))} such)"
