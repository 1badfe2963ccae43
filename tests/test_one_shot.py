"""One merge without a search: the command, the search of one trial, texts as data, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import Ecotone
from safetensors.torch import load_file, save_file

from ecotone.experiments import compose, one_shot, one_shot_cli
from ecotone.experiments.recipe import Recipe
from ecotone.merging import operators
from ecotone.populations.errors import InputError
from ecotone.search.kinds import Context
from ecotone.search.one_shot import OneShotSettings
from ecotone.testing.searches import SPACE, from_text, to_text

NAMES = ("left", "right")
TOYS = """
import torch
from torch import nn


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def examples(seed, labelled=True):
    inputs = torch.randn(30, 4, generator=torch.Generator().manual_seed(seed))
    return (inputs, inputs[:, :3].argmax(1)) if labelled else inputs
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two experts, a recipe of them, and a cache of the test's own."""
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toys.py").write_text(TOYS)
    shapes = {"0.weight": (5, 4), "0.bias": (5,), "2.weight": (3, 5), "2.bias": (3,)}
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(base, tmp_path / "base.safetensors")
    for name in NAMES:
        noise = {key: 0.3 * torch.randn(value.shape, generator=generator) for key, value in base.items()}
        save_file({key: value + noise[key] for key, value in base.items()}, tmp_path / f"{name}.safetensors")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record()))
    return tmp_path


def record(**others: Any) -> dict[str, Any]:
    def data(seed: int, **arguments: Any) -> dict[str, Any]:
        return {"call": "./toys.py:examples", "arguments": {"seed": seed, **arguments}}

    return {
        "name": "toy",
        "models": {
            "base": "base.safetensors",
            "experts": [f"{name}.safetensors" for name in NAMES],
            "architecture": {"call": "./toys.py:net"},
        },
        "merge": {"operator": "ties", "density": 0.5, "dtype": "float32"},
        "objectives": {
            "search": [{"name": "right answers", "type": "accuracy", "data": data(0)}],
            "held_out": [{"name": "right answers", "type": "accuracy", "data": data(1)}],
        },
        "calibration": [{"name": name, "data": data(i, labelled=False)} for i, name in enumerate(NAMES)],
        "search": {"algorithm": "adamerging"},
        "budget": {"evaluations": 500},
        "runtime": {"pool": "ray", "workers": 3, "time_limit": 9.0},
        **others,
    }


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return {key: value.double() for key, value in load_file(folder / name).items()}


def of_files(folder: Path) -> tuple[object, ...]:
    return ("--base", folder / "base.safetensors", "--experts", *(folder / f"{name}.safetensors" for name in NAMES))


# -- with a recipe -------------------------------------------------------------------------------------------------


def test_a_recipe_is_merged_scored_exported_and_verified(folder: Path, ecotone: Ecotone) -> None:
    """By RegMean, whose ridge is None: the published merge, in place of the recipe's operator and search."""
    said = ecotone("merge", "recipe.yaml", "--operator", "regmean", "--to", "merged", "--json")
    assert said.code == 0, said.err
    found = json.loads(said.out)
    assert (found["operator"], found["taken"]) == ("regmean", "the operator's published merge")
    assert found["coefficients"] == {"left": 1.0, "right": 1.0}
    assert {subset: list(scores) for subset, scores in found["scores"].items()} == {
        "search": ["right answers"],
        "held_out": ["right answers"],
    }
    told = json.loads((folder / "merged" / "ecotone.json").read_text())
    assert told["recipe"]["search"]["algorithm"] == "one_shot"
    assert told["recipe"]["merge"] == {
        "operator": "regmean",
        "dtype": "float32",
        "freeze": [],
        "only": [],
        "rank": None,
    }
    assert told["recipe"]["runtime"]["pool"] == "serial"
    assert told["scores"] == found["scores"]
    assert "operator `regmean`" in (folder / "merged" / "README.md").read_text()
    verified = ecotone("verify", "merged")
    assert verified.code == 0, verified.err
    assert "The scores equal the recorded ones." in verified.out
    folders = {path.name for path in folder.iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == {"cache", "merged"}  # and no run


def test_what_is_exported_is_the_merge_that_is_told(folder: Path, ecotone: Ecotone) -> None:
    """Task arithmetic with coefficients that are given, in float64."""
    said = ecotone(
        "merge", "recipe.yaml", "--operator", "task_arithmetic", "--at", "0.25,-0.5", "--no-scores", "--to", "merged"
    )
    assert said.code == 0, said.err
    assert said.out.splitlines() == [
        "task_arithmetic of left, right at 0.25, -0.5 (as given).",
        "The merge is in merged.",
    ]
    base, left, right = (weights(folder, f"{name}.safetensors") for name in ("base", *NAMES))
    for name, value in weights(folder, "merged/model.safetensors").items():
        expected = base[name] + 0.25 * (left[name] - base[name]) - 0.5 * (right[name] - base[name])
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    told = json.loads((folder / "merged" / "ecotone.json").read_text())
    assert told["scores"] == {"search": {}, "held_out": None}
    assert told["recipe"]["calibration"] == []  # task arithmetic reads none
    assert "It has no recorded scores" in ecotone("verify", "merged").out


def test_the_coefficients_of_a_one_shot_recipe_stay(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record(search={"algorithm": "one_shot", "at": 0.4})))
    assert one_shot.of_recipe(folder / "recipe.yaml").search.model_dump()["at"] == 0.4
    assert one_shot.of_recipe(folder / "recipe.yaml", at=0.6).search.model_dump()["at"] == 0.6
    assert one_shot.of_recipe(folder / "recipe.yaml").merge.settings == {"density": 0.5}
    other = one_shot.of_recipe(folder / "recipe.yaml", {"merge.ridge": 0.5}, operator="regmean")
    assert other.merge.settings == {"ridge": 0.5}


