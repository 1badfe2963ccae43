"""``ecotone validate``: checks of a recipe before any budget is spent."""

from __future__ import annotations

import importlib.util
import inspect
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

import torch

from ecotone.experiments import compose, examples
from ecotone.experiments.fingerprints import fingerprints
from ecotone.experiments.recipe import Recipe, check_recipe
from ecotone.extras import how_to_install
from ecotone.fitness.callables import resolve
from ecotone.fitness.former_names import present_name
from ecotone.fitness.kinds import NamedCall
from ecotone.fitness.preparing.likeness import Likeness
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.worker import Worker, needs_of
from ecotone.merging import companions
from ecotone.merging.basis import Bases
from ecotone.merging.inner_products import region_borders
from ecotone.merging.models import architectures, configs, depth, lora_bases, tokenizers, vocabulary
from ecotone.merging.models.checkpoint import located, unread
from ecotone.merging.models.layout import Layout, natural
from ecotone.merging.models.lora import adapters_in
from ecotone.merging.models.matching import Renamed
from ecotone.merging.models.model import Model
from ecotone.merging.models.names import names_of
from ecotone.merging.operators.stack import preparing
from ecotone.merging.operators.whole import FromData, WholeMatrices
from ecotone.merging.placement import Bytes, Free, Needs, Placement, readable, settled
from ecotone.merging.sources import Sources
from ecotone.merging.values import refuse_nan, with_nan
from ecotone.populations.contents import SHOWN, digest_of
from ecotone.populations.errors import InputError
from ecotone.settings import Call, split_call

READ_BYTES = 8 * 10**9
"""The most bytes of weights that ``validate`` reads."""


@dataclass(frozen=True)
class Finding:
    """One thing that was checked, and the result."""

    subject: str
    text: str


def validate(recipe: Recipe, *, headers: bool = False) -> list[Finding]:
    """Check a recipe against its functions and its checkpoints' headers, and score an expert on an example a task.

    Args:
        recipe: The recipe to check.
        headers: Read headers alone, and score nothing.

    Raises:
        EcotoneError: The first thing that does not fit.
    """
    check_recipe(recipe)
    composition = compose.Composition(recipe)
    found = list(findings(composition))
    if not headers and composition.prepared and _device(recipe)[1]:
        found += _values(composition.sources)
        found += _contents(composition)
        found += tried_out(composition)
    return found


def _values(sources: Sources) -> Iterator[Finding]:
    """Look for NaN among the weights, and tell how alike the task vectors are, if reading them takes seconds."""
    models = sources.checkpoints
    size = sum(model.nbytes for model in models)
    if size > READ_BYTES:
        yield Finding("values", f"{readable(size)} are not read here: `run` reads them once, and refuses NaN")
        return
    refuse_nan(with_nan(sources.layout, models))
    sources.check_kept()
    yield Finding("values", "no NaN among the weights")
    if sources.base is not None:
        yield from _likeness(sources, sources.base)


def _likeness(sources: Sources, base: Model) -> Iterator[Finding]:
    """How long the task vectors are and how alike."""
    operator, likeness = sources.operator, Likeness(sources.names)
    for name in sources.layout.tensors:
        likeness.add(base.tensor(name).float(), [expert.tensor(name).float() for expert in sources.experts])
    yield Finding("task vectors", likeness.summary)
    for warning in likeness.warnings(not isinstance(operator, WholeMatrices) or operator.unites):
        yield Finding("task vectors", f"Warning: {warning}")


def _contents(composition: compose.Composition) -> Iterator[Finding]:
    """The hashes of the models' files, and of the code and data that scores depend on."""
    spec, began = composition.spec, time.perf_counter()
    files = composition.sources.files(None if spec.tokenizer is None else located(spec.tokenizer))
    for where, entries in files.contents.items():
        size = sum(one["bytes"] for one in entries.values())
        count = f"{len(entries)} file{'s' if len(entries) > 1 else ''}"
        yield Finding(f"contents of {where}", f"{count}, {readable(size)}, xxh3_128 {digest_of(entries)}")
    (size, cached), seconds = files.cached, time.perf_counter() - began
    yield Finding(
        "contents", f"{readable(size)} hashed in {seconds:.2g} s; of these {readable(cached)} were remembered"
    )
    for where, entries in fingerprints(composition.recipe, spec).items():
        yield Finding(f"files of {where}", ", ".join(f"{n} {one['xxh3_128'][:SHOWN]}" for n, one in entries.items()))


