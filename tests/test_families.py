"""Families of transformers: of each a merge fills the module as ``from_pretrained`` fills it, and gradients agree."""

from pathlib import Path

import families
import pytest
from families import FAMILIES, check, objective, opened, run_through

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
    found, run = run_through(name, tmp_path)
    assert found.startswith(FAMILIES[name].model)
    assert run.status()["evaluations"] == 4


SEARCHES = {
    "m2n2": {"algorithm": "m2n2", "archive": 4},
    "bayesian_map": {"algorithm": "bayesian_map", "granularity": "model", "samples": 6},
    "adamerging": {"algorithm": "adamerging", "granularity": "tensor", "steps": 6},
}


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", SEARCHES)
@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_5_vl", "vit", "gpt_neox"])
def test_searches_end_to_end(name, algorithm, tmp_path):
    """Two objectives (of Qwen2.5-VL on images and texts); the export's scores are those of the journal."""
    changes = {
        "search": SEARCHES[algorithm],
        "objectives": {"search": [objective("outputs", name), objective("others", name, seed=2)]},
        "budget": {"evaluations": 12},
    }
    if algorithm == "adamerging":
        kind = "image" if name == "vit" else "text"
        here = str(Path(families.__file__))
        data, head = {"call": f"{here}:examples", "arguments": {"kind": kind}}, {"call": f"{here}:head"}
        changes["calibration"] = [{"name": "task", "loss": "entropy", "data": data, "head": head, "batch": 4}]
    _, run = run_through(name, tmp_path, changes)
    with run.journal() as journal:
        rows = list(journal.rows())
    scored = [row for row in rows if row.scores]
    assert len({row.scores["outputs"] for row in scored}) > 1
    assert all(row.failure is None for row in rows)