def test_coefficients_may_be_solved_by_tensor(folder: Path, ecotone: Ecotone) -> None:
    """Model Stock of two experts: t = 2 cos / (1 + cos) by tensor, each of the two having half."""
    said = ecotone("merge", "recipe.yaml", "--operator", "task_arithmetic", "--solve", "model_stock", "--to", "merged")
    assert said.code == 0, said.err
    assert "(solved by model_stock; by tensor, this is the mean)" in said.out
    base, left, right = (weights(folder, f"{name}.safetensors") for name in ("base", *NAMES))
    for name, value in weights(folder, "merged/model.safetensors").items():
        one, two = left[name] - base[name], right[name] - base[name]
        cosine = float((one * two).sum() / (one.norm() * two.norm()))
        share = min(1.0, max(0.0, 2 * cosine / (1 + cosine))) / 2
        torch.testing.assert_close(value, base[name] + share * (one + two), rtol=1e-5, atol=1e-5)
    assert ecotone("verify", "merged").code == 0
    assert "--solve: expected without --at" in ecotone("merge", *FILES, "--solve", "x", "--at", "1", "--to", "m").err
    with pytest.raises(InputError, match="start: expected without at"):
        one_shot.of_recipe(folder / "recipe.yaml", {"search.start": {"solve": "average"}}, at=0.3)


@pytest.mark.parametrize(("operator", "taken"), [("ties", 1.0), ("pcb", 1.0), ("iso_c", 1.0), ("dare", None)])
def test_the_merge_of_the_paper(operator: str, taken: float | None) -> None:
    assert compose.published(operators.get(operator)) == taken


# -- without a recipe ----------------------------------------------------------------------------------------------


def test_files_are_averaged_where_an_operator_has_no_published_merge(folder: Path, ecotone: Ecotone) -> None:
    said = ecotone("merge", "--operator", "linear", *of_files(folder)[2:], "--to", folder / "average.safetensors")
    assert said.code == 0, said.err
    assert said.out.startswith("linear of left, right at 0.5 each (the average).")
    left, right = (weights(folder, f"{name}.safetensors") for name in NAMES)
    for name, value in weights(folder, "average.safetensors").items():
        torch.testing.assert_close(value, (left[name] + right[name]) / 2, rtol=1e-6, atol=1e-6)


def test_the_same_data_and_models_give_the_same_merge_with_and_without_a_recipe(folder: Path, ecotone: Ecotone) -> None:
    (folder / "one.py").write_text(
        f"{TOYS}\n\ndef left():\n    return examples(0)\n\n\ndef right():\n    return examples(1)\n"
    )
    data = [f"{name}=./one.py:{name}" for name in NAMES]
    architecture = ("--architecture", "./toys.py:net")
    said = ecotone(
        *("merge", "--operator", "kfac", *of_files(folder), *architecture, "--calibration", *data, "--to", "without")
    )
    assert said.code == 0, said.err
    said = ecotone("merge", "recipe.yaml", "--operator", "kfac", "--no-scores", "--to", "with")
    assert said.code == 0, said.err
    without, with_recipe = (weights(folder, f"{name}/model.safetensors") for name in ("without", "with"))
    for name, value in without.items():
        assert torch.equal(value, with_recipe[name])
        assert not torch.equal(value, weights(folder, "base.safetensors")[name])


