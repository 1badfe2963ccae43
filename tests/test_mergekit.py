"""mergekit's YAML without mergekit: its documented rules, applied by a few lines here, give the genome's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import Ecotone
from safetensors.numpy import save_file

from ecotone.experiments import compose
from ecotone.experiments.compose import check_operator
from ecotone.experiments.exports import export_mergekit, rescored
from ecotone.experiments.mergekit import import_mergekit, mergekit_config, snapped
from ecotone.experiments.mergekit_filters import by_parts, filters
from ecotone.experiments.recipe import Recipe
from ecotone.experiments.running import launch
from ecotone.merging import operators
from ecotone.merging.models import ties
from ecotone.merging.models.checkpoint import Checkpoint, Shard
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.matching import Apart
from ecotone.merging.models.model import TensorInfo
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.search.coefficients import parts_of

# -- what mergekit's documentation says ---------------------------------------------------------------------


def documented(setting: Any, name: str) -> float:
    """The value of a parameter for a tensor: a number, or that of the first filter that is part of the name."""
    if not isinstance(setting, list):
        return setting
    for entry in setting:
        if "filter" not in entry or entry["filter"] in name:
            return entry["value"]
    raise LookupError(f"no value for {name}")


def weights(config: Mapping[str, Any], name: str) -> dict[str, float]:
    """By model, the weight of a tensor."""
    assert config["merge_method"] == "linear"
    assert config["parameters"] == {"normalize": False}
    assert config["dtype"] == "float32"
    return {one["model"]: documented(one["parameters"]["weight"], name) for one in config["models"]}


# -- models that are headers alone --------------------------------------------------------------------------

LLAMA = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(12) for part in ("input_layernorm", "mlp.up_proj", "self_attn")),
    "model.norm.weight",
)


MIXTURE = (
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(12)
        for part in (
            *(
                "input_layernorm",
                "post_attention_layernorm",
                "self_attn.q_proj",
                "self_attn.q_norm",
                "self_attn.o_proj",
            ),
            *(
                "mlp.gate",
                "mlp.shared_expert_gate",
                *(f"mlp.experts.{e}.{p}_proj" for e in range(3) for p in ("gate", "up")),
            ),
        )
    ),
    "model.norm.weight",
)


def model(
    name: str, tensors: Mapping[str, TensorInfo], config: dict[str, Any] | None = None, folder: str = "/m"
) -> Checkpoint:
    shard = Shard(Path(folder) / name / "model.safetensors", tensors, dict.fromkeys(tensors, 0), {})
    return Checkpoint(
        Path(folder) / name,
        name,
        (shard,),
        {"model_type": "x"} if config is None else config,
        dict.fromkeys(tensors, shard),
    )


def sources(
    names: tuple[str, ...] = LLAMA,
    sizes: tuple[int, ...] | None = None,
    operator: str = "task_arithmetic",
    experts: int = 2,
    base: bool = True,
    config: dict[str, Any] | None = None,
    kind: torch.dtype = torch.bfloat16,
) -> Sources:
    extents = sizes or tuple(3 + i % 5 for i in range(len(names)))
    tensors = {name: TensorInfo((extent,), kind) for name, extent in zip(names, extents, strict=True)}
    every = [model(f"expert-{number}", tensors, config) for number in range(experts)]
    root = model("base", tensors, config) if base else None
    return Sources(Layout.of(every[0]), operators.get(operator), every, root)


def genome_over(borders: np.ndarray, experts: int, seed: int, digits: int | None = None) -> Genome:
    table = np.random.default_rng(seed).normal(size=(len(borders) - 1, experts))
    return Genome(borders, table if digits is None else np.round(table, digits))


def check(found: Mapping[str, Any], models: Sources, genome: Genome) -> None:
    """Every tensor has the genome's weights, to the bit; also after a round trip through text."""
    layout = models.layout
    expected = models.mixture(genome)
    segments = np.searchsorted(expected.borders, layout.tensor_borders[:-1], side="right") - 1
    for name, segment in zip(layout.tensors, segments, strict=True):
        given_by = weights(found, name)
        for j, checkpoint in enumerate(models.checkpoints):
            assert given_by[checkpoint.mergekit_reference()] == expected.weights[segment, j]


# -- filters --------------------------------------------------------------------------------------------------

component = st.text("ab1.", min_size=1, max_size=4)
names_of_tensors = st.lists(
    st.lists(component, min_size=1, max_size=4).map(".".join), min_size=1, max_size=25, unique=True
)


@settings(max_examples=150, deadline=None)
@given(names_of_tensors, st.data())
def test_no_filter_takes_another_names_value(names: list[str], data: st.DataObject) -> None:
    values = {name: data.draw(st.sampled_from([0.0, 0.25, -1.5])) for name in names}
    setting = [{"filter": one, "value": value} for one, value in filters(values)]
    assert {name: documented(setting, name) for name in names} == values
    assert len(setting) <= len(names)


