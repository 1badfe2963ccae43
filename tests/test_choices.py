"""Multiple choice: reuse equals the plain computation, tokens are lm-eval's, architectures that cannot, refusals."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language as tiny
import torch
import transformers
from parts import context, refused
from torch import nn

from ecotone.fitness.language import choices
from ecotone.fitness.language.choices import MultipleChoice, MultipleChoiceSettings, Question, packed
from ecotone.fitness.language.texts import tokenizer_of
from ecotone.fitness.protocol import Objective
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal

GOAL = Goal("right")
SHOTS = {"shots": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Questions of many lengths with two to five choices, of one token and more."""
    rng = np.random.default_rng(0)
    records = []
    for _ in range(30):
        choices = [tiny.phrase(rng, 1, 4) for _ in range(rng.integers(2, 6))]
        answer = int(rng.integers(len(choices)))
        records.append({"question": tiny.phrase(rng, 2, 15), "choices": choices, "answer": answer})
    return tiny.write_lines(tmp_path_factory.mktemp("data") / "questions.jsonl", records)


def objective(data: str, folder: str, **settings: Any) -> MultipleChoice:
    made = MultipleChoiceSettings(**{"name": "right", "type": "multiple_choice", "data": data, **settings})
    return made.build(context(tokenizer=folder))


def one(folder: str, tmp_path: Path, record: dict[str, Any], **settings: Any) -> Question:
    """The only question of a file."""
    file = tiny.write_lines(tmp_path / "one.jsonl", [record])
    return objective(file, folder, **settings)._questions[0]


def plain_likelihood(model: Any, question: Question, choice: int) -> float:
    """By transformers alone, one text."""
    ids = torch.tensor([[*question.tokens, *question.choices[choice]]])
    logs = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    places = range(len(question.tokens), ids.shape[1])
    return sum(float(logs[place - 1, ids[0, place]]) for place in places)


# -- reuse equals the plain computation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**SHOTS, "batch": 7},
        pytest.param(SHOTS, marks=pytest.mark.slow),
        pytest.param({"batch": 1}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2, tiny.qwen3_moe])
def test_reuse_equals_plain_in_float64(made: Any, lines: str, folder: str, settings: dict[str, Any]) -> None:
    model = made()
    reused, plain = objective(lines, folder, **settings), objective(lines, folder, reuse=False, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = reused.likelihoods(model), plain.likelihoods(model)
    assert reused.reuse is True
    assert plain.reuse is False
    assert found == pytest.approx(expected, abs=1e-10)
    assert (reused._packed.shared is not None) == ("shots" in settings)
    questions = reused._questions
    alone = [plain_likelihood(model, question, n) for question in questions for n in range(len(question.choices))]
    assert expected == pytest.approx(np.asarray(alone), abs=1e-10)


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2, tiny.gemma2, tiny.qwen3_moe])
def test_reuse_says_the_same_in_float32(made: Any, lines: str, folder: str) -> None:
    model = made(dtype=torch.float32)
    reused, plain = objective(lines, folder, **SHOTS), objective(lines, folder, reuse=False, **SHOTS)
    assert np.array_equal(reused.score(model).per_example, plain.score(model).per_example)
    assert reused.reuse is True


def test_eager_attention_takes_the_mask_too(lines: str, folder: str) -> None:
    model = tiny.llama()
    expected = objective(lines, folder, **SHOTS).likelihoods(model)
    model.set_attn_implementation("eager")
    eager = objective(lines, folder, **SHOTS)
    # Eager attention normalises in float32 whatever the model's type.
    assert eager.likelihoods(model) == pytest.approx(expected, abs=1e-4)
    assert eager.reuse is True


def test_reuse_reads_fewer_tokens(lines: str, folder: str) -> None:
    seen: list[int] = []
    model = tiny.llama(dtype=torch.float32)
    model.model.embed_tokens.register_forward_hook(lambda _, given, __: seen.append(given[0].numel()))
    made = objective(lines, folder, batch=1, **SHOTS)
    questions = made._questions
    made.score(model)  # tries once
    seen.clear()
    made.score(model)
    shared = made._packed.shared
    assert shared is not None
    once = sum(len(q.tokens) - shared.shape[1] + sum(len(choice) - 1 for choice in q.choices) for q in questions)
    assert sum(seen) == shared.shape[1] + once


