"""The real mergekit, run as a program of its own, makes of our files the weights that we export: the same bits.

ECOTONE_MERGEKIT is the Python of an environment that mergekit is installed in (`make mergekit` makes one), or its
`mergekit-yaml`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import drive
from safetensors.torch import load_file, save_file
from torch import Tensor

from ecotone.experiments.mergekit import mergekit_config
from ecotone.merging.export import export_directory
from ecotone.merging.models.matching import Treatment
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Genome
from ecotone.search.coefficients import parts_of

PROGRAM = os.environ.get("ECOTONE_MERGEKIT", "")
pytestmark = [
    pytest.mark.skipif(not PROGRAM, reason="ECOTONE_MERGEKIT names no mergekit; `make mergekit` installs one"),
    pytest.mark.timeout(900),
]
transformers = pytest.importorskip("transformers")

# One process for all merges: importing mergekit takes longer than to merge.
DRIVER = """
import json, sys
from mergekit.scripts.run_yaml import main

for config, out in json.loads(sys.argv[1]):
    options = ["--lora-merge-cache", sys.argv[2], "--lora-merge-dtype", "float32", "--quiet"]
    main([config, out, *options], standalone_mode=False)
"""


@dataclass(frozen=True)
class Case:
    """A merge, and the type that it is written in."""

    sources: Sources
    genome: Genome
    dtype: str
    snap: bool = False


def llamas(folder: Path, tied: bool, count: int = 4, **options: Any) -> list[Path]:
    """A base and experts with two layers of 32, in bfloat16."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return saved(transformers.LlamaForCausalLM, config, folder, count, **options)


def saved(kind: Any, config: Any, folder: Path, count: int = 4, **options: Any) -> list[Path]:
    paths = []
    for seed in range(count):
        torch.manual_seed(seed)
        paths.append(folder / f"model-{seed}")
        kind(config).to(torch.bfloat16).save_pretrained(paths[-1], **options)
    return paths


def drawn(borders: np.ndarray, columns: int, seed: int) -> Genome:
    return Genome(borders, np.random.default_rng(seed).normal(0.3, 0.4, (len(borders) - 1, columns)))


def by_component(models: Sources, seed: int, groups: int = 1) -> Genome:
    parts = parts_of(models.space(), "components", groups)
    rows = np.random.default_rng(seed).normal(0.3, 0.4, (len(parts), len(models.names)))
    return Genome(parts.borders, parts.expanded(rows))