def test_names_are_as_short_as_tells_experts_apart() -> None:
    assert one_shot.labels(["x/a", "x/b.safetensors"]) == ["a", "b"]
    assert one_shot.labels(["run-1/last/m", "run-2/last/m"]) == ["run-1/last/m", "run-2/last/m"]
    with pytest.raises(InputError, match="found x/a twice"):
        one_shot.labels(["x/a", "y/a", "x/a"])


def test_options_take_several_values() -> None:
    command: Any = one_shot_cli._Variadic("merge", params=[])
    seen: list[list[str]] = []
    parent = one_shot_cli.TyperCommand.parse_args
    try:
        one_shot_cli.TyperCommand.parse_args = lambda self, ctx, args: seen.append(args) or args  # type: ignore
        command.parse_args(None, ["R", "--experts", "a", "b", "--to", "d", "x", "--calibration", "a=f", "g"])
    finally:
        one_shot_cli.TyperCommand.parse_args = parent  # type: ignore
    spread = ["--experts", "a", "--experts", "b", "--to", "d", "x", "--calibration", "a=f", "--calibration", "g"]
    assert seen == [["R", *spread]]


# -- texts ---------------------------------------------------------------------------------------------------------


def test_texts_are_tokenised_with_a_mask_and_cut(tmp_path: Path) -> None:
    from tiny_language import save_tokenizer

    from ecotone.fitness.language.inputs import texts
    from ecotone.fitness.language.texts import tokenizer_of

    folder = save_tokenizer(tmp_path / "tokenizer")
    lines = ["the license", "a very much longer text about the terms and conditions of use", "the"]
    (tmp_path / "t.txt").write_text("\n".join([*lines, "  ", ""]))
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    plain = texts([str(tmp_path / "t.txt")], folder, tokens=12)
    records = texts([str(tmp_path / "t.jsonl")], folder, tokens=12)
    expected = [ids[:12] for ids in tokenizer_of(folder)(lines)["input_ids"]]
    for found in (plain, records):
        assert found["attention_mask"].sum(1).tolist() == [len(ids) for ids in expected]
        rows = zip(found["input_ids"], found["attention_mask"], strict=True)
        assert [ids[mask == 1].tolist() for ids, mask in rows] == expected
    assert plain["input_ids"].shape[1] == 12
    assert len(texts([str(tmp_path / "t.txt")], folder, limit=2)["input_ids"]) == 2
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(InputError, match="expected text, found none"):
        texts([str(tmp_path / "empty.txt")], folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "encoder"])
def test_language_models_by_texts(tmp_path: Path, ecotone: Ecotone, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """K-FAC of decoders, and RegMean of encoders, which have no logits."""
    import transformers
    from tiny_language import SIZES, llama, save_tokenizer

    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    for number, name in enumerate(("base", "a", "b")):
        save_tokenizer(tmp_path / name)
        if kind == "llama":
            model = llama(number, torch.float32)
        else:
            torch.manual_seed(number)
            sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
            model = transformers.BertModel(transformers.BertConfig(**sizes, num_attention_heads=4))
        model.save_pretrained(tmp_path / name)
    lines = [f"text {number} about the number {number * number}" for number in range(30)]
    (tmp_path / "t.txt").write_text("\n".join(lines))
    said = ecotone(
        *("merge", "--operator", "kfac" if kind == "llama" else "regmean", "--base", tmp_path / "base"),
        *("--experts", tmp_path / "a", tmp_path / "b", "--calibration", tmp_path / "t.txt", "--to", tmp_path / "m"),
    )
    assert said.code == 0, said.err
    assert "changed" not in said.err
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "m")
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "m")("a")["input_ids"]
    assert ecotone("verify", tmp_path / "m").code == 0


# -- refused -------------------------------------------------------------------------------------------------------

FILES = ("--base", "base.safetensors", "--experts", "left.safetensors", "right.safetensors")
NET = ("--architecture", "./toys.py:net")


