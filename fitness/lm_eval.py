"""Tasks of lm-eval (EleutherAI's Language Model Evaluation Harness) as objectives. No other file imports ``lm_eval``.

``lm_eval.simple_evaluate`` loads a task, builds its requests, tokenises, sorts and pads them on every call, and seeds
the global generators. Here ``LmEvalSettings.build`` does this once; after that a candidate costs its forward passes and
the task's own arithmetic. The scores are those of ``simple_evaluate`` on the same weights with the same batch size,
document by document, because the passes are the same: requests come in lm-eval's order, padded as its ``HFLM`` pads
them, and its task object turns answers into metrics.
"""

from __future__ import annotations

import io
import logging
import math
import os
import random
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from yaml.constructor import SafeConstructor

from ecotone.extras import how_to_install
from ecotone.fitness.kinds import ObjectiveContext, ObjectiveSettings
from ecotone.fitness.protocol import Score, pooled_mean
from ecotone.fitness.scores import number
from ecotone.populations.errors import InputError, can_be_pasted, first_line, nearest
from ecotone.populations.genome import Integers
from ecotone.populations.parsing import MalformedError, file_bytes
from ecotone.populations.trial import Goal
from ecotone.populations.yaml_texts import LARGEST_TEXT, YamlError, compose, construct

BATCH = 64
"""Rows in a forward pass that are tried first where none are given: as many as lm-eval's own ``auto`` tries."""

LOGITS_BYTES = 2 * 1024**3
"""On a CPU, where running out of memory ends the process, fewer rows are tried first so that logits stay below this."""

Tokens: TypeAlias = list[int]
Row: TypeAlias = tuple[Tokens, Tokens]
"""Context and continuation."""


class LmEvalSettings(ObjectiveSettings):
    """A task of lm-eval, scored as its ``simple_evaluate`` would (``ecotone.fitness.lm_eval``).

    Attributes:
        type: ``lm_eval``: a task of lm-eval.
        task: The name of the task: one of lm-eval's own, or one in ``folder``.
        folder: A folder of task files (YAML), relative to the recipe's folder. None takes lm-eval's own tasks; listing
            their names takes some seconds.
        metric: The metric of the task that is the score, such as ``acc`` or ``exact_match``; None is the task's first
            metric.
        filter: The task's filter that answers pass through before they are scored; None is the task's first filter.
        shots: Solved examples shown before each question; None is the task's own number.
        chat_template: Put requests into the tokenizer's chat template.
        fewshot_as_multiturn: In a chat template, make each solved example a turn of its own.
        system_instruction: A text put before everything else in a request; None puts no text.
        batch: Rows in one forward pass. None is the largest power of two up to 64 that fits, found while the first
            candidate is scored. Workers with different memory may then differ in the last bits of scores.
        limit: Documents in the calibration subset; None takes all. A smaller limit draws some of the documents that a
            larger limit draws.
        seed: The seed that draws the calibration subset.
        part: The documents to score on. With a limit, ``search`` is the calibration subset and ``rest`` all other
            documents. ``all`` is every document and takes no limit.
        max_length: The longest input in tokens; None is the model's own limit.
        allow_code: Allow the folder's files to run Python of their own, and the model's answers to be run as code.
    """

    type: Literal["lm_eval"]
    direction: Literal["maximize", "minimize"] = "maximize"
    task: str
    folder: str | None = None
    metric: str | None = None
    filter: str | None = None
    shots: int | None = Field(default=None, ge=0)
    chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    batch: int | None = Field(default=None, ge=1)
    limit: int | None = Field(default=None, ge=1)
    seed: int = Field(default=0, ge=0)
    part: Literal["search", "rest", "all"] = "search"
    max_length: int | None = Field(default=None, ge=2)
    allow_code: bool = False

    limits: ClassVar[tuple[float, float] | None] = None
    by_example: ClassVar[bool | None] = None
    needs_tokenizer: ClassVar[bool] = True
    paths: ClassVar[tuple[str, ...]] = ("folder",)

    @model_validator(mode="after")
    def _limit_fits_part(self) -> LmEvalSettings:
        if self.part == "rest" and self.limit is None:
            raise ValueError(
                "limit: expected the number of documents that part 'rest' leaves out, found nothing; give the limit "
                "and seed of the objective whose part is 'search'"
            )
        if self.part == "all" and self.limit is not None:
            raise ValueError(f"limit: expected nothing with part 'all', found {self.limit}")
        return self

    def imports(self) -> Mapping[str, tuple[str, ...]]:
        """The evaluation harness, and what it runs models with."""
        return {"language": ("lm_eval", "transformers")}

    def examine(self) -> Iterator[tuple[str, str]]:
        """Sentences about the task from lm-eval's description of it. Loads the task's data.

        Raises:
            InputError: There is no such task or metric, or lm-eval and the recipe disagree on the metric's direction.
        """
        task = described(self)
        right = {True: "maximize", False: "minimize", None: self.direction}[task.higher_is_better]
        if right != self.direction:
            raise InputError(
                f"{self.where}: direction: expected {right} for the metric {task.metric!r}, found {self.direction}."
            )
        documents = f"{task.documents} of {task.available} documents"
        yield f"lm_eval {self.task}", f"{task.metric} on {documents}, {task.kind}"

    def reads(self) -> Sequence[Path]:
        """The task's file in ``folder``, all that it includes, its Python files, and data that lie on this machine."""
        return [] if self.folder is None else _files_of(Path(self.folder), self.task)

    def build(self, context: ObjectiveContext) -> LanguageTask:
        """The objective, everything tokenised.

        Raises:
            InputError: lm-eval is not installed, there is no such task or metric, its data cannot be loaded, it would
                run code that is not allowed, or a setting does not fit it.
        """
        return _built(self, context.tokenizer_for(self.where), context.device)


