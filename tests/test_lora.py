import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ecotone.merging.kernel.materialise as kernel
import ecotone.merging.memory
import ecotone.merging.models.lora
import ecotone.merging.models.low_rank
import ecotone.merging.sources
from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_directory, export_file
from ecotone.merging.gradient import Slopes
from ecotone.merging.kernel import compiled
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.low_rank import LowRank
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Genome
from ecotone.testing.operators import streamed

OPERATORS = streamed()
LINEAR, EMBEDDING = "layers.0.weight", "embed_tokens.weight"
SHAPES = {EMBEDDING: (40, 6), "layers.0.bias": (7,), LINEAR: (7, 6), "layers.1.weight": (6, 7), "norm.weight": (6,)}


def plain(path: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    save_file(tensors | {"steps": torch.tensor(3)}, path)
    return path


def factors(seed: int, rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, rows, columns in (("layers.0", 7, 6), ("layers.1", 6, 7)):
        a, b = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def adapter(directory: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    directory.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def merged(path: Path, base: Path, tensors: dict[str, torch.Tensor], scale: float) -> Path:
    """The same expert as a full checkpoint, in the type in which adapters are formed."""
    stored = load_file(base)
    for module in ("layers.0", "layers.1"):
        a, b = (tensors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
        full = stored[f"{module}.weight"].double() + scale * b @ a
        kind = torch.float64 if stored[f"{module}.weight"].dtype == torch.float64 else torch.float32
        stored[f"{module}.weight"] = full.to(kind)
    save_file(stored, path)
    return path


def pair(directory: Path, dtype: torch.dtype, operator: str) -> tuple[Sources, Sources]:
    """Two adapters as they are and as full checkpoints."""
    base = plain(directory / "base.safetensors", 0, dtype)
    low, full = [], []
    for seed in (1, 2):
        low.append(adapter(directory / f"adapter-{seed}", factors(seed)))
        full.append(merged(directory / f"full-{seed}.safetensors", base, factors(seed), 1.5))
    return Sources.open(low, base, operator), Sources.open(full, base, operator)


def genome_of(sources: Sources, seed: int = 0) -> Genome:
    rng = np.random.default_rng(seed)
    borders = np.unique([0, *rng.integers(1, sources.layout.size, 9), sources.layout.size])
    return Genome(borders, rng.normal(size=(len(borders) - 1, len(sources.operator.columns(sources.names)))))


def materialised(sources: Sources, genome: Genome, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    out = {name: torch.empty(info.shape, dtype=dtype) for name, info in sources.layout.parameters.items()}
    sources.materialise([genome], [out])
    return out


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_merge_of_adapters_is_that_of_the_full_checkpoints(tmp_path, dtype, operator):
    low, full = pair(tmp_path, dtype, operator)
    kind, tolerance = (torch.float64, 1e-12) if dtype == torch.float64 else (torch.float32, 1e-5)
    genome = genome_of(low)
    expected = materialised(full, genome, kind)
    close(materialised(low, genome, kind), expected, tolerance)
    close({name: rows[0] for name, rows in low.stack([genome], kind).items()}, expected, tolerance)
    exported = load_file(export_file(low, genome, tmp_path / "merged.safetensors", {}, kind))
    close(exported, expected, tolerance)
    ours, theirs = low.space(dense=True), full.space(dense=True)
    np.testing.assert_allclose(
        *(space.gram.between(np.array([0, low.layout.size])) for space in (ours, theirs)), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(ours.vectors, theirs.vectors, rtol=1e-4, atol=1e-5)
    if not low.operator.affine:
        return
    rows = [Slopes(sources, genome) for sources in (low, full)]
    for name, shape in zip(low.layout.tensors, low.layout.shapes, strict=True):
        for slopes in rows:
            slopes.add(name, torch.ones(shape))
    np.testing.assert_allclose(rows[0].values, rows[1].values, rtol=1e-4, atol=1e-4)


def test_the_bits_of_an_expert_do_not_depend_on_how_it_is_read(tmp_path, monkeypatch):
    pytest.importorskip("numba")
    generator = torch.Generator().manual_seed(0)
    base, left = torch.randn(53 * 37, generator=generator), torch.randn(53, 5, generator=generator)
    right = torch.randn(5, 37, generator=generator)
    for kind in (torch.float32, torch.float64):
        source = LowRank(base, left.to(kind), right.to(kind))
        whole = source.formed()
        assert torch.equal(LowRank(base, left.to(kind), right.to(kind), large=True).formed(), whole)
        torch.testing.assert_close(whole, base.to(kind) + (left.to(kind) @ right.to(kind)).view(-1))
        for span in (1, 7, 37, 100, 5000):
            monkeypatch.setattr(ecotone.merging.models.low_rank, "CHUNK", span)
            for low, high in ((0, 1), (36, 38), (5, 600), (100, 53 * 37), (37, 111)):
                assert torch.equal(source[low:high].formed(), whole[low:high])
                assert torch.equal(source[3:][low - 3 : high - 3].formed(), whole[low:high]) or low < 3
                large = LowRank(base, left.to(kind), right.to(kind), large=True)
                assert torch.equal(large[low:high].formed(), whole[low:high])
    negative = LowRank(torch.full((4,), -0.0), torch.zeros(2, 3), torch.full((3, 2), -1.0))
    compiled_zeros = LowRank(negative.base, negative.left, negative.right, large=True).formed()
    assert torch.equal(negative.formed().view(torch.int32), compiled_zeros.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_models_give_the_bits_of_small_ones(tmp_path, dtype, monkeypatch):
    low, _ = pair(tmp_path, dtype, "task_arithmetic")
    genome = genome_of(low)
    expected = materialised(low, genome, dtype)
    monkeypatch.setattr(ecotone.merging.sources, "SMALL", 0)
    monkeypatch.setattr(ecotone.merging.models.lora, "SMALL", 0)
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    large = Sources.open([e.path for e in low.experts], low.base.path, "task_arithmetic")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in materialised(large, genome, dtype).items())
    monkeypatch.setattr(compiled, "supports", lambda *_: False)
    monkeypatch.setattr(compiled, "add_product", lambda *_: False)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in materialised(large, genome, dtype).items())


def test_no_merged_copy_is_held(tmp_path, monkeypatch):
    sizes = []
    form = LowRank.formed

    def counted(source):
        sizes.append(source.numel())
        return form(source)

    rows, columns = 700, 90
    save_file({"layers.0.weight": torch.zeros(rows, columns)}, tmp_path / "base.safetensors")
    parts = {"layers.0.lora_A.weight": torch.randn(2, columns), "layers.0.lora_B.weight": torch.randn(rows, 2)}
    paths = [adapter(tmp_path / name, parts) for name in ("low", "same")]
    monkeypatch.setattr(LowRank, "formed", counted)
    monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
    monkeypatch.setattr("ecotone.merging.export.BUFFER_BYTES", 4 * 9000)
    monkeypatch.setattr("ecotone.merging.kernel.lazy.SPAN", 9000)
    for module in (kernel, ecotone.merging.inner_products, ecotone.merging.gradient):
        monkeypatch.setattr(module, "CHUNK", 9000)
    monkeypatch.setattr("ecotone.merging.operators.task_vectors.SPAN", 9000)
    monkeypatch.setattr("ecotone.merging.operators.task_vectors.BLOCK", 9000)
    for operator in OPERATORS:
        sources = Sources.open(paths, tmp_path / "base.safetensors", operator)
        assert sources.experts[0].nbytes == 4 * 2 * (rows + columns)
        assert sizes == []
        genome = Genome.uniform(sources.layout.size, np.full(len(sources.operator.columns(sources.names)), 0.5))
        materialised(sources, genome, torch.float32)
        export_file(sources, genome, tmp_path / f"{operator}.safetensors", {})
        sources.space()
        if sources.operator.affine:
            Slopes(sources, genome).add("layers.0.weight", torch.ones(rows, columns))
        assert sizes
        assert max(sizes) <= 9000
        sizes.clear()


def forms(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Names under which the same adapter is stored."""
    return {
        "default": {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()},
        "bare": {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()},
    }


@pytest.mark.parametrize("form", ["default", "bare"])
def test_names_with_and_without_peft_s_own_parts(tmp_path, form):
    base = Checkpoint.open(plain(tmp_path / "base.safetensors"))
    usual = Adapter.open(adapter(tmp_path / "a", factors(1)), base)
    other = Adapter.open(adapter(tmp_path / "b", forms(factors(1))[form]), base)
    for name in base.tensors:
        assert torch.equal(usual.tensor(name), other.tensor(name))
        assert usual.tensors[name].shape == base.tensors[name].shape


def test_only_what_the_adapter_changes_is_formed(tmp_path):
    base = Checkpoint.open(plain(tmp_path / "base.safetensors", dtype=torch.bfloat16))
    stored = factors(1) | {"base_model.model.norm.weight": torch.ones(6)}
    expert = Adapter.open(adapter(tmp_path / "a", stored), base)
    assert expert.name == "a"
    assert expert.nbytes == sum(4 * tensor.numel() for tensor in stored.values())
    assert torch.equal(expert.flat(EMBEDDING), base.flat(EMBEDDING))
    assert torch.equal(expert.flat("norm.weight"), torch.ones(6))
    assert expert.tensors[LINEAR].dtype == expert.flat(LINEAR).dtype == torch.float32
    assert int(expert.tensor("steps")) == 3


BROKEN = {
    "dora": (factors(1), {"use_dora": True}, r"module 'layers\.0': expected lora_magnitude_vector, as use_dora"),
    "ia3": (factors(1), {"peft_type": "IA3"}, r"peft_type 'IA3'.*merge_and_unload"),
    "loha": (
        {"base_model.model.layers.0.hada_w1_a": torch.ones(2, 2)},
        {"peft_type": "LOHA"},
        r"'LOHA'.*merge_and_unload",
    ),
    "pissa": (factors(1), {"init_lora_weights": "pissa_niter_4"}, "changes the base"),
    "magnitude": (
        factors(1) | {"layers.0.lora_magnitude_vector.weight": torch.ones(7)},
        {},
        r"'layers\.0\.lora_magnitude_vector\.weight' belongs to no plain LoRA",
    ),
    "no B": (
        {name: tensor for name, tensor in factors(1).items() if "layers.1.lora_B" not in name},
        {},
        r"module 'layers\.1': expected lora_B beside '.*layers\.1\.lora_A\.weight', found none",
    ),
    "rank": (factors(1, 3), {}, r"lora_A\.weight' has rank 3, adapter_config\.json says 2"),
    "no rank": (
        {"layers.0.lora_A.weight": torch.ones(0, 6), "layers.0.lora_B.weight": torch.ones(7, 0)},
        {},
        r"expected a rank of at least 1, found the shape \(0, 6\)",
    ),
    "module": (
        {"base_model.model.layer.0.lora_A.weight": torch.ones(2, 6), "layer.0.lora_B.weight": torch.ones(7, 2)},
        {},
        r"'base_model\.model\.layer\.0\.lora_A\.weight' is meant for 'layer\.0\.weight'.*'base'.*Did you mean 'layers",
    ),
    "whole": (factors(1) | {"score.weight": torch.ones(2, 6)}, {}, r"'score\.weight'.*which the base 'base'"),
    "whole shape": (
        factors(1) | {"norm.weight": torch.ones(5)},
        {},
        r"has shape \(5,\), the base's 'norm\.weight' has \(6,\)",
    ),
    "shape": (
        {"layers.0.lora_A.weight": torch.ones(2, 6), "layers.0.lora_B.weight": torch.ones(8, 2)},
        {},
        r"factors of 'layers\.0\.weight', \(2, 6\) and \(8, 2\), do not make the base's shape \(7, 6\)",
    ),
    "transposed": (factors(1), {"fan_in_fan_out": True}, "fan_in_fan_out"),
    "alpha": (factors(1), {"lora_alpha": None}, "lora_alpha: expected a number, found None"),
    "bias shape": (factors(1) | {"layers.0.lora_B.bias": torch.ones(6)}, {}, r"lora_B\.bias' has shape \(6,\)"),
    "twice": (factors(1) | {"layers.0.lora_A.other.weight": torch.ones(2, 6)}, {}, "two adapters"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_plain_adapter_of_the_base_is_refused_in_words(tmp_path, case):
    tensors, config, message = BROKEN[case]
    path = adapter(tmp_path / "low", tensors, **config)
    with pytest.raises(CheckpointError, match=message):
        Sources.open([path], plain(tmp_path / "base.safetensors"), "task_arithmetic")


def test_an_adapter_needs_its_base_and_its_weights(tmp_path):
    path = adapter(tmp_path / "low", factors(1))
    with pytest.raises(InputError, match=r"base: the expert '.*low' is a LoRA adapter and needs the model"):
        Sources.open([path])
    base = plain(tmp_path / "base.safetensors")
    with pytest.raises(CheckpointError, match="expected a full model, found a LoRA adapter"):
        Sources.open([base], path)
    (path / "adapter_model.safetensors").rename(path / "kept")
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors beside adapter_config\.json"):
        Sources.open([path], base)
    torch.save(factors(1), path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"found a pickle \(adapter_model\.bin\).*weights_only=True"):
        Sources.open([path], base)
    (path / "kept").rename(path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: expected JSON"):
        Sources.open([path], base)


# -- beside PEFT itself ---------------------------------------------------------------------------------------


def llama(directory: Path, tied: bool = False, dtype: torch.dtype = torch.float32) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    return directory


def trained(base: Path, directory: Path, seed: int = 0, **config: object) -> dict[str, torch.Tensor]:
    """Save an adapter of PEFT's with random weights; returns the state dict that PEFT merges it to."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    wrapped.save_pretrained(directory)
    return wrapped.merge_and_unload().state_dict()


CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    "rslora": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "use_rslora": True},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
        "alpha_pattern": {r"model.layers.0.self_attn.q_proj": 20, "v_proj": 1},
    },
    "embeddings": {"r": 3, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "k_proj"]},
    "whole": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "biases": {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "all"},
    "lora biases": {"r": 2, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CONFIGS)
def test_agrees_with_merge_and_unload(tmp_path, case, dtype):
    base = llama(tmp_path / "base", dtype=dtype)
    expected = trained(base, tmp_path / "adapter", **CONFIGS[case])
    expert = Adapter.open(tmp_path / "adapter", Checkpoint.open(base))
    assert set(expert.tensors) == set(expected)
    changed = 0
    for name, tensor in expected.items():
        found = expert.tensor(name)
        assert found.shape == expert.tensors[name].shape
        assert found.dtype == expert.tensors[name].dtype
        torch.testing.assert_close(found, tensor, rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-14)
        changed += not torch.equal(tensor, expert.base.tensor(name))
    assert changed >= 2


@pytest.mark.filterwarnings("ignore")
def test_transposed_layers_agree_with_merge_and_unload(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    expected = trained(tmp_path / "base", tmp_path / "adapter", **options)
    expert = Adapter.open(tmp_path / "adapter", Checkpoint.open(tmp_path / "base"))
    for name in expert.changes:
        torch.testing.assert_close(expert.tensor(name), expected[name], rtol=0, atol=2e-6)
    assert len(expert.changes) == 3


@pytest.mark.filterwarnings("ignore")
def test_convolutions_agree_with_merge_and_unload(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv1d(4, 5, 2))
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "1"]))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape)
    wrapped.save_pretrained(tmp_path / "adapter")
    expected = wrapped.merge_and_unload().state_dict()
    expert = Adapter.open(tmp_path / "adapter", Checkpoint.open(tmp_path / "base.safetensors"))
    for name, tensor in expected.items():
        torch.testing.assert_close(expert.tensor(name), tensor, rtol=0, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings(tmp_path):
    base = llama(tmp_path / "base", tied=True)
    trained(base, tmp_path / "inner", r=2, target_modules=["q_proj"])
    assert Sources.open([tmp_path / "inner"], base).layout.aliases == {}
    trained(base, tmp_path / "embedding", r=2, target_modules=["embed_tokens"])
    trained(base, tmp_path / "one", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    for name in ("embedding", "one"):
        expert = Sources.open([tmp_path / name], base).experts[0]
        assert not torch.equal(expert.tensor("model.embed_tokens.weight"), expert.tensor("lm_head.weight"))
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    head = tensors["base_model.model.lm_head.weight"]
    tensors["base_model.model.model.embed_tokens.weight"] = head.clone()
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    expert = Sources.open([tmp_path / "one"], base).experts[0]
    assert torch.equal(expert.tensor("model.embed_tokens.weight"), head)
    assert "lm_head.weight" not in expert.tensors


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resident_model_shows_and_exports_merges_of_adapters(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    base = llama(tmp_path / "base", dtype=dtype)
    expected = [trained(base, tmp_path / f"adapter-{seed}", seed, **CONFIGS["plain"]) for seed in (1, 2)]
    sources = Sources.open([tmp_path / "adapter-1", tmp_path / "adapter-2"], base, "task_arithmetic")
    assert sources.names == ("adapter-1", "adapter-2")
    resident = Resident(sources, "auto", torch.device("cpu"))
    assert resident.dtype == dtype
    tokens = torch.arange(12).view(2, 6)
    genome = Genome.uniform(sources.layout.size, [0.4, 0.7])
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    with torch.no_grad():
        model = resident.expert("adapter-2")
        for name, tensor in expected[1].items():
            torch.testing.assert_close(model.state_dict()[name], tensor, rtol=tolerance, atol=tolerance)
        logits = next(resident.show([genome]))(tokens).logits
        target = export_directory(sources, genome, tmp_path / "merged", "card", {})
        assert not (target / "adapter_config.json").exists()
        again = AutoModelForCausalLM.from_pretrained(target, dtype="auto")
        assert again.dtype == dtype
        assert torch.equal(again(tokens).logits, logits)
    [value], slopes = resident.gradient(genome, lambda model: iter([model(tokens).logits.float().square().mean()]))
    assert np.isfinite(slopes).all()
    assert abs(slopes).min() > 0
    assert np.isfinite(value)
