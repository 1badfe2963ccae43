"""The layers of a model in the order of depth, each with its statistics behind the merge of the layers before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from typing import Any, TypeAlias

from torch import Tensor, nn

from ecotone.fitness.backends.base import Backend
from ecotone.fitness.preparing.blocks import Standing, before_blocks, uncache
from ecotone.fitness.preparing.known import (
    Gathered,
    beside,
    called,
    groups,
    inputs_over,
    known_of,
    outputs_by_row,
    outputs_over,
    recording,
    slopes_and_fisher,
)
from ecotone.fitness.preparing.layers import Unit, sorted_by_module, stages
from ecotone.fitness.statistics.kinds import Data
from ecotone.fitness.statistics.layers import Masks, Take, observable_layers, taking
from ecotone.fitness.statistics.moments import Moments, squares, together
from ecotone.merging.models.model import Model
from ecotone.merging.models.names import Names
from ecotone.merging.operators.whole import FromData, Known, Wanted
from ecotone.merging.sources import Sources

Turn: TypeAlias = tuple[Unit, Known | None]
Stage: TypeAlias = tuple[str, list[str]]
"""A block, or a layer that lies in none, and the linear layers in it."""


@dataclass
class _Path:
    """The data of one expert before a block: in the merge, and in the expert itself where its outputs are wanted."""

    expert: str
    merged: list[Standing]
    own: list[Standing]


class Depth:
    """Goes through the layers of a model in the order in which it calls them.

    While a block is observed it has the weights of one expert, and everything before it those of the merge. What is
    taken from the iterator must be merged, and its weights put into ``merged``, before the next is asked for.

    Args:
        operator: The operator.
        sources: The base and the experts.
        data: By expert, its calibration data.
        backend: Shows the experts in ``module``.
        module: The module.
        names: The correspondence of the checkpoints' tensors and the module's.
        merged: By the checkpoints' names, the tensors that are merged already. Those that no pass needs any more are
            taken out, so that beside the module there is no second model in memory.
    """

    def __init__(
        self,
        operator: FromData,
        sources: Sources,
        data: Mapping[str, Sequence[Data]],
        backend: Backend,
        module: nn.Module,
        names: Names,
        merged: MutableMapping[str, Tensor],
    ) -> None:
        self._operator, self._sources, self._data = operator, sources, data
        self._backend, self._module, self._names, self._merged = backend, uncache(module), names, merged
        self._layers = observable_layers(module)
        self._curved: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}  # of some layers, by expert
        self._reached: dict[str, list[Unit]] = {}

    def turns(self, found: Sequence[Unit]) -> Iterator[Turn]:
        """All units, each with what is known of it: first what no data reach, then the layers in their order."""
        order = dict.fromkeys(name for one in self._sources.names for name in self._called(one))
        by_module = sorted_by_module(found)
        self._reached = {name: by_module.pop(name) for name in order if name in by_module}
        yield from ((unit, None) for some in by_module.values() for unit in some)
        grouped = groupby(stages(self._module, list(self._reached)), self._container)
        left = [(container, list(group)) for container, group in grouped]
        while left:
            container, some = left.pop(0)
            paths = self._paths(container, some) if container else None
            if paths is None:
                yield from self._by_passes(some)
            else:
                yield from self._by_blocks(container, some, paths, last=not left)

    def _called(self, expert: str) -> list[str]:
        module = self._own(expert)
        return [name for task in self._data[expert] for name in called(module, task, self._operator.batch)]

    def _own(self, expert: str) -> nn.Module:
        """The module of an expert by itself, with its own config where experts keep theirs; its tensors are shared."""
        return uncache(self._backend.expert(expert))

    def _curve(self, stage: Sequence[str]) -> None:
        """Have the slopes and the Fisher information of a stage's layers, and of as many after it as there is room for.

        They are the experts' own, and so do not wait for the merge.
        """
        kinds: list[Wanted] = [kind for kind in self._operator.wanted if kind in ("slopes", "fisher")]
        known = next(iter(self._curved.values()), ({}, {}))
        if not kinds or all(name in known[0] or name in known[1] for name in stage):
            return
        del known
        self._curved.clear()  # before the next ones are made
        order = list(self._reached)
        left = {name: self._layers[name] for name in order[order.index(stage[0]) :]}
        names = {*groups(left, kinds, len(self._sources.names))[0], *stage}
        for expert in self._sources.names:
            module = self._own(expert)
            some = {name: module.get_submodule(name) for name in left if name in names}
            self._curved[expert] = slopes_and_fisher(module, some, self._data[expert], kinds, self._operator)[:2]

    def _container(self, stage: Stage) -> str:
        """The name of the ``ModuleList`` whose member a stage is; empty for none."""
        parent = stage[0].rpartition(".")[0]
        return parent if parent and isinstance(self._module.get_submodule(parent), nn.ModuleList) else ""

    def _known(self, members: Sequence[str], gathered: Sequence[Gathered]) -> Iterator[Turn]:
        for name in members:
            yield from ((unit, known_of(unit, gathered, self._operator.wanted)) for unit in self._reached[name])

    def _statistics(self, expert: str, moments: Moments, own: Moments) -> Gathered:
        rows = moments.rows()
        slopes, fisher = self._curved.get(expert, ({}, {}))
        return Gathered(moments.means(), slopes, fisher, own.means(), rows)

    # -- whole passes ------------------------------------------------------------------------------------------

    def _by_passes(self, some: Sequence[Stage]) -> Iterator[Turn]:
        """Stages whose data come through the whole model, up to the stage."""
        batch = self._operator.batch
        for ends, members in some:
            layers = {name: self._layers[name] for name in members}
            self._curve(members)
            gathered = []
            for expert in self._sources.names:
                tasks, alone = self._data[expert], self._own(expert)
                own_layers = {name: alone.get_submodule(name) for name in members}
                wanted = tasks if "outputs" in self._operator.wanted else ()
                targets = [outputs_by_row(alone, own_layers, task, batch, ends) for task in wanted]
                self._put(self._merged, besides=ends)
                moments = inputs_over(self._module, layers, tasks, batch, ends)
                own = together(
                    outputs_over(self._module, layers, task, rows, batch, ends)
                    for task, rows in zip(wanted, targets, strict=True)
                )
                gathered.append(self._statistics(expert, moments, own))
            yield from self._known(members, gathered)
            del gathered  # before the next ones are made

    # -- block by block ------------------------------------------------------------------------------------------

    def _paths(self, container: str, some: Sequence[Stage]) -> list[_Path] | None:
        """The experts' data before the first block of a list; None where they do not pass from block to block."""
        blocks = [f"{container}.{name}" for name, _ in self._module.get_submodule(container).named_children()]
        if [name for name, _ in some] != [name for name in blocks if name in dict(some)]:
            return None
        paths = []
        for expert in self._sources.names:
            alone = self._own(expert)
            own = self._before(alone, blocks, expert) if "outputs" in self._operator.wanted else []
            self._put(self._merged)
            merged = self._before(self._module, blocks, expert)
            if own is None or merged is None:
                return None
            paths.append(_Path(expert, merged, own))
        return paths

    def _before(self, module: nn.Module, blocks: Sequence[str], expert: str) -> list[Standing] | None:
        found = []
        for task in self._data[expert]:
            standing = before_blocks(module, blocks, task, self._operator.batch)
            if standing is None:
                return None
            found.append(standing)
        return found

    def _by_blocks(
        self, container: str, some: Sequence[Stage], paths: Sequence[_Path], *, last: bool
    ) -> Iterator[Turn]:
        """Stages whose data stand before each block in turn.

        Args:
            container: The list of blocks.
            some: The stages.
            paths: The experts' data before the first block.
            last: Whether nothing comes after: then the merge of what the data have passed is not needed any more.
        """
        members_of = dict(some)
        if last:
            self._forget(container, within=False)
        for name, block in self._module.get_submodule(container).named_children():
            ends = f"{container}.{name}"
            members = members_of.get(ends, [])
            layers = {layer: self._layers[layer] for layer in members}
            if members:
                self._curve(members)
            gathered = [self._observed(path, ends, block, layers) for path in paths]
            yield from self._known(members, gathered)
            del gathered  # before the next ones are made
            self._put(self._merged, only=ends)
            for path in paths:
                for standing in path.merged:
                    standing.advance(standing.passes(block, _unwatched))
            if last:
                self._forget(ends, within=True)

    def _observed(self, path: _Path, ends: str, block: nn.Module, layers: Mapping[str, nn.Module]) -> Gathered:
        """The statistics of a block with an expert's weights; the expert's own data go on to the next block."""
        self._put(_Tensors(self._expert(path.expert)), only=ends)
        moments, own = Moments(), Moments()
        for standing, alone in zip_longest(path.merged, path.own):
            rows: dict[str, list[Tensor]] = {name: [] for name in layers}
            takes = [squares(moments), *([beside(rows, own)] if alone else [])]
            passes = standing.passes(block, partial(_taken, layers, takes)) if layers else iter(())
            if alone is None:
                deque(passes, maxlen=0)
            else:
                own_block = alone.blocks[alone.place]
                own_layers = {name: own_block.get_submodule(name.removeprefix(f"{ends}.")) for name in layers}
                made = alone.passes(own_block, partial(_watching, recording, own_layers, rows))
                # batch by batch, so that the outputs of one batch are kept, and not those of all
                alone.advance(hidden for hidden, _ in zip_longest(made, passes))
        return self._statistics(path.expert, moments, own)

    # -- weights -----------------------------------------------------------------------------------------------

    def _expert(self, name: str) -> Model:
        return self._sources.experts[self._sources.names.index(name)]

    def _put(self, tensors: Mapping[str, Tensor], besides: str | None = None, only: str | None = None) -> None:
        """Put tensors into the module.

        Args:
            tensors: By the checkpoints' names; those that the mapping lacks are left.
            besides: Leave this block as it is.
            only: Put those of this block alone.
        """

        def counts(targets: Sequence[str]) -> bool:
            within = [any(one.startswith(f"{block}.") for one in targets) for block in (besides, only) if block]
            return not within or within[0] is (only is not None)

        state = {name: tensor.data for name, tensor in self._module.state_dict(keep_vars=True).items()}
        for name, place in self._names.places.items():
            if name in tensors and counts([place.target]):
                into = place.of(state[place.target])
                into.copy_(tensors[name].view(into.shape))
        for name, scattered in self._names.scattered.items():
            if name in tensors and counts(scattered.targets):
                device = state[scattered.targets[0]].device
                scattered.put(tensors[name].to(device, state[scattered.targets[0]].dtype), state)

    def _forget(self, module: str, *, within: bool) -> None:
        """Leave the merge of what lies in a module, or of all that does not."""
        targets: dict[str, Sequence[str]] = {name: (place.target,) for name, place in self._names.places.items()}
        targets |= {name: one.targets for name, one in self._names.scattered.items()}
        for name in list(self._merged):
            if any(one.startswith(f"{module}.") for one in targets.get(name, ())) is within:
                del self._merged[name]


class _Tensors(Mapping[str, Tensor]):
    """The tensors of a model, read when they are asked for."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __getitem__(self, name: str) -> Tensor:
        return self._model.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.tensors)

    def __len__(self) -> int:
        return len(self._model.tensors)


def _unwatched(_masks: Masks) -> AbstractContextManager[Any]:
    return nullcontext()


def _watching(
    watch: Callable[..., AbstractContextManager[Any]], layers: Mapping[str, nn.Module], into: Any, masks: Masks
) -> AbstractContextManager[Any]:
    return watch(layers, masks, into)


@contextmanager
def _taken(layers: Mapping[str, nn.Module], takes: Sequence[Take], masks: Masks) -> Iterator[None]:
    """Give each of ``takes`` the inputs of the layers in the pass that is made meanwhile."""
    with ExitStack() as stack:
        for take in takes:
            stack.enter_context(taking(layers, masks, take))
        yield
