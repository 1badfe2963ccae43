"""The data that code names: its string constants, as far as they are names of files, folders and modules.

Code is read, not run. So a name that is put together while it runs is known by its parts alone: of ``HERE / "data" /
"q.jsonl"`` the last part is found wherever a file of that name lies below the code's folder, and the folder with its
files; of ``f"{part}.jsonl"`` all files with that ending. What is no name of data is left out: docstrings, messages,
files that are only written, and what runs only if the file is a program (``if __name__ == "__main__"``).
"""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeAlias

from ecotone.experiments.storage import JOURNAL
from ecotone.populations.parsing import uncollected

WALKED = 10_000
"""Files below the code's folder that are looked at, those of the upper folders first."""

DEPTH = 6
"""Folders that these may lie in, one in the other."""

LISTED = 1_000
"""Files of a folder that a word names."""

NOT_DATA = frozenset(("__pycache__", "runs", "mlruns", "venv", "node_modules", "site-packages"))
"""Names of folders that hold what programs leave behind; so do hidden ones."""

_log = logging.getLogger("ecotone")
_MARKS = (JOURNAL, "ecotone.json", "pyvenv.cfg")  # of a run, an export and a virtual environment
_OUTPUTS = frozenset(
    (
        *("output", "outputs", "out", "results", "result", "log", "logs", "cache", "caches", "tmp", "temp"),
        *("checkpoints", "wandb", "lightning_logs", "tensorboard", "plots", "figures", "dist", "build"),
    )
)
_MESSAGES = frozenset(("print", "debug", "info", "warning", "warn", "error", "exception", "critical", "log"))
_WRITES_ITS_OBJECT = frozenset(("write_text", "write_bytes", "touch", "mkdir", "unlink"))
_WRITES_ITS_ARGUMENTS = frozenset(
    (
        *("save", "savez", "savez_compressed", "savetxt", "savefig", "save_file", "save_pretrained", "imwrite"),
        *("to_csv", "to_json", "to_parquet", "to_pickle", "makedirs", "remove", "rmtree"),
        *("FileHandler", "RotatingFileHandler", "SummaryWriter"),
    )
)
_PATHS = frozenset(("Path", "join", "joinpath", "with_name", "with_suffix", "str", "format", "resolve", "absolute"))
_IMPORTERS = frozenset(
    ("import_module", "__import__", "find_spec", "spec_from_file_location", "run_path", "run_module")
)
_MODE = re.compile(r"[rwaxbt+U]{1,4}")
_VALUE = re.compile(r"%\(?\w*\)?[sdir]|\{[^{}]*\}|\*+|\?|\[[^\]]*\]")
_ENDING = re.compile(r"\S*\.\w{1,12}")
_LONGEST = 1024  # characters of a path that a constant may name

_Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


def tree_of(file: Path) -> ast.Module | None:
    """The syntax tree of a file; None where it is none, as of compiled modules."""
    try:
        with uncollected():  # Python before 3.13 raises SystemError when garbage's own code runs meanwhile
            return ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return None


# -- constants ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Names:
    """What a file of code names.

    Args:
        files: Names and relative paths that may be those of files or folders; with ``*`` for what is not known.
        modules: Constants that may be names of modules, if the file imports modules by name.
        imports_by_name: Whether it does.
        looks_up: Whether it names the folder above its own (``HERE.parent``, ``..``).
    """

    files: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    imports_by_name: bool = False
    looks_up: bool = False


