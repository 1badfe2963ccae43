"""Classification heads, held apart from the model that is merged.

A task is a head and data: the head is frozen, never merged, and may be shared by tasks. A recipe names a function that
returns it: a callable from (outputs, inputs) to (n, C) logits, where outputs are what the model returns for the n
examples of inputs. Whatever holds weights must be a ``torch.nn.Module``, which is put on the model's device::

    class Mean(nn.Module):
        def __init__(self, weight, bias):
            super().__init__()
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

        def forward(self, outputs, inputs):
            mask = inputs["attention_mask"][..., None]
            pooled = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1)
            return nn.functional.linear(pooled, self.weight, self.bias)

    def head(file):
        return Mean(**safetensors.torch.load_file(file))

Gradients must pass through it to the outputs: no ``detach``, no numpy. Heads compute in float32 (float64 for a float64
model), whatever the model's dtype: outputs are converted before.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ecotone.fitness.callables import call, resolve
from ecotone.fitness.data import Inputs, kind
from ecotone.populations.errors import InputError
from ecotone.settings import Call


class Head:
    """A frozen map from a model's outputs to logits.

    Args:
        function: Called as ``function(outputs, inputs)``.
        dtype: The type that floating-point outputs are converted to first.
    """

    def __init__(self, function: Callable[[Any, Inputs], Any], dtype: torch.dtype = torch.float32) -> None:
        self.function = function
        self._dtype = dtype

    def __call__(self, outputs: Any, inputs: Inputs) -> Any:
        """The logits that the function returns for ``outputs``."""
        return self.function(_converted(outputs, self._dtype), inputs)


_heads: WeakValueDictionary[tuple[Any, ...], Head] = WeakValueDictionary()


def build(spec: Call | None, field: str, device: torch.device, dtype: torch.dtype | None) -> Head | None:
    """The head of ``spec`` for a model on ``device`` in ``dtype``; None without a spec.

    The same function with the same arguments is called once, and its head shared, as long as somebody holds it.

    Raises:
        InputError: It cannot be called, or does not return a callable of (outputs, inputs).
    """
    if spec is None:
        return None
    precise = torch.promote_types(dtype or torch.float32, torch.float32)
    arguments = json.dumps(dict(spec.arguments), sort_keys=True, default=repr)
    key = (resolve(spec.call, field), arguments, device, precise)
    head = _heads.get(key)
    if head is None:
        head = _heads[key] = Head(_made(spec, field, device, precise), precise)
    return head


def _made(spec: Call, field: str, device: torch.device, dtype: torch.dtype) -> Callable[[Any, Inputs], Any]:
    made = call(spec, field)
    if not callable(made):
        raise InputError(
            f"{field}: expected {spec.call} to return a callable of (outputs, inputs), found {kind(made)}."
        )
    try:
        inspect.signature(made.forward if isinstance(made, nn.Module) else made).bind(None, None)
    except TypeError as error:
        raise InputError(
            f"{field}: expected {spec.call} to return a callable of (outputs, inputs), found {kind(made)} ({error}).",
            "Write a module whose forward(outputs, inputs) returns the logits.",
        ) from error
    return made.to(device, dtype).eval().requires_grad_(False) if isinstance(made, nn.Module) else made


def logits(model: Any, inputs: Inputs, head: Head | None = None) -> Tensor:
    """(n, C) logits of ``model`` for the n examples of ``inputs``, in float32 at least.

    Args:
        model: A torch module.
        inputs: The inputs it is called with.
        head: Makes the logits of its outputs; None takes the outputs themselves, or their ``logits``.

    Raises:
        InputError: ``model`` is no module, or there is not one row of logits an example.
    """
    return logits_of(outputs(model, inputs), inputs, head)


def outputs(model: Any, inputs: Inputs, **options: Any) -> Any:
    """The outputs of ``model`` for ``inputs`` and the keyword arguments ``options``.

    Raises:
        InputError: ``model`` is not a torch module.
    """
    if not isinstance(model, nn.Module):
        raise InputError("expected a torch module to score, found a dict of tensors.", "Name an architecture.")
    return model(**inputs, **options) if isinstance(inputs, Mapping) else model(inputs, **options)


def logits_of(outputs: Any, inputs: Inputs, head: Head | None = None, *, tokens: bool = False) -> Tensor:
    """(n, C) logits from a model's ``outputs`` for ``inputs``; with ``tokens`` also (n, L, C), a row for each token.

    Raises:
        InputError: There is not one row of logits an example.
    """
    logits = getattr(outputs, "logits", outputs) if head is None else head(outputs, inputs)
    rows = len(next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs)
    if not isinstance(logits, Tensor) or logits.ndim not in ((2, 3) if tokens else (2,)) or len(logits) != rows:
        raise _unfit(logits, rows, head)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _unfit(found: Any, rows: int, head: Head | None) -> InputError:
    what = "outputs" if head is None else "the head's logits"
    remedy = "Give the task a head that makes logits of the model's outputs." if head is None else ""
    return InputError(f"expected {what} of shape ({rows}, classes), one row an example, found {kind(found)}.", remedy)


def _converted(outputs: Any, dtype: torch.dtype) -> Any:
    """``outputs`` with their floating-point tensors in ``dtype``; containers of tensors keep their type."""
    if isinstance(outputs, Tensor):
        return outputs.to(dtype) if outputs.is_floating_point() else outputs
    if isinstance(outputs, Mapping):
        return type(outputs)(**{name: _converted(value, dtype) for name, value in outputs.items()})
    if isinstance(outputs, (tuple, list)):
        parts = [_converted(value, dtype) for value in outputs]
        return type(outputs)(*parts) if hasattr(outputs, "_fields") else type(outputs)(parts)
    return outputs
