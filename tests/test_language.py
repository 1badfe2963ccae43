"""lm-eval tasks as objectives: the scores of ``simple_evaluate``, nothing tokenised twice, refusals in words."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language as tiny
import torch
import yaml
from parts import context, refused

from ecotone.fitness import lm_eval as language
from ecotone.fitness.protocol import Divisible, Objective
from ecotone.populations.errors import InputError
from ecotone.populations.trial import Goal

pytest.importorskip("lm_eval.models.huggingface")
transformers = pytest.importorskip("transformers")

COLOURS = ["red", "green", "blue", "grey", "pink"]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"
CPU = torch.device("cpu")
GOAL = Goal("skill")
RANKED = [
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
    {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
    {"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True},
    {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False},
]
TASKS: dict[str, dict[str, Any]] = {
    "colours": {
        "output_type": "multiple_choice",
        "training_split": "train",
        "num_fewshot": 2,
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": RANKED,
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "{{answer % 3}}",
    },
    "guessed": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["e", "\n"], "do_sample": False, "max_gen_toks": 6},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        "filter_list": [
            {"name": "whole", "filter": [{"function": "take_first"}]},
            {
                "name": "first",
                "filter": [{"function": "regex", "regex_pattern": "(.)"}, {"function": "take_first"}],
            },
        ],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[answer]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "whole_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{(question + ' ') * (answer + 1)}}",
        "metric_list": [
            {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False},
        ],
    },
}


def documents(count: int, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        words = rng.choices(COLOURS, k=rng.randint(1, 9))
        choices = [rng.choice(COLOURS) + rng.choice(["", " and blue"]) for _ in range(3)]
        found.append({"question": f"{number} {' '.join(words)}", "choices": choices, "answer": rng.randrange(3)})
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of task files over 23 documents, and some to show."""
    path = tmp_path_factory.mktemp("tasks")
    files = {}
    for split, count in (("train", 8), ("test", 23)):
        files[split] = str(path / f"{split}.jsonl")
        Path(files[split]).write_text("\n".join(json.dumps(each) for each in documents(count, count)))
    data = {"data_files": files, "cache_dir": str(path / "cache")}
    for name, task in TASKS.items():
        write(path, name, {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test", **task})
    return str(path)


def write(folder: Path, name: str, task: dict[str, Any]) -> None:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task}))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a Llama of two layers of 32, random, with a byte-level tokenizer that knows some words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = str(tmp_path_factory.mktemp("tiny-llama"))
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([" ".join(COLOURS)] * 9, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(path)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def model(tokenizer: str) -> Any:
    made = transformers.AutoModelForCausalLM.from_pretrained(tokenizer).eval().requires_grad_(False)
    change(made, 0)
    return made


def change(model: Any, seed: int) -> None:
    """Other weights, and large enough that answers differ, in the way of ``Resident``: pointers are swapped."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.data = parameter.data + 0.3 * noise


def built(folder: str | None, tokenizer: str, task: str, **settings: Any) -> language.LanguageTask:
    return settings_of(task=task, folder=folder, **{"batch": 4, **settings}).build(context(tokenizer=tokenizer))


def settings_of(**settings: Any) -> language.LmEvalSettings:
    return language.LmEvalSettings(**{"name": "skill", "type": "lm_eval", **settings})


@pytest.fixture(autouse=True)
def no_report_of_the_machine(monkeypatch):
    """``simple_evaluate`` runs pip and git for its report, which takes most of its time."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def reference(model: Any, folder: str, tokenizer: str, task: str, batch: int = 4, **settings: Any) -> Any:
    """What ``simple_evaluate`` says: results by metric, and samples in document order."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(
        pretrained=model,
        tokenizer=transformers.AutoTokenizer.from_pretrained(tokenizer),
        batch_size=batch,
        max_length=settings.pop("max_length", None),
    )
    manager = TaskManager(include_path=folder, include_defaults=False)
    with torch.random.fork_rng():
        found = simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **settings)
    return found["results"][task], sorted(found["samples"][task], key=lambda sample: sample["doc_id"])


def answers(objective: language.LanguageTask) -> list[Any]:
    """What the model last answered, document by document."""
    return [[plain(each.resps) for each in instances] for instances in objective.documents]


def expected(samples: list[Any]) -> list[Any]:
    """The same of ``simple_evaluate``."""
    first = min(each["filter"] for each in samples)
    return [[plain(resps) for resps in each["resps"]] for each in samples if each["filter"] == first]


def plain(resps: list[Any]) -> list[Any]:
    """Without whether a continuation is greedy, which is left out where the task does not ask for it."""
    return [each[0] if isinstance(each, tuple) else each for each in resps]


@pytest.mark.parametrize(
    ("task", "metric", "filter_"),
    [
        ("colours", "acc", "none"),
        ("colours", "acc_norm", "none"),
        ("letters", "acc", "none"),
        ("guessed", "exact_match", "whole"),
        ("guessed", "exact_match", "first"),
        ("last_word", "acc", "none"),
    ],
)
def test_scores_are_those_of_simple_evaluate(folder, tokenizer, model, task, metric, filter_):
    objective = built(folder, tokenizer, task, metric=metric, filter=filter_)
    assert isinstance(objective, Objective)
    objective.score(model)
    change(model, 1)
    score = objective.score(model)
    results, samples = reference(model, folder, tokenizer, task)
    assert score.value == results[f"{metric},{filter_}"]
    assert score.per_example.tolist() == [each[metric] for each in samples if each["filter"] == filter_]
    assert score.per_example.dtype == bool
    assert score.items == 23


@pytest.mark.parametrize(("task", "metric"), [("colours", "acc"), ("guessed", "exact_match")])
def test_a_mixture_of_experts_scores_as_simple_evaluate_says(folder, tokenizer, task, metric):
    model = tiny.qwen3_moe(dtype=torch.float32)
    objective = built(folder, tokenizer, task, metric=metric)
    objective.score(model)
    change(model, 1)
    score = objective.score(model)
    _, samples = reference(model, folder, tokenizer, task)
    first = min(each["filter"] for each in samples)
    assert score.per_example.tolist() == [each[metric] for each in samples if each["filter"] == first]


@pytest.mark.parametrize("task", ["colours", "letters", "guessed", "last_word", "whole_texts"])
def test_answers_in_bfloat16_are_the_same_bits(folder, tokenizer, model, task):
    model.to(torch.bfloat16)
    objective = built(folder, tokenizer, task)
    objective.score(model)
    change(model, 3)
    objective.score(model)
    _, samples = reference(model, folder, tokenizer, task)
    assert answers(objective) == expected(samples)


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_all_documents_at_once_are_answered_right_where_each_is(folder, tokenizer, model, metric):
    objective = built(folder, tokenizer, "colours", metric=metric)
    assert objective.verdicts is not None
    slow = replace(objective, verdicts=None)
    for seed in range(3):
        change(model, seed)
        assert objective.score(model).per_example.tolist() == slow.score(model).per_example.tolist()
    assert built(folder, tokenizer, "colours", metric="mcc").verdicts is None


def test_a_task_that_says_otherwise_is_asked_of_each_document(folder, tokenizer, model, monkeypatch):
    monkeypatch.setattr("lm_eval.api.task.ConfigurableTask.process_results", lambda *_: {"acc": 1.0})
    objective = built(folder, tokenizer, "colours")
    assert objective.verdicts is None
    assert objective.score(model).value == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_are_added_up_to_the_same_bits_as_one_row_alone(dtype):
    generator = torch.Generator().manual_seed(0)
    for length in (*range(1, 70), 255, 256, 2047):
        rows = (4 * torch.randn(17, length, generator=generator) - 8).to(dtype)
        assert torch.equal(rows.sum(-1), torch.stack([row[None].sum() for row in rows]))


@pytest.mark.parametrize(
    ("task", "metric"),
    [("last_word", "perplexity"), ("whole_texts", "bits_per_byte"), ("whole_texts", "word_perplexity")],
)
def test_perplexities_have_one_value_a_document(folder, tokenizer, model, task, metric):
    score = built(folder, tokenizer, task, metric=metric, max_length=24).score(model)
    results, samples = reference(model, folder, tokenizer, task, max_length=24)
    assert score.value == results[f"{metric},none"]
    logarithms = np.array(
        [each["resps"][0][0] if task == "whole_texts" else each["resps"][0][0][0] for each in samples]
    )
    texts = [each["target"] for each in samples]
    weights = {
        "perplexity": np.ones(len(texts)),
        "bits_per_byte": np.array([len(text) for text in texts]) * np.log(2),
        "word_perplexity": np.array([len(text.split(" ")) for text in texts]),
    }[metric]
    expected = -logarithms / weights if metric == "bits_per_byte" else np.exp(-logarithms / weights)
    np.testing.assert_allclose(score.per_example, expected, rtol=1e-12)


def test_a_metric_of_all_documents_together_has_no_value_for_one(folder, tokenizer, model):
    results, _ = reference(model, folder, tokenizer, "colours")
    score = built(folder, tokenizer, "colours", metric="mcc").score(model)
    assert score.value == results["mcc,none"]
    assert score.per_example is None
    brier = built(folder, tokenizer, "colours", metric="brier_score").score(model)
    assert brier.value == results["brier_score,none"]
    assert brier.per_example.mean() == pytest.approx(brier.value)


@pytest.mark.parametrize(
    ("task", "settings"),
    [
        ("colours", {"shots": 1}),
        ("colours", {"shots": 0, "system_instruction": "Say a colour."}),
        ("colours", {"chat_template": True, "fewshot_as_multiturn": False}),
        ("colours", {"max_length": 20, "batch": 7}),
        ("guessed", {"chat_template": True, "system_instruction": "Say a colour."}),
        ("guessed", {"max_length": 20, "batch": 7}),
        ("whole_texts", {"max_length": 20, "batch": 7}),
    ],
)
def test_settings_mean_what_they_mean_to_simple_evaluate(folder, tokenizer, model, task, settings):
    objective = built(folder, tokenizer, task, **settings)
    objective.score(model)
    names = {"shots": "num_fewshot", "chat_template": "apply_chat_template"}
    _, samples = reference(
        model, folder, tokenizer, task, **{names.get(name, name): value for name, value in settings.items()}
    )
    samples = [each for each in samples if each["filter"] in ("none", "whole")]  # its other filter's are the same
    assert [[each.args for each in instances] for instances in objective.documents] == [
        each["arguments"] for each in samples
    ]
    assert answers(objective) == expected(samples)


@pytest.mark.parametrize("ties", [False, True])
def test_greedy_continuations_are_known(folder, tokenizer, model, tmp_path, ties):
    """The right answer is the model's likeliest next token, or the first of tokens that are all as likely."""
    decode = transformers.AutoTokenizer.from_pretrained(tokenizer)
    if ties:
        model.lm_head.weight.data = torch.zeros_like(model.lm_head.weight)
    found = []
    for document in documents(23, 23):
        question = decode(document["question"], return_tensors="pt").input_ids
        likeliest = decode.decode(model(question).logits[0, -1].argmax())
        found.append({"question": document["question"], "choices": [likeliest, "x", " green"], "answer": 0})
    (tmp_path / "greedy.jsonl").write_text("\n".join(map(json.dumps, found)))
    data = {"data_files": {"test": str(tmp_path / "greedy.jsonl")}, "cache_dir": str(tmp_path)}
    metrics = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
    task = TASKS["colours"] | {"dataset_path": "json", "dataset_kwargs": data, "test_split": "test"}
    task |= {"doc_to_text": "{{question}}", "target_delimiter": "", "num_fewshot": 0, "metric_list": metrics}
    del task["training_split"]
    write(tmp_path, "greedy", task)
    objective = built(str(tmp_path), tokenizer, "greedy")
    score = objective.score(model)
    results, samples = reference(model, str(tmp_path), tokenizer, "greedy")
    assert [[each.resps for each in instances] for instances in objective.documents] == [
        each["resps"] for each in samples
    ]
    assert score.value == results["exact_match,none"]
    assert score.value > 0.3
    assert {answer for each in samples for ((_, answer),) in each["resps"]} == {True, False}


def test_search_and_rest_share_no_document_and_make_up_the_task(folder, tokenizer, model):
    parts = {}
    for part, count in (("search", 9), ("rest", 14)):
        objective = built(folder, tokenizer, "colours", limit=9, seed=5, part=part)
        score = objective.score(model)
        parts[part] = [instances[0].doc["question"] for instances in objective.documents]
        assert score.items == len(score.per_example) == count
        every = [each["question"] for each in documents(23, 23)]
        numbers = [every.index(question) for question in parts[part]]
        results, samples = reference(model, folder, tokenizer, "colours", samples={"colours": numbers})
        assert score.value == results["acc,none"]
        assert score.per_example.tolist() == [each["acc"] for each in samples]
    assert sorted(parts["search"] + parts["rest"]) == sorted(every)
    smaller = built(folder, tokenizer, "colours", limit=4, seed=5)
    assert {instances[0].doc["question"] for instances in smaller.documents} < set(parts["search"])
    other = built(folder, tokenizer, "colours", limit=9, seed=6)
    assert [instances[0].doc["question"] for instances in other.documents] != parts["search"]
    assert built(folder, tokenizer, "colours", part="all").score(model).items == 23
    assert built(folder, tokenizer, "colours", limit=99).score(model).items == 23


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_tokenised_after_build(folder, tokenizer, model, task, monkeypatch):
    calls = []
    kind = transformers.PreTrainedTokenizerFast
    encode = kind._encode_plus

    def counted(self, *arguments, **options):
        calls.append(arguments)
        return encode(self, *arguments, **options)

    monkeypatch.setattr(kind, "_encode_plus", counted)
    objective = built(folder, tokenizer, task)
    assert calls
    calls.clear()
    for seed in (1, 2):
        change(model, seed)
        objective.score(model)
    assert calls == []


@pytest.mark.parametrize("task", TASKS)
def test_scores_do_not_depend_on_what_was_scored_before(folder, tokenizer, model, task):
    objective = built(folder, tokenizer, task)
    first = objective.score(model)
    weights = [parameter.data for parameter in model.parameters()]
    change(model, 4)
    objective.score(model)
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data = value
    again = objective.score(model)
    assert again.value == first.value
    np.testing.assert_array_equal(again.per_example, first.per_example)
    np.testing.assert_array_equal(built(folder, tokenizer, task).score(model).per_example, first.per_example)


def test_samples_are_drawn_as_simple_evaluate_draws_them(folder, tokenizer, model, tmp_path):
    task = yaml.safe_load((Path(folder) / "guessed.yaml").read_text())
    task["generation_kwargs"] |= {"do_sample": True, "temperature": 1.0}
    write(tmp_path, "sampled", task | {"task": "sampled", "repeats": 2})
    objective = built(str(tmp_path), tokenizer, "sampled")
    objective.score(model)
    found = [instances[0].resps for instances in objective.documents]
    _, samples = reference(model, str(tmp_path), tokenizer, "sampled")
    assert found == [each["resps"][0] for each in samples if each["filter"] == "whole"]
    assert any(len(set(texts)) == 2 for texts in found)


def test_global_generators_stay_as_they_are(folder, tokenizer, model):
    def states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.random.get_rng_state().tolist()

    random.seed(8), np.random.seed(8), torch.manual_seed(8)
    before = states()
    objective = built(folder, tokenizer, "colours")
    assert states() == before
    objective.score(model)
    assert states() == before


@pytest.mark.parametrize("task", TASKS)
def test_nan_makes_the_score_nan(folder, tokenizer, model, task):
    model.model.norm.weight.data = torch.full_like(model.model.norm.weight, float("nan"))
    assert np.isnan(built(folder, tokenizer, task).score(model).value)


@pytest.mark.parametrize("task", ["colours", "guessed", "whole_texts"])
def test_a_batch_that_does_not_fit_is_halved_once(folder, tokenizer, model, task, monkeypatch):
    tried = []
    forward = type(model).forward

    def small(self, input_ids, *arguments, **options):
        tried.append(len(input_ids))
        if len(input_ids) > 5:
            raise torch.OutOfMemoryError("no room")
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(type(model), "forward", small)
    objective = built(folder, tokenizer, task, batch=None)
    assert objective.batch == language.BATCH
    score = objective.score(model)
    assert objective.batch == 4
    assert score.value == built(folder, tokenizer, task, batch=4).score(model).value
    tried.clear()
    objective.score(model)
    assert max(tried) <= 4
    with pytest.raises(InputError, match=r"batch: 64 rows in one forward pass do not fit in memory"):
        built(folder, tokenizer, task, batch=64).score(model)


def test_on_a_cpu_logits_stay_small(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(language, "LOGITS_BYTES", 50 * 300 * 4 * 10)
    assert built(folder, tokenizer, "colours", batch=None).batch in (4, 8)


def test_other_errors_of_a_model_are_not_taken_for_memory(folder, tokenizer, model, monkeypatch):
    def broken(self, *_, **__):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(type(model), "forward", broken)
    with pytest.raises(RuntimeError, match=r"shapes differ"):
        built(folder, tokenizer, "colours", batch=None).score(model)


def test_a_task_is_described_without_a_model(folder):
    found = language.described(settings_of(task="last_word", folder=folder, limit=9, part="rest"))
    assert found == language.Description(14, 23, "perplexity", False, "loglikelihood")
    assert language.described(settings_of(task="colours", folder=folder)).documents == 23


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "colour"}, "has none called 'colour'. Nearest: colours"),
        ({"task": "hella_swag"}, "has none called 'hella_swag'. Nearest: .*hellaswag"),
        ({"task": "hellaswag"}, "lm-eval has one: leave folder out"),
        ({"task": "zzzzzzzzzzzzzzz"}, "Known: colours, guessed, last_word, letters, whole_texts"),
        ({"metric": "acc_nrm"}, "has .acc, acc_norm, mcc, brier_score., found 'acc_nrm'. Did you mean 'acc_norm'"),
        ({"filter": "strict"}, "filter: expected one that 'colours' has .none., found 'strict'"),
        ({"folder": "no/such"}, "expected a folder of task files, found none at 'no/such'"),
        ({"part": "rest", "limit": 23}, "limit: expected fewer than the 23 documents"),
        ({"shots": 9}, r"shots: expected at most \d+, as 'colours' has \d+ documents to draw from.*, found 9"),
        ({"max_length": 2}, "expected continuations of 1 to 2 tokens"),
        ({"task": "guessed", "max_length": 6}, "generates up to 6 tokens, and the model takes 6"),
    ],
)
def test_bad_settings_are_refused_in_words(folder, tokenizer, monkeypatch, settings, message):
    class Own:
        task_index = dict.fromkeys(["hellaswag", "arc_easy"])

    monkeypatch.setattr(language, "_own_tasks", Own)
    with pytest.raises(InputError, match=message) as caught:
        built(**{"folder": folder, "tokenizer": tokenizer, "task": "colours", **settings})
    assert str(caught.value).startswith("objective 'skill': ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "^batch: Input should be greater than or equal to 1"),
        ({"limit": 0}, "^limit: Input should be greater than or equal to 1"),
        ({"max_length": 1}, "^max_length: Input should be greater than or equal to 2"),
        ({"shots": -1}, "^shots: Input should be greater than or equal to 0"),
        ({"part": "rest"}, "limit: expected the number of documents that part 'rest' leaves out, found nothing"),
        ({"part": "all", "limit": 3}, "limit: expected nothing with part 'all', found 3"),
    ],
)
def test_settings_that_fit_no_task(settings, message):
    with refused(message):
        settings_of(task="colours", **settings)


