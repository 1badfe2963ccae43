"""How fast merged weights are formed, against a plain memory copy in the same run.

    python benchmarks/materialise.py                 # 256 MB a model, bfloat16 and float32, K = 2, 3, 8
    python benchmarks/materialise.py --quick         # 32 MB a model, a few seconds
    python benchmarks/materialise.py --size 1000     # MB a model

GB/s count every byte once: each source read and each candidate written. Sources are safetensors files that the page
cache holds; each repetition takes all contenders in turn, and the best time of each counts. Contenders:

- ecotone: ``Sources.materialise`` as installed (compiled loops where numba is there, CUDA tensors on a GPU)
- no numba: the same without compiled loops (CPU)
- torch loop: what a plain chunked loop of torch operations gets: widen, multiply, add, round, a million elements a time

``ratio`` is to the copy. What bounds it: float32, and one candidate in bfloat16, are near the memory traffic of the
copy. Eight candidates at once in bfloat16 read each source once from memory and form every candidate from cache, so
arithmetic is the bound: for each source and element a widening, a product and a sum (rounded one by one, so that every
backend gives the same bits), then rounding to bfloat16. Without numba every operation is a pass over the cache. On
CUDA the passes and launches of separate torch operations are the bound, or the bus, when the sources do not fit.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ecotone.merging.kernel import compiled
from ecotone.merging.sources import Sources
from ecotone.populations.files import written_whole
from ecotone.populations.genome import Genome

RESULTS = Path(__file__).parent / "results"
TENSOR = 4_194_304  # elements of one parameter tensor, 2048 x 2048
LOOP_CHUNK = 1_048_576


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            paths = write_models(Path(directory), max(arguments.sources), arguments.size * 10**6, dtype)
            for device in devices:
                for count in arguments.sources:
                    for candidates in (1, 8):
                        rows.append(measure(paths[:count], candidates, dtype, device, arguments.repeats))
                        print_row(rows[-1], header=len(rows) == 1)
    save(f"materialise-{'quick-' if arguments.quick else ''}{devices[-1]}", arguments, rows)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="MB of one model (default 256)")
    parser.add_argument("--sources", type=int, nargs="+", default=[2, 3, 8], help="numbers of models (default 2 3 8)")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions; the best counts (default 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads, for the copy as well")
    parser.add_argument("--directory", help="where to write the synthetic models (default: the temporary directory)")
    parser.add_argument("--quick", action="store_true", help="32 MB a model, 3 repetitions")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.repeats = 32, 3
    return arguments


def write_models(directory: Path, count: int, nbytes: int, dtype: torch.dtype) -> list[Path]:
    """Write synthetic checkpoints of about ``nbytes`` each."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(TENSOR, generator=generator).to(dtype).view(2048, 2048)
    tensors = max(1, round(nbytes / noise.nbytes))
    paths = [directory / f"model-{number}.safetensors" for number in range(count)]
    for number, path in enumerate(paths):
        save_file({f"layers.{i}.weight": noise.roll(1 + number + i).contiguous() for i in range(tensors)}, path)
    return paths


def measure(paths: list[Path], candidates: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, Any]:
    """GB/s of the copy and of every contender for one setting."""
    sources = Sources.open(paths)
    shapes = {name: info.shape for name, info in sources.layout.parameters.items()}
    out = [{n: torch.zeros(s, dtype=dtype, device=device) for n, s in shapes.items()} for _ in range(candidates)]
    weights = np.random.default_rng(0).dirichlet(np.ones(len(paths)), candidates)
    genomes = [Genome.uniform(sources.layout.size, row) for row in weights]
    one, two = (torch.zeros(sources.layout.size, dtype=dtype, device=device) for _ in range(2))
    element = sources.layout.size * dtype.itemsize
    moved = element * (len(paths) + candidates)
    contenders: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: two.copy_(one), 2 * element),
        "ecotone": (lambda: sources.materialise(genomes, out), moved),
    }
    if device == "cpu":
        contenders["no numba"] = (lambda: without_loops(sources, genomes, out), moved)
    contenders["torch loop"] = (lambda: torch_loop(sources, weights, out), moved)
    best = dict.fromkeys(contenders, float("inf"))
    for repeat in range(repeats + 1):  # the first run touches all memory and loads compiled code
        for name, (run, _) in contenders.items():
            seconds = timed(run, device)
            best[name] = seconds if repeat == 0 else min(best[name], seconds)
    speeds = {name: nbytes / best[name] / 1e9 for name, (_, nbytes) in contenders.items()}
    return {
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "sources": len(paths),
        "candidates": candidates,
        "gb_per_second": speeds,
        "ratio": {name: speed / speeds["copy"] for name, speed in speeds.items() if name != "copy"},
    }


def without_loops(sources: Sources, genomes: list[Genome], out: list[dict[str, Tensor]]) -> None:
    with patch.object(compiled, "supports", lambda *_: False):
        sources.materialise(genomes, out)


def torch_loop(sources: Sources, weights: np.ndarray, out: list[dict[str, Tensor]]) -> None:
    """The plain way: widen a chunk, multiply, add, round."""
    for name in sources.layout.tensors:
        device = out[0][name].device
        tensors = sources.near(name, device).tensors()
        for tensors_out, row in zip(out, weights.tolist(), strict=True):
            flat = tensors_out[name].view(-1)
            for low in range(0, flat.numel(), LOOP_CHUNK):
                part = slice(low, low + LOOP_CHUNK)
                total = tensors[0][part].to(device).float() * row[0]
                for tensor, weight in zip(tensors[1:], row[1:], strict=True):
                    total += tensor[part].to(device).float() * weight
                flat[part] = total.to(flat.dtype)


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def print_row(row: dict[str, Any], header: bool) -> None:
    names = ["copy", "ecotone", "no numba", "torch loop"]
    if header:
        print(f"{'device':6} {'dtype':9} {'K':>2} {'B':>2}  " + "  ".join(f"{name:>16}" for name in names))
        print(f"{'':22} " + "  ".join(f"{'GB/s (ratio)':>16}" for _ in names))
    cells = []
    for name in names:
        speed, ratio = row["gb_per_second"].get(name), row["ratio"].get(name, 1.0)
        cells.append(f"{'-':>16}" if speed is None else f"{speed:8.2f} ({ratio:5.2f})")
    left = f"{row['device']:6} {row['dtype']:9} {row['sources']:>2} {row['candidates']:>2}"
    print(f"{left}  " + "  ".join(f"{cell:>16}" for cell in cells), flush=True)


def save(name: str, arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write ``benchmarks/results/NAME.json``: the machine, what was asked for and what was measured."""
    record = {"machine": machine(), "arguments": vars(arguments), "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{name}.json"
    written_whole(target, json.dumps(record, indent=2, default=str) + "\n")
    print(f"written: benchmarks/results/{target.name}")


def machine() -> dict[str, str | int | None]:
    """What the numbers were measured on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    try:
        import numba

        versions["numba"] = numba.__version__
    except ImportError:
        versions["numba"] = "not installed"
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        **versions,
    }


def processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
