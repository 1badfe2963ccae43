"""Merges of adapters as adapters: PEFT loads them, and they are the merges that were scored."""

import json

import numpy as np
import pytest
import torch
from families import FAMILIES
from safetensors.torch import load_file
from test_adapters import STACKS, base_of, trained
from typer.testing import CliRunner

from ecotone import launch
from ecotone.experiments.cli import app
from ecotone.experiments.exports import export, export_lora, verify
from ecotone.experiments.mergekit import mergekit_config
from ecotone.experiments.recipe import Recipe, apply_settings
from ecotone.merging.adapters import merged_adapter
from ecotone.merging.export import export_adapter, export_directory
from ecotone.merging.gradient import Slopes
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.lora import Adapter
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")


def family(name, folder, *options, operator="task_arithmetic", **more):
    """A base and adapters of PEFT's, opened; and the class of the model."""
    kind = base_of(name, folder / "base", **{"tie_word_embeddings": False, **more})
    for number, each in enumerate(options):
        trained(kind, folder / "base", folder / f"a{number}", number, **{"target_modules": ["q_proj"], **each})
    paths = [folder / f"a{number}" for number in range(len(options))]
    return kind, Sources.open(paths, folder / "base", operator)


def by_tensor(sources, seed=0):
    """A genome of random coefficients for each tensor."""
    rng = np.random.default_rng(seed)
    size = (len(sources.layout.tensors), len(sources.operator.columns(sources.names)))
    return Genome(sources.layout.tensor_borders, rng.normal(size=size))


def anywhere(sources, seed=0, count=60):
    """A genome of random coefficients between borders anywhere."""
    rng = np.random.default_rng(seed)
    borders = np.unique([0, *rng.integers(1, sources.layout.size, count), sources.layout.size])
    return Genome(borders, rng.normal(size=(len(borders) - 1, len(sources.experts))))


def uniform(sources, *coefficients):
    return Genome.uniform(sources.layout.size, coefficients)


def weights(sources, genome):
    out = {name: torch.empty(info.shape) for name, info in sources.layout.parameters.items()}
    sources.materialise([genome], [out])
    return out


def written(sources, genome, folder, rank=None):
    merged = merged_adapter(sources, genome, rank)
    export_adapter(merged, folder, sources.tokenizer, "card", {"adapter": merged.record()})
    return merged


def read_back(sources, folder):
    """The tensors of an exported adapter on the base, as we read them."""
    expert = Adapter.open(folder, Checkpoint.open(sources.base.path))
    return {name: expert.tensor(name) for name in sources.layout.tensors}


def loaded(kind, sources, folder):
    """The weights that PEFT makes of it, as transformers saves them."""
    model = peft.PeftModel.from_pretrained(kind.from_pretrained(sources.base.path), folder)
    merged = folder.with_name("of-peft")
    model.merge_and_unload().save_pretrained(merged)
    return load_file(merged / "model.safetensors")


def close(found, expected, tolerance=2e-6):
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


