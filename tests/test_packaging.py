"""What users install: sdist and wheel, built, installed outside the checkout, and used from folders of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import yaml
from processes import ROOT, same_arithmetic
from safetensors.numpy import save_file

from ecotone.extras import how_to_install

HEAVY = ("torch", "pydantic", "numpy", "ray", "mlflow", "scipy", "rich", "transformers")
FORMER = ("search", "fitness", "experiments", "merging", "populations", "tests")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", "build", "dist", "*.egg-info", "runs")


def done(*words: object, **options: Any) -> str:
    """What a program prints that ends well."""
    found = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


def wheel_of(source: Path, out: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "-q")
    done(sys.executable, "-m", "pip", "wheel", *options, "-w", out, source)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this one, in which building leaves its traces."""
    place = tmp_path_factory.mktemp("checkout") / "ecotone"
    shutil.copytree(ROOT, place, symlinks=True, ignore=LEFT_OUT)
    return place


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel_of(checkout, tmp_path_factory.mktemp("wheel"))


@dataclass
class Installed:
    """The wheel in an environment of its own, which finds other packages where this process has them."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        (found,) = self.folder.glob("lib/python*/site-packages")
        return found

    def environment(self, **variables: str) -> dict[str, str]:
        kept = (
            *("HOME", "TMPDIR", "ECOTONE_CACHE", "ECOTONE_KEY_FILE"),
            *("HF_HUB_OFFLINE", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"),
        )
        own = {name: os.environ[name] for name in kept if name in os.environ}
        return {"PATH": "/usr/bin:/bin", **own, **same_arithmetic(), **variables}

    def said(self, folder: Path, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """What the console script says in a folder."""
        program = [str(self.folder / "bin" / "ecotone"), *map(str, words)]
        environment = self.environment(**variables)
        return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True)

    def done(self, folder: Path, *words: object, **variables: str) -> str:
        found = self.said(folder, *words, **variables)
        assert found.returncode == 0, found.stdout + found.stderr
        return found.stdout


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    made = Installed(tmp_path_factory.mktemp("installed") / "venv")
    venv.create(made.folder)
    (made.site_packages / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    pip = (sys.executable, "-m", "pip", "--python", made.python)
    done(*pip, "install", "-q", "--no-deps", "--no-index", "--force-reinstall", wheel)
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with ZipFile(wheel) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


# -- sdist and wheel -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    done(sys.executable, "-c", code, cwd=checkout)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    again = contents(wheel_of(source, tmp_path / "again"))
    first = contents(wheel)
    assert again.keys() == first.keys()
    assert [name for name in first if first[name] != again[name]] == []


@pytest.mark.slow
def test_the_wheel_holds_ecotone_alone_and_whole(wheel: Path) -> None:
    names = contents(wheel).keys()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ecotone"}
    assert "ecotone/py.typed" in names
    for folder in FORMER[:-1]:
        here = {f"ecotone/{file.relative_to(ROOT)}" for file in (ROOT / folder).rglob("*.py")}
        assert len(here) > 5
        assert here <= names
    recipes = {f"ecotone/experiments/recipes/{file.name}" for file in (ROOT / "experiments/recipes").glob("*.yaml")}
    assert len(recipes) > 5
    assert recipes <= names


@pytest.mark.slow
def test_nothing_else_is_installed_at_the_top(installed: Installed) -> None:
    top = {path.name.split("-")[0] for path in installed.site_packages.iterdir()}
    assert top <= {"ecotone", "others.pth", "pip", "setuptools", "_distutils_hack", "distutils"}
    for name in FORMER:
        found = subprocess.run([installed.python, "-c", f"import {name}"], cwd="/", env=installed.environment())
        assert found.returncode == 1, name


# -- the command line ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_imports_nothing_heavy(installed: Installed, tmp_path: Path) -> None:
    program = (installed.python, "-X", "importtime", installed.folder / "bin" / "ecotone", "--help")
    found = subprocess.run(program, cwd=tmp_path, env=installed.environment(), capture_output=True, text=True)
    assert found.returncode == 0
    assert "ecotone" in found.stdout
    modules = {line.rpartition("|")[2].strip().split(".")[0] for line in found.stderr.splitlines()}
    assert "typer" in modules
    assert modules.isdisjoint(HEAVY)


@pytest.mark.slow
def test_a_ready_recipe_runs_by_its_name(installed: Installed, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    settings = ("--workers", 0, "--set", "budget.evaluations=16", "--set", "tracking.mlflow=false")
    said = installed.done(tmp_path, "run", "digits-specialists", "--out", "run", *settings)
    assert "average" in said
    assert installed.done(tmp_path, "validate", "experiments/recipes/digits-specialists.yaml")
    wrong = installed.said(tmp_path, "run", "digit-specialist")
    assert wrong.returncode == 1
    assert "Did you mean 'digits-specialists'?" in wrong.stderr


SCORE = """
from experiments import mine
from search import OURS


