"""Merges as mergekit's YAML, and mergekit-evolve's YAML as recipes.

mergekit (https://github.com/arcee-ai/mergekit) is a program of its own; nothing here imports it. An exact export rests
on what its documentation says: ``linear`` with ``normalize: false`` is a plain weighted sum; ``dtype`` is what it
computes in and ``out_dtype`` what it writes; a parameter may be a list of filters, of which the first that is part of
a tensor's name gives the value. So it can express every merge that weighs each tensor as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import yaml
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from ecotone.experiments.mergekit_filters import TYPICAL, are_components, shortest
from ecotone.experiments.mergekit_merges import Chosen, evolution_of, frozen_parts
from ecotone.experiments.reading import at_home, yaml_file
from ecotone.merging.models import configs
from ecotone.merging.models.formats import opened_whole
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.merging.sources import Sources
from ecotone.populations.errors import EcotoneError, InputError, nearest
from ecotone.populations.genome import Genome
from ecotone.populations.parsing import foreign_or_none
from ecotone.settings import Part

IN_ORDER = 4  # models whose weighted sum torch takes from the first to the last
_AS_CHECKPOINT = "Export a checkpoint instead: leave the format out."


@dataclass(frozen=True)
class Snap:
    """A genome whose split points were moved to tensor borders, and the changes that this made.

    Args:
        genome: The genome; each tensor has the coefficients that most of it had.
        elements: The number of parameters whose coefficients have changed.
        share: The same as a share of all parameters.
        largest: The largest change of a coefficient.
    """

    genome: Genome
    elements: int
    share: float
    largest: float

    def __str__(self) -> str:
        return f"{self.share:.2%} of the parameters get other coefficients (the largest change is {self.largest:.4g})"


@dataclass(frozen=True)
class MergekitMerge:
    """A merge as mergekit reads it.

    Args:
        config: The file's content.
        genome: The merge that it describes.
        snap: The change from moving split points to tensor borders; None when none had to be moved.
        adapters: Whether mergekit will merge LoRA adapters into their base first.
        notes: Notes for its user, a sentence each.
    """

    config: Mapping[str, Any]
    genome: Genome
    snap: Snap | None
    adapters: bool
    notes: tuple[str, ...]

    def command(self, file: Path) -> str:
        """The shell command that makes the merge of ``file``, once that file is written."""
        options = " --lora-merge-dtype float32" if self.adapters else ""
        return f"mergekit-yaml {file} DIR{options}"

    def text(self, title: str) -> str:
        """The file: title and notes as comments, then YAML. Numbers are read back as the same float64."""
        body = yaml.safe_dump(dict(self.config), sort_keys=False, default_flow_style=None, width=1_000_000)
        return "".join(f"# {line}\n" for line in (title, *self.notes)) + body


def mergekit_config(
    genome: Genome, sources: Sources, dtype: torch.dtype | str | None = None, snap: bool = False
) -> MergekitMerge:
    """The mergekit configuration whose result has the genome's weights.

    mergekit computes in float32 and rounds once, as ``Sources.materialise`` does. With up to four models the results
    agree bit for bit; the sum of more is torch's own, some of it in another order, and differs in last bits. Models are
    named by their absolute paths, those in the Hugging Face hub's cache by repository and commit.

    Args:
        genome: The merge.
        sources: The models, Hugging Face directories, and the operator.
        dtype: Type of the result; by default that of the models (float32 when they mix types).
        snap: Move split points inside tensors to tensor borders instead of refusing the genome.

    Raises:
        InputError: mergekit cannot express the merge: the operator changes the experts, the genome has a residual or
            split points inside tensors, or the models are no Hugging Face directories, or in float64.
    """
    _check_expressible(genome, sources)
    moved = snapped(genome, sources.layout)
    if moved is not None and not snap:
        raise _splits_tensors(genome, sources.layout, moved)
    plain = genome if moved is None else moved.genome
    kind = str(dtype or sources.layout.dtype).removeprefix("torch.")
    columns: dict[str, dict[str, float]] = {}
    for model, weights in _weights(plain, sources):
        column = columns.setdefault(model.mergekit_reference(), dict.fromkeys(weights, 0.0))
        for name, weight in weights.items():  # mergekit refuses to read a model twice
            column[name] += weight
    config = {
        "merge_method": "linear",
        "base_model": sources.origin.mergekit_reference(),
        "dtype": "float32",
        "out_dtype": kind,
        "parameters": {"normalize": False},
        "models": [{"model": model, "parameters": {"weight": _setting(column)}} for model, column in columns.items()],
    }
    return MergekitMerge(
        config, plain, moved, _with_adapters(columns), tuple(_notes(list(columns), sources, dtype, kind, moved))
    )


def snapped(genome: Genome, layout: Layout) -> Snap | None:
    """The genome with its split points moved to tensor borders, or None when they all are there.

    A tensor that is split takes the coefficients that most of its elements have; where there is one split point, that
    moves it to the nearest border.
    """
    plain, borders = genome.simplified(), layout.tensor_borders
    union = np.union1d(plain.boundaries, borders)
    if len(union) == len(borders):
        return None
    rows, lengths = plain.refined(union), np.diff(union)
    home = np.searchsorted(borders, union[:-1], side="right") - 1
    taken = np.empty((len(borders) - 1, plain.sources))
    for tensor in range(len(taken)):
        pieces = np.flatnonzero(home == tensor)
        kinds, kind = np.unique(rows[pieces], axis=0, return_inverse=True)
        taken[tensor] = kinds[np.argmax(np.bincount(kind.ravel(), lengths[pieces]))]
    changes = np.abs(rows - taken[home])
    elements = int(lengths[changes.any(axis=1)].sum())
    result = Genome(borders, taken, plain.parameters, plain.residual).simplified()
    return Snap(result, elements, elements / layout.size, float(changes.max()))


def _with_adapters(references: Iterable[str]) -> bool:
    """Whether mergekit merges an adapter into its base first: a reference has a plus sign between the two."""
    return any("+" in reference for reference in references)


def _setting(values: Mapping[str, float]) -> float | list[dict[str, str | float]]:
    """A parameter of mergekit's: a number where all tensors share it, otherwise filters."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return [{"filter": one, "value": value} for one, value in shortest(values)]


