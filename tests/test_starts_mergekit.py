"""The real mergekit, run as a program of its own, makes the merges that our solvers have coefficients for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from programs import drive
from safetensors.torch import load_file, save_file
from test_mergekit_program import DRIVER, PROGRAM, llamas, pytestmark  # noqa: F401  # the mark is this module's, too
from torch import Tensor

from ecotone.merging.export import export_directory
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Genome
from ecotone.search.starts.base import Geometry, Weighs
from ecotone.search.starts.registry import SOLVERS

WEIGHTS = (1.0, 3.0, 2.0)
# Our solver, mergekit's method with its settings, how many experts, and whether both work on task vectors.
CASES: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "model_stock": ("model_stock", {}, 3, True),
    "karcher": ("karcher", {"parameters": {"max_iter": 1000, "tol": 1e-12}}, 3, False),
    "multi_slerp of models": ("multislerp", {}, 3, False),
    "multi_slerp of task vectors": ("multislerp", {}, 3, True),
    "nuslerp of models": ("nuslerp", {"parameters": {"nuslerp_flatten": True}}, 2, False),
    "nuslerp of task vectors": ("nuslerp", {"parameters": {"nuslerp_flatten": True}}, 2, True),
}


def related(folder: Path) -> list[Path]:
    """A base and three experts in float32, whose task vectors have something in common, norms' too."""
    paths = llamas(folder, False)
    files = [path / "model.safetensors" for path in paths]
    tensors = [{name: tensor.float() for name, tensor in load_file(file).items()} for file in files]
    for own in tensors:  # mergekit refuses task vectors that are zero
        own |= {name: tensor + torch.randn(tensor.shape) / 4 for name, tensor in own.items() if tensor.dim() == 1}
    for path, file, own in zip(paths, files, tensors, strict=True):
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "dtype": "float32", "torch_dtype": "float32"}))
        if own is not tensors[0]:
            own = {
                name: base + 0.5 * (tensors[1][name] - base) + 0.4 * (own[name] - base)
                for name, base in tensors[0].items()
            }
        save_file({name: tensor.contiguous() for name, tensor in own.items()}, f"{file}.new", {"format": "pt"})
    for file in files:
        Path(f"{file}.new").rename(file)
    return paths


def ours(case: str, paths: list[Path], out: Path) -> dict[str, Tensor]:
    _, _, count, base = CASES[case]
    weighs: Weighs = "task_vectors" if base else "models"
    sources = Sources.open(paths[1 : count + 1], paths[0] if base else None, "task_arithmetic" if base else "linear")
    name = case.split()[0]
    given = {} if name in ("model_stock", "karcher") else {"weights": dict(zip(sources.names, WEIGHTS, strict=False))}
    solver = SOLVERS.get(name, "solve").model_validate({"solve": name, **given})
    space = sources.space()
    genome = Genome.per_tensor(space, solver.coefficients(Geometry(space, weighs)))
    return load_file(export_directory(sources, genome, out, "", {}, "float32") / "model.safetensors")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """By case, what mergekit made, and what we make."""
    folder = tmp_path_factory.mktemp("solvers")
    paths, jobs, mine = related(folder / "models"), [], {}
    for number, (case, (method, settings, count, base)) in enumerate(CASES.items()):
        weighted = zip(paths[1 : count + 1], WEIGHTS, strict=False)
        models = [{"model": str(path), "parameters": {"weight": weight}} for path, weight in weighted]
        record = {"merge_method": method, "models": models, "dtype": "float32", **settings}
        record |= {"base_model": str(paths[0])} if base else {}
        config, out = folder / f"{number}.yaml", folder / f"merged-{number}"
        config.write_text(yaml.safe_dump(record))
        jobs.append((str(config), str(out)))
        mine[case] = ours(case, paths, folder / f"ours-{number}")
    drive(PROGRAM, DRIVER, json.dumps(jobs), folder / "adapters", folder=folder)
    found = {}
    for case, (_, out) in zip(CASES, jobs, strict=True):
        tensors: dict[str, Tensor] = {}
        for file in Path(out).glob("*.safetensors"):
            tensors |= load_file(file)
        found[case] = (tensors, mine[case])
    return found


@pytest.mark.parametrize("case", CASES)
def test_mergekit_makes_the_same_of_the_same_models(case: str, both: Any) -> None:
    theirs, mine = both[case]
    assert set(theirs) == set(mine)
    for name, tensor in mine.items():
        gap = float((theirs[name] - tensor).abs().max() / tensor.abs().max())
        assert gap < 2e-6, f"{name}: {gap}"
    assert any(torch.linalg.norm(tensor) > 0 for tensor in mine.values())
