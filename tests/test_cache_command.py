"""What the cache holds: listed, freed, removed, and bounded while vectors are prepared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Ecotone
from safetensors.torch import save_file

from ecotone.experiments import caching, compose
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.opening import open_sources
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.runtime import Runtime
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging.basis import Bases, Basis
from ecotone.populations.errors import InputError

RIDGES = (0.1, 0.2, 0.3)


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkerSpec:
    """Two experts of an operator without data, and a cache of the test's own."""
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    for seed, name in enumerate(("base", "one", "two")):
        values = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        save_file({"layer.weight": values}, tmp_path / f"{name}.safetensors")
    experts = tuple(str(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    return WorkerSpec(experts, str(tmp_path / "base.safetensors"), "wudi")


@pytest.fixture
def made(spec: WorkerSpec) -> list[Basis]:
    """Three bases, the first used longest ago."""
    found = [_basis(spec, ridge) for ridge in RIDGES]
    for place, basis in enumerate(found):
        os.utime(basis.folder, (1e9 + place, 1e9 + place))
    return found


def _basis(spec: WorkerSpec, ridge: float, **others: int) -> Basis:
    basis = basis_of(replace(spec, settings={"ridge": ridge}, **others))
    assert basis is not None
    return basis


def _left() -> list[str]:
    return [one.key for one in caching.entries() if one.sort == "vectors"]


def test_everything_that_can_be_made_again_is_listed(tmp_path: Path, made: list[Basis], ecotone: Ecotone) -> None:
    cache = tmp_path / "cache"
    for name in ("prepared/digits-0123", "statistics", "contents", "runs/mine-1"):
        (cache / name).mkdir(parents=True)
        (cache / name / "file").write_bytes(b"1234")
    (cache / "bases" / "broken").mkdir()
    said = ecotone("cache", "--json")
    found = json.loads(said.out)
    entries = {one["key"]: one for one in found["entries"]}
    assert [one["sort"] for one in found["entries"]] == ["vectors"] * 4 + ["models", "statistics", "hashes"]
    assert list(entries)[:3] == [basis.key for basis in made]
    first = entries[made[0].key]
    assert first["text"] == "wudi of one, two; 2 vectors"
    assert first["nbytes"] == sum(path.stat().st_size for path in made[0].folder.iterdir())
    assert (first["used"], first["in_use"]) == (1e9, False)
    assert entries["broken"]["text"] == "damaged: made again when it is used"
    assert entries["digits-0123"]["text"] == "preparation step of digits"
    assert found["bytes"] == sum(one["nbytes"] for one in found["entries"])
    assert "mine-1" not in said.out
    shown = ecotone("cache").out
    assert made[0].key in shown
    assert "2001-09-09 01:46:40 UTC" in shown


def test_freeing_takes_what_was_not_used_for_longest(made: list[Basis], ecotone: Ecotone) -> None:
    each = {one.key: one.nbytes for one in caching.entries()}
    wanted = each[made[0].key] + 1
    found = json.loads(ecotone("cache", "--free", f"{wanted}", "--json").out)
    assert [one["key"] for one in found["removed"]] == [made[0].key, made[1].key]
    assert _left() == [made[2].key]
    assert "0 bytes are freed" in ecotone("cache", "--free", "0").out


def test_vectors_in_use_stay(spec: WorkerSpec, made: list[Basis], ecotone: Ecotone) -> None:
    """Somebody has models open that are mixed with them."""
    sources = open_sources(replace(spec, settings={"ridge": RIDGES[0]}), made[0])
    assert [one.in_use for one in caching.entries()] == [True, False, False]
    assert [one.key for one in caching.free(10**9)] == [made[1].key, made[2].key]
    assert "is used by a process" in ecotone("cache", "--remove", made[0].key).err
    assert Bases().prune(0, keep="") == []
    del sources
    assert [one.key for one in Bases().prune(0, keep="")] == [made[0].key]


def test_keys_may_be_cut_short(tmp_path: Path, made: list[Basis], ecotone: Ecotone) -> None:
    (tmp_path / "cache" / "prepared" / "digits-0123").mkdir(parents=True)
    said = ecotone("cache", "--remove", made[1].key[:8], "--remove", "digits-0123")
    assert said.code == 0, said.err
    assert f"Removed {made[1].key}: wudi of one, two; 2 vectors." in said.out
    assert _left() == [made[0].key, made[2].key]
    assert not (tmp_path / "cache" / "prepared" / "digits-0123").exists()
    with pytest.raises(InputError, match="expected a key that `ecotone cache` lists, found 'none'"):
        caching.remove([made[0].key, "none"])
    for name in ("same-1", "same-2"):
        (tmp_path / "cache" / "prepared" / name).mkdir()
    with pytest.raises(InputError, match="expected one key, found 2"):
        caching.remove([made[0].key, "same"])
    assert _left() == [made[0].key, made[2].key]  # nothing of a refused list is removed
    assert "expected without --remove" in ecotone("cache", "--free", "1", "--remove", "x").err


def test_vectors_beyond_the_limit_go_when_new_ones_are_made(spec: WorkerSpec, made: list[Basis]) -> None:
    limit = made[0].nbytes * 2 + made[0].nbytes // 2
    _basis(spec, RIDGES[0], cache_bytes=limit)  # found: used now, and nothing is removed
    assert len(_left()) == 3
    new = _basis(spec, 0.4, cache_bytes=limit)
    assert sorted(_left()) == sorted([made[0].key, new.key])
    alone = _basis(spec, 0.5, cache_bytes=0)
    assert _left() == [alone.key]


def test_the_limit_is_a_field_that_changes_no_result(spec: WorkerSpec) -> None:
    def recipe(**runtime: int) -> Recipe:
        models = {"experts": spec.experts, "base": spec.base}
        return Recipe.from_record(
            {
                "name": "small",
                "models": models,
                "objectives": {"search": []},
                "merge": {"operator": "wudi"},
                "search": {"algorithm": "one_shot"},
                "budget": {"evaluations": 1},
                "runtime": runtime,
            }
        )

    assert Runtime().cache_bytes == 200 * 10**9
    assert recipe(cache_bytes=5).signature == recipe().signature
    assert compose.worker_spec(recipe(cache_bytes=5), None).cache_bytes == 5


def _sizes() -> Iterator[tuple[str, int]]:
    yield from {"10GB": 10**10, "1.5 tb": 1500 * 10**9, "500MiB": 500 * 2**20, "7": 7, "2K": 2000}.items()


@pytest.mark.parametrize(("text", "expected"), list(_sizes()))
def test_sizes(text: str, expected: int) -> None:
    assert caching.size(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "3I", "1,5GB"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InputError, match="expected a size such as 10GB"):
        caching.size(text)
