"""Members of a run as checkpoints, and the proof that a checkpoint has the scores of the journal."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from pydantic import BaseModel, FiniteFloat, ValidationError

from ecotone.experiments import compose, gate, marks, preparation
from ecotone.experiments.accepted import in_words
from ecotone.experiments.changes import ForExport, check_record
from ecotone.experiments.mergekit import MergekitMerge, mergekit_config
from ecotone.experiments.printing import markdown
from ecotone.experiments.recipe import Recipe, algorithm_of
from ecotone.experiments.storage import on_this_machine
from ecotone.experiments.words import wrote
from ecotone.fitness.opening import open_sources
from ecotone.fitness.pools import Batch, SerialPool
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.merging.adapters import MergedAdapter, merged_adapter
from ecotone.merging.export import (
    RECORD,
    export_adapter,
    export_directory,
    export_file,
    export_plain_directory,
)
from ecotone.merging.models.checkpoint import Checkpoint, is_adapter
from ecotone.merging.models.matching import MERGED
from ecotone.merging.operators.base import Operator
from ecotone.merging.operators.declared import settings_of
from ecotone.merging.sources import Sources
from ecotone.populations import facts, files
from ecotone.populations.errors import CheckpointError, InputError, SearchError
from ecotone.populations.genome import Genome
from ecotone.populations.parsing import explained, file_bytes, json_object
from ecotone.populations.trial import Scores, Subset, Trial

if TYPE_CHECKING:
    from ecotone.experiments.runs import Run, Scored

Notify: TypeAlias = Callable[[str], None]

ANCESTORS = 200

_log = logging.getLogger("ecotone")


def export(
    run: Run,
    member: int | str,
    to: str | Path,
    *,
    accept_changes: bool = False,
    trust: bool = False,
    folders: Sequence[str] = (),
    notify: Notify = lambda text: None,
) -> Path:
    """Write a member's weights, exactly as they were scored.

    Args:
        run: The run.
        member: A trial's number, or ``best``.
        to: A path that ends in ``.safetensors`` for one plain file; otherwise a new directory with the weights, a
            model card (``README.md``) and the record ``ecotone.json``. From Hugging Face models it gets their
            configuration and tokenizer and loads with ``from_pretrained``.
        accept_changes: Export although models, code or data have changed since the run began; it is recorded.
        trust: Trust what the run names, although it bears no mark of this user's (``ecotone.experiments.trust``).
        folders: Folders to find the recipe's own Python functions in, besides those that the run began with.
        notify: Called with a sentence for each thing that is trusted.

    Returns:
        ``to`` as a path.

    Raises:
        UntrustedError: The run was made elsewhere, and names functions or paths that are not trusted.
        EcotoneError: There is no such member, the models are gone or have changed, or the target is in the way.
    """
    target = on_this_machine(to, "to")
    trial = run.trial(member)
    scored = run.scored(trial.number)
    if target.suffix in (".yaml", ".yml"):
        raise InputError(f"{target}: expected a directory or a .safetensors file.", "For a .yaml: --format mergekit.")
    recipe, paths = _recipe(run, trust, folders, notify)
    sources, dtype, unchanged = _opened(run, recipe, paths, accept_changes)
    record = {
        **_record(run, recipe, trial, scored),
        "operator": operator_record(sources.tuned(trial.genome).operator),
        "models": models_record(sources),
        **unchanged.record,
    }
    card = model_card(record, scored, sources)
    with unchanged.watched(target):
        if target.suffix == ".safetensors":
            return export_file(sources, trial.genome, target, record, dtype)
        if sources.configured.is_hugging_face:
            return export_directory(sources, trial.genome, target, card, record, dtype)
        target.parent.mkdir(parents=True, exist_ok=True)
        return export_plain_directory(sources, trial.genome, target, card, record, dtype)


@dataclass(frozen=True)
class LoraExport:
    """A member as an adapter.

    Args:
        adapter: The adapter, with its errors by module and notes on who takes it.
        scores: Its own scores by subset of the data, where it was cut and is not the member itself; else None.
    """

    adapter: MergedAdapter
    scores: Mapping[str, Mapping[str, float]] | None

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {**self.adapter.record(), **({} if self.scores is None else {"scores": self.scores})}


def export_lora(
    run: Run,
    member: int | str,
    to: str | Path,
    rank: int | None = None,
    *,
    accept_changes: bool = False,
    trust: bool = False,
    folders: Sequence[str] = (),
    notify: Notify = lambda text: None,
) -> LoraExport:
    """Write a member that is a merge of adapters as an adapter of their base.

    Args:
        run: The run.
        member: A trial's number, or ``best``.
        to: A new directory, for what PEFT loads, the model card and the record ``ecotone.json``.
        rank: The highest rank of a module's update; None for that of the recipe, or else as many as the merge has.
        accept_changes: As for ``export``.
        trust: As for ``export``.
        folders: As for ``export``.
        notify: As for ``export``.

    Returns:
        The adapter. One that was cut here, and not by the recipe, is scored again; its record has its own scores.

    Raises:
        EcotoneError: There is no such member, the models are gone, the target is in the way, or the merge is no
            adapter.
    """
    target = on_this_machine(to, "to")
    if target.suffix in (".safetensors", ".yaml", ".yml"):
        raise InputError(f"{target}: expected a directory, as adapters are stored.")
    trial = run.trial(member)
    scored = run.scored(trial.number)
    recipe, paths = _recipe(run, trust, folders, notify)
    sources, _, unchanged = _opened(run, recipe, paths, accept_changes)
    merged = merged_adapter(sources, trial.genome, rank or sources.rank)
    record = {
        **_record(run, recipe, trial, scored),
        "operator": operator_record(sources.tuned(trial.genome).operator),
        "models": models_record(sources),
        "adapter": merged.record(),
        **unchanged.record,
    }
    scores: dict[Subset, Mapping[str, float] | None] = {}

    def measured(draft: Path) -> tuple[str, Mapping[str, Any]]:
        """The card and the record with the adapter's own scores."""
        scores.update(_scored_alone(draft, record))
        told = {**record, "scores": scores, "adapter": {**record["adapter"], "member": record["scores"]}}
        own = replace(scored, scores=scores["search"], held_out=scores["held_out"])
        return model_card(told, own, sources), told

    same = merged.exact or rank in (None, sources.rank)
    card = model_card(record, scored, sources)
    with unchanged.watched(target):
        export_adapter(merged, target, sources.tokenizer, card, record, None if same else measured)
    return LoraExport(merged, None if same else {subset: found for subset, found in scores.items() if found})


