"""Multiple-choice accuracy: the choice that a language model finds likeliest after its question.

The likelihood of a choice is the product of its tokens' probabilities after the question's. As in lm-eval, a question
and a choice are tokenised together, and the choice's tokens are those beyond the tokens of the question alone; white
space at the question's end is the choice's.

Choices share their question. Computed plainly, it is read once for each choice. With reuse, one row of tokens holds a
question and then all its choices: a choice's tokens attend to the question and to each other, not to other choices, and
their positions go on from the question's. What all questions begin with (a few-shot prompt) is read once, and its
keys and values are kept for all. The likelihoods are the same but for rounding.

Not every architecture can do this: it takes one that follows a 4-D attention mask, positions and a cache. This is
found out with the first model that is scored: if the largest question's likelihoods are not those computed plainly,
all is computed plainly, with a warning. A model settles it only if its likelihoods would be off with choices that
see each other: one that says the same whatever it reads leaves it to the next.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.language.likelihoods import Wanted, log_probabilities, wanted
from ecotone.fitness.language.texts import (
    Record,
    TextSettings,
    batches,
    begins_with_bos,
    context_of,
    encoded,
    filled,
    padded,
    records,
    tokenizer_of,
)
from ecotone.fitness.protocol import Score, pooled_mean
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Integers
from ecotone.populations.trial import Goal

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
HALF_TOLERANCE = 0.25
"""Largest difference of a token's log-probability, in nats, by the model's type; the second for 16-bit types."""

TELLING = 4
"""How many times further off the likelihoods of choices that see each other must be, for a model to settle it."""

KEPT_BYTES = 2**24
"""Bytes of the attention masks that an objective keeps. Further masks are made again for each model."""

SHARED = 16  # tokens that all questions begin with, from which on their keys and values are kept


class MultipleChoiceSettings(TextSettings):
    """The share of questions whose right choice is the likeliest (``ecotone.fitness.language.choices``).

    Attributes:
        type: ``multiple_choice``: the share of questions whose right choice the model finds likeliest.
        template: The text of a question. ``{name}`` stands for the field ``name`` of the record.
        choices: The field of a record that holds the choices, a list of texts.
        answer: The field of a record that holds the number of the right choice, from 0.
        delimiter: The text between a question and a choice.
        normalise: The number that the log-likelihood of a choice is divided by: ``none`` (1), its UTF-8 ``bytes``, or
            its ``tokens``.
        shots: Solved questions put before each question: the first records of ``examples``.
        examples: The file of solved questions. None takes the first records of ``data``, which are then not scored.
        separator: The text between solved questions.
        reuse: Read each question once for all its choices: the same scores in less time.
    """

    type: Literal["multiple_choice"]
    direction: Literal["maximize"] = "maximize"
    template: str = "Question: {question}\nAnswer:"
    choices: str = "choices"
    answer: str = "answer"
    delimiter: str = " "
    normalise: Literal["none", "bytes", "tokens"] = "none"
    shots: int = Field(default=0, ge=0)
    examples: str | None = None
    separator: str = "\n\n"
    reuse: bool = True

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)
    paths: ClassVar[tuple[str, ...]] = ("data", "examples")

    def build(self, context: ObjectiveContext) -> MultipleChoice:
        """The objective, its questions tokenised once.

        Raises:
            InputError: A record cannot be used, or a question does not fit the model's context.
        """
        folder, where = context.tokenizer_for(self.where), self.where
        loaded = tokenizer_of(folder)
        found = [_asked(record, self, f"{where}: {place}") for place, record in records(self.files, where)]
        examples = found
        if self.examples is None:
            found = found[self.shots :]
        else:
            solved = records([Path(self.examples)], where)
            examples = [_asked(record, self, f"{where}: {place}") for place, record in solved]
        if len(examples) < self.shots:
            raise InputError(f"{where}: shots: expected at most {len(examples)}, found {self.shots}.")
        front = "".join(
            f"{shot.question}{self.delimiter}{shot.choices[shot.answer]}{self.separator}"
            for shot in examples[: self.shots]
        )
        asked = [found[number] for number in self.chosen(len(found))]
        questions = _questions(asked, front, self, loaded)
        _check_lengths(asked, questions, context_of(folder, loaded))
        return MultipleChoice(self.goal, questions, context.device, self.batch, self.reuse)


@dataclass(frozen=True)
class Question:
    """The tokens of a question and of its choices, and the number of the right choice.

    Args:
        tokens: At least one.
        choices: At least one token each.
        answer: From 0.
        sizes: The number that each choice's log-likelihood is divided by.
    """

    tokens: Sequence[int]
    choices: Sequence[Sequence[int]]
    answer: int
    sizes: Sequence[int]


@dataclass(frozen=True, eq=False)
class Pass:
    """One forward pass.

    Args:
        ids: (n, L) tokens, padded on the right, where causal attention cannot see it.
        asked: The choices' tokens.
        items: (T,) the choice of each of these tokens; choices are counted through all questions.
        parts: (n, L) whose each token is: 0 the question's, c the c-th choice's, -1 padding's; None where each row is
            one text.
        positions: (n, L) places of the tokens in their own text; None where each row is one text.
    """

    ids: Tensor
    asked: Wanted
    items: NDArray[np.int64]
    parts: Tensor | None = None
    positions: Tensor | None = None

    @property
    def unmasked(self) -> Pass:
        """The same with each row read as one text: choices see each other."""
        return Pass(self.ids, self.asked, self.items)


@dataclass(frozen=True, eq=False)
class Passes:
    """Forward passes over questions.

    Args:
        each: The passes.
        count: C, choices of all questions.
        shared: (1, S) tokens before each of their rows; None without.
    """

    each: Sequence[Pass]
    count: int
    shared: Tensor | None = None
    _masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def likelihoods(self, model: Any) -> NDArray[np.float64]:
        """(C,) natural log-likelihoods of the choices."""
        before = None if self.shared is None else _keys_and_values(model, self.shared)
        logs = []
        for number, part in enumerate(self.each):
            inputs: dict[str, Any] = {"input_ids": part.ids, "use_cache": before is not None}
            if before is not None:
                inputs["past_key_values"] = _cache(before, len(part.ids))
            if part.parts is not None:
                inputs["attention_mask"] = self._mask(number, part.parts, _dtype(model))
                inputs["position_ids"] = part.positions
            logs.append(log_probabilities(model, inputs, part.asked))
        tokens = torch.cat(logs).double().cpu().numpy()
        sums = np.zeros(self.count)
        np.add.at(sums, np.concatenate([part.items for part in self.each]), tokens)
        return sums

    def _mask(self, number: int, parts: Tensor, dtype: torch.dtype) -> Tensor:
        """That of a pass, which is the same for all models."""
        if (number, dtype) in self._masks:
            return self._masks[number, dtype]
        made = _mask(parts, 0 if self.shared is None else self.shared.shape[1], dtype)
        if sum(mask.nbytes for mask in self._masks.values()) + made.nbytes <= KEPT_BYTES:
            self._masks[number, dtype] = made
        return made


class MultipleChoice:
    """Share of questions whose likeliest choice is the right one; the first of equals.

    Args:
        goal: Name and direction.
        questions: The questions.
        device: The device of the model.
        batch: Rows of tokens in one forward pass; None chooses.
        reuse: Whether a question is read once for all its choices.
    """

    def __init__(
        self,
        goal: Goal,
        questions: Sequence[Question],
        device: torch.device,
        batch: int | None = None,
        reuse: bool = True,
    ) -> None:
        self.goal = goal
        self.reuse: bool | None = None if reuse else False
        """Whether questions are read once for all their choices; None until a model has been scored."""
        self._questions, self._batch, self._device = questions, batch, device
        counts = [len(question.choices) for question in questions]
        self._rows = np.repeat(np.arange(len(counts)), counts)
        self._columns = np.concatenate([np.arange(count) for count in counts])
        self._sizes = np.concatenate([question.sizes for question in questions])
        self._answers = np.asarray([question.answer for question in questions])

    def score(self, model: Any) -> Score:
        """Accuracy, with one bool a question. Logits with NaN make the score NaN.

        Raises:
            InputError: The model is no module, or gives no logits a token.
        """
        logs = self.likelihoods(model)
        table = np.full((len(self._answers), self._columns.max() + 1), -np.inf)
        table[self._rows, self._columns] = logs / self._sizes
        right = table.argmax(1) == self._answers
        value = float("nan") if np.isnan(logs).any() else int(np.count_nonzero(right)) / right.size
        return Score(value, right, right.size)

    @property
    def count(self) -> int:
        """Questions."""
        return len(self._questions)

    def subset(self, numbers: Integers) -> MultipleChoice:
        """The share of right answers to the questions ``numbers`` alone."""
        questions = [self._questions[number] for number in numbers]
        return MultipleChoice(self.goal, questions, self._device, self._batch, self.reuse is not False)

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The share that is right."""
        return pooled_mean(each, self.count)

    def likelihoods(self, model: Any) -> NDArray[np.float64]:
        """(C,) natural log-likelihoods of all choices, one question's after the other's."""
        with torch.no_grad():
            if self.reuse is None:
                self.reuse = self._can_reuse(model)
            return (self._plain if self.reuse is False else self._packed).likelihoods(model)

    @cached_property
    def _packed(self) -> Passes:
        return packed(self._questions, self._batch, self._device)

    @cached_property
    def _plain(self) -> Passes:
        return plain(self._questions, self._batch, self._device)

    @cached_property
    def _trial(self) -> tuple[Passes, Passes, NDArray[np.float64]]:
        """The largest question, packed and plain, and how many tokens each of its choices has."""
        largest = max(self._questions, key=lambda question: len(question.tokens) + sum(map(len, question.choices)))
        shared = 0 if self._packed.shared is None else self._packed.shared.shape[1]
        tokens = np.asarray([len(choice) for choice in largest.choices], dtype=np.float64)
        return packed([largest], 1, self._device, shared), plain([largest], self._batch, self._device), tokens

    def _can_reuse(self, model: Any) -> bool | None:
        """Whether reuse gives this model's likelihoods; None where the model ignores its input."""
        trial, simple, tokens = self._trial
        expected = simple.likelihoods(model)
        if not np.isfinite(expected).all():
            return None
        tolerance = tokens * TOLERANCE.get(_dtype(model), HALF_TOLERANCE)
        try:
            found = trial.likelihoods(model)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:
            if "can't allocate memory" in str(error):
                raise
            return self._cannot(model, f"{type(error).__name__}: {error}")
        apart = abs(found - expected)
        if not (apart <= tolerance).all():
            return self._cannot(model, f"log-likelihoods differ by {apart.max():.2g} from those computed plainly")
        if trial.each[0].parts is None:
            return True
        unmasked = Passes([trial.each[0].unmasked], trial.count, trial.shared).likelihoods(model)
        return True if abs(unmasked - expected).max() > TELLING * apart.max() else None

    def _cannot(self, model: Any, why: str) -> bool:
        warnings.warn(
            f"objective {self.goal.name!r}: {type(model).__name__} cannot read a question once for all its choices "
            f"({why}); each choice is computed with its question.",
            stacklevel=2,
        )
        return False