def adapter(base: Path, folder: Path) -> Path:
    """A LoRA adapter of rank 2 on the attention's queries."""
    torch.manual_seed(9)
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 32), "B": (32, 2)}
    folder.mkdir()
    tensors = {name.format(i, part): torch.randn(shape) / 8 for i in range(2) for part, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


def tied_and_stored_twice(paths: list[Path]) -> list[Path]:
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return paths


def cases(folder: Path) -> dict[str, Case]:
    tied, untied = llamas(folder / "tied", True), llamas(folder / "untied", False, max_shard_size="20KB")
    twice = tied_and_stored_twice(llamas(folder / "twice", True))
    small = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    headless = saved(transformers.GPT2Model, small, folder / "gpt2")
    opened = {
        "tied": Sources.open(tied[1:], tied[0], "task_arithmetic"),
        "untied": Sources.open(untied[1:], untied[0], "task_arithmetic"),
    }
    found = {
        f"{name}, {granularity}, {dtype}": Case(models, drawn(borders, 3, seed), dtype)
        for name, models in opened.items()
        for seed, (granularity, borders) in enumerate(
            {
                "tensor": models.layout.tensor_borders,
                "block": models.layout.block_borders,
                "model": np.array([0, models.layout.size]),
            }.items()
        )
        for dtype in ("float32", "bfloat16")
    }
    soup = Sources.open(untied[1:])
    beside = Sources.open(untied[1:], untied[0], "linear")
    stored = Sources.open(twice[1:], twice[0], "task_arithmetic")
    gpt2 = Sources.open(headless[1:], headless[0], "task_arithmetic")
    arc = Sources.open(untied[1:3], operator="slerp", settings={"per": "tensor"})
    lora = Sources.open([adapter(tied[0], folder / "adapter"), tied[1]], tied[0], "task_arithmetic")
    crowd = llamas(folder / "crowd", True, 20)
    many = Sources.open(crowd[1:], crowd[0], "task_arithmetic")
    rng = np.random.default_rng(0)
    split = np.unique([0, *rng.integers(1, soup.layout.size, 30), soup.layout.size])
    still = Treatment(freeze=("*.mlp.up_proj.*", "*embed_tokens*"))
    frozen = Sources.open(untied[1:], untied[0], "task_arithmetic", treatment=still)
    headed = Sources.open(untied[1:], operator="linear", treatment=Treatment(only=("*self_attn*", "*norm*")))
    experts = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    mixtures = saved(transformers.MixtralForCausalLM, experts, folder / "mixture")
    routed = Sources.open(
        mixtures[1:], mixtures[0], "task_arithmetic", treatment=Treatment(freeze=("*.block_sparse_moe.gate.weight",))
    )
    return found | {
        "a mixture, its routers frozen": Case(routed, by_component(routed, 17), "bfloat16"),
        "components": Case(opened["untied"], by_component(opened["untied"], 12), "float32"),
        "components, tied": Case(opened["tied"], by_component(opened["tied"], 13), "bfloat16"),
        "components by groups": Case(opened["untied"], by_component(opened["untied"], 14, 2), "bfloat16"),
        "frozen": Case(frozen, by_component(frozen, 15), "bfloat16"),
        "frozen, no base": Case(headed, drawn(headed.layout.tensor_borders, 3, 16), "float32"),
        "experts alone": Case(soup, drawn(soup.layout.tensor_borders, 3, 5), "float32"),
        "a base that is not mixed": Case(beside, drawn(beside.layout.block_borders, 3, 6), "bfloat16"),
        "embeddings stored twice": Case(stored, drawn(stored.layout.tensor_borders, 3, 7), "bfloat16"),
        "names without a prefix": Case(gpt2, drawn(gpt2.layout.tensor_borders, 3, 8), "float32"),
        "snapped": Case(soup, drawn(split, 3, 9), "bfloat16", snap=True),
        "slerp": Case(
            arc, Genome(arc.layout.block_borders, np.linspace(0, 1, len(arc.layout.blocks))[:, None]), "float32"
        ),
        "20 models": Case(many, drawn(many.layout.tensor_borders, 19, 11), "float32"),
        "20 models, rounded": Case(many, drawn(many.layout.tensor_borders, 19, 11), "bfloat16"),
        "an adapter": Case(lora, drawn(lora.layout.block_borders, 2, 10), "float32"),
    }


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor], Path]]:
    """By case, what mergekit made, what we export, and where mergekit's is."""
    folder = tmp_path_factory.mktemp("mergekit")
    jobs, ours = [], {}
    for number, (name, case) in enumerate(cases(folder).items()):
        merge = mergekit_config(case.genome, case.sources, case.dtype, case.snap)
        config, out = folder / f"{number}.yaml", folder / f"merged-{number}"
        config.write_text(merge.text(name))
        jobs.append((str(config), str(out)))
        target = export_directory(case.sources, merge.genome, folder / f"ours-{number}", "", {}, case.dtype)
        ours[name] = load_file(target / "model.safetensors")
    drive(PROGRAM, DRIVER, json.dumps(jobs), folder / "adapters", folder=folder)
    results = {}
    for name, (_, out) in zip(ours, jobs, strict=True):
        tensors: dict[str, Tensor] = {}
        for file in Path(out).glob("*.safetensors"):
            tensors |= load_file(file)
        results[name] = (tensors, ours[name], Path(out))
    return results


NAMES = [
    f"{tied}, {granularity}, {dtype}"
    for tied in ("tied", "untied")
    for granularity in ("tensor", "block", "model")
    for dtype in ("float32", "bfloat16")
]
EXACT = [
    *NAMES,
    "a mixture, its routers frozen",
    "components",
    "components, tied",
    "components by groups",
    "frozen",
    "frozen, no base",
    "experts alone",
    "a base that is not mixed",
    "embeddings stored twice",
    "names without a prefix",
    "snapped",
    "slerp",
]


@pytest.mark.parametrize("name", EXACT)
def test_the_bits_are_ours(name: str, merged: Any) -> None:
    theirs, ours, _ = merged[name]
    theirs = {key.removeprefix("transformer."): tensor for key, tensor in theirs.items()}
    extra = set(theirs) - set(ours)
    assert extra <= {"lm_head.weight"}
    for key in extra:  # tied: a copy of the embeddings
        assert torch.equal(theirs[key], theirs["model.embed_tokens.weight"])
    for key, tensor in ours.items():
        assert theirs[key].dtype == tensor.dtype
        assert torch.equal(theirs[key], tensor), (
            f"{key}: {int((theirs[key] != tensor).sum())} of {tensor.numel()} differ"
        )


@pytest.mark.parametrize(("name", "close"), [("an adapter", 1e-6), ("20 models", 2e-6), ("20 models, rounded", 2**-7)])
def test_what_is_summed_otherwise_differs_in_last_bits(name: str, close: float, merged: Any) -> None:
    theirs, ours, _ = merged[name]
    total, apart, worst = 0, 0, 0.0
    for key, tensor in ours.items():
        gap = (theirs[key].float() - tensor.float()).abs()
        total, apart = total + tensor.numel(), apart + int((gap > 0).sum())
        worst = max(worst, float(gap.max() / tensor.float().abs().max()))
    print(f"{name}: {apart} of {total} elements differ, by at most {worst:.1e} of the tensor's largest")
    assert worst < close
    assert apart < total / 2


@pytest.mark.parametrize("name", ["tied, block, bfloat16", "untied, tensor, bfloat16"])
def test_the_result_loads(name: str, merged: Any) -> None:
    _, ours, place = merged[name]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(place, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    for key, tensor in ours.items():
        assert torch.equal(loaded.get_parameter(key), tensor)
