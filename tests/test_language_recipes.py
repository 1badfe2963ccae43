"""Objectives of language models in recipes: fields, paths, and a search over real (tiny) models."""

import json

import pytest
import yaml

from ecotone import launch
from ecotone.experiments import compose
from ecotone.experiments.checks import validate
from ecotone.experiments.recipe import Recipe
from ecotone.populations.errors import EcotoneError, InputError


@pytest.fixture
def family(tmp_path):
    """A base, two experts and a tokenizer of letters; questions and texts."""
    transformers = pytest.importorskip("transformers")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers

    letters = {letter: number for number, letter in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz .:?\nQA"])}
    plain = Tokenizer(models.WordLevel(letters, unk_token="."))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>")
    config = transformers.LlamaConfig(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )
    for number, name in enumerate(["base", "one", "two"]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        torch.manual_seed(number)
        for parameter in model.parameters():
            parameter.data += number * 0.3 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    words = ["the cat sat", "a dog ran off", "to be or not", "all that glitters", "now is the time", "so it goes"]
    lines = [{"text": text, "question": text, "choices": ["yes", "no", "maybe"], "answer": i % 3, "prompt": text}
             for i, text in enumerate(words)]  # fmt: skip
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def recipe_of(folder, /, **objective):
    data = {} if objective["type"] == "lm_eval" else {"data": "data.jsonl"}
    second = {"name": "bits", "type": "bits_per_byte", "data": "data.jsonl", "batch": 2}
    record = {
        "name": "letters",
        "models": {"base": "base", "experts": ["one", "two"], "architecture": "auto"},
        "merge": {"operator": "task_arithmetic"},
        "objectives": {
            "search": [{**second, "part": "search"}, {"name": "it", **data, **objective}],
            "held_out": [{**second, "part": "held_out"}],
        },
        "search": {"algorithm": "random", "granularity": "model"},
        "scoring": {"batch": 2},
        "budget": {"evaluations": 4},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record))
    return Recipe.from_yaml(folder / "recipe.yaml")


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "multiple_choice"},
        {"type": "multiple_choice", "reuse": False, "normalise": "bytes"},
        {"type": "perplexity", "context": 8},
        {"type": "likelihood"},
        {"type": "tokens_generated", "most": 4},
        {"type": "exact_match", "most": 4, "answer": "text"},
    ],
    ids=lambda objective: "-".join(map(str, objective.values())),
)
def test_a_search_scores_language_models(family, objective):
    recipe = recipe_of(family, **objective)
    assert [finding.subject for finding in validate(recipe)].count("objectives.search.it") == 1
    run = launch(recipe, family / "run")
    with run.journal() as journal:
        rows = list(journal.rows())
    assert len(rows) >= 4
    assert all(row.failure is None for row in rows)
    assert len({row.scores["bits"] for row in rows}) == len(rows)


def test_files_are_found_from_the_recipe_s_folder(family):
    recipe = recipe_of(family, type="multiple_choice", examples="data.jsonl", shots=1)
    spec = compose.worker_spec(recipe, None)
    assert spec.search[1].data == spec.search[1].examples == str(family / "data.jsonl")
    assert spec.tokenizer == str(family / "base")


def test_a_mistyped_setting_is_refused_with_the_nearest(family):
    with pytest.raises(InputError, match=r"objectives.search\[1\].normalize: unknown key. Did you mean 'normalise'"):
        recipe_of(family, type="multiple_choice", normalize="bytes")


def test_a_missing_file_is_refused_before_anything_is_scored(family):
    recipe = recipe_of(family, type="multiple_choice", data="dat.jsonl")
    with pytest.raises(InputError, match=r"objective 'it': data: .*dat.jsonl"):
        launch(recipe, family / "run")


def harness_task(family):
    """The fields of an objective that is a task of lm-eval."""
    pytest.importorskip("lm_eval")
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(family / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (family / "tasks").mkdir()
    (family / "tasks" / "letters.yaml").write_text(yaml.safe_dump(task))
    return {"type": "lm_eval", "task": "letters", "folder": "tasks"}


def test_validate_asks_lm_eval_what_a_task_is(family):
    named = harness_task(family)
    found = {finding.subject: finding.text for finding in validate(recipe_of(family, **named, limit=4))}
    assert found["lm_eval letters"] == "acc on 4 of 6 documents, multiple_choice"
    with pytest.raises(InputError, match="direction: expected maximize for the metric 'acc', found minimize"):
        validate(recipe_of(family, **named, direction="minimize"))


LANGUAGE = {
    "texts": {"type": "bits_per_byte", "batch": 2},
    "prompts": {"type": "tokens_generated", "most": 2},
    "choices": {"type": "multiple_choice"},
}


@pytest.mark.parametrize("kind", [*LANGUAGE, "harness"])
def test_tokens_beyond_the_embeddings_are_found_from_files(family, kind):
    """By ``validate``, without a model, whatever the objective; another tokenizer is a way out."""
    import shutil

    import transformers

    shutil.copytree(family / "base", family / "fits")
    tokenizer = transformers.AutoTokenizer.from_pretrained(family / "base")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(family / "base")
    objective = harness_task(family) if kind == "harness" else LANGUAGE[kind]
    record = recipe_of(family, **objective).record()
    del record["objectives"]["search"][0]
    record["objectives"]["held_out"] = []
    with pytest.raises(
        EcotoneError, match=r"tokenizer of 'base' has 1 token beyond the 35 rows .* number 35 on: '<tool>'"
    ):
        validate(Recipe.from_record(record, family), headers=True)
    record["models"]["tokenizer"] = "fits"
    found = {finding.subject: finding.text for finding in validate(Recipe.from_record(record, family), headers=True)}
    assert "tokenizer of 'base' has 1 token beyond" in found["tokens"]
    assert "'models.tokenizer' and 'base'" in found["tokenizers"] or "<tool>" in found["tokenizers"]
