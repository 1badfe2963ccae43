"""Fingerprints of all but the models that scores depend on: the code of a recipe's functions, and the data they read.

Each reader of the recipe says what it reads: objectives and calibration tasks their functions and files, a plug-in's
kind its own module. Of a function, the file of its module counts, and the user's own modules that it imports, wherever
in their text. Installed packages do not: their versions are recorded. Data are the files and folders that arguments
name, and files with the ending of data that lie beside the code and are named in it.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib.util
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128

from ecotone.experiments.recipe import Recipe
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging import operators
from ecotone.populations.contents import Record, contents, entry
from ecotone.populations.folders import cache_folder
from ecotone.registry import is_ours
from ecotone.settings import Call, split_call

Sort = Literal["code", "data"]

MANY = 10_000
"""Of a folder of more files their names and sizes count alone."""

_DATA = frozenset(
    (
        *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".npz", ".npy", ".safetensors", ".yaml", ".yml"),
        *(".png", ".jpg", ".jpeg"),
    )
)
_NOT_DATA = frozenset(("__pycache__", "runs", "mlruns", "venv", "node_modules"))
_DEEP = 500  # modules that one function imports, one through the other


@dataclass(frozen=True)
class Reader:
    """A part of a recipe that reads files.

    Args:
        where: Its field.
        calls: Functions and their arguments.
        files: Files and folders of data.
        kind: The class of its settings, or the like.
    """

    where: str
    calls: Sequence[Call] = ()
    files: Sequence[Path] = ()
    kind: Any = None


@dataclass
class _Found:
    """The files of a reader, each with whether it is code or data."""

    files: dict[Path, Sort] = field(default_factory=dict)
    folders: dict[Path, str] = field(default_factory=dict)  # too large to be read: a hash of names and sizes

    def add(self, path: Path, sort: Sort) -> None:
        """One file, if it is there and can be read."""
        if path.is_file() and os.access(path, os.R_OK):
            self.files.setdefault(path.absolute(), sort)

    def add_all(self, path: Path) -> None:
        """A file of data, or all files in a folder. Python files among them are code."""
        if not path.is_dir():
            self.add(path, "code" if path.suffix == ".py" else "data")
            return
        files = list(_inside(path))
        if len(files) > MANY:
            listed = "\n".join(f"{file.relative_to(path)} {file.stat().st_size}" for file in files)
            self.folders[path.absolute()] = xxh3_128(listed.encode()).hexdigest()
            return
        for file in files:
            self.add(file, "data")


def fingerprints(recipe: Recipe, spec: WorkerSpec, before: float | None = None) -> Record:
    """By field and file, the hashes of the code and data that a recipe's scores depend on, as far as they lie here.

    Args:
        recipe: The recipe.
        spec: The spec of its workers: paths are whole in it.
        before: A time in seconds since 1970. Data that were written later are left out; None leaves none out.

    Raises:
        InputError: A file cannot be read.
    """
    folders = _users_folders(spec.sys_path)
    found = {reader.where: _found(reader, folders) for reader in readers(recipe, spec)}
    hashes = contents(file for one in found.values() for file in one.files)
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for where, one in found.items():
        names = _names([*one.files, *one.folders])
        entries = {
            names[file]: {**entry(hashes[file]), "sort": sort, "prepared": _prepared(file)}
            for file, sort in one.files.items()
            if sort == "code" or before is None or hashes[file].stamp.mtime_ns <= before * 1e9
        }
        entries |= {
            f"{names[folder]}/": {"xxh3_128": digest, "sort": "data", "prepared": _prepared(folder)}
            for folder, digest in one.folders.items()
        }
        if entries:
            record[where] = entries
    return record


def readers(recipe: Recipe, spec: WorkerSpec) -> Iterator[Reader]:
    """All parts of a recipe that read code or data; of several with one name the first."""
    for group, objectives in (("search", spec.search), ("held_out", spec.held_out)):
        for objective in objectives:
            calls = [named.call for named in objective.calls()]
            yield Reader(f"objectives.{group}.{objective.name}", calls, objective.reads(), type(objective))
    for task in spec.calibration:
        yield Reader(f"calibration.{task.name}", [named.call for named in task.calls()], task.reads(), type(task))
    if isinstance(spec.architecture, Call):
        yield Reader("models.architecture", [spec.architecture])
    yield Reader("merge.operator", kind=type(operators.get(spec.operator, spec.settings)))
    yield Reader("scoring.backend", kind=type(spec.backend))
    for number, part in enumerate(recipe.searches):
        yield Reader(f"search[{number}]" if recipe.chain is not None else "search", kind=type(part))


def packages(recipe: Recipe, spec: WorkerSpec) -> dict[str, str]:
    """The versions of installed packages that the recipe names functions or kinds of, if modules have their names."""
    found = {}
    for reader in readers(recipe, spec):
        modules = [split_call(call.call)[0] for call in reader.calls if not split_call(call.call)[2]]
        kinds = [] if reader.kind is None or is_ours(reader.kind) else [reader.kind.__module__]
        for name in (*modules, *kinds):
            with contextlib.suppress(PackageNotFoundError):
                top = name.partition(".")[0]
                found[top] = version(top)
    return found


# -- code ------------------------------------------------------------------------------------------------------


def _users_folders(named: Sequence[str]) -> list[Path]:
    """The folders on the Python path that may hold the user's own modules."""
    paths = [Path(name or ".").absolute() for name in (*named, *sys.path)]
    return [
        path
        for path in dict.fromkeys(paths)
        if not _is_installed(path) and not (path / "ecotone" / "registry.py").exists()
    ]


