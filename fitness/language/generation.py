"""Greedy generation from prompts: how many tokens a language model writes, and whether it ends with the right answer.

A model writes until its EOS, until its text holds a stop string, or until ``most`` tokens. The tokens counted include
the one that ends it, so a model that stops at once writes 1. EOS tokens are the tokenizer's and those of the model's
generation configuration; nothing else of that configuration is used.

Prompts of like length are padded on the left and continued together; those that have ended leave the batch. In exact
arithmetic that is what each gets alone; rounding may decide a tie otherwise, most often in 16-bit types.

Objectives with the same prompts and settings can share what a model writes: within ``same_model`` each batch of
prompts is continued once. Outside of it nothing is kept, because a model's weights may change from call to call.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ecotone.fitness.kinds import ObjectiveContext, ObjectiveSettings
from ecotone.fitness.language.likelihoods import logits_at
from ecotone.fitness.language.texts import (
    Record,
    TextSettings,
    batches,
    begins_with_bos,
    context_of,
    encoded,
    filled,
    mean,
    padded,
    records,
    tokenizer_of,
)
from ecotone.fitness.protocol import Objective, Score, pooled_mean
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Integers
from ecotone.populations.trial import Goal

ROWS = {"cpu": 32, "cuda": 256}
"""By kind of device, prompts continued together where the recipe names no batch."""


class GenerationSettings(TextSettings):
    """Base of the objectives for which the model writes texts greedily (``ecotone.fitness.language.generation``).

    Objectives with the same prompts and settings are scored on the same text, which is written once.

    Attributes:
        template: The text of a prompt. ``{name}`` stands for the field ``name`` of the record.
        chat: Put the prompt into the tokenizer's chat template, as a message of the user.
        most: The most tokens that the model writes for a prompt.
        stop: Texts that end an answer.
        batch: Prompts that are continued together. None lets Ecotone choose.
        bos: Put the start token first. None puts it where the tokenizer puts it itself. A chat template puts its own.
    """

    template: str = "{prompt}"
    chat: bool = False
    most: int = Field(default=256, ge=1)
    stop: str | tuple[str, ...] = ()

    @field_validator("stop")
    @classmethod
    def _ends_something(cls, stop: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if "" in ([stop] if isinstance(stop, str) else stop):
            raise ValueError("expected texts, found an empty one; leave it out")
        return stop

    @property
    def stops(self) -> list[str]:
        """The texts of ``stop``."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)


class TokensGeneratedSettings(GenerationSettings):
    """The mean number of tokens a model writes for a prompt: fewer is better.

    Attributes:
        type: ``tokens_generated``: the mean number of tokens that the model writes for a prompt.
    """

    type: Literal["tokens_generated"]
    direction: Literal["minimize"] = "minimize"

    limits: ClassVar[tuple[float, float] | None] = (0.0, math.inf)

    def build(self, context: ObjectiveContext) -> TokensGenerated:
        """The objective, its prompts tokenised once.

        Raises:
            InputError: A record cannot be used, or a prompt does not fit the model's context.
        """
        return TokensGenerated(self.goal, _prompted(self, context)[0])


class ExactMatchSettings(GenerationSettings):
    """The share of prompts that the model answers right.

    Attributes:
        type: ``exact_match``: the share of prompts whose answer equals the right answer.
        answer: The field of a record that holds the right answer: a text, a number, or a list of right answers.
        extract: A regular expression that finds the answer: its last match in the text that the model wrote, or the
            first group of that match. None takes the whole text.
    """

    type: Literal["exact_match"]
    direction: Literal["maximize"] = "maximize"
    answer: str = "answer"
    extract: str | None = None

    limits: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    @field_validator("extract")
    @classmethod
    def _is_regular(cls, extract: str | None) -> str | None:
        try:
            re.compile(extract or "")
        except re.error as error:
            raise ValueError(f"expected a regular expression, found {extract!r} ({error})") from error
        return extract

    def build(self, context: ObjectiveContext) -> ExactMatch:
        """The objective, its prompts tokenised once; its generator is that of ``tokens_generated`` of these settings.

        Raises:
            InputError: A record cannot be used, or a prompt does not fit the model's context.
        """
        generator, chosen = _prompted(self, context)
        answers = [_answers(record, self.answer, f"{self.where}: {place}") for place, record in chosen]
        extract = None if self.extract is None else re.compile(self.extract)
        return ExactMatch(self.goal, generator, answers, extract)


