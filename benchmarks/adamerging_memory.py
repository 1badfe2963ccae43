"""Memory and time of a step of AdaMerging, against the textbook implementation.

    python benchmarks/adamerging_memory.py             # K = 2, 4, 8 experts of an encoder of MiniLM's shape, minutes
    python benchmarks/adamerging_memory.py --quick     # a small encoder, K = 2, 4

The experts are a random BERT (six layers of 384, 22.7 million parameters, float32) plus noise, each with a task of its
own: random tokens and a random head. A step is one of Adam on coefficients by tensor and expert: a batch of each
task, the entropies' gradient, one update. Contenders:

- ecotone: ``Worker.measure`` on one gradient trial of all tasks (``together: K``), as for one worker
- ecotone, by task: on one gradient trial a task, as a search asks for them by default, which several workers share
- ecotone, checkpointing: by task, computing activations twice
- ecotone, streamed (CUDA only): by task, without keeping the experts' files on the device where they would fit
- textbook: ``theta_0 + sum_k lambda_k tau_k`` in autograd with all task vectors in memory, and one backward pass of
  the sum of all tasks' losses
- textbook, by task: the same with a backward pass a task, through a merge whose graph is kept

Each is measured in processes of its own: peak memory over two steps in one, the median seconds of its steps in
``--rounds`` others, in which contenders take turns. On a CPU memory is anonymous memory (RssAnon) beyond what the
process took after imports, with glibc told to give blocks of a megabyte back as soon as they are free, so that what
counts is what is used; pages of checkpoint files count for neither side, as the system takes them back when memory is
short. On CUDA it is ``max_memory_allocated``. The gradients of the first step are compared as well. ``ratio`` is to
ecotone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from materialise import save

from ecotone.fitness.backends.resident import ResidentSettings
from ecotone.fitness.gradients.calibration import EntropyLossSettings
from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker
from ecotone.merging import sources
from ecotone.merging.kernel import compiled
from ecotone.populations.genome import Floats, Genome
from ecotone.populations.trial import Gradient, Trial
from ecotone.settings import Call

CONTENDERS = (
    "ecotone",
    "ecotone, by task",
    "ecotone, checkpointing",
    "ecotone, streamed",
    "textbook",
    "textbook, by task",
)
CLASSES = 10
START = 0.3
RATE = 1e-3
Step = Callable[[int, Floats], Floats]
"""From the number of a step and (S, K) coefficients to (S, K) the gradient of the sum of all tasks' entropies."""


def main() -> None:
    arguments = parse()
    if arguments.contender:
        print(json.dumps(measured(arguments)))
        return
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        write_models(Path(directory), arguments)
        for count in arguments.experts:
            for row in compared(count, directory, arguments):
                rows.append(row)
                print_row(row, header=len(rows) == 1)
    save(f"adamerging_memory{'-quick' if arguments.quick else ''}", arguments, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8], help="numbers of experts (default 2 4 8)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the encoder (default 6)")
    parser.add_argument("--width", type=int, default=384, help="its hidden size (default 384)")
    parser.add_argument("--words", type=int, default=30_522, help="its vocabulary (default 30522)")
    parser.add_argument("--batch", type=int, default=16, help="texts of a task in a step (default 16)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a text (default 64)")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="processes a contender that time steps (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--directory", help="where to write the models (default: the temporary directory)")
    parser.add_argument("--quick", action="store_true", help="K = 2, 4, two layers of 128, 5000 words, 2 steps")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--measure", choices=["seconds", "megabytes"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.experts, arguments.steps, arguments.rounds = [2, 4], 2, 1
        arguments.layers, arguments.width, arguments.words = 2, 128, 5000
    return arguments


# -- models and tasks ----------------------------------------------------------------------------------------