@dataclass(frozen=True)
class Description:
    """A task as lm-eval describes it without a model, for the report of ``validate``.

    Args:
        documents: Documents that a candidate is scored on.
        available: Documents that the task has.
        metric: The metric's name.
        higher_is_better: Whether a higher metric is better; None when the task does not declare it.
        kind: ``loglikelihood``, ``multiple_choice``, ``loglikelihood_rolling`` or ``generate_until``.
    """

    documents: int
    available: int
    metric: str
    higher_is_better: bool | None
    kind: str


@dataclass(frozen=True, eq=False)
class LanguageTask:
    """One metric of one lm-eval task, its requests tokenised.

    Args:
        goal: Name and direction.
        task: lm-eval's task, its requests built.
        metric: The metric's name.
        filter: The name of the filter that answers pass through.
        requests: All requests of the task, ready to run.
        documents: The requests of each document, in order.
        sandboxed: Whether templates come from a folder that may not run code.
        verdicts: A faster way to the metric's values, where there is one.
    """

    goal: Goal
    task: Any
    metric: str
    filter: str
    requests: Requests
    documents: Sequence[Sequence[Any]]
    sandboxed: bool = False
    verdicts: Verdicts | None = None

    @property
    def batch(self) -> int:
        """Rows in one forward pass."""
        return self.requests.batch

    def score(self, model: Any) -> Score:
        """The task's own aggregate of the metric, with one value a document where the metric has them.

        A document's value is the metric's, or for perplexities and bits per byte that of the document alone; bool
        where all are 0 or 1. Log-likelihoods or logits with NaN make the score NaN.

        Raises:
            InputError: A given batch does not fit in memory, or the task gives no such metric.
        """
        from lm_eval.api import metrics

        with _as_lm_eval(self.sandboxed), torch.no_grad():
            broken = self.requests.run(model)
            values = self._values()
            if not values:
                found = ", ".join(sorted({name for each in self._results() for name in each})) or "none"
                raise InputError(f"metric: expected {self.metric!r} among the task's results, found {found}.")
            aggregate = self.task.aggregation().get(self.metric) or metrics.mean
            value = float("nan") if broken else _aggregated(aggregate, values)
            each = _by_document(values, aggregate) if len(values) == len(self.documents) else None
        return Score(value, each, len(self.documents))

    def _values(self) -> list[Any]:
        """The metric of one document after the other; of none where the task does not give it."""
        if self.verdicts is not None:
            answers = [instance.resps[0][0] for instances in self.documents for instance in instances]
            return self.verdicts.values(np.array(answers))
        self.task.apply_filters()
        return [found[self.metric] for found in self._results() if self.metric in found]

    def _results(self) -> Iterator[Mapping[str, Any]]:
        """The task's metrics of one document after the other."""
        has_code = callable(self.task.get_config("process_results"))
        for instances in self.documents:
            document = instances[0].doc
            answers = [instance.filtered_resps[self.filter] for instance in instances]
            # A function of the task's might change the document, and the next candidate would be scored on another.
            yield self.task.process_results(deepcopy(document) if has_code else document, answers)


@dataclass(frozen=True, eq=False, kw_only=True)
class LanguageMean(LanguageTask):
    """A task whose metric is the mean over documents, which can be asked of some of them.

    Args:
        ask: Makes requests of instances.
    """

    ask: Callable[[Sequence[Any]], Requests]

    @property
    def count(self) -> int:
        """Documents."""
        return len(self.documents)

    def subset(self, numbers: Integers) -> LanguageMean:
        """The mean over the documents ``numbers`` alone."""
        documents = [self.documents[number] for number in numbers]
        task, instances = copy(self.task), [instance for asked in documents for instance in asked]
        task._instances = instances  # those that its filters are applied to
        with _as_lm_eval(self.sandboxed), _quiet():
            requests, verdicts = self.ask(instances), _verdicts(task, self.metric, documents)
        return replace(self, task=task, requests=requests, documents=documents, verdicts=verdicts)

    def pooled(self, each: NDArray[Any], numbers: Integers) -> tuple[float, float]:
        """The mean."""
        return pooled_mean(each, self.count)


def _built(options: LmEvalSettings, tokenizer: str, device: torch.device) -> LanguageTask:
    where = options.where
    with _installed(where), _as_lm_eval(_is_sandboxed(options)), _quiet():
        task = _loaded(options, where)
        metric, name = _metric(task, options, where), _filter(task, options, where)
        reader = _reader(options, tokenizer, device, where)
        chosen = _chosen(len(task.eval_docs), options, where)
        _build_requests(task, reader, options, chosen, where)
        greedy = _asks_for_greedy(task)

        def ask(instances: Sequence[Any]) -> Requests:
            return Requests(reader, instances, options.batch, greedy, where)

        requests = ask(task.instances)
    _remember(task)
    documents: dict[int, list[Any]] = {}
    for instance in sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)):
        documents.setdefault(instance.doc_id, []).append(instance)
    asked = list(documents.values())
    with _as_lm_eval(_is_sandboxed(options)):
        verdicts = _verdicts(task, metric, asked)
    made = LanguageTask(options.goal, task, metric, name, requests, asked, _is_sandboxed(options), verdicts)
    return LanguageMean(**vars(made), ask=ask) if _is_mean(task, metric) else made


