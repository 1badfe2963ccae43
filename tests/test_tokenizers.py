import json
from pathlib import Path

import pytest

from ecotone.merging.models import tokenizers
from ecotone.populations.errors import CheckpointError

VOCABULARY = {"a": 0, "b": 1, "ab": 2}
SETTINGS = {"eos_token": "</s>", "chat_template": "{{ messages }}"}


def model(directory: Path, name: str, vocabulary=VOCABULARY, added=(), settings=SETTINGS, **parts) -> tuple[str, Path]:
    folder = directory / name
    folder.mkdir()
    kind = {"type": "BPE", "vocab": vocabulary, "merges": parts.pop("merges", ["a b"])}
    special = parts.pop("special", False)
    listed = [{"id": number, "content": token, "special": special} for token, number in added]
    (folder / "tokenizer.json").write_text(json.dumps({"model": kind, "added_tokens": listed, **parts}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return name, folder


def test_tokenizers_that_agree_give_no_sentence(tmp_path):
    models = [model(tmp_path, "base"), model(tmp_path, "same"), model(tmp_path, "pairs", merges=[["a", "b"]])]
    assert tokenizers.compare(models) == []
    assert tokenizers.compare([]) == []


def test_plain_files_are_passed_over(tmp_path):
    assert tokenizers.compare([model(tmp_path, "base"), ("plain", tmp_path / "plain.safetensors")]) == []


CASES = {
    "number": (
        {"vocabulary": {"a": 0, "c": 1, "ab": 2}},
        ["In the tokenizers of 'base' and 'other' token 1 differs: 'b' and 'c'."],
    ),
    "added": (
        {"added": [("<x>", 3), ("<y>", 4)]},
        ["The tokenizer of 'other' has 2 tokens that 'base' has not: '<x>', '<y>'."],
    ),
    "moved": (
        {"vocabulary": {"a": 0, "b": 1}, "added": [("ab", 5)]},
        ["In the tokenizers of 'base' and 'other' the token 'ab' has the numbers 2 and 5."],
    ),
    "fewer": ({"vocabulary": {"a": 0, "b": 1}}, ["The tokenizer of 'base' has 1 tokens that 'other' has not: 'ab'."]),
    "merges": (
        {"merges": []},
        ["In the tokenizers of 'base' and 'other' the merge rules differ: the same text may become other tokens."],
    ),
    "parts": (
        {"normalizer": {"type": "NFC"}, "pre_tokenizer": {"type": "ByteLevel"}},
        ["In the tokenizers of 'base' and 'other' normalizer and pre-tokenizer differ."],
    ),
    "special": (
        {"settings": {**SETTINGS, "eos_token": {"content": "<|im_end|>", "lstrip": False}}},
        ["In the tokenizers of 'base' and 'other' eos_token differs: '</s>' and '<|im_end|>'."],
    ),
    "template": (
        {"settings": {**SETTINGS, "chat_template": "{{ other }}"}},
        ["The chat templates of 'base' and 'other' differ: prompts are to be written as each was trained on."],
    ),
    "no template": ({"settings": {"eos_token": "</s>"}}, ["'other' has no chat template and 'base' has one."]),
}


@pytest.mark.parametrize("case", CASES)
def test_each_difference_is_a_sentence(tmp_path, case):
    options, sentences = CASES[case]
    assert tokenizers.compare([model(tmp_path, "base"), model(tmp_path, "other", **options)]) == sentences


def test_a_template_is_the_same_wherever_it_is_kept(tmp_path):
    base = model(tmp_path, "base")
    other = model(tmp_path, "other", settings={"eos_token": "</s>"})
    (other[1] / "chat_template.jinja").write_text("{{ messages }}\n")
    assert tokenizers.compare([base, other]) == []


def test_a_model_without_a_tokenizer_is_named(tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    assert tokenizers.compare([model(tmp_path, "base"), ("bare", bare)]) == [
        "'bare' has no tokenizer that can be compared with that of 'base'."
    ]


def test_vocabularies_of_every_kind_of_file(tmp_path):
    def written(name, **files):
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return tokenizers.vocabulary(folder)

    expected = {0: "a", 1: "b", 2: "<x>"}
    added = [{"id": 2, "content": "<x>"}]
    assert written("bpe", tokenizer={"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}) == expected
    assert (
        written("unigram", tokenizer={"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": added})
        == expected
    )
    assert written("slow", vocab={"a": 0, "b": 1}, added_tokens={"<x>": 2}) == expected
    assert written("none") is None
    (tmp_path / "none" / "tokenizer.json").write_text("{")
    assert tokenizers.vocabulary(tmp_path / "none") is None


def checked(scoring, *others, rows=3):
    return tokenizers.check(scoring, [scoring, *others], rows)


def test_tokens_beyond_the_embeddings_are_refused(tmp_path):
    fits = model(tmp_path, "fits")
    more = model(tmp_path, "more", added=[("<x>", 3), ("<y>", 4)])
    assert checked(fits) == []
    assert tokenizers.check(more, [more], None) == []
    with pytest.raises(CheckpointError) as refused:
        checked(more, rows=4)
    assert "'more' has 1 token beyond the 4 rows of the embeddings, from number 4 on: '<y>'" in str(refused.value)
    assert "models.tokenizer" in str(refused.value)
    assert checked(fits, more) == [
        "The tokenizer of 'more' has 2 tokens beyond the 3 rows of the embeddings, from number 3 on: '<x>', '<y>'."
    ]


def test_special_tokens_that_no_text_holds_are_told(tmp_path):
    """Gemma 3's language models have one: the place of an image."""
    idle = model(tmp_path, "idle", added=[("<image>", 3)], special=True)
    (sentence,) = checked(idle)
    assert sentence.endswith("from number 3 on: '<image>'; no text that is scored may hold them.")
    for name, settings in (
        ("padding", {**SETTINGS, "pad_token": "<image>"}),
        ("template", {**SETTINGS, "chat_template": "<image>{{ messages }}"}),
    ):
        with pytest.raises(CheckpointError, match="beyond the 3 rows"):
            checked(model(tmp_path, name, added=[("<image>", 3)], settings=settings, special=True))


def test_another_vocabulary_is_refused_and_a_clash_of_added_tokens_told(tmp_path):
    base = model(tmp_path, "base", {"a": 0, "b": 1, "ab": 2}, added=[("<x>", 3)])
    added = model(tmp_path, "added", added=[("<y>", 3)])
    assert checked(base, added, rows=4) == []
    assert tokenizers.compare([base, added]) == [
        "In the tokenizers of 'base' and 'added' token 3 differs: '<x>' and '<y>'."
    ]
    free = model(tmp_path, "free", {"a": 0, "b": 1, "[unused1]": 2})
    assert checked(base, free, rows=4) == []
    other = model(tmp_path, "other", {"b": 0, "a": 1, "ab": 2})
    with pytest.raises(
        CheckpointError, match="2 numbers of those of 'base' and 'other' mean different tokens: token 0"
    ):
        checked(base, other, rows=4)


def test_clashes_are_those_of_numbers_below_the_rows(tmp_path):
    """Other differences (merge rules, templates, added tokens) are no clashes; folders without a tokenizer pass."""
    base = model(tmp_path, "base", {"a": 0, "b": 1, "ab": 2}, added=[("<x>", 3)])
    added = model(tmp_path, "added", added=[("<y>", 3), ("<z>", 4)], settings={"chat_template": "{{ messages }}"})
    moved = model(tmp_path, "moved", {"a": 0, "b": 1}, added=[("ab", 5)])
    (tmp_path / "empty").mkdir()
    listed = [base, ("empty", tmp_path / "empty"), added, moved]
    differs = "In the tokenizers of 'base' and 'added' token 3 differs: '<x>' and '<y>'."
    twice = "In the tokenizers of 'base' and 'moved' the token 'ab' has the numbers 2 and 5."
    assert tokenizers.clashes(listed, None) == [differs, twice]
    assert tokenizers.clashes(listed, 4) == [differs]
    assert tokenizers.clashes(listed, 3) == []
    first = model(tmp_path, "first")  # has none of the numbers that clash
    assert tokenizers.clashes([first, base, added], None) == [differs]
    assert tokenizers.clashes(listed[1:2], 4) == tokenizers.clashes([], None) == []


def test_unrelated_vocabularies_of_usual_size_are_compared_at_once(tmp_path):
    left = model(tmp_path, "left", {f"l{number}": number for number in range(60_000)})
    right = model(tmp_path, "right", {f"l{number + 1}": number for number in range(60_000)})
    (sentence,) = tokenizers.clashes([left, right], None)
    assert sentence.endswith("(the first of 60000 such).")
