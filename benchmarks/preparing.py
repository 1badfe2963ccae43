"""What preparing the vectors of an operator costs: its time in evaluations, and its memory, measured and by formulas.

    nice python benchmarks/preparing.py                                     # all operators, 6 of 30 blocks, 15 minutes
    nice python benchmarks/preparing.py --operators regmean_pp --blocks 30

Models have the shape of SmolLM2-135M (``--blocks`` of its 30 blocks, and the whole table of embeddings) and random
weights in float32; experts are the base with noise on it, their texts random tokens. That is right for time and memory,
but for ``kfac``: how many steps its conjugate gradients take depends on the texts. Each operator is prepared in a
process of its own. An evaluation is a forward pass over the texts of all tasks, in the same process.

Seconds are those of stages: forward passes (``passes``), sums of second moments (``moments``), passes with graphs and
backward passes (``slopes``), what operators do with matrices (``solves``), and all else (``rest``: models are read and
vectors written). Bytes are those that no file backs, at their peak, less those before. What is freed goes back to the
system at once, which takes some time. The formulas are in ``preparing_costs.py``: operations by stage, and bytes by
what holds them. By them, what was measured is extended to all 30 blocks, and to a decoder of Llama's kind with 7
billion weights in bfloat16: each stage keeps the speed that it has here. Writes ``benchmarks/results/preparing.json``
and ``preparing.md``.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import preparing_costs as costs
from adamerging_memory import anonymous, write_experts
from materialise import machine
from merges import HERE, table, written
from preparing_costs import DATA, LLAMA_7B, OPERATORS, PARTS, SMOLLM2, STAGES, Job, Shape

from ecotone.fitness.gradients.calibration import EntropyLossSettings
from ecotone.fitness.preparing import blocks, depth, known, prepare
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.statistics import moments
from ecotone.merging import operators
from ecotone.merging.operators.whole import WholeMatrices
from ecotone.settings import Call

LARGE = {"examples": 256, "length": 128, "batch": 8, "element": 2}
"""The data of the model with 7 billion weights, and bytes of a weight."""


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    if arguments.operator:
        print(json.dumps(measured(arguments)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        write_models(Path(directory), shape_of(arguments), arguments.experts)
        for operator in arguments.operators:
            rows.append(row(in_own_process(arguments, operator, directory), arguments))
            print(f"{operator}: {rows[-1]['seconds']:.0f} s, {rows[-1]['bytes'] / 1e6:.0f} MB", flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "directory", "operator")}
    load = os.getloadavg()[-1]
    text = told(rows, arguments, load)
    record = {"machine": machine(), "load": load, "settings": settings, "large": LARGE, "rows": rows}
    written(arguments.out, record, text)
    print(f"\n{text}")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="+", default=list(OPERATORS), choices=OPERATORS)
    parser.add_argument("--experts", type=int, default=2, help="how many (default 2)")
    parser.add_argument("--examples", type=int, default=16, help="texts of each expert (default 16)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (default 64)")
    parser.add_argument("--batch", type=int, default=8, help="texts in a pass (default 8)")
    parser.add_argument("--passes", type=int, default=4, help="backward passes a batch (default 4)")
    parser.add_argument("--blocks", type=int, default=6, help=f"of the {SMOLLM2.blocks} blocks (default 6)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--directory", help="where to write the models (default: the temporary directory)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "preparing.json")
    parser.add_argument("--operator", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def shape_of(arguments: argparse.Namespace) -> Shape:
    """SmolLM2's, with some of its blocks."""
    return replace(SMOLLM2, blocks=arguments.blocks)


# -- models and texts ----------------------------------------------------------------------------------------


def write_models(directory: Path, shape: Shape, experts: int) -> None:
    """A random decoder of this shape as ``0``, and experts near it as ``1``, ``2``, ..."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    write_experts(transformers.LlamaForCausalLM(config), directory, experts, noise=0.002)


def tokens(seed: int, words: int, length: int, count: int) -> dict[str, Tensor]:
    """So many random texts."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (count, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# -- stages -------------------------------------------------------------------------------------------------