CASES = {
    "llama": ("llama", [{"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "v_proj"], "r": 3}]),
    "patterns": (
        "llama",
        [{"rank_pattern": {r"layers\.1\..*": 5}, "use_rslora": True}, {"alpha_pattern": {"q_proj": 9}}],
    ),
    "embeddings": ("llama", [{"target_modules": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]}]),
    "whole": ("llama", [{"modules_to_save": ["lm_head", "norm"]}, {}]),
    "tokens": ("llama", [{"trainable_token_indices": [3, 5]}, {"trainable_token_indices": [5, 60, 0]}]),
    "biases": ("qwen2", [{"target_modules": ["q_proj", "o_proj"], "bias": "all"}, {"lora_bias": True}]),
    "transposed": ("gpt2", [{"target_modules": ["c_attn"], "fan_in_fan_out": True}] * 2),
    "gpt_neox": ("gpt_neox", [{"target_modules": ["query_key_value"]}, {"target_modules": ["dense", "embed_in"]}]),
    "experts": ("qwen3_moe", [{"target_parameters": STACKS}, {"target_parameters": STACKS[1:]}]),
    "other experts": ("qwen3_moe", [{"target_parameters": STACKS[:1]}, {"target_parameters": STACKS[1:]}]),
    "stacks": ("gpt_oss", [{"target_parameters": STACKS}, {}]),
    "old names of experts": ("mixtral", [{"target_parameters": STACKS}] * 2),
    "qwen2_5_vl": ("qwen2_5_vl", [{"target_modules": "all-linear"}, {}]),
    "vit": ("vit", [{"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]}, {"r": 1}]),
    "bert": ("bert", [{"target_modules": ["query"]}, {"target_modules": ["query", "dense"]}]),
    "split in the module": ("nomic_bert", [{"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}]),
}


def mostly_slow(names, fast):
    """All names; those that are not among the fast ones are slow tests."""
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("case", mostly_slow(CASES, ("llama", "whole", "tokens", "experts")))
def test_peft_makes_of_it_the_merge_that_was_scored(tmp_path, case):
    name, options = CASES[case]
    kind, sources = family(name, tmp_path, *options)
    genome = by_tensor(sources)
    if case in ("split in the module", "experts", "other experts", "old names of experts"):
        genome = uniform(sources, 0.7, -0.4)  # tensors that one of the module's takes together
    expected = weights(sources, genome)
    merged = written(sources, genome, tmp_path / "merged")
    assert merged.exact
    close(read_back(sources, tmp_path / "merged"), expected)
    of_peft = loaded(kind, sources, tmp_path / "merged")
    close(of_peft, {name: tensor for name, tensor in expected.items() if name in of_peft})
    assert any(not torch.equal(expected[name], sources.base.tensor(name)) for name in expected)
    assert len(set(expected) & set(of_peft)) >= len(expected) - 1


def test_logits_are_those_of_the_full_export(tmp_path):
    kind, sources = family(
        "llama", tmp_path, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["v_proj"]}
    )
    genome = by_tensor(sources)
    written(sources, genome, tmp_path / "merged")
    export_directory(sources, genome, tmp_path / "full", "card", {})
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        full = kind.from_pretrained(tmp_path / "full")(tokens).logits
        served = peft.PeftModel.from_pretrained(kind.from_pretrained(tmp_path / "base"), tmp_path / "merged")(
            tokens
        ).logits
    torch.testing.assert_close(served, full, rtol=1e-5, atol=2e-6)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert (config["r"], config["lora_alpha"]) == (2, 2)


@pytest.mark.parametrize("seed", mostly_slow(range(3), (0,)))
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "embed_tokens", "down_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("gpt_oss", {"target_modules": ["q_proj"], "target_parameters": STACKS}),
        ("qwen3_moe", {"target_parameters": STACKS[:1]}),
    ],
)
def test_borders_may_lie_anywhere(tmp_path, name, options, seed):
    _, sources = family(name, tmp_path, options, options)
    genome = anywhere(sources, seed)
    expected = weights(sources, genome)
    merged = written(sources, genome, tmp_path / "merged")
    assert merged.exact
    close(read_back(sources, tmp_path / "merged"), expected, 5e-6)


def test_trained_tokens_of_a_tied_base_stay_tied(tmp_path):
    tokens = [{"trainable_token_indices": [3]}, {"trainable_token_indices": [60, 0]}]
    kind, sources = family("llama", tmp_path, *tokens, tie_word_embeddings=True)
    genome = by_tensor(sources)
    written(sources, genome, tmp_path / "merged")
    expected = weights(sources, genome)
    close(read_back(sources, tmp_path / "merged"), expected)
    close(loaded(kind, sources, tmp_path / "merged"), expected)
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == [0, 3, 60]


def test_the_rank_is_the_sum_and_each_border_within_a_row_adds_one(tmp_path):
    _, sources = family("llama", tmp_path, {"r": 2}, {"r": 3})
    start = int(sources.layout.tensor_borders[sources.layout.tensors.index("model.layers.0.self_attn.q_proj.weight")])
    size = sources.layout.size
    at_row = Genome([0, start + 64, size], [[1, 0.5], [0.5, 1]])
    within = Genome([0, start + 70, start + 75, size], [[1, 0.5], [0.5, 1], [0, 1]])
    assert merged_adapter(sources, at_row).rank == 5
    assert merged_adapter(sources, within).rank == 7
    assert merged_adapter(sources, uniform(sources, 0, 1)).rank == 3


def test_a_cut_is_the_best_of_its_rank_and_says_its_error(tmp_path):
    _, sources = family("llama", tmp_path, {"r": 4}, {"r": 4})
    genome = uniform(sources, 0.7, 0.6)
    expected = weights(sources, genome)
    merged = written(sources, genome, tmp_path / "merged", rank=3)
    assert merged.rank == 3
    found = read_back(sources, tmp_path / "merged")
    for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
        delta = (expected[name] - sources.base.tensor(name)).double()
        values = torch.linalg.svdvals(delta)
        best = float(values[3:].square().sum().sqrt() / values.square().sum().sqrt())
        error = float((found[name].double() - expected[name].double()).norm() / delta.norm())
        assert merged.errors[name] == pytest.approx(best, rel=1e-4)
        assert error == pytest.approx(best, rel=1e-4)
    assert "Cut to rank 3" in merged.notes[0]
    assert merged_adapter(sources, genome, rank=8).exact


def test_dora_is_cut_and_not_exact(tmp_path):
    _, sources = family("llama", tmp_path, {"use_dora": True}, {})
    genome = uniform(sources, 0.5, 0.5)
    with pytest.raises(InputError, match=r"DoRA adapter, which is of full rank\. Cut it to a rank"):
        merged_adapter(sources, genome)
    merged = written(sources, genome, tmp_path / "cut", rank=32)
    assert max(merged.errors.values()) == 0
    close(read_back(sources, tmp_path / "cut"), weights(sources, genome))
    assert 0 < max(merged_adapter(sources, genome, rank=4).errors.values()) < 1


def test_linear_merges_whose_coefficients_sum_to_one(tmp_path):
    _, sources = family("llama", tmp_path, {}, {}, operator="linear")
    genome = uniform(sources, 0.25, 0.75)
    written(sources, genome, tmp_path / "merged")
    close(read_back(sources, tmp_path / "merged"), weights(sources, genome))
    with pytest.raises(InputError, match=r"sum to one, found 0\.9: it scales the base"):
        merged_adapter(sources, uniform(sources, 0.4, 0.5))


@pytest.mark.parametrize("operator", ["ties", "dare", "dare_ties"])
def test_operators_that_change_the_experts(tmp_path, operator):
    _, sources = family("llama", tmp_path, {}, {}, operator=operator)
    columns = len(sources.operator.columns(sources.names))
    with pytest.raises(InputError, match=f"merge.operator: '{operator}' changes the experts"):
        merged_adapter(sources, uniform(sources, *[0.5] * columns))


def test_full_models_among_the_experts(tmp_path):
    kind = base_of("llama", tmp_path / "base")
    trained(kind, tmp_path / "base", tmp_path / "a", target_modules=["q_proj"])
    kind.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "full")
    sources = Sources.open([tmp_path / "a", tmp_path / "full"], tmp_path / "base", "task_arithmetic")
    with pytest.raises(InputError, match=r"found a full model, 'full'"):
        merged_adapter(sources, uniform(sources, 0.5, 0.5))


def test_who_serves_it(tmp_path):
    _, plain = family("llama", tmp_path, {"r": 6}, {"r": 6})
    assert merged_adapter(plain, uniform(plain, 1, 1)).notes[-1] == "vLLM takes it with --max-lora-rank 16."
    (tmp_path / "other").mkdir()
    _, saved = family("llama", tmp_path / "other", {"modules_to_save": ["lm_head"]}, {"bias": "all"})
    assert "modules_to_save" in merged_adapter(saved, uniform(saved, 1, 1)).notes[-1]


def test_every_family_of_the_table_is_known():
    assert {name for name, _ in CASES.values()} <= set(FAMILIES)


# -- searches that score what is served ----------------------------------------------------------------------------


def ranked(sources, rank):
    return Sources.open([one.path for one in sources.experts], sources.base.path, "task_arithmetic", rank=rank)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "down_proj"], "modules_to_save": ["norm"]}),
        ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        ("qwen3_moe", {"target_parameters": STACKS}),
    ],
)
def test_merges_are_cut_before_they_are_scored(tmp_path, name, options):
    _, plain = family(name, tmp_path, options, options)
    sources, genome = ranked(plain, 2), uniform(plain, 0.6, 0.9)
    scored = weights(sources, genome)
    assert any(not torch.equal(scored[key], tensor) for key, tensor in weights(plain, genome).items())
    written(sources, genome, tmp_path / "merged", rank=2)
    served = read_back(sources, tmp_path / "merged")
    assert all(torch.equal(served[key], tensor) for key, tensor in scored.items())
    stacked = sources.stack([genome, genome])
    assert all(torch.equal(stacked[key][1], tensor) for key, tensor in scored.items())
    full = load_file(export_directory(sources, genome, tmp_path / "full", "card", {}) / "model.safetensors")
    assert all(torch.equal(full[key], tensor) for key, tensor in scored.items())
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(weights(sources, genome)[key], tensor) for key, tensor in scored.items())
    finally:
        torch.set_num_threads(threads)