def export_mergekit(
    run: Run,
    member: int | str,
    to: str | Path,
    snap: bool = False,
    *,
    accept_changes: bool = False,
    trust: bool = False,
    folders: Sequence[str] = (),
    notify: Notify = lambda text: None,
) -> MergekitMerge:
    """Write a member as the file from which mergekit makes the weights that were scored.

    Args:
        run: The run.
        member: A trial's number, or ``best``.
        to: A new file that ends in ``.yaml`` or ``.yml``.
        snap: Move split points inside tensors to tensor borders. The result says how much that changed.
        accept_changes: As for ``export``.
        trust: As for ``export``.
        folders: As for ``export``.
        notify: As for ``export``.

    Returns:
        The file's content and its genome. After a snap, ``rescored`` measures that genome.

    Raises:
        EcotoneError: There is no such member, the models are gone, the target is in the way, or mergekit cannot express
            the merge.
    """
    target = on_this_machine(to, "to")
    if target.suffix not in (".yaml", ".yml"):
        raise InputError(f"{target}: expected a path that ends in .yaml, as mergekit reads.")
    if target.exists():
        raise InputError(f"{target}: the file exists.", "Choose another name, or remove it.")
    trial = run.trial(member)
    run.scored(trial.number)
    sources, dtype, unchanged = _opened(run, *_recipe(run, trust, folders, notify), accept_changes)
    merge = mergekit_config(trial.genome, sources, dtype, snap)
    made_by = merge.command(Path(target.name))
    title = f"{run.name}, member {trial.number}, found by Ecotone. Make it: {made_by}"
    with unchanged.watched(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            files.written_whole(target, merge.text(title), exclusive=True)
        except FileExistsError as error:
            raise InputError(f"{target}: the file exists.", "Choose another name, or remove it.") from error
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error.strerror or error}).") from error
    return merge


