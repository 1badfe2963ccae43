"""Generation: batches say what each prompt gets alone, stops, counts, answers, and what objectives share."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language as tiny
import torch
import transformers
from parts import context, refused

from ecotone.fitness.language.generation import (
    ExactMatch,
    ExactMatchSettings,
    Generator,
    TokensGenerated,
    TokensGeneratedSettings,
    same_model,
)
from ecotone.fitness.language.texts import tokenizer_of
from ecotone.fitness.protocol import Objective
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal

RIGHT = Goal("right")


def tokens_generated(folder: str, data: str, **settings: Any) -> TokensGenerated:
    made = TokensGeneratedSettings(**{"name": "length", "type": "tokens_generated", "data": data, **settings})
    return made.build(context(tokenizer=folder))


def exact_match(folder: str, data: str, **settings: Any) -> ExactMatch:
    made = ExactMatchSettings(**{"name": "right", "type": "exact_match", "data": data, **settings})
    return made.build(context(tokenizer=folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> str:
    rng = np.random.default_rng(0)
    records = [{"prompt": tiny.phrase(rng, 1, 12), "answer": "1"} for _ in range(12)]
    return tiny.write_lines(tmp_path_factory.mktemp("data") / "prompts.jsonl", records)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 400, length).tolist() for length in (3, 30, 1, 12, 12, 7, 21, 5)]


class Speller:
    """A tokenizer whose tokens are numbers: token 7 is '7 '."""

    eos_token_id = None

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(f"{token} " for token in tokens)


class Counter(transformers.LlamaForCausalLM):
    """The next token is the last one plus 1, whatever came before."""

    def __init__(self, vocabulary: int = 400) -> None:
        sizes = {**tiny.SIZES, "hidden_size": vocabulary, "num_hidden_layers": 1, "vocab_size": vocabulary}
        super().__init__(transformers.LlamaConfig(**sizes))
        for parameter in self.parameters():
            parameter.data.zero_()
        self.model.norm.weight.data.fill_(1)
        self.model.embed_tokens.weight.data = torch.eye(vocabulary)
        self.lm_head.weight.data = torch.eye(vocabulary).roll(1, 0)
        self.generation_config.eos_token_id = None
        self.eval()


@pytest.fixture(scope="module")
def counter() -> Any:
    return Counter()


def generator(prompts: list[list[int]], most: int = 20, **settings: Any) -> Generator:
    return Generator(prompts, Speller(), tiny.CPU, most, **settings)


# -- greedy generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [tiny.llama, tiny.gpt2, tiny.qwen3_moe])
def test_batches_are_one_by_one_and_transformers_own(made: Any, prompts: list[list[int]]) -> None:
    model = made()
    model.generation_config.eos_token_id = list(range(0, 400, 9))  # some stop early, and leave their batch
    together = generator(prompts, batch=8).written(model).tokens
    assert generator(prompts, batch=3).written(model).tokens == together
    assert generator(prompts, batch=1).written(model).tokens == together
    for prompt, written in zip(prompts, together, strict=True):
        whole = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, pad_token_id=0)
        assert whole[0, len(prompt) :].tolist() == written
    assert len({len(written) for written in together}) > 2


def test_all_end_at_most(counter: Any) -> None:
    written = generator([[5], [1, 9]], most=4).written(counter)
    assert written.tokens == [[6, 7, 8, 9], [10, 11, 12, 13]]
    assert written.texts == ["6 7 8 9 ", "10 11 12 13 "]
    assert written.finite


def test_eos_ends_and_counts(counter: Any) -> None:
    counter.generation_config.eos_token_id = 8
    try:
        assert generator([[5], [7], [20]], most=5).written(counter).tokens == [[6, 7, 8], [8], [21, 22, 23, 24, 25]]
        counter.generation_config.eos_token_id = [7, 22]
        assert generator([[5], [7], [20]], most=3).written(counter).tokens == [[6, 7], [8, 9, 10], [21, 22]]
    finally:
        counter.generation_config.eos_token_id = None


def test_stop_strings_end_and_are_cut(counter: Any) -> None:
    made = generator([[5], [7], [20]], most=5, stop=["8 9", "22"])
    written = made.written(counter)
    assert written.tokens == [[6, 7, 8, 9], [8, 9], [21, 22]]
    assert written.texts == ["6 7 ", "", "21 "]


def test_a_stop_string_over_many_tokens(folder: str) -> None:
    """A byte-level tokenizer may write a stop string byte by byte."""
    loaded = tokenizer_of(folder)
    stop = "☃☃"
    bytes_of = loaded.convert_tokens_to_ids([*loaded.backend_tokenizer.pre_tokenizer.pre_tokenize_str(stop)[0][0]])
    made = Generator([[2]], loaded, tiny.CPU, 30, [stop])
    written: list[int] = [10, 20]
    ended = []
    for token in bytes_of:
        written.append(token)
        ended.append(made._ended(written, set()))
    assert ended == [False] * 5 + [True]


def test_the_generation_configuration_changes_nothing_else(prompts: list[list[int]]) -> None:
    model = tiny.llama()
    expected = generator(prompts).written(model).tokens
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, max_new_tokens=2)
    state = torch.random.get_rng_state()
    assert generator(prompts).written(model).tokens == expected
    assert torch.equal(torch.random.get_rng_state(), state)


# -- objectives ----------------------------------------------------------------------------------------------


def test_tokens_generated(lines: str, folder: str) -> None:
    made = tokens_generated(folder, data=lines, most=6, batch=5)
    model = tiny.llama()
    model.generation_config.eos_token_id = list(range(0, 400, 5))
    score = made.score(model)
    lengths = [len(tokens) for tokens in made.generator.written(model).tokens]
    assert score.per_example.tolist() == lengths
    assert score.value == sum(lengths) / 12
    assert score.items == 12
    assert min(lengths) < max(lengths) <= 6
    assert isinstance(made, Objective)


@pytest.mark.parametrize(
    ("text", "extract", "right"),
    [
        ("  42 \n", None, True),
        ("the answer is 42", None, False),
        ("first 7, then 42.", r"\d+", True),  # the last match
        ("#### 42\nthanks", r"#### (\d+)", True),  # its group
        ("none", r"\d+", False),
        ("forty-two", None, True),
        ("answer:", r"answer:(\d+)?", False),
    ],
)
def test_answers(text: str, extract: str | None, right: bool, counter: Any) -> None:
    import re

    class Says(Speller):
        def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
            return text

    made = ExactMatch(
        RIGHT,
        Generator([[5]], Says(), tiny.CPU, 1),
        [frozenset({"42", "forty-two"})],
        None if extract is None else re.compile(extract),
    )
    score = made.score(counter)
    assert score.per_example.tolist() == [right]
    assert score.value == float(right)
    assert score.per_example.dtype == bool


def test_exact_match_from_a_file(folder: str, tmp_path: Path) -> None:
    model, loaded = tiny.llama(), tokenizer_of(folder)
    prompt = "Licensed under"
    ids = loaded(prompt, add_special_tokens=False)["input_ids"]
    said = loaded.decode(Generator([ids], loaded, tiny.CPU, 3).written(model).tokens[0])
    records = [{"prompt": prompt, "answer": answer} for answer in (said, ["no", f" {said} "], "no", 3)]
    file = tiny.write_lines(tmp_path / "a.jsonl", records)
    made = exact_match(folder, data=file, most=3)
    assert made.score(model).per_example.tolist() == [True, True, False, False]


def test_nan_makes_the_scores_nan(lines: str, folder: str) -> None:
    model = tiny.llama()
    model.model.norm.weight.data[0] = float("nan")
    for make in (tokens_generated, exact_match):
        assert math.isnan(make(folder, lines, most=2).score(model).value)


# -- sharing -------------------------------------------------------------------------------------------------


def test_objectives_share_what_one_model_writes(lines: str, folder: str) -> None:
    calls: list[int] = []
    model = tiny.llama(1)
    model.register_forward_hook(lambda *_: calls.append(1))
    length = tokens_generated(folder, data=lines, most=4)
    right = exact_match(folder, data=lines, most=4, extract="x")
    other = tokens_generated(folder, data=lines, most=5)
    assert length.generator is right.generator is not other.generator
    length.score(model)
    once = len(calls)
    right.score(model)
    assert len(calls) == 2 * once  # nothing says that it is the same model
    calls.clear()
    with same_model([length, right]):
        length.score(model)
        right.score(model)
        length.score(model)
    assert len(calls) == once
    for parameter, new in zip(model.parameters(), tiny.llama(2).parameters(), strict=True):
        parameter.data = new.data
    expected = tiny.llama(2)
    with same_model([length, right]):
        assert length.generator.written(model) == right.generator.written(expected)
    assert length.generator.written(model) == right.generator.written(expected)


def test_what_is_shared_is_gone_after_a_failure(lines: str, folder: str) -> None:
    made = tokens_generated(folder, data=lines, most=2)
    before = made.generator.written(tiny.llama(1))
    broken = tiny.llama(1)
    del broken.model.norm
    with same_model([made]):
        made.score(tiny.llama(1))
    with pytest.raises(AttributeError), same_model([made]):
        made.score(broken)
    assert made.generator.written(tiny.llama(2)) != before


# -- prompts and refusals ------------------------------------------------------------------------------------


def test_prompts(folder: str, tmp_path: Path) -> None:
    loaded = tokenizer_of(folder)
    file = tiny.write_lines(tmp_path / "a.jsonl", [{"question": "What?"}])

    def prompt(**settings: Any) -> str:
        made = tokens_generated(folder, data=file, most=2, **settings)
        return str(loaded.decode(made.generator._prompts[0]))

    assert prompt(template="Q: {question}\nA:") == "Q: What?\nA:"
    assert prompt(template="{question}", bos=True) == "<s>What?"
    with pytest.raises(InputError, match="chat: expected a tokenizer with a chat template"):
        prompt(template="{question}", chat=True)
    loaded.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    try:
        assert prompt(template="{question}", chat=True) == "<user>What?<a>"
    finally:
        loaded.chat_template = None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"most": 0}, "most: Input should be greater than or equal to 1"),
        ({"most": 257}, "most: expected at most 256, which is what the model can take, found 257"),
        ({"most": 250}, r"prompts.jsonl:\d+: expected a prompt of at most 7 tokens, so that 250 more fit"),
        ({"batch": 0}, "batch: Input should be greater than or equal to 1"),
        ({"stop": [""]}, "stop: expected texts, found an empty one"),
        ({"template": "{promt}"}, "expected a field 'promt', as the template names, found none. Did you mean 'prompt'"),
        ({"template": ""}, "prompts.jsonl:1: expected a prompt with tokens, found none"),
        ({"extract": "("}, r"extract: expected a regular expression, found '\('"),
        (
            {"answer": "anwser", "most": 2},
            "prompts.jsonl:1: expected a field 'anwser', found none. Did you mean 'answer'",
        ),
        ({"mots": 3}, "mots: Extra inputs are not permitted"),
    ],
)
def test_refusals(lines: str, folder: str, settings: dict[str, Any], words: str) -> None:
    with refused(words):
        exact_match(folder, lines, **settings)


@pytest.mark.parametrize("answer", [None, True, [], {"a": 1}])
def test_answers_that_cannot_be_used(folder: str, tmp_path: Path, answer: Any) -> None:
    file = tiny.write_lines(tmp_path / "a.jsonl", [{"prompt": "a", "answer": answer}])
    with pytest.raises(InputError, match="answer: expected a text, a number, or a list of them, found"):
        exact_match(folder, data=file)
    assert json.loads(Path(file).read_text())["answer"] == answer


def test_models_without_keys_and_values_are_refused(prompts: list[list[int]]) -> None:
    config = transformers.MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(InputError, match="that keeps keys and values to generate with, found MambaForCausalLM"):
        generator(prompts).written(transformers.MambaForCausalLM(config).eval())


# -- parts ---------------------------------------------------------------------------------------------------


def test_parts_make_up_the_whole_and_are_written_once(lines: str, folder: str, tmp_path: Path) -> None:
    model = tiny.llama()
    model.generation_config.eos_token_id = list(range(0, 400, 5))
    length = tokens_generated(folder, data=lines, most=9)
    tiny.check_parts(length, model)
    answers = [{"prompt": "a", "answer": "x"}, {"prompt": "the", "answer": "y"}, {"prompt": "of a", "answer": "z"}]
    match = exact_match(folder, data=tiny.write_lines(tmp_path / "a.jsonl", answers), most=2)
    assert match.count == 3
    numbers = np.array([2, 0])
    assert [sorted(each) for each in match.subset(numbers).answers] == [["z"], ["x"]]
    assert match.pooled(np.array([True, False]), numbers)[0] == 0.5
    assert match.subset(numbers).generator is match.generator.subset(numbers)
