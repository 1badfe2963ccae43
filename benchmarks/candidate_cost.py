"""What a candidate costs on multiple-choice questions, and where its time goes, against evolution through files.

    python benchmarks/candidate_cost.py                  # 25M parameters, 3 experts and a base, 200 questions, minutes
    python benchmarks/candidate_cost.py --words 20 150   # and the same with long questions

A random Llama and a tokenizer trained in memory; 200 questions of four choices (by default of the lengths of ARC's:
20 words and 1 to 6 words), a local task of lm-eval and a file of ``multiple_choice``. All ways score the same merges
(task arithmetic, a coefficient for each tensor and expert), each candidate by every way in turn:

- disk: the merge written as a checkpoint, and ``lm_eval.simple_evaluate`` loading it, as evolution through files does
- memory: the merge put into a resident model, and ``simple_evaluate`` around that
- lm_eval: ``Worker.measure`` with the objective ``lm_eval``
- plain: with ``multiple_choice``, each choice read with its question
- reuse: with ``multiple_choice``, a question read once for all its choices
- call: as ``reuse``, from a Python function of the user's, which another one follows: with guards around both

``materialise`` is forming the weights and giving them to the model, for ``disk`` writing them too; ``forward`` is time
inside the model's ``forward``; ``rest`` is everything else, for the first two with lm-eval's report of the machine (it
runs pip and git), shown by itself as well; ``guards`` is a part of the rest: comparing the model and the process with
their states before each call of user code. Merging is ours for all ways, so ``disk`` is cheaper than with a merge that
reads and writes files. All are medians over the candidates. ``times`` is how many times faster than ``disk`` and
``memory``, the medians of the ratios by candidate; the last two columns leave lm-eval's report out.

The ways through lm-eval must give the same score, all ways the same verdict on every question (lm-eval rounds
log-likelihoods to the model's type, so questions are taken on which the models are sure).
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))
from adamerging_memory import write_experts
from materialise import save

from ecotone.fitness.guards import Guards
from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.language.choices import MultipleChoice, MultipleChoiceSettings
from ecotone.fitness.registry import OBJECTIVES
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.surroundings import Surroundings
from ecotone.fitness.worker import Worker
from ecotone.populations.genome import Genome
from ecotone.populations.trial import Trial

WAYS = ("disk", "memory", "lm_eval", "plain", "reuse", "call")
PARTS = ("materialise", "forward", "rest", "report", "guards")
EXPERTS = 3
CHOICES = 4
TASK = "questions"
GUARDS = (
    *((Guards, name) for name in ("begin", "shown", "watch", "after")),
    *((Surroundings, name) for name in ("begin", "after")),
)
"""The methods that guards spend their time in."""
Clock: TypeAlias = dict[str, float]
"""Seconds by part; ``report`` and ``guards`` are parts of the rest."""
Way: TypeAlias = Callable[[Genome, Clock], float]
"""Scores a merge and adds to the clock."""


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    rows: list[dict[str, Any]] = []
    for length in arguments.words:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            found = measured(Path(directory), length, arguments)
        for row in found:
            print_row(row, header=not rows)
            rows.append(row)
    save(f"candidate_cost{'-quick' if arguments.quick else ''}", arguments, rows)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--words", type=int, nargs="+", default=[20], help="words of a question (default 20)")
    parser.add_argument("--questions", type=int, default=200, help="questions (default 200)")
    parser.add_argument("--candidates", type=int, default=7, help="that are timed, after one that is not (default 7)")
    parser.add_argument("--layers", type=int, default=8, help="layers of the model (default 8)")
    parser.add_argument("--width", type=int, default=384, help="its hidden size (default 384)")
    parser.add_argument("--vocabulary", type=int, default=8192, help="its tokens (default 8192)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="its type")
    parser.add_argument("--batch", type=int, default=32, help="rows in a pass of lm-eval (default 32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads (default: all cores)")
    parser.add_argument("--directory", help="where to write the models (default: the temporary directory)")
    parser.add_argument("--quick", action="store_true", help="a model of two layers of 128, 40 questions, 3 candidates")
    arguments = parser.parse_args(words)
    if arguments.quick:
        arguments.layers, arguments.width, arguments.vocabulary = 2, 128, 2048
        arguments.questions, arguments.candidates = 40, 3
    return arguments


# -- models and questions ------------------------------------------------------------------------------------


def write_models(directory: Path, vocabulary: list[str], arguments: argparse.Namespace) -> None:
    """The base and the experts as Hugging Face directories ``0``, ``1``, ..., each with the tokenizer."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=arguments.vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([f"Question: {word}\nAnswer: {word}" for word in vocabulary], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 64),
        intermediate_size=4 * arguments.width,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=1,
    )
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    model.lm_head.weight.data *= 10  # so that it prefers some words
    write_experts(model, directory, EXPERTS, noise=0.002, dtype=getattr(torch, arguments.dtype))
    for number in range(EXPERTS + 1):
        tokenizer.save_pretrained(directory / str(number))


