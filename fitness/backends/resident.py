"""The one model a worker keeps in memory, and how candidates' weights get into it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from ecotone.fitness.backends import activation_checkpointing as recomputing
from ecotone.fitness.backends.architectures import make
from ecotone.fitness.backends.base import BackendContext, ScoringSettings
from ecotone.merging.gradient import Slopes
from ecotone.merging.kernel.lazy import fill, formed
from ecotone.merging.models import configs
from ecotone.merging.models.architectures import sharing
from ecotone.merging.models.layout import Layout
from ecotone.merging.models.model import Model
from ecotone.merging.models.names import Names, Place, Scattered, names_of, untie
from ecotone.merging.placement import Needs
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError, nearest
from ecotone.populations.genome import Floats, Genome
from ecotone.settings import Call

STACK_BYTES = 64 * 1024**2


def stack_of(
    layout: Layout, dtype: torch.dtype | None, stack_bytes: int = STACK_BYTES, batch: int | None = None
) -> int:
    """Bytes of the candidates that are merged in one pass: 0 for models that are merged in place, as two are too many.

    Args:
        layout: The flat vector.
        dtype: The model's floating-point type; None is the checkpoints'.
        stack_bytes: Memory for candidates merged in one pass.
        batch: The most candidates in a stack.
    """
    kinds = {dtype} if dtype else set(layout.dtypes)
    size = layout.size * kinds.pop().itemsize if len(kinds) == 1 else 0
    count = stack_bytes // size if size else 0
    if count < 2:
        return 0
    return size * (count if batch is None else min(batch, count))


class ResidentSettings(ScoringSettings):
    """A module in the worker's memory. It takes the weights of one candidate after the other.

    Attributes:
        backend: ``resident``: a module in the worker's memory, whose weights are replaced by those of one candidate
            after the other.
        checkpointing: Compute activations again in the backward pass instead of keeping them. This takes less memory
            and more time (Hugging Face models only).
    """

    backend: Literal["resident"] = "resident"
    checkpointing: bool = False

    def gradients(self) -> bool:
        """They are taken through the module."""
        return True

    def make(self, context: BackendContext) -> Resident:
        """The module, with room for one candidate."""
        return Resident(
            context.sources,
            context.architecture,
            context.device,
            context.dtype,
            checkpointing=self.checkpointing,
        )

    def needs(
        self,
        sources: Sources,
        device: torch.device,
        dtype: torch.dtype | None,
        threads: int,
        batch: int | None,
        *,
        settings: bool,
    ) -> Needs:
        """The memory of a model, or of a stack of small models, and of merging."""
        return sources.memory.needs(device, dtype, threads, stack_of(sources.layout, dtype, batch=batch), settings)

    def describe(self) -> str:
        """A phrase that names the device of candidates."""
        return "a module in each worker's memory, whose weights are replaced"


class Resident:
    """A model whose floating-point tensors take the values of one candidate after the other.

    Small models are merged in stacks: one pass over the sources makes many candidates, and showing one is
    a change of pointers. Large ones are merged in place, one candidate at a time.

    Args:
        sources: The sources that are mixed.
        architecture: A function that returns the module, ``auto`` for the Hugging Face directory the checkpoints
            come from, or None for a dict of tensors.
        device: The device of the model.
        dtype: Its floating-point type; None keeps the architecture's own (for a dict: the checkpoints').
        stack_bytes: Memory for candidates merged in one pass.
        checkpointing: Whether ``gradient`` computes activations twice instead of keeping them (Hugging Face models).

    Raises:
        InputError: The architecture cannot be made, its tensors are not the checkpoints', or it cannot be checkpointed.
    """

    def __init__(
        self,
        sources: Sources,
        architecture: Call | Literal["auto"] | None,
        device: torch.device,
        dtype: torch.dtype | None = None,
        stack_bytes: int = STACK_BYTES,
        *,
        checkpointing: bool = False,
    ) -> None:
        self.model: nn.Module | dict[str, Tensor]
        self._sources = sources
        self._device = device
        layout = sources.layout
        self._parts: dict[Tensor, dict[str, Place]] = {}  # by a parameter, the checkpoints' tensors in it
        self._scattered: list[tuple[Scattered, Tensor]] = []  # with the values that are taken apart
        self._apart: dict[str, Tensor] = {}  # the module's tensors that they are put into
        if architecture is None:
            self.model = _allocated(sources, device, dtype)
            names = Names({})
            self._state: Mapping[str, Tensor] = self.model
            state = self.model
            written = {name for name in state if name not in layout.kept}
        else:
            self.model = make(architecture, sources, dtype).to(device).eval().requires_grad_(False)
            names = names_of(self.model, layout)
            untie(self.model, names, layout.aliases)
            self._state = self.model.state_dict(keep_vars=True)
            state = self._placed(names)
            written = {place.target for name, place in names.places.items() if name not in layout.kept}
            written |= self._apart.keys()
        parameters = () if isinstance(self.model, dict) else self.model.parameters()
        kept = {place.target for name, place in names.places.items() if name in layout.kept}
        fixed = {id(self._state[name]) for name in kept - written}
        own_tensors = {id(tensor) for tensor in (*parameters, *(self._state[name] for name in written))}
        self.rewritten: frozenset[int] = frozenset(own_tensors - fixed)
        """Ids of the module's tensors that ``show`` writes whole; the others stay as they are."""
        self._own = self._with_own_configs(architecture)
        self._tensors = [state[name] for name in layout.tensors]
        own = {id(tensor) for tensor in self._state.values()}
        self._swapped = [id(tensor) in own for tensor in self._tensors]
        twins = [(alias, name) for alias, name in layout.aliases.items() if alias in state]
        self._tied = [(state[alias], state[name]) for alias, name in twins if state[alias] is not state[name]]
        self._tie()
        self._shown: Genome | None = None  # whose weights these are, if only ``gradient`` has used them
        self._checkpointing = checkpointing
        if checkpointing:
            recomputing.layers(self._module())
        kinds = {tensor.dtype for tensor in self._tensors}
        self.dtype: torch.dtype | None = kinds.pop() if len(kinds) == 1 else None
        """The model's floating-point type; None when it mixes several."""
        self._buffers = [
            (state[name], value.to(device))
            for name, value in sources.buffers().items()
            if name in state and name not in layout.kept
        ]
        self._kept: list[tuple[str, Tensor | Scattered]] = self._copied(names)
        self._lent = False  # whether an expert's tensors are in the place of those
        self._fill_kept(None)
        stack = stack_of(layout, self.dtype, stack_bytes) if self.dtype else 0
        self.group: int = stack // (layout.size * self.dtype.itemsize) if self.dtype and stack else 1
        """How many candidates are merged in one pass."""
        self._stacked = stack > 0

    def _placed(self, names: Names) -> dict[str, Tensor]:
        """By the checkpoints' names, the tensors that merged values are written into: the module's, views of them, and
        for tensors that the module does not take, or takes apart, tensors of their own.
        """
        layout, state = self._sources.layout, self._state
        found: dict[str, Tensor] = {}
        for name, place in names.places.items():
            tensor = state[place.target]
            found[name] = tensor if place.whole else place.of(tensor.detach())
            kept = layout.aliases.get(name, name)
            if isinstance(tensor, nn.Parameter) and kept in layout.parameters:  # none that is empty
                self._parts.setdefault(tensor, {})[kept] = place
        for alias, kept in layout.aliases.items():
            if alias in found and kept in layout.parameters:
                found.setdefault(kept, found[alias])
        kind = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        for name, info in layout.parameters.items():
            if name not in found:
                found[name] = torch.empty(info.shape, dtype=kind, device=self._device)
        self._scattered = [(one, found[name]) for name, one in names.scattered.items() if name in found]
        self._apart = {target: state[target] for one, _ in self._scattered for target in one.targets}
        for tensor in self._apart.values():
            if isinstance(tensor, nn.Parameter):
                self._parts.setdefault(tensor, {})
        return found

    def _copied(self, names: Names) -> list[tuple[str, Tensor | Scattered]]:
        """By name, the places of tensors that are taken from one model as they are; none of what the module leaves."""
        places: dict[str, Tensor | Scattered] = dict(names.scattered)
        places |= {name: place.of(self._state[place.target].detach()) for name, place in names.places.items()}
        if isinstance(self.model, dict):
            places |= self.model
        return [
            (name, places[name])
            for name in self._sources.layout.buffers
            if name in self._sources.layout.kept and name in places
        ]

    def _fill_kept(self, expert: Model | None) -> None:
        """Put tensors that are not merged into the module: an expert's, or those of every merge."""
        with torch.no_grad():
            for name, place in self._kept:
                info = None if expert is None else expert.tensors.get(name)
                model = expert if info is not None and info.shape == self._sources.layout.buffers[name].shape else None
                source = (model or self._sources.giver(name)).flat(name)
                if isinstance(place, Tensor):
                    fill(place, source)
                else:
                    place.put(formed(source).to(self._device), {key: one.data for key, one in self._state.items()})
        self._lent = expert is not None

    def _with_own_configs(self, architecture: Call | Literal["auto"] | None) -> Mapping[int, nn.Module]:
        """By number, for each expert whose config computes something else, a module of it that shares all tensors."""
        found = self._sources.own_configs
        if found and architecture != "auto":
            raise configs.no_own(next(iter(found.values())))
        return {number: sharing(expert, self._module()) for number, expert in found.items()}

    def show(self, genomes: Sequence[Genome]) -> Iterator[nn.Module | dict[str, Tensor]]:
        """The model with the weights of one genome after the other (at most ``group``).

        All are the same object, but for an expert with a config of its own, which has a module of its own.

        Raises:
            InputError: A genome does not fit the sources; nothing has been shown then.
        """
        if not self._stacked:
            return self._show_in_place(genomes)
        return self._show_stack(self._sources.stack(genomes, self.dtype, self._device), genomes)

    def _show_stack(
        self, stack: Mapping[str, Tensor], genomes: Sequence[Genome]
    ) -> Iterator[nn.Module | dict[str, Tensor]]:
        columns = [stack[name].unbind(0) for name in self._sources.layout.tensors]
        for index, genome in enumerate(genomes):
            self._shown = None
            for tensor, column, swapped in zip(self._tensors, columns, self._swapped, strict=True):
                if swapped:
                    tensor.data = column[index]
                else:  # a part of one of the module's tensors
                    tensor.copy_(column[index])
            self._tie()
            self._take_apart()
            yield self._of(self._alone(genome))

    def _show_in_place(self, genomes: Sequence[Genome]) -> Iterator[nn.Module | dict[str, Tensor]]:
        tensors = dict(zip(self._sources.layout.tensors, self._tensors, strict=True))
        for genome in genomes:
            self._shown = None
            self._sources.materialise([genome], [tensors])
            self._take_apart()
            yield self._of(self._alone(genome))

    def expert(self, name: str) -> nn.Module:
        """The model with an expert's own weights, whatever the operator, rounded to the model's type.

        Where experts are computed with configs of their own, the expert's.

        Raises:
            InputError: The model is a dict of tensors, or there is no such expert.
        """
        model, names = self._module(), self._sources.names
        if name not in names:
            raise InputError(f"expert: expected one of {', '.join(names)}, found {name!r}.", nearest(name, names))
        number = names.index(name)
        stored = self._sources.experts[number]
        self._shown = None
        with torch.no_grad():
            for key, tensor in zip(self._sources.layout.tensors, self._tensors, strict=True):
                fill(tensor, stored.flat(key))
        self._take_apart()
        if self._kept:
            self._fill_kept(stored)
        self._of(number, lent=True)
        return self._own.get(number, model)

    def gradient(
        self,
        genome: Genome,
        losses: Callable[[nn.Module], Iterator[Tensor]],
        weights: Sequence[float] = (1.0,),
    ) -> tuple[list[float], Floats]:
        """Losses of the model with the weights of ``genome``, and the gradient of their sum by its coefficients.

        A backward pass to the model's parameters for each loss, the next loss being computed after it. Parameters add
        the gradients up; on the last pass each one's gradient is freed as soon as its inner products are taken. So
        memory is that of one model, its activations and, for one loss, its largest tensor's gradient, for several a
        gradient of the whole model: whatever the number of losses and experts. Floating-point buffers (running means
        of batch normalisation) count as constants, and in float16 small gradients are lost: bfloat16 and float32 keep
        them.

        Args:
            genome: The merge.
            losses: Called with the model in evaluation mode; gives as many scalars as there are weights, with their
                graphs. It may not change the parameters.
            weights: The weight of each loss in the sum.

        Returns:
            The losses and (S, K) the derivatives of their weighted sum.

        Raises:
            InputError: The model is a dict of tensors, the genome does not fit, or a loss is no scalar that depends
                on the model's parameters.
        """
        model, slopes = self._module(), Slopes(self._sources, genome)
        if self._shown is None or self._shown.digest != genome.digest:
            next(self.show([genome]))
            self._shown = genome
        again = recomputing.checkpointed(model) if self._checkpointing else nullcontext()
        values: list[float] = []
        with again, self._taking_gradients():
            self._restored()
            for weight, value in zip(weights, losses(model), strict=True):
                _check_loss(value)
                last = len(values) == len(weights) - 1
                with self._handing_over(slopes) if last else nullcontext():
                    value.backward(torch.full_like(value, weight))  # type: ignore[no-untyped-call]
                values.append(float(value.detach()))
                self._restored()
        return values, slopes.values

    @contextmanager
    def _taking_gradients(self) -> Iterator[None]:
        """Have parameters take gradients; afterwards all is as before."""
        try:
            for parameter in self._parts:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter in self._parts:
                parameter.requires_grad_(False)
                parameter.grad = None

    @contextmanager
    def _handing_over(self, slopes: Slopes) -> Iterator[None]:
        """Have parameters give their gradients to ``slopes``: in the pass that follows, or at its end."""
        handles = []
        kept: dict[Tensor, Tensor] = {}
        give = partial(self._hand_over, slopes, kept)
        try:
            handles += [one.register_post_accumulate_grad_hook(give) for one in self._parts]  # type: ignore[no-untyped-call]
            yield
        finally:
            for handle in handles:
                handle.remove()
        for parameter in self._parts:
            if parameter.grad is not None:  # that this loss does not depend on, but an earlier one
                give(parameter)
        if kept:
            gradients = {name: kept[tensor] for name, tensor in self._apart.items() if tensor in kept}
            for one, values in self._scattered:
                slopes.add(one.name, one.take(gradients, values))

    def _hand_over(self, slopes: Slopes, kept: dict[Tensor, Tensor], parameter: Tensor) -> None:
        """Give the gradients of the checkpoints' tensors in a parameter to ``slopes``; keep one that is taken apart."""
        assert parameter.grad is not None
        gradient = parameter.grad
        for name, place in self._parts[parameter].items():
            gradient = gradient if place.whole else gradient.contiguous()
            slopes.add(name, place.of(gradient))
        if any(parameter is tensor for tensor in self._apart.values()):
            kept[parameter] = parameter.grad
        parameter.grad = None

    def _take_apart(self) -> None:
        """Put the values of tensors that the module has in several places there."""
        for one, values in self._scattered:
            one.put(values, {name: tensor.data for name, tensor in self._apart.items()})

    def _module(self) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return self.model
        raise InputError("gradient: expected a torch module, found a dict of tensors.", "Name an architecture.")

    def _restored(self, *, lent: bool = False) -> nn.Module | dict[str, Tensor]:
        """The model in evaluation mode, with its integer buffers as the checkpoint has them.

        Args:
            lent: Leave an expert's own tensors in the place of those that are not merged.
        """
        if self._lent and not lent:
            self._fill_kept(None)
        if isinstance(self.model, nn.Module) and self.model.training:  # an objective has left it so
            self.model.eval()
        for buffer, value in self._buffers:
            buffer.copy_(value)
        return self.model

    def _alone(self, genome: Genome) -> int | None:
        """The number of the expert that a genome is, where experts have modules of their own."""
        return self._sources.alone(genome) if self._own else None

    def _of(self, number: int | None, *, lent: bool = False) -> nn.Module | dict[str, Tensor]:
        """The model of an expert, which is the merges' where it has none of its own, as ``_restored`` leaves it."""
        model = self._restored(lent=lent)
        own = None if number is None else self._own.get(number)
        return model if own is None else own.eval()

    def _tie(self) -> None:
        """Have tied weights share memory even where the architecture does not."""
        for alias, kept in self._tied:
            alias.data = kept.data

    def distrust(self) -> None:
        """User code has written into tensors: the next ``show`` writes all of them again, whatever is in them."""
        self._shown = None
        self._lent = True

    def not_finite(self) -> str:
        """Name of the first tensor that holds NaN or infinity now, or an empty string."""
        names = self._sources.layout.tensors
        broken = (n for n, t in zip(names, self._tensors, strict=True) if not bool(torch.isfinite(t).all()))
        return next(broken, "")


def _check_loss(value: object) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"loss: expected one number in a tensor, found {what}.")
    if not value.requires_grad:
        raise InputError(
            "loss: expected one that depends on the model's parameters, found a constant.",
            "Compute it with torch operations, without detach() or no_grad().",
        )


def _allocated(sources: Sources, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A dict with a tensor for each name of the checkpoints; tied names share one."""
    layout = sources.layout
    kinds = layout.dtypes if dtype is None else [dtype] * len(layout.tensors)
    tensors = {
        name: torch.zeros(shape, dtype=kind, device=device)
        for name, shape, kind in zip(layout.tensors, layout.shapes, kinds, strict=True)
    }
    for name, value in sources.buffers().items():
        tensors[name] = value.to(device, dtype if name in layout.kept else None, copy=True)
    return tensors | {alias: tensors[name] for alias, name in layout.aliases.items()}