def test_a_rank_that_suffices_changes_nothing_but_last_bits(tmp_path):
    _, plain = family("llama", tmp_path, {}, {})
    genome = anywhere(plain, count=8)
    close(weights(ranked(plain, 16), genome), weights(plain, genome))


def test_the_error_of_a_stack_is_that_of_all_its_experts(tmp_path):
    _, sources = family("qwen3_moe", tmp_path, {"target_parameters": STACKS[1:], "r": 4}, {})
    genome = uniform(sources, 0.7, 0.0)
    expected = weights(sources, genome)
    merged = written(sources, genome, tmp_path / "merged", rank=2)
    found = read_back(sources, tmp_path / "merged")
    for layer in range(2):
        names = [f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight" for expert in range(4)]
        delta = torch.stack([expected[name] - sources.base.tensor(name) for name in names])
        error = torch.stack([found[name] - expected[name] for name in names]).norm() / delta.norm()
        assert merged.errors[f"model.layers.{layer}.mlp.experts.down_proj"] == pytest.approx(float(error), rel=1e-4)


def test_what_cannot_be_scored_at_a_rank(tmp_path):
    _, split = family("nomic_bert", tmp_path, {}, {})
    with pytest.raises(InputError, match=r"merge\.rank: .* is no run of rows of the module's"):
        ranked(split, 4)
    kind, sources = family("llama", tmp_path, {}, {})
    places = [one.path for one in sources.experts]
    for operator, message in (("linear", "always sum to one, found 'linear'"), ("ties", "changes the experts")):
        with pytest.raises(InputError, match=message):
            Sources.open(places, sources.base.path, operator, rank=4)
    kind.from_pretrained(sources.base.path).save_pretrained(tmp_path / "full")
    with pytest.raises(InputError, match="found a full model"):
        Sources.open([tmp_path / "full"], sources.base.path, "task_arithmetic", rank=4)
    with pytest.raises(InputError, match="no gradients"):
        Slopes(ranked(sources, 4), uniform(sources, 1, 1))
    with pytest.raises(InputError, match="mergekit cannot express merges of adapters whose updates are cut"):
        mergekit_config(uniform(sources, 1, 1), ranked(sources, 4))


RECIPE = {
    "name": "served",
    "models": {"base": "base", "experts": ["a0", "a1"], "architecture": "auto"},
    "merge": {"operator": "task_arithmetic", "rank": 3},
    "objectives": {"search": [{"name": "closeness", "type": "call", "call": "./closeness.py:score"}]},
    "search": {"algorithm": "cma_es", "granularity": "tensor"},
    "budget": {"evaluations": 4},
    "runtime": {"pool": "serial"},
    "tracking": {"mlflow": False},
}
SCORE = """
import torch

def score(model):
    with torch.no_grad():
        return 1 / (1 + float(model(torch.arange(24).view(2, 12)).logits.square().mean()))
"""


def commanded(*words):
    """What a command of ours prints and raises."""
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("rank", [3, None])
def test_a_run_s_member_is_served_and_verified(tmp_path, rank):
    family("llama", tmp_path, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "v_proj"]})
    (tmp_path / "closeness.py").write_text(SCORE)
    recipe = Recipe.from_record(apply_settings(RECIPE, {"merge.rank": rank}), tmp_path)
    run = launch(recipe, tmp_path / "run")
    served = export_lora(run, "best", tmp_path / "served")
    assert served.scores is None
    assert served.adapter.rank == (rank or 4)
    assert (max(served.adapter.errors.values()) > 0) == (rank is not None)
    differences = [one.difference for one in verify(tmp_path / "served")]
    assert max(differences) <= (0 if rank else 1e-6)
    export(run, "best", tmp_path / "full")
    assert max(one.difference for one in verify(tmp_path / "full")) == 0
    cut = export_lora(run, "best", tmp_path / "cut", rank=1)
    assert cut.scores is not None
    assert max(one.difference for one in verify(tmp_path / "cut")) == 0
    found = commanded("export", run.directory, "--to", tmp_path / "again", "--format", "lora", "--rank", 1)
    assert "relative error" in found.stdout
    assert "The adapter is not the member itself. It scores:" in found.stdout
    assert "The scores equal" in commanded("verify", tmp_path / "again").stdout
    refusal = str(commanded("export", run.directory, "--to", tmp_path / "no", "--rank", 1).exception)
    assert refusal == "--rank: expected --format lora with it, found --format checkpoint."
    record = json.loads((tmp_path / "cut" / "ecotone.json").read_text())
    assert record["adapter"]["member"]["search"] != record["scores"]["search"] == cut.scores["search"]


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("merge", [{"freeze": ["*.q_proj.weight"]}, {"only": ["*.layers.0.*"]}], ids=str)
def test_frozen_tensors_are_the_bases_in_an_adapter(tmp_path, merge, rank):
    family("llama", tmp_path, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "v_proj"]})
    (tmp_path / "closeness.py").write_text(SCORE)
    settings = {f"merge.{name}": value for name, value in {**merge, "rank": rank}.items()}
    run = launch(Recipe.from_record(apply_settings(RECIPE, settings), tmp_path), tmp_path / "run")
    assert run.status()["failures"] == 0
    served = export_lora(run, "best", tmp_path / "served")
    frozen = "q_proj" if "freeze" in merge else "layers.1."
    assert not any(frozen in name for name in served.adapter.tensors)
    assert max(one.difference for one in verify(tmp_path / "served")) <= (0 if rank else 1e-6)


