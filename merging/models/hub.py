"""Models of the Hugging Face hub: ``organisation/name`` or ``organisation/name@revision``.

A repository's safetensors, configuration and tokenizer files are downloaded once, to the cache of huggingface_hub
(``HF_HOME``). With ``HF_HUB_OFFLINE=1`` only what is there already is used. A revision is a branch, a tag or a commit;
only a commit always means the same weights.
"""

from __future__ import annotations

import re
from pathlib import Path

from ecotone.extras import how_to_install
from ecotone.populations.errors import CheckpointError
from ecotone.populations.parsing import MalformedError, file_bytes, text_of

FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.vocab", "LICEN?E*", "NOTICE*")
LEFT_OUT = ("*/*", "consolidated*")  # other formats of the same weights
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w][\w./-]*)?")
_OTHER_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def is_repository(text: str) -> bool:
    """Whether a text has the form of a repository's name, with or without a revision."""
    return bool(_REPOSITORY.fullmatch(text)) and not text.lower().endswith(_OTHER_FILES)


def located(text: str) -> Path:
    """The directory of a repository's files, downloaded if they are not in the cache.

    Args:
        text: ``organisation/name`` or ``organisation/name@revision``.

    Raises:
        CheckpointError: The hub cannot be reached, or has no such repository or revision; it may not be read; it holds
            no safetensors; or huggingface_hub is not installed.
    """
    repository, _, revision = text.partition("@")
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise CheckpointError(
            f"{text}: no such file or directory, and models of the Hugging Face hub need huggingface_hub.",
            f"`{how_to_install('hf')}`.",
        ) from error
    try:
        directory = Path(
            snapshot_download(
                repository, revision=revision or None, allow_patterns=list(FILES), ignore_patterns=list(LEFT_OUT)
            )
        )
    except errors.GatedRepoError as error:
        remedy = f"Ask for access at https://huggingface.co/{repository}, then: hf auth login"
        raise CheckpointError(
            f"{text}: the Hugging Face hub gives this model to permitted users only.", remedy
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{text}: no such file or directory, and the Hugging Face hub has no such public repository.",
            "Check the name; for a private repository, first: hf auth login",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(
            f"{text}: the repository {repository} of the Hugging Face hub has no revision {revision!r}.",
            f"Give a branch, a tag or a commit of https://huggingface.co/{repository}/commits/main",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        option = f" --revision {revision}" if revision else ""
        raise CheckpointError(
            f"{text}: no such file or directory; the Hugging Face hub is out of reach (offline, or HF_HUB_OFFLINE is "
            "set) and its cache does not have it.",
            f"Where there is a network: hf download {repository}{option}",
        ) from error
    except Exception as error:  # whatever the network and the client bring
        raise CheckpointError(f"{text}: could not be downloaded ({error}).", "Try again.") from error
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{text}: expected safetensors, found none in the repository; pickles and GGUF files are not loaded.",
            'If you trust it, convert it: python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer '
            f"as T; [k.from_pretrained('{repository}').save_pretrained('{repository.partition('/')[2]}') "
            'for k in (M, T)]"',
        )
    return directory


def snapshot(path: Path) -> Path:
    """The snapshot that the folder of a repository in the hub's cache (``models--organisation--name``) means.

    It is that of the branch ``main``, or the only one. Any other path is returned as it is.

    Raises:
        CheckpointError: There are several, and none is that of ``main``; or there is none.
    """
    folder = path / "snapshots"
    if not path.name.startswith("models--") or not folder.is_dir():
        return path
    main = _commit(path / "refs" / "main")
    if main and (folder / main).is_dir():
        return folder / main
    found = sorted(one for one in folder.iterdir() if one.is_dir())
    if len(found) == 1:
        return found[0]
    organisation, _, name = path.name.removeprefix("models--").partition("--")
    few = ", ".join(str(one) for one in found[:3]) or "none"
    raise CheckpointError(
        f"{path}: expected one snapshot or that of the branch main in this folder of the hub's cache, found {few}.",
        f"Give one of them, or the repository's name: {organisation}/{name}" if name else "Give one of them.",
    )


def _commit(branch: Path) -> str:
    """The commit that a branch's file names; empty where there is none: a name with a slash would lead elsewhere."""
    try:
        name = text_of(file_bytes(branch, 1000)).strip() if branch.is_file() else ""
    except (OSError, MalformedError):
        return ""
    return name if re.fullmatch(r"\w[\w.-]*", name) else ""


def repository_of(path: Path) -> str:
    """The repository, ``organisation/name``, when a path is one of the cache's snapshots; or an empty string."""
    folder = path.parent.parent.name
    if path.parent.name != "snapshots" or not folder.startswith("models--"):
        return ""
    return folder.removeprefix("models--").replace("--", "/", 1)


def name_of(path: Path) -> str:
    """The repository's name when a path is one of the cache's snapshots (or in one), or an empty string."""
    place = next((place for place in (path, path.parent) if repository_of(place)), None)
    return "" if place is None else place.parent.parent.name.rpartition("--")[2]