def rescored(
    run: Run, genome: Genome, *, trust: bool = False, folders: Sequence[str] = ()
) -> dict[str, dict[str, float]]:
    """Score another merge of a run's models now; returns its scores by subset of the data.

    Args:
        run: The run.
        genome: The merge.
        trust: As for ``export``.
        folders: As for ``export``.

    Raises:
        UntrustedError: As for ``export``.
        SearchError: It cannot be scored.
    """
    recipe, paths = _recipe(run, trust, folders)
    spec = replace(compose.worker_spec(recipe, preparation.prepare(recipe), paths), dense=False, calibration=())
    subsets: tuple[Subset, ...] = ("search", "held_out") if recipe.objectives.held_out else ("search",)
    with SerialPool(spec) as pool:
        pool.start()
        return {subset: dict(_measured(pool, genome, subset)) for subset in subsets}


def _opened(run: Run, recipe: Recipe, paths: Sequence[str], accept: bool) -> tuple[Sources, str | None, ForExport]:
    """A run's models, the type that its merges are scored in (None where each tensor keeps its own), and their files.

    Raises:
        InputError: Models, code or data have changed since the run began, and that is not accepted.
    """
    spec = compose.worker_spec(recipe, preparation.prepare(recipe), paths)
    sources = open_sources(spec, basis_of(spec))
    own = None if spec.architecture is None else str(sources.layout.dtype).split(".")[-1]
    return sources, recipe.merge.dtype or own, ForExport(run, recipe, spec, sources, accept)


def operator_record(operator: Operator) -> dict[str, Any]:
    """An operator's name and all its settings as recipes give them, defaults included."""
    settings = settings_of(type(operator)).values()
    values = {one.name: one.adapter.dump_python(getattr(operator, one.name), mode="json") for one in settings}
    return {"name": operator.name, **values}


def models_record(sources: Sources) -> dict[str, Any]:
    """The models' records: the place of each, and the changes made to it before the merge."""
    base = None if sources.base is None else sources.base.record()
    return {"base": base, "experts": [expert.record() for expert in sources.experts]}


def _recipe(
    run: Run, trust: bool, folders: Sequence[str], notify: Notify = lambda text: None
) -> tuple[Recipe, tuple[str, ...]]:
    """The run's recipe, and the folders of its own Python modules, which can be imported now."""
    with run.journal() as journal:
        standing = gate.exportable(journal, run.where, trust, notify)
        recorded = journal.fact(facts.SYS_PATH)
        paths = gate.python_paths(standing, folders, recorded or ())
        return _read_back(journal.fact(facts.RECIPE) or {}, wrote(journal)), paths


def _read_back(record: Mapping[str, Any], written_by: str) -> Recipe:
    recipe = Recipe.read_back(record, written_by)
    for text in recipe.tracking.warnings():
        _log.warning(text)
    return recipe


def _record(run: Run, recipe: Recipe, trial: Trial, scored: Scored) -> dict[str, Any]:
    with run.journal() as journal:
        parents = {row.number: row.parents for row in journal.rows()}
    found = recipe.record()
    mark = marks.mark_of("export", found)
    return {
        "format": 1,
        "run": run.name,
        "member": trial.number,
        "digest": trial.genome.digest,
        "genome": json.loads(trial.genome.to_json(residual=False)),
        "dense": trial.genome.residual is not None,
        "scores": {"search": scored.scores, "held_out": scored.held_out},
        "lineage": _lineage(trial.number, parents),
        "signature": recipe.signature,
        "recipe": found,
        **({} if mark is None else {"mark": mark}),
        "versions": compose.versions(),
    }


def _lineage(number: int, parents: Mapping[int, Sequence[int]]) -> dict[str, list[int]]:
    """The nearest ancestors of a trial, each with its parents, nearest generation first."""
    lineage: dict[str, list[int]] = {}
    generation = [number]
    while generation and len(lineage) < ANCESTORS:
        for one in generation:
            lineage[str(one)] = list(parents.get(one, ()))
        found = {p for one in generation for p in parents.get(one, ()) if str(p) not in lineage}
        generation = sorted(found)[: ANCESTORS - len(lineage)]
    return lineage


