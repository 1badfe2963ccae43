"""Fingerprints of all but the models that scores depend on: the code of a recipe's functions, and the data they read.

Each reader of the recipe says what it reads: objectives and calibration tasks their functions and files, a plug-in's
kind its own module. Of a function, the file of its module counts, and the user's own modules that it imports, wherever
in their text, by statements or by name (``import_module("helper")``). Installed packages do not: their versions are
recorded. Data are the files and folders that arguments or the user's code name (``ecotone.experiments.named``). Names
are looked for below the code's folder, beside the code, in the working directory and in the recipe's folder.

Code and arguments are read, not run. Data whose names are made otherwise while the code runs, such as those that a
database or another file names, and what comes over a network, are not found.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from xxhash import xxh3_128

from ecotone.experiments.keeping import texts_in
from ecotone.experiments.named import (
    DEPTH,
    WALKED,
    Below,
    Names,
    inside,
    is_for_outputs,
    names_in,
    of_argument,
    tree_of,
)
from ecotone.experiments.recipe import Recipe
from ecotone.fitness.callables import is_installed
from ecotone.fitness.specs import WorkerSpec
from ecotone.merging import operators
from ecotone.merging.operators.stack import Stack
from ecotone.populations.contents import Content, Record, Stamp, content, contents, entry
from ecotone.populations.errors import InputError
from ecotone.populations.folders import cache_folder
from ecotone.registry import is_ours
from ecotone.settings import Call, split_call

Sort = Literal["code", "data"]

MANY = 10_000
"""Of a folder of more files their names and sizes count alone."""

READ_BYTES = 2**30
"""Of the files that code names, the smallest count by their bytes up to this size in all; of larger ones the size."""

_log = logging.getLogger("ecotone")
_DATA = frozenset(
    (
        *(".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".npz", ".npy", ".safetensors", ".yaml", ".yml"),
        *(".png", ".jpg", ".jpeg", ".txt", ".pt", ".pth", ".pkl", ".h5", ".db", ".gz"),
    )
)
_SYSTEM = frozenset(("bin", "boot", "dev", "etc", "lib", "lib64", "proc", "run", "sbin", "sys", "usr", "var"))
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


class _Code:
    """The user's code, as far as it has been read: each file and folder once.

    Args:
        spec: The spec of workers.

    Attributes:
        folders: The folders on the Python path that may hold the user's own modules.
        bases: Folders that relative names may be in, beside the code's own.
    """

    def __init__(self, spec: WorkerSpec) -> None:
        self.folders = _users_folders(spec.sys_path)
        self.bases = list(dict.fromkeys(Path(name or ".").absolute() for name in (*spec.sys_path, ".")))
        models = [*spec.experts, *(one for one in (spec.base, spec.tokenizer, spec.config) if one is not None)]
        self._models = frozenset(Path(str(one)).absolute() for one in models)  # have hashes of their own
        self._read: dict[Path, tuple[list[str], Names]] = {}
        self._below: dict[Path, Below] = {}

    def imports(self, file: Path) -> list[str]:
        """The modules that a file imports by statements."""
        return self._parsed(file)[0]

    def names(self, file: Path) -> Names:
        """What a file names; nothing of an installed one."""
        return Names() if is_installed(file) else self._parsed(file)[1]

    def below(self, folder: Path) -> Below:
        """The files below a folder."""
        return self._below.setdefault(folder, Below(folder, self._models))

    def _parsed(self, file: Path) -> tuple[list[str], Names]:
        if file not in self._read:
            tree = tree_of(file)
            self._read[file] = (list(_imports(file, tree)), names_in(tree, file.stem))
        return self._read[file]


@dataclass
class _Found:
    """The files of a reader, each with whether it is code or data."""

    files: dict[Path, Sort] = field(default_factory=dict)
    folders: dict[Path, str] = field(default_factory=dict)  # too large to be read: a hash of names and sizes
    named: dict[Path, None] = field(default_factory=dict)  # data that code or words of arguments name
    roots: dict[Path, None] = field(default_factory=dict)  # that names of files are told from
    cut: bool = False  # there are more files than are looked at

    def add(self, path: Path, sort: Sort) -> None:
        """One file, if it is there and can be read."""
        if path.is_file() and os.access(path, os.R_OK):
            self.files.setdefault(path.absolute(), sort)

    def add_all(self, path: Path) -> None:
        """A file of data, or all files in a folder. Python files among them are code."""
        if not path.is_dir():
            self.add(path, "code" if path.suffix == ".py" else "data")
            return
        files = list(inside(path))
        if len(files) > MANY:
            listed = "\n".join(f"{file.relative_to(path)} {file.stat().st_size}" for file in files)
            self.folders[path.absolute()] = xxh3_128(listed.encode()).hexdigest()
            return
        for file in files:
            self.add(file, "data")

    def add_named(self, paths: Iterable[Path]) -> None:
        """Data that a name may mean."""
        for path in paths:
            path = Path(os.path.normpath(path.absolute()))
            if path not in self.files and os.access(path, os.R_OK):
                self.named[path] = None


def fingerprints(recipe: Recipe, spec: WorkerSpec, before: float | None = None) -> Record:
    """By field and file, the hashes of the code and data that a recipe's scores depend on, as far as they lie here.

    Args:
        recipe: The recipe.
        spec: The spec of its workers: paths are whole in it.
        before: A time in seconds since 1970. Data that were written later are left out; None leaves none out.

    Raises:
        InputError: A file cannot be read.
    """
    code = _Code(spec)
    found = {reader.where: _found(reader, code) for reader in readers(recipe, spec)}
    hashes: dict[Path, Content | None] = dict(contents(file for one in found.values() for file in one.files))
    named = dict.fromkeys(file for one in found.values() for file in one.named)
    hashes |= _contents_of_named(file for file in named if file not in hashes)
    record: dict[str, dict[str, dict[str, Any]]] = {}
    for where, one in found.items():
        names = _names([*one.files, *one.folders, *one.named], list(one.roots))
        entries = {
            names[file]: {**entry(known), "sort": sort, "prepared": _prepared(file)}
            for file, sort in one.files.items()
            if (known := hashes[file]) and (sort == "code" or before is None or known.stamp.mtime_ns <= before * 1e9)
        }
        entries |= {
            f"{names[folder]}/": {"xxh3_128": digest, "sort": "data", "prepared": _prepared(folder)}
            for folder, digest in one.folders.items()
        }
        for file in one.named:
            known, name = hashes.get(file), names[file]
            if known is not None and name not in entries and (before is None or known.stamp.mtime_ns <= before * 1e9):
                marks = {key: True for key, is_so in (("sized", not known.digest), ("cut", one.cut)) if is_so}
                entries[name] = {**entry(known), "sort": "data", "prepared": _prepared(file), **marks}
        if entries:
            record[where] = entries
    return record


def _contents_of_named(files: Iterable[Path]) -> dict[Path, Content | None]:
    """The content of data that code names, the smallest first; of what goes beyond ``READ_BYTES`` an empty hash.

    None stands for files that cannot be read: nothing says that the code needs them.
    """
    stamps = {}
    for file in files:
        with contextlib.suppress(OSError):
            stamps[file] = Stamp.of(file)
    found, left = dict[Path, Content | None](), READ_BYTES
    for file, stamp in sorted(stamps.items(), key=lambda one: one[1].size):
        left -= stamp.size
        found[file] = Content("", stamp)
        if left >= 0:
            try:
                found[file] = content(file)
            except InputError:
                found[file] = None
    return found


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
    operator, files = operators.get(spec.operator, spec.settings), operators.files(spec.operator, spec.settings)
    yield Reader("merge.operator", files=files, kind=type(operator))
    for label, method in operator.members.items() if isinstance(operator, Stack) else ():
        yield Reader(f"merge.methods.{label}", kind=type(method))
    yield Reader("scoring.backend", kind=type(spec.backend))
    for number, part in enumerate(recipe.searches):
        yield Reader(f"search[{number}]" if recipe.chain is not None else "search", kind=type(part))


def code_of(recipe: Recipe, spec: WorkerSpec) -> str:
    """A hash of the user's code that prepared vectors depend on: of the architecture, and of calibration tasks.

    Paths do not count, so that the same code in another folder is the same.
    """
    parts = {
        where: sorted(entry["xxh3_128"] for entry in files.values() if entry["sort"] == "code")
        for where, files in fingerprints(recipe, replace(spec, search=(), held_out=())).items()
        if where == "models.architecture" or where.startswith("calibration.")
    }
    return xxh3_128(json.dumps(parts, sort_keys=True).encode()).hexdigest()


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
    return [path for path in dict.fromkeys(paths) if not is_installed(path) and not _is_checkout(path)]


def _is_checkout(folder: Path) -> bool:
    """Whether a folder is a checkout of Ecotone."""
    return (folder / "ecotone" / "registry.py").exists()


def _found(reader: Reader, code: _Code) -> _Found:
    found = _Found()
    for call in reader.calls:
        _add_call(found, call, code, reader.where)
    for path in reader.files:
        found.add_all(path)
    for one in [] if reader.kind is None or is_ours(reader.kind) else _imported_by(reader.kind, code):
        found.add(one, "code")
    return found


def _add_call(found: _Found, call: Call, code: _Code, where: str) -> None:
    """Add the code and data of one function to what is found."""
    file, texts = _file_of(call.call), list(texts_in(call.arguments))
    users = [] if file is None else _imported(file, code, texts)
    for one in users:
        found.add(one, "code")
    beside = Path.cwd() if file is None else file.parent
    words = []
    for text in texts:
        plain = (
            os.sep not in text and not Path(text).suffix
        )  # a word, as of a split, is no file of the working directory
        path = _path(text, [beside, *([] if plain else code.bases)])
        if path is None:
            words += list(of_argument(text))
        else:
            found.add_all(path)
    if file is None or is_installed(file):
        for word in words:
            _add_argument(found, word, code.below(Path.cwd()), code.bases)
        return
    found.roots[_root(file)] = None
    below = code.below(_top(file))
    for word in words:
        _add_argument(found, word, below, [beside, *code.bases])
        found.add_named(below.matching(word, beside))
    for one in users:
        names, mine = code.names(one), below if one.is_relative_to(below.folder) else code.below(_top(one))
        for name in names.files:
            paths = [*mine.matching(name, one.parent), *_direct(name, one, names.looks_up, mine, code.bases)]
            found.add_named(paths)
            if mine.cut and not paths and Path(name).suffix in _DATA:
                _tell_cut(where, name, mine.folder)
        found.cut = found.cut or mine.cut


def _add_argument(found: _Found, word: str, below: Below, bases: Iterable[Path]) -> None:
    """Add the files of a folder that an argument names without a slash."""
    if "*" in word or os.sep in word or word in (".", ".."):
        return
    for base in bases:
        with contextlib.suppress(OSError, ValueError):
            if (base / word).is_dir():
                if (base / word / "__init__.py").exists() and _is_checkout(base):
                    return  # "search" is the name of a split, in a checkout of Ecotone too
                found.add_named([] if is_for_outputs((word,)) else below.in_folder(base / word))
                return


def _direct(name: str, file: Path, looks_up: bool, below: Below, bases: Sequence[Path]) -> list[Path]:
    """The files that a name in code means from the code's own folder, or else the first base that has it.

    Args:
        name: The name.
        file: The file of code that it stands in.
        looks_up: Whether the folder above the code's counts.
        below: Lists folders.
        bases: Other folders that a name with an ending, or with a folder, may be in.
    """
    word = Path(name).suffix == "" and os.sep not in name
    above = [file.parent.parent] if looks_up and len(file.parent.parts) > 2 else []
    found = []
    for places in ([file.parent], above, [] if word else bases):
        for place in places:
            path = place / os.path.expanduser(name)  # noqa: PTH111 - "~nobody" is no error
            with contextlib.suppress(OSError, ValueError):
                if path.is_file():
                    found += [] if path in below.without else [path]
                    break
                outside = places is above or ".." in path.parts or Path(name).is_absolute()
                if outside and path.is_dir() and _may_hold_data(path.resolve()):
                    found += below.in_folder(path)
                    break
    return found


def _may_hold_data(folder: Path) -> bool:
    """Whether a folder that code names elsewhere is more than a part of the system, and none for outputs."""
    return len(folder.parts) > 2 and folder.parts[1] not in _SYSTEM and not is_for_outputs((folder.name,))


@cache
def _tell_cut(where: str, name: str, folder: Path) -> None:
    """Tell once that a name was not found among the files that are looked at."""
    _log.warning(
        "%s: '%s' may name data below %s, where only the first %s files down to %s folders deep are looked at; "
        "a change of it is not found. An argument with its path would be.",
        *(where, name, folder, f"{WALKED:,}", DEPTH),
    )


def _top(file: Path) -> Path:
    """The folder of a file of code: of a module in a package, the outermost package's."""
    root = _root(file)
    return file.parent if root == file.parent else root / file.relative_to(root).parts[0]


