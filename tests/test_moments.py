"""Moments of linear layers against plain loops: per example, per label, by autograd on the weights."""

import pytest
import torch
from torch import nn

from ecotone.fitness.data import Examples
from ecotone.fitness.statistics.kinds import STATISTICS, Data
from ecotone.fitness.statistics.layers import input_rows, mask_of, observable_layers, output_rows


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3)).double().eval().requires_grad_(False)


class Tokens(nn.Module):
    """A model with a row of outputs for each token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(7, 4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7)

    def forward(self, input_ids, attention_mask):
        hidden = self.table(input_ids) * attention_mask.unsqueeze(-1)
        hidden = hidden + torch.tanh(self.mix(hidden)).cumsum(1)
        return self.out(hidden)


def gathered(kind: str, model: nn.Module, *tasks: Data, **settings: object) -> dict[str, torch.Tensor]:
    statistic = STATISTICS.get(kind, "kind")
    return dict(statistic(statistic.settings(**settings)).gather(model, tasks))


def data(rows: int, seed: int = 2) -> Data:
    return Data("t", Examples(torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed)).double()), None)


def test_inputs_are_second_moments_with_a_one_for_the_bias():
    model, task = net(), data(9)
    found = gathered("inputs", model, task, batch=4)
    hidden = model[1](model[0](task.examples.inputs))
    for name, rows in (("0", task.examples.inputs), ("2", hidden)):
        whole = torch.cat([rows, torch.ones(9, 1).double()], 1)
        torch.testing.assert_close(found[name], sum(torch.outer(x, x) for x in whole) / 9, rtol=1e-12, atol=1e-12)


def per_label(model: nn.Module, x: torch.Tensor) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """The probability of each label of an example, and the gradients of its log by all parameters."""
    parameters = dict(model.requires_grad_(True).named_parameters())
    found = []
    for label in range(3):
        likelihood = model(x.unsqueeze(0)).log_softmax(-1)[0, label]
        slopes = torch.autograd.grad(likelihood, list(parameters.values()))
        found.append((float(likelihood.detach().exp()), dict(zip(parameters, slopes, strict=True))))
    model.requires_grad_(False)
    return found


def test_slopes_and_fisher_are_the_expectations_under_the_models_own_predictions():
    model, task = net(), data(6)
    slopes = gathered("slopes", model, task, batch=4)
    fisher = gathered("fisher", model, task, batch=5)
    for name in ("0", "2"):
        moment, diagonal = 0, 0
        for x in task.examples.inputs:
            for share, gradients in per_label(model, x):
                slope = gradients[f"{name}.bias"]  # of one row the slope at the output
                weight = torch.cat([gradients[f"{name}.weight"], slope.unsqueeze(1)], 1)
                moment = moment + share * torch.outer(slope, slope) / 6
                diagonal = diagonal + share * weight.square() / 6
        torch.testing.assert_close(slopes[name], moment, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(fisher[name], diagonal, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["inputs", "slopes", "fisher"])
def test_statistics_of_all_examples_are_the_mean_of_those_of_two_halves(kind):
    model, task = net(), data(8)
    halves = [Data("t", task.examples.rows(torch.arange(low, low + 4)), None) for low in (0, 4)]
    whole = gathered(kind, model, task)
    first, second = (gathered(kind, model, half) for half in halves)
    together = gathered(kind, model, *halves)
    for name, values in whole.items():
        torch.testing.assert_close(values, (first[name] + second[name]) / 2, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(together[name], values, rtol=1e-10, atol=1e-12)


def texts(padding: int) -> Data:
    ids = torch.tensor([[1, 2, 3, 4], [5, 6, 1, 2]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    ids = torch.cat([ids, torch.zeros(2, padding, dtype=torch.int64)], 1)
    mask = torch.cat([mask, torch.zeros(2, padding, dtype=torch.int64)], 1)
    return Data("t", Examples({"input_ids": ids, "attention_mask": mask}), None)


@pytest.mark.parametrize("kind", ["inputs", "slopes", "fisher"])
def test_masked_tokens_count_for_nothing(kind):
    model = Tokens().double().eval().requires_grad_(False)
    settings = [{}] if kind == "inputs" else [{"passes": 3, "seed": 10 * seed} for seed in range(300)]
    plain, padded = (averaged(kind, model, texts(padding), settings) for padding in (0, 3))
    tolerance = 1e-12 if kind == "inputs" else 0.2  # other signs are drawn
    for name, values in plain.items():
        torch.testing.assert_close(padded[name], values, rtol=tolerance, atol=tolerance * float(values.abs().max()))
    assert set(plain) == {"mix", "out"}


def test_decoders_have_masks_of_their_own():
    tokens, decoder = torch.tensor([[1, 1, 0]]), torch.tensor([[1, 0, 0]])
    masks = mask_of({"input_ids": tokens, "attention_mask": tokens, "decoder_input_ids": tokens})
    assert masks.of("decoder.block.0.layer.0.SelfAttention.q") is None
    masks = mask_of({"attention_mask": tokens, "decoder_input_ids": tokens, "decoder_attention_mask": decoder})
    for name, expected in (
        ("encoder.block.0.layer.0.SelfAttention.q", tokens),
        ("decoder.block.0.layer.0.SelfAttention.k", decoder),
        ("decoder.block.0.layer.1.EncDecAttention.k", tokens),
        ("decoder.block.0.layer.1.EncDecAttention.q", decoder),
        ("model.decoder.layers.0.encoder_attn.v_proj", tokens),
    ):
        assert torch.equal(masks.of(name), expected != 0), name
    alone = mask_of({"input_ids": tokens, "attention_mask": tokens})
    assert torch.equal(alone.of("model.decoder.layers.0.self_attn.k_proj"), tokens != 0)  # OPT's layers
    assert torch.equal(alone.predictions, tokens != 0)


def averaged(kind, model, task, settings):
    found = [gathered(kind, model, task, **one) for one in settings]
    return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}


@pytest.mark.parametrize("passes", [1, 2])
def test_classes_that_share_a_pass_give_the_expectation_in_the_mean(passes):
    model, task = net(), data(5)
    exact = gathered("slopes", model, task, passes=100)
    some = averaged("slopes", model, task, [{"passes": passes, "seed": 10 * seed} for seed in range(400)])
    again = [gathered("slopes", model, task, passes=passes) for _ in range(2)]
    for name, values in exact.items():
        torch.testing.assert_close(some[name], values, rtol=0.1, atol=0.05 * float(values.abs().max()))
        assert torch.equal(again[0][name], again[1][name])
        assert not torch.equal(again[0][name], values)


@pytest.mark.slow
def test_tokens_are_told_apart_however_many_passes_there_are():
    """Losses of two tokens with the same sign would leave products of their slopes."""
    model, task = Tokens().double().eval().requires_grad_(False), texts(0)
    many = [{"passes": 100, "seed": 10 * seed} for seed in range(300)]
    few = [{"passes": 1, "seed": 10 * seed} for seed in range(3000)]
    one, other = averaged("slopes", model, task, many), averaged("slopes", model, task, few)
    for name, values in one.items():
        torch.testing.assert_close(other[name], values, rtol=0.2, atol=0.05 * float(values.abs().max()))


def test_the_model_is_as_before():
    model, task = net(), data(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for kind in ("inputs", "slopes", "fisher"):
        gathered(kind, model, task)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 2, stride=2), (5, 3, 7)),
        (nn.Conv2d(3, 4, (2, 3), stride=(1, 2), padding=(1, 0)), (5, 3, 6, 7)),
        (nn.Conv3d(2, 4, 2, padding=1), (3, 2, 3, 4, 5)),
    ],
    ids=["1d", "2d", "3d"],
)
def test_convolutions_are_matrices_on_patches(layer, shape):
    layer = layer.double().eval().requires_grad_(False)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    patches = input_rows(layer, values, None)
    made = output_rows(layer, layer(values), None)
    torch.testing.assert_close(patches @ layer.weight.flatten(1).mT + layer.bias, made)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(layer(values).flatten(1).shape[1], 3).double())
    found = {kind: gathered(kind, model.eval(), Data("t", Examples(values), None)) for kind in ("inputs", "slopes")}
    whole = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], 1)
    torch.testing.assert_close(found["inputs"]["0"], whole.mT @ whole / len(whole))
    assert found["slopes"]["0"].shape == (4, 4)


def test_other_convolutions_are_not_observed():
    layers = [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same")]
    assert observable_layers(nn.Sequential(*layers, nn.Conv2d(4, 4, 3))).keys() == {"3"}