def score(model):
    assert "ecotone" not in mine.__file__
    return OURS * float(model["w"].sum())
"""


@pytest.fixture
def users(tmp_path: Path) -> Path:
    """A user's folder with packages that are called as our folders are."""
    for name, text in {
        "fitness.py": SCORE,
        "search/__init__.py": "OURS = 2.0\n",
        "experiments/__init__.py": "",
        "experiments/mine.py": "",
        "merging/__init__.py": "raise ImportError",
        "populations.py": "raise ImportError",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for value, name in ((1.0, "left"), (2.0, "right")):
        save_file({"w": np.full(3, value, np.float32)}, tmp_path / f"{name}.safetensors")
    record = {
        "name": "users",
        "models": {"experts": ["left.safetensors", "right.safetensors"]},
        "objectives": {"search": [{"name": "sum", "type": "call", "call": "./fitness.py:score"}]},
        "search": {"algorithm": "random", "granularity": "model"},
        "budget": {"evaluations": 12},
        "runtime": {"pool": "serial"},
        "tracking": {"mlflow": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(record))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"PYTHONPATH": "."}], ids=["plain", "PYTHONPATH"])
def test_a_users_folder_with_packages_named_as_ours_works(
    installed: Installed, users: Path, variables: dict[str, str]
) -> None:
    assert "run" in installed.done(users, "--help", **variables)
    installed.done(users, "validate", "recipe.yaml", **variables)
    installed.done(users, "run", "recipe.yaml", "--out", "run", **variables)
    assert '"sum"' in installed.done(users, "front", "run", "--json", **variables)


# -- extras --------------------------------------------------------------------------------------------------


def extras() -> set[str]:
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def test_every_extra_that_is_named_is_one() -> None:
    named = {
        extra
        for folder in ("ecotone", *FORMER[:-1])
        for file in (ROOT / folder).rglob("*.py")
        for extra in re.findall(r"how_to_install\([\"'](\w+)", file.read_text())
    }
    assert {"ray", "mlflow", "hf", "language", "optuna", "digits"} <= named <= extras()


def test_no_other_text_says_how_an_extra_is_installed() -> None:
    for folder in FORMER[:-1]:
        for file in (ROOT / folder).rglob("*.py"):
            assert "ecotone[" not in file.read_text(), file


def test_in_a_checkout_it_is_installed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert how_to_install("ray") == "pip install -e '.[ray]'"
    assert how_to_install("language", "gguf") == "pip install -e '.[language]' gguf"
    monkeypatch.chdir(tmp_path)
    assert how_to_install("ray") == f"pip install -e '{ROOT}[ray]'"


FRONT = ["--set", "search.algorithm=optuna"]
LM_EVAL = ["--set", "objectives.search.0={name: a, type: lm_eval, task: arc_easy}"]
AUTO = ["--set", "models.experts=[left, right]", "--set", "models.architecture=auto"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "extra", "words"),
    [
        ("ray", "ray", ["run", "recipe.yaml", "--workers", "1"]),
        ("ray", "ray", ["jobs"]),
        ("mlflow", "mlflow", ["run", "recipe.yaml", "--set", "tracking.mlflow=true"]),
        ("sklearn", "digits", ["run", "digits-specialists", "--workers", "0"]),
        ("optuna", "optuna", ["run", "recipe.yaml", *FRONT]),
        ("lm_eval", "language", ["validate", "recipe.yaml", *LM_EVAL]),
        ("transformers", "hf", ["run", "recipe.yaml", *AUTO]),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_installs_it(
    installed: Installed, users: Path, module: str, extra: str, words: list[str]
) -> None:
    for name in ("left", "right"):  # as Hugging Face directories, too
        (users / name).mkdir()
        (users / name / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
        shutil.copy(users / f"{name}.safetensors", users / name / "model.safetensors")
    (users / "sitecustomize.py").write_text(f"import sys; sys.modules[{module!r}] = None")
    said = installed.said(users, *words, PYTHONPATH=str(users), ECOTONE_CACHE=str(users / "cache"))
    assert f"pip install 'ecotone[{extra}]'" in said.stderr, said.stdout + said.stderr
    assert said.returncode == (0 if module == "mlflow" else 1)  # a run goes on untracked


@pytest.mark.slow
def test_the_commands_ask_no_index_for_ecotone(installed: Installed, checkout: Path) -> None:
    """All that the extras need is here, so that pip, which may ask nobody, has nothing left to do."""
    pip = (sys.executable, "-m", "pip", "--python", installed.python, "install", "-q", "--no-index")
    done(*pip, "ecotone[ray,mlflow,hf,optuna,digits]")
    done(*pip, "--dry-run", "--no-build-isolation", "-e", ".[ray]", cwd=checkout)
