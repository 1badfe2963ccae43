"""Log-probabilities of tokens: logits of any size are normalised."""

from __future__ import annotations

import pytest
import torch

from ecotone.fitness.language.likelihoods import _normalisers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_normalisers_of_logits_of_any_size(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(300, 2000, generator=generator, dtype=torch.float64)
    logits[1] += 1000
    logits[2] -= 1000
    logits[3] *= 1000
    logits[4, 5] = float("nan")
    logits[5, 6] = float("inf")
    logits[6] = -float("inf")
    logits[7, 8:] = -float("inf")
    logits = logits.to(dtype)
    found, expected = _normalisers(logits), logits.double().logsumexp(-1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_a_row_is_normalised_to_the_same_bits_wherever_it_stands() -> None:
    logits = 4 * torch.randn(70, 8000, generator=torch.Generator().manual_seed(1))
    whole = _normalisers(logits)
    assert torch.equal(whole[33:41], _normalisers(logits[33:41]))
    assert torch.equal(whole[13], _normalisers(logits[13:14])[0])