def tried_out(composition: compose.Composition) -> Iterator[Finding]:
    """Score the first expert on one example of each objective, or on all examples where one cannot be scored alone.

    Raises:
        EcotoneError: A worker cannot be made, or an objective cannot be computed.
    """
    threads = torch.get_num_threads()
    try:
        worker = Worker(composition.spec)
        same = worker.same_scores(worker.try_out())
        worker.check_varied(same)
    finally:
        torch.set_num_threads(threads)
    names = composition.sources.names
    yield Finding("tried out", f"{names[0]} was scored on an example of each objective")
    for name, value in same.items():
        yield Finding(
            f"objectives.search.{name}",
            f"Warning: {value:g} for {names[0]} and for {names[-1]}: does it depend on the model?",
        )


def findings(composition: compose.Composition) -> Iterator[Finding]:
    """Check a recipe, step by step. ``validate`` shows the results; ``run`` does the same before it scores anything.

    Raises:
        EcotoneError: The first thing that does not fit.
    """
    recipe = composition.recipe
    yield Finding("recipe", f"{recipe.name}, signature {recipe.signature}")
    _packages(recipe)
    yield from _functions(recipe)
    yield from _workers(recipe)
    yield from _trackers(recipe)
    assert composition.operator
    yield Finding("scoring", f"{recipe.scoring.backend}: {recipe.scoring.describe()}")
    if not composition.prepared:
        yield Finding("models", "not written yet: the preparation step makes them when the recipe is run")
        yield from _search(composition)
        return
    spec, sources = composition.spec, composition.sources
    yield from _models(sources)
    yield from _configs(spec, sources)
    yield from _adapters(sources)
    if spec.architecture == "auto":
        yield from _architecture(sources)
    yield from _language(spec, sources)
    for objective in (*spec.search, *spec.held_out):
        yield from starmap(Finding, objective.examine())
    yield from _search(composition)
    yield from _memory(recipe, spec, sources)
    yield from _needs(recipe, sources)


def _packages(recipe: Recipe) -> None:
    """Refuse a recipe that needs a package which comes with an extra and is not installed.

    Raises:
        InputError: One is not installed; the message names the command that installs it.
    """
    if recipe.runtime.pool == "ray":
        _check_installed("runtime.pool", {"ray": ("ray",)}, ", or --set runtime.pool=serial")
    for part in recipe.searches:
        _check_installed("search.algorithm", part.imports())
    if recipe.models.architecture == "auto":
        _check_installed("models.architecture", {"hf": ("transformers",)})
    calls = [] if recipe.prepare is None else [("prepare", recipe.prepare)]
    for group, objectives in (("search", recipe.objectives.search), ("held_out", recipe.objectives.held_out)):
        for objective in objectives:
            field = f"objectives.{group}.{objective.name}"
            _check_installed(field, objective.imports())
            calls += [(field, one.call) for one in objective.calls()]
    calls += [(f"calibration.{task.name}", one.call) for task in recipe.calibration for one in task.calls()]
    for field, call in calls:
        module = split_call(call.call)[0]
        if found := examples.IMPORTS.get(present_name(module) or module):
            _check_installed(field, {found[0]: found[1:]})


def _check_installed(field: str, imports: Mapping[str, Sequence[str]], other: str = "") -> None:
    for extra, packages in imports.items():
        for package in packages:
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"{field}: expected the package {package}, found it not installed.",
                    f"`{how_to_install(extra)}`{other}.",
                )


def _workers(recipe: Recipe) -> Iterator[Finding]:
    if text := compose.unused_workers(recipe):
        yield Finding("workers", text)


def _trackers(recipe: Recipe) -> Iterator[Finding]:
    """The places that the run is mirrored to, and what each tracker lacks."""
    for name, settings in recipe.tracking.trackers.items():
        missing = () if settings.installed() else (f"not installed: `{settings.install()}`",)
        clauses = (settings.recorded().describe(), *missing, *settings.lacks)
        yield Finding(f"tracking.{name}", "; ".join(clauses))


