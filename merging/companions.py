"""The files that travel with an export beside its weights and config, and the model that each comes from.

The files are those of the model whose config the merge has, and of the base (or the first expert). What that model
lacks is taken from the first expert that has it: the generation config, the processors of images and sound, the
tokenizer and the chat template. Licences and other small files are the base's alone, and small sub-folders such as the
modules of sentence-transformers. Code, cards and weights in other formats never travel.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ecotone.merging.models import configs, tokenizers
from ecotone.merging.models.model import Model
from ecotone.merging.sources import Sources
from ecotone.populations.genome import Genome
from ecotone.populations.parsing import file_bytes, json_value

_SUFFIXES = (".json", ".jinja", ".txt", *tokenizers.SUFFIXES)
_NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_LEFT_OUT = frozenset(
    (
        "README.md",
        "ecotone.json",
        "config.json",
        "adapter_config.json",
        "trainer_state.json",
        "all_results.json",
        "train_results.json",
        "eval_results.json",
        "requirements.txt",
    )
)
_CARDS = _LEFT_OUT - {"config.json"}  # of a sub-folder
_MODULES = "modules.json"
"""Of sentence-transformers: the folders of its modules."""
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".onnx", ".gguf", ".h5", ".msgpack", ".npz", ".xml")
_NO_FOLDERS = re.compile(
    r"\..*|checkpoints?([-_].*)?|runs?|logs?|wandb|mlruns|eval(uation)?|__pycache__", re.IGNORECASE
)
_DEPTH = 2  # of folders in folders
_SMALL = 8 * 2**20  # bytes of a file in a folder
_MANY = 64  # files in a folder; more are data


@dataclass(frozen=True)
class Companion:
    """A file of an export.

    Args:
        name: Its name in the export, with its folder where it is in one.
        source: The file that it is a copy of, or that its text is taken from.
        model: The name of the expert that it comes from where the base lacks it; else None.
        text: Its content, where it is no copy.
    """

    name: str
    source: Path
    model: str | None = None
    text: str | None = None

    def write(self, directory: Path) -> None:
        """Write it into an export."""
        target = directory / self.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if self.text is None:
            shutil.copyfile(self.source, target)
        else:
            target.write_text(self.text, "utf-8")


def companions(sources: Sources, genome: Genome | None = None) -> list[Companion]:
    """The files that travel with an export of a merge.

    Args:
        sources: The models; the one that merges have the config of is a Hugging Face directory.
        genome: The merge; None is any that is no expert with a config of its own.
    """
    whose = sources.configured if genome is None else sources.configured_for(genome)
    others = [model for model in sources.models if model is not whose]
    found = {one.name: one for one in _of_origin(sources.origin.files)}
    alike = [whose, *(model for model in others if configs.generate_alike(whose, model))]
    for names, models in (((configs.GENERATION,), alike), (configs.PROCESSORS, [whose, *others])):
        for name in names:
            found.pop(name, None)
        found |= {one.name: one for one in _group(names, models, sources)}
    if sources.tokenizer != sources.origin.files:
        found = {name: one for name, one in found.items() if not tokenizers.is_file(name)}
        found |= {one.name: one for one in _of_tokenizer(sources)}
    templates = [*found.keys() & {tokenizers.TEMPLATE, tokenizers.OLD_TEMPLATE}]
    if not templates and tokenizers.chat_template(sources.tokenizer) is None:
        found |= {one.name: one for one in _template([whose, *others], sources)}
    return list(found.values())


def told(sources: Sources) -> str:
    """The files that do not come from the base (or the first expert), and modules that stay behind; in words."""
    owners: dict[tuple[str, str], list[str]] = {}
    for one in companions(sources):
        if one.model is not None:
            origin = sources.origin
            there = (origin.files / one.name).is_file()
            reason = "whose config merges have" if there else f"as {origin.name!r} lacks them"
            owners.setdefault((one.model, reason), []).append(one.name)
    taken = [f"{', '.join(names)} from {owner!r}, {reason}" for (owner, reason), names in owners.items()]
    return "; ".join([*taken, *_left_behind(sources.origin.files)])


def _of_origin(folder: Path) -> Iterator[Companion]:
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if _travels(file) and file.name not in _LEFT_OUT and not file.name.endswith(".index.json"):
            yield Companion(file.name, file)
        elif file.is_dir() and not _refusal(file):
            inside = list(_inside(file))
            if len(inside) <= _MANY:
                yield from (Companion(inner.relative_to(folder).as_posix(), inner) for inner in inside)


def _travels(file: Path) -> bool:
    wanted = file.suffix in _SUFFIXES or file.name.upper().startswith(_NAMES)
    return wanted and file.is_file() and not file.name.startswith(".")


def _inside(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The small files of a sub-folder that travel."""
    for file in sorted(folder.iterdir()):
        if _travels(file) and file.name not in _CARDS and file.stat().st_size <= _SMALL:
            yield file
        elif depth > 1 and file.is_dir() and not _refusal(file):
            yield from _inside(file, depth - 1)


def _refusal(folder: Path) -> str:
    """Why a sub-folder stays behind as a whole; empty if it travels."""
    if folder.is_symlink() or _NO_FOLDERS.fullmatch(folder.name):
        return "it is hidden, a link, or one of a training's"
    weights = next((file.name for file in sorted(folder.iterdir()) if file.suffix.lower() in _WEIGHTS), None)
    return "" if weights is None else f"it holds weights of its own ({weights}), which are not merged"


def _left_behind(folder: Path) -> list[str]:
    """The modules of sentence-transformers that do not travel, or not whole, in words."""
    try:
        listed = json_value(file_bytes(folder / _MODULES), once=False, finite=False)
        paths = [str(one.get("path") or "") for one in listed]
    except (OSError, ValueError, TypeError, AttributeError):
        return []
    found = {one.source for one in _of_origin(folder)}
    sentences = []
    for path in dict.fromkeys(paths):
        place = folder / path
        if not path or ".." in place.parts or Path(path).is_absolute() or not place.is_dir():
            continue
        files = (file for file in sorted(place.rglob("*")) if file.is_file() and file not in found)
        lost = [file.name for file in files if not file.name.startswith(".") and file.name not in _CARDS]
        if lost:
            reason = _refusal(place) or f"its {lost[0]} is too large, or of no kind that travels"
            sentences.append(f"{path}, which {_MODULES} names, does not travel whole: {reason}")
    return sentences


def _group(names: Sequence[str], models: Sequence[Model], sources: Sources) -> list[Companion]:
    """Files of these names from the first of the models that has one: together, as they are of one piece."""
    for model in models:
        files = [model.files / name for name in names if (model.files / name).is_file()]
        if files:
            return [Companion(file.name, file, _owner(model, sources)) for file in files]
    return []


def _of_tokenizer(sources: Sources) -> Iterator[Companion]:
    folder = sources.tokenizer
    model = next((one for one in sources.models if one.tokenizer == folder), sources.origin)
    for name in tokenizers.files(folder):
        yield Companion(name, folder / name, _owner(model, sources))


def _template(models: Sequence[Model], sources: Sources) -> list[Companion]:
    """The chat template of the first model that has one."""
    for model in models:
        for folder in dict.fromkeys((model.tokenizer, model.files)):
            text = tokenizers.chat_template(folder)
            if text is not None and not text.startswith("["):  # one template, not a list of several in JSON
                return [Companion(tokenizers.TEMPLATE, folder, _owner(model, sources), text)]
    return []


def _owner(model: Model, sources: Sources) -> str | None:
    return None if model is sources.origin else model.name