def _weights(genome: Genome, sources: Sources) -> list[tuple[Model, dict[str, float]]]:
    """The models, and each one's weight by tensor; tied tensors have theirs by every name that a model stores.

    The model that configuration and tokenizer come from is among them, if need be with weights of zero. Tensors that
    are not merged are its.
    """
    layout, mixture = sources.layout, sources.mixture(genome)
    segments = np.searchsorted(mixture.borders, layout.tensor_borders[:-1], side="right") - 1
    places = dict(zip(layout.tensors, segments.tolist(), strict=True))
    for model in sources.checkpoints:
        places |= {name: places[kept] for name, kept in Layout.of(model).aliases.items()}
    models = [(model, mixture.weights[:, j].tolist()) for j, model in enumerate(sources.checkpoints)]
    if all(model is not sources.origin for model, _ in models):
        models.insert(0, (sources.origin, [0.0] * len(mixture.weights)))
    return [
        (
            model,
            {name: weights[segment] for name, segment in places.items()}
            | dict.fromkeys(layout.buffers, float(model is sources.origin)),
        )
        for model, weights in models
    ]


def _check_expressible(genome: Genome, sources: Sources) -> None:
    if sources.operator.changes:
        raise InputError(
            f"merge.operator: mergekit cannot express {sources.operator.name!r}, which changes the experts in a way of "
            "its own before they are mixed (mergekit's methods of like names do it otherwise).",
            _AS_CHECKPOINT,
        )
    if sources.rank is not None:
        raise InputError(
            "merge.rank: mergekit cannot express merges of adapters whose updates are cut to a rank.", _AS_CHECKPOINT
        )
    if genome.residual is not None:
        raise InputError(
            "genome: expected coefficients of models, found whole weights that were evolved: mergekit cannot express "
            "them.",
            _AS_CHECKPOINT,
        )
    origin, configured = sources.origin, sources.configured_for(genome)
    if configured is not origin and any(one.matters for one in configs.compare([origin, configured])):
        raise InputError(
            f"models.config: mergekit gives a merge the config of {origin.name!r}; the merge was scored with that of "
            f"{configured.name!r}, which computes something else.",
            _AS_CHECKPOINT,
        )
    for name in sources.layout.kept:
        infos = [model.tensors.get(name) for model in (sources.origin, *sources.checkpoints)]
        if any(info is None or infos[0] is None or info.shape != infos[0].shape for info in infos):
            raise InputError(
                f"{name}: mergekit merges tensors that all models have in one shape, found one that is taken from "
                f"{sources.giver(name).name}, as others lack it or have another shape.",
                _AS_CHECKPOINT,
            )
    for model in (sources.origin, *sources.checkpoints):
        try:
            model.mergekit_reference()
        except InputError as error:
            raise InputError(error.message, error.remedy or _AS_CHECKPOINT) from error
        if not model.is_hugging_face:
            raise InputError(
                f"{model.path}: mergekit merges Hugging Face directories, found no config.json.", _AS_CHECKPOINT
            )
        if any(info.dtype == torch.float64 for info in model.tensors.values()):
            raise InputError(f"{model.path}: mergekit knows no float64, which this model is in.", _AS_CHECKPOINT)