def _functions(recipe: Recipe) -> Iterator[Finding]:
    if recipe.prepare is not None:
        _check_takes(resolve(recipe.prepare.call, "prepare.call"), recipe.prepare, "prepare", given=1)
        yield Finding("prepare", recipe.prepare.call)
    if isinstance(recipe.models.architecture, Call):
        function = resolve(recipe.models.architecture.call, "models.architecture.call")
        _check_takes(function, recipe.models.architecture, "models.architecture")
        yield Finding("architecture", recipe.models.architecture.call)
    for group, objectives in (("search", recipe.objectives.search), ("held_out", recipe.objectives.held_out)):
        for objective in objectives:
            field = f"objectives.{group}.{objective.name}"
            _check_calls(objective.calls(), field)
            yield Finding(field, objective.describe())
    for task in recipe.calibration:
        _check_calls(task.calls(), f"calibration.{task.name}")
        yield Finding(f"calibration.{task.name}", task.describe())
    if not recipe.objectives.held_out:
        yield Finding("objectives.held_out", "none: results will be known on the data they were searched on only")


def _check_calls(calls: Sequence[NamedCall], field: str) -> None:
    """Refuse a function that cannot be imported, or does not take the arguments that the recipe has for it."""
    for one in calls:
        place = f"{field}.{one.field}" if one.field else field
        _check_takes(resolve(one.call.call, place), one.call, place, one.given)