@dataclass(frozen=True)
class Written:
    """The texts that a model wrote.

    Args:
        tokens: (N,) lists of token ids, each with the token or stop string that ended it.
        texts: (N,) without special tokens, up to a stop string.
        finite: Whether all logits were numbers.
    """

    tokens: Sequence[Sequence[int]]
    texts: Sequence[str]
    finite: bool


class Generator:
    """Continues prompts greedily.

    Args:
        prompts: (N,) tokens, at least one each.
        tokenizer: A Hugging Face tokenizer.
        device: The device of the model.
        most: The most tokens to generate.
        stop: Texts that end an answer.
        batch: Prompts continued together; None chooses.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        tokenizer: Any,
        device: torch.device,
        most: int,
        stop: Sequence[str] = (),
        batch: int | None = None,
    ) -> None:
        self._prompts, self._tokenizer, self._device = prompts, tokenizer, device
        self._most, self._stop = most, list(stop)
        self._reach = max((len(text.encode()) for text in stop), default=0) + 4  # tokens that may hold a stop string
        rows = batch or ROWS.get(device.type, ROWS["cuda"])
        self._parts = batches([len(prompt) for prompt in prompts], rows, device)
        self._sharing = 0
        self._written: Written | None = None
        self._batch = batch
        self._subsets: dict[bytes, Generator] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def subset(self, numbers: Integers) -> Generator:
        """The generator for the prompts ``numbers`` alone, shared by all that ask for the same prompts."""
        key = np.asarray(numbers, np.int64).tobytes()
        if key not in self._subsets:
            prompts = [self._prompts[number] for number in numbers]
            made = Generator(prompts, self._tokenizer, self._device, self._most, self._stop, self._batch)
            self._subsets[key] = made
        return self._subsets[key]

    def written(self, model: Any) -> Written:
        """The texts that the model writes, one after each prompt.

        Raises:
            InputError: The model is not a causal language model that keeps keys and values.
        """
        if self._written is not None:
            return self._written
        written = self._generate(model)
        if self._sharing:
            self._written = written
        return written

    @contextmanager
    def same_model(self) -> Iterator[None]:
        """Within, the model and its weights stay the same, and generate only once."""
        self._sharing += 1
        try:
            yield
        finally:
            self._sharing -= 1
            if not self._sharing:
                self._written = None

    def _generate(self, model: Any) -> Written:
        tokens: list[list[int]] = [[] for _ in self._prompts]
        finite, ends = True, self._ends(model)
        with torch.no_grad():
            for part in self._parts:
                finite &= self._continue(model, part.tolist(), tokens, ends)
        return Written(tokens, [self._text(written) for written in tokens], finite)

    def _continue(self, model: Any, numbers: list[int], tokens: list[list[int]], ends: set[int]) -> bool:
        """Append to ``tokens`` the tokens written after prompts ``numbers``. Returns if all logits were numbers."""
        from transformers import DynamicCache

        prompts = [self._prompts[number] for number in numbers]
        ids, cache = padded(prompts, self._device, left=True), DynamicCache()
        mask = torch.tensor([[0] * (ids.shape[1] - len(p)) + [1] * len(p) for p in prompts], device=self._device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        finite = torch.ones((), dtype=torch.bool, device=self._device)
        for step in range(self._most):
            inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            rows = torch.arange(1, len(ids) + 1, device=self._device) * ids.shape[1] - 1
            greedy = [
                part.max(1) for part in logits_at(model, {**inputs, "past_key_values": cache, "use_cache": True}, rows)
            ]
            finite &= ~torch.cat([largest.isnan() for largest, _ in greedy]).any()
            chosen = torch.cat([which for _, which in greedy])
            if step == 0 and cache.get_seq_length() != ids.shape[1]:
                raise InputError(
                    f"expected a model that keeps keys and values to generate with, found {type(model).__name__}."
                )
            for number, token in zip(numbers, chosen.tolist(), strict=True):
                tokens[number].append(token)
            going = [place for place, number in enumerate(numbers) if not self._ended(tokens[number], ends)]
            if not going:
                break
            if len(going) < len(numbers):
                numbers, kept = [numbers[place] for place in going], torch.tensor(going, device=self._device)
                cache.batch_select_indices(kept)
                mask, positions, chosen = mask[kept], positions[kept], chosen[kept]
            ids, positions = chosen[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        return bool(finite)

    def _ends(self, model: Any) -> set[int]:
        """Tokens that end an answer."""
        named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        listed = named if isinstance(named, list) else [named]
        return {token for token in [*listed, self._tokenizer.eos_token_id] if token is not None}

    def _ended(self, written: list[int], ends: set[int]) -> bool:
        if written[-1] in ends:
            return True
        tail = self._tokenizer.decode(written[-self._reach :]) if self._stop else ""
        return any(text in tail for text in self._stop)

    def _text(self, written: list[int]) -> str:
        text: str = self._tokenizer.decode(written, skip_special_tokens=True)
        cuts = [text.find(stop) for stop in self._stop if stop in text]
        return text[: min(cuts)] if cuts else text


@dataclass(frozen=True, eq=False)
class TokensGenerated:
    """Mean number of tokens that a model writes after prompts.

    Args:
        goal: Name and direction.
        generator: The generator that continues the prompts.
    """

    goal: Goal
    generator: Generator

    def score(self, model: Any) -> Score:
        """Mean number of tokens, with one number a prompt. Logits with NaN make the score NaN.

        Raises:
            InputError: The model is not a causal language model that keeps keys and values.
        """
        written = self.generator.written(model)
        counts = np.asarray([len(tokens) for tokens in written.tokens], dtype=np.float64)
        return Score(mean(counts) if written.finite else float("nan"), counts, counts.size)

    @property
    def count(self) -> int:
        """Prompts."""
        return len(self.generator)

    def subset(self, numbers: Integers) -> TokensGenerated:
        """The mean over the prompts ``numbers`` alone."""
        return TokensGenerated(self.goal, self.generator.subset(numbers))

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The mean."""
        return pooled_mean(each, self.count)