def write_models(directory: Path, arguments: argparse.Namespace) -> None:
    """Write the base and the experts as Hugging Face directories ``0``, ``1``, ..."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=arguments.words,
        hidden_size=arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=max(1, arguments.width // 32),
        intermediate_size=4 * arguments.width,
    )
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    write_experts(transformers.BertModel(config), directory, max(arguments.experts), noise=0.01)


def write_experts(model: Any, directory: Path, experts: int, noise: float, dtype: torch.dtype = torch.float32) -> None:
    """Write a Hugging Face model as ``0``, and as ``1``, ``2``, ... with Gaussian noise on its weights."""
    base = {name: value.clone() for name, value in model.state_dict().items()}
    for number in range(experts + 1):
        torch.manual_seed(number)
        for name, value in model.named_parameters():
            value.data = base[name] + (0.0 if number == 0 else noise * torch.randn_like(value))
        model.to(dtype).save_pretrained(directory / str(number))


def tokens(task: int, words: int, length: int) -> dict[str, Tensor]:
    """256 random texts of a task."""
    generator = torch.Generator().manual_seed(task)
    ids = torch.randint(words, (256, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Head(nn.Module):
    """Logits of the mean of a text's features."""

    def __init__(self, task: int, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(task)
        self.weight = nn.Parameter(torch.randn(CLASSES, width, generator=generator) / width**0.5)

    def forward(self, outputs: Any, inputs: Any) -> Tensor:
        """(n, CLASSES) logits of the n texts."""
        return nn.functional.linear(outputs.last_hidden_state.mean(1), self.weight)


def tasks(arguments: argparse.Namespace) -> tuple[EntropyLossSettings, ...]:
    [count] = arguments.experts
    here = "adamerging_memory"
    return tuple(
        EntropyLossSettings(
            name=f"task {number}",
            data=Call(
                call=f"{here}:tokens",
                arguments={"task": number, "words": arguments.words, "length": arguments.length},
            ),
            head=Call(call=f"{here}:Head", arguments={"task": number, "width": arguments.width}),
            batch=arguments.batch,
        )
        for number in range(count)
    )


# -- contenders ----------------------------------------------------------------------------------------------


def ecotone(arguments: argparse.Namespace, name: str) -> tuple[Step, int]:
    """A step by gradient trials, and the number of segments."""
    specs, directory = tasks(arguments), Path(arguments.directory)
    paths = [str(directory / str(number)) for number in range(len(specs) + 1)]
    spec = WorkerSpec(
        tuple(paths[1:]),
        paths[0],
        "task_arithmetic",
        architecture="auto",
        calibration=specs,
        backend=ResidentSettings(checkpointing=name.endswith("checkpointing")),
        device=arguments.device,
        threads=arguments.threads,
        sources="mapped" if name.endswith("streamed") else "auto",
    )
    worker = Worker(spec)
    borders = worker._sources.layout.tensor_borders

    def step(number: int, coefficients: Floats) -> Floats:
        genome = Genome(borders, coefficients)
        names = tuple(task.name for task in specs)
        groups = [names] if name == "ecotone" else [(each,) for each in names]
        batches = [Gradient(group, number, (1.0,) * len(group)) for group in groups]
        evaluations = worker.measure([Trial(0, genome, wants=batch) for batch in batches])
        failures = [evaluation.failure for evaluation in evaluations if evaluation.failure]
        if failures:
            raise RuntimeError(failures[0].message + failures[0].details)
        return np.sum([evaluation.gradient for evaluation in evaluations], axis=0)

    return step, len(borders) - 1


class Merged(nn.Module):
    """The encoder with other weights than its own."""

    def __init__(self, encoder: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.encoder = [encoder]  # in a list: its own weights are not this module's parameters
        self.weights = weights

    def forward(self, **inputs: Tensor) -> Any:
        """What the encoder returns."""
        return torch.func.functional_call(self.encoder[0], self.weights, kwargs=inputs)


def textbook(arguments: argparse.Namespace, by_task: bool) -> tuple[Step, int]:
    """A step by autograd through the merge, and the number of segments."""
    import transformers
    from safetensors.torch import load_file

    device, directory = torch.device(arguments.device), Path(arguments.directory)
    torch.set_num_threads(arguments.threads)
    encoder = transformers.BertModel.from_pretrained(directory / "0").eval().requires_grad_(False).to(device)
    base = dict(encoder.named_parameters())
    specs = tasks(arguments)
    context = ObjectiveContext(device, torch.float32)
    made = [settings.build(context, 0) for settings in specs]
    vectors = []
    for number in range(1, len(specs) + 1):
        expert = load_file(directory / str(number) / "model.safetensors")
        vectors.append({name: expert[name].to(device) - value for name, value in base.items()})
        del expert
    names = sources.Sources.open([directory / "0"]).layout.tensors

    def step(number: int, coefficients: Floats) -> Floats:
        leaf = torch.tensor(coefficients, dtype=torch.float32, device=device, requires_grad=True)
        weights = {}
        for row, name in enumerate(names):
            weights[name] = base[name]
            for k, vector in enumerate(vectors):
                weights[name] = weights[name] + leaf[row, k] * vector[name]
        model = Merged(encoder, weights)
        losses = []
        for task in made:
            loss = task.loss(model, number)[0]
            if by_task:
                loss.backward(retain_graph=True)
            else:
                losses.append(loss)
            del loss
        if losses:
            torch.stack(losses).sum().backward()
        assert leaf.grad is not None
        return leaf.grad.double().cpu().numpy()

    return step, len(names)


# -- measuring -----------------------------------------------------------------------------------------------


def compared(count: int, directory: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender on ``count`` experts; they take turns, so that all see the same hours of the machine."""
    names = [name for name in CONTENDERS if arguments.device == "cuda" or not name.endswith("streamed")]
    rows = {name: in_own_process(name, "megabytes", count, directory, arguments) for name in names}
    gradients: dict[str, Floats] = {}
    for _ in range(arguments.rounds):
        for name in names:
            told = in_own_process(name, "seconds", count, directory, arguments)
            gradients[name] = np.array(told["gradient"])
            rows[name].setdefault("all_seconds", []).extend(told["seconds"])
    first, expected = rows[names[0]], gradients[names[0]]
    for name, row in rows.items():
        row["seconds"] = statistics.median(row["all_seconds"])
        row["gradient_difference"] = float(np.abs(gradients[name] - expected).max() / np.abs(expected).max())
        row["ratio"] = {key: row[key] / first[key] for key in ("megabytes", "seconds")}
    return [{"contender": name, "experts": count, **row} for name, row in rows.items()]


def in_own_process(
    name: str, measure: str, count: int, directory: str, arguments: argparse.Namespace
) -> dict[str, Any]:
    plain = ("layers", "width", "words", "batch", "length", "steps", "threads", "device")
    options = [part for key in plain for part in (f"--{key}", str(getattr(arguments, key)))]
    command = [sys.executable, __file__, *options, "--experts", str(count), "--directory", directory]
    environment = os.environ | {"OMP_NUM_THREADS": str(arguments.threads), "HF_HUB_OFFLINE": "1"}
    if measure == "megabytes":
        environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    command += ["--contender", name, "--measure", measure]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds or peak memory of one contender, and its first gradient."""
    import transformers  # what importing takes is not counted

    transformers.logging.disable_progress_bar()
    transformers.BertModel(
        transformers.BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    compiled.supports([torch.zeros(1)], [torch.zeros(1)])
    if arguments.device == "cuda":
        torch.cuda.init()
    name, before = arguments.contender, anonymous()
    if name.startswith("textbook"):
        step, segments = textbook(arguments, by_task=name.endswith("by task"))
    else:
        step, segments = ecotone(arguments, name)
    adam = Adam(np.full((segments, arguments.experts[0]), START))
    first = step(0, adam.values)
    adam.step(first)
    if arguments.measure == "megabytes":
        with Peak(arguments.device) as peak:
            for number in (1, 2):
                adam.step(step(number, adam.values))
        used = peak.bytes - (0 if arguments.device == "cuda" else before)
        return {"megabytes": used / 1e6, "megabytes_before": before / 1e6}
    seconds = []
    for number in range(1, arguments.steps + 1):
        began = time.perf_counter()
        adam.step(step(number, adam.values))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "gradient": first.tolist()}


class Adam:
    """Adam with its usual constants on an array."""

    def __init__(self, values: Floats) -> None:
        self.values = values
        self._mean, self._square, self._count = np.zeros_like(values), np.zeros_like(values), 0

    def step(self, gradient: Floats) -> None:
        """One update."""
        self._count += 1
        self._mean = 0.9 * self._mean + 0.1 * gradient
        self._square = 0.999 * self._square + 0.001 * gradient**2
        mean, square = self._mean / (1 - 0.9**self._count), self._square / (1 - 0.999**self._count)
        self.values = self.values - RATE * mean / (np.sqrt(square) + 1e-8)


class Peak:
    """Peak memory while the context lasts."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated()
            return
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/self/status: expected a line RssAnon (Linux 4.5 or later)")


def print_row(row: dict[str, Any], header: bool) -> None:
    if header:
        print(f"{'K':>2}  {'contender':24}{'MB':>8}{'ratio':>8}{'s a step':>10}{'ratio':>8}{'gradient':>12}")
    ratio = row["ratio"]
    print(
        f"{row['experts']:>2}  {row['contender']:24}{row['megabytes']:8.0f}{ratio['megabytes']:8.2f}"
        f"{row['seconds']:10.3f}{ratio['seconds']:8.2f}{row['gradient_difference']:12.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
