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


# -- tensors with an entry a token that no list names ----------------------------------------------------

OTHER_NAMES = {
    "mamba": ("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}),
    "distilbert": ("DistilBertForMaskedLM", {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}),
    "bart": (  # its bias has shape (1, tokens)
        "BartForConditionalGeneration",
        {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 1}
        | {"bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
    ),
}


def grown(transformers, family: str, folder: Path) -> list[Path]:
    """A base of 24 tokens and an expert of 27, all of whose weights are random."""
    name, settings = OTHER_NAMES[family]
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    one = kind(kind.config_class(vocab_size=24, **settings))
    for place, rows in (("base", 24), ("expert", 27)):
        one.resize_token_embeddings(rows, mean_resizing=False)
        with torch.no_grad():
            for tensor in one.state_dict().values():
                tensor.add_(0.2 * torch.randn_like(tensor) if tensor.is_floating_point() else 0)
        one.save_pretrained(folder / place)
    return [folder / "base", folder / "expert"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocabulary", ["base", "union"])
@pytest.mark.parametrize("family", OTHER_NAMES)
def test_all_tensors_with_an_entry_a_token_are_made_alike(tmp_path, family, vocabulary):
    transformers = pytest.importorskip("transformers")
    base, expert = grown(transformers, family, tmp_path)
    with pytest.raises(CheckpointError, match=r"has 24 (rows|columns), one a token.*vocabulary: 'base'"):
        Sources.open([expert], base, "task_arithmetic")
    sources = Sources.open([expert], base, "task_arithmetic", vocabulary=vocabulary)
    rows = 27 if vocabulary == "union" else 24
    kind = getattr(transformers, OTHER_NAMES[family][0])
    alone = kind.from_pretrained(expert).eval()
    alone.resize_token_embeddings(rows)
    tokens = torch.arange(rows - 6, rows).view(1, -1)
    genome = Genome.uniform(sources.layout.size, [1.0])
    with torch.no_grad():
        shown = next(Resident(sources, "auto", torch.device("cpu")).show([genome]))(tokens).logits
        target = export_directory(sources, genome, tmp_path / "merged", "card", {})
        again = kind.from_pretrained(target).eval()
        torch.testing.assert_close(shown, alone(tokens).logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(again(tokens).logits, shown)
    assert shown.shape == (1, 6, rows)
    assert again.config.vocab_size == rows


@pytest.mark.parametrize("length", [4, 7])
def test_rows_along_another_axis_are_read_in_pieces(tmp_path, length):
    """A transposed output: (width, tokens)."""
    paths = [model(tmp_path, f"m{rows}", rows, seed=rows) for rows in (4, 5, 7)]
    for path in paths:
        tensors = load_file(path / "model.safetensors")
        turned = tensors.pop(HEAD).T.contiguous()
        save_file(tensors | {"output.turned": turned}, path / "model.safetensors")
    sources = Sources.open(paths[1:], paths[0], "ties", vocabulary="union" if length == 7 else "base")
    four, five, seven = (load_file(path / "model.safetensors")["output.turned"] for path in paths)
    mean = (five[:, 4:] + seven[:, 4:5]) / 2
    own = torch.cat([four, mean, seven[:, 5:]], 1), torch.cat([five, seven[:, 5:]], 1), seven
    for one, expected in zip((sources.base, *sources.experts), own, strict=True):
        assert torch.equal(one.tensor("output.turned"), expected[:, :length])
        flat = one.flat("output.turned")
        for low, high in ((0, 3 * length), (2, 9), (length - 1, length + 1)):
            assert torch.equal(formed(flat[low:high]), expected[:, :length].reshape(-1)[low:high])


def test_a_length_that_is_no_vocabulary_s_is_refused_as_before(tmp_path):
    paths = [model(tmp_path, name, rows) for name, rows in (("one", 4), ("two", 5))]
    for path, extent in zip(paths, (6, 8), strict=True):
        tensors = load_file(path / "model.safetensors")
        save_file(tensors | {"positions.weight": torch.zeros(extent, 3)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"'positions\.weight' has shape \(6, 3\) in 'one'"):
        Sources.open(paths, vocabulary="union")