@dataclass(frozen=True, eq=False)
class ExactMatch:
    """Share of prompts after which a model writes the right answer, white space around it aside.

    Args:
        goal: Name and direction.
        generator: The generator that continues the prompts.
        answers: (N,) the texts that are right.
        extract: The expression that finds the answer in the written text, as in ``ExactMatchSettings``.
    """

    goal: Goal
    generator: Generator
    answers: Sequence[frozenset[str]]
    extract: re.Pattern[str] | None = None

    def score(self, model: Any) -> Score:
        """Accuracy, with one bool a prompt. Logits with NaN make the score NaN.

        Raises:
            InputError: The model is not a causal language model that keeps keys and values.
        """
        written = self.generator.written(model)
        pairs = zip(written.texts, self.answers, strict=True)
        right: NDArray[np.bool_] = np.asarray([self._answer(text) in answers for text, answers in pairs])
        value = int(np.count_nonzero(right)) / right.size
        return Score(value if written.finite else float("nan"), right, right.size)

    @property
    def count(self) -> int:
        """Prompts."""
        return len(self.generator)

    def subset(self, numbers: Integers) -> ExactMatch:
        """The share over the prompts ``numbers`` alone."""
        answers = [self.answers[number] for number in numbers]
        return ExactMatch(self.goal, self.generator.subset(numbers), answers, self.extract)

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The share that is right."""
        return pooled_mean(each, self.count)

    def _answer(self, text: str) -> str | None:
        if self.extract is None:
            return text.strip()
        matches = list(self.extract.finditer(text))
        if not matches:
            return None
        groups = matches[-1].groups()
        return (groups[0] or "").strip() if groups else matches[-1].group().strip()


@contextmanager
def same_model(objectives: Sequence[Objective]) -> Iterator[None]:
    """Within, all objectives are scored on one model whose weights stay the same: those with one ``generator`` have it
    write once.
    """
    generators = [getattr(one, "generator", None) for one in objectives]
    with ExitStack() as stack:
        for generator in {id(one): one for one in generators if isinstance(one, Generator)}.values():
            stack.enter_context(generator.same_model())
        yield


def _answers(record: Record, name: str, where: str) -> frozenset[str]:
    if name not in record:
        raise InputError(f"{where}: expected a field {name!r}, found none.", nearest(name, list(record)))
    given = record[name]
    values = given if isinstance(given, list) else [given]
    if not values or not all(isinstance(value, str | int | float) and type(value) is not bool for value in values):
        raise InputError(f"{where}: {name}: expected a text, a number, or a list of them, found {given!r}.")
    return frozenset(str(value).strip() for value in values)


_generators: WeakValueDictionary[tuple[str, str, str], Generator] = WeakValueDictionary()


def _prompted(given: GenerationSettings, context: ObjectiveContext) -> tuple[Generator, list[tuple[str, Record]]]:
    """The generator of the settings, shared while anybody holds it, and its records."""
    where, folder, device = given.where, context.tokenizer_for(given.where), context.device
    listed = records(given.files, where)
    chosen = [listed[number] for number in given.chosen(len(listed))]
    texts = [filled(given.template, record, f"{where}: {place}") for place, record in chosen]
    common = given.model_dump(include=GenerationSettings.model_fields.keys() - ObjectiveSettings.model_fields.keys())
    key = (json.dumps([common, texts]), folder, str(device))
    generator = _generators.get(key)
    if generator is None:
        loaded = tokenizer_of(folder)
        prompts = _prompts(texts, given, loaded, where)
        _check_lengths(chosen, prompts, given.most, context_of(folder, loaded), where)
        generator = _generators[key] = Generator(prompts, loaded, device, given.most, given.stops, given.batch)
    return generator, chosen


def _prompts(texts: Sequence[str], given: GenerationSettings, tokenizer: Any, where: str) -> list[list[int]]:
    begin: list[int] = []
    if given.chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(
                f"{where}: chat: expected a tokenizer with a chat template, found none.", "Set it to false."
            )
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    elif begins_with_bos(tokenizer) if given.bos is None else given.bos:
        if tokenizer.bos_token_id is None:
            raise InputError(f"{where}: bos: expected a tokenizer with a BOS token, found none.", "Leave it out.")
        begin = [tokenizer.bos_token_id]
    return [[*begin, *tokens] for tokens in encoded(tokenizer, texts)]


def _check_lengths(
    chosen: Sequence[tuple[str, Record]], prompts: Sequence[Sequence[int]], most: int, context: int | None, where: str
) -> None:
    if context is not None and most > context:
        raise InputError(f"{where}: most: expected at most {context}, which is what the model can take, found {most}.")
    for (place, _), prompt in zip(chosen, prompts, strict=True):
        if not prompt:
            raise InputError(f"{where}: {place}: expected a prompt with tokens, found none.")
        if context is not None and len(prompt) + most - 1 > context:
            raise InputError(
                f"{where}: {place}: expected a prompt of at most {context - most + 1} tokens, so that {most} more fit "
                f"what the model can take, found {len(prompt)}.",
                "Leave it out, or generate fewer tokens.",
            )
