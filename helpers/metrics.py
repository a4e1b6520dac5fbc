"""Numbers on pictures and on sets of pictures, each with a known answer on a simple case (tests/test_compare.py)."""

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
import transformers
from PIL import Image

from helpers.loading.registry import ROOT
from helpers.loading.versions import only_errors

CLIP = "models/storybook-clip"


def interval(share_right: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share (Wilson, 1927). Raises ValueError for a count below 1."""
    if count < 1:
        raise ValueError("There is nothing counted, so there is no interval: give a count of 1 or more.")
    z = 1.96
    centre = (share_right + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share_right * (1 - share_right) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return centre - half, centre + half


def mean_with_interval(values: Sequence[float | bool]) -> tuple[float, float, float, int]:
    """(mean, low, high, count): Wilson's interval for True and False, else 1.96 standard errors either way."""
    mean, count = sum(values) / len(values), len(values)
    if all(isinstance(value, (bool, np.bool_)) for value in values):
        return (mean, *interval(mean, count), count)
    half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else math.inf
    return mean, mean - half, mean + half, count


def difference_with_interval(
    ours: Sequence[float | bool], theirs: Sequence[float | bool]
) -> tuple[float, float, float, int]:
    """(mean, low, high, count) of ours minus theirs, pair by pair: of pictures with the same prompt and noise, say.

    For True and False the 95 % interval of Bonett and Price (2012), which has a width also where no pair differs; else
    1.96 standard errors of the differences either way. Raises ValueError if the numbers of the two differ or are 0.
    """
    if len(ours) != len(theirs) or not len(ours):
        raise ValueError(f"There are {len(ours)} and {len(theirs)} values: give pairs, one at least.")
    differences = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    mean, low, high, count = mean_with_interval(differences)
    if all(isinstance(value, (bool, np.bool_)) for value in (*ours, *theirs)):
        gained, lost = ((differences.count(sign) + 1) / (count + 2) for sign in (1.0, -1.0))
        half = 1.96 * math.sqrt((gained + lost - (gained - lost) ** 2) / (count + 2))
        low, high = gained - lost - half, gained - lost + half
    return mean, low, high, count


def pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """(n, 3, H, W) in 0..1. Raises ValueError for no pictures or pictures of several sizes."""
    if not images or len({image.size for image in images}) > 1:
        raise ValueError("Give at least one picture, and pictures of one size.")
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2) / 255


def saturation(images: Sequence[Image.Image]) -> list[float]:
    """How colourful each picture is: largest minus smallest of red, green and blue, mean over pixels, 0 to 1."""
    shown = pixels(images)
    return (shown.amax(1) - shown.amin(1)).mean((1, 2)).tolist()


def contrast(images: Sequence[Image.Image]) -> list[float]:
    """The standard deviation of each picture's luma (ITU-R BT.601) over its pixels, 0 to 0.5."""
    luma = (pixels(images) * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1)
    return luma.flatten(1).std(1, correction=0).tolist()


@cache
def _clip() -> tuple:
    with only_errors():
        return (
            transformers.CLIPModel.from_pretrained(ROOT / CLIP).eval(),
            transformers.CLIPTokenizer.from_pretrained(ROOT / CLIP),
        )


@torch.no_grad()
def clip_features(images: Sequence[Image.Image]) -> torch.Tensor:
    """What storybook-clip makes of pictures of any size: unit vectors (n, d), for `clip_score`, `diversity`, `kid`."""
    clip, _ = _clip()
    side = clip.config.vision_config.image_size
    shown = pixels([image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for image in images])
    found = [clip.visual_projection(clip.vision_model(2 * part - 1).pooler_output) for part in shown.split(64)]
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


@torch.no_grad()
def clip_score(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """The cosine between each picture and its prompt in the eyes of storybook-clip, -1 to 1.

    CLIPScore (Hessel and others, 2021) is 2.5 times this, with negative ones set to 0. storybook-clip's text half also
    conditions storybook-sd, so this is no independent judge of it. Raises ValueError if the numbers of the two differ.
    """
    if len(images) != len(prompts):
        raise ValueError(f"There are {len(images)} pictures and {len(prompts)} prompts: give one for each.")
    clip, tokenizer = _clip()
    ids = tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    texts = torch.nn.functional.normalize(clip.text_projection(clip.text_model(ids).pooler_output), dim=-1)
    return (clip_features(images) * texts).sum(1).tolist()


def diversity(vectors: torch.Tensor) -> float:
    """The mean distance between two different rows of (n, ...): of pictures of one prompt from n seeds, say.

    With `pixels(images)` it is a root mean square over pixels in 0..1, which more contrast alone raises; with
    `clip_features(images)` it is the distance between unit vectors, 0 to 2. Raises ValueError for fewer than two rows.
    """
    if len(vectors) < 2:
        raise ValueError("Diversity is a matter of two pictures at least: give more of them.")
    root = 1 if vectors.ndim == 2 else math.sqrt(vectors[0].numel())
    return (torch.pdist(vectors.flatten(1).double()).mean() / root).item()


def kid(features: torch.Tensor, others: torch.Tensor, blocks: int = 5) -> tuple[float, float]:
    """Kernel distance between two sets of features, (n, d) and (m, d), and its standard error.

    The squared maximum mean discrepancy with the kernel (x . y / d + 1)^3 (Binkowski and others, 2018), which is 0 for
    equal distributions. The estimate is unbiased at every n, unlike FID, and therefore below 0 now and then; what a
    small n costs is spread. The error is that of the mean of `blocks` estimates from separate parts of the two sets,
    each of which must have two rows for every block; ValueError otherwise.
    """
    if min(len(features), len(others)) < 2 * blocks or features.shape[1:] != others.shape[1:]:
        raise ValueError(f"KID takes two sets of vectors of one length, with {2 * blocks} or more in each.")
    parts = zip(features.tensor_split(blocks), others.tensor_split(blocks), strict=True)
    spread = torch.tensor([_squared_discrepancy(*pair) for pair in parts]).std() / math.sqrt(blocks)
    return _squared_discrepancy(features, others), spread.item()


def _squared_discrepancy(features: torch.Tensor, others: torch.Tensor) -> float:
    x, y = features.double(), others.double()

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_itself(a):  # a vector is always near itself, which would be the bias
        values = kernel(a, a)
        return (values.sum() - values.trace()) / (len(a) * (len(a) - 1))

    return (without_itself(x) + without_itself(y) - 2 * kernel(x, y).mean()).item()
