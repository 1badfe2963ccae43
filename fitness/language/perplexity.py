"""Bits per byte, likelihood and perplexity of texts: how well a language model predicts them.

A document's tokens x_1 ... x_n follow a start token x_0, which is not scored: the tokenizer's BOS, or else its EOS. So
every token is scored exactly once, and bytes are all of the text's. Without a start token x_1 is not scored, and its
bytes do not count.

A window is at most ``context`` tokens of input; each predicts the token after it. Windows begin every ``stride``
tokens, and all but a document's first score only what the one before did not. With the default, stride = context, they
do not overlap, and the first token that a window scores follows one token only; a smaller stride costs more and gives
each token at least ``context - stride`` tokens of context. Windows inside a document begin in the middle of its text,
without a start token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.language.likelihoods import Wanted, log_probabilities, wanted
from ecotone.fitness.language.texts import (
    TextSettings,
    batches,
    context_of,
    documents,
    encoded,
    padded,
    tokenizer_of,
)
from ecotone.fitness.protocol import Score
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Integers
from ecotone.populations.samples import error_of_mean
from ecotone.populations.trial import Goal

CONTEXT = 1024
Unit: TypeAlias = Literal["bits_per_byte", "likelihood", "perplexity"]


class ReadingSettings(TextSettings):
    """Base of the objectives for which a model reads texts (``ecotone.fitness.language.perplexity``).

    A record is a document. Where there is only one document, a record is one of its windows.

    Attributes:
        context: Tokens in a window that the model reads at once. None is 1024, or the model's own limit if that is
            less.
        stride: Tokens from the start of a window to the start of the next window. None is ``context``.
        field: The field of each line of a ``.jsonl`` file that holds the text.
    """

    context: int | None = Field(default=None, ge=2)
    stride: int | None = Field(default=None, ge=1)
    field: str = "text"

    limits: ClassVar[tuple[float, float] | None] = None

    def build(self, context: ObjectiveContext) -> Perplexity:
        """The objective, its texts tokenised once.

        Raises:
            InputError: A file cannot be used, or a setting does not fit the model.
        """
        where, folder = self.where, context.tokenizer_for(self.where)
        loaded = tokenizer_of(folder)
        window, stride = _window(self, context_of(folder, loaded), where)
        start = _start(loaded, self.bos, where)
        texts = documents(self.files, self.field, where)
        if len(texts) > 1:
            texts = [texts[number] for number in self.chosen(len(texts))]
            started = _started(encoded(loaded, texts), start)
            windows = [_Window(*cut, number) for number, ids in enumerate(started) for cut in _cut(ids, window, stride)]
            lost = _first_bytes(loaded, texts, where) if start is None else [0] * len(texts)
            bytes_each = [len(text.encode()) - less for text, less in zip(texts, lost, strict=True)]
        else:
            ends = _ends(loaded, texts[0], where)
            cuts = _cut(_started(encoded(loaded, texts), start)[0], window, stride)
            bounds = np.cumsum([0 if start is not None else 1, *(len(ids) - skipped for ids, _, skipped in cuts)])
            spans = np.diff(np.concatenate([[0], ends])[bounds])
            numbers: list[int] = self.chosen(len(cuts)).tolist() if cuts else []
            windows = [_Window(*cuts[number], place) for place, number in enumerate(numbers)]
            bytes_each = spans[numbers].tolist()
        if not windows:
            raise InputError(f"{where}: data: expected at least 2 tokens in a document, found fewer.")
        return _made(self.goal, self.unit, windows, bytes_each, self.batch, context.device)

    @property
    def unit(self) -> Unit:
        """The unit of the score, which has the same name as the type."""
        return cast(Unit, self.type)


class PerplexitySettings(ReadingSettings):
    """Bits per byte, or perplexity, of texts.

    Attributes:
        type: ``bits_per_byte`` or ``perplexity`` of texts under the model.
    """

    type: Literal["bits_per_byte", "perplexity"]
    direction: Literal["minimize"] = "minimize"


class LikelihoodSettings(ReadingSettings):
    """The geometric mean of a byte's probability: 2 to the minus bits per byte. M2N2 can share it out.

    Attributes:
        type: ``likelihood``: the geometric mean of the probability of each byte of the texts.
    """

    type: Literal["likelihood"]
    direction: Literal["maximize"] = "maximize"


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass over windows of like length.

    Args:
        ids: (n, L) tokens, padded on the right, where causal attention cannot see it.
        asked: The tokens that are scored.
    """

    ids: Tensor
    asked: Wanted


