"""What is scored is what is exported: the type of the checkpoints decides, not that of the architecture."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ecotone import Recipe, launch
from ecotone.experiments.exports import verify

MODULE = """
import torch
from torch import nn

def net():
    return nn.Linear(3, 2)

def seen(model):
    kinds = {p.dtype for p in model.parameters()}
    assert len(kinds) == 1, kinds
    kind = kinds.pop()
    return float(sum(p.double().sum() for p in model.parameters())) + {torch.float32: 32, torch.bfloat16: 16}[kind]
"""


@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_scored_and_exported_in_the_same_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: torch.dtype, wanted: str | None
) -> None:
    name = f"typed_{str(stored)[6:]}_{wanted}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    for seed, file in enumerate(("a", "b")):
        torch.manual_seed(seed)
        save_file(nn.Linear(3, 2).to(stored).state_dict(), tmp_path / f"{file}.safetensors")
    recipe = Recipe.from_record(
        {
            "name": "types",
            "models": {"experts": ["a.safetensors", "b.safetensors"], "architecture": {"call": f"{name}:net"}},
            "merge": {"dtype": wanted},
            "objectives": {"search": [{"name": "sum", "type": "call", "call": f"{name}:seen"}]},
            "search": {"algorithm": "random", "granularity": "tensor"},
            "budget": {"evaluations": 4},
            "runtime": {"pool": "serial"},
            "tracking": {"mlflow": False},
        },
        tmp_path,
    )
    run = launch(recipe, tmp_path / "run")
    best = run.best()
    assert best is not None
    assert best.scores is not None
    expected = getattr(torch, wanted) if wanted else stored
    assert (best.scores["sum"] > 24) == (expected is torch.float32)
    exported = run.export("best", tmp_path / "best.safetensors")
    assert {tensor.dtype for tensor in load_file(exported).values()} == {expected}
    assert [one.difference for one in verify(exported)] == [0.0]
