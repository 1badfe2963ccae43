"""CONTRIBUTING's walkthrough, followed in a copy of the project: each kind is one new file, and one line of a registry.

The lines are read from CONTRIBUTING. The files are those of the example plug-in.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT
from test_cli import toy_recipe
from test_packaging import LEFT_OUT

pytestmark = pytest.mark.slow

LINE = re.compile(r'```diff\n# (\S+)\n (.*)\n\+( *"(\w+)": "ecotone\.([\w.]+):(\w+)",)\n```')
FILES = {"hill_climbing": "search", "damped": "operator", "closeness": "objective", "json_lines": "tracker"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with the four kinds of the walkthrough."""
    place = tmp_path_factory.mktemp("copy") / "ecotone"
    shutil.copytree(ROOT, place, symlinks=True, ignore=LEFT_OUT)
    lines = LINE.findall((ROOT / "CONTRIBUTING.md").read_text())
    assert [name for _, _, _, name, _, _ in lines] == list(FILES)
    suites = (ROOT / "tests/plugin/suites.py").read_text()
    for registry, before, line, name, module, kind in lines:
        source = ROOT / "tests/plugin/ecotone_example" / f"{FILES[name]}.py"
        assert f"class {kind}" in source.read_text()
        target = place / f"{module.replace('.', '/')}.py"
        assert not target.exists()
        shutil.copyfile(source, target)
        text = (place / registry).read_text()
        assert text.count(f"\n{before}\n") == 1, f"{registry} has changed: {before}"
        (place / registry).write_text(text.replace(f"\n{before}\n", f"\n{before}\n{line}\n"))
        suites = suites.replace(f"ecotone_example.{FILES[name]} ", f"ecotone.{module} ")
    assert "ecotone_example" not in suites
    (place / "tests/test_walked.py").write_text(suites)
    return place


def ran(copy: Path, cwd: Path, *words: object) -> str:
    """The output of a Python program that imports the copy."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_program_knows_them(copy: Path, tmp_path: Path) -> None:
    program = ("-m", "ecotone.experiments.cli")
    kinds = {one["name"]: one for one in json.loads(ran(copy, tmp_path, *program, "plugins", "--json"))}
    assert [(kinds[name]["package"], kinds[name]["error"]) for name in FILES] == [("ecotone", "")] * len(FILES)
    told = ran(copy, tmp_path, *program, "recipe", "--explain", "search.step")
    assert told.startswith("search.step (hill_climbing): Standard deviation of a step, as a share of the box.")
    recipe = toy_recipe(
        tmp_path,
        models={"experts": ["left.safetensors", "right.safetensors"], "base": "left.safetensors"},
        merge={"operator": "damped", "damping": {"low": 0.1, "high": 0.9}},
        objectives={"search": [{"name": "close", "type": "closeness", "scale": 3.0}]},
        search=[
            {"algorithm": "random", "granularity": "model", "evaluations": 4},
            {"algorithm": "hill_climbing", "granularity": "model", "step": 0.2},
        ],
        budget={"evaluations": 12},
        tracking={"mlflow": False, "json_lines": True},
    )
    assert "valid" in ran(copy, tmp_path, *program, "validate", recipe)
    ran(copy, tmp_path, *program, "run", recipe, "--out", tmp_path / "run")
    status = json.loads(ran(copy, tmp_path, *program, "status", tmp_path / "run", "--json"))
    assert (status["algorithm"], status["evaluations"], status["failures"]) == ("random+hill_climbing", 12, 0)
    (lines,) = (tmp_path / "run" / "lines").glob("*.jsonl")
    assert json.loads(lines.read_text().splitlines()[-1])["state"] == "finished"


def test_the_conformance_suites_take_them(copy: Path) -> None:
    quiet = ("-m", "pytest", "-p", "no:cacheprovider")
    said = ran(copy, copy, *quiet, "tests/test_walked.py", "tests/test_imports.py")
    assert " passed" in said
    # The suite of our own operators, and the texts of all fields, find the new kinds by themselves.
    ran(copy, copy, *quiet, "tests/test_merging_operators.py", "-k", "damped")
    ran(copy, copy, *quiet, "tests/test_fields.py")
