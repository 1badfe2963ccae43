"""How far a merge is from an expert on the same examples: in its logits, and in its hidden layers.

Expert Merging (Zhang et al. 2025, arXiv:2509.25712) takes, with logits z of the merge and z' of the expert,

    T^2 * mean -sum_c softmax(z'/T)_c ln softmax(z/T)_c  +  weight * mean over layers of the mean squared error

over examples, or over the tokens that the attention mask lets through: then logits may be (n, L, C), as of language
models. No labels are needed. A merge that is the expert has the entropy of the expert's predictions left (at T = 1).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ecotone.fitness import heads
from ecotone.fitness.data import MASK, Examples, Inputs, kind
from ecotone.fitness.gradients.calibration import Task, check_graph, diversity, order_of, parts_of
from ecotone.fitness.heads import Head
from ecotone.fitness.kinds import CalibrationSettings, ObjectiveContext
from ecotone.populations.errors import InputError, nearest

CACHE_BYTES = 256 * 2**20  # for what an expert says of a task's batches; one batch is always kept


class DistillationSettings(CalibrationSettings):
    """The distance of logits and hidden layers from an expert's (Expert Merging). It needs no labels.

    Attributes:
        loss: ``distillation``: the distance of logits and hidden layers from those of an expert; needs no labels.
        expert: The name of the expert that merges are compared with. None means the expert with the task's name.
        temperature: The number T that logits are divided by.
        hidden: The weight of the mean squared error of hidden layers; 0 leaves them out.
        layers: The hidden layers to compare: names of the architecture's modules, or positions in a Hugging Face
            model's ``hidden_states``. None means the last of these positions, or the outputs that the head takes.
    """

    loss: Literal["distillation"] = "distillation"
    expert: str | None = None
    temperature: float = Field(default=1.0, gt=0)
    hidden: float = Field(default=1.0, ge=0)
    layers: tuple[int | str, ...] | None = Field(default=None, min_length=1)

    needs_labels: ClassVar[bool] = False
    needs_expert: ClassVar[bool] = True

    def build(self, context: ObjectiveContext, seed: int) -> Distilled:
        """The task, its data and head on the device."""
        return Distilled(self, *parts_of(self, context), seed)


class Distilled(Task):
    """A stream of batches, and how far a merge is from an expert on each.

    Batches are cut once, evenly, and come in another order in each epoch: so what the expert says is found once a
    batch (``prepare``, before ``loss``), with the same module that shows merges, and kept in the CPU's memory.

    Args:
        wanted: The task's name, the most examples in a batch, from which expert, and how.
        examples: As for ``Task``; labels are not used.
        head: As for ``Task``. Without one the logits may also be (n, L, C), a row for each token.
        seed: The seed of batches and orders, at least 0.
        cache_bytes: Memory for what the expert says; the batches that were not used for longest are forgotten first.

    Raises:
        InputError: The seed is below 0.
    """

    def __init__(
        self,
        wanted: DistillationSettings,
        examples: Examples,
        head: Head | None = None,
        seed: int = 0,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        super().__init__(wanted.name, examples, "entropy", head, wanted.batch, seed)
        self._wanted = wanted
        self._expert = wanted.expert or wanted.name
        order = torch.from_numpy(order_of(seed, wanted.name, len(examples), 0))
        self._parts = order.tensor_split(-(-len(examples) // self._batch))
        self._turns = lru_cache(maxsize=2)(partial(order_of, seed, wanted.name, len(self._parts)))
        self._said: OrderedDict[int, Behaviour] = OrderedDict()
        self._cache_bytes = cache_bytes

    def batch(self, step: int) -> Examples:
        """The examples of batch ``step``, from 0."""
        return self._examples.rows(self._parts[self._part(step)])

    def fits(self, model: Any, experts: Sequence[str]) -> None:
        """Raise ``InputError`` unless the expert exists and the model has the layers."""
        if self._expert not in experts:
            raise InputError(
                f"{self._wanted.where}: expert: expected one of {', '.join(experts)}, found {self._expert!r}.",
                nearest(self._expert, list(experts)),
            )

        def run(inputs: Inputs) -> None:
            check(model, inputs, self._head, self._wanted)
            observe(model, inputs, self._head, self._wanted)

        self._try(run)

    def prepare(self, step: int, expert: Callable[[str], Any]) -> None:
        """Compute and keep the expert's outputs for batch ``step``. A batch that is kept needs no model."""
        part = self._part(step)
        if part not in self._said:
            with torch.no_grad():
                said = observe(expert(self._expert), self.batch(step).inputs, self._head, self._wanted)
            self._said[part] = said.to(torch.device("cpu"))
        self._said.move_to_end(part)
        while len(self._said) > 1 and sum(said.nbytes for said in self._said.values()) > self._cache_bytes:
            self._said.popitem(last=False)

    def loss(self, model: Any, step: int) -> tuple[Tensor, dict[str, float], int]:
        """The distance of ``model`` from the expert on batch ``step``, with its graph; details; number of examples.

        Details are ``diversity``, as in ``Task.loss``, and the two parts of the loss: ``soft_cross_entropy`` (with its
        factor T^2) and ``hidden``, the mean squared error without its weight.

        Raises:
            InputError: Logits or layers are not as this module says, or the loss does
                not depend on the model's parameters where they ask for gradients.
        """
        batch, wanted = self.batch(step), self._wanted
        observed = observe(model, batch.inputs, self._head, wanted)
        expert = self._said[self._part(step)].to(observed.logits.device)
        loss, soft, apart = distance(observed, expert, wanted.temperature, wanted.hidden)
        check_graph(loss, model)
        details = {"diversity": diversity(observed.logits.detach()), "soft_cross_entropy": float(soft.detach())}
        return loss, details | {"hidden": float(apart.detach())}, len(batch)

    def _part(self, step: int) -> int:
        return int(self._turns(step // len(self._parts))[step % len(self._parts)])


@dataclass(frozen=True, eq=False)
class Behaviour:
    """The outputs of a model for a batch: a row for each example, or for each token that is not masked.

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


def observe(model: Any, inputs: Inputs, head: Head | None, wanted: DistillationSettings) -> Behaviour:
    """The outputs of ``model`` for ``inputs``: its logits, and the hidden layers that are compared, if any.

    Raises:
        InputError: The model lacks a layer, or does not return one row of logits for each example or token.
    """
    layers = () if wanted.hidden == 0 else wanted.layers
    named = [layer for layer in layers or () if isinstance(layer, str)]
    states = gives_states(model, inputs) and len(named) < len(layers or (0,))
    with _watched(model, named) as seen:
        outputs = heads.outputs(model, inputs, **({"output_hidden_states": True} if states else {}))
    logits = _rows(heads.logits_of(outputs, inputs, head, tokens=True), inputs)
    if wanted.hidden == 0:
        return Behaviour(logits.reshape(-1, logits.shape[-1]))
    compared = [_last(outputs)] if layers is None else [_one(layer, outputs, seen) for layer in layers]
    hidden = tuple(_rows(layer, inputs) for layer in compared)
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


def check(model: Any, inputs: Inputs, head: Head | None, wanted: DistillationSettings) -> None:
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
    """A dict that collects the outputs of the named modules in the forward passes inside the ``with`` block."""
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