@dataclass(frozen=True, eq=False)
class Perplexity:
    """``bits_per_byte``: the sum of -log2 p over tokens, divided by the UTF-8 bytes that they stand for;
    ``likelihood``: the geometric mean of a byte's probability, 2 to the minus bits per byte, of which more is better;
    or ``perplexity``: exp of the mean of -ln p over tokens.

    Args:
        goal: Name and direction.
        unit: Bits per byte, perplexity or likelihood.
        passes: The windows.
        items: (T,) the document (or window) of each scored token, as the passes come.
        sizes: (N,) what each item's loss is divided by: bytes, or tokens.
        part: Makes the measure of some of the items.
    """

    goal: Goal
    unit: Unit
    passes: Sequence[Pass]
    items: NDArray[np.int64]
    sizes: NDArray[np.int64]
    part: Callable[[Integers], Perplexity]

    def score(self, model: Any) -> Score:
        """The measure over all tokens, and by document (by window where there is one document).

        Logits are normalised in float32, losses summed in float64. Logits with NaN make the score NaN.

        Raises:
            InputError: The model is no module, or gives no logits a token.
        """
        with torch.no_grad():
            logs = [
                log_probabilities(model, {"input_ids": part.ids, "use_cache": False}, part.asked)
                for part in self.passes
            ]
            losses = -torch.cat(logs).double().cpu().numpy()
        sums = np.bincount(self.items, losses, len(self.sizes))
        per_item = self._measure(sums / np.maximum(self.sizes, 1))
        return Score(float(self._measure(math.fsum(sums) / int(self.sizes.sum()))), per_item, per_item.size)

    @property
    def count(self) -> int:
        """Documents (windows where there is one document)."""
        return len(self.sizes)

    def subset(self, numbers: Integers) -> Perplexity:
        """The measure on the items ``numbers`` alone."""
        return self.part(numbers)

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The measure over all their tokens: a ratio of sums, whose error is that of its linear part (Cochran 1977,
        equation 6.10).
        """
        scale = {"bits_per_byte": math.log(2), "likelihood": -1.0, "perplexity": 1.0}[self.unit]
        sizes = self.sizes[numbers]
        with np.errstate(divide="ignore"):
            nats = scale * (each if self.unit == "bits_per_byte" else np.log(each))
        mean = math.fsum(nats * sizes) / int(sizes.sum())
        error = error_of_mean((nats - mean) * sizes / sizes.mean(), self.count)
        value = float(self._measure(mean))
        return value, error / math.log(2) if self.unit == "bits_per_byte" else error * value

    def _measure(self, nats: Any) -> Any:
        with np.errstate(over="ignore"):
            if self.unit == "bits_per_byte":
                return nats / math.log(2)
            return np.exp(nats if self.unit == "perplexity" else -nats)


@dataclass(frozen=True)
class _Window:
    """Input tokens, the tokens to predict, how many of the tokens to predict are not scored, and their item."""

    ids: Sequence[int]
    targets: Sequence[int]
    skipped: int
    item: int


def _cut(tokens: Sequence[int], context: int, stride: int) -> list[tuple[Sequence[int], Sequence[int], int]]:
    """Windows over a document's tokens: (inputs, targets, targets at the front that the window before scored)."""
    last, windows = len(tokens) - 1, []
    for begin in range(0, last, stride):
        end = min(begin + context, last)
        windows.append((tokens[begin:end], tokens[begin + 1 : end + 1], context - stride if begin else 0))
        if end == last:
            break
    return windows


def _made(
    goal: Goal,
    unit: Unit,
    windows: Sequence[_Window],
    bytes_each: Sequence[int],
    batch: int | None,
    device: torch.device,
) -> Perplexity:
    passes, items = [], list[int]()
    for numbers in batches([len(window.ids) for window in windows], batch, device):
        part = [windows[number] for number in numbers]
        ids = padded([window.ids for window in part], device)
        rows = [
            place * ids.shape[1] + column
            for place, window in enumerate(part)
            for column in range(window.skipped, len(window.ids))
        ]
        targets = [token for window in part for token in window.targets[window.skipped :]]
        items += [window.item for window in part for _ in range(len(window.ids) - window.skipped)]
        passes.append(Pass(ids, wanted(rows, targets, None, device)))
    placed = np.asarray(items, dtype=np.int64)
    sizes = np.bincount(placed, minlength=len(bytes_each)) if unit == "perplexity" else np.asarray(bytes_each)

    def some(numbers: Integers) -> Perplexity:
        place = {int(number): index for index, number in enumerate(numbers)}
        mine = [replace(window, item=place[window.item]) for window in windows if window.item in place]
        return _made(goal, unit, mine, [bytes_each[number] for number in numbers], batch, device)

    return Perplexity(goal, unit, passes, placed, sizes.astype(np.int64), some)


def _window(given: ReadingSettings, most: int | None, where: str) -> tuple[int, int]:
    context = given.context if given.context is not None else min(CONTEXT, most or CONTEXT)
    if most is not None and context > most:
        raise InputError(
            f"{where}: context: expected at most {most}, which is what the model can take, found {context}."
        )
    stride = given.stride if given.stride is not None else context
    if stride > context:
        raise InputError(f"{where}: stride: expected at most context ({context}), found {stride}.")
    return context, stride


def _start(tokenizer: Any, wanted: bool | None, where: str) -> int | None:
    """The start token, or None without one."""
    if wanted is False:
        return None
    known = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if wanted and not known:
        raise InputError(
            f"{where}: bos: expected a tokenizer with a BOS or EOS token, found neither.", "Set it to false."
        )
    return known[0] if known else None


def _started(tokens: Sequence[list[int]], start: int | None) -> list[list[int]]:
    return [ids if start is None else [start, *ids] for ids in tokens]


def _first_bytes(tokenizer: Any, texts: Sequence[str], where: str) -> list[int]:
    """UTF-8 bytes of each text's first token."""
    all_spans = _spans(tokenizer, texts, where)
    return [len(text[: spans[0][1]].encode()) if spans else 0 for text, spans in zip(texts, all_spans, strict=True)]


def _ends(tokenizer: Any, text: str, where: str) -> NDArray[np.int64]:
    """(n,) UTF-8 bytes of ``text`` up to the end of each token; up to the end of the text for the last."""
    bytes_before = np.cumsum([0, *(len(character.encode()) for character in text)])
    ends = bytes_before[[end for _, end in _spans(tokenizer, [text], where)[0]]]
    ends[-1:] = bytes_before[-1]
    return np.maximum.accumulate(ends)


def _spans(tokenizer: Any, texts: Sequence[str], where: str) -> list[list[tuple[int, int]]]:
    """The characters that each token of each text stands for: (first, end)."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{where}: expected a fast tokenizer (tokenizer.json), which knows the text of a token, found a slow one.",
            "Give several documents (.jsonl), and a start token.",
        )
    spans: list[list[tuple[int, int]]] = tokenizer(
        list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )["offset_mapping"]
    return spans
