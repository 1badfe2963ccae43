"""Data that stand before one of a model's blocks: advanced block by block, so that a block is run alone.

To merge L blocks in the order of depth, each block's inputs are wanted of a model that is merged up to it. Whole passes
up to every block would cost L(L + 1) / 2 blocks. Here the hidden states of all examples are kept, and each block is run
twice: with an expert's weights while it is observed, and with the merged ones to go on.

A model is run so if its blocks are members of one ``ModuleList``, called once each and in their order, each with the
hidden states of the one before it as first argument. Whether they are is found out on the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
TRIED = 2
"""Examples on which it is found out whether blocks can be run alone."""


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

    def passes(self, block: nn.Module, watched: Callable[[Masks], AbstractContextManager[Any]]) -> Iterator[Tensor]:
        """Run the block that the data stand before: what it makes of one batch after the other, as it is asked for.

        Args:
            block: The block, with the weights that it is to have.
            watched: Is entered around each pass, with the batch's masks.
        """
        for batch in self.batches:
            given, named = batch.calls[self.place]
            with torch.no_grad(), watched(batch.masks):
                if HIDDEN in named:
                    found = block(*given, **{**named, HIDDEN: batch.hidden})
                else:
                    found = block(batch.hidden, *given, **named)
            yield _hidden(found)

    def advance(self, made: Iterable[Tensor]) -> None:
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
    if not _passed_on(model, blocks, data):
        return None
    batches = []
    for inputs in data.examples.batches(batch):
        with _recorded(blocks) as record, torch.no_grad():
            outputs(model, inputs)
        if not record.in_turn(len(blocks)):
            return None
        assert record.hidden is not None
        batches.append(_Batch(mask_of(inputs), record.hidden, [(one.given, one.named) for one in record.calls]))
    return Standing(blocks, batches)


def _passed_on(model: nn.Module, blocks: Sequence[nn.Module], data: Data) -> bool:
    """Whether the model passes a few examples on as is assumed."""
    inputs = data.examples.rows(torch.arange(min(TRIED, len(data.examples)))).inputs
    with _recorded(blocks, whole=True) as record, torch.no_grad():
        outputs(model, inputs)
    if not record.in_turn(len(blocks)):
        return False
    assert record.hidden is not None
    first = _Batch(mask_of(inputs), record.hidden, [(one.given, one.named) for one in record.calls])
    return _again(Standing(blocks, [first]), record.calls) and _steady(model, blocks, inputs, record.calls)


def _again(standing: Standing, calls: Sequence[_Call]) -> bool:
    """Whether the blocks, run alone one after the other, make the same again: nothing in or between them remembers."""
    known = standing.batches[0].hidden
    try:
        for block, call in zip(standing.blocks, calls, strict=True):
            standing.advance(standing.passes(block, lambda _: nullcontext()))
            if call.made is None or not torch.equal(standing.batches[0].hidden, call.made):
                return False
        return True
    except Exception:  # a block of whatever sort may raise whatever it likes; whole passes do without running it alone
        return False
    finally:
        standing.batches[0].hidden = known


def _steady(model: nn.Module, blocks: Sequence[nn.Module], inputs: Any, calls: Sequence[_Call]) -> bool:
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
    return len(again.calls) == len(calls) and all(
        _same((before.given, before.named), (after.given, after.named))
        for before, after in zip(calls, again.calls, strict=True)
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


@dataclass
class _Call:
    """A call of a block.

    Args:
        number: The block's number.
        given: Its arguments but the hidden states.
        named: Its keywords; those hidden states are None.
        made: The hidden states that it made, where they are kept.
    """

    number: int
    given: tuple[Any, ...]
    named: dict[str, Any]
    made: Tensor | None = None


class _Record:
    """The calls of blocks in one pass. Of the hidden states it keeps the first and the latest, not those of all blocks.

    Args:
        whole: Whether what each block made is kept all the same.
    """

    def __init__(self, whole: bool) -> None:
        self.calls: list[_Call] = []
        self.hidden: Tensor | None = None
        self._whole, self._chained = whole, True
        self._latest: Tensor | None = None

    def begins(self, number: int, _module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """A block is called."""
        hidden, rest = (given[0], given[1:]) if given else (named.get(HIDDEN), ())
        if not isinstance(hidden, Tensor):
            self._chained = False
        elif self.hidden is None:
            self.hidden = hidden.clone()
        else:
            self._chained &= self._latest is not None and torch.equal(self._latest, hidden)
        others = {key: None if key == HIDDEN else value for key, value in named.items()}
        self.calls.append(_Call(number, rest, others))

    def ends(self, number: int, _module: nn.Module, _given: Any, made: Any) -> None:
        """A block has been called."""
        hidden = _hidden(made)
        self._chained &= isinstance(hidden, Tensor) and self.calls[-1].number == number
        self._latest = hidden.clone() if isinstance(hidden, Tensor) else None  # what comes after may write into it
        if self._whole:
            self.calls[-1].made = self._latest

    def in_turn(self, count: int) -> bool:
        """Whether each of so many blocks was called once, in order, with what the one before it made."""
        return self._chained and [call.number for call in self.calls] == list(range(count))


@contextmanager
def _recorded(blocks: Sequence[nn.Module], *, whole: bool = False) -> Iterator[_Record]:
    """The calls of the blocks in the pass that is made meanwhile."""
    record = _Record(whole)
    handles = [
        handle
        for number, block in enumerate(blocks)
        for handle in (
            block.register_forward_pre_hook(partial(record.begins, number), with_kwargs=True),
            block.register_forward_hook(partial(record.ends, number)),
        )
    ]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _hidden(made: Any) -> Any:
    return made[0] if isinstance(made, tuple | list) and made else made
