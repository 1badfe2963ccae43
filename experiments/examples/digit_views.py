"""An 8x8 digit seen in four ways, for merges of encoders whose tasks each have inputs of their own: plain, turned by
90 degrees, as a negative, and with its pixels scrambled by one permutation. Every task is to tell the ten digits apart.

The four questions of ``ecotone.experiments.examples.digit_questions`` share one input distribution. Here the inputs
differ, so the statistics of a layer's inputs differ from task to task, as methods such as RegMean (Jin et al. 2023,
arXiv:2212.09849) need.

One encoder learns to draw the images of all four views again and is the base, a pretraining without labels. Each view
has a head, a logistic regression on the base's features, which stays as it is while an expert is tuned from the base
on that view. So base, experts and merges share the heads, as in AdaMerging (Yang et al. 2024, arXiv:2310.02575). The
images are scikit-learn's, split as in ``ecotone.experiments.examples.digits:shuffled``: a part has the same images in
every view.

The base is strong: its test accuracy is higher than that of the experts' average.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ecotone.experiments.examples.digit_questions import Head
from ecotone.experiments.examples.digits import Split, fit, one_thread, shuffled
from ecotone.experiments.examples.linear_heads import fit_head
from ecotone.populations.errors import InputError, nearest

View: TypeAlias = Literal["plain", "turned", "negative", "scrambled"]
Pixels: TypeAlias = NDArray[np.float32]

SIDE, FEATURES, CLASSES = 8, 64, 10
ORDER = torch.randperm(SIDE * SIDE, generator=torch.Generator().manual_seed(7)).numpy()  # of the scrambled pixels


def _plain(images: Pixels) -> Pixels:
    return images


def _turned(images: Pixels) -> Pixels:
    """Turned by 90 degrees, against the clock."""
    turned: Pixels = np.rot90(images.reshape(-1, SIDE, SIDE), axes=(1, 2)).reshape(images.shape)
    return turned


def _negative(images: Pixels) -> Pixels:
    inverted: Pixels = np.float32(1) - images
    return inverted


def _scrambled(images: Pixels) -> Pixels:
    return images[:, ORDER]


VIEWS: dict[View, Callable[[Pixels], Pixels]] = {
    "plain": _plain,
    "turned": _turned,
    "negative": _negative,
    "scrambled": _scrambled,
}


def encoder(width: int = 96) -> nn.Sequential:
    """A perceptron of four linear layers from 64 pixels to 64 features, with GELU between them; 31,072 parameters."""
    return nn.Sequential(
        nn.Linear(SIDE * SIDE, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, width),
        nn.GELU(),
        nn.Linear(width, FEATURES),
    )


def seen(part: Split, view: View) -> tuple[Pixels, NDArray[np.int64]]:
    """The images (N, 64) of one view, with pixels 0 to 1, and their digits (N,).

    Raises:
        InputError: There is no such view or part.
    """
    if view not in VIEWS:
        raise InputError(f"view: expected one of {', '.join(VIEWS)}, found {view!r}.", nearest(view, tuple(VIEWS)))
    pixels, digits = shuffled(part)
    return np.ascontiguousarray(VIEWS[view](pixels)), digits


def images(part: Split, view: View) -> Pixels:
    """The images (N, 64) of one view alone.

    Raises:
        InputError: There is no such view or part.
    """
    return seen(part, view)[0]


def head(file: str, view: View) -> Head:
    """The head of ``view`` from the ``heads.safetensors`` that ``experts`` wrote."""
    tensors = load_file(file)
    return Head(tensors[f"{view}.weight"], tensors[f"{view}.bias"])


def experts(directory: str, seed: int = 0, epochs: int = 12, pretraining: int = 12) -> None:
    """Preparation step: ``base.safetensors``, ``VIEW.safetensors`` and ``heads.safetensors``.

    The base learns for ``pretraining`` epochs to draw the training images of all four views again from its features,
    each expert for ``epochs`` to tell the digits of its view apart. Adam 1e-3, batches of 32.
    """
    folder = Path(directory)
    views = {view: torch.from_numpy(images("train", view)) for view in VIEWS}
    digits = torch.from_numpy(seen("train", "plain")[1])
    tensors: dict[str, Tensor] = {}
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = _pretrained(torch.cat(list(views.values())), pretraining)
        save_file(base.state_dict(), folder / "base.safetensors")
        for view, pixels in views.items():
            with torch.no_grad():
                features = base(pixels)
            kept = fit_head(features, digits, CLASSES, strength=0.01)
            expert = encoder()
            expert.load_state_dict(base.state_dict())
            fit(nn.Sequential(expert, kept), pixels, digits, epochs)
            save_file(expert.state_dict(), folder / f"{view}.safetensors")
            tensors |= {f"{view}.{name}": tensor for name, tensor in kept.state_dict().items()}
    save_file(tensors, folder / "heads.safetensors")


def _pretrained(pixels: Tensor, epochs: int) -> nn.Sequential:
    """An encoder that has learned to draw its images (N, 64) again, with a linear decoder that is not kept."""
    base, decoder = encoder(), nn.Linear(FEATURES, SIDE * SIDE)
    fit(nn.Sequential(base, decoder), pixels, pixels, epochs, nn.functional.mse_loss)
    return base