def test_zero_shots_that_a_task_fixes_are_kept(folder, tokenizer, tmp_path):
    write(
        tmp_path,
        "fixed",
        yaml.safe_load((Path(folder) / "colours.yaml").read_text()) | {"task": "fixed", "num_fewshot": 0},
    )
    with pytest.raises(InputError, match=r"shots: expected none, as 'fixed' fixes num_fewshot at 0, found 3"):
        built(str(tmp_path), tokenizer, "fixed", shots=3)
    assert built(str(tmp_path), tokenizer, "fixed").task.get_config("num_fewshot") == 0


def test_groups_are_refused_with_their_members(folder, tokenizer, tmp_path):
    write(
        tmp_path, "one", yaml.safe_load((Path(folder) / "colours.yaml").read_text()) | {"task": "one", "tag": "tagged"}
    )
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "all_of_them", "task": ["one", {"task": "two"}]}))
    with pytest.raises(InputError, match=r"found 'all_of_them', a group of 2: one, two. Make an objective of each"):
        built(str(tmp_path), tokenizer, "all_of_them")
    with pytest.raises(InputError, match=r"found 'tagged', a group of 1: one"):
        built(str(tmp_path), tokenizer, "tagged")


def test_files_that_cannot_be_read_are_named(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "broken.yaml").write_text("task: [unclosed")
    (tmp_path / "listed.yaml").write_text("- task")
    (tmp_path / "half.yaml").write_text("task: half\ninclude: missing")
    monkeypatch.setattr(language, "_own_tasks", lambda: type("Own", (), {"task_index": {}}))
    with pytest.raises(InputError, match=r"cannot be read as YAML: broken.yaml, half.yaml, listed.yaml"):
        built(str(tmp_path), tokenizer, "broken")


