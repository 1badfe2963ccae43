import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ecotone.fitness.backends.resident import Resident
from ecotone.merging.export import export_directory
from ecotone.merging.kernel.lazy import formed
from ecotone.merging.sources import Sources
from ecotone.populations.errors import CheckpointError, InputError
from ecotone.populations.genome import Genome

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKENS = ["a", "b", "c", "d", "e", "f", "g"]


def model(directory: Path, name: str, rows: int, tokens: list[str] | None = None, seed: int = 0, dtype=torch.float32):
    """A directory with embeddings of some rows and a tokenizer."""
    folder = directory / name
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {key: torch.randn(rows, 3, generator=generator).to(dtype) for key in (EMBEDDING, HEAD)}
    tensors["model.norm.weight"] = torch.randn(3, generator=generator).to(dtype)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vocab_size": rows}))
    listed = {token: number for number, token in enumerate(TOKENS[:rows] if tokens is None else tokens)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": listed}}))
    return folder


@pytest.fixture
def trio(tmp_path):
    """A base of 4 tokens and experts of 5 and 7."""
    return [model(tmp_path, name, rows, seed=rows) for name, rows in (("base", 4), ("five", 5), ("seven", 7))]


def merged(sources: Sources, coefficients: list[float]) -> dict[str, torch.Tensor]:
    out = {name: torch.empty(info.shape) for name, info in sources.layout.parameters.items()}
    sources.materialise([Genome.uniform(sources.layout.size, coefficients)], [out])
    return out


def weights(folder: Path) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[EMBEDDING]


def test_other_sizes_are_refused_with_both_and_the_option(trio):
    with pytest.raises(
        CheckpointError,
        match=r"'lm_head\.weight' has 4 rows, one a token, in 'base' .* and 5 in 'five'.*vocabulary: 'base'",
    ):
        Sources.open(trio[1:], trio[0], "task_arithmetic")


def test_base_leaves_added_rows_out(trio):
    sources = Sources.open(trio[1:], trio[0], "task_arithmetic", vocabulary="base")
    base, five, seven = (weights(folder)[:4] for folder in trio)
    assert sources.layout.parameters[EMBEDDING].shape == (4, 3)
    found = merged(sources, [0.5, 0.25])
    torch.testing.assert_close(found[EMBEDDING], base + 0.5 * (five - base) + 0.25 * (seven - base))
    assert sources.tokenizer == trio[0]
    assert sources.origin.config == {"vocab_size": 4}


def test_base_adds_no_rows(trio):
    with pytest.raises(CheckpointError, match=r"base: 'lm_head\.weight' has 4 rows and the base's has 7.*use 'union'"):
        Sources.open(trio[:1], trio[2], "task_arithmetic", vocabulary="base")
    with pytest.raises(InputError, match="vocabulary: 'base' needs a base model"):
        Sources.open(trio, vocabulary="base")


def test_union_gives_missing_rows_the_base_s_value_or_the_experts_mean(trio):
    sources = Sources.open(trio[1:], trio[0], "task_arithmetic", vocabulary="union")
    base, five, seven = (weights(folder) for folder in trio)
    assert sources.layout.parameters[EMBEDDING].shape == (7, 3)
    found = merged(sources, [0.5, 0.25])[EMBEDDING]
    torch.testing.assert_close(found[:4], base + 0.5 * (five[:4] - base) + 0.25 * (seven[:4] - base))
    mean = (five[4] + seven[4]) / 2
    torch.testing.assert_close(found[4], mean + 0.5 * (five[4] - mean) + 0.25 * (seven[4] - mean))
    torch.testing.assert_close(found[5:], seven[5:])  # in every merge
    assert sources.tokenizer == trio[2]
    assert sources.origin.config == {"vocab_size": 7}
    for each in (sources.base, *sources.experts):
        whole = each.tensor(HEAD).reshape(-1)
        for low, high in ((0, 21), (5, 17), (11, 13), (14, 21), (20, 21)):
            assert torch.equal(formed(each.flat(HEAD)[low:high]), whole[low:high])


def test_union_with_experts_that_lack_the_base_s_rows(trio):
    sources = Sources.open(trio[:2], trio[2], "task_arithmetic", vocabulary="union")
    four, five, base = (weights(folder) for folder in trio)
    found = merged(sources, [1.0, 0.0])[EMBEDDING]
    torch.testing.assert_close(found, torch.cat([four, base[4:]]))
    torch.testing.assert_close(merged(sources, [0.0, 1.0])[EMBEDDING], torch.cat([five, base[5:]]))
    ours = Sources.open(trio, vocabulary="union")
    expected = torch.cat([four, (five + base[:5])[4:] / 2, base[5:]])
    torch.testing.assert_close(merged(ours, [1.0, 0.0, 0.0])[EMBEDDING], expected)


def test_types_mix_in_united_rows(tmp_path):
    paths = [
        model(tmp_path, "base", 4, dtype=torch.bfloat16),
        model(tmp_path, "half", 6, seed=1, dtype=torch.float16),
        model(tmp_path, "single", 6, seed=2),
    ]
    sources = Sources.open(paths[1:], paths[0], "ties_vectors", vocabulary="union")
    assert set(sources.layout.dtypes) == {torch.bfloat16}
    assert sources.base.flat(EMBEDDING).dtype == torch.float32  # the type in which the mean is formed
    assert torch.isfinite(merged(sources, [0.3, 0.4])[EMBEDDING]).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["a", "x", "c", "d", "e"], r"token 1 is 'b' in 'base' .* and 'x' in 'other'"),
        (["a", "b", "c", "d", "x"], r"token 4 is 'e' in 'five' .* and 'x' in 'other'"),
    ],
)
def test_tokenizers_that_disagree_are_refused(trio, tmp_path, tokens, message):
    other = model(tmp_path, "other", 6, tokens)
    with pytest.raises(CheckpointError, match=message):
        Sources.open([trio[1], other], trio[0], vocabulary="union")


