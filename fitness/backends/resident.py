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
from ecotone.merging.kernel.lazy import fill
from ecotone.merging.models.layout import Layout
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
        if architecture is None:
            self.model = _allocated(sources, device, dtype)
            state = self.model
        else:
            self.model = make(architecture, sources, dtype).to(device).eval().requires_grad_(False)
            state = self.model.state_dict(keep_vars=True)
            state = _with_kept_names(state, sources)
            _check_state(state, sources)
        self._tensors = [state[name] for name in sources.layout.tensors]
        twins = [(alias, name) for alias, name in sources.layout.aliases.items() if alias in state]
        self._tied = [(state[alias], state[name]) for alias, name in twins if state[alias] is not state[name]]
        self._tie()
        places = {state[name]: name for name in sources.layout.tensors} | {state[alias]: name for alias, name in twins}
        self._places = {tensor: name for tensor, name in places.items() if isinstance(tensor, nn.Parameter)}
        self._shown: Genome | None = None  # whose weights these are, if only ``gradient`` has used them
        self._checkpointing = checkpointing
        if checkpointing:
            recomputing.layers(self._module())
        kinds = {tensor.dtype for tensor in self._tensors}
        self.dtype: torch.dtype | None = kinds.pop() if len(kinds) == 1 else None
        """The model's floating-point type; None when it mixes several."""
        self._buffers = [(state[name], value.to(device)) for name, value in sources.buffers().items() if name in state]
        stack = stack_of(sources.layout, self.dtype, stack_bytes) if self.dtype else 0
        self.group: int = stack // (sources.layout.size * self.dtype.itemsize) if self.dtype and stack else 1
        """How many candidates are merged in one pass."""
        self._stacked = stack > 0

    def show(self, genomes: Sequence[Genome]) -> Iterator[nn.Module | dict[str, Tensor]]:
        """The model with the weights of one genome after the other (at most ``group``); all are the same object.

        Raises:
            InputError: A genome does not fit the sources; nothing has been shown then.
        """
        if not self._stacked:
            return self._show_in_place(genomes)
        return self._show_stack(self._sources.stack(genomes, self.dtype, self._device), len(genomes))

    def _show_stack(self, stack: Mapping[str, Tensor], count: int) -> Iterator[nn.Module | dict[str, Tensor]]:
        columns = [stack[name].unbind(0) for name in self._sources.layout.tensors]
        for index in range(count):
            self._shown = None
            for tensor, column in zip(self._tensors, columns, strict=True):
                tensor.data = column[index]
            self._tie()
            yield self._restored()

    def _show_in_place(self, genomes: Sequence[Genome]) -> Iterator[nn.Module | dict[str, Tensor]]:
        tensors = dict(zip(self._sources.layout.tensors, self._tensors, strict=True))
        for genome in genomes:
            self._shown = None
            self._sources.materialise([genome], [tensors])
            yield self._restored()

    def expert(self, name: str) -> nn.Module:
        """The model with an expert's own weights, whatever the operator, rounded to the model's type.

        Raises:
            InputError: The model is a dict of tensors, or there is no such expert.
        """
        model, names = self._module(), self._sources.names
        if name not in names:
            raise InputError(f"expert: expected one of {', '.join(names)}, found {name!r}.", nearest(name, names))
        stored = self._sources.experts[names.index(name)]
        self._shown = None
        with torch.no_grad():
            for key, tensor in zip(self._sources.layout.tensors, self._tensors, strict=True):
                fill(tensor, stored.flat(key))
        self._restored()
        return model

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
            for parameter in self._places:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter in self._places:
                parameter.requires_grad_(False)
                parameter.grad = None

    @contextmanager
    def _handing_over(self, slopes: Slopes) -> Iterator[None]:
        """Have parameters give their gradients to ``slopes``: in the pass that follows, or at its end."""
        handles = []
        try:
            for parameter, name in self._places.items():
                hook = partial(_hand_over, slopes, name)
                handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
            yield
        finally:
            for handle in handles:
                handle.remove()
        for parameter, name in self._places.items():
            if parameter.grad is not None:  # that this loss does not depend on, but an earlier one
                _hand_over(slopes, name, parameter)

    def _module(self) -> nn.Module:
        if isinstance(self.model, nn.Module):
            return self.model
        raise InputError("gradient: expected a torch module, found a dict of tensors.", "Name an architecture.")

    def _restored(self) -> nn.Module | dict[str, Tensor]:
        """The model in evaluation mode, with its integer buffers as the checkpoint has them."""
        if isinstance(self.model, nn.Module) and self.model.training:  # an objective has left it so
            self.model.eval()
        for buffer, value in self._buffers:
            buffer.copy_(value)
        return self.model

    def _tie(self) -> None:
        """Have tied weights share memory even where the architecture does not."""
        for alias, kept in self._tied:
            alias.data = kept.data

    def not_finite(self) -> str:
        """Name of the first tensor that holds NaN or infinity now, or an empty string."""
        names = self._sources.layout.tensors
        broken = (n for n, t in zip(names, self._tensors, strict=True) if not bool(torch.isfinite(t).all()))
        return next(broken, "")


def _hand_over(slopes: Slopes, name: str, parameter: Tensor) -> None:
    assert parameter.grad is not None
    slopes.add(name, parameter.grad)
    parameter.grad = None


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
    tensors |= {name: value.to(device, copy=True) for name, value in sources.buffers().items()}
    return tensors | {alias: tensors[name] for alias, name in layout.aliases.items()}


def _with_kept_names(state: Mapping[str, Tensor], sources: Sources) -> dict[str, Tensor]:
    """``state`` with an entry for each kept name of a tied pair, whichever of the two the architecture uses."""
    pairs = {name: alias for alias, name in sources.layout.aliases.items()}
    extra = {name: state[alias] for name, alias in pairs.items() if name not in state and alias in state}
    return {**state, **extra}


def _check_state(state: Mapping[str, Tensor], sources: Sources) -> None:
    """Raise ``InputError`` unless the architecture has a place for each merged tensor, and no place stays empty."""
    layout = sources.layout
    for name, shape in zip(layout.tensors, layout.shapes, strict=True):
        if name not in state:
            raise InputError(
                f"architecture: expected a tensor {name!r} of shape {shape}, as the checkpoints have, found none.",
                nearest(name, list(state)),
            )
        if tuple(state[name].shape) != shape:
            found = tuple(state[name].shape)
            raise InputError(f"architecture: {name}: expected shape {shape}, as the checkpoints have, found {found}.")
    filled = {id(state[name]) for name in layout.tensors}
    for name, tensor in state.items():
        if tensor.is_floating_point() and name not in layout.aliases and id(tensor) not in filled:
            raise InputError(
                f"architecture: its tensor {name!r} of shape {tuple(tensor.shape)} is in no checkpoint.",
                nearest(name, layout.tensors),
            )