def _is_mean(task: Any, metric: str) -> bool:
    """Whether a score is the mean of the metric over documents."""
    from lm_eval.api import metrics

    return (task.aggregation().get(metric) or metrics.mean) is metrics.mean


def described(options: LmEvalSettings) -> Description:
    """The task as lm-eval describes it without tokenizer and model. Loads the task's data.

    Raises:
        InputError: As for ``LmEvalSettings.build``, except for errors that only a tokenizer can show.
    """
    where = options.where
    with _installed(where), _as_lm_eval(_is_sandboxed(options)), _quiet():
        task = _loaded(options, where)
        metric, available = _metric(task, options, where), len(task.eval_docs)
        _filter(task, options, where)
    chosen = _chosen(available, options, where)
    count = available if chosen is None else len(chosen)
    return Description(count, available, metric, task.higher_is_better().get(metric), str(task.OUTPUT_TYPE))


class Requests:
    """Everything that a task asks a model, tokenised, in batches.

    Args:
        reader: lm-eval's model class without a model: what it says of tokens and lengths.
        instances: lm-eval's requests, which receive the answers.
        batch: Rows in one forward pass; None finds the largest that fits when the first model is asked.
        greedy: Whether the task asks if a continuation is what greedy decoding gives; if not, all are said not to be.
        where: The objective, for error messages.
    """

    def __init__(self, reader: Any, instances: Sequence[Any], batch: int | None, greedy: bool, where: str) -> None:
        kinds: dict[str, type[_Continuations | _Generations]] = {
            "loglikelihood": _Continuations,
            "loglikelihood_rolling": _Texts,
            "generate_until": _Generations,
        }
        by_kind: dict[str, list[Any]] = {}
        for instance in instances:
            by_kind.setdefault(instance.request_type, []).extend([instance] * (instance.repeats or 1))
        self._groups = [(asked, kinds[kind](reader, asked, greedy, where)) for kind, asked in by_kind.items()]
        self._instances, self._where = instances, where
        self._settled = batch is not None
        self._cut(batch or _first_batch(reader, max(group.longest for _, group in self._groups)))

    def run(self, model: Any) -> bool:
        """Give each request the model's answer; whether there were NaNs.

        Raises:
            InputError: The batch does not fit in memory.
        """
        while True:
            try:
                answered = [group.answers(model) for _, group in self._groups]
                break
            except (RuntimeError, MemoryError) as error:
                if not _out_of_memory(error):
                    raise
                if self._settled or self.batch == 1:
                    raise InputError(
                        f"{self._where}: batch: {self.batch} rows in one forward pass do not fit in memory ({error}).",
                        "Set a smaller batch, or leave it out: then the largest that fits is found.",
                    ) from error
            # Outside the handler, whose error holds the failed pass's tensors.
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                torch.cuda.empty_cache()
            self._cut(self.batch // 2)
        self._settled = True
        for instance in self._instances:
            instance.resps, instance.filtered_resps = [], {}
        for (asked, _), (answers, _) in zip(self._groups, answered, strict=True):
            for instance, answer in zip(asked, answers, strict=True):
                instance.resps.append(answer)
        return any(broken for _, broken in answered)

    def _cut(self, batch: int) -> None:
        self.batch = batch
        for _, group in self._groups:
            group.cut(batch)


_SIZES: dict[str, Callable[[str], float]] = {
    "acc": lambda choice: 1.0,
    "acc_norm": lambda choice: float(len(choice)),
    "acc_bytes": lambda choice: float(len(choice.encode())),
}
"""Metrics of a multiple choice's likeliest answer, and the divisor of its log-likelihood."""


class Verdicts:
    """Whether the likeliest choice is the right one, for all documents of a task at once.

    The task itself takes them one by one, which is as long as a small model needs for some of its passes.

    Args:
        sizes: For each document what each choice's log-likelihood is divided by.
        answers: (N,) numbers of the right ones.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], answers: Sequence[int]) -> None:
        counts = [len(each) for each in sizes]
        self._rows = np.repeat(np.arange(len(counts)), counts)
        self._columns = np.concatenate([np.arange(count) for count in counts])
        self._sizes = np.concatenate(sizes)
        self._answers = np.asarray(answers)

    def values(self, likelihoods: NDArray[np.float64]) -> list[float]:
        """1 for each document that is answered right, else 0; of (C,) log-likelihoods of all documents' choices."""
        table = np.full((len(self._answers), self._columns.max() + 1), -np.inf)
        with np.errstate(divide="ignore", invalid="ignore"):
            table[self._rows, self._columns] = likelihoods / self._sizes
        right: list[float] = (table.argmax(1) == self._answers).astype(np.float64).tolist()
        return right


def _verdicts(task: Any, metric: str, documents: Sequence[Sequence[Any]]) -> Verdicts | None:
    """A function that gives the metric of all documents at once; None where the task's results differ."""
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice" or metric not in _SIZES:
        return None
    if callable(task.get_config("process_results")) or task.get_config("filter_list"):
        return None
    asked = [instances[0].doc for instances in documents]
    choices = [task.doc_to_choice(document) for document in asked]
    answers = [
        task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document) for document in asked
    ]
    for options, answer, instances in zip(choices, answers, documents, strict=True):
        if len(instances) != len(options) or type(answer) is not int or not 0 <= answer < len(options):
            return None
    made = Verdicts([[_SIZES[metric](choice) for choice in options] for options in choices], answers)
    drawn = [-np.random.default_rng(number).random(len(options)) for number, options in enumerate(choices)]
    expected = [
        task.process_results(document, [(float(logarithm), False) for logarithm in likelihoods])[metric]
        for document, likelihoods in zip(asked, drawn, strict=True)
    ]
    return made if made.values(np.concatenate(drawn)) == expected else None


