"""Bits per byte and perplexity: known answers, windows, parts, bounded logits, and refusals in words."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language as tiny
import torch
from parts import context, refused
from parts import objective as objective_settings
from torch import nn

from ecotone.fitness.language import likelihoods
from ecotone.fitness.language.perplexity import Perplexity
from ecotone.fitness.language.texts import documents, tokenizer_of
from ecotone.fitness.protocol import Objective
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal

GOAL = Goal("loss", "minimize")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer without special tokens."""
    return tiny.save_tokenizer(tmp_path_factory.mktemp("bare"), bos=None, eos=None)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "one.txt"
    file.write_text(" ".join(tiny.WORDS[:400]) + " naïve café — ☃", "utf-8")
    return str(file)


@pytest.fixture
def lines(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)
    return tiny.write_lines(tmp_path / "many.jsonl", [{"text": tiny.phrase(rng, 3, 40)} for _ in range(20)])


def objective(data: str, folder: str, unit: Any = "bits_per_byte", **settings: Any) -> Perplexity:
    made: Perplexity = settings_of(unit, data=data, **settings).build(context(tokenizer=folder))
    return made


def settings_of(unit: str = "bits_per_byte", **settings: Any) -> Any:
    return objective_settings("bits", unit, **settings)


class Uniform(nn.Module):
    """All tokens alike after anything, with other constants added to the logits of each position."""

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        return torch.zeros(*input_ids.shape, 400) + input_ids[..., None]


def plain_nats(model: Any, tokens: list[int]) -> torch.Tensor:
    """-ln p of each token but the first, by transformers' own loss."""
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, :-1]
    return nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


# -- known answers -------------------------------------------------------------------------------------------


def test_uniform_model_takes_log2_of_the_vocabulary_a_token(text: str, folder: str) -> None:
    tokens = len(tokenizer_of(folder)(Path(text).read_text("utf-8"), add_special_tokens=False)["input_ids"])
    size = len(Path(text).read_bytes())
    score = objective(text, folder, context=50).score(Uniform())
    assert score.value == pytest.approx(math.log2(400) * tokens / size, rel=1e-6)
    assert objective(text, folder, "perplexity", context=50).score(Uniform()).value == pytest.approx(400, rel=1e-5)
    assert isinstance(score.value, float)


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2, tiny.gemma2, tiny.qwen3_moe])
def test_equals_the_loss_of_transformers(made: Any, lines: str, folder: str) -> None:
    model = made()
    found = objective(lines, folder).score(model)
    loaded, nats, sizes = tokenizer_of(folder), [], []
    for document in documents([Path(lines)], "text", ""):
        tokens = [loaded.bos_token_id, *loaded(document, add_special_tokens=False)["input_ids"]]
        nats.append(float(plain_nats(model, tokens).sum()))
        sizes.append(len(document.encode()))
    assert found.value == pytest.approx(sum(nats) / math.log(2) / sum(sizes), rel=1e-9)
    assert found.per_example == pytest.approx(np.asarray(nats) / math.log(2) / sizes, rel=1e-9)
    assert found.items == 20


def test_perplexity_is_of_all_tokens(lines: str, folder: str, model: Any) -> None:
    bits = objective(lines, folder).score(model)
    made = objective(lines, folder, "perplexity")
    tokens = len(made.items)
    size = sum(len(text.encode()) for text in documents([Path(lines)], "text", ""))
    assert made.score(model).value == pytest.approx(2 ** (bits.value * size / tokens), rel=1e-12)


