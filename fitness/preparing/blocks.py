"""Data that stand before one of a model's blocks: advanced block by block, so that a block is run alone.

To merge L blocks in the order of depth, each block's inputs are wanted of a model that is merged up to it. Whole passes
up to every block would cost L(L + 1) / 2 blocks. Here the hidden states of all examples are kept, and each block is run
twice: with an expert's weights while it is observed, and with the merged ones to go on.

A model is run so if its blocks are members of one ``ModuleList``, called once each and in their order, each with the
hidden states of the one before it as first argument. Whether they are is found out on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ecotone.fitness.heads import outputs
from ecotone.fitness.statistics.kinds import Data
from ecotone.fitness.statistics.layers import mask_of

HIDDEN = "hidden_states"
"""The keyword under which transformers pass hidden states, where they are no first argument."""


@dataclass
class _Batch:
    """One batch before a block.

    Args:
        mask: Which tokens count.
        hidden: The hidden states.
        calls: By block, its other arguments and keywords.
    """

    mask: Tensor | None
    hidden: Tensor
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]


@dataclass
class Standing:
    """The data of one task before a block.

    Args:
        blocks: The blocks, in order.
        batches: The data.
        place: The number of the block that they stand before.
    """

    blocks: Sequence[nn.Module]
    batches: list[_Batch]
    place: int = 0

    def run(self, block: nn.Module, watched: Callable[[Tensor | None], AbstractContextManager[Any]]) -> list[Tensor]:
        """Run the block that the data stand before: what it makes of each batch.

        Args:
            block: The block, with the weights that it is to have.
            watched: Is entered around each pass, with the batch's mask.
        """
        made = []
        for batch in self.batches:
            given, named = batch.calls[self.place]
            with torch.no_grad(), watched(batch.mask):
                if HIDDEN in named:
                    found = block(*given, **{**named, HIDDEN: batch.hidden})
                else:
                    found = block(batch.hidden, *given, **named)
            made.append(_hidden(found))
        return made

    def advance(self, made: Sequence[Tensor]) -> None:
        """Go on with what the block made of each batch."""
        for batch, hidden in zip(self.batches, made, strict=True):
            batch.hidden = hidden
        self.place += 1


def before_blocks(model: nn.Module, names: Sequence[str], data: Data, batch: int) -> Standing | None:
    """The data before the first of some blocks; None where the model does not pass them on as is assumed.

    Args:
        model: The module, with the weights that lead up to the first block.
        names: The blocks, in order.
        data: The data.
        batch: Examples in a pass.
    """
    blocks = [model.get_submodule(name) for name in names]
    batches = []
    for inputs in data.examples.batches(batch):
        with _recorded(blocks) as calls, torch.no_grad():
            outputs(model, inputs)
        if not _in_turn(calls, blocks):
            return None
        others = [(given, named) for _, _, given, named, _ in calls]
        batches.append(_Batch(mask_of(inputs), calls[0][1], others))
        if len(batches) == 1 and not _again(Standing(blocks, batches), _hidden(calls[0][-1])):
            return None
    return Standing(blocks, batches)


def _again(standing: Standing, made: Tensor) -> bool:
    """Whether the first block makes the same again of what it was given: nothing in it remembers the first time."""
    try:
        (found,) = standing.run(standing.blocks[0], lambda _: nullcontext())
    except Exception:  # a block of whatever sort may raise whatever it likes; whole passes do without running it alone
        return False
    return isinstance(found, Tensor) and torch.equal(found, made)


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Decoders keep no keys and values of the tokens before, which a second run of a block would add to."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    changed = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """The calls of the blocks: number, hidden states, other arguments, keywords, outputs."""
    calls: list[Any] = []

    def seen(number: int, _module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], made: Any) -> None:
        hidden, rest = (given[0], given[1:]) if given else (named.get(HIDDEN), ())
        calls.append((number, hidden, rest, dict(named), made))

    handles = [
        block.register_forward_hook(partial(seen, number), with_kwargs=True) for number, block in enumerate(blocks)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _in_turn(calls: Sequence[Any], blocks: Sequence[nn.Module]) -> bool:
    """Whether each block was called once, in order, with what the one before it made."""
    if [number for number, *_ in calls] != list(range(len(blocks))):
        return False
    if not all(isinstance(hidden, Tensor) and isinstance(_hidden(made), Tensor) for _, hidden, _, _, made in calls):
        return False
    made = [_hidden(call[-1]) for call in calls[:-1]]
    return all(
        before is after[1] or (before.data_ptr() == after[1].data_ptr() and before.shape == after[1].shape)
        for before, after in zip(made, calls[1:], strict=True)
    )


def _hidden(made: Any) -> Any:
    return made[0] if isinstance(made, tuple | list) and made else made
