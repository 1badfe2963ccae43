"""The formulas of what preparing costs, against counts of a small decoder's operations and against its config."""

import importlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ecotone.fitness.preparing.prepare import basis_of


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    return importlib.import_module("preparing_costs")


@pytest.fixture
def benchmark(costs, monkeypatch, tmp_path):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    return importlib.import_module("preparing")


def test_sizes_are_those_of_the_published_models(costs):
    assert costs.SMOLLM2.parameters == 134_515_008
    assert costs.LLAMA_7B.parameters == 6_738_415_616
    assert costs.LLAMA_7B.in_block == 202_375_168


def test_bytes_of_statistics(costs):
    job = costs.Job("kfac", costs.LLAMA_7B)
    gram = 8 * (6 * 4097**2 + 11_009**2)
    slopes = 8 * (5 * 4096**2 + 2 * 11_008**2)
    assert costs.block_bytes(costs.LLAMA_7B, ("inputs",)) == gram
    assert costs.held(job, slopes=False) == 2 * gram
    assert costs.held(job, slopes=True) == 2 * slopes  # more than a group's bytes: block by block
    assert job.groups == 32
    small = costs.Job("kfac", costs.SMOLLM2)
    assert small.groups == 1
    assert costs.held(small, slopes=True) == 2 * 30 * costs.block_bytes(costs.SMOLLM2, ("slopes",))
    assert costs.basis_bytes(job) == 2 * 4 * costs.LLAMA_7B.parameters


def test_a_peak_is_one_model_and_what_one_block_takes(costs):
    for operator in costs.OPERATORS:
        job = costs.Job(operator, costs.LLAMA_7B)
        longer = replace(job, shape=replace(costs.LLAMA_7B, blocks=64))
        before, after = costs.peak(job), costs.peak(longer)
        assert after["statistics"] == before["statistics"]
        more = job.element * 32 * costs.LLAMA_7B.in_block if operator in costs.DATA else 0
        assert after["module"] - before["module"] == pytest.approx(more, rel=1e-3)
        if operator not in ("kfac", "fisher"):  # these keep a batch's graph
            assert after["work"] == before["work"]


def test_longer_jobs_take_as_many_seconds_more_as_operations(costs):
    job = costs.Job("kfac", costs.SMOLLM2, steps=10)
    other = replace(job, steps=20, examples=64)
    found = costs.scaled({"moments": 3.0, "solves": 1.0, "rest": 2.0}, job, other)
    assert found["moments"] == pytest.approx(6.0)
    assert found["rest"] == 2.0
    steps = [costs.solve(replace(job, steps=count), 576, 1536) for count in (10, 20)]
    assert found["solves"] == pytest.approx(
        costs.operations(other)["solves"] / costs.operations(job)["solves"], rel=1e-12
    )
    assert steps[1] - steps[0] == 10 * 4 * 2 * 576 * 1536 * (576 + 1536)


@pytest.mark.slow
@pytest.mark.parametrize("operator", ["regmean", "regmean_pp", "kfac", "fisher"])
def test_operations_are_those_that_are_counted(costs, benchmark, monkeypatch, tmp_path, operator):
    from torch.utils.flop_counter import FlopCounterMode

    from ecotone.merging import operators

    shape = costs.Shape(32, 80, 4, 4, 2, 96, tied=True)
    job = costs.Job(operator, shape, examples=6, length=8, batch=3)
    monkeypatch.setattr(benchmark, "SMOLLM2", shape)
    words = ["--operator", operator, "--directory", str(tmp_path), "--examples", "6", "--length", "8", "--batch", "3"]
    benchmark.write_models(tmp_path, shape, 2)
    spec = benchmark.spec_of(benchmark.parse(words))
    kind = type(operators.get(operator, spec.settings))
    monkeypatch.setattr(kind, "layer", lambda self, at, base, experts, *_: [torch.zeros_like(base) for _ in experts])
    with FlopCounterMode(display=False) as counter:
        basis_of(spec)
    expected = costs.operations(job)
    assert counter.get_total_flops() == pytest.approx(sum(expected.values()) - expected["solves"], rel=0.1)


@pytest.mark.slow
def test_a_row_of_each_table(benchmark, monkeypatch, tmp_path):
    import json

    shape = replace(benchmark.SMOLLM2, hidden=36, inner=48, vocabulary=80)
    monkeypatch.setattr(benchmark, "SMOLLM2", shape)

    def here(arguments, operator, directory):
        return benchmark.measured(benchmark.parse(["--operator", operator, "--directory", directory, "--blocks", "2"]))

    monkeypatch.setattr(benchmark, "in_own_process", here)
    out = tmp_path / "found.json"
    benchmark.main(["--operators", "kfac", "tsv_m", "--blocks", "2", "--out", str(out)])
    for one in json.loads(out.read_text())["rows"]:
        stages = one["stages"]
        assert sum(stages.values()) == pytest.approx(one["seconds"], rel=0.05, abs=0.1)
        assert stages["solves"] > 0
        assert ("slopes" in stages) == (one["operator"] == "kfac")
        assert one["basis"] >= one["predicted"]["basis"]
        assert one["whole"]["stages"]["solves"] == pytest.approx(15 * stages["solves"])
    text = out.with_suffix(".md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("| kfac")]) == 3