def _splits_tensors(genome: Genome, layout: Layout, moved: Snap) -> InputError:
    borders = layout.tensor_borders
    inside = np.setdiff1d(genome.simplified().boundaries, borders)
    first = layout.tensors[int(np.searchsorted(borders, inside[0], side="right")) - 1]
    return InputError(
        f"genome: mergekit gives a tensor one weight a model, found {len(inside)} split point(s) inside tensors, the "
        f"first in {first!r}.",
        f"Snap them to tensor borders (--snap): {moved}; or export a checkpoint, which is exact.",
    )


def _notes(
    models: Sequence[str], sources: Sources, dtype: torch.dtype | str | None, kind: str, moved: Snap | None
) -> list[str]:
    notes = []
    if _with_adapters(models):
        notes.append(
            "mergekit merges adapters into their base first, with --lora-merge-dtype float32 almost without rounding; "
            "its result differs in last bits."
        )
    if len(models) > IN_ORDER:
        notes.append(f"mergekit sums more than {IN_ORDER} models in an order of its own: last bits may differ.")
    if moved is not None:
        notes.append(f"NOT the merge that was scored, as split points were moved to tensor borders: {moved}.")
    if any(Path(model).is_absolute() for model in models):
        notes.append("Models are named by their paths on one machine; elsewhere put others, or ids of the hub.")
    if dtype is None and len(set(sources.layout.dtypes)) > 1:
        notes.append(f"The models mix types; mergekit writes all tensors in {kind}.")
    copied = [name for name in sources.layout.buffers if name not in sources.layout.kept]
    if copied:
        notes.append(f"mergekit leaves out, or writes in {kind}: {', '.join(copied)}.")
    if sources.apart.dropped:
        notes.append("mergekit merges what this merge leaves out, where its architecture has it.")
    return notes


# -- mergekit-evolve's configuration ---------------------------------------------------------------------

METHODS = {  # by mergekit's method, the operator for weights that are normalised and that are not
    "linear": ("task_arithmetic", "linear"),
    "task_arithmetic": ("task_arithmetic", "task_arithmetic"),
    "ties": ("ties", "ties_vectors"),
    "dare_ties": ("dare_ties", "dare_ties"),
    "slerp": ("slerp", "slerp"),
}


def _plain_reference(value: Any) -> Any:
    """A model of mergekit's as ``path[@revision][+adapter[@revision]]``; it may be written as a mapping, too."""
    if isinstance(value, Mapping) and set(value) <= {"path", "revision"}:
        return f"{value.get('path')}@{value['revision']}" if value.get("revision") else value.get("path")
    if isinstance(value, Mapping) and set(value) <= {"model", "lora"}:
        model, lora = (_plain_reference(value.get(key)) for key in ("model", "lora"))
        return f"{model}+{lora}" if lora else model
    return value


ModelName: TypeAlias = Annotated[str, BeforeValidator(_plain_reference)]


class EvolveTask(Part):
    """A task of lm-eval; ``metric`` is its name and its filter's, joined by a comma."""

    name: str
    weight: float = 1.0
    metric: str = "acc,none"

    @model_validator(mode="before")
    @classmethod
    def _of_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


class EvolveGenome(Part):
    """The models and parameters that mergekit-evolve searches over."""

    models: tuple[ModelName, ...] = Field(min_length=1)
    merge_method: str
    base_model: ModelName | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] | None = None
    smooth: bool = False