@settings(max_examples=150, deadline=None)
@given(names_of_tensors, st.data())
def test_no_part_of_a_name_takes_another_names_value(names: list[str], data: st.DataObject) -> None:
    values = {name: data.draw(st.sampled_from([0.0, 0.25, -1.5])) for name in names}
    found = by_parts(values, data.draw(st.integers(1, 25)))
    if found is not None:
        setting = [{"filter": one, "value": value} for one, value in found]
        assert {name: documented(setting, name) for name in names} == values


def test_components_are_a_few_filters() -> None:
    models = sources(MIXTURE)
    parts = parts_of(compose._outline_of(models), "components")
    rows = np.random.default_rng(0).normal(size=(len(parts), 2))
    genome = Genome(parts.borders, parts.expanded(rows))
    config = mergekit_config(genome, models).config
    check(config, models, genome)
    for one in config["models"]:
        chosen = [entry["filter"] for entry in one["parameters"]["weight"]]
        assert chosen[:2] == ["experts", "norm"]
        assert len(chosen) <= 8
        assert not any(character.isdigit() for entry in chosen for character in entry)


def test_names_that_are_part_of_others_come_last_the_longest_first() -> None:
    values = {"norm.weight": 1.0, "model.norm.weight": 2.0, "a.norm": 3.0, "norm": 4.0, "vision.model.norm.weight": 5.0}
    assert [one for one, _ in filters(values)] == [
        "a.norm",
        "vision.model.norm.weight",
        "model.norm.weight",
        "norm.weight",
        "norm",
    ]


def test_a_block_of_equal_weights_is_one_filter() -> None:
    models = sources()
    config = mergekit_config(genome_over(models.layout.block_borders, 2, 0), models).config
    listed = [one["filter"] for one in config["models"][0]["parameters"]["weight"]]
    assert listed == [
        "lm_head.weight",
        "model.embed_tokens.weight",
        *(f"model.layers.{i}." for i in range(12)),
        "model.norm.weight",
    ]


def test_a_beginning_that_is_part_of_other_names_is_no_filter() -> None:
    values = {"h.1.a": 1.0, "h.1.b": 1.0, "e.h.1.a": 2.0}
    assert filters(values) == [("h.1.b", 1.0), ("e.h.1.a", 2.0), ("h.1.a", 1.0)]


def test_a_beginning_that_is_a_name_comes_before_names_that_are_part_of_others() -> None:
    values = {"1": 1.0, "1.1": 0.0, "a.": 2.0, "a.1.1": 2.0}
    assert filters(values) == [("a.", 2.0), ("1.1", 0.0), ("1", 1.0)]


def test_one_weight_for_all_is_a_number() -> None:
    config = mergekit_config(Genome.uniform(sources().layout.size, [0.3, 0.1]), sources()).config
    assert [one["parameters"]["weight"] for one in config["models"]] == [1 - (0.3 + 0.1), 0.3, 0.1]


# -- genomes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("granularity", ["tensor", "block", "model"])
@pytest.mark.parametrize("digits", [None, 0])
def test_every_tensor_has_its_weights(operator: str, granularity: str, digits: int | None) -> None:
    models = sources(operator=operator, base=operator == "task_arithmetic", experts=3)
    borders = {
        "tensor": models.layout.tensor_borders,
        "block": models.layout.block_borders,
        "model": np.array([0, models.layout.size]),
    }[granularity]
    for seed in range(2):
        genome = genome_over(borders, 3, seed, digits)
        merge = mergekit_config(genome, models)
        check(merge.config, models, genome)
        check(yaml.safe_load(merge.text("A title")), models, genome)
        assert merge.snap is None
        assert merge.genome is genome


