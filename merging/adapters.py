"""Merges of adapters as adapters.

Where every expert is its base and a low-rank update, and the weights over base and experts sum to one, a merge is

    base + sum_k c_k scale_k B_k A_k  =  base + [c_1 scale_1 B_1 | c_2 scale_2 B_2 | ...] [A_1; A_2; ...]

so it is an adapter whose rank is the sum of the ranks, exactly. Coefficients that change from row to row scale rows of
the left factor; a border inside a row adds one to the rank. The product is cut to a lower rank by its singular values,
which are found from the factors' QR decompositions: the matrix itself is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ecotone.merging.adapter_groups import AS_CHECKPOINT, Changed, Group
from ecotone.merging.kernel.materialise import Mixture, mix
from ecotone.merging.models import hub
from ecotone.merging.models.lora import Adapter
from ecotone.merging.models.lora_changes import Part, Update
from ecotone.merging.models.lora_names import Target
from ecotone.merging.models.matching import Renamed
from ecotone.merging.models.model import Model
from ecotone.merging.models.ties import tied_embedding
from ecotone.merging.operators.base import Operator
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome

if TYPE_CHECKING:
    from ecotone.merging.sources import Sources

SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""

_ROUNDING = 1e-9  # relative errors below it are those of float64
_SUM = 1e-6  # how far weights over base and experts may be from a sum of one


@dataclass(frozen=True)
class MergedAdapter:
    """A merge as PEFT stores an adapter.

    Args:
        tensors: By PEFT's name, the tensors of ``adapter_model.safetensors``.
        config: The ``adapter_config.json``.
        rank: The rank of all modules; factors of a lower one are filled with zeros.
        errors: By module, the relative error of its update in the Frobenius norm; 0 where it is exact.
        notes: Notes for the user, a sentence each.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    rank: int
    errors: Mapping[str, float]
    notes: tuple[str, ...]

    def on(self, base: Model) -> Adapter:
        """The adapter, in memory, on its base."""
        return Adapter.of(self.tensors, self.config, base)

    @property
    def exact(self) -> bool:
        """Whether nothing was cut off."""
        return not any(self.errors.values())

    def record(self) -> dict[str, Any]:
        """Rank, errors and notes as plain values."""
        return {"rank": self.rank, "errors": dict(self.errors), "notes": list(self.notes)}


def merged_adapter(sources: Sources, genome: Genome, rank: int | None = None) -> MergedAdapter:
    """A merge of adapters as an adapter of their base.

    Args:
        sources: The models: adapters of one base.
        genome: The merge.
        rank: The highest rank of a module; None for as many as are needed.

    Raises:
        InputError: The merge is no adapter: the operator changes the experts, an expert is a full model, the base is
            scaled, or an update is not low-rank. The message says which.
    """
    return _Merging(sources.tuned(genome), genome, rank).merged()


def check_operator(operator: Operator) -> None:
    """Refuse an operator that changes adapters before they are mixed.

    Raises:
        InputError: It does.
    """
    if operator.changes:
        raise InputError(
            f"merge.operator: {operator.name!r} changes the experts before they are mixed, element by element: the "
            "merge of adapters is then of full rank.",
            "Export a checkpoint instead, or merge with task_arithmetic or linear.",
        )


def check_rank(operator: Operator, changed: Changed) -> None:
    """Refuse what has merges that are no adapters, for searches that score merges cut to a rank.

    Args:
        operator: The operator.
        changed: What the adapters change.

    Raises:
        InputError: There are such merges; the message says why.
    """
    check_operator(operator)
    experts = len(changed.adapters)
    some = np.vstack([np.zeros(experts), np.eye(experts)])
    if operator.geometry is not None or not operator.affine or (operator.weights(some).sum(axis=1) != 1).any():
        raise InputError(
            f"merge.rank: expected an operator whose weights over base and experts always sum to one, found "
            f"{operator.name!r}: its merges of adapters are no adapters.",
            "Use task_arithmetic.",
        )
    for group in changed.groups:
        _, _, columns = changed.shape(group)
        for name, parts in group.parts.items():
            if parts is None or not all(_of_whole_rows(part, columns) for part in parts):
                raise InputError(
                    f"merge.rank: {name!r} is no run of rows of the module's {group.target!r}, which adapters change: "
                    "merges with borders inside it are no adapters.",
                    "Leave rank out, and cut the export of one merge (--rank).",
                )