def _imported_by(kind: Any, code: _Code) -> Iterable[Path]:
    """The file of a class of another package, and the files of that package that it imports."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None)
    return [] if file is None else _imported(Path(file), code, whole_package=True)


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


def _imported(file: Path, code: _Code, words: Sequence[str] = (), whole_package: bool = False) -> list[Path]:
    """A file of code and the user's own modules that it imports, at any depth. Of an installed file it alone.

    Args:
        file: The file.
        code: The user's code, with the folders that the user's modules are found in, beside the file's own.
        words: Arguments, which may be names of modules for a function that imports by name.
        whole_package: Follow the imports of an installed file within its package.
    """
    installed = is_installed(file)
    if installed and not whole_package:
        return [file]
    root = _root(file)
    roots = [root] if installed else list(dict.fromkeys([root, file.parent, *code.folders]))
    package = file.relative_to(root).parts[0] if installed else None
    found, waiting = dict[Path, None](), [file]
    while waiting and len(found) < _DEEP:
        here = waiting.pop()
        if here in found or not here.is_file():
            continue
        found[here] = None
        for name in code.imports(here):
            top = name.partition(".")[0]
            if top == package or (package is None and _may_be_users(top)):
                waiting += _modules(name, roots)
        if package is None:
            waiting += _imported_by_name(here, code, words, roots)
    return list(found)


def _imported_by_name(file: Path, code: _Code, words: Sequence[str], roots: Sequence[Path]) -> Iterator[Path]:
    """The user's modules whose names are constants in a file that imports by name, or arguments."""
    names = code.names(file)
    if not names.imports_by_name:
        return
    parts = file.parent.relative_to(_root(file)).parts
    for word in sorted({*names.modules, *(word for word in words if word.replace(".", "").isidentifier())}):
        level = len(word) - len(word.lstrip("."))
        name = ".".join([*(parts[: len(parts) - level + 1] if level else ()), word.lstrip(".")])
        files = _modules(name, [file.parent, *roots])
        if files and _may_be_users(name.partition(".")[0]):
            yield from files
    for name in names.files:
        if name.endswith(".py") and "*" not in name:
            yield from code.below(_top(file)).matching(name, file.parent)