def _check_takes(function: Callable[..., Any], call: Call, field: str, given: int = 0) -> None:
    """Refuse a function that cannot be called with the recipe's arguments after ``given`` of ours, one or none."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin, which tells nothing
        return
    try:
        signature.bind(*([None] * given), **call.arguments)
    except TypeError as error:
        ours = " after the one it is given" if given else ""
        raise InputError(
            f"{field}: arguments: expected those of {call.call}{signature}{ours}, found "
            f"{', '.join(call.arguments) or 'none'} ({error})."
        ) from error


def _models(sources: Sources) -> Iterator[Finding]:
    layout = sources.layout
    tensors, blocks = len(layout.tensors), len(layout.blocks)
    yield Finding("models", f"{', '.join(sources.names)}: same names, shapes and types")
    yield Finding("layout", f"{layout.size:,} parameters, {tensors} tensors, {blocks} blocks, {_kinds(layout)}")
    if frozen := sources.apart.frozen:
        yield Finding("frozen", f"{_counted(frozen)} not merged: every merge has those of {sources.origin.name}")
    for model in sources.models:
        if isinstance(model, Renamed):
            yield Finding("names", f"{model.name}: read as {model.change}")
    copied = [name for name, info in layout.buffers.items() if info.dtype.is_complex]
    if copied:
        yield Finding("complex tensors", f"not merged but copied from {sources.origin.name}: {', '.join(copied)}")
    for path, name in {model.path: model.name for model in sources.models}.items():
        if text := unread(path):
            yield Finding(f"files of {name}", f"Warning: {text}")
    if layout.aliases:
        yield Finding("tied weights", ", ".join(f"{alias} = {kept}" for alias, kept in layout.aliases.items()))


def _adapters(sources: Sources) -> Iterator[Finding]:
    """The base of each adapter. Refuses one that was trained on other weights."""
    for adapter in (one for expert in sources.experts for one in adapters_in(expert)):
        yield Finding(f"adapter {adapter.name}", lora_bases.check(adapter).text)
    if sources.rank is not None:
        yield Finding("merge.rank", f"updates are cut to rank {sources.rank}, module by module, before they are scored")


def _architecture(sources: Sources) -> Iterator[Finding]:
    """Fit the checkpoints into the module that their configuration names, without its weights."""
    module = architectures.outline(sources.configured)
    depths = depth.differences(module, (*sources.layout.parameters, *sources.layout.buffers))
    try:
        names = names_of(module, sources.layout)
    except InputError as error:
        if not depths:
            raise
        raise InputError(str(depths[0]), f"Correct it in {sources.origin.path}. ({error.message})") from error
    converted = sum(not place.whole for place in names.places.values()) + len(names.scattered)
    text = f"{type(module).__name__}: a place for {len(names.places) + len(names.scattered):,} tensors"
    yield Finding(
        "architecture", text + (f", {converted:,} of them converted as transformers does" if converted else "")
    )
    yield from _not_loaded(sources, names.unused)
    for one in depths:
        if one.stored > one.made:
            yield Finding("layers", f"Warning: {one}")


def _not_loaded(sources: Sources, unused: Sequence[str]) -> Iterator[Finding]:
    """The tensors that the architecture does not take, and what becomes of them."""
    layout, apart = sources.layout, sources.apart
    merged = [name for name in unused if name in layout.parameters]
    taken = [name for name in unused if name in layout.buffers]
    for names, become in (
        (merged, "merged and exported like the others"),
        (taken, "not merged, but exported as the base, or else the first expert, has them"),
        (sorted(apart.dropped, key=natural), "left out of exports (models.unused: drop)"),
    ):
        if names:
            yield Finding("not loaded", f"{_counted(names)} that the architecture does not load: {become}")


def _counted(names: Sequence[str]) -> str:
    """The number of tensors, and the first names: ``2 tensors (a, b)``."""
    few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names):,} tensor{'s' if len(names) > 1 else ''} ({few})"


def _configs(spec: WorkerSpec, sources: Sources) -> Iterator[Finding]:
    """The config that merges have, the differences of the models' configs, and files that come from an expert.

    Raises:
        InputError: Experts are to be computed with configs of their own, by a module that is not made of configs.
    """
    if not sources.configured.is_hugging_face:
        return
    if sources.own_configs and spec.architecture != "auto":
        raise configs.no_own(next(iter(sources.own_configs.values())))
    text = configs.described(configs.compare(sources.models), sources.config, sources.configured.name)
    yield Finding("configs", text)
    if files := companions.told(sources):
        yield Finding("files of exports", files)


def _language(spec: WorkerSpec, sources: Sources) -> Iterator[Finding]:
    """For language models: whether tokenizers fit the embeddings and each other.

    Where no objective reads texts by a tokenizer, only clashes of the models' own tokenizers are told.

    Raises:
        CheckpointError: They do not: texts would be read wrongly.
    """
    objectives = (*spec.search, *spec.held_out)
    models = sources.models
    if spec.tokenizer is None or not any(one.needs_tokenizer for one in objectives):
        places = [(model.name, model.tokenizer) for model in models if model.is_hugging_face]
        if told := tokenizers.clashes(places, vocabulary.input_rows(sources.configured)):
            yield Finding("tokenizers", f"{' '.join(told)} Rows of the embeddings are mixed by number.")
        return
    own = [model for model in models if tokenizers.has_tokenizer(model.path) or model.files == model.path]
    places = [(model.name, model.path) for model in own]  # an adapter without one has its base's
    folder = located(spec.tokenizer)
    scoring = next(((name, place) for name, place in places if place == folder), ("models.tokenizer", folder))
    rows = vocabulary.input_rows(sources.configured)
    for sentence in tokenizers.check(scoring, places, rows):
        yield Finding("tokens", sentence)
    first = [scoring, *(one for one in places if one[1] != folder)]
    differences = tokenizers.compare(first)
    yield Finding("tokenizers", " ".join(differences) or "no differences")


def _search(composition: compose.Composition) -> Iterator[Finding]:
    """The size of the problem, as far as it is known. Refuses problems that the algorithm cannot search."""
    found, chain = composition.outlined, composition.recipe.chain
    if chain is not None:
        for index, one in enumerate(found):
            yield Finding(f"search[{index}]", f"{one.text}; {chain.placed(index)}")
            yield from _start(one, f"search[{index}].start")
        return
    if found[0].text != found[0].settings.algorithm:
        yield Finding("search", found[0].text)
    yield from _start(found[0], "search.start")


def _start(found: compose.Outlined, field: str) -> Iterator[Finding]:
    """The merges that a search begins with because they are solved from inner products."""
    if found.begins:
        yield Finding(field, f"begins with {'; '.join(found.begins)}")


def _memory(recipe: Recipe, spec: WorkerSpec, sources: Sources) -> Iterator[Finding]:
    """The place where a worker keeps the models, and the memory that it takes.

    Raises:
        InputError: This machine's workers have no memory for the model, or for the sources where they are to be.
    """
    device, here = _device(recipe)
    needs = needs_of(spec, sources, device, settings=bool(recipe.merge.ranges))
    why = "auto" if spec.sources == "auto" else "runtime.sources"
    if not here:
        known = f"the model takes {_amount(needs.model)}, buffers {_amount(needs.buffers)}; sources "
        known += ", ".join(f"{place} {_amount(taken)}" for place, taken in needs.sources.items() if place != "mapped")
        yield Finding("sources", f"{spec.sources}: settled where the workers are; {_held(sources)} in files")
        yield Finding("memory", f"a worker: {known} or mapped; and activations, data and Python")
        return
    free = Free.here(device).divided(spec.device_share, spec.neighbours)
    placement = settled(spec.sources, needs, free, free, device)
    text = f"{placement} ({why}): {_held(sources)} in files, {_KEPT[placement]}"
    yield Finding("sources", text)
    yield Finding("memory", f"a worker (of {spec.neighbours}): {_parts(needs, placement, free)}")


_KEPT: dict[Placement, str] = {
    "device": "kept on the GPU",
    "host": "kept in main memory",
    "mapped": "mapped: read through the page cache for each candidate",
}


def _device(recipe: Recipe) -> tuple[torch.device, bool]:
    """The device on which workers merge, and whether it is on this machine."""
    runtime, wish = recipe.runtime, recipe.scoring.device
    ray = runtime.pool == "ray"
    no_gpu = wish == "cpu" or (wish == "auto" and ray and runtime.gpus_per_worker == 0)
    cuda = not no_gpu and (torch.cuda.is_available() or wish == "cuda" or (ray and runtime.address is not None))
    here = not (ray and runtime.address is not None) and (torch.cuda.is_available() or not cuda)
    return torch.device("cuda" if cuda else "cpu"), here


def _held(sources: Sources) -> str:
    return readable(sum(checkpoint.nbytes for checkpoint in sources.checkpoints))


def _amount(taken: Bytes) -> str:
    """Bytes on a GPU and in main memory, as far as there are any."""
    given = [(taken.device, "on the GPU"), (taken.host, "in main memory")]
    return " and ".join(f"{readable(count)} {place}" for count, place in given if count) or "none"


def _parts(needs: Needs, placement: Placement, free: Free) -> str:
    """All that a worker takes, where there are bounds to it."""
    total, parts = needs.total(placement), (needs.model, needs.sources[placement], needs.buffers)
    texts = []
    for place, all_bytes, part_bytes, room_left in (
        ("GPU", total.device, [part.device for part in parts], free.device),
        ("main memory", total.host, [part.host for part in parts], free.host),
    ):
        if all_bytes:
            model, kept, buffers = map(readable, part_bytes)
            room = "" if room_left is None else f" of {readable(room_left)} free"
            texts.append(f"{place} {readable(all_bytes)}{room} (model {model}, sources {kept}, buffers {buffers})")
    return "; ".join([*texts, "and activations, data and Python"])


def _needs(recipe: Recipe, sources: Sources) -> Iterator[Finding]:
    layout, count = sources.layout, len(sources.experts)
    resident = sum(info.nbytes for info in sources.origin.tensors.values())
    regions = len(region_borders(layout, count)) - 1
    yield Finding("split points", f"{regions:,} regions of about {max(1, layout.size // regions):,} parameters")
    breeders = [part for part in recipe.searches if part.needs().vectors]
    if breeders:
        dense = 4 * layout.size * (max(part.archive for part in breeders) + recipe.scoring.window)
        yield Finding("dense archive", f"{readable(dense)} in the manager: mutation breeds whole vectors")
    operator = sources.operator
    for label, one in preparing(operator).items():
        columns, folder = len(one.columns(sources.names)), Bases().folder
        wanted = readable(columns * sum(info.nbytes for info in layout.parameters.values()))
        data = " from the calibration tasks of the experts," if isinstance(one, FromData) else ""
        yield Finding(
            "prepared vectors", f"{columns} of {label},{data} made once before the search; {wanted} in {folder}"
        )
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("export", f"{readable(resident)} of disk; {readable(free)} are free here")


def _kinds(layout: Layout) -> str:
    return "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in layout.dtypes}))
