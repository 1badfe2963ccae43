"""How far a merge is from an expert on the same examples: in its logits, and in its hidden layers.

Expert Merging (Zhang et al. 2025, arXiv:2509.25712) takes, with logits z of the merge and z' of the expert,

    T^2 * mean -sum_c softmax(z'/T)_c ln softmax(z/T)_c  +  weight * mean over layers of the mean squared error

over examples, or over the tokens that the attention mask lets through: then logits may be (n, L, C), as of language
models. No labels are needed. A merge that is the expert has the entropy of the expert's predictions left (at T = 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.fitness import heads
from ecotone.fitness.data import MASK, Inputs, kind
from ecotone.fitness.heads import Head
from ecotone.fitness.specs import Distillation
from ecotone.populations.errors import InputError, nearest


@dataclass(frozen=True, eq=False)
class Behaviour:
    """What a model makes of a batch: a row for each example, or for each token that is not masked.

    Args:
        logits: (m, C) in float32 at least.
        hidden: (m, d) of each selected layer, in the model's dtype.
    """

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()

    def to(self, device: torch.device) -> Behaviour:
        """On ``device``, without a graph."""
        return Behaviour(self.logits.detach().to(device), tuple(layer.detach().to(device) for layer in self.hidden))

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(tensor.nbytes for tensor in (self.logits, *self.hidden))


def observe(model: Any, inputs: Inputs, head: Head | None, wanted: Distillation) -> Behaviour:
    """What ``model`` makes of ``inputs``: its logits, and the hidden layers that are compared if any are.

    Raises:
        InputError: It has no such layer, or does not return a row of logits an example or token.
    """
    layers = () if wanted.hidden == 0 else wanted.layers
    named = [layer for layer in layers or () if isinstance(layer, str)]
    states = gives_states(model, inputs) and len(named) < len(layers or (0,))
    with _watched(model, named) as seen:
        outputs = heads.outputs(model, inputs, **({"output_hidden_states": True} if states else {}))
    logits = _rows(heads.logits_of(outputs, inputs, head, tokens=True), inputs)
    if wanted.hidden == 0:
        return Behaviour(logits.reshape(-1, logits.shape[-1]))
    found = [_last(outputs)] if layers is None else [_one(layer, outputs, seen) for layer in layers]
    hidden = tuple(_rows(layer, inputs) for layer in found)
    return Behaviour(logits.reshape(-1, logits.shape[-1]), tuple(rows.reshape(len(rows), -1) for rows in hidden))


def distance(merge: Behaviour, expert: Behaviour, temperature: float, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of ``merge`` against ``expert``, and its two parts: T^2 soft cross-entropy, mean squared error."""
    target = torch.softmax(expert.logits / temperature, -1)
    said = torch.log_softmax(merge.logits / temperature, -1).masked_fill(target == 0, 0.0)  # 0 ln 0 is 0
    soft = temperature**2 * -(target * said).sum(-1).mean()
    apart = torch.zeros_like(soft)
    if merge.hidden:
        pairs = zip(merge.hidden, expert.hidden, strict=True)
        apart = torch.stack([_squared(mine, theirs) for mine, theirs in pairs]).mean()
    return soft + weight * apart, soft, apart


def gives_states(model: Any, inputs: Inputs) -> bool:
    """Whether ``model`` returns its ``hidden_states`` when asked: a Hugging Face model, called with inputs by name."""
    return hasattr(model, "config") and isinstance(inputs, Mapping)


def check(model: Any, inputs: Inputs, head: Head | None, wanted: Distillation) -> None:
    """Raise ``InputError`` where it is plain from the model that its hidden layers cannot be compared as wanted."""
    if wanted.hidden == 0:
        return
    modules = dict(model.named_modules())
    unknown = [layer for layer in wanted.layers or () if isinstance(layer, str) and layer not in modules]
    if unknown:
        raise InputError(
            f"layers: the model has no module {unknown[0]!r}.", nearest(unknown[0], [*filter(None, modules)])
        )
    if gives_states(model, inputs):
        return
    remedy = "Name modules of the architecture in layers, or leave hidden layers out with hidden: 0."
    if wanted.layers is None and head is None:
        raise InputError("layers: the model's outputs are its logits, so they are no hidden layer.", remedy)
    positions = [layer for layer in wanted.layers or () if isinstance(layer, int)]
    if positions:
        raise InputError(f"layers: expected names of modules (no Hugging Face model), found {positions[0]}.", remedy)


@contextmanager
def _watched(model: Any, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the named modules return in the forward passes meanwhile."""
    seen: dict[str, Any] = {}
    modules = dict(model.named_modules()) if names else {}
    handles = [modules[name].register_forward_hook(partial(_note, seen, name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _note(seen: dict[str, Any], name: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
    seen[name] = output


def _last(outputs: Any) -> Tensor:
    """The last hidden state of a Hugging Face model; of others the outputs."""
    states = getattr(outputs, "hidden_states", None)
    return _tensor("outputs", states[-1] if states else outputs)


def _one(layer: int | str, outputs: Any, seen: Mapping[str, Any]) -> Tensor:
    if isinstance(layer, str):
        if layer not in seen:
            raise InputError(f"layers: the model did not use its module {layer!r}.", "Name another.")
        return _tensor(layer, seen[layer])
    states = getattr(outputs, "hidden_states", None) or ()
    if not -len(states) <= layer < len(states):
        raise InputError(f"layers: expected a position among {len(states)} hidden states, found {layer}.")
    return _tensor(str(layer), states[layer])


def _tensor(name: str, output: Any) -> Tensor:
    """The output of a layer: itself, or the first of several."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    if isinstance(output, Tensor) and output.is_floating_point() and output.ndim:
        return output
    raise InputError(
        f"layers: {name}: expected a tensor of real numbers, found {kind(output)}.",
        "Name modules of the architecture in layers, or leave hidden layers out with hidden: 0.",
    )


def _rows(tensor: Tensor, inputs: Inputs) -> Tensor:
    """(m, ...) the rows of tokens that the mask lets through, where ``tensor`` has tokens; else itself."""
    named = inputs if isinstance(inputs, Mapping) else {}
    decoder = any(name.startswith("decoder_") for name in named)  # whose outputs these are then
    mask = named.get(f"decoder_{MASK}" if decoder else MASK)
    if mask is None or tensor.ndim < 3 or tensor.shape[:2] != mask.shape:
        return tensor
    return tensor[mask != 0]


def _squared(mine: Tensor, theirs: Tensor) -> Tensor:
    precise = torch.promote_types(mine.dtype, torch.float32)
    return nn.functional.mse_loss(mine.to(precise), theirs.to(precise))