@pytest.mark.parametrize(
    ("arguments", "error", "remedy"),
    [
        (["--operator", "kfak", *FILES], "--operator: expected one of linear", "Did you mean 'kfac'?"),
        (FILES, "--operator: expected a merge operator, found none.", "ecotone plugins"),
        (
            ["--operator", "kfac", *FILES, *NET],
            "reads inputs of each expert's own task, found none for 'left'",
            "iso_c",
        ),
        (["--operator", "kfac", *FILES], "--architecture: the operator 'kfac' gathers statistics of layers", "Name a"),
        (
            ["--operator", "tsv_m", *FILES, "--calibration", "t"],
            "--calibration: the operator 'tsv_m' reads no",
            "Leave",
        ),
        (["--operator", "tsv_m", "--experts", "left.safetensors"], "--base: the operator 'tsv_m' adds to", "linear"),
        (["--operator", "tsv_m"], "--experts: expected the models to merge, found none.", "--experts A B"),
        (["--operator", "tsv_m", *FILES, "--architecture", "auto"], "--architecture: auto takes Hugging Face", "Name"),
        (
            ["--operator", "kfac", *FILES, *NET, "--calibration", "up=toys.py"],
            "one of left, right, found 'up'",
            "Known",
        ),
        (["--operator", "kfac", *FILES, *NET, "--calibration", "none.txt"], "none.txt: no such file.", "Give a file"),
        (["--operator", "tsv_m", *FILES, "--at", "0.3;1"], "--at: expected a number, or numbers separated", ""),
        (["--operator", "tsv_m", *FILES, "--at", "1,2,3"], "search.at: expected a number, or 2", ""),
        (["recipe.yaml", *FILES], "--experts: expected without a recipe", "Leave one out."),
        (["recipe.yaml", "--set", "merge.density={low: 0.1, high: 0.9}"], "merge.density: one_shot searches", ""),
        (["recipe.yaml", "--operator", "kfac", "--set", "calibration=[]"], "calibration: the operator kfac reads", ""),
    ],
)
def test_one_error(folder: Path, ecotone: Ecotone, arguments: list[str], error: str, remedy: str) -> None:
    said = ecotone("merge", *arguments, "--to", "merged")
    assert said.code == 1
    told = [line for line in said.err.splitlines() if not line.startswith("Preparing")]
    assert told[0].startswith("error: ")
    assert error in told[0]
    assert remedy in "".join(told[1:])
    assert not (folder / "merged").exists()


def test_a_target_that_exists_is_refused_before_anything_is_done(folder: Path, ecotone: Ecotone) -> None:
    (folder / "merged").mkdir()
    (folder / "merged" / "notes").write_text("mine")
    said = ecotone("merge", "recipe.yaml", "--operator", "regmean", "--to", "merged")
    assert said.err.startswith("error: merged: expected a new or empty directory")
    assert not (folder / "cache").exists()


def test_other_algorithms_and_runs_need_an_objective(folder: Path, ecotone: Ecotone) -> None:
    none = {"objectives": {"search": []}, "calibration": []}
    with pytest.raises(InputError, match=r"objectives\.search: expected a list of 1 or more, found 0"):
        Recipe.from_record(record(search={"algorithm": "m2n2"}, **none), folder)
    alone = {"search": [], "held_out": record()["objectives"]["held_out"]}
    with pytest.raises(InputError, match=r"objectives\.search: expected objectives beside those of held_out"):
        Recipe.from_record(record(search={"algorithm": "one_shot"}, **none | {"objectives": alone}), folder)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(record(search={"algorithm": "one_shot"}, **none)))
    said = ecotone("run", "recipe.yaml", "--out", "run")
    assert said.code == 1
    assert "ecotone merge recipe.yaml --to DIR" in said.err


# -- the search ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "published", "row"),
    [
        (None, None, [1 / 3] * 3),
        (None, 1.0, [1.0] * 3),
        (0.3, 1.0, [0.3] * 3),
        ((0.1, 0.2, 0.3), 1.0, [0.1, 0.2, 0.3]),
    ],
)
def test_the_search_asks_once_and_goes_on_from_its_state(at: Any, published: float | None, row: list[float]) -> None:
    settings, context = OneShotSettings(at=at), Context(SPACE, (), seed=0, published=published)
    search, _ = settings.make(context)
    assert not search.done
    before = from_text(to_text(search.state()))
    [trial] = search.ask(5)
    assert (trial.number, trial.genome.segments) == (0, 1)
    np.testing.assert_allclose(trial.genome.coefficients[0], row, rtol=1e-15)
    assert search.done
    assert search.ask(5) == []
    again, _ = settings.make(context)
    again.restore(from_text(to_text(search.state())))
    assert again.done
    again.restore(before)
    assert [one.genome.digest for one in again.ask(1)] == [trial.genome.digest]