def names_in(tree: ast.AST | None, stem: str) -> Names:
    """What a file of code names.

    Args:
        tree: Its syntax tree; None where it is none.
        stem: Its own name without the ending, for ``with_suffix``.
    """
    if tree is None:
        return Names()
    nodes = list(ast.walk(tree))
    out = _no_names(nodes) | _written(tree, nodes)
    keys = _keys(nodes)
    files, words = set[str](), set[str]()
    for node in nodes:
        if id(node) in out:
            continue
        if isinstance(node, ast.JoinedStr):
            files |= set(_of_pattern(_pattern(node)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            words.add(node.value)
            if _is_word(node.value) and id(node) in keys:
                continue
            files |= set(_of_text(node.value, stem))
    by_name = any(_name_of(node) in _IMPORTERS for node in nodes if isinstance(node, ast.Call))
    modules = frozenset(word for word in words if all(part.isidentifier() for part in word.lstrip(".").split(".")))
    return Names(frozenset(files), modules if by_name else frozenset(), by_name, any(map(_looks_up, nodes)))


def of_argument(text: str) -> Iterator[str]:
    """The names of files and folders that an argument may be."""
    return _of_text(text, "")


def _looks_up(node: ast.AST) -> bool:
    """Whether an expression is of the folder above a known one."""
    if isinstance(node, ast.Attribute) and node.attr == "parent":
        return isinstance(node.value, ast.Name) or _name_of(node.value) == "parent"
    if isinstance(node, ast.Call) and _name_of(node) == "dirname" and node.args:
        return _name_of(node.args[0]) not in ("__file__", "abspath", "realpath")
    return _name_of(node) in ("parents", "pardir") or (isinstance(node, ast.Constant) and node.value == "..")


def _is_word(text: str) -> bool:
    return os.sep not in text and "." not in text


def _of_text(text: str, stem: str) -> Iterator[str]:
    if not text or len(text) > _LONGEST or not text.isprintable():
        return
    if re.fullmatch(r"\.\w+", text):
        yield f"{stem}{text}"  # with_suffix
    elif _VALUE.search(text):
        if "*" not in text:
            yield text
        yield from _of_pattern(_VALUE.sub("*", text))
    else:
        yield text


def _pattern(node: ast.JoinedStr) -> str:
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)


def _of_pattern(pattern: str) -> Iterator[str]:
    """Of a path with unknown parts: its last part if that has an ending, and the folders before."""
    if len(pattern) > _LONGEST or not pattern.isprintable():
        return
    folders, _, last = pattern.rpartition(os.sep)
    pieces = folders.split("*")
    if "*" not in last:  # its last piece and the last part belong together
        yield f"{pieces.pop()}{os.sep}{last}".strip(os.sep)
    elif _ENDING.fullmatch(last):
        yield last
    for piece in pieces:
        if piece.strip(os.sep):
            yield piece.strip(os.sep)


def _name_of(node: ast.expr | ast.stmt | ast.AST) -> str:
    """The name of a called function, without what stands before its last dot."""
    called = node.func if isinstance(node, ast.Call) else node
    return called.attr if isinstance(called, ast.Attribute) else called.id if isinstance(called, ast.Name) else ""


def _no_names(nodes: Iterable[ast.AST]) -> set[int]:
    """By ``id``, constants that are no names of files: docstrings, messages, parts of f-strings, a program's own."""
    out = set[int]()
    for node in nodes:
        if isinstance(node, ast.Expr):
            out |= _direct([node.value])
        elif isinstance(node, ast.JoinedStr):
            out |= {id(part) for part in node.values if isinstance(part, ast.Constant)}
        elif isinstance(node, ast.FormattedValue) and node.format_spec is not None:
            out |= {id(one) for one in ast.walk(node.format_spec)}
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            out |= _direct(node.exc.args)
        elif isinstance(node, ast.Assert) and node.msg is not None:
            out |= _direct([node.msg])
        elif isinstance(node, ast.Call) and _name_of(node) in _MESSAGES:
            out |= _direct(node.args)
        elif isinstance(node, ast.If) and "__name__" in {_name_of(one) for one in ast.walk(node.test)}:
            out |= {id(one) for part in node.body for one in ast.walk(part)}
        elif isinstance(node, ast.Assign) and "__all__" in {_name_of(one) for one in node.targets}:
            out |= {id(one) for one in ast.walk(node.value)}
    return out


def _direct(values: Iterable[ast.expr]) -> set[int]:
    """The texts among expressions, not those within them."""
    return {id(one) for one in values if isinstance(one, ast.Constant | ast.JoinedStr)}


def _keys(nodes: Iterable[ast.AST]) -> set[int]:
    """Constants that are keys, or are compared with: words there are no names of folders."""
    out = set[int]()
    for node in nodes:
        if isinstance(node, ast.Subscript):
            out |= _direct([node.slice])
        elif isinstance(node, ast.Dict):
            out |= _direct([one for one in node.keys if one is not None])
        elif isinstance(node, ast.Compare):
            out |= _direct([node.left, *node.comparators])
        elif isinstance(node, ast.Call) and _name_of(node) in ("get", "pop", "getattr", "setattr", "hasattr", "getenv"):
            out |= _direct(node.args)
    return out


# -- what is only written ----------------------------------------------------------------------------------


def _written(tree: ast.AST, nodes: Sequence[ast.AST]) -> set[int]:
    """Constants in names of files that code only writes, or that the function that writes them reads itself: logs."""
    paths = [path for node in nodes if isinstance(node, ast.Call) for path in _written_by(node)]
    out = {id(one) for path in paths for one in ast.walk(path)}
    for scope in nodes:
        if isinstance(scope, _Function):
            inner = list(ast.walk(scope))
            mine = {one.id for one in inner if isinstance(one, ast.Name) and id(one) in out}
            out |= _assigned(inner, mine)
    uses = [one for one in nodes if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Load)]
    written = {one.id for one in uses if id(one) in out}
    outermost = [one for one in ast.iter_child_nodes(tree) if isinstance(one, ast.Assign | ast.AnnAssign)]
    return out | _assigned(outermost, written - {one.id for one in uses if id(one) not in out})


def _assigned(nodes: Iterable[ast.AST], names: set[str]) -> set[int]:
    """What is assigned to names."""
    out = set[int]()
    for node in nodes:
        targets: Sequence[ast.AST] = ()
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr):
            targets = [node.target]
        value: Any = getattr(node, "value", None)
        if value is not None and _is_path(value) and any(_name_of(one) in names for one in targets):
            out |= {id(one) for one in ast.walk(value)}
    return out