@dataclass(frozen=True, eq=False)
class _Pass:
    """One forward pass over B rows, and which of its log-probabilities make up the answers to M requests.

    HFLM computes a row once for all requests that differ in the last token only.

    Args:
        sizes: Tokens of each of the M continuations.
        tokens: (B, L) padded on the right.
        positions: (T,) the scored ones among the B * L.
        wanted: (C,) for each token of the continuations, laid end to end, which of the T positions scores it.
        greedy: (C,) which of them says whether it is the likeliest token.
        targets: (C,) the tokens.
    """

    sizes: list[int]
    tokens: Tensor
    positions: Tensor
    wanted: Tensor
    greedy: Tensor
    targets: Tensor

    def score(self, model: Any, greedy: bool) -> tuple[Tensor, Tensor]:
        """(C,) log-probabilities, and whether each token is the likeliest, or none of them if not ``greedy``."""
        logits = model(self.tokens, use_cache=False).logits.flatten(0, 1).index_select(0, self.positions)
        logs = torch.log_softmax(logits, -1)
        likeliest = self._likeliest(logs) if greedy else torch.zeros_like(self.targets, dtype=torch.bool)
        return logs[self.wanted, self.targets], likeliest

    def _likeliest(self, logs: Tensor) -> Tensor:
        """(C,) whether each token is the first of the largest; ``argmax`` is slow, and few rows need it for ties."""
        largest = logs[self.greedy, self.targets] == logs.amax(-1)[self.greedy]
        rows = self.greedy[largest]
        largest[largest.clone()] = logs[rows].argmax(-1) == self.targets[largest]
        return largest


class _Continuations:
    """Requests for the log-likelihood of a continuation, and whether greedy decoding would give it."""

    def __init__(self, reader: Any, instances: Sequence[Any], greedy: bool, where: str) -> None:
        self._reader, self._rows, self._greedy = reader, list[Row](), greedy
        # HFLM's own tokenising, handed over where it would start to compute.
        reader._loglikelihood_tokens = self._record
        self._ask(reader, instances)
        for context, continuation in self._rows:
            if not continuation or len(continuation) > reader.max_length:
                raise InputError(
                    f"{where}: task: expected continuations of 1 to {reader.max_length} tokens, as many as the model "
                    f"takes, found {len(continuation)} after a context of {len(context)}."
                )
        self.longest = max(len(context) + len(continuation) for context, continuation in self._rows) - 1
        self.longest = min(self.longest, reader.max_length)

    def _ask(self, reader: Any, instances: Sequence[Any]) -> None:
        reader.loglikelihood(instances, disable_tqdm=True)

    def _record(self, requests: Sequence[tuple[Any, Tokens, Tokens]], **_: Any) -> list[tuple[float, bool]]:
        self._rows += [(context, continuation) for _, context, continuation in requests]
        return [(1.0, True)] * len(requests)

    def cut(self, batch: int) -> None:
        """Lay the rows out in passes of at most ``batch``."""
        self._passes, self._order = list[_Pass](), list[int]()
        for rows in self._in_blocks(batch):
            passes, order = _passes(rows, batch, self._reader)
            first = len(self._order)
            self._order += order.get_original(list(range(first, first + sum(len(each.sizes) for each in passes))))
            self._passes += passes
        self._sizes = [size for each in self._passes for size in each.sizes]
        sizes = np.asarray(self._sizes)
        self._starts = np.cumsum(sizes) - sizes
        self._alike = [(sizes == size).nonzero()[0] for size in np.unique(sizes)]
        """Requests with as many tokens as each other."""

    def _in_blocks(self, batch: int) -> list[list[Row]]:
        """The rows in the groups within which HFLM sorts them by length."""
        return [self._rows]

    def answers(self, model: Any) -> tuple[list[Any], bool]:
        """(log-likelihood, is greedy) of each request, and whether any is NaN."""
        scored = [each.score(model, self._greedy) for each in self._passes]
        logarithms = self._sums(torch.cat([each for each, _ in scored])).tolist()
        likeliest = torch.cat([each for _, each in scored]).cpu().numpy()
        greedy = np.logical_and.reduceat(likeliest, self._starts).tolist()
        answers = [(logarithms[place], greedy[place]) for place in self._order]
        return answers, any(map(math.isnan, logarithms))

    def _sums(self, logs: Tensor) -> Tensor:
        """(M,) for each request the sum of its tokens' log-probabilities, as HFLM adds them up: one row of them."""
        if logs.is_cuda:  # where sums of several rows at once may add in another order
            return torch.stack([part.sum() for part in torch.split(logs, self._sizes)])
        sums = logs.new_empty(len(self._sizes))
        for alike in self._alike:
            tokens = self._starts[alike][:, None] + np.arange(self._sizes[alike[0]])
            sums[torch.from_numpy(alike)] = logs[torch.from_numpy(tokens)].sum(-1)
        return sums


class _Texts(_Continuations):
    """Requests for the log-likelihood of whole texts, in windows of the model's longest input that do not overlap."""

    def _ask(self, reader: Any, instances: Sequence[Any]) -> None:
        # Each window is answered by 1, so that a text's sum is the number of its windows.
        self._windows = [int(count) for count in reader.loglikelihood_rolling(instances, disable_tqdm=True)]

    def _in_blocks(self, batch: int) -> list[list[Row]]:
        return [self._rows[start : start + batch] for start in range(0, len(self._rows), batch)]

    def answers(self, model: Any) -> tuple[list[Any], bool]:
        """The log-likelihood of each text, and whether any is NaN."""
        answers, broken = super().answers(model)
        windows = iter(answers)
        return [sum(value for value, _ in islice(windows, count)) for count in self._windows], broken


