"""Making the basis of an operator that prepares whole matrices, or finding it where it was made before.

The vectors are made one layer at a time. Statistics of a layer are those of each expert over the calibration tasks that
bear its name. With ``order: depth`` the inputs of a layer are those that it gets in the merge: blocks are merged one
after the other, and the passes of each expert's data run through the blocks that are merged already.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor, nn

from ecotone.fitness.backends.base import Backend, BackendContext
from ecotone.fitness.kinds import ObjectiveContext
from ecotone.fitness.opening import device_of, kind_of, open_sources
from ecotone.fitness.preparing.depth import Depth
from ecotone.fitness.preparing.known import (
    Gathered,
    groups,
    inputs_over,
    known_of,
    outputs_by_row,
    outputs_over,
    slopes_and_fisher,
)
from ecotone.fitness.preparing.layers import Unit, sorted_by_module, units, whole_tensors
from ecotone.fitness.preparing.likeness import PIECE, Likeness
from ecotone.fitness.preparing.second_moments import SecondMoments
from ecotone.fitness.preparing.votes import Votes
from ecotone.fitness.statistics.cache import digest_of
from ecotone.fitness.statistics.gather import digest_of_examples, digest_of_head
from ecotone.fitness.statistics.kinds import Data
from ecotone.fitness.statistics.layers import observable_layers
from ecotone.fitness.statistics.moments import together
from ecotone.merging import operators
from ecotone.merging.basis import Bases, Basis, SideBySide, Writer
from ecotone.merging.kernel.lazy import Source
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.names import Names, names_of
from ecotone.merging.operators.rcp import Rcp
from ecotone.merging.operators.stack import Stack, preparing
from ecotone.merging.operators.task_vectors import Pieces
from ecotone.merging.operators.whole import FromData, Known, Report, Wanted, WholeMatrices
from ecotone.merging.sources import Sources
from ecotone.populations.errors import EcotoneError, InputError, sentence, told

if TYPE_CHECKING:
    from ecotone.fitness.specs import WorkerSpec

DOUBLE = 2048
"""Rows or columns up to which matrices are float64 on an accelerator, too; larger ones are float32 there."""
_SHOWN = 8  # warnings that are logged
_warned: set[str] = set()  # keys of bases that this process has warned of
_log = logging.getLogger("ecotone")


class Preparation:
    """Prepares the vectors of one operator for the models of a worker.

    Args:
        sources: The base and the experts, as task vectors.
        operator: The operator.
        data: By expert, its calibration data; empty where the operator wants none.
        make: Makes what shows models in a module; None where there is no module.
        about: What else the vectors depend on, as texts: the architecture and the type of the module.
        device: The device on which matrices are worked on.
    """

    def __init__(
        self,
        sources: Sources,
        operator: WholeMatrices,
        data: Mapping[str, Sequence[Data]],
        make: Callable[[], Backend] | None,
        about: Sequence[str],
        device: torch.device,
    ) -> None:
        self._sources, self._operator, self._data = sources, operator, data
        wants = "second_moments" in operator.wanted
        self._moments = SecondMoments(sources, operator) if wants else None
        self._make, self._about, self._device = make, about, device
        self._likeness = Likeness(sources.names)
        self._columns = operator.columns(sources.names)
        kept = sources.layout.kept  # what is not merged is the base's in every merge, and not the expert's
        self._merged: dict[str, Tensor] = {name: sources.giver(name).tensor(name) for name in sorted(kept)}
        self._layers: dict[str, dict[str, float]] = {}
        self._warnings: Counter[str] = Counter()

    @property
    def shape(self) -> tuple[Layout, tuple[str, ...]]:
        """The layout of the vectors, and their names."""
        return self._sources.layout, self._columns

    @cached_property
    def key(self) -> str:
        """All that the vectors depend on, as 32 hexadecimal digits."""
        sources, operator = self._sources, self._operator
        layout = sources.layout
        settings = replace(operator, **{name: type(getattr(operator, name))() for name in operator.paths})
        parts = {
            "operator": [operator.name, operator.version, repr(settings)],
            "models": sources.files().contents,
            "names": sources.names,
            "layout": [[name, str(info.dtype), list(info.shape)] for name, info in layout.parameters.items()],
            "about": list(self._about),
            "data": {
                name: [[digest_of_examples(one.examples), digest_of_head(one.head)] for one in tasks]
                for name, tasks in self._data.items()
            },
        }
        if self._moments is not None:
            parts["second_moments"] = self._moments.digests
        if "votes" in operator.wanted:
            labels = [one.examples.labels for tasks in self._data.values() for one in tasks]
            parts["labels"] = [None if one is None else digest_of({"": one}) for one in labels]
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _backend(self) -> Backend | None:
        return None if self._make is None else self._make()

    def write(self, writer: Writer) -> None:
        """Prepare all vectors and finish the basis.

        Raises:
            InputError: Vectors hold NaN or infinity, or the operator cannot prepare them.
        """
        began = time.perf_counter()
        model = None if self._backend is None else self._backend.model
        module = model if isinstance(model, nn.Module) else None
        names = None if module is None else names_of(module, self._sources.layout)
        folds, observes = self._operator.folds, isinstance(self._operator, FromData)
        if self._operator.elementwise:
            found = whole_tensors(self._sources.layout)
        else:
            found = units(self._sources.layout, module, names, folds=folds, observes=observes)
        numbers = itertools.count(1)
        for unit, known in self._in_turn(found, module, names):
            self._prepare(unit, known, writer)
            del known  # its statistics, before the next ones are gathered
            number = next(numbers)
            if time.perf_counter() - began > number:  # a line for each layer where layers take seconds
                _log.info("%s: prepared %s of %s tensors.", self._operator.name, number, len(found))
        self._warnings.update(dict.fromkeys(self._likeness.warnings(self._operator.unites), 1))
        writer.finish(
            {
                "operator": self._operator.name,
                "settings": repr(self._operator),
                "experts": list(self._sources.names),
                "seconds": round(time.perf_counter() - began, 3),
                "cosines": self._likeness.cosines.tolist(),
                "layers": self._layers,
                "warnings": dict(self._warnings),
            }
        )

    # -- the order of layers, and what is known of them --------------------------------------------------------

    def _in_turn(
        self, found: Sequence[Unit], module: nn.Module | None, names: Names | None
    ) -> Iterator[tuple[Unit, Known | None]]:
        """All units, each with what is known of it."""
        operator = self._operator
        if not isinstance(operator, FromData):
            thresholds = operator.surveyed(self._pieces())
            yield from ((unit, Known(second_moments=self._moments_of(unit), thresholds=thresholds)) for unit in found)
        elif module is None or names is None:
            raise InputError(
                f"merge.operator: {operator.name} gathers statistics of layers, found a dict of tensors.",
                "Name an architecture.",
            )
        elif isinstance(operator, Rcp):
            assert self._backend is not None
            votes = Votes(operator, self._sources.names, self._data, self._backend, module, names)
            yield from ((unit, Known(votes=votes.of(unit.at.name, unit.at.shape))) for unit in found)
        elif operator.order == "depth":
            assert self._backend is not None
            depth = Depth(operator, self._sources, self._data, self._backend, module, names, self._merged)
            yield from depth.turns(found)
        else:
            yield from self._at_once(operator, found, module)

    def _pieces(self) -> Pieces:
        """The base, the experts and the second moments, if there are any, streamed."""
        assert self._sources.base is not None
        models = (self._sources.base, *self._sources.experts)

        def read(name: str) -> list[Source]:
            moments = () if self._moments is None else self._moments.of(name)
            return [*(model.flat(name) for model in models), *(one.reshape(-1) for one in moments)]

        return Pieces(self._sources.layout, read)

    def _moments_of(self, unit: Unit) -> Sequence[Tensor]:
        return () if self._moments is None else self._moments.of(unit.at.name)

    def _at_once(
        self, operator: FromData, found: Sequence[Unit], module: nn.Module
    ) -> Iterator[tuple[Unit, Known | None]]:
        """Units with the statistics of the experts as they are."""
        by_module = sorted_by_module(found)
        layers = {name: layer for name, layer in observable_layers(module).items() if name in by_module}
        for names in groups(layers, operator.wanted, len(self._sources.names)):
            experts = [self._of_expert(operator, name, names) for name in self._sources.names]
            for name in names:
                yield from ((unit, known_of(unit, experts, operator.wanted)) for unit in by_module.pop(name))
            del experts  # before the next ones are made
        yield from ((unit, None) for some_units in by_module.values() for unit in some_units)

    def _of_expert(self, operator: FromData, name: str, layers: Sequence[str]) -> Gathered:
        """The statistics of an expert's layers over its own data, computed with the expert's own config."""
        tasks, batch = self._data[name], operator.batch
        assert self._backend is not None
        module = self._backend.expert(name)
        some = {layer: module.get_submodule(layer) for layer in layers}
        moments = inputs_over(module, some, tasks if "inputs" in operator.wanted else (), batch)
        own = together(
            outputs_over(module, some, task, outputs_by_row(module, some, task, batch), batch)
            for task in (tasks if "outputs" in operator.wanted else ())
        )
        slopes, fisher, rows = slopes_and_fisher(module, some, tasks, operator.wanted, operator)
        rows |= moments.rows()
        return Gathered(moments.means(), slopes, fisher, own.means(), rows)

    # -- one unit --------------------------------------------------------------------------------------------

    def _prepare(self, unit: Unit, known: Known | None, writer: Writer) -> None:
        """Make the vectors of a unit and write them."""
        sources, operator, report = self._sources, self._operator, Report()
        assert sources.base is not None
        models = (sources.base, *sources.experts)
        if known is None or (unit.at.kind in ("embedding", "rest") and not operator.elementwise):
            if known is None and unit.at.kind in ("linear", "convolution"):
                report.warnings.append("layers that the data do not reach have the mean of their task vectors")
            elif unit.at.kind == "rest" and len(unit.at.shape) > 1:
                report.warnings.append("matrices that are no linear layers have the mean of their task vectors")
            for name in unit.names:
                self._prepare_rest(unit, name, [one.tensor(name) for one in models], report, writer)
            self._told(unit, report)
            return
        kind = self._kind(unit)
        stored = [[model.tensor(name).to(self._device, kind) for name in unit.names] for model in models]
        for tensors in zip(*stored, strict=True):
            self._likeness.add(tensors[0], tensors[1:])
        if operator.elementwise:
            moved = replace_tensors(known, self._device, kind)
            parts = [operator.layer(unit.at, stored[0][0], [one[0] for one in stored[1:]], moved, report)]
        elif unit.stacked:
            parts = [self._of_stack(unit, [one[0] for one in stored], known, report)]
        else:
            matrices = [unit.matrix(one[0], one[1] if len(one) > 1 else None) for one in stored]
            if known.rows and min(known.rows) < matrices[0].shape[1]:
                report.warnings.append("fewer rows of data than input channels: give more examples")
            moved = replace_tensors(known, self._device, kind)
            self._check(unit, moved)
            vectors = operator.layer(unit.at, matrices[0], matrices[1:], moved, report)
            parts = list(zip(*(unit.parts(vector) for vector in vectors), strict=True))
        for name, base, vectors in zip(unit.names, stored[0], parts, strict=True):
            self._keep(name, base, vectors, writer)
        self._told(unit, report)

    def _prepare_rest(self, unit: Unit, name: str, stored: Sequence[Tensor], report: Report, writer: Writer) -> None:
        """Make the vectors of a tensor that is no matrix, and write them: piece by piece, as tables are large."""
        operator, size = self._operator, stored[0].numel()
        at, kind = replace(unit.at, name=name), self._kind(unit)
        step = PIECE if operator.rest_by_element else max(size, 1)
        flat = [one.reshape(-1) for one in stored] if operator.rest_by_element else stored
        for low in range(0, max(size, 1), step):
            parts = [one[low : low + step] if operator.rest_by_element else one for one in flat]
            base, *experts = (one.to(self._device, kind) for one in parts)
            self._likeness.add(base, experts)
            self._keep(name, base, operator.rest(at, base, experts, report), writer, low)

    def _told(self, unit: Unit, report: Report) -> None:
        if report.numbers:
            self._layers[unit.at.name] = report.numbers
        self._warnings.update(dict.fromkeys(report.warnings, 1))

    def _check(self, unit: Unit, known: Known) -> None:
        """Refuse statistics that are no numbers: the solution would be none, or quietly the mean."""
        for sort in ("inputs", "slopes", "fisher", "outputs"):
            for name, values in zip(self._sources.names, getattr(known, sort), strict=False):
                if not bool(torch.isfinite(values).all()):
                    raise InputError(
                        f"merge.operator: {self._operator.name} reads {sort} of {name} at {unit.at.name}, found NaN or "
                        "infinity.",
                        "Check the weights and the calibration data, and that activations do not overflow float16 "
                        "(merge.dtype: float32 or bfloat16).",
                    )

    def _of_stack(self, unit: Unit, stored: Sequence[Tensor], known: Known, report: Report) -> Sequence[Tensor]:
        """The vectors of a stack of matrices, each one made by itself."""
        made = [
            self._operator.layer(unit.at, matrices[0], matrices[1:], known, report)
            for matrices in zip(*(one.unbind(0) for one in stored), strict=True)
        ]
        return [torch.stack(list(vectors)) for vectors in zip(*made, strict=True)]

    def _keep(self, name: str, base: Tensor, vectors: Sequence[Tensor], writer: Writer, start: int = 0) -> None:
        """Write the vectors of a tensor, or of its elements from ``start`` on."""
        if len(vectors) != len(self._columns):
            raise InputError(
                f"operator {self._operator.name!r}: {name}: expected {len(self._columns)} vectors, "
                f"found {len(vectors)}."
            )
        for vector in vectors:
            if not bool(torch.isfinite(vector).all()):
                raise InputError(
                    f"merge.operator: {self._operator.name} made NaN or infinity of {name}.",
                    "Raise its ridge, or leave the tensor out with merge.freeze.",
                )
        writer.put(name, vectors, start)
        if self._operator.order == "depth":
            info = self._sources.layout.parameters[name]
            if not start:
                self._merged[name] = torch.empty(info.shape, dtype=info.dtype, device=self._device)
            self._merged[name].view(-1)[start : start + base.numel()] = sum(vectors, start=base).reshape(-1)

    def _kind(self, unit: Unit) -> torch.dtype:
        large = max(unit.at.shape, default=1) > DOUBLE and not self._operator.elementwise
        return torch.float32 if large and self._device.type != "cpu" else torch.float64


def replace_tensors(known: Known, device: torch.device, kind: torch.dtype) -> Known:
    """The same statistics on a device, in a type."""
    moved = {name: [one.to(device, kind) for one in getattr(known, name)] for name in get_args(Wanted)}
    return replace(known, **moved)


# -- from a worker's spec --------------------------------------------------------------------------------------


def basis_of(spec: WorkerSpec, bases: Bases | None = None) -> Basis | SideBySide | None:
    """The basis of a worker's operator, made now unless it lies in this machine's cache; None where it prepares none.

    Of a stack those of its methods, each one as it is where the method is used alone.
    After one was made, others beyond the spec's limit are removed, unless they are in use.

    Raises:
        EcotoneError: The models cannot be opened, data are lacking, the vectors cannot be prepared, or the disk is
            full.
    """
    operator = operators.get(spec.operator, spec.settings)
    if isinstance(operator, Stack):
        methods = zip(operator.members, operator.methods, strict=True)
        alone = {label: replace(spec, operator=one.operator, settings=one.settings) for label, one in methods}
        with ExitStack() as held:  # what is made for one method is not to be removed for the next
            found = dict[str, Basis]()
            for label, one in preparing(operator).items():
                found[label] = _basis_of(alone[label], one, bases)
                held.callback(found[label].hold().close)
            return SideBySide(found) if found else None
    return _basis_of(spec, operator, bases) if isinstance(operator, WholeMatrices) else None


def _basis_of(spec: WorkerSpec, operator: WholeMatrices, bases: Bases | None) -> Basis:
    bases = Bases() if bases is None else bases
    preparation = _preparation(spec, operator)
    with bases.alone(preparation.key):
        basis = bases.find(preparation.key)
        made = basis is None or basis.columns != preparation.shape[1]
        if basis is None or made:
            layout, columns = preparation.shape
            _log.info("%s: preparing %s vectors ...", operator.name, len(columns))
            with bases.writer(preparation.key, layout, columns) as writer, _told(operator), _threads(spec.threads):
                preparation.write(writer)
            basis = bases.find(preparation.key)
            assert basis is not None
            _log.info("%s: prepared in %.1f s.", operator.name, basis.record["seconds"])
    warnings = () if basis.key in _warned else Counter(basis.record["warnings"]).most_common(_SHOWN)
    _warned.add(basis.key)  # an export opens once more what a worker has opened
    for text, count in warnings:
        _log.warning("%s: %s%s", operator.name, text, f" ({count} layers)" if count > 1 else "")
    if made and spec.cache_bytes is not None:
        for one in bases.prune(spec.cache_bytes, preparation.key):
            _log.info("The vectors of %s in %s were removed: runtime.cache_bytes.", one.record["operator"], one.folder)
    return basis


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Work with as many threads as a worker has, wherever the vectors are prepared: their last bits depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _told(operator: WholeMatrices) -> Iterator[None]:
    """Turn what models, heads and data raise into words."""
    try:
        yield
    except (EcotoneError, OSError):
        raise
    except Exception as error:
        raise InputError(
            sentence(f"merge.operator: {operator.name} could not be prepared: {told(error)}"),
            "Check what the calibration tasks' data functions return (an encoder-decoder needs decoder_input_ids), "
            "their heads, and the memory that is free.",
        ) from error


def _preparation(spec: WorkerSpec, operator: WholeMatrices) -> Preparation:
    plain = replace(spec, operator="task_arithmetic", settings={}, rank=None)
    sources, device = open_sources(plain), device_of(spec.device)
    kind, data = kind_of(plain, sources), dict[str, Sequence[Data]]()
    context = BackendContext(sources, spec.architecture, device, kind)
    make = None if spec.architecture is None else partial(spec.backend.make, context)
    if isinstance(operator, FromData) and make is not None:
        data = _data(spec, operator, sources.names, ObjectiveContext(device, kind))
    heads = [task.head.model_dump_json() for task in spec.calibration if task.head is not None]
    about = (
        *(str(spec.architecture), str(kind), str(spec.threads), str(spec.config), str(spec.vocabulary)),
        *(spec.code, *heads),
    )
    return Preparation(sources, operator, data, make, about, device)


def _data(
    spec: WorkerSpec, operator: FromData, experts: Sequence[str], context: ObjectiveContext
) -> dict[str, Sequence[Data]]:
    """By expert, the data of the calibration tasks that are its own."""
    found: dict[str, list[Data]] = {name: [] for name in experts}
    for settings in spec.calibration:
        owner = settings.teacher or settings.name
        if owner in found:
            task = settings.build(context, spec.seed)
            count = min(operator.examples, len(task.examples))
            found[owner].append(Data(task.name, task.examples.rows(torch.arange(count)), task.head))
    check_data(operator.name, found)
    return dict(found)


def check_data(operator: str, by_expert: Mapping[str, Sequence[object]]) -> None:
    """Refuse experts without data of their own.

    Raises:
        InputError: There is one.
    """
    labels = getattr(operators.OPERATORS.get(operator, "merge.operator"), "needs_labels", False)
    for name, tasks in by_expert.items():
        if not tasks:
            raise InputError(
                f"calibration: the operator {operator!r} reads inputs of each expert's own task, found none for "
                f"{name!r}.",
                f"Add a calibration task named {name!r} ({'with labels' if labels else 'labels are not needed'}), or "
                "use an operator without data, such as iso_c or tsv_m.",
            )
