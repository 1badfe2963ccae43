"""Real data and models for the digits recipes: scikit-learn's 8x8 handwritten digits, 1,797 images, on disk after
``pip install scikit-learn``.

``sequential`` is the split of M2N2's public code: the first 80 % to score the search, the last 20 % held out, raw
pixel values 0 to 16. ``shuffled`` is for searches over trained models: half of the images train the
specialists, a quarter scores the search, a quarter is held out, pixels scaled to 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from ecotone.extras import how_to_install
from ecotone.populations.errors import InputError

Split: TypeAlias = Literal["train", "search", "test"]
Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def mlp(inputs: int = 64, hidden: int = 256, classes: int = 10) -> nn.Sequential:
    """A perceptron with one hidden ReLU layer; 19,210 parameters by default."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, classes))


def sequential(part: Literal["search", "test"]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (N, 64) with pixels 0 to 16 and labels (N,): the first 1,437 (``search``) or the last 360 (``test``)."""
    images, labels = _digits()
    cut = int(len(labels) * 0.8)
    part_of = {"search": slice(0, cut), "test": slice(cut, None)}
    if part not in part_of:
        raise InputError(f"part: expected search or test, found {part!r}.")
    return images[part_of[part]], labels[part_of[part]]


def shuffled(part: Split, digits: Sequence[int] | None = None) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Images (N, 64) with pixels 0 to 1 and labels (N,) of one part of a fixed shuffle; of some ``digits`` only."""
    images, labels = _digits()
    order = np.random.default_rng(0).permutation(len(labels))
    half, three_quarters = len(order) // 2, len(order) * 3 // 4
    part_of = {"train": order[:half], "search": order[half:three_quarters], "test": order[three_quarters:]}
    if part not in part_of:
        raise InputError(f"part: expected train, search or test, found {part!r}.")
    rows = part_of[part]
    if digits is not None:
        rows = rows[np.isin(labels[rows], list(digits))]
    return images[rows] / np.float32(16), labels[rows]


def random_models(directory: str, seed: int = 0, count: int = 2, scale: float = 0.01, hidden: int = 256) -> None:
    """Preparation step: ``model-I.safetensors``, untrained, every parameter drawn from ``scale * N(0, 1)``."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        state = mlp(hidden=hidden).state_dict()
        drawn = {name: scale * rng.standard_normal(tuple(tensor.shape)) for name, tensor in sorted(state.items())}
        tensors = {name: torch.from_numpy(values.astype(np.float32)) for name, values in drawn.items()}
        save_file(tensors, Path(directory) / f"model-{index}.safetensors")


def specialists(
    directory: str, groups: dict[str, Sequence[int]], seed: int = 0, epochs: int = 60, hidden: int = 256
) -> None:
    """Preparation step: a base and, for each group of digits, ``NAME.safetensors`` trained on that group only.

    All start from the same random ``base.safetensors``. Adam 1e-3, batches of 32.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = mlp(hidden=hidden)
        save_file(base.state_dict(), Path(directory) / "base.safetensors")
        for name, digits in groups.items():
            model = mlp(hidden=hidden)
            model.load_state_dict(base.state_dict())
            images, labels = shuffled("train", digits)
            fit(model, torch.from_numpy(images), torch.from_numpy(labels), epochs)
            save_file(model.state_dict(), Path(directory) / f"{name}.safetensors")


def fit(
    model: nn.Module, inputs: Tensor, targets: Tensor, epochs: int, loss: Loss = nn.functional.cross_entropy
) -> None:
    """Train the unfrozen parameters of ``model`` to give ``targets`` (N, ...) from ``inputs`` (N, ...).

    Adam 1e-3, batches of 32 in an order that torch's global generator draws.
    """
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(epochs):
        for rows in torch.split(torch.randperm(len(targets)), 32):
            optimiser.zero_grad()
            torch.autograd.backward(loss(model(inputs[rows]), targets[rows]))
            optimiser.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Have torch compute on one thread meanwhile.

    How sums are split between threads shows in the last bits, and so would the machine in every search on models that
    are trained with as many as it has.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _digits() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError("the digits data: scikit-learn is not installed.", f"`{how_to_install('digits')}`.") from error
    images, labels = load_digits(return_X_y=True)
    return images.astype(np.float32), labels.astype(np.int64)
