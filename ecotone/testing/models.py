"""Tests that every kind of model must pass: checkpoints, adapters, and their wrappers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import ecotone.merging.memory
from ecotone.merging import operators
from ecotone.merging.export import export_file
from ecotone.merging.gradient import Slopes
from ecotone.merging.kernel.lazy import formed
from ecotone.merging.models import preflight
from ecotone.merging.models.checkpoint import Checkpoint
from ecotone.merging.models.model import Model, declared
from ecotone.merging.placement import Wish
from ecotone.merging.sources import Sources
from ecotone.populations.errors import InputError
from ecotone.populations.genome import Floats, Genome

CPU = torch.device("cpu")


class ModelSuite:
    """Tests of everything that merges need of a model. Define the fixtures ``model`` and ``base``, of the same layout.

    Example:
        >>> class TestHalved(ModelSuite):
        ...     @pytest.fixture
        ...     def base(self, tmp_path):
        ...         return Checkpoint.open(written(tmp_path / "base.safetensors"))
        ...
        ...     @pytest.fixture
        ...     def model(self, tmp_path):
        ...         return Halved(Checkpoint.open(written(tmp_path / "expert.safetensors")))
    """

    @pytest.fixture
    def model(self) -> Model:
        """The model under test."""
        raise NotImplementedError

    @pytest.fixture
    def base(self) -> Model:
        """Another model of the same layout; it may be a plain checkpoint."""
        raise NotImplementedError

    # -- its declarations -----------------------------------------------------------------------------------

    def test_it_says_all_that_a_model_must(self, model: Model) -> None:
        """Its class answers; nothing is left to the model in it unsaid."""
        assert declared(model) is model

    def test_headers_say_what_is_read(self, model: Model) -> None:
        """Shapes equal those of the headers. Types equal those of the headers, or are wider."""
        for name, info in model.tensors.items():
            flat = model.flat(name)
            assert tuple(model.tensor(name).shape) == info.shape, name
            assert flat.numel() == info.size, name
            assert flat.dtype == info.dtype or torch.promote_types(flat.dtype, info.dtype) == flat.dtype, name

    def test_a_record_is_plain_values(self, model: Model) -> None:
        """A record is read back from JSON as it was, and names the model."""
        record = model.record()
        assert json.loads(json.dumps(record)) == record
        assert record["name"] == model.name

    def test_another_name_changes_nothing_else(self, model: Model) -> None:
        """The same tensors, under the name that was asked for."""
        named = model.named("another")
        assert named.name == "another"
        assert named.path == model.path
        assert type(named) is type(model)
        for name in model.tensors:
            assert _same(named.tensor(name), model.tensor(name)), name

    def test_mergekit_is_given_files_that_hold_the_model_or_nothing(self, model: Model) -> None:
        """A reference without an adapter is that of files which hold the model; else it is refused in words."""
        reference, refusal = _reference(model)
        assert str(model.path) in refusal or str(model.files) in refusal or model.stored or "+" in reference
        for name in model.tensors if model.stored and reference else ():
            assert _same(Checkpoint.open(model.path).tensor(name), model.tensor(name)), name

    # -- how it is read --------------------------------------------------------------------------------------

    def test_pieces_have_the_bits_of_the_whole(self, model: Model) -> None:
        """However a tensor is cut, and however often it is read."""
        for name in model.tensors:
            whole, size = model.tensor(name).reshape(-1), model.tensors[name].size
            for low, high in {(0, size), (0, size // 2), (size // 3, size - size // 5), (size - 1, size)}:
                if 0 <= low < high:
                    piece = formed(model.flat(name)[low:high])
                    assert _same(piece, whole[low:high].to(piece.dtype)), (name, low, high)

    def test_a_holder_holds_what_is_read(self, model: Model) -> None:
        """The model that a tensor is said to be of has it, with the same bits."""
        for name in model.tensors:
            holder = model.holder(name)
            assert holder.holder(name) is holder
            assert _same(holder.tensor(name), model.tensor(name)), name

    def test_what_is_formed_whole_is_counted(self, model: Model) -> None:
        """A tensor that is new each time it is read takes memory."""
        for name, info in model.tensors.items():
            first, second = model.flat(name), model.flat(name)
            assert model.working_bytes(name) >= 0
            if isinstance(first, Tensor) and isinstance(second, Tensor) and info.size:
                fresh = first.data_ptr() != second.data_ptr()
                assert not fresh or model.working_bytes(name) >= info.nbytes, name

    # -- what is made of it ----------------------------------------------------------------------------------

    @pytest.fixture
    def sources(self, model: Model, base: Model) -> Sources:
        """The model as the one expert of a merge."""
        return _sources(model, base)

    def test_merges_are_those_of_its_tensors(self, sources: Sources, model: Model, base: Model) -> None:
        """``base + c (model - base)``, and with a coefficient of one the model itself."""
        alone = _merged(sources, 1.0)
        part = _merged(sources, 0.3)
        expert, start = _vector(model, sources), _vector(base, sources)
        np.testing.assert_allclose(alone, expert, rtol=1e-6)
        np.testing.assert_allclose(part, start + 0.3 * (expert - start), rtol=1e-4, atol=1e-5)

    def test_the_gram_table_is_of_its_task_vector(self, sources: Sources, model: Model, base: Model) -> None:
        """The squared length of ``model - base``."""
        found = sources.space().gram.between(np.array([0, sources.layout.size]))
        vector = _vector(model, sources) - _vector(base, sources)
        np.testing.assert_allclose(found, [[[vector @ vector]]], rtol=1e-6)

    def test_gradients_are_along_its_task_vector(self, sources: Sources, model: Model, base: Model) -> None:
        """``dL/dc = <dL/dtheta, model - base>``."""
        slopes = Slopes(sources, Genome.uniform(sources.layout.size, [0.3]))
        given = torch.randn(sources.layout.size, generator=torch.Generator().manual_seed(0))
        for name, gradient in sources.layout.views(given).items():
            slopes.add(name, gradient)
        vector = _vector(model, sources) - _vector(base, sources)
        scale = np.abs(given.numpy()) @ np.abs(vector)
        np.testing.assert_allclose(slopes.values, [[given.numpy() @ vector]], atol=1e-5 * scale)

    def test_bits_do_not_depend_on_where_it_is_kept(self, model: Model, base: Model) -> None:
        """Kept in memory or read for each merge, for an operator that changes the model, too."""
        for operator in ("task_arithmetic", "ties"):
            mapped, kept = (_merged(_sources(model, base, operator, wish), 0.7) for wish in ("mapped", "host"))
            assert (mapped == kept).all()

    def test_memory_counts_what_is_kept(self, model: Model, base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
        """Headers tell, to the byte, and no weight is read for that."""
        monkeypatch.setattr(ecotone.merging.memory, "RESIDENT_BYTES", 0)
        sources = _sources(model, base, wish="host")
        needs = sources.memory.needs(CPU)
        assert sources.held.loads == 0
        _merged(sources, 0.5)
        kept = {each.data_ptr(): each.nbytes for each in _kept(sources)}
        assert needs.sources["host"].host == sum(kept.values())
        working = max(model.working_bytes(name) + base.working_bytes(name) for name in sources.layout.tensors)
        assert needs.buffers.host >= working

    def test_an_export_holds_what_is_read(self, model: Model, base: Model, tmp_path: Path) -> None:
        """A merge that is the model alone is read back from its file as the model."""
        sources = _sources(model, base)
        target = export_file(sources, Genome.uniform(sources.layout.size, [1.0]), tmp_path / "merge.safetensors", {})
        again = Checkpoint.open(target)
        np.testing.assert_array_equal(_vector(again, sources), _merged(sources, 1.0, rounded=True))


def _reference(model: Model) -> tuple[str, str]:
    """How mergekit names a model, or else why it cannot."""
    try:
        return model.mergekit_reference(), ""
    except InputError as error:
        return "", error.message


def _sources(model: Model, base: Model, operator: str = "task_arithmetic", wish: Wish = "auto") -> Sources:
    layout = preflight.check([base, model])
    settings = {"density": 0.5} if operator == "ties" else {}
    return Sources(layout, operators.get(operator, settings), [model], base, wish)


def _merged(sources: Sources, coefficient: float, rounded: bool = False) -> Floats:
    """(n,) the merge with one coefficient, in the layout's types or in float64."""
    layout = sources.layout
    kinds = {name: info.dtype if rounded else torch.float64 for name, info in layout.parameters.items()}
    out = {name: torch.empty(info.shape, dtype=kinds[name]) for name, info in layout.parameters.items()}
    sources.materialise([Genome.uniform(layout.size, [coefficient])], [out])
    return np.concatenate([out[name].reshape(-1).double().numpy() for name in layout.tensors])


def _vector(model: Model, sources: Sources) -> Floats:
    """(n,) the model, flat, in float64."""
    return np.concatenate([model.tensor(name).reshape(-1).double().numpy() for name in sources.layout.tensors])


def _kept(sources: Sources) -> list[Tensor]:
    return [each for tensors in sources.held.kept.values() for flat in tensors.values() for each in flat]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type and bits."""
    return one.dtype == other.dtype and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.flatten().contiguous().view(torch.uint8)