def plain(questions: Sequence[Question], batch: int | None, device: torch.device) -> Passes:
    """Passes with a row for each choice, which begins with its question."""
    rows, count = [], 0
    for question in questions:
        rows += [_Row(question.tokens, [choice], count + number) for number, choice in enumerate(question.choices)]
        count += len(question.choices)
    return Passes(_passes(rows, batch, device, 0), count)


def packed(questions: Sequence[Question], batch: int | None, device: torch.device, shared: int | None = None) -> Passes:
    """Passes with one row for each question: the tokens of the question, then the tokens of all its choices.

    Args:
        questions: The questions.
        batch: Rows in one forward pass; None chooses.
        device: The device of the model.
        shared: Tokens at the front of all questions to read only once; None: as many as they have in common.
    """
    if shared is None:
        common = _in_common([question.tokens for question in questions])
        shared = common if common >= SHARED and len(questions) > 1 else 0
    rows, count = [], 0
    for question in questions:
        rows.append(_Row(question.tokens[shared:], question.choices, count))
        count += len(question.choices)
    before = torch.tensor([questions[0].tokens[:shared]], dtype=torch.long, device=device) if shared else None
    return Passes(_passes(rows, batch, device, shared), count, before)


def _in_common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with, leaving each one at least."""
    shortest = min(map(len, sequences)) - 1
    different = (place for place in range(shortest) if len({tokens[place] for tokens in sequences}) > 1)
    return next(different, shortest)


@dataclass(frozen=True)
class _Row:
    """A question (or the rest of it), some choices, and the number of the first choice among all choices."""

    question: Sequence[int]
    choices: Sequence[Sequence[int]]
    first: int

    @property
    def tokens(self) -> list[int]:
        """The row: a choice's last token predicts nothing that is asked for, and is left out."""
        return [*self.question, *(token for choice in self.choices for token in choice[:-1])]

    @property
    def parts(self) -> list[int]:
        return [0] * len(self.question) + [n for n, choice in enumerate(self.choices, 1) for _ in choice[:-1]]

    @property
    def positions(self) -> list[int]:
        start = len(self.question)
        return [*range(start), *(start + place for choice in self.choices for place in range(len(choice) - 1))]

    @property
    def targets(self) -> list[tuple[int, int, int]]:
        """(row of logits, token, choice): all first tokens by the question's last, then each by the one before."""
        firsts = [(0, choice[0], self.first + number) for number, choice in enumerate(self.choices)]
        rest = [(token, self.first + number) for number, choice in enumerate(self.choices) for token in choice[1:]]
        return firsts + [(row, token, choice) for row, (token, choice) in enumerate(rest, 1)]


