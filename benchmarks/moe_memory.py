"""Memory of a worker that merges a mixture of experts, whose checkpoints hold each expert by itself.

    python benchmarks/moe_memory.py             # 306 million parameters, two experts and a base, minutes
    python benchmarks/moe_memory.py --quick     # 8 million parameters

transformers stacks the experts of a layer into one parameter when it loads a checkpoint. A worker writes merged values
into slices of that parameter. So it has one model in memory, and no second copy while it loads, merges or scores. The
figures are the peaks of anonymous memory (RssAnon) beyond what the process took after imports, as shares of the model's
bytes; pages of checkpoint files do not count, as the system takes them back when memory is short. ``from_pretrained``
is transformers alone, which loads one of the checkpoints. ``backward`` is that model and a backward pass which frees
each gradient at once. glibc is told to give blocks of a megabyte back as soon as they are free.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from ecotone.populations.files import written_whole

RESULT = Path(__file__).parent / "results" / "moe_memory.json"
CONTENDERS = ("from_pretrained", "backward", "candidates", "gradient")


def anonymous() -> int:
    """Bytes of this process's memory that no file backs."""
    text = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon")))


class Peak:
    """The most anonymous memory while it watches, beyond the memory at its start."""

    def __enter__(self) -> Peak:
        self.start = self.most = anonymous()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.most = max(self.most, anonymous())

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, anonymous())


def configuration(quick: bool) -> Any:
    import transformers

    width, layers, experts = (128, 4, 16) if quick else (512, 24, 32)
    return transformers.Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=width,
        moe_intermediate_size=width // 2,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        num_experts=experts,
        num_experts_per_tok=4,
        dtype="bfloat16",
    )


def save(folder: Path, quick: bool) -> None:
    import transformers

    folder.mkdir()
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        with torch.device("cpu"):
            transformers.Qwen3MoeForCausalLM(configuration(quick)).to(torch.bfloat16).save_pretrained(folder / name)


def loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens).logits.float().logsumexp(-1).mean()


def measured(folder: Path, contender: str) -> dict[str, float]:
    import transformers

    from ecotone.fitness.backends.resident import Resident
    from ecotone.merging.sources import Sources
    from ecotone.populations.genome import Genome

    transformers.Qwen3MoeForCausalLM  # noqa: B018  (imports the module)
    tokens = torch.arange(1, 65).reshape(1, -1)
    if folder.name == "models":
        measured(folder.with_name("warm"), contender)  # compiles the loops that merge large models
    began = time.perf_counter()
    with Peak() as peak:
        if contender in ("from_pretrained", "backward"):
            model = transformers.Qwen3MoeForCausalLM.from_pretrained(folder / "a", dtype="auto")
            if contender == "backward":
                for parameter in model.parameters():
                    parameter.register_post_accumulate_grad_hook(lambda one: setattr(one, "grad", None))
                loss(model, tokens).backward()
        else:
            sources = Sources.open([folder / "a", folder / "b"], folder / "base", "task_arithmetic")
            resident = Resident(sources, "auto", torch.device("cpu"))
            genomes = [Genome.uniform(sources.layout.size, [share, 1 - share]) for share in (0.2, 0.6)]
            for genome in genomes:
                if contender == "gradient":
                    resident.gradient(genome, lambda shown: iter([loss(shown, tokens)]))
                else:
                    (model,) = resident.show([genome])
                    with torch.no_grad():
                        model(tokens)
    size = sum(file.stat().st_size for file in (folder / "a").glob("*.safetensors"))
    return {
        "peak_share": (peak.most - peak.start) / size,
        "model_mb": size / 1e6,
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, contender = options.measure
        print(json.dumps(measured(Path(folder), contender)))
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "models", options.quick)
        save(Path(folder) / "warm", quick=True)
        for contender in CONTENDERS:
            program = [sys.executable, __file__, "--measure", f"{folder}/models", contender]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_TRIM_THRESHOLD_": str(2**20)}
            done = subprocess.run(program, check=True, capture_output=True, text=True, env=environment)
            found[contender] = json.loads(done.stdout.splitlines()[-1])
            share, size = (found[contender][key] for key in ("peak_share", "model_mb"))
            print(f"{contender:16} peak {share:.2f} models of {size:.0f} MB")
    import transformers

    record = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__}, **found}
    if not options.quick:
        written_whole(RESULT, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
