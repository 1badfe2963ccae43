"""Writes ``docs/families.md``: what a merge of each family in ``families.py`` showed. `make families` runs it."""

import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import transformers
from every_class import CannotBeMadeError, classes, fit
from families import FAMILIES, check, opened, run_through

from ecotone.populations.files import written_whole

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
HEADER = f"""# Families of models

A recipe with `architecture: auto` merges any checkpoint whose class transformers has, if the class takes its tensors.
The families below were tried with tiny random models: a base and two experts of each. `make families` writes this page.

Of each family: `validate` called a recipe valid, and it ran. The merge filled the module as `from_pretrained` fills it
with the export, and both put out the same bits. Gradients by coefficients were those of autograd. `verify` found the
recorded scores.

Made with transformers {transformers.__version__}, {len(FAMILIES)} families. *Renamed* are tensors of the checkpoint
that have another name in the module. *Converted* are those that transformers stacks, fuses, splits or moves on loading.

| family | class | tensors | renamed | converted |
| --- | --- | ---: | ---: | ---: |
"""


def row(name: str) -> str:
    """A family's row, after all checks. Raises what they raise."""
    with tempfile.TemporaryDirectory() as folder:
        case = opened(name, Path(folder))
        found, _ = check(case, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        run_through(name, Path(folder))
    places = found.places.values()
    converted = sum(not place.whole for place in places) + len(found.scattered)
    renamed = sum(place.whole and place.name != place.target for place in places)
    tensors = len(case.sources.layout.parameters) + len(case.sources.layout.buffers)
    return f"| {name} | `{FAMILIES[name].model}` | {tensors} | {renamed or ''} | {converted or ''} |"


def tried(name: str) -> str | None:
    """A family's row, or None where a check failed; then the error is printed."""
    try:
        return row(name)
    except Exception:
        traceback.print_exc()
        return None


def main() -> int:
    rows = {name: tried(name) for name in sorted(FAMILIES)}
    failed = [name for name, text in rows.items() if text is None]
    others, unmade = every_type()
    page = [HEADER, *(f"{text}\n" for text in rows.values() if text), OTHERS.format(fitting=len(others))]
    page += [f"| {key} | {reason} |\n" for key, reason in unmade.items()]
    written_whole(PAGE, "".join([*page, CANNOT]))
    print(f"{len(rows) - len(failed)} families in {PAGE}; failed: {', '.join(failed) or 'none'}")
    return bool(failed)


def every_type() -> tuple[list[str], dict[str, str]]:
    """Model types whose names fit, and for those that cannot be made here the reason. Raises where names do not fit."""
    fitting, unmade = [], {}
    for key, names in classes().items():
        reason = unmade_because(key, names)
        if reason is None:
            fitting.append(key)
        else:
            unmade[key] = reason
    return fitting, unmade


def unmade_because(key: str, kinds: Sequence[str]) -> str | None:
    try:
        names, saved = fit(kinds)
    except CannotBeMadeError as error:
        return str(error).replace("|", "/")
    if names.unused or {*names.places, *names.scattered} != saved:
        raise AssertionError(f"{key}: names do not fit")
    return None


OTHERS = """
## Names of every model type

Of {fitting} model types of transformers, one class each, at the sizes of their default configurations and without
weights, each tensor that transformers saves has its place in the module. Of these, the default makes no module
here:

| model type | reason |
| --- | --- |
"""
CANNOT = """
## What cannot be merged by `architecture: auto`

- Models whose code is in their own repository (`auto_map`): that code is never run. Give the architecture as a
  function.
- Models of a type that the installed transformers does not know.
- Quantised checkpoints. `validate` says the kind, and the command that undoes it.
- Models of several parts that are saved in folders of their own, such as pipelines of diffusers. Merge each part.
"""

if __name__ == "__main__":
    sys.exit(main())