def test_logits_are_made_for_choices_only(lines: str, folder: str) -> None:
    seen: list[int] = []
    model = tiny.llama(dtype=torch.float32)
    made = objective(lines, folder)
    made.score(model)
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[0] * logits.shape[1]))
    made.score(model)
    assert sum(seen) == sum(1 + sum(len(choice) - 1 for choice in q.choices) for q in made._questions)


def test_masks_are_made_once_as_far_as_memory_is_given(
    lines: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        made.append(1)
        return real(*given)

    real = choices._mask
    monkeypatch.setattr(choices, "_mask", counted)
    kept, found = objective(lines, folder, batch=3, **SHOTS), []
    for model in (tiny.llama(1), tiny.llama(2)):
        made.clear()
        found.append(kept.likelihoods(model))
    assert not made
    monkeypatch.setattr(choices, "KEPT_BYTES", kept._packed._masks[0, torch.float64].nbytes)
    again = objective(lines, folder, batch=3, **SHOTS)
    again.likelihoods(tiny.llama(1))
    made.clear()
    assert np.array_equal(again.likelihoods(tiny.llama(2)), found[1])
    assert len(made) == len(again._packed.each) - 1


def test_choices_of_one_token_need_no_mask(folder: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    records = [{"question": tiny.phrase(rng, 3, 9), "choices": list("ABCD"), "answer": n % 4} for n in range(8)]
    file = tiny.write_lines(tmp_path / "letters.jsonl", records)
    settings = {"delimiter": "", "template": "{question}\nAnswer: "}
    reused, plain = objective(file, folder, **settings), objective(file, folder, reuse=False, **settings)
    found, expected = reused.likelihoods(tiny.llama()), plain.likelihoods(tiny.llama())
    assert found == pytest.approx(expected, abs=1e-10)
    letters = [Question(q.tokens, [[5], [6], [7]], 0, [1] * 3) for q in reused._questions]
    assert all(part.parts is None for part in packed(letters, 4, tiny.CPU).each)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(lines: str, folder: str, dtype: torch.dtype) -> None:
    exact = objective(lines, folder).likelihoods(tiny.llama(dtype=torch.float32))
    made = objective(lines, folder, **{})
    found = made.likelihoods(tiny.llama(dtype=dtype))
    assert made.reuse is True
    assert found == pytest.approx(exact, rel=0.05, abs=0.5)


# -- architectures that cannot -------------------------------------------------------------------------------


def sliding() -> Any:
    config = transformers.MistralConfig(**tiny.SIZES, num_key_value_heads=2, sliding_window=8)
    return tiny.spread(transformers.MistralForCausalLM(config))


def mamba() -> Any:
    config = transformers.MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    return tiny.spread(transformers.MambaForCausalLM(config))


@pytest.mark.parametrize("settings", [{}, SHOTS])
@pytest.mark.parametrize("made", [tiny.bloom, sliding, mamba])
def test_architectures_that_cannot_are_computed_plainly(
    made: Any, lines: str, folder: str, settings: dict[str, Any]
) -> None:
    model = made()
    reused = objective(lines, folder, limit=6, **settings)
    with pytest.warns(UserWarning, match="'right': .* cannot read a question once for all its choices"):
        found = reused.score(model)
    assert reused.reuse is False
    plain = objective(lines, folder, limit=6, reuse=False, **settings)
    assert np.array_equal(reused.likelihoods(model), plain.likelihoods(model))
    assert found.value == plain.score(model).value


def test_a_model_that_sees_nothing_settles_nothing(lines: str, folder: str) -> None:
    """All weights 0, or NaN: any way of computing gives the same, so the next model is tried as well."""
    made, model = objective(lines, folder, limit=4), tiny.bloom()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for value in (0.0, float("nan")):
        for tensor in model.parameters():
            tensor.data.fill_(value)
        llama = tiny.llama()
        for tensor in llama.parameters():
            tensor.data.fill_(value)
        assert made._can_reuse(llama) is None
    model.load_state_dict(state)
    with pytest.warns(UserWarning, match="cannot read a question once"):
        made.score(model)


def test_no_memory_is_no_verdict(lines: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory")

    made = objective(lines, folder)
    monkeypatch.setattr("ecotone.fitness.language.choices._mask", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        made.score(tiny.llama())
    assert made.reuse is None


# -- scores --------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Logits of the next token by the last token."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        return self.rows[input_ids]


def table(questions: list[Question], probabilities: torch.Tensor) -> Any:
    made = MultipleChoice(GOAL, questions, tiny.CPU, reuse=False)
    return made.score(Table(probabilities.log()))


def test_known_likelihoods() -> None:
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    questions = [
        Question([0], [[0], [1], [2]], 0, [1] * 3),
        Question([1], [[2], [1, 1]], 0, [1] * 2),  # 0.1 against 0.64
        Question([2], [[0], [1]], 1, [1] * 2),  # equal: the first
    ]
    score = table(questions, rows)
    assert score.per_example.tolist() == [True, False, False]
    assert score.per_example.dtype == bool
    assert score.value == pytest.approx(1 / 3)
    assert score.items == 3
    made = MultipleChoice(GOAL, questions, tiny.CPU, reuse=False)
    expected = np.log([0.5, 0.25, 0.25, 0.1, 0.64, 1 / 3, 1 / 3])
    assert made.likelihoods(Table(rows.log())) == pytest.approx(expected, rel=1e-6)


def test_normalised_by_size() -> None:
    rows = torch.tensor([[0.6, 0.4]])
    questions = [Question([0], [[1], [0, 0]], 1, [1, 1]), Question([0], [[1], [0, 0]], 1, [1, 2])]
    assert table(questions, rows.expand(2, 2).contiguous()).per_example.tolist() == [False, True]


def test_sizes_are_bytes_or_tokens(folder: str, tmp_path: Path) -> None:
    record = {"question": "What?", "choices": ["café", "a longer one"], "answer": 0}
    assert one(folder, tmp_path, record).sizes == [1, 1]
    assert one(folder, tmp_path, record, normalise="bytes").sizes == [5, 12]
    tokens = one(folder, tmp_path, record, normalise="tokens")
    assert tokens.sizes == [len(choice) for choice in tokens.choices]


def test_nan_makes_the_score_nan(lines: str, folder: str) -> None:
    model = tiny.llama()
    model.model.norm.weight.data[0] = float("nan")
    for reuse in (True, False):
        assert math.isnan(objective(lines, folder, reuse=reuse).score(model).value)


def test_scores_depend_on_the_weights_alone(lines: str, folder: str) -> None:
    made, model, other = objective(lines, folder, **SHOTS), tiny.llama(1), tiny.llama(2)
    state = torch.random.get_rng_state()
    first, second = made.likelihoods(model), made.likelihoods(other)
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = new.data.clone()
    assert np.array_equal(made.likelihoods(model), second)
    assert not np.array_equal(first, second)
    assert np.array_equal(objective(lines, folder, **SHOTS).likelihoods(other), second)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(made, Objective)


# -- tokens --------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_question_and_choice_together(folder: str, tmp_path: Path) -> None:
    record = {"question": "Which licence?  ", "choices": ["Apache", "none at all"], "answer": 0}
    loaded = tokenizer_of(folder)

    def ids(text: str) -> list[int]:
        return list(loaded(text, add_special_tokens=False)["input_ids"])

    question = one(folder, tmp_path, record, template="Q: {question}")
    assert question.tokens == ids("Q: Which licence?")
    for choice, text in zip(question.choices, record["choices"], strict=True):
        assert [*question.tokens, *choice] == ids(f"Q: Which licence?   {text}")


def test_shots_come_first_and_are_not_scored(lines: str, folder: str, tmp_path: Path) -> None:
    settings = {"template": "{question}?", "separator": " | ", "delimiter": " > "}
    loaded = tokenizer_of(folder)
    own = objective(lines, folder, shots=2, **settings)
    assert len(own._questions) == 28
    text = loaded.decode(own._questions[0].tokens)
    assert text.count(" | ") == 2
    other = tiny.write_lines(tmp_path / "x.jsonl", [{"question": "2+2", "choices": ["3", "4"], "answer": 1}])
    made = objective(lines, folder, shots=1, examples=other, **settings)
    assert len(made._questions) == 30
    assert loaded.decode(made._questions[0].tokens).startswith("2+2? > 4 | ")


def test_the_start_token(folder: str, tmp_path: Path) -> None:
    record = {"question": "a b c", "choices": ["d", "e"], "answer": 0}
    bos = tokenizer_of(folder).bos_token_id
    assert one(folder, tmp_path, record).tokens[0] != bos  # this tokenizer puts none itself
    assert one(folder, tmp_path, record, bos=True).tokens[0] == bos
    assert one(folder, tmp_path, {**record, "question": ""}, template="{question}").tokens == [bos]


def test_other_fields_and_the_first_of_a_list(folder: str, tmp_path: Path) -> None:
    record = {"goal": "light", "endings": ["sun", "moon"], "label": 1}
    settings = {"choices": "endings", "answer": "label", "template": "{goal}: {endings[0]} or {endings[1]}?"}
    question = one(folder, tmp_path, record, **settings)
    assert question.answer == 1
    assert tokenizer_of(folder).decode(question.tokens) == "light: sun or moon?"


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"normalise": "characters"}, "normalise: Input should be 'none', 'bytes' or 'tokens'"),
        ({"shots": -1}, "shots: Input should be greater than or equal to 0"),
        ({"shots": 31}, "shots: expected at most 30, found 31"),
        ({"batch": 0}, "batch: Input should be greater than or equal to 1"),
        ({"template": "{qestion}"}, "questions.jsonl:1: expected a field 'qestion'.* Did you mean 'question'"),
        ({"template": "{question"}, "template: cannot be filled"),
        ({"answer": "anser"}, "expected a field 'anser', found none. Did you mean 'answer'"),
        ({"choices": "question"}, "question: expected a list of texts, found"),
        ({"template": "{question}" * 60}, "expected at most 256 tokens, which is what the model can take, found"),
        ({"reus": False}, "reus: Extra inputs are not permitted"),
        ({"data": "questions.txt"}, "data: expected a .jsonl file, found questions.txt"),
        ({"part": "search", "limit": -1}, "limit: Input should be greater than or equal to 1"),
    ],
)
def test_refusals(lines: str, folder: str, settings: dict[str, Any], words: str) -> None:
    with refused(words):
        objective(**{"data": lines, "folder": folder, **settings})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"answer": 2}, "one.jsonl:1: answer: expected the number of a choice, 0 to 1, found 2"),
        ({"answer": "0"}, "answer: expected the number of a choice, 0 to 1, found '0'"),
        ({"answer": True}, "found True"),
        ({"choices": []}, "choices: expected a list of texts, found"),
        ({"choices": ["a", ""]}, "choices: expected a list of texts, found"),
    ],
)
def test_records_that_cannot_be_used(folder: str, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        one(folder, tmp_path, {"question": "a", "choices": ["b", "c"], "answer": 0, **change})


def test_a_dict_of_tensors_is_no_model(lines: str, folder: str) -> None:
    for reuse in (True, False):
        with pytest.raises(InputError, match="expected a torch module to score, found a dict"):
            objective(lines, folder, reuse=reuse).score({})


# -- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reuse", [True, False])
def test_parts_make_up_the_whole(lines: str, folder: str, reuse: bool) -> None:
    tiny.check_parts(objective(lines, folder, reuse=reuse), tiny.llama())