def _found(reader: Reader, folders: Sequence[Path]) -> _Found:
    found = _Found()
    for call in reader.calls:
        file = _file_of(call.call)
        code = [] if file is None else _imported(file, folders)
        for one in code:
            found.add(one, "code")
        beside = Path.cwd() if file is None else file.parent
        for text in _texts(call.arguments):
            if (path := _path(text, beside)) is not None:
                found.add_all(path)
        for path in (path for one in code for path in _named_in(one)):
            found.add(path, "data")
    for path in reader.files:
        found.add_all(path)
    for one in [] if reader.kind is None or is_ours(reader.kind) else _imported_by(reader.kind, folders):
        found.add(one, "code")
    return found


def _imported_by(kind: Any, folders: Sequence[Path]) -> Iterable[Path]:
    """The file of a class of another package, and the files of that package that it imports."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return [] if file is None else _imported(Path(file), folders, whole_package=True)


def _file_of(call: str) -> Path | None:
    """The file of the module that a call names; None for builtins, for Ecotone's, and where it is not found here."""
    place, _, is_file = split_call(call)
    if is_file:
        return Path(place).expanduser().absolute()
    top = place.partition(".")[0]
    if top == "ecotone" or top in sys.stdlib_module_names:
        return None
    try:
        spec = importlib.util.find_spec(place)
    except Exception:  # whatever a parent package raises, the worker tells it better
        return None
    origin = None if spec is None else spec.origin
    return None if origin is None or not Path(origin).is_file() else Path(origin)


def _imported(file: Path, folders: Sequence[Path], whole_package: bool = False) -> list[Path]:
    """A file of code and the user's own modules that it imports, at any depth. Of an installed file it alone.

    Args:
        file: The file.
        folders: Folders that the user's modules are found in, beside the file's own.
        whole_package: Follow the imports of an installed file within its package.
    """
    installed = _is_installed(file)
    if installed and not whole_package:
        return [file]
    root = _root(file)
    roots = [root] if installed else list(dict.fromkeys([root, file.parent, *folders]))
    package = file.relative_to(root).parts[0] if installed else None
    found, waiting = dict[Path, None](), [file]
    while waiting and len(found) < _DEEP:
        here = waiting.pop()
        if here in found or not here.is_file():
            continue
        found[here] = None
        for name in _imports(here):
            top = name.partition(".")[0]
            if top == package or (package is None and _may_be_users(top)):
                waiting += _modules(name, roots)
    return list(found)


def _root(file: Path) -> Path:
    """The folder that a file's package is imported from."""
    folder = file.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        folder = folder.parent
    return folder


@cache
def _installed_folders() -> tuple[Path, ...]:
    paths = sysconfig.get_paths()
    return tuple({Path(paths[name]).resolve() for name in ("purelib", "platlib", "stdlib", "platstdlib")})


def _is_installed(file: Path) -> bool:
    return any(file.resolve().is_relative_to(folder) for folder in _installed_folders())


@cache
def _may_be_users(top: str) -> bool:
    """Whether a module of that name may be the user's own: installed ones come first on the Python path."""
    if top == "ecotone" or top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return True
    return spec is None or spec.origin is None or not _is_installed(Path(spec.origin))


def _tree(file: Path) -> ast.AST | None:
    """The syntax tree of a file; None where it is none, as of compiled modules."""
    try:
        with _uncollected():
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection: Python before 3.13 raises SystemError when that runs code while a tree is made."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _imports(file: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, by their whole names."""
    tree = _tree(file)
    parts = list(file.parent.relative_to(_root(file)).parts)
    for node in [] if tree is None else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            before = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*before, *([node.module] if node.module else [])])
            yield from [module, *(f"{module}.{alias.name}".strip(".") for alias in node.names)]


def _modules(name: str, roots: Sequence[Path]) -> list[Path]:
    """The files of a module, with its packages, in the first of the folders that has it; none of installed ones."""
    parts = name.split(".")
    for root in roots:
        packages = [root.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
        last = root.joinpath(*parts[:-1], f"{parts[-1]}.py")
        found = [file for file in (*packages, last) if file.is_file()]
        if found:
            return found
    return []


# -- data ------------------------------------------------------------------------------------------------------


def _texts(value: Any) -> Iterator[str]:
    """The texts in arguments, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _path(text: str, beside: Path) -> Path | None:
    """The file or folder that an argument names, from the working directory or the code's; None where it is none.

    A word alone may be anything, such as the name of a split, so a folder needs a slash.
    """
    if not text or len(text) > 4096 or "\0" in text:
        return None
    for path in (Path(os.path.expanduser(text)), beside / text):  # noqa: PTH111 - "~nobody" is no error
        with contextlib.suppress(OSError, ValueError):
            if path.is_file() or (os.sep in text and path.is_dir() and len(path.absolute().parts) > 2):
                return path
    return None


def _named_in(file: Path) -> Iterator[Path]:
    """Files of data that a file of code names and that lie beside it or in the working directory."""
    tree = None if _is_installed(file) else _tree(file)
    for node in [] if tree is None else ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and Path(node.value).suffix in _DATA:
            path = _path(node.value, file.parent)
            if path is not None and path.is_file():
                yield path


def _inside(folder: Path) -> Iterator[Path]:
    """The files in a folder, sorted, without hidden ones and what programs leave behind."""
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _NOT_DATA)
        yield from (Path(here, name) for name in sorted(files) if not name.startswith("."))


def _prepared(path: Path) -> bool:
    """Whether the preparation step has made a file."""
    return path.is_relative_to((cache_folder() / "prepared").absolute())


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest ends of paths that tell them apart, which are the same wherever the folders are moved."""
    names = {path: path.name for path in paths}
    for length in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        count = Counter(names.values())
        same = [path for path, name in names.items() if count[name] > 1]
        names |= {path: "/".join(path.parts[-length:]) for path in same}
    return names