class EvolveFile(Part):
    """mergekit-evolve's configuration: a genome, and the tasks that it is scored on."""

    genome: EvolveGenome
    tasks: tuple[EvolveTask, ...] = Field(min_length=1)
    limit: int | None = Field(default=None, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True

    @classmethod
    def read(cls, file: Path) -> tuple[EvolveFile, Chosen]:
        """Read and check a file; a merge with tasks beside it is read as a search that begins there.

        Returns:
            The configuration, and what a merge's weights say beside it.

        Raises:
            InputError: It is missing, not YAML or another kind of file, or a field is unknown or does not fit.
        """
        if not file.exists():
            raise InputError(f"{file}: no such file.")
        record = yaml_file(file)[1].value
        if not isinstance(record, dict):
            raise InputError(f"{file}: expected a mapping with genome and tasks, found {type(record).__name__}.")
        chosen = Chosen()
        if "genome" not in record and "merge_method" in record and "tasks" in record:
            record, chosen = evolution_of(record, file)
        if "genome" not in record and "merge_method" in record:
            raise InputError(
                f"{file}: expected mergekit-evolve's genome and tasks, found a merge with weights already chosen: "
                "there is nothing in it to search for, or by.",
                "Add tasks to it, what to score merges on: the search then begins with these weights.",
            )
        try:
            return cls.model_validate(record), chosen
        except ValidationError as error:
            raise InputError("\n".join(_line(dict(one), file) for one in error.errors()[:5])) from error


def _line(entry: dict[str, Any], file: Path) -> str:
    steps = entry["loc"]
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")
    if entry["type"] == "extra_forbidden":
        inner: dict[int | str, type[Part]] = {"genome": EvolveGenome, "tasks": EvolveTask}
        part = inner[steps[0]] if len(steps) > 1 else EvolveFile
        return f"{file}: {field}: unknown key. {nearest(str(steps[-1]), list(part.model_fields))}"
    if entry["type"] == "missing":
        return f"{file}: {field}: missing; mergekit-evolve needs it."
    return f"{file}: {field}: {entry['msg'][0].lower()}{entry['msg'][1:]}, found {entry['input']!r}."


def import_mergekit(path: str | Path, layers: int | None = None) -> str:
    """mergekit-evolve's configuration as a recipe; or a merge of mergekit's with ``tasks`` beside it.

    Args:
        path: The YAML file.
        layers: How many layers the models have; needed with ``layer_granularity`` above 1 unless the first model is a
            local directory.

    Returns:
        The recipe's text; the comments at its top say what is otherwise than in mergekit-evolve.

    Raises:
        InputError: The file cannot be read or is no such configuration, a key is unknown, the method is not supported,
            or the number of layers is needed.
    """
    file = Path(path)
    evolve, chosen = EvolveFile.read(file)
    reader = _Importer(evolve, file.parent, layers, chosen)
    models, merge, box = reader.merges()
    record = {
        "name": re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).lstrip("._-") or "imported",
        "models": models,
        "merge": merge,
        "objectives": reader.objectives(),
        "search": {"algorithm": "cma_es", **reader.segments(), **box, "sigma": 0.1667},
        "budget": {"evaluations": 100},
    }
    reader.note_the_rest()
    kind = "configuration of mergekit-evolve" if chosen.start is None else "merge of mergekit"
    comments = [
        f"Made of {file.name}, a {kind}. What is otherwise than there:",
        *(f"- {note}" for note in reader.notes),
    ]
    body = yaml.safe_dump(record, sort_keys=False, default_flow_style=None, width=110)
    return "".join(f"# {line}\n" for line in comments) + body


def _few(filters: Sequence[str]) -> str:
    """The first filters, and how many more there are."""
    return ", ".join(filters[:5]) + (f" and {len(filters) - 5} more" if len(filters) > 5 else "")