class _Generations:
    """Requests for text that goes on from a context until a stop sequence, the longest contexts first."""

    longest = 1  # columns whose logits are held at once

    def __init__(self, reader: Any, instances: Sequence[Any], greedy: bool, where: str) -> None:
        if reader.eot_token_id is None:
            raise InputError(f"{where}: tokenizer: expected one with an end-of-text token, found none.")
        self._reader, self._asked, self._where = reader, [instance.args for instance in instances], where
        self._lengths = {context: len(reader.tok_encode(context)) for context, _ in self._asked}

    def cut(self, batch: int) -> None:
        """Lay the contexts out in batches of at most ``batch``."""
        from lm_eval.models.utils import Collator

        self._order = Collator(
            self._asked,
            sort_fn=lambda request: (-self._lengths[request[0]], request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        self._calls = [self._call(chunk) for chunk in self._order.get_batched(n=batch)]

    def _call(self, chunk: Sequence[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], list[str]]:
        """The arguments with which HFLM would call the model's ``generate``, and the stop sequences."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        contexts, options = tuple(context for context, _ in chunk), chunk[0][1]
        options = normalize_gen_kwargs(options, self._reader.max_gen_toks)
        end = self._reader.tok_decode(self._reader.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(options.pop("until", None), eos=end)
        new = options.pop("max_gen_toks")
        if new >= self._reader.max_length:
            raise InputError(
                f"{self._where}: task: it generates up to {new} tokens, and the model takes {self._reader.max_length} "
                "with the context.",
                "Set max_gen_toks in the task's generation_kwargs, or a larger max_length if the model allows it.",
            )
        tokens, mask = self._reader.tok_batch_encode(contexts, left_truncate_len=self._reader.max_length - new)
        length = options.pop("max_length", tokens.shape[1] + new)
        self._reader._model.generate = lambda **arguments: arguments
        arguments = self._reader._model_generate(
            context=tokens.to(self._reader.device),
            attention_mask=mask.to(self._reader.device),
            stop=stops,
            max_length=length,
            **options,
        )
        return arguments, stops

    def answers(self, model: Any) -> tuple[list[Any], bool]:
        """The text of each request, and whether logits were NaN."""
        from lm_eval.models.utils import postprocess_generated_text

        watch, texts = _NanWatch(), list[str]()
        for arguments, stops in self._calls:
            context = arguments["input_ids"]
            for criterion in arguments["stopping_criteria"]:
                criterion.done_tracker = [False] * len(context)
            tokens = model.generate(**arguments, logits_processor=[watch])
            decoded = [self._reader.tok_decode(row) for row in tokens[:, context.shape[1] :].tolist()]
            texts += [postprocess_generated_text(text, stops, None) for text in decoded]
        return self._order.get_original(texts), watch.seen()


class _NanWatch:
    """A logits processor that changes nothing and remembers NaNs, on the device until it is asked."""

    def __init__(self) -> None:
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` (B, V) as they are."""
        self._found.append(scores.amax().isnan())
        return scores

    def seen(self) -> bool:
        """Whether any logit was NaN."""
        return bool(self._found) and bool(torch.stack(self._found).any())


def _passes(rows: Sequence[Row], batch: int, reader: Any) -> tuple[list[_Pass], Any]:
    """The passes over ``rows`` in HFLM's order, and the indices that put answers back into the order of ``rows``."""
    from lm_eval.models.utils import Collator

    order = Collator(
        [("", context, continuation) for context, continuation in rows],
        sort_fn=lambda row: (-len(row[1]) - len(row[2]), tuple(row[1] + row[2])),
        group_by="contexts",
        group_fn=lambda row: row[1] + row[2][:-1],
    )
    return [_pass(chunk, order, reader) for chunk in order.get_batched(n=batch)], order


def _pass(chunk: Sequence[tuple[str, Tokens, Tokens]], order: Any, reader: Any) -> _Pass:
    inputs = [(context + continuation)[-(reader.max_length + 1) :][:-1] for _, context, continuation in chunk]
    width = max(map(len, inputs))
    positions, wanted, greedy, targets, sizes = (list[int]() for _ in range(5))
    unused = torch.zeros(1, 1, 1)
    for row, ((text, context, continuation), tokens) in enumerate(zip(chunk, inputs, strict=True)):
        first, count, end = len(positions), len(continuation), row * width + len(tokens)
        positions += range(end - count, end)
        for _, answer, _ in order.get_cache(text, context, continuation, unused):
            # The same but for where contexts of unlike length meet in one row; there HFLM reads these two places.
            wanted += range(first, first + len(answer))
            greedy += range(first + count - len(answer), first + count)
            targets += answer
            sizes.append(len(answer))
    padded = [tokens + [0] * (width - len(tokens)) for tokens in inputs]
    places = (torch.tensor(each).to(reader.device) for each in (padded, positions, wanted, greedy, targets))
    return _Pass(sizes, *places)


def _asks_for_greedy(task: Any) -> bool:
    """Whether a task may ask if a continuation equals the greedy one, which takes time to find."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return False
    own = callable(task.get_config("process_results")) or task.get_config("filter_list")
    return task.OUTPUT_TYPE != "multiple_choice" or bool(own) or "exact_match" in task.aggregation()


def _first_batch(reader: Any, longest: int) -> int:
    batch = BATCH
    if reader.device.type == "cpu":
        row = longest * len(reader.tokenizer) * 4
        while batch > 1 and batch * row > LOGITS_BYTES:
            batch //= 2
    return batch


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _chosen(count: int, options: LmEvalSettings, where: str) -> set[int] | None:
    """Numbers of the documents that ``part`` takes of ``count``; None for all of them."""
    if options.limit is None:
        return None
    order = np.random.default_rng(options.seed).permutation(count).tolist()
    chosen = set(order[: options.limit] if options.part == "search" else order[options.limit :])
    if not chosen:
        raise InputError(
            f"{where}: limit: expected fewer than the {count} documents of {options.task!r} so that a rest remains, "
            f"found {options.limit}."
        )
    return chosen


def _loaded(options: LmEvalSettings, where: str) -> Any:
    """lm-eval's task with its data, before requests are built."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    manager, entry = _entry(options, where)
    config = entry.cfg or {}
    if options.folder is not None and not options.allow_code:
        _refuse_code(entry, where)
    if config.get("unsafe_code") and not options.allow_code:
        raise InputError(f"{where}: task: {options.task!r} runs the model's answers as code.", _ALLOW)
    try:
        (task,) = manager.load([options.task])["tasks"].values()
    except Exception as error:
        raise InputError(*_not_loaded(error, config, options.task, where)) from error
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"{where}: task: expected a task of text, found {options.task!r} of images or sound.")
    fixed = task.get_config("num_fewshot")
    if fixed == 0 and options.shots:
        raise InputError(
            f"{where}: shots: expected none, as {options.task!r} fixes num_fewshot at 0, found {options.shots}."
        )
    if options.shots is not None or fixed is None:
        task.set_config(key="num_fewshot", value=options.shots or 0)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    _check_shots(task, options, where)
    return task


def _check_shots(task: Any, options: LmEvalSettings, where: str) -> None:
    """Refuse more solved examples than lm-eval can draw. A document is none of its own where both are of one split."""
    documents = getattr(getattr(task, "sampler", None), "df", None)
    count = task.get_config("num_fewshot") or 0
    if not count or not documents:
        return
    own = task.fewshot_cfg.split == task.get_config("test_split")
    most = len(documents) - own
    if count > most:
        besides = " besides the one that is asked" if own else ""
        raise InputError(
            f"{where}: shots: expected at most {most}, as {options.task!r} has {most} documents to draw from{besides}, "
            f"found {count}.",
            f"Give shots: {most}, or fewer.",
        )


def _entry(options: LmEvalSettings, where: str) -> tuple[Any, Any]:
    """lm-eval's manager of tasks, and its entry for this task."""
    from lm_eval.tasks import TaskManager

    if options.folder is None:
        manager = _own_tasks()
    else:
        if not Path(options.folder).is_dir():
            raise InputError(f"{where}: folder: expected a folder of task files, found none at {options.folder!r}.")
        manager = TaskManager(include_path=options.folder, include_defaults=False)
    entry = manager.task_index.get(options.task)
    if entry is None:
        raise InputError(*_unknown(options, list(manager.task_index), where))
    members = _members(entry)
    if members:
        shown = ", ".join(members[:20]) + (f" and {len(members) - 20} more" if len(members) > 20 else "")
        raise InputError(
            f"{where}: task: expected one task, found {options.task!r}, a group of {len(members)}: {shown}.",
            "Make an objective of each that counts.",
        )
    return manager, entry


@cache
def _own_tasks() -> Any:
    """lm-eval's manager of its own tasks; some seconds, once a process."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _members(entry: Any) -> list[str]:
    """Names of the tasks in a group or with a tag; none for a task."""
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return []
    members = (entry.cfg or {}).get("task") or []
    return [
        str(member.get("task", member.get("group"))) if isinstance(member, dict) else str(member) for member in members
    ]


def _unknown(options: LmEvalSettings, names: list[str], where: str) -> tuple[str, str]:
    """Message and remedy for a name that is no task's."""
    if options.folder is None:
        close = get_close_matches(options.task, names, n=3, cutoff=0.6)
        message = f"{where}: task: lm-eval has none called {options.task!r}."
        return message, f"Nearest: {', '.join(close)}." if close else "Its names are listed by 'lm-eval ls tasks'."
    message = f"{where}: task: {options.folder} has none called {options.task!r}."
    broken = [path.name for path in sorted(Path(options.folder).glob("**/*.yaml")) if not _is_readable(path)]
    if broken:
        message += f" These files in it cannot be read as YAML: {', '.join(broken)}."
    built_in = list(_own_tasks().task_index)
    if options.task in built_in:
        return message, "lm-eval has one: leave folder out to use it."
    close = get_close_matches(options.task, names, n=3, cutoff=0.5)
    close += get_close_matches(options.task, built_in, n=3 - len(close), cutoff=0.6) if len(close) < 3 else []
    return message, f"Nearest: {', '.join(close)}." if close else f"Known: {', '.join(sorted(names)) or 'none'}."


def _is_readable(path: Path) -> bool:
    try:
        return bool(list(_with_includes(path)))
    except (yaml.YAMLError, OSError):
        return False


def _not_loaded(error: Exception, config: Mapping[str, Any], name: str, where: str) -> tuple[str, str]:
    """Message and remedy for a task that lm-eval could not make."""
    found = f"{type(error).__name__}: {' '.join(str(error).split())}"
    passed = {frame.f_globals.get("__name__", "").split(".")[0] for frame, _ in traceback.walk_tb(error.__traceback__)}
    if "datasets" not in passed:
        remedy = "Is a choice or a text of its first documents empty?" if isinstance(error, IndexError) else ""
        return f"{where}: task: {name!r} cannot be loaded by lm-eval ({found}).", remedy
    arguments = ", ".join(repr(config[key]) for key in ("dataset_path", "dataset_name") if config.get(key))
    message = f"{where}: task: the dataset ({arguments}) of {name!r} cannot be loaded ({found})."
    if "data_files" in (config.get("dataset_kwargs") or {}):
        return message, "Check data_files: a relative path starts at the folder in which the run was started."
    if not can_be_pasted(config.get("dataset_path"), config.get("dataset_name")):
        return message, ""
    return message, (
        "If it must be fetched and the network is off (HF_HUB_OFFLINE, HF_DATASETS_OFFLINE), fetch it once where it is "
        f'on: python -c "import datasets; datasets.load_dataset({arguments})".'
    )


_ALLOW = "If you trust it, set allow_code: true."
_CODE = {
    "use_prompt": "a prompt file, which is read without care",
    "trust_remote_code": "code that comes with data",
    "custom_generate": "code that generates",
    "hf_evaluate": "a metric that is fetched as code",
}
"""Keys of a task's file through which code would run, and a name for that code."""


def _refuse_code(entry: Any, where: str) -> None:
    """Raise ``InputError`` if the task's file, or one that it includes, would run code. Nothing is run to see."""
    from lm_eval.api.registry import metric_registry

    try:
        files = [*_with_includes(entry.yaml_path)]
    except (yaml.YAMLError, OSError) as error:
        raise InputError(
            f"{where}: task: {entry.yaml_path} or a file that it includes: {first_line(error)}."
        ) from error
    for path, config, functions in files:
        if functions:
            shown = ", ".join(functions)
            raise InputError(f"{where}: task: {path} runs code of its own (!function {shown}).", _ALLOW)
        for key, what in _CODE.items():
            if any(_values(config, key)):
                raise InputError(f"{where}: task: {path} uses {what} ({key}).", _ALLOW)
        if config.get("dataset_path") == "pandas":
            raise InputError(f"{where}: task: {path} reads pickles, through which code may run (pandas).", _ALLOW)
        known = list(metric_registry.keys())
        for name in _values(config.get("metric_list"), "metric"):
            if name not in known:
                raise InputError(
                    f"{where}: task: {path}: lm-eval has no metric {name!r}, and would fetch code of that name.",
                    nearest(str(name), known),
                )


def _values(tree: Any, key: str) -> Iterator[Any]:
    """Every value of ``key`` in nested mappings and lists."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from _values(value, key)


def _with_includes(path: Path) -> Iterator[tuple[Path, dict[str, Any], list[str]]]:
    """A task's file and all that it includes: path, contents and the functions that it names."""
    waiting, seen = [Path(path).resolve()], set[Path]()
    while waiting:
        here = waiting.pop()
        if here in seen:
            continue
        seen.add(here)
        config, functions = _parsed(here)
        yield here, config, functions
        included = config.get("include") or []
        named = [included] if isinstance(included, str) else included
        if not isinstance(named, list) or not all(isinstance(each, str) for each in named):
            raise YamlError(f"include: expected the name of a file, found {included!r}")
        waiting += [(here.parent / each).resolve() for each in named]


def _files_of(folder: Path, task: str) -> list[Path]:
    """The files that a task in a folder is made of; all of the folder's where its own file is not found."""
    found: list[Path] = []
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            parts = list(_with_includes(path))
        except (yaml.YAMLError, OSError):
            continue
        if any(config.get("task") == task for _, config, _ in parts):
            for part, config, functions in parts:
                found += [part, *(part.parent / f"{name.rpartition('.')[0]}.py" for name in functions)]
                found += _data_of(config)
    return list(dict.fromkeys(found)) or [folder]


def _data_of(config: Mapping[str, Any]) -> Iterator[Path]:
    """The files and folders of data that a task's file names, as far as they lie on this machine."""
    waiting: list[Any] = [config.get("dataset_path"), (config.get("dataset_kwargs") or {})]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str) and (os.sep in value or Path(value).suffix) and Path(value).exists():
            yield Path(value)