@settings(max_examples=30, deadline=None)
@given(names_of_tensors, st.integers(0, 2**32 - 1), st.integers(0, 1))
def test_random_layouts(names: list[str], seed: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    models = sources(tuple(names), tuple(rng.integers(1, 9, len(names)).tolist()), experts=2)
    inner = models.layout.tensor_borders[1:-1]
    chosen = inner[rng.random(len(inner)) < 0.5]
    genome = genome_over(np.array([0, *chosen, models.layout.size]), 2, seed, digits)
    check(yaml.safe_load(mergekit_config(genome, models).text("")), models, genome)


@pytest.mark.parametrize("value", [1 / 3, 1e-17, 1e22, np.nextafter(0.1, 1), -0.0, 5e-324, 3, 1e16, 123456789.125])
def test_numbers_are_written_exactly(value: float) -> None:
    models = sources(operator="linear", base=False)
    config = yaml.safe_load(mergekit_config(Genome.uniform(models.layout.size, [value, 0.5]), models).text(""))
    written = config["models"][0]["parameters"]["weight"]
    assert isinstance(written, float)
    assert written == value


def test_the_file_says_what_it_is() -> None:
    models = sources()
    text = mergekit_config(Genome.uniform(models.layout.size, [0.3, 0.1]), models, "float16").text("A merge")
    assert text.startswith("# A merge\n# Models are named by their paths")
    assert yaml.safe_load(text) == {
        "merge_method": "linear",
        "base_model": "/m/base",
        "dtype": "float32",
        "out_dtype": "float16",
        "parameters": {"normalize": False},
        "models": [
            {"model": "/m/base", "parameters": {"weight": 0.6}},
            {"model": "/m/expert-0", "parameters": {"weight": 0.3}},
            {"model": "/m/expert-1", "parameters": {"weight": 0.1}},
        ],
    }


# -- models ---------------------------------------------------------------------------------------------------


def test_tied_embeddings_have_their_weights_by_both_names(monkeypatch) -> None:
    monkeypatch.setattr(ties, "equal", lambda *_: True)  # the models are headers alone
    models = sources(sizes=(5, 5, *(2,) * 37), config={"tie_word_embeddings": True})
    assert models.layout.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    genome = genome_over(models.layout.tensor_borders, 2, 0)
    config = mergekit_config(genome, models).config
    assert weights(config, "lm_head.weight") == weights(config, "model.embed_tokens.weight")
    check(config, models, genome)


def test_a_model_that_is_there_twice_has_the_sum() -> None:
    models = sources(experts=2)
    twice = Sources(models.layout, models.operator, [models.experts[0], models.base], models.base)
    config = mergekit_config(Genome.uniform(models.layout.size, [0.3, 0.5]), twice).config
    assert weights(config, "lm_head.weight") == {"/m/base": 1 - (0.3 + 0.5) + 0.5, "/m/expert-0": 0.3}


def test_a_base_that_is_not_mixed_gives_configuration_and_tokenizer() -> None:
    models = sources(operator="linear")
    config = mergekit_config(Genome.uniform(models.layout.size, [0.3, 0.5]), models).config
    assert config["base_model"] == "/m/base"
    assert weights(config, "lm_head.weight") == {"/m/base": 0.0, "/m/expert-0": 0.3, "/m/expert-1": 0.5}


def test_buffers_are_those_of_the_base() -> None:
    models = sources()
    buffers = {"model.positions": TensorInfo((4,), torch.int64)}
    other = Sources(Layout(models.layout.parameters, buffers, {}), models.operator, models.experts, models.base)
    merge = mergekit_config(genome_over(models.layout.tensor_borders, 2, 0), other)
    assert weights(merge.config, "model.positions") == {"/m/base": 1.0, "/m/expert-0": 0.0, "/m/expert-1": 0.0}
    assert "leaves out, or writes in bfloat16: model.positions" in merge.notes[-1]


def frozen(
    names: tuple[str, ...], kept: tuple[str, ...], operator: str = "task_arithmetic", base: bool = True
) -> Sources:
    """Models of which some tensors are not merged."""
    whole = sources(names, operator=operator, base=base)
    infos = {name: whole.origin.tensors[name] for name in kept}
    made = Sources(Layout.of(whole.origin, infos), whole.operator, whole.experts, whole.base)
    made.apart = Apart(infos, frozen=kept)
    return made


@pytest.mark.parametrize("base", [True, False])
def test_frozen_tensors_are_those_of_the_base_or_the_first_expert(base: bool) -> None:
    kept = tuple(name for name in LLAMA if "mlp" in name)
    models = frozen(LLAMA, kept, "task_arithmetic" if base else "linear", base)
    genome = genome_over(models.layout.block_borders, 2, 0)
    merge = mergekit_config(genome, models)
    check(merge.config, models, genome)
    for name in kept:
        assert list(weights(merge.config, name).values()) == ([1.0, 0.0, 0.0] if base else [1.0, 0.0])
    assert not any("leaves out" in note for note in merge.notes)


def test_a_frozen_tensor_that_a_model_lacks_is_refused() -> None:
    models = frozen(LLAMA, ("model.norm.weight",))
    lacking = {name: info for name, info in models.experts[1].tensors.items() if name != "model.norm.weight"}
    other = Sources(models.layout, models.operator, [models.experts[0], model("less", lacking)], models.base)
    with pytest.raises(InputError, match=r"model\.norm\.weight: mergekit merges tensors that all models have"):
        mergekit_config(Genome.uniform(models.layout.size, [0.3, 0.1]), other)


def test_models_of_the_hub_are_named_by_repository_and_commit() -> None:
    tensors = {"w": TensorInfo((2,), torch.float32)}
    commit = "0" * 40
    cached = model(commit, tensors, folder="/home/.cache/huggingface/hub/models--org--some--name/snapshots")
    assert cached.mergekit_reference() == f"org/some--name@{commit}"
    assert model("plain", tensors).mergekit_reference() == "/m/plain"
    with pytest.raises(InputError, match="reads @ as the beginning of a revision"):
        model("me@home", tensors).mergekit_reference()


# -- splits inside tensors ------------------------------------------------------------------------------------


def test_a_split_tensor_is_refused_with_what_snapping_would_change() -> None:
    models = sources(("a.weight", "b.weight"), (10, 30))
    genome = Genome([0, 10, 37, 40], [[0.1, 0.2], [0.5, 0.5], [0.9, 0.1]])
    with pytest.raises(InputError, match=r"1 split point\(s\) inside tensors, the first in 'b\.weight'") as caught:
        mergekit_config(genome, models)
    assert "7.50% of the parameters get other coefficients (the largest change is 0.4)" in caught.value.remedy
    merge = mergekit_config(genome, models, snap=True)
    assert merge.genome == Genome([0, 10, 40], [[0.1, 0.2], [0.5, 0.5]])
    assert merge.snap is not None
    assert (merge.snap.elements, merge.snap.share, merge.snap.largest) == (3, 3 / 40, pytest.approx(0.4))
    assert merge.notes[0].startswith("NOT the merge that was scored")
    check(merge.config, models, merge.genome)


def test_split_points_between_equal_coefficients_do_not_count() -> None:
    models = sources(("a.weight", "b.weight"), (10, 30))
    genome = Genome([0, 10, 20, 40], [[0.1, 0.2], [0.5, 0.5], [0.5, 0.5]])
    assert snapped(genome, models.layout) is None
    check(mergekit_config(genome, models).config, models, genome)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_snapping_changes_as_little_as_can_be(sizes: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    models = sources(tuple(f"t{i}" for i in range(len(sizes))), tuple(sizes), "linear", base=False)
    size = models.layout.size
    inner = np.unique(rng.integers(1, size, 5)) if size > 1 else []
    genome = genome_over(np.array([0, *inner, size]), 2, seed, 0)
    found = snapped(genome, models.layout)
    by_element = genome.refined(np.arange(size + 1))
    borders = models.layout.tensor_borders
    changed = 0
    for low, high in pairwise(borders):
        _, counts = np.unique(by_element[low:high], axis=0, return_counts=True)
        changed += (high - low) - counts.max()
    if found is None:
        assert changed == 0
        return
    after = found.genome.refined(np.arange(size + 1))
    assert np.isin(found.genome.boundaries, borders).all()
    assert found.elements == changed == (after != by_element).any(axis=1).sum()
    assert found.share == changed / size
    assert found.largest == np.abs(after - by_element).max()
    assert snapped(found.genome, models.layout) is None


# -- what mergekit cannot express -----------------------------------------------------------------------------


def test_other_merges_are_refused_in_words() -> None:
    models = sources(operator="ties_vectors")
    genome = Genome.uniform(models.layout.size, [0.3, 0.1])
    with pytest.raises(InputError, match="cannot express 'ties_vectors', which changes the experts") as caught:
        mergekit_config(genome, models)
    assert "Export a checkpoint" in caught.value.remedy
    dense = Genome([0, models.layout.size], [[0.3, 0.1]], residual=np.ones(models.layout.size, np.float32))
    with pytest.raises(InputError, match="whole weights that were evolved"):
        mergekit_config(dense, sources())
    with pytest.raises(InputError, match="knows no float64"):
        mergekit_config(genome, sources(kind=torch.float64))
    files = sources()
    plain = [Checkpoint(one.path, one.name, one.shards, None, one._home) for one in files.experts]
    with pytest.raises(InputError, match=r"found no config\.json"):
        mergekit_config(genome, Sources(files.layout, files.operator, plain, plain[0]))
    with pytest.raises(InputError, match="expected 2 coefficients"):
        mergekit_config(Genome.uniform(models.layout.size, [0.3, 0.1, 0.2]), sources())


# -- mergekit-evolve's configuration --------------------------------------------------------------------------

EVOLVE: dict[str, Any] = {
    "genome": {
        "models": ["org/code", "org/math@v2"],
        "merge_method": "task_arithmetic",
        "base_model": "org/base",
    },
    "tasks": ["gsm_small", {"name": "code_small", "metric": "pass@1,create_test"}],
    "num_fewshot": 3,
}


def imported(folder: Path, layers: int | None = None, **genome: Any) -> tuple[dict[str, Any], str]:
    """The recipe as plain values and its comments; ``top`` in ``genome`` replaces fields of the file."""
    top = genome.pop("top", {})
    file = folder / "evolve config.yaml"
    file.write_text(yaml.safe_dump({**EVOLVE, "genome": {**EVOLVE["genome"], **genome}, **top}))
    text = import_mergekit(file, layers)
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    return yaml.safe_load(text), comments


def test_an_evolution_becomes_a_recipe(tmp_path: Path) -> None:
    record, comments = imported(tmp_path)
    shared = {"type": "lm_eval", "shots": 3, "chat_template": True, "fewshot_as_multiturn": True}
    assert record == {
        "name": "evolve-config",
        "models": {"experts": ["org/code", "org/math@v2"], "base": "org/base", "architecture": "auto"},
        "merge": {"operator": "task_arithmetic", "dtype": "bfloat16"},
        "objectives": {
            "search": [
                {"name": "gsm_small", "task": "gsm_small", "metric": "acc", **shared},
                {"name": "code_small", "task": "code_small", "metric": "pass@1", "filter": "create_test", **shared},
            ]
        },
        "search": {
            "algorithm": "cma_es",
            "granularity": "model",
            "low": 0.0,
            "high": 1.0,
            "start": 0.5,
            "sigma": 0.1667,
        },
        "budget": {"evaluations": 100},
    }
    assert comments.startswith("# Made of evolve config.yaml, a configuration of mergekit-evolve.")
    assert "no bounds" in comments


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"merge_method": "linear", "base_model": None},
        {"merge_method": "linear", "base_model": None, "normalize": False, "tokenizer_source": "org/other"},
        {"merge_method": "ties", "layer_granularity": 1, "allow_negative_weights": True},
        {"merge_method": "dare_ties", "layer_granularity": 4, "tokenizer_source": "union"},
        {"merge_method": "slerp", "base_model": None, "top": {"limit": 20, "num_fewshot": None}},
        {"top": {"tasks": [{"name": "a", "weight": -1}, {"name": "a", "metric": "f1"}]}},
    ],
)
def test_the_recipe_loads(changes: dict[str, Any], tmp_path: Path) -> None:
    imported(tmp_path, layers=8, **changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(import_mergekit(tmp_path / "evolve config.yaml", 8))
    check_operator(Recipe.from_yaml(path))


def test_weights_that_sum_to_one_are_differences_from_the_first_model(tmp_path: Path) -> None:
    record, comments = imported(tmp_path, merge_method="linear", base_model=None, models=["a/a", "b/b", "c/c"])
    assert record["models"] == {"experts": ["b/b", "c/c"], "base": "a/a", "architecture": "auto"}
    assert record["merge"]["operator"] == "task_arithmetic"
    assert record["search"]["start"] == 0.3333
    assert "normalize: weights that sum to one" in comments
    plain, _ = imported(tmp_path, merge_method="linear", base_model=None, normalize=False)
    assert plain["models"] == {"experts": ["org/code", "org/math@v2"], "architecture": "auto"}
    assert plain["merge"]["operator"] == "linear"


def test_ties_becomes_ours(tmp_path: Path) -> None:
    record, comments = imported(tmp_path, merge_method="ties")
    assert record["merge"]["operator"] == "ties"
    assert (record["search"]["start"], record["search"]["high"]) == (1.0, 2.0)
    assert "density: " in comments
    assert imported(tmp_path, merge_method="ties", normalize=False)[0]["merge"]["operator"] == "ties_vectors"
    for normalize in (True, False):
        dare, comments = imported(tmp_path, merge_method="dare_ties", normalize=normalize)
        assert (dare["merge"]["operator"], dare["search"]["start"]) == ("dare_ties", 1.0)
        assert "masks are fixed by a seed" in comments


def test_slerp_takes_two_models(tmp_path: Path) -> None:
    record, _ = imported(tmp_path, merge_method="slerp", base_model=None)
    assert record["merge"]["operator"] == "slerp"
    assert (record["search"]["low"], record["search"]["high"], record["search"]["start"]) == (0.0, 1.0, 0.5)
    with pytest.raises(InputError, match="slerp interpolates between two models, found 3"):
        imported(tmp_path, merge_method="slerp", models=["a", "b", "c"], base_model=None)


def test_layers_become_blocks_or_groups(tmp_path: Path) -> None:
    assert imported(tmp_path, layer_granularity=1)[0]["search"]["granularity"] == "block"
    search, comments = imported(tmp_path, layers=32, layer_granularity=8)
    assert (search["search"]["granularity"], search["search"]["groups"]) == ("groups", 4)
    assert "layer_granularity: 4 runs of layers" in comments
    assert imported(tmp_path, layers=32, layer_granularity=32)[0]["search"]["granularity"] == "model"
    with pytest.raises(InputError, match=r"the number of layers is needed.*--layers 32"):
        imported(tmp_path, layer_granularity=8)
    with pytest.raises(InputError, match="expected a divisor of 32"):
        imported(tmp_path, layers=32, layer_granularity=7)
    (tmp_path / "local").mkdir()
    (tmp_path / "local" / "config.json").write_text(json.dumps({"num_hidden_layers": 6}))
    found, _ = imported(tmp_path, layer_granularity=2, models=["local", "org/math"])
    assert found["search"]["groups"] == 3
    assert found["models"]["experts"] == [str(tmp_path / "local"), "org/math"]


def test_filters_that_pick_components_become_components(tmp_path: Path) -> None:
    search, comments = imported(tmp_path, filters=["self_attn", "mlp"])
    assert search["search"]["granularity"] == "components"
    assert "groups" not in search["search"]
    assert "# - filters: each component has coefficients of its own" in comments
    search, comments = imported(tmp_path, filters=["mlp.experts", "mlp"], layers=32, layer_granularity=8)
    assert (search["search"]["granularity"], search["search"]["groups"]) == ("components", 4)
    assert "layer_granularity: 4 runs of layers" in comments


@pytest.mark.parametrize("filters", [["q_proj"], ["self_attn", "up_proj"], ["nothing"]])
def test_other_filters_are_not_carried_over(filters: list[str], tmp_path: Path) -> None:
    search, comments = imported(tmp_path, filters=filters)
    assert search["search"]["granularity"] == "model"
    assert f"# - filters: not carried over ({', '.join(filters)})" in comments


def local(folder: Path, *names: str) -> Path:
    folder.mkdir()
    save_file({name: np.ones(2, np.float32) for name in names}, folder / "model.safetensors")
    return folder


def test_filters_are_compared_with_the_models_own_names(tmp_path: Path) -> None:
    base = local(
        tmp_path / "base", "h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight", "h.0.attn.c_proj.weight", "wte.weight"
    )
    whole, _ = imported(tmp_path, base_model=str(base), filters=["attn"])
    assert whole["search"]["granularity"] == "components"
    part, comments = imported(tmp_path, base_model=str(base), filters=["c_proj"])
    assert part["search"]["granularity"] == "model"
    assert "not carried over (c_proj)" in comments


def merged(folder: Path, **changes: Any) -> tuple[dict[str, Any], str]:
    """The recipe of a merge with tasks beside it, and its comments."""
    file = folder / "merge.yaml"
    file.write_text(yaml.safe_dump({"tasks": ["gsm_small"], **changes}))
    text = import_mergekit(file)
    recipe = folder / "recipe.yaml"
    recipe.write_text(text)
    check_operator(Recipe.from_yaml(recipe))
    return yaml.safe_load(text), "\n".join(line for line in text.splitlines() if line.startswith("#"))


def weighted(model: str, weight: Any) -> dict[str, Any]:
    return {"model": model, "parameters": {"weight": weight}}


def test_a_merge_with_tasks_is_where_a_search_begins(tmp_path: Path) -> None:
    filters = [{"filter": "self_attn", "value": 0.75}, {"filter": "mlp", "value": 0}, {"value": 0.25}]
    other = [{"filter": "self_attn", "value": 0.5}, {"filter": "mlp", "value": 0}, {"value": 0.5}]
    record, comments = merged(
        tmp_path,
        merge_method="task_arithmetic",
        base_model="org/base",
        dtype="float32",
        models=[weighted("org/code", filters), weighted("org/math", other), {"model": "org/base"}],
    )
    assert comments.startswith("# Made of merge.yaml, a merge of mergekit.")
    assert record["models"] == {"experts": ["org/code", "org/math"], "base": "org/base", "architecture": "auto"}
    assert record["merge"] == {"operator": "task_arithmetic", "dtype": "bfloat16", "freeze": ["*mlp*"]}
    assert (record["search"]["granularity"], record["search"]["start"]) == ("components", 0.5)
    assert "the search begins with 0.5 everywhere" in comments


@pytest.mark.parametrize("base", [True, False])
def test_our_own_export_is_read_back(base: bool, tmp_path: Path) -> None:
    """Models, operator, frozen tensors, and components."""
    kept = tuple(name for name in MIXTURE if "experts" in name)
    models = frozen(MIXTURE, kept, "task_arithmetic" if base else "linear", base)
    parts = parts_of(compose._outline_of(models), "components")
    rows = np.random.default_rng(1).uniform(0.1, 0.4, (len(parts), 2))
    config = mergekit_config(Genome(parts.borders, parts.expanded(rows)), models).config
    record, _ = merged(tmp_path, **config)
    assert record["models"]["experts"] == ["/m/expert-0", "/m/expert-1"]
    assert record["models"].get("base") == ("/m/base" if base else None)
    assert record["merge"]["operator"] == ("task_arithmetic" if base else "linear")
    assert record["merge"]["freeze"] == ["*experts*"]
    assert record["search"]["start"] == pytest.approx(rows.mean(), abs=0.1)


def test_a_filter_before_the_frozen_one_takes_its_tensors(tmp_path: Path) -> None:
    base = local(tmp_path / "base", "h.0.attn.q.weight", "h.0.attn.norm.weight", "h.0.mlp.up.weight")
    entries = [{"filter": "norm", "value": 0.5}, {"filter": "attn", "value": 0.0}, {"value": 0.5}]
    record, _ = merged(
        tmp_path,
        merge_method="task_arithmetic",
        base_model=str(base),
        models=[weighted("org/code", entries), weighted("org/math", entries)],
    )
    assert record["merge"]["freeze"] == ["h.0.attn.q.weight"]


def test_a_rest_that_is_frozen(tmp_path: Path) -> None:
    entries = [{"filter": "self_attn", "value": 0.5}, {"value": 0.0}]
    record, _ = merged(
        tmp_path,
        merge_method="task_arithmetic",
        base_model="org/base",
        models=[weighted("org/code", entries), weighted("org/math", entries)],
    )
    assert (record["merge"]["only"], "freeze" in record["merge"]) == (["*self_attn*"], False)
    assert record["search"]["start"] == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [weighted("a", 0.0), weighted("b", 0.0)], "merge_method": "ties"}, "nothing is left to search for"),
        ({"models": [{"model": "a"}, {"model": "b"}]}, "expected weights of models that are merged, found none"),
        ({"slices": [{"sources": []}]}, "models: expected a list of models, found slices"),
        (
            {"models": [weighted("a", [0.1, 0.5]), weighted("b", 0.2)]},
            "models: a: weight: expected a number, or filters",
        ),
        ({"models": [weighted("a", [{"filter": "x"}])]}, "models: a: weight: expected a number, or filters"),
    ],
)
def test_merges_that_are_not_read(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        merged(tmp_path, **{"merge_method": "linear", **changes})


def test_a_limit_leaves_the_rest_held_out(tmp_path: Path) -> None:
    record, comments = imported(tmp_path, top={"limit": 50, "apply_chat_template": False})
    search, held_out = record["objectives"]["search"], record["objectives"]["held_out"]
    assert search[0] == {
        "name": "gsm_small",
        "type": "lm_eval",
        "task": "gsm_small",
        "metric": "acc",
        "shots": 3,
        "limit": 50,
    }
    assert held_out == [{**one, "part": "rest"} for one in search]
    assert "limit: 50 examples drawn by seed" in comments


def test_task_weights_are_a_preference(tmp_path: Path) -> None:
    tasks = [{"name": "a", "weight": 2}, {"name": "b"}, {"name": "a", "metric": "f1,none", "weight": -1}]
    record, comments = imported(tmp_path, top={"tasks": tasks})
    assert [one["name"] for one in record["objectives"]["search"]] == ["a", "b", "a-f1"]
    assert [one.get("direction") for one in record["objectives"]["search"]] == [None, None, "minimize"]
    assert '--preference "a=2,b=1,a-f1=1"' in comments
    assert "preference" not in imported(tmp_path)[1]


def test_what_is_not_carried_over_is_said(tmp_path: Path) -> None:
    _, comments = imported(
        tmp_path,
        filters=["self_attn", "mlp"],
        smooth=True,
        normalize=True,
        allow_negative_weights=True,
        top={"shuffle": True, "random_init": True},
    )
    for field in ("filters", "smooth", "shuffle", "random_init", "normalize"):
        assert f"# - {field}: " in comments
    assert "(self_attn, mlp)" in comments
    assert "between -1 and 1" in comments


def test_models_may_be_written_in_parts_and_be_adapters(tmp_path: Path) -> None:
    parts = {"model": {"path": "org/base"}, "lora": {"path": "org/adapter", "revision": "v1"}}
    record, _ = imported(tmp_path, models=[parts, "org/base+org/other", {"path": "org/code", "revision": "v2"}])
    assert record["models"]["experts"] == ["org/adapter@v1", "org/other", "org/code@v2"]
    with pytest.raises(InputError, match=r"expected an adapter of base_model \(org/base\), found org/x\+org/y"):
        imported(tmp_path, models=["org/x+org/y", "org/code"])


def test_tokenizers(tmp_path: Path) -> None:
    assert imported(tmp_path, tokenizer_source="union")[0]["models"]["vocabulary"] == "union"
    assert imported(tmp_path, tokenizer_source="base")[0]["models"]["vocabulary"] == "base"
    assert imported(tmp_path, tokenizer_source="org/other")[0]["models"]["tokenizer"] == "org/other"


def test_a_base_among_the_models_is_no_expert(tmp_path: Path) -> None:
    record, comments = imported(tmp_path, models=["org/base", "org/code", "org/math"])
    assert record["models"]["experts"] == ["org/code", "org/math"]
    assert "task vector is zero" in comments


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_granulrity": 2}, r"genome\.layer_granulrity: unknown key. Did you mean 'layer_granularity'"),
        ({"top": {"num_fewshots": 2}}, r"num_fewshots: unknown key. Did you mean 'num_fewshot'"),
        ({"top": {"tasks": [{"nam": "a"}]}}, r"tasks\[0\]\.name: missing"),
        ({"top": {"tasks": [{"name": "a", "wieght": 1}]}}, r"tasks\[0\]\.wieght: unknown key. Did you mean 'weight'"),
        ({"top": {"tasks": []}}, "tasks: "),
        ({"top": {"limit": "many"}}, r"limit: input should be a valid integer.*found 'many'"),
        ({"merge_method": "task_aritmetic"}, r"merge_method: expected one of linear.*Did you mean 'task_arithmetic'"),
        ({"base_model": None}, "base_model: missing; task_arithmetic adds to a base model"),
        ({"models": ["org/code"]}, "expected two models or more to merge, found 1"),
    ],
)
def test_bad_files_are_refused_in_words(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        imported(tmp_path, **changes)


def test_other_files_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        import_mergekit(tmp_path / "none.yaml")
    file = tmp_path / "file.yaml"
    for text, message in (
        ("- a", "expected a mapping with genome and tasks, found list"),
        ("a: [", "cannot be read as YAML"),
        ("merge_method: linear\nmodels: []", "found a merge with weights already chosen"),
        ("tasks: [a]", "genome: missing"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            import_mergekit(file)


# -- members of a run -----------------------------------------------------------------------------------------

TOYS = """
def near(model, goal=0.0):
    total = sum(float(((tensor - goal) ** 2).sum()) for tensor in model.values())
    return 1 / (1 + total), [1 / (1 + total)]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mergekit_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number in range(3):
        rng = np.random.default_rng(number)
        folder = tmp_path / f"model-{number}"
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "toy"}')
        tensors = {"a.weight": rng.standard_normal(20, np.float32), "b.weight": rng.standard_normal(30, np.float32)}
        save_file(tensors, folder / "model.safetensors")
    one = {"type": "call", "call": "mergekit_toys:near"}
    record = {
        "name": "toy",
        "models": {"base": "model-0", "experts": ["model-1", "model-2"]},
        "merge": {"operator": "task_arithmetic"},
        "objectives": {
            "search": [{"name": "zero", **one}, {"name": "half", "arguments": {"goal": 0.5}, **one}],
            "held_out": [{"name": "one", "arguments": {"goal": 1.0}, **one}],
        },
        "search": {"algorithm": "random", "granularity": "tensor"},
        "scoring": {"batch": 2, "in_flight": 2},
        "budget": {"evaluations": 4},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    path = tmp_path / "toy.yaml"
    path.write_text(yaml.safe_dump(record))
    return path


def test_a_member_of_a_run(recipe: Path, tmp_path: Path) -> None:
    run = launch(Recipe.from_yaml(recipe), tmp_path / "run")
    target = tmp_path / "new" / "best.yaml"
    merge = export_mergekit(run, "best", target)
    best = run.trial("best")
    text = target.read_text()
    assert f"# toy, member {best.number}, found by Ecotone. Make it: mergekit-yaml best.yaml DIR\n" in text
    config = yaml.safe_load(text)
    assert config == dict(merge.config)
    assert [Path(one["model"]).name for one in config["models"]] == ["model-0", "model-1", "model-2"]
    rows = best.genome.refined(np.array([0, 20, 50]))
    for name, row in zip(("a.weight", "b.weight"), rows, strict=True):
        assert list(weights(config, name).values()) == [1 - row.sum(), *row]
    found = run.scored(best.number)
    assert rescored(run, merge.genome) == {"search": found.scores, "held_out": found.held_out}
    with pytest.raises(InputError, match="the file exists"):
        export_mergekit(run, "best", target)
    with pytest.raises(InputError, match=r"ends in \.yaml"):
        export_mergekit(run, "best", tmp_path / "merged")


LAYOUT = Layout({"a.weight": TensorInfo((20,), torch.float32), "b.weight": TensorInfo((30,), torch.float32)}, {}, {})


def test_a_snapped_member_is_scored_again(recipe: Path, tmp_path: Path) -> None:
    settings = {"search": {"algorithm": "m2n2", "archive": 4}, "budget.evaluations": 12}
    run = launch(Recipe.from_yaml(recipe, settings), tmp_path / "run")
    with run.journal() as journal:
        numbers = [row.number for row in journal.rows()]
    split = [number for number in numbers if snapped(run.trial(number).genome, LAYOUT)]
    with pytest.raises(InputError, match="inside tensors"):
        export_mergekit(run, split[0], tmp_path / "exact.yaml")
    assert not (tmp_path / "exact.yaml").exists()
    merge = export_mergekit(run, split[0], tmp_path / "snapped.yaml", snap=True)
    assert "# NOT the merge that was scored" in (tmp_path / "snapped.yaml").read_text()
    scores = rescored(run, merge.genome)
    assert set(scores) == {"search", "held_out"}
    assert scores["search"] != run.scored(split[0]).scores


# -- the command line ----------------------------------------------------------------------------------------


def test_a_run_becomes_mergekits_file_on_the_command_line(ecotone: Ecotone, recipe: Path, tmp_path: Path) -> None:
    assert ecotone("run", recipe, "--out", tmp_path / "run").code == 0
    said = ecotone("export", tmp_path / "run", "--to", tmp_path / "best.yaml", "--format", "mergekit", "--snap")
    assert said.code == 0, said.err
    assert f"mergekit-yaml {tmp_path / 'best.yaml'} DIR" in said.out
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["merge_method"] == "linear"
    again = ecotone("export", tmp_path / "run", "--to", tmp_path / "best.yaml", "--format", "mergekit")
    assert (again.code, "the file exists" in again.err) == (1, True)
    wrong = ecotone("export", tmp_path / "run", "--to", tmp_path / "x", "--snap")
    assert "--snap: expected --format mergekit" in wrong.err


def test_an_evolution_becomes_a_recipe_on_the_command_line(ecotone: Ecotone, tmp_path: Path) -> None:
    genome = {"models": ["org/one", "org/two"], "base_model": "org/base", "merge_method": "task_arithmetic"}
    evolve = {"genome": genome, "tasks": [{"name": "arc_easy", "metric": "acc,none"}]}
    (tmp_path / "evolve.yaml").write_text(yaml.safe_dump(evolve))
    said = ecotone("import-mergekit", tmp_path / "evolve.yaml", "--to", tmp_path / "recipe.yaml")
    assert said.code == 0, said.err
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").models.experts == ("org/one", "org/two")
    printed = ecotone("import-mergekit", tmp_path / "evolve.yaml")
    assert printed.out == (tmp_path / "recipe.yaml").read_text()
    assert ecotone("import-mergekit", tmp_path / "no.yaml").code == 1
