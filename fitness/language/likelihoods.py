"""Log-probabilities that a causal language model gives to tokens, with logits made only where they are asked for.

A vocabulary of 150,000 makes logits the largest tensor by far. So the hidden states that matter are picked before the
model's output layer, which then sees one chunk of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ecotone.populations.errors import InputError

CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**28}
"""By kind of device, memory of one chunk of logits in float32."""

CACHE_BYTES = 2**19
"""Memory, for each thread of a CPU, of the logits in float32 normalised at once, which its cache should hold."""

USUAL = 1e-30, 1e30
"""Sums of exponentials between which no logit needs to be shifted for float32 to hold its exponential."""


@dataclass(frozen=True, eq=False)
class Wanted:
    """The tokens whose log-probabilities are wanted from one forward pass.

    Args:
        rows: (R,) positions whose logits are needed, in the (n, L) tokens laid end to end.
        targets: (T,) the tokens.
        of: (T,) by which of the rows each is predicted, ascending; None: T = R, each by its own.
        counts: (R + 1,) on the CPU: how many targets come before those of each row; None with ``of``.
    """

    rows: Tensor
    targets: Tensor
    of: Tensor | None = None
    counts: NDArray[np.int64] | None = None


def wanted(rows: list[int], targets: list[int], of: list[int] | None, device: torch.device) -> Wanted:
    """The same from lists, on ``device``."""
    made = [torch.tensor(values, dtype=torch.long, device=device) for values in (rows, targets)]
    if of is None:
        return Wanted(made[0], made[1])
    counts = np.searchsorted(np.asarray(of), np.arange(len(rows) + 1))
    return Wanted(made[0], made[1], torch.tensor(of, dtype=torch.long, device=device), counts)


def log_probabilities(model: Any, inputs: Mapping[str, Any], asked: Wanted) -> Tensor:
    """(T,) natural log-probabilities of the tokens asked for, in float32 at least.

    Args:
        model: A Hugging Face causal language model.
        inputs: The inputs it is called with; ``input_ids`` is (n, L).
        asked: Positions and tokens.

    Raises:
        InputError: ``model`` is no module, or gives no logits of shape (n, L, V).
    """
    logs, start = [], 0
    for logits in logits_at(model, inputs, asked.rows):
        end = start + len(logits)
        if asked.of is None or asked.counts is None:
            chosen = logits.gather(1, asked.targets[start:end, None])[:, 0]
            logs.append(_precise(chosen) - _normalisers(logits))
        else:
            here = slice(int(asked.counts[start]), int(asked.counts[end]))
            row = asked.of[here] - start
            logs.append(_precise(logits[row, asked.targets[here]]) - _normalisers(logits)[row])
        start = end
    return torch.cat(logs)


def logits_at(model: Any, inputs: Mapping[str, Any], rows: Tensor) -> Iterator[Tensor]:
    """Chunks (r, V) of the logits at ``rows``, in order, in the model's type.

    The model runs once on ``inputs``. Whatever it does to logits after its output layer (a scale, a soft cap) is done
    to each chunk, by running the rest of the model on one token beside it.

    Args:
        model: A Hugging Face causal language model.
        inputs: The inputs it is called with; ``input_ids`` is (n, L).
        rows: (R,) positions in the (n, L) tokens laid end to end.

    Raises:
        InputError: ``model`` is no module, or gives no logits of shape (n, L, V).
    """
    if not isinstance(model, nn.Module):
        raise InputError("expected a torch module to score, found a dict of tensors.", "Name an architecture.")
    layer = _output_layer(model)
    if layer is None:
        logits = _flat(_logits(model(**inputs)), inputs)[rows]
        yield from torch.split(logits, _chunk(logits.shape[1], rows.device))
        return
    size = _chunk(len(layer.weight), rows.device)
    first = _Output(layer, rows, size)
    logits = first.logits(model, inputs)
    if first.states is None:
        yield from torch.split(_flat(logits, inputs)[rows], size)
        return
    yield logits[0]
    one = {"input_ids": inputs["input_ids"][:1, :1], "use_cache": False}
    for states in torch.split(first.states, size)[1:]:
        logits = layer(states[None]) if first.last else _Output(layer, None, size, states).logits(model, one)
        yield logits[0]


def _output_layer(model: Any) -> Any:
    """The layer that makes logits of hidden states, where the model has one with a weight (V, H); or None."""
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return layer if isinstance(getattr(layer, "weight", None), Tensor) else None


class _Output:
    """One call of a model whose output layer gets other hidden states than the model's own.

    Args:
        layer: The output layer.
        rows: (R,) which of the model's states are kept; None for given ones.
        size: The number of kept rows that the layer gets.
        states: (R, H) states given to the layer.
    """

    def __init__(self, layer: nn.Module, rows: Tensor | None, size: int, states: Tensor | None = None) -> None:
        self.states = states
        self.last = False
        """Whether the layer's logits are the model's: nothing is done to them afterwards."""
        self._layer, self._rows, self._size = layer, rows, size
        self._made: Any = None

    def logits(self, model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
        """(1, r, V) logits of the states, or of all tokens if the model does not call the layer."""
        handles = [self._layer.register_forward_pre_hook(self._give), self._layer.register_forward_hook(self._note)]
        try:
            found = _logits(model(**inputs))
        finally:
            for handle in handles:
                handle.remove()
        self.last = found is self._made
        return found

    def _give(self, _: nn.Module, given: tuple[Any, ...]) -> tuple[Tensor]:
        if self._rows is not None:
            self.states = given[0].reshape(-1, given[0].shape[-1])[self._rows]
        assert self.states is not None
        return (self.states[None, : self._size],)

    def _note(self, _: nn.Module, given: tuple[Any, ...], made: Any) -> None:
        self._made = made


def _logits(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        kind = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"expected logits of shape (n, L, vocabulary), found {kind}.", "Score a causal language model with it."
        )
    return logits


def _flat(logits: Tensor, inputs: Mapping[str, Any]) -> Tensor:
    if logits.shape[:2] != inputs["input_ids"].shape:
        raise InputError(
            f"expected a row of logits for each of {tuple(inputs['input_ids'].shape)} tokens, "
            f"found {tuple(logits.shape)}."
        )
    return logits.reshape(-1, logits.shape[-1])


def _chunk(vocabulary: int, device: torch.device) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cuda"]) // (4 * vocabulary))


def _normalisers(logits: Tensor) -> Tensor:
    """(r,) logarithms of the sums of exponentials of (r, V) logits, in float32 at least."""
    if logits.is_cuda:
        return _precise(logits).logsumexp(-1)
    kind = torch.promote_types(logits.dtype, torch.float32)
    size = max(1, CACHE_BYTES * torch.get_num_threads() // (kind.itemsize * logits.shape[1]))
    room = torch.empty(size, logits.shape[1], dtype=kind)
    sums = torch.cat([room[: len(part)].copy_(part).exp_().sum(-1) for part in torch.split(logits, size)])
    found, rest = sums.log(), ~((sums > USUAL[0]) & (sums < USUAL[1]))  # NaN is neither
    if rest.any():
        found[rest] = _precise(logits[rest]).logsumexp(-1)
    return found


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