def _parsed(path: Path) -> tuple[dict[str, Any], list[str]]:
    """A YAML file's contents, with functions replaced by their names, and the list of these names."""
    functions: list[str] = []

    class Constructor(SafeConstructor):
        def named(self, node: yaml.ScalarNode) -> str:
            functions.append(str(self.construct_scalar(node)))
            return functions[-1]

        yaml_constructors = {**SafeConstructor.yaml_constructors, "!function": named}  # noqa: RUF012 - PyYAML's way

    try:
        data = file_bytes(path, LARGEST_TEXT)
    except MalformedError as error:
        raise YamlError(str(error)) from error
    node = compose(data, once=False)  # lm-eval takes the last of a key that stands twice
    found = None if node is None else construct(node, Constructor)
    if not isinstance(found, dict):
        raise YamlError(f"expected a mapping, found {type(found).__name__}")
    return found, functions


def _metric(task: Any, options: LmEvalSettings, where: str) -> str:
    """The metric's name, checked as far as the task declares its metrics."""
    declared = [str(name) for name in task.aggregation()]
    if options.metric is None:
        return declared[0]
    # A function among a task's metrics may give several under names of its own, seen when it is scored only.
    listed = task.get_config("metric_list") or []
    open_ended = any(callable(each.get("metric")) for each in listed) or callable(task.get_config("process_results"))
    if options.metric not in declared and not open_ended:
        known = ", ".join(declared)
        raise InputError(
            f"{where}: metric: expected one that {options.task!r} has ({known}), found {options.metric!r}.",
            nearest(options.metric, declared),
        )
    return options.metric


