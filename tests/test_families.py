"""Families of transformers: of each a merge fills the module as ``from_pretrained`` fills it, and gradients agree."""

import pytest
from families import FAMILIES, check, opened, run_through

FAST = (
    *("llama", "gpt2", "gpt_neox", "mixtral", "qwen3_moe", "qwen3_next", "mamba", "bert", "t5", "whisper"),
    *("vit", "clip", "qwen2_5_vl", "llava"),
)
CASES = [pytest.param(name, id=name, marks=() if name in FAST else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", CASES)
def test_a_merge_fills_the_module_as_loading_its_export_does(name, tmp_path):
    check(opened(name, tmp_path), tmp_path)


QUICK = ("qwen3_moe", "qwen2_5_vl", "vit", "gpt_neox")
RUNS = [pytest.param(name, id=name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]


@pytest.mark.parametrize("name", RUNS)
def test_a_valid_recipe_runs_and_its_export_has_its_scores(name, tmp_path):
    assert run_through(name, tmp_path).startswith(FAMILIES[name].model)
