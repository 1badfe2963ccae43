"""Conversions that are traced: PyTorch itself, on the numbers of elements, moves them to the same places."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, revert_weight_conversion

from ecotone.merging.models import moves, names
from ecotone.merging.models.moves import Traced, UntracedError
from ecotone.merging.models.names import fitted
from ecotone.populations.errors import InputError


def content(traced, begins):
    """The numbers that a traced tensor stands for, where stored tensors count on from ``begins``."""
    found = torch.full(tuple(traced.shape), -1)
    for box in traced.boxes:
        part, here = found, torch.tensor(begins[box.source] + box.offset)
        for axis, side in enumerate(box.sides):
            part = part.narrow(axis, side.start, side.length)
            here = here.unsqueeze(-1) + torch.arange(side.length) * side.step
        assert bool((part == -1).all()), "boxes overlap"
        part.copy_(here)
    return found


def kind_of(name):
    """A family's class; skips where this version of transformers has none."""
    if not hasattr(transformers, FAMILIES[name].model):
        pytest.skip(f"transformers {transformers.__version__} has no {FAMILIES[name].model}")
    return getattr(transformers, FAMILIES[name].model)


def factors(number, count):
    """Ways of writing a number as so many factors."""
    if count == 1:
        return [(number,)]
    return [
        (one, *rest) for one in range(1, number + 1) if number % one == 0 for rest in factors(number // one, count - 1)
    ]


def step(tensors, draw):
    """An operation on a list of tensors, as a function, so that the same is done to two lists."""
    first = tensors[0]
    axis = draw(st.integers(0, first.dim() - 1))
    alike = all(one.shape == first.shape for one in tensors)
    kinds = ["transpose", "permute", "reshape", "chunk", "split", "unsqueeze", "select", "slice", "unbind", "clone"]
    kind = draw(st.sampled_from(kinds + (["stack", "cat"] * 3 if alike else [])))
    if kind == "stack":
        return lambda given: [torch.stack(given, axis)]
    if kind == "cat":
        return lambda given: [torch.cat(given, axis)]
    if kind == "transpose":
        other = draw(st.integers(0, first.dim() - 1))
        return lambda given: [given[0].transpose(axis, other).contiguous(), *given[1:]]
    if kind == "permute":
        order = draw(st.permutations(range(first.dim())))
        return lambda given: [given[0].permute(order), *given[1:]]
    if kind == "reshape":
        shape = draw(st.sampled_from(factors(first.numel(), draw(st.integers(1, 4)))))
        return lambda given: [given[0].reshape(shape), *given[1:]]
    if kind == "chunk":
        count = draw(st.integers(1, 3))
        return lambda given: [*torch.chunk(given[0], count, axis), *given[1:]]
    if kind == "split":
        cut = draw(st.integers(0, first.shape[axis] - 1))
        return lambda given: [*torch.split(given[0], [cut, given[0].shape[axis] - cut], axis)[cut == 0 :], *given[1:]]
    if kind == "unsqueeze":
        return lambda given: [given[0].unsqueeze(axis).squeeze(axis).unsqueeze(axis), *given[1:]]
    if kind == "select" and first.dim() > 1:
        place = draw(st.integers(-first.shape[axis], first.shape[axis] - 1))
        return lambda given: [given[0].select(axis, place), *given[1:]]
    if kind == "slice":
        start = draw(st.integers(0, first.shape[axis] - 1))
        return lambda given: [given[0].narrow(axis, start, given[0].shape[axis] - start), *given[1:]]
    if kind == "unbind" and first.dim() > 1:
        return lambda given: [*torch.unbind(given[0], axis), *given[1:]]
    return lambda given: [given[0].clone().detach(), *given[1:]]


SHAPES = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(1, 3), st.data())
def test_boxes_are_where_pytorch_moves_the_numbers(shape, count, data):
    size = math.prod(shape)
    counted = [torch.arange(size).view(shape) + number * size for number in range(count)]
    traced = [Traced.of(number, shape) for number in range(count)]
    for _ in range(data.draw(st.integers(1, 7))):
        run = step(counted, data.draw)
        counted, traced = run(counted), run(traced)
    for one, other in zip(counted, traced, strict=True):
        assert torch.equal(content(other, [number * size for number in range(count)]), one)


@settings(max_examples=80, deadline=None)
@given(SHAPES, st.integers(1, 3), st.data())
def test_places_are_those_that_counting_finds(shape, count, data):
    """Of a stack that is transposed and reshaped: a view where there is one, or else the same lists of positions."""
    size = math.prod(shape)
    counted = [torch.stack([torch.arange(size).view(shape) + number * size for number in range(count)])]
    traced = [torch.stack([Traced.of(number, shape) for number in range(count)])]
    for _ in range(data.draw(st.integers(0, 3))):
        order = data.draw(st.permutations(range(counted[0].dim())))
        new = data.draw(st.sampled_from(factors(count * size, data.draw(st.integers(1, 4)))))
        counted, traced = ([one[0].permute(order).reshape(new)] for one in (counted, traced))
    target = tuple(counted[0].shape)
    places = torch.empty(count * size, dtype=torch.int64)
    places[counted[0].reshape(-1)] = torch.arange(count * size)
    for number, own in enumerate(torch.split(places, size)):
        parts = [(box, target, 0) for box in traced[0].boxes if box.source == number]
        found = names._placed(shape, parts)
        expected = names._spot(own.view(shape), [target], [count * size])
        assert found.place in (expected.place, None)
        assert found.place is not None or len(parts) > 1 or expected.place is None
        assert places_of(found, shape, [target]) == places_of(expected, shape, [target])