def invented(count: int) -> list[str]:
    """So many words."""
    rng = np.random.default_rng(0)
    syllables = [first + second for first in "bdfghjklmnprstvz" for second in "aeiou"]
    return sorted({"".join(rng.choice(syllables, rng.integers(2, 4))) for _ in range(count)})


def write_questions(directory: Path, length: int, vocabulary: list[str], arguments: argparse.Namespace) -> None:
    """``questions.jsonl`` and lm-eval's task: of three times as many those on which the average merge is surest."""
    rng = np.random.default_rng(1)

    def phrase(least: int, most: int) -> str:
        return " ".join(rng.choice(vocabulary, rng.integers(least, most + 1)))

    made = [
        {
            "question": phrase(max(1, length // 2), length + length // 2),
            "choices": [phrase(1, 6) for _ in range(CHOICES)],
            "answer": int(rng.integers(CHOICES)),
        }
        for _ in range(3 * arguments.questions)
    ]
    file = directory / f"{TASK}.jsonl"
    write_lines(file, made)
    settings = {"data": str(file), "reuse": False}
    context = ObjectiveContext(torch.device("cpu"), tokenizer=str(directory / "0"))
    asked = MultipleChoiceSettings(name="sure", type="multiple_choice", **settings).build(context)
    worker = worker_of(directory, "multiple_choice", settings, arguments)
    genome = Genome.uniform(worker._backend._sources.layout.size, [1 / EXPERTS] * EXPERTS)
    likelihoods = asked.likelihoods(next(worker._backend.show([genome]))).reshape(-1, CHOICES)
    ordered = np.sort(likelihoods, axis=1)
    for number in np.flatnonzero(rng.random(len(made)) < 0.5).tolist():  # or no model would know more than chance
        made[number]["answer"] = int(likelihoods[number].argmax())
    surest = np.argsort(ordered[:, -2] - ordered[:, -1], kind="stable")[: arguments.questions]
    write_lines(file, [made[number] for number in np.sort(surest).tolist()])
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(directory / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (directory / "tasks").mkdir()
    (directory / "tasks" / f"{TASK}.yaml").write_text(yaml.safe_dump(task), "utf-8")


def write_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


# -- ways ----------------------------------------------------------------------------------------------------


@cache
def asked(data: str, tokenizer: str) -> MultipleChoice:
    """The questions, tokenised once."""
    settings = MultipleChoiceSettings(name="right", type="multiple_choice", data=data)
    return settings.build(ObjectiveContext(torch.device("cpu"), tokenizer=tokenizer))


def answered(model: Any, data: str, tokenizer: str) -> tuple[float, Any]:
    """The user's function of the way ``call``."""
    score = asked(data, tokenizer).score(model)
    return score.value, score.per_example


def followed(model: Any) -> float:
    """Another one, so that the weights are compared between the two."""
    return float(model.training)


def worker_of(
    directory: Path, kind: str, settings: dict[str, Any], arguments: argparse.Namespace, *others: Any
) -> Worker:
    paths = [str(directory / str(number)) for number in range(EXPERTS + 1)]
    objective = OBJECTIVES.get(kind, "kind")(name="right", type=kind, **settings)
    return Worker(
        WorkerSpec(
            tuple(paths[1:]),
            paths[0],
            "task_arithmetic",
            architecture="auto",
            search=(objective, *others),
            tokenizer=paths[0],
            device="cpu",
            threads=arguments.threads,
        )
    )


class Ways:
    """Every way of scoring a merge.

    Args:
        directory: Holds models and questions.
        arguments: The command line's.
    """

    def __init__(self, directory: Path, arguments: argparse.Namespace) -> None:
        from lm_eval.tasks import TaskManager

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        self._clock: Clock = {}
        self._forward = self._patched()  # before the workers look at the model's methods, which they put back
        tasks = {"task": TASK, "folder": str(directory / "tasks"), "batch": arguments.batch}
        data = {"data": str(directory / f"{TASK}.jsonl")}
        self._workers = {
            "lm_eval": worker_of(directory, "lm_eval", tasks, arguments),
            "plain": worker_of(directory, "multiple_choice", {**data, "reuse": False}, arguments),
            "reuse": worker_of(directory, "multiple_choice", data, arguments),
            "call": worker_of(
                directory,
                "call",
                {"call": f"{__file__}:answered", "arguments": {**data, "tokenizer": str(directory / "0")}},
                arguments,
                OBJECTIVES.get("call", "kind")(name="followed", type="call", call=f"{__file__}:followed"),
            ),
        }
        self._manager = TaskManager(include_path=tasks["folder"], include_defaults=False)
        self._directory, self._arguments = directory, arguments
        shutil.copytree(directory / "0", directory / "merged", ignore=shutil.ignore_patterns("*.safetensors"))
        self.borders = self._workers["plain"]._backend._sources.layout.tensor_borders
        self.parameters = int(self.borders[-1])

    def score(self, way: str, genome: Genome, samples: bool = False) -> tuple[Clock, float, list[bool]]:
        """Seconds by part, the score, and whether each question is answered right (of lm-eval if ``samples``)."""
        clock = dict.fromkeys(PARTS, 0.0)
        with self._timed(clock), redirect_stderr(io.StringIO()):  # progress bars
            began = time.perf_counter()
            if way in self._workers:
                value, right = self._ours(self._workers[way], genome, clock)
            else:
                value, right = self._theirs(way, genome, samples, clock)
            total = time.perf_counter() - began
        clock["rest"] = total - clock["materialise"] - clock["forward"]
        return clock, value, right

    def _ours(self, worker: Worker, genome: Genome, clock: Clock) -> tuple[float, list[bool]]:
        shown = worker._backend.show

        def show(genomes: Sequence[Genome]) -> Iterator[Any]:
            with lap(clock, "materialise"):
                models = shown(genomes)
            for _ in genomes:
                with lap(clock, "materialise"):
                    model = next(models)
                yield model

        with patch.object(worker._backend, "show", show):
            [evaluation] = worker.measure([Trial(0, genome)])
        if evaluation.failure:
            raise RuntimeError(evaluation.failure.message + evaluation.failure.details)
        return evaluation.scores["right"], evaluation.per_example["right"].tolist()

    def _theirs(self, way: str, genome: Genome, samples: bool, clock: Clock) -> tuple[float, list[bool]]:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        merged, batch = str(self._directory / "merged"), self._arguments.batch
        with lap(clock, "materialise"):
            model = next(self._workers["lm_eval"]._backend.show([genome]))
            if way == "disk":
                model.save_pretrained(merged)
        model = HFLM(pretrained=model, tokenizer=merged, batch_size=batch) if way == "memory" else "hf"
        found = simple_evaluate(
            model=model,
            model_args={"pretrained": merged, "dtype": self._arguments.dtype} if way == "disk" else None,
            tasks=[TASK],
            batch_size=batch,
            device="cpu",
            task_manager=self._manager,
            bootstrap_iters=0,
            log_samples=samples,
        )
        right = sorted(found["samples"][TASK], key=lambda sample: sample["doc_id"]) if samples else []
        return float(found["results"][TASK]["acc,none"]), [bool(sample["acc"]) for sample in right]

    def close(self) -> None:
        """Leave the model's class as it was."""
        self._forward.stop()

    def _patched(self) -> Any:
        """The patch that times the models' ``forward``."""
        from transformers import LlamaForCausalLM

        forward = LlamaForCausalLM.forward

        @wraps(forward)
        def timed(*given: Any, **named: Any) -> Any:
            with lap(self._clock, "forward"):
                return forward(*given, **named)

        patching = patch.object(LlamaForCausalLM, "forward", timed)
        patching.start()
        return patching

    @contextmanager
    def _timed(self, clock: Clock) -> Iterator[None]:
        """Time the models' ``forward``, lm-eval's report of the machine, and guards."""
        from lm_eval import evaluator

        def kept(function: Callable[..., Any], part: str) -> Callable[..., Any]:
            @wraps(function)
            def timed(*given: Any, **named: Any) -> Any:
                with lap(clock, part):
                    return function(*given, **named)

            return timed

        self._clock = clock
        with ExitStack() as patched:
            patched.enter_context(patch.object(evaluator, "add_env_info", kept(evaluator.add_env_info, "report")))
            for owner, name in GUARDS:
                patched.enter_context(patch.object(owner, name, kept(getattr(owner, name), "guards")))
            yield


@contextmanager
def lap(clock: Clock, part: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    clock[part] = clock.get(part, 0.0) + time.perf_counter() - began


# -- measuring -----------------------------------------------------------------------------------------------


def measured(directory: Path, length: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way."""
    vocabulary = invented(arguments.vocabulary * 3 // 4)
    write_models(directory, vocabulary, arguments)
    write_questions(directory, length, vocabulary, arguments)
    ways, rng = Ways(directory, arguments), np.random.default_rng(2)
    try:
        return scored(ways, length, rng, arguments)
    finally:
        ways.close()


def scored(ways: Ways, length: int, rng: np.random.Generator, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a way, from the same candidates."""
    clocks: dict[str, list[Clock]] = {way: [] for way in WAYS}
    scores: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(arguments.candidates + 1):  # the first one loads code and settles what is to be settled
        genome = Genome(ways.borders, rng.uniform(0.2, 0.5, (len(ways.borders) - 1, EXPERTS)))
        verdicts = {}
        for way in WAYS:
            clock, score, verdicts[way] = ways.score(way, genome, samples=number == 0)
            scores[way].append(score)
            if number:
                clocks[way].append(clock)
        check(scores, verdicts if number == 0 else {way: verdicts[way] for way in WAYS[2:]}, number)
    return [row(way, length, clocks, scores[way], ways.parameters) for way in WAYS]


def check(scores: dict[str, list[float]], verdicts: dict[str, list[bool]], number: int) -> None:
    """Raise ``RuntimeError`` unless all ways say the same of a candidate."""
    found = {way: each[number] for way, each in scores.items()}
    apart = {way: sum(a != b for a, b in zip(each, verdicts["lm_eval"], strict=True)) for way, each in verdicts.items()}
    if len(set(found.values())) > 1 or any(apart.values()):
        raise RuntimeError(f"candidate {number}: expected one score of all ways, found {found}; apart on {apart}")


def row(way: str, length: int, clocks: dict[str, list[Clock]], scores: list[float], parameters: int) -> dict[str, Any]:
    own = clocks[way]
    seconds = {part: statistics.median(clock[part] for clock in own) for part in PARTS}
    shares = {part: statistics.median(clock[part] / clock["forward"] for clock in own) for part in PARTS}
    return {
        "way": way,
        "words": length,
        "parameters": parameters,
        "scores": scores,
        "seconds": {"total": statistics.median(map(total, own)), **seconds},
        "of_forward": {part: shares[part] for part in ("materialise", "rest", "guards")},
        "times": {
            f"{other}{'' if whole else ', no report'}": statistics.median(
                (total(theirs) - (0 if whole else theirs["report"])) / total(ours)
                for theirs, ours in zip(clocks[other], own, strict=True)
            )
            for whole in (True, False)
            for other in WAYS[:2]
        },
        "all_seconds": own,
    }


def total(clock: Clock) -> float:
    return clock["materialise"] + clock["forward"] + clock["rest"]


def print_row(row: dict[str, Any], header: bool) -> None:
    if header:
        print(
            f"{'words':>5}  {'way':8}{'total s':>9}{'materialise':>18}{'forward':>9}{'rest':>18}{'report':>8}"
            f"{'guards':>18}"
            f"{'disk':>9}{'memory':>8}{'disk*':>8}{'memory*':>8}"
        )
    seconds, shares = row["seconds"], row["of_forward"]
    cells = [f"{seconds[part]:9.3f} ({shares[part]:6.1%})" for part in ("materialise", "rest")]
    guards = f"{seconds['guards']:9.5f} ({shares['guards']:6.2%})"
    print(
        f"{row['words']:>5}  {row['way']:8}{seconds['total']:9.3f}{cells[0]:>18}{seconds['forward']:9.3f}{cells[1]:>18}"
        f"{seconds['report']:8.3f}{guards:>18} " + "".join(f"{value:8.2f}" for value in row["times"].values()),
        flush=True,
    )


if __name__ == "__main__":
    main()
