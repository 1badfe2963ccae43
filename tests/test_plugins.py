"""A plug-in as a package of its own, installed; broken ones; and what the program says of all kinds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from test_cli import toy_recipe

from ecotone import Run

PLUGIN = ROOT / "tests" / "plugin"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the example plug-in is installed."""
    place = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, "--target", str(place), str(PLUGIN)], check=True, cwd=place)
    return place


def program(site: Path | None, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command line in a process that has what is installed in ``site``."""
    paths = os.pathsep.join(map(str, [ROOT, *([] if site is None else [site])]))
    command = [sys.executable, "-m", "ecotone.experiments.cli", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": paths}
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=cwd or ROOT, env=environment)


def kinds(site: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    said = program(site, "plugins", "--json")
    assert said.returncode == 0, said.stderr
    return {(one["sort"], one["name"]): one for one in json.loads(said.stdout)}


def metadata(place: Path, package: str, points: str, **modules: str) -> Path:
    """A package as pip would leave it: its metadata with entry points, and its modules."""
    info = place / f"{package}-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
    (info / "entry_points.txt").write_text(points)
    for name, text in modules.items():
        (place / f"{name}.py").write_text(text)
    return place


@pytest.mark.slow
def test_an_installed_plug_in_is_listed_and_run(site: Path, tmp_path: Path) -> None:
    found = kinds(site)
    named = {
        "search algorithm": "hill_climbing",
        "operator": "damped",
        "objective": "closeness",
        "tracker": "json_lines",
    }
    for sort, name in named.items():
        assert (found[sort, name]["package"], found[sort, name]["error"]) == ("ecotone-example 1.2.3", "")
    search = {"algorithm": "hill_climbing", "granularity": "model", "step": 0.3}
    tracking = {"mlflow": False, "json_lines": True}
    recipe = toy_recipe(tmp_path, search=search, budget={"evaluations": 12}, tracking=tracking)
    said = program(site, "run", recipe, "--out", tmp_path / "run", "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    status = Run(tmp_path / "run").status()
    assert (status["algorithm"], status["evaluations"], status["failures"]) == ("hill_climbing", 12, 0)
    (lines,) = (tmp_path / "run" / "lines").glob("*.jsonl")
    assert json.loads(lines.read_text().splitlines()[-1])["evaluations"] == 12
    wrong = program(site, "validate", recipe, "--set", "search.stepp=1", cwd=tmp_path)
    assert "search.stepp: unknown key. Did you mean 'step'?" in wrong.stderr


@pytest.mark.slow
def test_a_plug_in_is_explained_and_in_the_schema(site: Path) -> None:
    told = program(site, "recipe", "--explain", "search.step").stdout
    assert told.startswith("search.step (hill_climbing): Standard deviation of a step, as a share of the box.")
    assert "damped" in program(site, "recipe", "--explain", "merge.damping").stdout
    shape = json.loads(program(site, "recipe", "--schema").stdout)
    assert "hill_climbing" in json.dumps(shape["properties"]["search"])


@pytest.mark.slow
def test_a_stage_may_be_a_plug_in(site: Path, tmp_path: Path) -> None:
    stages = [
        {"algorithm": "random", "granularity": "model", "evaluations": 4},
        {"algorithm": "hill_climbing", "granularity": "model"},
    ]
    recipe = toy_recipe(tmp_path, search=stages, budget={"evaluations": 10})
    said = program(site, "run", recipe, "--out", tmp_path / "run", "--json", cwd=tmp_path)
    assert said.returncode == 0, said.stderr
    status = json.loads(program(site, "status", tmp_path / "run", "--json").stdout)
    assert (status["algorithm"], status["evaluations"]) == ("random+hill_climbing", 10)


@pytest.mark.slow
def test_the_conformance_suites_take_the_plug_in(site: Path, tmp_path: Path) -> None:
    shutil.copyfile(PLUGIN / "suites.py", tmp_path / "test_mine.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{site}"},
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    assert "no tests ran" not in done.stdout


@pytest.mark.slow
def test_without_the_plug_in_its_name_is_unknown(tmp_path: Path) -> None:
    recipe = toy_recipe(tmp_path, search={"algorithm": "hill_climbing"})
    said = program(None, "validate", recipe, cwd=tmp_path)
    assert said.returncode != 0
    assert "search.algorithm: expected one of m2n2, random" in said.stderr


BROKEN = "[ecotone.searches]\nbroken = broken_plugin:Settings\n"
LEAVES = "[ecotone.operators]\nleaver = leaving_plugin:Operator\n"
TWICE = "[ecotone.searches]\ntwin = {module}:Settings\n"
HALF = "[ecotone.searches]\nhalf = half_plugin:HalfSettings\n"
OURS = "[ecotone.operators]\nlinear = ours_plugin:Linear\n"
FORWARD = "[ecotone.operators]\nforward = forward_plugin:Forward\n"
FORWARD_CODE = '''
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from ecotone.merging.operators.linear import Linear

if TYPE_CHECKING:
    from decimal import Decimal

@dataclass(frozen=True)
class Forward(Linear):
    """Forward.

    Args:
        share: A share.
    """
    share: Decimal = 1
    name = "forward"
'''
RAISES = "[ecotone.formats]\nraises = raising_plugin:Raises\n"
RAISES_CODE = """
from ecotone.merging.models.formats import SafetensorsFile

class Raises(SafetensorsFile):
    def owns(self, path):
        raise OSError("no disk")
"""
HALF_CODE = '''
from typing import Literal
from ecotone.search.kinds import Box

class HalfSettings(Box):
    """Half.

    Attributes:
        algorithm: ``half``.
    """
    algorithm: Literal["half"] = "half"
'''


@pytest.mark.slow
def test_broken_plug_ins_are_named_and_the_rest_works(tmp_path: Path) -> None:
    place = tmp_path / "site"
    metadata(place, "broken", BROKEN, broken_plugin="raise RuntimeError('no power')")
    metadata(place, "first", TWICE.format(module="first_plugin"), first_plugin="class Settings: pass")
    metadata(place, "second", TWICE.format(module="second_plugin"), second_plugin="class Settings: pass")
    metadata(place, "leaver", LEAVES, leaving_plugin="raise SystemExit(3)")
    metadata(place, "halves", HALF, half_plugin=HALF_CODE)
    metadata(place, "forwards", FORWARD, forward_plugin=FORWARD_CODE)
    metadata(place, "raising", RAISES, raising_plugin=RAISES_CODE)
    metadata(place, "usurper", OURS, ours_plugin="class Linear: pass")
    found = program(place, "plugins", "--json")
    assert found.returncode == 0, found.stderr
    records = json.loads(found.stdout)
    errors = {(one["name"], one["package"]): one["error"] for one in records}
    assert "RuntimeError: no power" in errors["broken", "broken 0.1"]
    assert "SystemExit: 3" in errors["leaver", "leaver 0.1"]
    twins = errors["twin", "first 0.1"]
    assert "two installed packages" in twins
    assert "first 0.1 (first_plugin:Settings)" in twins
    assert "second 0.1 (second_plugin:Settings)" in twins
    assert "lacks begins, make, needs" in errors["half", "halves 0.1"]
    assert "NameError: name 'Decimal' is not defined" in errors["forward", "forwards 0.1"]
    assert errors["raises", "raising 0.1"] == ""
    assert errors["linear", "usurper 0.1"] == "ecotone itself has this operator 'linear', which is used."
    assert errors["linear", "ecotone"] == ""
    recipe = toy_recipe(tmp_path / "mine", budget={"evaluations": 4})
    good = program(place, "run", recipe, "--out", tmp_path / "run", "--json", cwd=tmp_path / "mine")
    assert good.returncode == 0, good.stderr
    refused = program(place, "validate", recipe, "--set", "search.algorithm=broken", cwd=tmp_path / "mine")
    assert refused.returncode != 0
    assert "search.algorithm: " in refused.stderr
    assert "no power" in refused.stderr