def _root(file: Path) -> Path:
    """The folder that a file's package is imported from."""
    folder = file.parent
    while (folder / "__init__.py").is_file() and folder != folder.parent:
        folder = folder.parent
    return folder


@cache
def _may_be_users(top: str) -> bool:
    """Whether a module of that name may be the user's own: installed ones come first on the Python path."""
    if top == "ecotone" or top in sys.stdlib_module_names:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError, AttributeError):
        return True
    return spec is None or spec.origin is None or not is_installed(Path(spec.origin))


def _imports(file: Path, tree: ast.AST | None) -> Iterator[str]:
    """The modules that a file imports, anywhere in its syntax tree, by their whole names."""
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
        if (root / f"{parts[0]}.py").is_file() and not (root / parts[0] / "__init__.py").is_file():
            return [
                root / f"{parts[0]}.py"
            ]  # `from helper import f`, where `helper/f.py` of another folder is not meant
        packages = [root.joinpath(*parts[:count], "__init__.py") for count in range(1, len(parts) + 1)]
        last = root.joinpath(*parts[:-1], f"{parts[-1]}.py")
        found = [file for file in (*packages, last) if file.is_file()]
        if found:
            return found
    return []


# -- data ------------------------------------------------------------------------------------------------------


def _path(text: str, places: Sequence[Path]) -> Path | None:
    """The file or folder that an argument names, in the first of the places that has it; None where it is none.

    A word alone may be anything, such as the name of a split, so a folder needs a slash.
    """
    if not text or len(text) > 4096 or "\0" in text:
        return None
    for place in places:
        path = place / os.path.expanduser(text)  # noqa: PTH111 - "~nobody" is no error
        with contextlib.suppress(OSError, ValueError):
            if path.is_file() or (os.sep in text and path.is_dir() and len(path.absolute().parts) > 2):
                return path
    return None


def _prepared(path: Path) -> bool:
    """Whether the preparation step has made a file."""
    return path.is_relative_to((cache_folder() / "prepared").absolute())


def _names(paths: Sequence[Path], roots: Sequence[Path]) -> dict[Path, str]:
    """Names of files that tell them apart, and are the same wherever the folders are moved.

    Below the folder that the code is imported from, the path from there, whatever other files there are; elsewhere the
    shortest ends of paths that tell them apart.
    """
    inner, taken = dict[Path, str](), set[str]()
    for root in roots:
        for path in paths:
            name = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
            if name and path not in inner and name not in taken:
                inner[path] = name
                taken.add(name)
    names = {path: path.name for path in paths if path not in inner}
    for length in range(2, max((len(path.parts) for path in names), default=0) + 1):
        count = Counter([*names.values(), *inner.values()])
        same = [path for path, name in names.items() if count[name] > 1]
        names |= {path: "/".join(path.parts[-length:]) for path in same}
    return inner | names