def _written_by(call: ast.Call) -> list[ast.expr]:
    """The paths that a call writes to."""
    name = _name_of(call)
    its_object = [call.func.value] if isinstance(call.func, ast.Attribute) else []
    if name == "open":
        modes = [*call.args[:2], *(one.value for one in call.keywords if one.arg == "mode")]
        first = _is_mode(call.args[0]) if call.args else False
        writes = any(_is_mode(one) and set("wax+") & set(str(getattr(one, "value", ""))) for one in modes)
        return (its_object if first or not call.args else call.args[:1]) if writes else []
    if name in _WRITES_ITS_OBJECT:
        return its_object
    values = [*call.args, *(one.value for one in call.keywords)] if name in _WRITES_ITS_ARGUMENTS else []
    return [one for one in values if _is_path(one)]


def _is_path(node: ast.expr) -> bool:
    """Whether an expression may be a path, and does not come from what a file holds."""
    return not isinstance(node, ast.Call) or _name_of(node) in _PATHS


def _is_mode(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(_MODE.fullmatch(node.value))


# -- files ----------------------------------------------------------------------------------------------------


def inside(folder: Path, without: frozenset[Path] = frozenset(), most: int | None = None) -> Iterator[Path]:
    """The files in a folder, those of the upper folders first, in one order.

    Hidden ones, what programs leave behind, runs, exports and virtual environments are left out.

    Args:
        folder: The folder.
        without: Files and folders to leave out.
        most: Folders to look into; None for all.
    """
    waiting, number = [folder], 0
    while number < len(waiting) and number != most:
        here = waiting[number]
        number += 1
        with contextlib.suppress(OSError), os.scandir(here) as entries:
            found = sorted((one for one in entries if not one.name.startswith(".")), key=lambda one: one.name)
            for one in found:
                path = Path(one.path)
                if path in without:
                    continue
                if one.is_dir(follow_symlinks=False):
                    if one.name not in NOT_DATA and not is_left_behind(path):
                        waiting.append(path)
                elif one.is_file():
                    yield path


def is_left_behind(folder: Path) -> bool:
    """Whether a folder is a run, an export or a virtual environment."""
    return any(os.path.exists(folder / mark) for mark in _MARKS)  # noqa: PTH110 - of one that is closed to us, none


@dataclass
class Below:
    """The files below a folder of code, as far as they are walked: ``WALKED`` of them, ``DEPTH`` folders deep.

    Args:
        folder: The folder.
        without: Files and folders to leave out.

    Attributes:
        cut: Whether there are more files.
    """

    folder: Path
    without: frozenset[Path] = frozenset()
    cut: bool = field(default=False, init=False)

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """By their names."""
        named: dict[str, list[Path]] = {}
        high = len(self.folder.parts) + DEPTH + 1
        for number, path in enumerate(inside(self.folder, self.without, WALKED)):
            if number == WALKED or len(path.parts) > high:
                self.cut = True
                break
            named.setdefault(path.name, []).append(path)
        return named

    def matching(self, name: str, beside: Path) -> list[Path]:
        """The files that a name or relative path may be, and the files in the folders of that name.

        Args:
            name: As code has it; ``*`` in its last part stands for any characters.
            beside: The folder of the code that names it, whose folders count.
        """
        parts = tuple(part for part in Path(name).parts if part != os.sep)
        if not parts or ".." in parts:
            return []
        if "*" in parts[-1]:
            return [one for key, paths in self.files.items() if fnmatchcase(key, parts[-1]) for one in paths]
        found = [one for one in self.files.get(parts[-1], []) if one.parts[-len(parts) :] == parts]
        for folder in () if found or is_for_outputs(parts) else dict.fromkeys((self.folder, beside)):
            found += self.in_folder(folder.joinpath(*parts))
        return found

    def in_folder(self, folder: Path) -> list[Path]:
        """The files in a folder, which may lie elsewhere."""
        if not os.path.isdir(folder) or folder in self.without:  # noqa: PTH112 - a name that is too long is none
            return []
        if not folder.is_symlink() and folder.is_relative_to(self.folder):
            found = [one for paths in self.files.values() for one in paths if one.is_relative_to(folder)]
        else:
            other = Below(folder, self.without)
            found = [one for paths in other.files.values() for one in paths]
            self.cut = self.cut or other.cut
        if len(found) > LISTED:
            self.cut = True
            _tell_many(folder)
        return sorted(found, key=lambda one: (len(one.parts), one))[:LISTED]


@cache
def _tell_many(folder: Path) -> None:
    """Tell once that not all files of a folder count."""
    _log.warning(
        "%s is named by code or by an argument, and has more than %s files: changes of the others are not found. "
        "An argument with the folder's path has all of them compared.",
        *(folder, f"{LISTED:,}"),
    )


def is_for_outputs(parts: Sequence[str]) -> bool:
    """Whether a path is a word that names a folder that programs write into."""
    return len(parts) == 1 and parts[0].lower() in _OUTPUTS
