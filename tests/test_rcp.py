"""RCP-Merging: gradients of single examples against torch.func, votes against the formulas, and what is refused."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ecotone.fitness.data import Examples
from ecotone.fitness.gradients.calibration import CrossEntropyLossSettings, EntropyLossSettings
from ecotone.fitness.preparing.prepare import basis_of
from ecotone.fitness.preparing.votes import gradients, importance, loss_of
from ecotone.fitness.specs import WorkerSpec
from ecotone.fitness.statistics.kinds import Data
from ecotone.merging import operators
from ecotone.populations.errors import InputError
from ecotone.settings import Call

NAMES = ("reason", "domain")


def net(seed=None):
    """Two layers that the data reach, and one that they do not."""
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        model = nn.ModuleDict({"first": nn.Linear(4, 5), "last": nn.Linear(5, 3), "unused": nn.Linear(2, 2)})
    model.forward = lambda inputs: model["last"](torch.tanh(model["first"](inputs)))
    return model.double()


def labelled(name, count=9):
    generator = torch.Generator().manual_seed(NAMES.index(name))
    return torch.randn(count, 4, generator=generator).double(), torch.randint(3, (count,), generator=generator)


@pytest.fixture
def spec(tmp_path, monkeypatch):
    monkeypatch.setenv("ECOTONE_CACHE", str(tmp_path / "cache"))
    base = net(1).state_dict()
    save_file(base, tmp_path / "base.safetensors")
    for number, name in enumerate(NAMES, 2):
        other = net(number).state_dict()
        save_file({k: v + 0.5 * (other[k] - v) for k, v in base.items()}, tmp_path / f"{name}.safetensors")
    tasks = tuple(
        CrossEntropyLossSettings(name=name, data=Call(call=f"{__file__}:labelled", arguments={"name": name}))
        for name in NAMES
    )
    experts = tuple(str(tmp_path / f"{name}.safetensors") for name in NAMES)
    base_path = str(tmp_path / "base.safetensors")
    return WorkerSpec(experts, base_path, "rcp", architecture=Call(call=f"{__file__}:net"), calibration=tasks)


def states(spec):
    return [load_file(path) for path in (spec.base, *spec.experts)]


def vectors(spec, **settings):
    reason, domain = basis_of(replace(spec, settings=settings)).models()
    return [{key: one.tensor(key) for key in one.tensors} for one in (reason, domain)]


def each_gradient(state, inputs, labels):
    """By tensor, (n, ...) gradients of the cross-entropy of each example, written out for the two layers."""
    first, last = (torch.cat([state[f"{n}.weight"], state[f"{n}.bias"][:, None]], 1) for n in ("first", "last"))
    ones = torch.ones(len(inputs), 1).double()
    x = torch.cat([inputs, ones], 1)
    hidden = torch.tanh(x @ first.mT)
    z = torch.cat([hidden, ones], 1)
    above = torch.softmax(z @ last.mT, 1) - nn.functional.one_hot(labels, 3)
    below = above @ last[:, :-1] * (1 - hidden**2)
    found = {key: torch.zeros(len(x), *value.shape).double() for key, value in state.items()}
    for name, slope, given in (("first", below, x), ("last", above, z)):
        whole = slope[:, :, None] * given[:, None]
        found |= {f"{name}.weight": whole[..., :-1], f"{name}.bias": whole[..., -1]}
    return found


@pytest.mark.parametrize(("strength", "threshold"), [(0.0, 0), (3.0, 0), (30.0, 0), (3.0, 2)])
def test_changes_are_taken_where_the_examples_of_the_domain_outvote_the_reasoning_model(spec, strength, threshold):
    base, reason, domain = states(spec)
    found = vectors(spec, strength=strength, threshold=threshold)
    rests = {key: ((one * reason[key]) ** 2).mean(0) for key, one in each_gradient(reason, *labelled("reason")).items()}
    slopes, shares = each_gradient(domain, *labelled("domain")), []
    for key, value in base.items():
        against = slopes[key] * domain[key] + strength * rests[key] * (reason[key] - domain[key]) ** 2
        votes = torch.where(against <= 0, 1, -1).sum(0)
        expected = torch.where(votes > threshold, domain[key] - value, 0.0)
        torch.testing.assert_close(found[1][key], expected)
        torch.testing.assert_close(found[0][key], reason[key] - value)
        shares.append((votes > threshold).double())
    assert 0 < torch.cat([one.flatten() for one in shares if not bool(one.all())]).mean() < 0.7


def test_the_stronger_the_prior_the_less_is_taken_and_in_the_end_nothing(spec):
    taken = []
    for strength in (0.0, 1.0, 30.0, 1e3, 1e15):
        domain = vectors(spec, strength=strength)[1]
        taken.append({key: one != 0 for key, one in domain.items() if not key.startswith("unused")})
    for fewer, more in zip(taken[1:], taken, strict=False):
        assert all(bool((more[key] | ~fewer[key]).all()) for key in more)
    assert [sum(int(one.sum()) for one in each.values()) for each in (taken[0], taken[-1])][1] == 0
    assert any(bool(one.any()) for one in taken[0].values())


def test_a_domain_model_that_is_the_base_leaves_the_reasoning_model(spec):
    same = replace(spec, experts=(spec.experts[0], spec.base), names=NAMES)
    base, reason, _ = states(spec)
    one, other = vectors(same)
    assert all(torch.equal(one[key], reason[key] - base[key]) and not other[key].any() for key in base)


def test_the_reasoning_model_may_be_named(spec):
    turned = vectors(replace(spec, experts=spec.experts[::-1]), reasoning="reason", strength=3.0)[::-1]
    for one, other in zip(vectors(spec, strength=3.0), turned, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_differentiating_leaves_the_module_as_it_was():
    model = net().requires_grad_(False)
    inputs, labels = labelled("domain")
    task = Data("domain", Examples(inputs, labels), None)
    mean = importance(model, [task])
    assert not any(one.requires_grad or one.grad is not None for one in model.parameters())
    halves = [importance(model, [Data("d", Examples(inputs[s], labels[s]), None)]) for s in (slice(0, 4), slice(4, 8))]
    whole = importance(model, [Data("d", Examples(inputs[:8], labels[:8]), None)])
    for name, one in whole.items():
        torch.testing.assert_close(one, (halves[0][name] + halves[1][name]) / 2)
    assert mean["unused.weight"].count_nonzero() == 0
    assert "unused.weight" not in next(gradients(model, [task]))


def test_the_label_of_a_text_is_its_next_token_and_masked_tokens_do_not_count():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(5, 5)

        def forward(self, input_ids, attention_mask):
            return self.table(input_ids)

    model, tokens = Language().double(), torch.tensor([[1, 3, 2, 0]])
    example = Examples({"input_ids": tokens, "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    said = model.table.weight.log_softmax(-1)
    expected = -(said[1, 3] + said[3, 2]) / 2
    torch.testing.assert_close(loss_of(model, example, Data("d", example, None)), expected)


def test_labels_count_for_the_basis(spec):
    first = basis_of(spec).key
    tasks = [
        CrossEntropyLossSettings(name=name, data=Call(call=f"{__file__}:others", arguments={"name": name}))
        for name in NAMES
    ]
    assert basis_of(replace(spec, calibration=tuple(tasks))).key != first


def others(name):
    inputs, labels = labelled(name)
    return inputs, (labels + 1) % 3


def test_what_it_cannot_merge_is_refused(spec):
    unlabelled = EntropyLossSettings(
        name="domain", data=Call(call=f"{__file__}:labelled", arguments={"name": "domain"})
    )
    with pytest.raises(InputError, match="calibration 'domain': the operator rcp reads labelled examples"):
        basis_of(replace(spec, calibration=(spec.calibration[0], unlabelled)))
    with pytest.raises(InputError, match="found none for 'domain'") as caught:
        basis_of(replace(spec, calibration=spec.calibration[:1]))
    assert "with labels" in caught.value.remedy
    with pytest.raises(InputError, match=r"merge.reasoning: expected one of reason, domain, found 'thinker'"):
        basis_of(replace(spec, settings={"reasoning": "thinker"}))
    with pytest.raises(InputError, match="rcp merges a reasoning model and a domain model, found 3 experts"):
        operators.get("rcp").columns(["a", "b", "c"])