class _Importer:
    """Turns mergekit-evolve's fields into a recipe's, and notes the differences."""

    def __init__(self, evolve: EvolveFile, folder: Path, layers: int | None, chosen: Chosen) -> None:
        self.evolve, self.folder, self.layers, self.chosen = evolve, folder, layers, chosen
        self.notes: list[str] = []

    def merges(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        """The recipe's models and merge operator, and the search's bounds and start."""
        genome, method = self.evolve.genome, self.evolve.genome.merge_method
        if method not in METHODS:
            raise InputError(
                f"genome.merge_method: expected one of {', '.join(METHODS)}, found {method!r}.",
                nearest(method, tuple(METHODS)),
            )
        base = None if genome.base_model is None else self._place(genome.base_model)
        if base is None and method in ("task_arithmetic", "ties", "dare_ties"):
            raise InputError(f"genome.base_model: missing; {method} adds to a base model.")
        experts = [self._expert(name) for name in genome.models]
        if base in experts and method != "linear":
            self.notes.append("genome.models: the base is no expert, too; its task vector is zero.")
            experts.remove(base)
        if len(experts) < 2:
            raise InputError(f"genome.models: expected two models or more to merge, found {len(experts)}.")
        normalised = method in ("ties", "dare_ties", "linear") if genome.normalize is None else genome.normalize
        operator = METHODS[method][0 if normalised else 1]
        start, high = round(1 / len(genome.models), 4), 1.0
        if method == "linear" and normalised:
            base, *experts = experts
            self.notes.append(
                "normalize: weights that sum to one are written as task arithmetic on the first model, whose weight is "
                "what the others leave."
            )
        elif method in ("ties", "dare_ties"):
            trimmed = "magnitudes are trimmed over the whole model" if method == "ties" else "masks are fixed by a seed"
            self.notes.append(
                f"density: mergekit-evolve searches for one a model; here all have merge.density. Also, {trimmed}, and "
                "signs are elected without the coefficients' say."
            )
            if operator != "ties_vectors":
                start, high = 1.0, 2.0
                self.notes.append(
                    "normalize: entries that agree are averaged, and the coefficients scale what results."
                )
        elif method == "slerp":
            if len(experts) != 2:
                raise InputError(
                    f"genome.models: slerp interpolates between two models, found {len(experts)} (of which "
                    "mergekit-evolve takes the two of largest weight, layer by layer).",
                    "Give two, or merge_method: linear.",
                )
            start = 0.5
        elif normalised:
            self.notes.append("normalize: weights are not divided by their sum.")
        low = -high if genome.allow_negative_weights and method != "slerp" else 0.0
        self.notes.append(f"Coefficients are searched between {low:g} and {high:g}; mergekit-evolve has no bounds.")
        models: dict[str, Any] = {
            "experts": experts,
            **({} if base is None else {"base": base}),
            "architecture": "auto",
        }
        if genome.tokenizer_source == "union" or (genome.tokenizer_source == "base" and base is not None):
            models["vocabulary"] = genome.tokenizer_source
        elif genome.tokenizer_source not in (None, "base"):
            models["tokenizer"] = self._place(genome.tokenizer_source)
        if self.chosen.start is not None:
            start = round(min(max(self.chosen.start, low), high), 4)
            self.notes.append(f"weight: the search begins with {start:g} everywhere, the mean of the merge's weights.")
        box = {"low": low, "high": high, "start": start}
        frozen = frozen_parts(self.chosen, self._names)
        return models, {"operator": operator, "dtype": "bfloat16", **frozen}, box

    def segments(self) -> dict[str, Any]:
        """The search's granularity."""
        genome = self.evolve.genome
        step = genome.layer_granularity
        if self._by_components and step != 1:
            return self._components(self._runs(step) if step > 1 else 1)
        if step < 1:
            return {"granularity": "model"}
        if step == 1:
            self.notes.append(
                "layer_granularity: embeddings, final norm and head have coefficients of their own; in mergekit-evolve "
                "they share those of the first or the last layer."
            )
            return {"granularity": "block"}
        runs = self._runs(step)
        return {"granularity": "model"} if runs == 1 else {"granularity": "groups", "groups": runs}

    def _runs(self, step: int) -> int:
        """How many runs of ``step`` layers there are."""
        layers = self.layers or self._layers()
        if layers is None:
            raise InputError(
                f"genome.layer_granularity: with {step} the number of layers is needed, and "
                f"{self.evolve.genome.models[0]} is no local directory to find it in.",
                "Give it: --layers 32, say.",
            )
        if layers % step:
            raise InputError(f"genome.layer_granularity: expected a divisor of {layers}, the layers, found {step}.")
        if layers > step:
            self.notes.append(
                f"layer_granularity: {layers // step} runs of layers, embeddings and head among them, of about as many "
                f"parameters each, in place of {step} layers each."
            )
        return layers // step

    @cached_property
    def _names(self) -> tuple[str, ...]:
        """The tensors of the base or the first model, in flat order; none where it is no local directory."""
        genome = self.evolve.genome
        place = Path(self._place(genome.base_model or genome.models[0].partition("+")[0]))
        if not place.exists():
            return ()
        with suppress(EcotoneError):
            return Layout.of(opened_whole(place)).tensors
        return ()

    @property
    def _by_components(self) -> bool:
        """Whether the filters pick components."""
        filters = self.evolve.genome.filters
        return bool(filters) and are_components(filters or (), self._names or TYPICAL)

    def _components(self, groups: int) -> dict[str, Any]:
        """The granularity of filters that pick components."""
        filters = _few(self.evolve.genome.filters or ())
        self.notes.append(
            f"filters: each component has coefficients of its own, norms, embeddings and head, too, where in mergekit "
            f"each filter ({filters}) and the rest have."
        )
        return {"granularity": "components", **({"groups": groups} if groups > 1 else {})}

    def objectives(self) -> dict[str, Any]:
        """The recipe's objectives; with a limit the examples that are left judge the result."""
        evolve = self.evolve
        weights = {abs(task.weight) for task in evolve.tasks}
        names: list[str] = []
        searched = []
        for task in evolve.tasks:
            metric, _, kept = task.metric.partition(",")
            name = task.name if task.name not in names else f"{task.name}-{metric}"
            names.append(name)
            entry: dict[str, Any] = {"name": name, "type": "lm_eval", "task": task.name, "metric": metric}
            if kept not in ("", "none"):
                entry["filter"] = kept
            if evolve.num_fewshot is not None:
                entry["shots"] = evolve.num_fewshot
            if evolve.apply_chat_template:
                entry |= {"chat_template": True, "fewshot_as_multiturn": evolve.fewshot_as_multiturn}
            if task.weight < 0:
                entry["direction"] = "minimize"
            searched.append(entry if evolve.limit is None else {**entry, "limit": evolve.limit})
        if len(weights) > 1:
            given = ",".join(f"{name}={abs(task.weight):g}" for name, task in zip(names, evolve.tasks, strict=True))
            self.notes.append(
                "tasks.weight: the search maximises the mean of the scores, unweighted. Of its front, `ecotone export "
                f'--preference "{given}"` takes what suits the weights.'
            )
        if evolve.limit is None:
            return {"search": searched}
        self.notes.append(
            f"limit: {evolve.limit} examples drawn by seed, not the first; the others of each task are held out."
        )
        return {"search": searched, "held_out": [{**entry, "part": "rest"} for entry in searched]}

    def note_the_rest(self) -> None:
        """Note the fields that have no counterpart."""
        evolve, genome = self.evolve, self.evolve.genome
        if genome.filters and not (self._by_components and genome.layer_granularity != 1):
            self.notes.append(
                f"filters: not carried over ({_few(genome.filters)}); for coefficients by tensor say granularity: "
                "tensor and algorithm: sep_cma_es."
            )
        if genome.smooth:
            self.notes.append("smooth: not carried over; coefficients are not interpolated between layers.")
        if evolve.shuffle and evolve.limit is None:
            self.notes.append("shuffle: not carried over; all examples are scored.")
        if evolve.random_init:
            self.notes.append("random_init: not carried over; the search begins with equal weights.")
        self.notes.append(
            "The command line's options are not in that file: its budget is 100 evaluations (--max-fevals), its first "
            "step 1/6 (--sigma0), and tasks of a folder (--task-search-path) need `folder` in each objective."
        )

    def _expert(self, name: str) -> str:
        """A model's place, or its adapter's; the adapter's base is the recipe's."""
        model, plus, adapter = name.partition("+")
        if plus and model != self.evolve.genome.base_model:
            raise InputError(
                f"genome.models: expected an adapter of base_model ({self.evolve.genome.base_model}), found {name}.",
                "Merge it into its base first with the program that made it (PEFT: merge_and_unload(), then "
                "save_pretrained()).",
            )
        return self._place(adapter or model)

    def _place(self, name: str) -> str:
        """A local directory's absolute path, otherwise the hub's name as it is.

        mergekit takes paths from where it runs; the file's own folder is a second guess.
        """
        places = (at_home(name), self.folder / name)
        return next((str(place.resolve()) for place in places if place.exists()), name)

    def _layers(self) -> int | None:
        config = Path(self._place(self.evolve.genome.models[0].partition("+")[0])) / "config.json"
        if not config.is_file():
            return None
        record = foreign_or_none(config)
        text = record.get("text_config")
        found = record.get("num_hidden_layers", (text if isinstance(text, dict) else {}).get("num_hidden_layers"))
        return found if isinstance(found, int) else None