def _filter(task: Any, options: LmEvalSettings, where: str) -> str:
    names = [str(each["name"]) for each in task.get_config("filter_list") or [{"name": "none"}]]
    if options.filter is None:
        return names[0]
    if options.filter not in names:
        raise InputError(
            f"{where}: filter: expected one that {options.task!r} has ({', '.join(names)}), found {options.filter!r}.",
            nearest(options.filter, names),
        )
    return options.filter


def _reader(options: LmEvalSettings, folder: str, device: torch.device, where: str) -> Any:
    """lm-eval's HFLM around no model: it tokenises, truncates and formats chats as with one."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{where}: tokenizer: none can be read from {folder} ({error}).") from error
    if options.chat_template and not tokenizer.chat_template:
        raise InputError(
            f"{where}: chat_template: the tokenizer of {folder} has none.",
            "Leave chat_template out, or take the tokenizer of a model that was trained on chats.",
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise InputError(f"{where}: tokenizer: expected one with a begin- or end-of-text token, found neither.")
    if (Path(folder) / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    elif options.max_length is not None:
        config = PretrainedConfig()
    else:
        raise InputError(
            f"{where}: tokenizer: expected a config.json in {folder}, which says the longest input, found none.",
            "Give max_length.",
        )
    return HFLM(
        pretrained=SimpleNamespace(device=device, config=config),
        backend="causal",
        tokenizer=tokenizer,
        max_length=options.max_length,
    )


def _build_requests(task: Any, reader: Any, options: LmEvalSettings, chosen: set[int] | None, where: str) -> None:
    try:
        task.build_all_requests(
            samples=chosen,
            system_instruction=options.system_instruction,
            apply_chat_template=options.chat_template,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            chat_template=reader.apply_chat_template if options.chat_template else None,
            tokenizer_name=reader.tokenizer_name if options.chat_template else "",
        )
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{where}: task: the requests of {options.task!r} cannot be built ({found}).") from error


def _remember(task: Any) -> None:
    """Have the task render each template of a document once, not again for each candidate."""
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        if hasattr(task, name):
            setattr(task, name, _remembered(getattr(task, name)))


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[int, tuple[Any, Any]] = {}

    def remembering(document: Any, *arguments: Any) -> Any:
        if arguments:
            return function(document, *arguments)
        if id(document) not in known:
            known[id(document)] = document, function(document)  # the document is kept, so that no other gets its id
        return known[id(document)][1]

    return remembering


def _aggregated(aggregate: Callable[..., Any], values: Sequence[Any]) -> float:
    """One number of all values; infinity where a perplexity is beyond floating point."""
    try:
        return number(aggregate(values), "the aggregate of the metric")
    except OverflowError:
        return math.inf


def _by_document(values: Sequence[Any], aggregate: Callable[..., Any]) -> np.ndarray[Any, np.dtype[Any]] | None:
    """(N,) one number a document; None where the metric has no meaning for a single one."""
    from lm_eval.api import metrics

    if aggregate is getattr(metrics, "nanmean", None):  # documents without a score are left out of the mean
        return None
    if aggregate in (metrics.perplexity, metrics.weighted_perplexity, metrics.bits_per_byte, metrics.brier_score):
        values = [_aggregated(aggregate, [value]) for value in values]
    if not all(isinstance(value, (int, float, np.number, np.bool_)) for value in values):
        return None
    found = np.asarray(values)
    return found.astype(bool) if bool(((found == 0) | (found == 1)).all()) else found.astype(np.float64)


def _is_sandboxed(options: LmEvalSettings) -> bool:
    return options.folder is not None and not options.allow_code


@contextmanager
def _installed(where: str) -> Iterator[None]:
    """Name the packages to install where lm-eval, or a package it needs for Hugging Face models, is missing."""
    try:
        import lm_eval.models.huggingface  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"{where}: type lm_eval needs lm-eval ({error}).", f"`{how_to_install('language')}`."
        ) from error
    yield


@contextmanager
def _as_lm_eval(sandboxed: bool) -> Iterator[None]:
    """The global generators seeded as ``simple_evaluate`` seeds them, and afterwards as they were.

    Templates, through which Jinja would reach all of Python, are rendered in its sandbox if ``sandboxed``.
    """
    from lm_eval import defaults, utils

    python, legacy = random.getstate(), np.random.get_state()
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    rendering = utils.env
    with torch.random.fork_rng(range(torch.cuda.device_count()) if started else ()):
        random.seed(defaults.DEFAULT_RANDOM_SEED)
        np.random.seed(defaults.DEFAULT_OTHER_SEED)
        torch.default_generator.manual_seed(defaults.DEFAULT_OTHER_SEED)
        if started:
            torch.cuda.manual_seed_all(defaults.DEFAULT_OTHER_SEED)
        try:
            utils.env = _sandbox(rendering) if sandboxed else rendering
            yield
        finally:
            utils.env = rendering
            random.setstate(python)
            np.random.set_state(legacy)


def _sandbox(rendering: Any) -> Any:
    from jinja2.sandbox import SandboxedEnvironment

    sandbox = SandboxedEnvironment(
        loader=rendering.loader, undefined=rendering.undefined, keep_trailing_newline=rendering.keep_trailing_newline
    )
    sandbox.filters |= rendering.filters
    return sandbox


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's progress bars and its warnings of settings that are meant here."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