def test_data_that_cannot_be_had_is_named(tokenizer, tmp_path):
    write(tmp_path, "far", TASKS["letters"] | {"dataset_path": "nobody/nothing", "test_split": "test"})
    with pytest.raises(InputError, match=r"the dataset .'nobody/nothing'. of 'far' cannot be loaded .*HF_HUB_OFFLINE"):
        built(str(tmp_path), tokenizer, "far")


CODE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
def text(document): return document["question"]
def results(document, answers):
    document["question"] += "!"
    return {"length": len(document["question"]), "none_so_far": 1}
"""


@pytest.fixture
def coded(folder: str, tmp_path: Path) -> Path:
    """A folder whose tasks name functions: in the file, and in one that it includes."""
    plain = yaml.safe_load((Path(folder) / "letters.yaml").read_text())
    del plain["task"], plain["doc_to_text"]
    (tmp_path / "tricks.py").write_text(CODE)
    (tmp_path / "base").write_text(yaml.safe_dump(plain) + "doc_to_text: !function tricks.text\n")
    (tmp_path / "included.yaml").write_text("task: included\ninclude: base\n")
    own = "metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]\n"
    own += "process_results: !function tricks.results\n"
    (tmp_path / "direct.yaml").write_text("task: direct\ninclude: base\n" + own)
    return tmp_path


@pytest.mark.parametrize("task", ["included", "direct"])
def test_code_of_a_folder_is_not_run(coded, tokenizer, task):
    with pytest.raises(InputError, match=r"runs code of its own .!function tricks.*allow_code: true"):
        built(str(coded), tokenizer, task)
    assert not (coded / "tricks.ran").exists()


def test_code_of_a_folder_is_run_if_allowed(coded, tokenizer, model):
    objective = built(str(coded), tokenizer, "direct", allow_code=True)
    lengths = [len(each["question"]) + 1 for each in documents(23, 23)]
    for _ in range(2):
        assert objective.score(model).per_example.tolist() == lengths
    assert built(str(coded), tokenizer, "direct", allow_code=True, metric="none_so_far").score(model).value == 1
    with pytest.raises(InputError, match=r"expected 'width' among the task's results, found length, none_so_far"):
        built(str(coded), tokenizer, "direct", allow_code=True, metric="width").score(model)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_prompt": "prompts.yaml:one"}, "uses a prompt file"),
        ({"dataset_path": "pandas"}, "reads pickles"),
        ({"metric_list": [{"metric": "user/metric"}]}, "lm-eval has no metric 'user/metric'"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "a metric that is fetched as code"),
        ({"generation_kwargs": {"custom_generate": "user/code"}}, "code that generates"),
        ({"dataset_kwargs": {"trust_remote_code": True}}, "code that comes with data"),
        ({"unsafe_code": True}, "runs the model's answers as code"),
        ({"doc_to_text": "{{question.__class__.__mro__}}"}, "SecurityError"),
    ],
)
def test_ways_around_are_closed(folder, tokenizer, tmp_path, fields, message):
    task = yaml.safe_load((Path(folder) / "letters.yaml").read_text())
    write(tmp_path, "sly", task | {"task": "sly"} | fields)
    with pytest.raises(InputError, match=message):
        built(str(tmp_path), tokenizer, "sly")


def test_local_data_that_is_missing_is_named(folder, tokenizer, tmp_path):
    task = yaml.safe_load((Path(folder) / "letters.yaml").read_text())
    write(tmp_path, "lost", task | {"task": "lost", "dataset_kwargs": {"data_files": {"test": "lost.jsonl"}}})
    with pytest.raises(InputError, match=r"the dataset \('json'\) of 'lost' cannot be loaded .*Check data_files"):
        built(str(tmp_path), tokenizer, "lost")


def test_a_perplexity_beyond_floating_point_is_infinite(folder, tokenizer, model):
    objective = built(folder, tokenizer, "last_word")
    model.lm_head.weight.data = model.lm_head.weight * 1e4
    assert objective.score(model).value == np.inf


def test_tokenizers_that_do_not_fit_are_refused(folder, tokenizer, tmp_path):
    made = transformers.AutoTokenizer.from_pretrained(tokenizer)
    made.chat_template = None
    made.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"chat_template: the tokenizer of .* has none"):
        built(folder, str(tmp_path), "colours", chat_template=True)
    with pytest.raises(InputError, match=r"expected a config.json in .*Give max_length"):
        built(folder, str(tmp_path), "colours")
    assert built(folder, str(tmp_path), "colours", max_length=96).documents
    with pytest.raises(InputError, match=r"tokenizer: none can be read from no/such"):
        built(folder, "no/such", "colours")


def test_a_missing_lm_eval_is_named(folder, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    with pytest.raises(InputError, match=r"needs lm-eval .*pip install .*\[language\]'"):
        built(folder, tokenizer, "colours")


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_and_nearest_names_given(tokenizer):
    with pytest.raises(InputError, match=r"lm-eval has none called 'hella_swag'. Nearest: .*hellaswag"):
        built(None, tokenizer, "hella_swag")
    with pytest.raises(InputError, match=r"the dataset \('.*hellaswag'\) of 'hellaswag' cannot be loaded"):
        built(None, tokenizer, "hellaswag")
    with pytest.raises(InputError, match=r"found 'mmlu', a group"):
        built(None, tokenizer, "mmlu")


# -- parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["colours", "last_word"])
def test_parts_make_up_the_whole(folder: str, tokenizer: str, model: Any, task: str) -> None:
    tiny.check_parts(built(folder, tokenizer, task, metric="acc"), model, varied=task == "colours")


def test_a_task_whose_metric_is_no_mean_has_no_parts(folder: str, tokenizer: str) -> None:
    assert not isinstance(built(folder, tokenizer, "last_word", metric="perplexity"), Divisible)