def _passes(rows: Sequence[_Row], batch: int | None, device: torch.device, shared: int) -> list[Pass]:
    lengths = [len(row.tokens) + shared // 2 for row in rows]  # cached tokens take memory, and little time
    return [_pass([rows[number] for number in part], device, shared) for part in batches(lengths, batch, device)]


def _pass(rows: Sequence[_Row], device: torch.device, shared: int) -> Pass:
    ids = padded([row.tokens for row in rows], device)
    width = ids.shape[1]
    logits, tokens, of, items = list[int](), list[int](), list[int](), list[int]()
    for place, row in enumerate(rows):
        begin = place * width + len(row.question) - 1
        for number, token, choice in row.targets:
            of.append(len(logits) + number)
            tokens.append(token)
            items.append(choice)
        logits += range(begin, place * width + len(row.tokens))
    asked, placed = wanted(logits, tokens, of, device), np.asarray(items, dtype=np.int64)
    if all(max(row.parts) < 2 for row in rows):
        return Pass(ids, asked, placed)
    parts = torch.full(ids.shape, -1, dtype=torch.long)
    positions = torch.full(ids.shape, shared, dtype=torch.long)
    for place, row in enumerate(rows):
        parts[place, : len(row.parts)] = torch.tensor(row.parts)
        positions[place, : len(row.parts)] += torch.tensor(row.positions)
    return Pass(ids, asked, placed, parts.to(device), positions.to(device))


def _mask(parts: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """(n, 1, L, S + L) the mask added to attention: 0 for a token's own text up to itself, else the least number."""
    n, length = parts.shape
    seen = (parts[:, None, :] == 0) | (parts[:, None, :] == parts[:, :, None])
    seen &= torch.ones(length, length, dtype=torch.bool, device=parts.device).tril()
    mask = torch.zeros(n, 1, length, shared + length, dtype=dtype, device=parts.device)
    mask[:, 0, :, shared:].masked_fill_(~seen, torch.finfo(dtype).min)
    return mask


def _keys_and_values(model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each layer's keys and values (1, heads, S, size) of tokens (1, S)."""
    from transformers import DynamicCache

    cache = DynamicCache()
    last = wanted([tokens.shape[1] - 1], [0], None, tokens.device)
    log_probabilities(model, {"input_ids": tokens, "past_key_values": cache, "use_cache": True}, last)
    layers = [(layer[0], layer[1]) for layer in cache]
    if not layers:
        raise RuntimeError("it keeps no keys and values")
    return layers


def _cache(before: Sequence[tuple[Tensor, Tensor]], rows: int) -> Any:
    """A cache that holds them for so many rows."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(before):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
    return cache


def _dtype(model: Any) -> torch.dtype:
    if not isinstance(model, nn.Module):
        raise InputError("expected a torch module to score, found a dict of tensors.", "Name an architecture.")
    return next(model.parameters()).dtype


# -- questions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Asked:
    """A question in words; ``where`` it stands."""

    question: str
    choices: Sequence[str]
    answer: int
    where: str


def _asked(record: Record, given: MultipleChoiceSettings, where: str) -> _Asked:
    for name in (given.choices, given.answer):
        if name not in record:
            raise InputError(f"{where}: expected a field {name!r}, found none.", nearest(name, list(record)))
    choices, answer = record[given.choices], record[given.answer]
    if not isinstance(choices, list) or not choices or not all(isinstance(text, str) and text for text in choices):
        raise InputError(f"{where}: {given.choices}: expected a list of texts, found {choices!r}.")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"{where}: {given.answer}: expected the number of a choice, 0 to {len(choices) - 1}, found {answer!r}."
        )
    return _Asked(filled(given.template, record, where), choices, answer, where)


def _questions(asked: Sequence[_Asked], front: str, given: MultipleChoiceSettings, tokenizer: Any) -> list[Question]:
    texts = [front + item.question for item in asked]
    cut = [text.rstrip() for text in texts]
    wholes = [
        text + given.delimiter + choice for text, item in zip(texts, asked, strict=True) for choice in item.choices
    ]
    starts, ends = encoded(tokenizer, cut), iter(encoded(tokenizer, wholes))
    begin = _begin(tokenizer, given.bos, given.where)
    made = []
    for item, tokens in zip(asked, starts, strict=True):
        choices = [next(ends)[len(tokens) :] for _ in item.choices]
        if not all(choices):
            raise InputError(f"{item.where}: expected choices with tokens of their own, found one without.")
        sizes = {
            "none": [1] * len(choices),
            "bytes": [len(choice.encode()) for choice in item.choices],
            "tokens": [len(choice) for choice in choices],
        }[given.normalise]
        made.append(Question([*begin, *tokens] or _fallback(tokenizer, item.where), choices, item.answer, sizes))
    return made


def _begin(tokenizer: Any, bos: bool | None, where: str) -> list[int]:
    if not (begins_with_bos(tokenizer) if bos is None else bos):
        return []
    if tokenizer.bos_token_id is None:
        raise InputError(f"{where}: bos: expected a tokenizer with a BOS token, found none.", "Leave it out.")
    return [tokenizer.bos_token_id]


def _fallback(tokenizer: Any, where: str) -> list[int]:
    """The start or end token, which stands before the choices of an empty question."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise InputError(f"{where}: expected a question with tokens, found none.", "Put a word into the template.")


def _check_lengths(asked: Sequence[_Asked], questions: Sequence[Question], most: int | None) -> None:
    for item, question in zip(asked, questions, strict=True):
        length = len(question.tokens) + max(map(len, question.choices)) - 1
        if most is not None and length > most:
            raise InputError(
                f"{item.where}: expected at most {most} tokens, which is what the model can take, found {length}.",
                "Leave the question out, or take fewer shots.",
            )
