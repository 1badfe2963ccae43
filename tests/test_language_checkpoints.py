"""Hugging Face causal language models through a merge: tied or not, in one file or several, of one type or several."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_directory
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Genome

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(18).view(3, 6)
KINDS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def llama(directory: Path, seed: int, tied: bool, dtype: str = "float32", shard: str | None = None) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).to(KINDS[dtype])
    model.save_pretrained(directory, **({"max_shard_size": shard} if shard else {}))
    return directory


def with_alias(directory: Path) -> Path:
    """The output embedding written out although it is tied, as some writers do."""
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def logits_of(directory: Path, dtype: str | torch.dtype = "auto") -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    with torch.no_grad():
        return model(TOKENS).logits


def shown_and_exported(sources: Sources, genome: Genome, target: Path) -> tuple[Resident, torch.Tensor]:
    """The merge's logits, the same in the resident model and in its export."""
    resident = Resident(sources, "auto", torch.device("cpu"))
    with torch.no_grad():
        logits = next(resident.show([genome]))(TOKENS).logits
    assert torch.equal(logits_of(export_directory(sources, genome, target, "card", {})), logits)
    return resident, logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("shard", [None, "6KB"])
def test_merges_are_what_from_pretrained_loads(tmp_path, tied, dtype, shard):
    paths = [llama(tmp_path / str(seed), seed, tied, dtype, shard) for seed in range(3)]
    assert (shard is None) == (not (paths[0] / "model.safetensors.index.json").exists())
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    assert ("lm_head.weight" in sources.layout.tensors) == (not tied)
    size = sources.layout.size
    shown_and_exported(sources, Genome.uniform(size, [0.3, 0.4]), tmp_path / "merged")
    resident, logits = shown_and_exported(sources, Genome.uniform(size, [0.0, 1.0]), tmp_path / "expert")
    assert torch.equal(logits, logits_of(paths[2]))
    with torch.no_grad():
        assert torch.equal(resident.expert("1")(TOKENS).logits, logits_of(paths[1]))


@pytest.mark.parametrize("stored", [(0,), (1, 2), (0, 1, 2)])
def test_tied_embeddings_may_be_stored_twice(tmp_path, stored):
    paths = [llama(tmp_path / str(seed), seed, True) for seed in range(3)]
    plain = Sources.open(paths[1:], paths[0], "task_arithmetic")
    genome = Genome.uniform(plain.layout.size, [0.3, 0.4])
    _, expected = shown_and_exported(plain, genome, tmp_path / "plain")
    for number in stored:
        with_alias(paths[number])
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    assert sources.layout.tensors == plain.layout.tensors
    _, logits = shown_and_exported(sources, genome, tmp_path / "merged")
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("operator", ["linear", "task_arithmetic", "ties_vectors"])
@pytest.mark.parametrize("kinds", [("bfloat16", "float32", "float16"), ("float32", "bfloat16", "bfloat16")])
def test_types_mix_between_models(tmp_path, operator, kinds):
    paths = [llama(tmp_path / kind / str(seed), seed, True, kind) for seed, kind in enumerate(kinds)]
    sources = Sources.open(paths[1:], paths[0], operator)
    assert set(sources.layout.dtypes) == {KINDS[kinds[0]]}
    genome = Genome.uniform(sources.layout.size, [0.3, 0.5])
    resident, _ = shown_and_exported(sources, genome, tmp_path / "merged")
    assert resident.dtype == KINDS[kinds[0]]
    wide = [load_file(path / "model.safetensors") for path in paths]
    single = tmp_path / "single"
    for number, tensors in enumerate(wide):
        paths[number] = single / str(number)
        llama(paths[number], 0, True)
        save_file({name: tensor.float() for name, tensor in tensors.items()}, paths[number] / "model.safetensors")
    same = Sources.open(paths[1:], paths[0], operator)
    expected, found = (s.stack([genome], torch.float32) for s in (same, sources))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_types_mix_inside_a_model(tmp_path):
    paths = []
    for seed in range(3):
        paths.append(llama(tmp_path / str(seed), seed, False, "bfloat16"))
        tensors = load_file(paths[-1] / "model.safetensors")
        tensors |= {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
        save_file(tensors, paths[-1] / "model.safetensors", {"format": "pt"})
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    genome = Genome.uniform(sources.layout.size, [0.3, 0.4])
    stored = load_file(export_directory(sources, genome, tmp_path / "merged", "card", {}) / "model.safetensors")
    for name, info in sources.layout.parameters.items():
        assert stored[name].dtype == info.dtype == (torch.float32 if "norm" in name else torch.bfloat16)