@pytest.mark.parametrize(("context", "stride"), [(64, 64), (64, 24), (50, 1), (7, 3)])
def test_windows_are_those_of_the_definition(text: str, folder: str, model: Any, context: int, stride: int) -> None:
    """Each token's context, one token after the other: at most ``context`` tokens from its window's start."""
    loaded, content = tokenizer_of(folder), Path(text).read_text("utf-8")[:300]
    short = Path(text).with_name("short.txt")
    short.write_text(content, "utf-8")
    tokens = [loaded.bos_token_id, *loaded(content, add_special_tokens=False)["input_ids"]]
    total = 0.0
    for place in range(1, len(tokens)):
        window = max(0, -(-(place - context) // stride))
        total += float(plain_nats(model, tokens[window * stride : place + 1])[-1])
    found = objective(str(short), folder, context=context, stride=stride).score(model)
    assert found.value == pytest.approx(total / math.log(2) / len(content.encode()), rel=1e-10)


def test_stride_does_not_matter_where_the_text_fits(lines: str, folder: str, model: Any) -> None:
    whole = objective(lines, folder, context=256).score(model)
    strided = objective(lines, folder, context=256, stride=10).score(model)
    assert strided.value == whole.value
    assert np.array_equal(strided.per_example, whole.per_example)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_batches_change_rounding_only(lines: str, folder: str, model: Any, batch: int) -> None:
    usual = objective(lines, folder, context=32, stride=20).score(model)
    other = objective(lines, folder, context=32, stride=20, batch=batch).score(model)
    assert other.value == pytest.approx(usual.value, rel=1e-12)
    assert other.per_example == pytest.approx(usual.per_example, rel=1e-12)


def test_the_order_of_documents_changes_rounding_only(lines: str, folder: str, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "other_way.jsonl"
    file.write_text("\n".join(reversed(Path(lines).read_text().splitlines())))
    there, back = objective(lines, folder).score(model), objective(str(file), folder).score(model)
    assert back.value == pytest.approx(there.value, rel=1e-12)
    assert back.per_example[::-1] == pytest.approx(there.per_example, rel=1e-12)


def test_like_lengths_come_together(lines: str, folder: str) -> None:
    passes = objective(lines, folder, batch=4).passes
    widths = [part.ids.shape[1] for part in passes]
    assert widths == sorted(widths, reverse=True)
    assert [len(part.ids) for part in passes] == [4] * 5


# -- items ---------------------------------------------------------------------------------------------------


def test_one_document_is_told_by_window(text: str, folder: str, model: Any) -> None:
    made = objective(text, folder, context=40)
    found = made.score(model)
    assert found.items == len(made.sizes) > 5
    assert made.sizes.sum() == len(Path(text).read_bytes())
    assert float(found.per_example @ made.sizes) / made.sizes.sum() == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("name", ["text", "lines"])
def test_parts_have_no_item_in_common_and_make_up_all(
    name: str, folder: str, model: Any, request: pytest.FixtureRequest
) -> None:
    data = request.getfixturevalue(name)

    def scores(**settings: Any) -> set[float]:
        return set(objective(data, folder, context=40, batch=1, **settings).score(model).per_example.tolist())

    search, held_out = scores(part="search", seed=3, share=0.3), scores(part="held_out", seed=3, share=0.3)
    assert not search & held_out
    assert search | held_out == scores()
    assert len(search) == round(0.3 * len(scores()))
    assert scores(part="search", seed=4, share=0.3) != search


def test_a_smaller_limit_takes_a_subset() -> None:
    taken = [set(settings_of(data="x", part="search", limit=limit).chosen(50).tolist()) for limit in (3, 8, None)]
    assert [len(numbers) for numbers in taken] == [3, 8, 25]
    assert taken[0] < taken[1] < taken[2]


def test_without_a_start_token_the_first_is_not_scored(lines: str, text: str, bare: str) -> None:
    loaded = tokenizer_of(bare)
    for data in (lines, text):
        made = objective(data, bare, context=256)
        texts = documents([Path(data)], "text", "")
        cut = [content[len(loaded.decode(loaded(content)["input_ids"][0])) :] for content in texts]
        assert made.sizes.sum() == sum(len(content.encode()) for content in cut)
        assert len(made.items) == sum(len(loaded(content)["input_ids"]) - 1 for content in texts)
    with pytest.raises(InputError, match="BOS or EOS"):
        objective(lines, bare, bos=True)


def test_windows_inside_a_character_share_its_bytes(tmp_path: Path, folder: str) -> None:
    file = tmp_path / "snow.txt"
    file.write_text("☃☃☃☃", "utf-8")  # each three tokens of one byte
    made = objective(str(file), folder, context=4)
    assert made.sizes.sum() == 12
    assert np.isfinite(made.score(Uniform()).per_example).all()


def test_files_follow_one_another(lines: str, text: str, folder: str, model: Any) -> None:
    both = objective([lines, text], folder)  # type: ignore[arg-type]
    assert both.score(model).items == 21


# -- logits --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2, tiny.gemma2])
def test_logits_are_made_in_chunks_after_the_hidden_states(
    made: Any, lines: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The soft cap of Gemma's logits, too, is applied to every chunk."""
    model, sizes = made(), []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, __, logits: sizes.append(logits.shape))
    whole = objective(lines, folder).score(model)
    rows = max(shape[1] for shape in sizes)
    monkeypatch.setitem(likelihoods.CHUNK_BYTES, "cpu", 4 * 400 * 7)
    sizes.clear()
    cut = objective(lines, folder).score(model)
    handle.remove()
    assert max(shape[0] * shape[1] for shape in sizes) == 7 < rows
    assert cut.value == pytest.approx(whole.value, rel=1e-12)


def test_hooks_are_gone_afterwards(lines: str, folder: str) -> None:
    class BrokenError(Exception):
        pass

    def fail(*_: Any) -> None:
        raise BrokenError

    model = tiny.llama()
    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(BrokenError):
        objective(lines, folder).score(model)
    handle.remove()
    layer = model.get_output_embeddings()
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_normalised_in_float32(lines: str, folder: str, dtype: torch.dtype) -> None:
    exact = objective(lines, folder).score(tiny.llama(dtype=torch.float32)).value
    found = objective(lines, folder).score(tiny.llama(dtype=dtype))
    assert found.value == pytest.approx(exact, rel=0.02)
    assert found.per_example.dtype == np.float64


def test_nan_makes_the_score_nan(lines: str, folder: str) -> None:
    model = tiny.llama()
    model.model.norm.weight.data[0] = float("nan")
    assert math.isnan(objective(lines, folder).score(model).value)


def test_scores_depend_on_the_weights_alone(lines: str, folder: str) -> None:
    made, model, other = objective(lines, folder), tiny.llama(1), tiny.llama(2)
    state = torch.random.get_rng_state()
    first, second = made.score(model), made.score(other)
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = new.data.clone()
    swapped = made.score(model)
    assert swapped.value == second.value != first.value
    assert np.array_equal(swapped.per_example, second.per_example)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(made, Objective)


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context": 300}, "context: expected at most 256, which is what the model can take, found 300"),
        ({"context": 1}, "context: Input should be greater than or equal to 2"),
        ({"context": 10, "stride": 11}, r"stride: expected at most context \(10\), found 11"),
        ({"stride": 0}, "stride: Input should be greater than or equal to 1"),
        ({"batch": 0}, "batch: Input should be greater than or equal to 1"),
        ({"part": "test"}, "part: Input should be 'search', 'held_out' or 'all'"),
        ({"share": 1.0}, "share: Input should be less than 1"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"limit": 0}, "limit: Input should be greater than or equal to 1"),
        ({"strid": 3}, "strid: Extra inputs are not permitted"),
        ({"field": "txt"}, "many.jsonl:1: expected a field 'txt', found none. Did you mean 'text'"),
        ({"data": "no_such_file.txt"}, "data: cannot read no_such_file.txt"),
        ({"data": []}, "data: expected a file, found none"),
    ],
)
def test_refusals(lines: str, folder: str, settings: dict[str, Any], words: str) -> None:
    with refused(words):
        objective(**{"data": lines, "folder": folder, **settings})


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"caf\xe9", r"a.txt: expected UTF-8 \(unexpected end of data at byte 3\)"),
        ("a.txt", b"", "expected text, found none in"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl:2: expected a JSON object"),
        ("a.jsonl", b'["text"]', "a.jsonl:1: expected a JSON object, found list"),
        ("a.jsonl", b'{"text": 3}', "text: expected text, found int"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, folder: str, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=words):
        objective(str(tmp_path / name), folder)


def test_one_document_of_one_window_cannot_be_divided(tmp_path: Path, folder: str) -> None:
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(InputError, match="expected at least 2 items for part 'search', found 1"):
        objective(str(tmp_path / "a.txt"), folder, part="search")


def test_models_that_are_none(lines: str, folder: str, tmp_path: Path) -> None:
    made = objective(lines, folder)
    with pytest.raises(InputError, match="expected a torch module to score, found a dict"):
        made.score({})
    with pytest.raises(InputError, match=r"expected logits of shape \(n, L, vocabulary\), found"):
        made.score(type("Flat", (nn.Module,), {"forward": lambda self, input_ids, use_cache: input_ids})())
    with pytest.raises(InputError, match="tokenizer: cannot be loaded"):
        objective(lines, str(tmp_path))


# -- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", ["bits_per_byte", "likelihood", "perplexity"])
def test_parts_make_up_the_whole(unit: str, lines: str, text: str, folder: str) -> None:
    model = tiny.llama()
    tiny.check_parts(objective(lines, folder, unit), model)
    tiny.check_parts(objective(text, folder, unit, context=32, stride=24), model)


@pytest.mark.parametrize("unit", ["bits_per_byte", "likelihood", "perplexity"])
def test_the_error_of_a_part_is_the_spread_of_parts(unit: str, lines: str, folder: str) -> None:
    whole = objective(lines, folder, unit)
    each = whole.score(tiny.llama()).per_example
    assert each is not None
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        numbers = rng.permutation(whole.count)[:10]
        found.append(whole.pooled(each[numbers], numbers))
    values, errors = np.array(found).T
    assert np.std(values) == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.12)