def test_an_adapter_needs_something_to_merge(tmp_path):
    family("llama", tmp_path, {"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]})
    (tmp_path / "closeness.py").write_text(SCORE)
    changes = {"merge.freeze": ["*.q_proj.weight"], "merge.rank": 2}
    with pytest.raises(InputError, match="expected tensors to merge that adapters change, found all of them frozen"):
        launch(Recipe.from_record(apply_settings(RECIPE, changes), tmp_path), tmp_path / "run")


def test_experts_are_searched_served_and_verified(tmp_path):
    family("qwen3_moe", tmp_path, {"target_parameters": STACKS}, {"target_parameters": STACKS, "r": 3})
    (tmp_path / "closeness.py").write_text(SCORE)
    changes = {"merge.rank": 2, "search": {"algorithm": "m2n2"}, "budget.evaluations": 6}
    run = launch(Recipe.from_record(apply_settings(RECIPE, changes), tmp_path), tmp_path / "run")
    served = export_lora(run, "best", tmp_path / "served")
    assert served.adapter.rank == 2
    assert [one.difference for one in verify(tmp_path / "served")] == [0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merge.rank": 0}, "merge.rank"),
        ({"models.vocabulary": "union"}, "merge.rank: expected models.vocabulary same"),
        ({"search": {"algorithm": "adamerging"}}, "merge.rank: adamerging follows gradients"),
    ],
)
def test_recipes_that_a_rank_does_not_fit(changes, message):
    assert Recipe.from_record(RECIPE).merge.rank == 3
    with pytest.raises(InputError, match=message):
        Recipe.from_record(apply_settings(RECIPE, changes))