@dataclass(frozen=True, eq=False)
class _Product:
    """``left @ right`` of one matrix, in float64."""

    left: Tensor
    right: Tensor
    lost: float = 0.0
    """The squares of what was cut off, summed."""

    @property
    def rank(self) -> int:
        return int(self.left.shape[1])

    @property
    def squares(self) -> float:
        """The squares of all elements, summed, and of what was cut off."""
        return self.lost + float(((self.left.T @ self.left) * (self.right @ self.right.T)).sum())

    def cut(self, rank: int) -> _Product:
        """The nearest product of at most that rank."""
        if self.rank <= rank:
            return self
        q_left, r_left = torch.linalg.qr(self.left)
        q_right, r_right = torch.linalg.qr(self.right.T)
        u, values, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        root, lost = values[:rank].sqrt(), float(values[rank:].square().sum())
        return _Product((q_left @ u[:, :rank]) * root, root[:, None] * (q_right @ v[:rank].T).T, lost)


class _Merging:
    """Makes one adapter."""

    def __init__(self, sources: Sources, genome: Genome, rank: int | None) -> None:
        self.sources, self.rank, self.changed = sources, rank, sources.changed
        self.adapters, self.base = self.changed.adapters, self.changed.base
        check_operator(sources.operator)
        if genome.residual is not None:
            raise InputError(
                "genome: expected coefficients of models, found whole weights that were evolved.", AS_CHECKPOINT
            )
        self.mixture: Mixture = sources.mixture(genome)
        self._check_base_weight()

    def _check_base_weight(self) -> None:
        sums = self.mixture.weights.sum(axis=1)
        wrong = np.flatnonzero(abs(sums - 1) > _SUM)
        if len(wrong):
            raise InputError(
                f"genome: a merge is an adapter where weights over base and experts sum to one, found "
                f"{sums[wrong[0]]:.6g}: it scales the base.",
                "Export a checkpoint instead, or merge with task_arithmetic, whose weights always do.",
            )

    # -- low-rank updates --------------------------------------------------------------------------------------

    def _products(self, group: Group) -> list[_Product]:
        """The merged update of each expert of a module's tensor."""
        experts, rows, columns = self.changed.shape(group)
        if group.normed:
            return [self._dense(group, rows, columns)]
        coefficients, extra = self._coefficients(group, experts, rows)
        products = []
        for expert in range(experts):
            lefts, rights = [], []
            for number, update in group.updates.items():
                scales = coefficients[expert, :, number]
                if scales.any():
                    left, right = self._factors(number, update, expert)
                    lefts.append(torch.from_numpy(scales)[:, None] * left)
                    rights.append(right)
            for row, begin, change in extra.get(expert, ()):
                lefts.append(torch.zeros(rows, 1, dtype=torch.float64))
                lefts[-1][row] = 1
                vector = torch.zeros(1, columns, dtype=torch.float64)
                for number, update in group.updates.items():
                    left, right = self._factors(number, update, expert)
                    vector[0, begin:] += change[number] * (left[row] @ right[:, begin:])
                rights.append(vector)
            nothing = [torch.zeros(rows, 0, dtype=torch.float64), torch.zeros(0, columns, dtype=torch.float64)]
            products.append(_Product(torch.cat([nothing[0], *lefts], 1), torch.cat([nothing[1], *rights])))
        return products

    def _factors(self, number: int, update: Update, expert: int) -> tuple[Tensor, Tensor]:
        return update.factors(self.adapters[number].weights, torch.float64, expert)

    def _dense(self, group: Group, rows: int, columns: int) -> _Product:
        """The merged update of a matrix that is no low-rank one: all of it, cut by the caller."""
        if self.rank is None:
            raise InputError(
                f"models.experts: the update of {group.target!r} is that of a DoRA adapter, which is of full rank.",
                "Cut it to a rank (--rank), and see the error; or export a checkpoint.",
            )
        (name,) = group.parts
        base = self.base.tensor(name).double().reshape(rows, columns)
        delta = self._merged(name).double().reshape(rows, columns) - base
        if rows < columns:
            return _Product(torch.eye(rows, dtype=torch.float64), delta)
        return _Product(delta, torch.eye(columns, dtype=torch.float64))

    def _coefficients(
        self, group: Group, experts: int, rows: int
    ) -> tuple[Floats, dict[int, list[tuple[int, int, Floats]]]]:
        """(E, R, K) coefficients of the rows of a module's tensor, and what changes within rows.

        The latter is, by expert, the row, the column from which on coefficients are others, and (K,) by how much.
        """
        table = np.full((experts, rows, len(self.adapters)), np.nan)
        extra: dict[int, list[tuple[int, int, Floats]]] = {}
        columns = self.changed.shape(group)[2]
        for name, parts in group.parts.items():
            pieces = self._pieces(name)
            if len(pieces) == 1:
                for part in parts or tuple(Part(expert) for expert in range(experts)):
                    self._set(table, part, pieces[0][1], name)
                continue
            if parts is None or not all(_of_whole_rows(part, columns) for part in parts):
                raise InputError(
                    f"genome: split points inside {name!r}, which is no run of rows of the module's {group.target!r}.",
                    "Merge with borders at tensors (granularity), or export a checkpoint.",
                )
            where = [(part.expert, row) for part in parts for row in range(*part.rows.indices(rows))]
            ends = [begin for begin, _ in pieces[1:]] + [columns * len(where)]
            before = pieces[0][1]
            for (begin, row_of), end in zip(pieces, ends, strict=True):
                first, within = divmod(begin, columns)
                if within:
                    extra.setdefault(where[first][0], []).append((where[first][1], within, row_of - before))
                for expert, row in where[-(-begin // columns) : -(-end // columns)]:
                    table[expert, row] = row_of
                before = row_of
        assert not np.isnan(table).any()
        return table, extra

    def _set(self, table: Floats, part: Part, row: Floats, name: str) -> None:
        place = table[part.expert, part.rows]
        if not np.isnan(place).all() and not (place == row).all():
            raise InputError(
                f"genome: {name!r} and the tensors beside it in one module's tensor have different coefficients.",
                AS_CHECKPOINT,
            )
        table[part.expert, part.rows] = row

    def _pieces(self, name: str) -> list[tuple[int, Floats]]:
        """Where in a tensor coefficients (K,) begin to be others, and what they are then."""
        layout, experts = self.sources.layout, len(self.adapters)
        if name in layout.kept:  # the base's in every merge
            return [(0, np.zeros(experts))]
        start, stop = layout.span(name)
        segments, borders = self.mixture.between(start, stop)
        rows = self.mixture.weights[segments][:, -experts:]
        pieces = [(int(border), row) for border, row in zip(borders[:-1], rows, strict=True)]
        return [pieces[0], *(two for one, two in pairwise(pieces) if (one[1] != two[1]).any())]

    def _merged(self, name: str) -> Tensor:
        """The merged tensor, in the type of the layout but at least in float32."""
        info = self.sources.layout.parameters[name]
        kind = torch.float64 if info.dtype == torch.float64 else torch.float32
        flat = torch.empty(info.size, dtype=kind)
        start, _ = self.sources.layout.span(name)
        mix(self.sources.stretch(name), start, [self.mixture], [flat], self.sources.large)
        return flat.view(info.shape)

    # -- as PEFT stores them -----------------------------------------------------------------------------------

    def merged(self) -> MergedAdapter:
        """The adapter."""
        products, errors = [], {}
        for group in self.changed.groups:
            _, rows, columns = self.changed.shape(group)
            most = min(rows, columns) if self.rank is None else min(rows, columns, self.rank)
            with _one_thread():
                cut = [product.cut(most) for product in self._products(group)]
            products.append(cut)
            errors[group.target] = _error(cut)
        rank = max((one.rank for cut in products for one in cut), default=1) or 1
        tensors: dict[str, Tensor] = {}
        for group, cut in zip(self.changed.groups, products, strict=True):
            tensors |= self._stored(group, cut, rank)
        saved, biases = self._whole_tensors()
        tensors |= saved | biases
        for name, (_, tokens) in self.changed.rows.items():
            tensors[f"{self._module(name)}.token_adapter.trainable_tokens_delta"] = self._merged(name)[sorted(tokens)]
        config = self._config(rank, sorted({key.rpartition(".")[0] for key in saved}), bool(biases))
        ours = {f"base_model.model.{key}": tensor.contiguous() for key, tensor in tensors.items()}
        return MergedAdapter(ours, config, rank, errors, tuple(self._notes(rank, config, errors)))

    def _stored(self, group: Group, cut: Sequence[_Product], rank: int) -> dict[str, Tensor]:
        """The factors of one module, filled up to the rank of all."""
        number, update = next(iter(group.updates.items()))
        weights = self.adapters[number].weights
        kind = torch.float64 if self.base.tensors[next(iter(group.parts))].dtype == torch.float64 else torch.float32
        firsts, seconds = [], []
        for one in cut:
            left, right = (one.right.T, one.left.T) if update.transposed else (one.left, one.right)
            more = rank - one.rank
            firsts.append(torch.nn.functional.pad(right, (0, 0, 0, more)))  # A: (r, C)
            seconds.append(torch.nn.functional.pad(left, (0, more)))  # B: (R, r)
        a = torch.cat(firsts).to(kind)
        b = torch.stack(seconds, dim=-1).flatten(1).to(kind)
        a = a.view(len(a), *weights.tensors[update.a].shape[1:])
        b = b.view(*b.shape, *weights.tensors[update.b].shape[2:])
        module = self._wrapped(group)
        if ".lora_embedding_A" in update.a:
            return {f"{module}.lora_embedding_A": a, f"{module}.lora_embedding_B": b}
        return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}

    def _wrapped(self, group: Group) -> str:
        """PEFT's name of the module; it wraps one once for each parameter that is chosen, the first innermost."""
        update = next(iter(group.updates.values()))
        if not group.parameter:
            return update.module.replace(".base_layer", "")
        module, _, _ = update.target.rpartition(".")
        names, _ = self.changed.targets.parameters(module, [one.target for one in self.changed.groups if one.parameter])
        return module + ".base_layer" * (len(names) - 1 - names.index(update.target))

    def _module(self, name: str) -> str:
        target = self.changed.whole.get(name) or self.changed.rows[name][0]
        return target.rpartition(".")[0]

    def _whole_tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tensors of modules that are stored whole, and biases."""
        saved: dict[str, Tensor] = {}
        biases: dict[str, Tensor] = {}
        wrapped = {self._wrapped(group) for group in self.changed.groups}
        tied = tied_embedding(self.base)
        for name, target in self.changed.whole.items():
            if name == tied:
                raise InputError(
                    f"models.experts: {name!r} is merged whole, and is tied to the output: PEFT would untie them.",
                    AS_CHECKPOINT,
                )
            module = self._module(name)
            if target.endswith(".bias") and f"{module}.weight" not in self.changed.whole.values():
                biases[f"{module}.base_layer.bias" if module in wrapped else target] = self._merged(name)
            else:
                for beside in self.changed.targets.beside(target):
                    saved[beside.name] = self._merged(self._single(beside))
        return saved, biases

    def _single(self, target: Target) -> str:
        if target.whole is None:
            raise InputError(f"models.experts: {target.name!r} is stored in several tensors.", AS_CHECKPOINT)
        return target.whole

    def _config(self, rank: int, saved: Sequence[str], biases: bool) -> dict[str, Any]:
        first = self.adapters[0].settings
        parameters = [group.target for group in self.changed.groups if group.parameter]
        modules = [self._wrapped(group) for group in self.changed.groups if not group.parameter]
        tokens: Any = {self._module(name): sorted(numbers) for name, (_, numbers) in self.changed.rows.items()}
        if len(tokens) == 1 and tied_embedding(self.base):
            tokens = next(iter(tokens.values()))
        name, revision = _named(self.base.path)
        return {
            "peft_type": "LORA",
            "auto_mapping": first.get("auto_mapping"),
            "task_type": first.get("task_type"),
            "base_model_name_or_path": name,
            "revision": revision,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": bool(first.get("fan_in_fan_out")),
            "bias": "all" if biases else "none",
            "init_lora_weights": True,
            "target_modules": modules,
            "target_parameters": parameters or None,
            "modules_to_save": list(saved) or None,
            "trainable_token_indices": tokens or None,
        }

    def _notes(self, rank: int, config: Mapping[str, Any], errors: Mapping[str, float]) -> Iterator[str]:
        if any(errors.values()):
            worst = max(errors, key=lambda name: errors[name])
            yield f"Cut to rank {rank}: the largest relative error of an update is {errors[worst]:.3g}, of {worst}."
        else:
            yield f"It is the merge exactly, in rank {rank}."
        if isinstance(self.base, Renamed):  # a tied one, as it is read beside adapters that untie it
            yield "Serve it beside its base, which is tied: merged into it, the adapter would change both tied tensors."
        fields = ("modules_to_save", "trainable_token_indices", "target_parameters")
        refused = [name for name in fields if config[name]] + ["bias"] * (config["bias"] != "none")
        least = next((one for one in SERVED_RANKS if one >= rank), None)
        if refused:
            yield f"vLLM does not take it: it has {', '.join(refused)}."
        elif least is None:
            yield f"vLLM does not take it: its ranks end at {SERVED_RANKS[-1]}. Cut it with --rank {SERVED_RANKS[-1]}."
        else:
            yield f"vLLM takes it with --max-lora-rank {least}."


def _error(cut: Sequence[_Product]) -> float:
    """What was cut off, relative to all of it, in the Frobenius norm."""
    lost = sum(one.lost for one in cut)
    error = math.sqrt(lost / sum(one.squares for one in cut)) if lost else 0.0
    return error if error > _ROUNDING else 0.0


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompositions have other bits with other numbers of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _of_whole_rows(part: Part, columns: int) -> bool:
    """Whether a part is a run of rows of a matrix, as they are."""
    return not part.flipped and part.columns.indices(columns) == (0, columns, 1)


def _named(path: Path) -> tuple[str, str | None]:
    """The name and revision by which PEFT finds a base: of the hub's cache, or its path."""
    repository = hub.repository_of(path)
    return (repository, path.name) if repository else (str(path.absolute()), None)