def test_one_token_with_two_numbers_is_refused(trio, tmp_path):
    other = model(tmp_path, "other", 7)
    listed = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 5}
    (other / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": listed}}))
    with pytest.raises(CheckpointError, match=r"the token 'e' has number 4 in 'five' .* and 5 in 'other'"):
        Sources.open([trio[1], other], trio[0], vocabulary="union")
    Sources.open([trio[1], other], trio[0], vocabulary="base")  # only the base's tokens count


def test_other_shapes_are_refused_as_before(tmp_path):
    paths = [model(tmp_path, name, 4) for name in ("one", "two")]
    tensors = load_file(paths[1] / "model.safetensors")
    save_file(tensors | {EMBEDDING: torch.zeros(5, 2)}, paths[1] / "model.safetensors")
    for vocabulary in ("same", "union"):
        with pytest.raises(CheckpointError, match=r"has shape \(4, 3\) in 'one'"):
            Sources.open(paths, vocabulary=vocabulary)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_a_resident_model_and_its_export_have_the_chosen_vocabulary(tmp_path, tied, vocabulary):
    transformers = pytest.importorskip("transformers")
    paths = []
    for name, rows in (("base", 24), ("expert", 27)):
        config = transformers.LlamaConfig(
            vocab_size=rows,
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=tied,
        )
        torch.manual_seed(rows)
        paths.append(tmp_path / name)
        transformers.LlamaForCausalLM(config).save_pretrained(paths[-1])
        listed = {f"t{number}": number for number in range(rows)}
        (paths[-1] / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": listed}}))
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic", vocabulary=vocabulary)
    rows = 27 if vocabulary == "union" else 24
    genome = Genome.uniform(sources.layout.size, [0.6])
    tokens = torch.arange(rows - 6, rows).view(1, -1)
    with torch.no_grad():
        logits = next(Resident(sources, "auto", torch.device("cpu")).show([genome]))(tokens).logits
        target = export_directory(sources, genome, tmp_path / "merged", "card", {})
        again = transformers.AutoModelForCausalLM.from_pretrained(target)
        assert torch.equal(again(tokens).logits, logits)
    assert logits.shape == (1, 6, rows)
    assert again.config.vocab_size == rows
    assert len(json.loads((target / "tokenizer.json").read_text())["model"]["vocab"]) == rows
