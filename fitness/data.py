"""Examples that models are measured on, checked before the first candidate.

A recipe names a data function. It returns the inputs of N examples, or the pair (inputs, labels):

- inputs are a tensor or array (N, ...), with which a model is called as ``model(inputs)``; or a mapping of such, with
  which it is called as ``model(**inputs)``. Hugging Face models take mappings, and their tokenizers make them:
  ``tokenizer(texts, padding=True, return_tensors="pt")``;
- labels are N class numbers from 0.

Texts are padded on the right to one length, and their mapping has an ``attention_mask`` (N, L): then a batch keeps
only the columns that one of its examples needs. Floating-point inputs are converted to the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ecotone.fitness.callables import call
from ecotone.populations.errors import InputError
from ecotone.settings import Call

Inputs: TypeAlias = Tensor | Mapping[str, Tensor]
"""The inputs of a model for N examples: a tensor (N, ...), or tensors (N, ...) by name."""

MASK = "attention_mask"


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs of N examples and, where they have them, labels.

    Args:
        inputs: (N, ...), or (N, ...) by name.
        labels: (N,) class numbers from 0.
    """

    inputs: Inputs
    labels: Tensor | None = None

    def __len__(self) -> int:
        return len(self._first)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Examples:
        """On ``device``, and floating-point inputs in ``dtype`` (None: as they are)."""

        def moved(_: str, tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype if tensor.is_floating_point() else None).contiguous()

        return Examples(self._each(moved), None if self.labels is None else self.labels.to(device))

    def rows(self, numbers: Tensor) -> Examples:
        """The examples ``numbers`` (n,) without the columns that none of them needs."""
        index = numbers.to(self._first.device)
        columns = None if self._lengths is None else max(1, int(self._lengths[numbers].max()))

        def picked(name: str, tensor: Tensor) -> Tensor:
            return tensor[index, :columns] if self._has_columns(name, tensor) else tensor[index]

        return Examples(self._each(picked), None if self.labels is None else self.labels[index])

    def batches(self, size: int) -> Batches:
        """All examples, cut evenly into batches of at most ``size``; texts of like length come together."""
        count = -(-len(self) // size)
        if self._lengths is None:
            parts = zip(*(tensor.tensor_split(count) for tensor in self._tensors.values()), strict=True)
            named = isinstance(self.inputs, Mapping)
            return Batches([dict(zip(self._tensors, part, strict=True)) if named else part[0] for part in parts])
        order = torch.argsort(self._lengths, stable=True)
        inputs = [self.rows(numbers).inputs for numbers in order.tensor_split(count)]
        return Batches(inputs, torch.argsort(order).to(self._first.device))

    @property
    def _tensors(self) -> Mapping[str, Tensor]:
        return self.inputs if isinstance(self.inputs, Mapping) else {"": self.inputs}

    @property
    def _first(self) -> Tensor:
        return next(iter(self._tensors.values()))

    def _each(self, change: Callable[[str, Tensor], Tensor]) -> Inputs:
        changed = {name: change(name, tensor) for name, tensor in self._tensors.items()}
        return changed if isinstance(self.inputs, Mapping) else changed[""]

    @cached_property
    def _lengths(self) -> Tensor | None:
        """(N,) on the CPU: columns up to the last one that an example's mask (N, L) lets through; None without one."""
        mask = self._tensors.get(MASK)
        if mask is None or mask.ndim != 2 or mask.shape[1] == 0:
            return None
        return ((mask != 0).cpu() * torch.arange(1, mask.shape[1] + 1)).amax(1)

    def _has_columns(self, name: str, tensor: Tensor) -> bool:
        """Whether the second axis of ``tensor`` is the mask's; a decoder's inputs have columns of their own."""
        if self._lengths is None or name.startswith("decoder_"):
            return False
        return name == "inputs_embeds" or tensor.shape == self._tensors[MASK].shape


@dataclass(frozen=True, eq=False)
class Batches:
    """The inputs of N examples, one forward pass after the other.

    Args:
        inputs: Those of each pass.
        places: (N,) where example n comes in the passes, laid end to end; None: in its own place.
    """

    inputs: Sequence[Inputs]
    places: Tensor | None = None
    _versions: list[list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_versions", [*map(_versions, self.inputs)])

    def __iter__(self) -> Iterator[Inputs]:
        """The inputs of each pass.

        Raises:
            InputError: A pass wrote into them, so that later candidates would be scored on other data.
        """
        for inputs, known in zip(self.inputs, self._versions, strict=True):
            yield inputs
            if _versions(inputs) != known:
                raise InputError(
                    "the model's forward wrote into its inputs, which are the objective's own data.",
                    "Have it make new tensors: x = x + 1 in place of x += 1, or x = x.clone() first.",
                )

    def restored(self, values: Sequence[Tensor]) -> Tensor:
        """(N,) ``values`` of each pass in the order of the examples."""
        whole = values[0] if len(values) == 1 else torch.cat(tuple(values))
        return whole if self.places is None else whole[self.places]


def _versions(inputs: Inputs) -> list[int]:
    """How often each tensor was written into, as torch counts."""
    return [one._version for one in (inputs.values() if isinstance(inputs, Mapping) else [inputs])]


def load(spec: Call, field: str, labelled: bool) -> Examples:
    """The examples that the function of ``spec`` returns.

    Args:
        spec: The function and its arguments.
        field: The field in which the user wrote it, for error messages.
        labelled: Whether labels are needed. Where they are not, those that are returned are left out.

    Raises:
        InputError: It cannot be called, or does not return what this module's text says.
    """
    made = call(spec, field)
    pair = isinstance(made, (tuple, list)) and len(made) == 2
    if labelled and not pair:
        raise InputError(f"{field}: expected {spec.call} to return (inputs, labels), found {kind(made)}.")
    inputs = _inputs(made[0] if pair else made, f"{field}: inputs")
    examples = Examples(inputs, _tensor(made[1], f"{field}: labels") if labelled else None)
    check(examples, field)
    return examples


def check(examples: Examples, field: str) -> None:
    """Raise ``InputError`` unless there are N >= 1 inputs of finite numbers, and one label for each if any."""
    count = examples._first.shape[:1]
    for name, tensor in examples._tensors.items():
        _check_inputs(tensor, f"{field}: inputs" + (f": {name}" if name else ""), count)
    if examples.labels is not None:
        _check_labels(examples.labels, f"{field}: labels", count)


def _check_inputs(inputs: Tensor, field: str, count: torch.Size) -> None:
    if inputs.ndim < 1 or inputs.shape[0] == 0:
        raise InputError(f"{field}: expected shape (N, ...) with N >= 1, found {tuple(inputs.shape)}.")
    if inputs.shape[:1] != count:
        raise InputError(f"{field}: expected {count[0]} rows, as the first input has, found {inputs.shape[0]}.")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise InputError(f"{field}: expected finite numbers, found NaN or infinity.")


def _check_labels(labels: Tensor, field: str, count: torch.Size) -> None:
    if labels.shape != count:
        raise InputError(f"{field}: expected shape ({count[0]},), one an input, found {tuple(labels.shape)}.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InputError(f"{field}: expected integers, found {labels.dtype}.", "Convert them with .long().")
    if int(labels.min()) < 0:
        raise InputError(f"{field}: expected class numbers from 0, found {int(labels.min())}.")


def _inputs(values: Any, field: str) -> Inputs:
    if not isinstance(values, Mapping):
        return _tensor(values, field)
    if not values:
        raise InputError(f"{field}: expected tensors by name, found none.")
    if "labels" in values:
        raise InputError(
            f"{field}: expected no 'labels' among the model's inputs, found them.", "Return (inputs, labels)."
        )
    return {str(name): _tensor(value, f"{field}: {name}") for name, value in values.items()}


def _tensor(values: Any, field: str) -> Tensor:
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{field}: expected a tensor or an array, found {kind(values)} ({error}).") from error


def kind(value: Any) -> str:
    """The type of ``value`` for an error message, with its length or shape."""
    if isinstance(value, Tensor):
        return f"Tensor {tuple(value.shape)}"
    size = f" of {len(value)}" if isinstance(value, (tuple, list, dict)) else ""
    return f"{type(value).__name__}{size}"
