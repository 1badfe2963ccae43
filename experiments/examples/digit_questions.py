"""Four questions about an 8x8 digit, for searches over encoders that share frozen heads: is it odd? Above four? What
remains when it is divided by three? Does its shape enclose a space (0, 6, 8, 9)?

A small encoder learns to draw the images again and is the base. Each question has a head, a logistic regression on
the base's features, which stays as it is while an expert is tuned from the base for that question. So base, experts
and merges share the heads, as in AdaMerging (Yang et al. 2024, arXiv:2310.02575). The images are scikit-learn's, split
as in ``ecotone.experiments.examples.digits:shuffled``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecotone.experiments.examples.digits import Split, fit, one_thread, shuffled
from ecotone.experiments.examples.linear_heads import fit_head
from ecotone.populations.errors import InputError, nearest

Question: TypeAlias = Literal["odd", "above_four", "remainder", "enclosed"]
ANSWERS: dict[Question, tuple[int, ...]] = {  # of the digits 0 to 9
    "odd": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "above_four": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "remainder": (0, 1, 2, 0, 1, 2, 0, 1, 2, 0),
    "enclosed": (1, 0, 0, 0, 0, 0, 1, 0, 1, 1),
}
FEATURES = 64


def encoder(hidden: int = 128) -> nn.Sequential:
    """A perceptron from 64 pixels to 64 features."""
    return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, FEATURES), nn.ReLU())


def answered(question: Question, part: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (N, 64) with pixels 0 to 1, and answers (N,).

    Raises:
        InputError: There is no such question or part.
    """
    if question not in ANSWERS:
        raise InputError(
            f"question: expected one of {', '.join(ANSWERS)}, found {question!r}.", nearest(question, tuple(ANSWERS))
        )
    images, digits = shuffled(part)
    return images, np.array(ANSWERS[question])[digits]


def images(part: Split) -> NDArray[np.float32]:
    """The images (N, 64) alone."""
    return shuffled(part)[0]


class Head(nn.Module):
    """Logits (n, C) from an encoder's features (n, 64)."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.linear: nn.Linear = nn.Linear(weight.shape[1], weight.shape[0])
        self.linear.load_state_dict({"weight": weight, "bias": bias})

    def forward(self, features: Tensor, inputs: Any) -> Tensor:
        """Logits; ``inputs`` are not used."""
        logits: Tensor = self.linear(features)
        return logits


def head(file: str, question: Question) -> Head:
    """The head of ``question`` from the ``heads.safetensors`` that ``experts`` wrote."""
    tensors = load_file(file)
    return Head(tensors[f"{question}.weight"], tensors[f"{question}.bias"])


def experts(directory: str, seed: int = 0, epochs: int = 30) -> None:
    """Preparation step: ``base.safetensors``, ``QUESTION.safetensors`` and ``heads.safetensors``.

    The base learns for 40 epochs to draw the training images again from its features, each expert for ``epochs`` to
    answer its question. Adam 1e-3, batches of 32.
    """
    folder = Path(directory)
    pixels = torch.from_numpy(images("train"))
    tensors: dict[str, Tensor] = {}
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base, decoder = encoder(), nn.Linear(FEATURES, 64)
        fit(nn.Sequential(base, decoder), pixels, pixels, 40, nn.functional.mse_loss)
        save_file(base.state_dict(), folder / "base.safetensors")
        with torch.no_grad():
            features = base(pixels)
        for question in ANSWERS:
            labels = torch.from_numpy(answered(question, "train")[1])
            kept = fit_head(features, labels, int(labels.max()) + 1, strength=0.01)
            expert = encoder()
            expert.load_state_dict(base.state_dict())
            fit(nn.Sequential(expert, kept), pixels, labels, epochs)
            save_file(expert.state_dict(), folder / f"{question}.safetensors")
            tensors |= {f"{question}.{name}": tensor for name, tensor in kept.state_dict().items()}
    save_file(tensors, folder / "heads.safetensors")