def places_of(spot, shape, targets):
    """By the number of a target, (position here, position there) of each element of a member."""
    made = spot.named("member", shape, [str(number) for number in range(len(targets))])
    if isinstance(made, names.Place):
        whole = torch.arange(math.prod(targets[int(made.target)])).view(targets[int(made.target)])
        return {made.target: list(enumerate(made.of(whole).reshape(-1).tolist()))}
    pairs = {target: made.positions(target) for target in made.targets}
    return {target: sorted(zip(here.tolist(), there.tolist(), strict=True)) for target, (there, here) in pairs.items()}


def test_numbers_taken_twice_or_left_out_are_no_cover():
    box = moves.Box(0, 0, (moves.Side(0, 3, 4), moves.Side(0, 4, 1)))
    assert moves.covers([box], 12)
    assert moves.covers([replace(box, sides=(moves.Side(0, 4, 1), moves.Side(0, 3, 4)))], 12)
    assert not moves.covers([box], 11)
    assert not moves.covers([replace(box, sides=(moves.Side(0, 3, 3), moves.Side(0, 4, 1)))], 12)
    halves = [moves.Box(0, start, (moves.Side(0, 6, 1),)) for start in (0, 5)]
    assert not moves.covers(halves, 12)
    assert moves.covers([halves[0], replace(halves[1], offset=6)], 12)


@pytest.mark.parametrize("change", [lambda one: 2 * one, lambda one: one.flip(0), lambda one: one.half(), torch.sort])
def test_other_operations_are_not_traced(change):
    with pytest.raises(UntracedError, match="aten"):
        change(Traced.of(0, (4, 6)))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("qwen3_moe", "nomic_bert") else pytest.mark.slow) for name in FAMILIES],
)
def test_every_family_is_traced_to_the_places_that_counting_finds(name, monkeypatch):
    kind = kind_of(name)
    with torch.device("meta"):
        module = kind(kind.config_class(**FAMILIES[name].arguments))
    state = module.state_dict()
    shapes = {key: tuple(one.shape) for key, one in revert_weight_conversion(module, dict(state)).items()}
    groups, _ = names._grouped(module, shapes, {key: tuple(one.shape) for key, one in state.items()})
    for target, group in groups.items():
        if group.converter is None:
            continue
        traced = names._traced(module, target, group, [shapes[key] for key in group.members])
        for one, other in zip(traced, names._counted(module, target, group, shapes), strict=True):
            assert one.place == other.place
    whole = {key: tuple(one.shape) for key, one in state.items()}
    expected = fitted(module, shapes)
    monkeypatch.setattr(names, "_traced", untraced)
    counted = fitted(module, shapes)
    assert counted.places == expected.places
    assert counted.scattered.keys() == expected.scattered.keys()
    for key, one in counted.scattered.items():
        assert one.targets == expected.scattered[key].targets
        for target in one.targets:
            assert one.parts[target][0].max() < math.prod(whole[target])
            order = expected.scattered[key].positions(target)
            pairs = sorted(zip(order[1].tolist(), order[0].tolist(), strict=True))
            assert pairs == list(zip(one.parts[target][1].tolist(), one.parts[target][0].tolist(), strict=True))


def untraced(*_):
    raise UntracedError("a reason")


@pytest.mark.parametrize("name", ["qwen3_moe", "nomic_bert"])
def test_inference_mode_changes_nothing(name, monkeypatch):
    monkeypatch.setattr(names, "COUNTED", 0)
    kind = kind_of(name)
    with torch.device("meta"):
        module = kind(kind.config_class(**FAMILIES[name].arguments))
    shapes = {key: tuple(one.shape) for key, one in revert_weight_conversion(module, module.state_dict()).items()}
    found = fitted(module, shapes)
    with torch.inference_mode():
        assert fitted(module, shapes).places == found.places
    assert found.places


def test_a_layer_of_256_large_experts():
    """11 billion numbers: counting them would take 300 gigabytes."""
    config = transformers.DeepseekV3Config(num_hidden_layers=2, first_k_dense_replace=1)
    with torch.device("meta"):
        module = transformers.DeepseekV3ForCausalLM(config)
    state = module.state_dict()
    shapes = {key: tuple(one.shape) for key, one in revert_weight_conversion(module, dict(state)).items()}
    found = fitted(module, shapes)
    experts = "model.layers.1.mlp.experts"
    up, down = (found.places[f"{experts}.255.{part}_proj.weight"] for part in ("up", "down"))
    assert (up.target, up.shape, up.stride) == (f"{experts}.gate_up_proj", (2048, 7168), (7168, 1))
    assert up.offset == (255 * 4096 + 2048) * 7168
    assert (down.target, down.stride, down.offset) == (f"{experts}.down_proj", (2048, 1), 255 * 7168 * 2048)


@pytest.mark.skipif(transformers.__version__.startswith("5.0."), reason="does not take this converter")
def test_what_can_neither_be_traced_nor_counted_is_refused(monkeypatch):
    class Flipped(Transpose):
        def convert(self, tensors, *args, **kwargs):
            made = super().convert(tensors, *args, **kwargs)
            return {name: one.flip(0) for name, one in made.items()}

    with torch.device("meta"):
        module = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FAMILIES["llama"].arguments))
    shapes = {name: tuple(one.shape) for name, one in module.state_dict().items()}
    converter = WeightConverter("self_attn.o_proj.weight", "self_attn.o_proj.weight", [Flipped(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda model: [converter])
    name = "model.layers.0.self_attn.o_proj.weight"
    assert fitted(module, shapes).scattered.keys() >= {name}
    monkeypatch.setattr(names, "COUNTED", 1000)
    with pytest.raises(InputError, match=rf"moves the numbers of {name} .*aten\.flip.* 1,024 numbers are too many"):
        fitted(module, shapes)