def model_card(record: Mapping[str, Any], scored: Scored, sources: Sources) -> str:
    """The card of an exported member: its sources, its scores, and how to check it."""
    genome = Genome.from_json(json.dumps(record["genome"]))
    widths = (genome.boundaries[1:] - genome.boundaries[:-1]) / genome.size
    shares = widths @ genome.coefficients
    columns = sources.operator.columns(sources.names)
    made = [f"| {markdown(name)} | {share:.4f} |" for name, share in zip(columns, shares, strict=True)]
    base = [] if sources.base is None else [f"Base model: {markdown(sources.base.name)}.", ""]
    library = ["library_name: transformers"] if sources.configured.is_hugging_face else []
    adapter = record.get("adapter")
    if adapter is not None:
        library, base = ["library_name: peft"], [*base, *adapter["notes"], ""]
    dense = ["Its parameters evolved from scratch; coefficients do not describe it.", ""]
    return "\n".join(
        [
            "---",
            *library,
            "tags: [merge, ecotone]",
            "---",
            "",
            f"# {markdown(record['run'])}, member {record['member']}",
            "",
            f"A merge found by Ecotone: search `{algorithm_of(record['recipe'])}`, operator "
            f"{_in_words(record['operator'])}, {genome.segments} segment(s).",
            "",
            *base,
            *(dense if record["dense"] else ["| source | mean coefficient |", "| --- | --- |", *made, ""]),
            *_score_lines(scored),
            *_changes(record),
            "`ecotone.json` holds the genome, the lineage and the recipe. Check it with `ecotone verify DIR`: it lists "
            "the functions and files that the record names, and runs and reads them with `--trust`.",
            "",
        ]
    )


def _changes(record: Mapping[str, Any]) -> list[str]:
    accepted = record.get("accepted_changes") or ()
    lines = ["Scores from before and after these changes are compared with each other:", ""] if accepted else []
    return [*lines, *(f"- {in_words(one)}" for one in accepted), *([""] if accepted else [])]


def _in_words(operator: Mapping[str, Any]) -> str:
    given = {key: value for key, value in operator.items() if key != "name" and value is not None}
    settings = ", ".join(f"{key} {_value_in_words(value)}" for key, value in given.items())
    return f"`{operator['name']}`" + (f" ({settings})" if settings else "")


