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
from ecotone.fitness.statistics.layers import Masks, mask_of

HIDDEN = "hidden_states"
"""The keyword under which transformers pass hidden states, where they are no first argument."""


@dataclass
class _Batch:
    """One batch before a block.

    Args:
        masks: Which tokens count.
        hidden: The hidden states.
        calls: By block, its other arguments and keywords.
    """

    masks: Masks
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

    def run(self, block: nn.Module, watched: Callable[[Masks], AbstractContextManager[Any]]) -> list[Tensor]:
        """Run the block that the data stand before: what it makes of each batch.

        Args:
            block: The block, with the weights that it is to have.
            watched: Is entered around each pass, with the batch's masks.
        """
        made = []
        for batch in self.batches:
            given, named = batch.calls[self.place]
            with torch.no_grad(), watched(batch.masks):
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
        if len(batches) == 1 and not (
            _again(Standing(blocks, batches), calls) and _steady(model, blocks, inputs, calls)
        ):
            return None
    return Standing(blocks, batches)


def _again(standing: Standing, calls: Sequence[Any]) -> bool:
    """Whether the blocks, run alone one after the other, make the same again: nothing in or between them remembers."""
    known = standing.batches[0].hidden
    try:
        for place, block in enumerate(standing.blocks):
            if place + 1 < len(calls) and not torch.equal(standing.batches[0].hidden, calls[place][1]):
                return False
            standing.advance(standing.run(block, lambda _: nullcontext()))
        return torch.equal(standing.batches[0].hidden, _hidden(calls[-1][-1]))
    except Exception:  # a block of whatever sort may raise whatever it likes; whole passes do without running it alone
        return False
    finally:
        standing.batches[0].hidden = known


def _steady(model: nn.Module, blocks: Sequence[nn.Module], inputs: Any, calls: Sequence[Any]) -> bool:
    """Whether what the blocks get beside the hidden states stays the same when these change: nothing skips a block."""

    def changed(_module: nn.Module, _given: Any, made: Any) -> Any:
        other = _hidden(made) * 1.5 + 0.25
        return type(made)((other, *made[1:])) if isinstance(made, tuple | list) else other

    handle = blocks[0].register_forward_hook(changed)
    try:
        with _recorded(blocks) as again, torch.no_grad():
            outputs(model, inputs)
    except Exception:  # as above
        return False
    finally:
        handle.remove()
    return len(again) == len(calls) and all(
        _same(before[2:4], after[2:4]) for before, after in zip(calls, again, strict=True)
    )


def _same(one: Any, other: Any) -> bool:
    """Whether two structures hold the same tensors; hidden states that are given by keyword do not count."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and all(_same(one[key], other.get(key)) for key in one if key != HIDDEN)
    if isinstance(one, tuple | list):
        return isinstance(other, tuple | list) and all(map(_same, one, other))
    return True


def uncache(model: nn.Module) -> nn.Module:
    """Have decoders keep no keys and values of the tokens before, which a second run of a block would add to.

    It stays so: the module is one that only prepares.
    """
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False
    return model


@contextmanager
def _recorded(blocks: Sequence[nn.Module]) -> Iterator[list[Any]]:
    """The calls of the blocks: number, hidden states, other arguments, keywords, outputs."""
    calls: list[Any] = []

    def seen(number: int, _module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], made: Any) -> None:
        hidden, rest = (given[0], given[1:]) if given else (named.get(HIDDEN), ())
        made = _copied(made)  # what comes after may write into it
        calls.append((number, begun.pop(number, hidden), rest, dict(named), made))

    def begins(number: int, _module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        hidden = given[0] if given else named.get(HIDDEN)
        begun[number] = hidden.clone() if isinstance(hidden, Tensor) else hidden

    begun: dict[int, Any] = {}
    handles = [
        handle
        for number, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(partial(begins, number), with_kwargs=True),
            block.register_forward_hook(partial(seen, number), with_kwargs=True),
        )
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
    return all(torch.equal(before, after[1]) for before, after in zip(made, calls[1:], strict=True))


def _copied(made: Any) -> Any:
    """The outputs of a block with hidden states of their own."""
    if isinstance(made, Tensor):
        return made.clone()
    if isinstance(made, tuple | list) and made and isinstance(made[0], Tensor):
        return (made[0].clone(), *made[1:])
    return made


def _hidden(made: Any) -> Any:
    return made[0] if isinstance(made, tuple | list) and made else made
