"""The conformance suite of merge operators: one in the registry gets every test here."""

import pytest
import torch
from safetensors.torch import save_file

from ecotone.merging import operators
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Genome
from ecotone.testing.operators import DTYPES, OperatorConformance, bits, materialised, model


class TestEveryOperator(OperatorConformance):
    operators = tuple(operators.get(name) for name in sorted(operators.OPERATORS.usable()))
    partial = ("arcee_fusion", "pcb")


@pytest.mark.parametrize("name", ["linear", "task_arithmetic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_these_operators_mix_the_checkpoints_as_they_are(tmp_path, name, dtype):
    for seed in range(3):
        save_file(model(seed, dtype), tmp_path / f"{seed}.safetensors")
    sources = Sources.open([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], tmp_path / "0.safetensors", name)
    for tensor in sources.layout.tensors:
        for found, checkpoint in zip(sources.read(tensor), sources.checkpoints, strict=True):
            assert torch.equal(bits(found), bits(checkpoint.tensor(tensor)))


def test_task_arithmetic_is_the_base_plus_scaled_task_vectors(tmp_path):
    for seed in range(3):
        save_file(model(seed, torch.float64), tmp_path / f"{seed}.safetensors")
    paths = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    sources = Sources.open(paths[1:], paths[0], "task_arithmetic")
    merged = materialised(sources, Genome.uniform(sources.layout.size, [0.3, -1.2]), torch.float64)
    base, one, two = (model(seed, torch.float64) for seed in range(3))
    for name, values in merged.items():
        expected = base[name] + 0.3 * (one[name] - base[name]) - 1.2 * (two[name] - base[name])
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-12)


def test_an_unknown_operator_names_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'task_arithmetic'"):
        operators.get("task-arithmetic")