def _value_in_words(value: Any) -> str:
    """A setting of an operator, or of a method of it."""
    if isinstance(value, list):
        return " and ".join(map(_value_in_words, value))
    if isinstance(value, Mapping) and "operator" in value:
        return _in_words({"name": value["operator"], **{k: v for k, v in value.items() if k != "operator"}})
    if isinstance(value, Mapping):  # files, by name
        return ", ".join(f"{key}: {Path(str(one)).name}" for key, one in value.items()) or "none"
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _score_lines(scored: Scored) -> list[str]:
    lines = ["| objective | search data | held-out data |", "| --- | --- | --- |"]
    held_out = scored.held_out or {}
    for name in dict.fromkeys([*(scored.scores or {}), *held_out]):
        cells = [_cell((scored.scores or {}).get(name)), _cell(held_out.get(name))]
        lines.append(f"| {markdown(name)} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


# -- verification ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One score of an export: as recorded, and as measured again."""

    subset: Subset
    objective: str
    recorded: float
    found: float

    @property
    def difference(self) -> float:
        """Absolute difference."""
        return abs(self.recorded - self.found)


def verify(
    path: str | Path,
    *,
    trust: bool = False,
    folders: Sequence[str] = (),
    notify: Notify = lambda text: None,
) -> list[Comparison]:
    """Load an exported checkpoint and score it again on every objective that was recorded.

    Args:
        path: A directory or a ``.safetensors`` file that ``export`` wrote.
        trust: Trust what its record names, although it bears no mark of this user's (``ecotone.experiments.trust``).
        folders: Folders to find the recipe's own Python functions in, besides the working directory.
        notify: Called with a sentence for each thing that is trusted.

    Raises:
        UntrustedError: The export was made elsewhere, and names functions or paths that are not trusted.
        CheckpointError: It was not written by Ecotone, or its weights cannot be read.
        SearchError: It cannot be scored.
    """
    target = on_this_machine(path, "path")
    record = read_record(target)
    paths = gate.python_paths(gate.verifiable(target, record, trust, notify), folders)
    return [
        Comparison(subset, name, value, _found(found, name))
        for subset, found in _scored_alone(target, record, paths).items()
        if found
        for name, value in record["scores"][subset].items()
    ]


def _found(scores: Mapping[str, float], name: str) -> float:
    """The score of that name.

    Raises:
        SearchError: The recipe has no such objective.
    """
    if name not in scores:
        raise SearchError(f"the record of the export: expected scores of {', '.join(scores)}, found one of {name}.")
    return scores[name]


def _scored_alone(
    target: Path, record: Mapping[str, Any], paths: Sequence[str] = ()
) -> dict[Subset, Mapping[str, float] | None]:
    """The scores of an export, on the subsets of the data for which its record has some.

    Its functions are found in the folders ``paths``, or where this process finds modules already.
    """
    recipe = _read_back(record["recipe"], record.get("versions", {}).get("ecotone", ""))
    spec = compose.worker_spec(recipe, preparation.prepare(recipe), paths)
    check_record(record, recipe, spec)
    alone: dict[str, Any] = {
        "experts": (str(target),),
        "base": spec.base if is_adapter(target) else None,
        "operator": "linear",
        "settings": {},
        "names": ("export",),
        "vocabulary": "same",
        "treatment": MERGED,
        "config": "same",
        "rank": None,
    }
    spec = replace(spec, **alone, dense=False, calibration=())
    with SerialPool(spec) as pool:
        space = pool.start()
        genome = Genome.uniform(space.size, [1.0])
        subsets: tuple[Subset, ...] = ("search", "held_out")
        return {subset: _measured(pool, genome, subset) if record["scores"][subset] else None for subset in subsets}


def _measured(pool: SerialPool, genome: Genome, subset: Subset) -> Mapping[str, float]:
    pool.submit(Batch(0, (Trial(0, genome, wants=Scores(subset)),)))
    ((_, (evaluation,)),) = pool.completed()
    if evaluation.failure is not None:
        raise SearchError(f"the export cannot be scored: {evaluation.failure.message}\n{evaluation.failure.details}")
    return evaluation.scores


def read_record(target: Path) -> dict[str, Any]:
    """The record that ``export`` wrote beside a checkpoint.

    Raises:
        CheckpointError: There is none.
    """
    text: str | bytes | None = None
    remedy = "Give the directory or .safetensors file that `ecotone export` wrote."
    with explained(f"{target}: the record of the export", remedy, CheckpointError):
        if target.is_dir() and (target / RECORD).is_file():
            text = file_bytes(target / RECORD)
        elif target.is_file():
            text = Checkpoint.open(target).metadata.get("ecotone")
        record = json_object(text, finite=False) if text else {}
    if "recipe" not in record:
        raise CheckpointError(
            f"{target}: expected a checkpoint written by `ecotone export`, found no record of one.", remedy
        )
    try:
        _Record.model_validate(record)
    except ValidationError as error:
        wrong = error.errors(include_input=False)[0]
        field = ".".join(map(str, wrong["loc"]))
        raise CheckpointError(
            f"{target}: the record of the export: {field}: {wrong['msg'][:1].lower()}{wrong['msg'][1:]}.",
            "The file was changed by hand, or is damaged: export the member again.",
        ) from error
    return record


class _Entry(BaseModel):
    """The hash of a file in the record of an export."""

    xxh3_128: str


class _BothSubsets(BaseModel):
    """The scores in the record of an export."""

    search: dict[str, FiniteFloat]
    held_out: dict[str, FiniteFloat] | None


class _Record(BaseModel):
    """What `verify` reads of the record of an export, as it must be; all else is left as it is."""

    recipe: dict[str, Any]
    scores: _BothSubsets
    versions: dict[str, str] = {}
    fingerprints: dict[str, dict[str, _Entry]] = {}