class Clock:
    """Seconds by stage: of stages in each other, each second counts for the inner one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.stage = "rest"
        self._since = time.perf_counter()

    def _turn(self, stage: str) -> str:
        now = time.perf_counter()
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + now - self._since
        self._since, before, self.stage = now, self.stage, stage
        return before

    @contextmanager
    def lap(self, stage: str) -> Iterator[None]:
        """Count what happens meanwhile for a stage."""
        before = self._turn(stage)
        try:
            yield
        finally:
            self._turn(before)

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, counted for a stage."""

        @wraps(function)
        def lapped(*given: Any, **named: Any) -> Any:
            with self.lap(stage):
                return function(*given, **named)

        return lapped

    def each(self, stage: str, function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The generator function, whose steps are counted for a stage."""

        @wraps(function)
        def lapped(*given: Any, **named: Any) -> Iterator[Any]:
            steps = function(*given, **named)
            while True:
                with self.lap(stage):
                    step = next(steps, None)
                if step is None:
                    return
                yield step

        return lapped


@contextmanager
def clocked(clock: Clock, operator: type[WholeMatrices]) -> Iterator[None]:
    """Time the stages of preparing."""
    each, take_squares = moments._each_slope, moments.squares

    def each_slope(model: Any, layers: Any, data: Any, settings: Any, take: Any) -> None:
        each(model, layers, data, settings, clock.timed("moments", take))

    def squares(found: Any) -> Any:
        return clock.timed("moments", take_squares(found))

    beside = known.beside

    def timed_beside(own: Any, found: Any) -> Any:
        return clock.timed("moments", beside(own, found))

    places: list[tuple[Any, str, Any]] = [
        (moments, "_each_slope", each_slope),
        *((owner, "squares", squares) for owner in (moments, depth)),
        *((owner, "beside", timed_beside) for owner in (known, depth)),
        (operator, "layer", clock.timed("solves", operator.layer)),
        *((owner, "slopes_and_fisher", clock.timed("slopes", known.slopes_and_fisher)) for owner in (depth, prepare)),
        (depth, "called", clock.timed("passes", known.called)),
        (depth, "before_blocks", clock.timed("passes", blocks.before_blocks)),
        (blocks.Standing, "passes", clock.each("passes", blocks.Standing.passes)),
    ]
    for name in ("inputs_over", "outputs_by_row", "outputs_over"):
        places += [(owner, name, clock.timed("passes", getattr(known, name))) for owner in (depth, prepare)]
    with ExitStack() as patched:
        for owner, name, timed in places:
            if hasattr(owner, name):
                patched.enter_context(patch.object(owner, name, timed))
        yield


class Peak:
    """The most memory by stage while the context lasts."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self.bytes = clock, dict[str, int]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            stage = self._clock.stage
            self.bytes[stage] = max(self.bytes.get(stage, 0), anonymous())


# -- measuring -----------------------------------------------------------------------------------------------


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """What one operator takes."""
    import transformers

    transformers.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    name, directory = arguments.operator, Path(arguments.directory)
    forward = evaluation(arguments)
    gc.collect()
    before = anonymous()
    spec = spec_of(arguments)
    operator = type(operators.get(name, spec.settings))
    clock = Clock()
    os.environ["ECOTONE_CACHE"] = str(directory / f"cache-{name}")
    with Peak(clock) as peak, clocked(clock, operator):
        began = time.perf_counter()
        basis = prepare.basis_of(spec)
        seconds = time.perf_counter() - began
        clock.lap("end").__enter__()
    layers = basis.record["layers"].values()
    steps = [one["steps"] for one in layers if "steps" in one]
    clock.seconds.pop("end", None)
    return {
        "operator": name,
        "evaluation": forward,
        "seconds": seconds,
        "stages": clock.seconds,
        "bytes": max(peak.bytes.values()) - before,
        "bytes_by_stage": {stage: found - before for stage, found in peak.bytes.items()},
        "before": before,
        "basis": basis.nbytes,
        "steps": statistics.fmean(steps) if steps else None,
        "error": max((one["error"] for one in layers if "error" in one), default=None),
    }


def spec_of(arguments: argparse.Namespace) -> WorkerSpec:
    """The operator's models and data."""
    directory = Path(arguments.directory)
    experts = tuple(str(directory / str(number)) for number in range(1, arguments.experts + 1))
    count, length = arguments.examples, arguments.length
    tasks = [
        EntropyLossSettings(
            name=str(number),
            data=Call(
                call="preparing:tokens",
                arguments={"seed": number, "words": SMOLLM2.vocabulary, "length": length, "count": count},
            ),
            batch=arguments.batch,
        )
        for number in range(1, arguments.experts + 1)
    ]
    with_data = arguments.operator in DATA
    settings: dict[str, Any] = {"examples": count, "batch": arguments.batch} if with_data else {}
    if arguments.operator in ("kfac", "fisher"):
        settings["passes"] = arguments.passes
    return WorkerSpec(
        experts,
        str(directory / "0"),
        arguments.operator,
        settings,
        architecture="auto" if with_data else None,
        calibration=tuple(tasks) if with_data else (),
        threads=arguments.threads,
    )


def evaluation(arguments: argparse.Namespace) -> float:
    """Seconds of a forward pass over the examples of all tasks."""
    import transformers

    model = transformers.LlamaForCausalLM.from_pretrained(Path(arguments.directory) / "0").eval()
    texts = [
        tokens(number, SMOLLM2.vocabulary, arguments.length, arguments.examples)
        for number in range(1, arguments.experts + 1)
    ]
    found = []
    with torch.no_grad():
        for _ in range(2):
            began = time.perf_counter()
            for inputs in texts:
                for low in range(0, arguments.examples, arguments.batch):
                    model(**{key: one[low : low + arguments.batch] for key, one in inputs.items()}, use_cache=False)
            found.append(time.perf_counter() - began)
    return min(found)


def in_own_process(arguments: argparse.Namespace, operator: str, directory: str) -> dict[str, Any]:
    plain = ("experts", "examples", "length", "batch", "passes", "blocks", "threads")
    options = [part for key in plain for part in (f"--{key}", str(getattr(arguments, key)))]
    command = [sys.executable, __file__, *options, "--operator", operator, "--directory", directory]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


# -- tables --------------------------------------------------------------------------------------------------


def row(found: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """What was measured, beside what the formulas say of it, of the whole model, and of the large one."""
    plain = {key: getattr(arguments, key) for key in ("experts", "examples", "length", "batch", "passes")}
    steps = {"steps": found["steps"]} if found["steps"] is not None else {}
    job = Job(found["operator"], shape_of(arguments), **plain, **steps)
    whole, large = replace(job, shape=SMOLLM2), replace(job, shape=LLAMA_7B, **LARGE)
    return {
        **found,
        "predicted": facts(job),
        "whole": {**facts(whole), **extended(found, job, whole)},
        "large": {**facts(large), **extended(found, job, large)},
    }


def facts(job: Job) -> dict[str, Any]:
    """Operations and bytes of a job, by the formulas."""
    return {
        "operations": costs.operations(job),
        "evaluation_operations": costs.evaluation(job),
        "peak": costs.peak(job),
        "basis": costs.basis_bytes(job),
    }


def extended(found: dict[str, Any], job: Job, other: Job) -> dict[str, Any]:
    """Seconds of another job, at the speeds that were measured."""
    evaluated = found["evaluation"] * costs.evaluation(other) / costs.evaluation(job)
    return {"stages": costs.scaled(found["stages"], job, other), "evaluation": evaluated}


def told(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace, load: float) -> str:
    """The three tables in Markdown."""
    shown = f"{arguments.blocks} of {SMOLLM2.blocks} blocks" if arguments.blocks < SMOLLM2.blocks else "all blocks"
    texts = f"{arguments.experts} experts with {arguments.examples} texts of {arguments.length} tokens each"
    cores = f"{arguments.threads} thread{'s' if arguments.threads > 1 else ''}"
    large = f"{LARGE['examples']} texts of {LARGE['length']} tokens each"
    return "\n\n".join(
        [
            f"Preparing the vectors of models of SmolLM2-135M's shape ({shown}, random weights, float32), {texts}, "
            f"{cores}, load average {load:.1f} on {os.cpu_count()} cores: ratios say more than "
            "seconds. Seconds by stage; the last column is an extension by formulas.",
            table(["operator", *STAGES, "rest", "all, s", "evaluation, s", "evaluations", "of 30 blocks"], times(rows)),
            "Memory that no file backs, in MB: what holds it by the formulas, and what was measured.",
            table(["operator", *PARTS, "sum", "measured", "measured / sum", "basis on disk"], memories(rows)),
            f"A decoder of Llama's kind with 6.7 billion weights in bfloat16, {large}, by the formulas: hours at the "
            f"speeds above ({cores}), memory and disk in GB. How many steps `kfac` takes there is not known: as many "
            "as here are counted.",
            table(
                [
                    *("operator", *(f"{stage}, h" for stage in STAGES), "all, h", "evaluation, h", "evaluations"),
                    *("PFLOP", *(f"{part}, GB" for part in PARTS), "sum, GB", "basis, GB"),
                ],
                larges(rows),
            ),
        ]
    )


def times(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of the first table."""
    found = []
    for one in rows:
        stages, whole = one["stages"], one["whole"]
        every = sum(whole["stages"].values()) / whole["evaluation"]
        cells = [f"{stages.get(stage, 0):.1f}" for stage in (*STAGES, "rest")]
        total = f"{one['seconds']:.0f}"
        ratio = f"{one['seconds'] / one['evaluation']:.0f}"
        found.append([one["operator"], *cells, total, f"{one['evaluation']:.1f}", ratio, f"{every:.0f}"])
    return found


def memories(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of the second table."""
    found = []
    for one in rows:
        parts = one["predicted"]["peak"]
        total = sum(parts.values())
        cells = [f"{parts[part] / 1e6:.0f}" for part in PARTS]
        measured_bytes = [f"{one['bytes'] / 1e6:.0f}", f"{one['bytes'] / total:.2f}", f"{one['basis'] / 1e6:.0f}"]
        found.append([one["operator"], *cells, f"{total / 1e6:.0f}", *measured_bytes])
    return found


def larges(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Lines of the third table."""
    found = []
    for one in rows:
        large = one["large"]
        stages, parts, total = large["stages"], large["peak"], sum(large["stages"].values())
        cells = [f"{stages.get(stage, 0) / 3600:.1f}" for stage in STAGES]
        cells += [f"{total / 3600:.1f}", f"{large['evaluation'] / 3600:.1f}", f"{total / large['evaluation']:.0f}"]
        cells += [f"{sum(large['operations'].values()) / 1e15:.1f}"]
        cells += [f"{parts[part] / 1e9:.1f}" for part in PARTS]
        found.append([one["operator"], *cells, f"{sum(parts.values()) / 1e9:.1f}", f"{large['basis'] / 1e9:.1f}"])
    return found


if __name__ == "__main__":
    main()
