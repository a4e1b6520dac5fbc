"""What lies between two noises, and a picture that moves."""

import io
from collections.abc import Sequence

import torch
from PIL import Image


def slerp(x: torch.Tensor, y: torch.Tensor, share: float) -> torch.Tensor:
    """The point that lies `share` of the angle from x to y, (B, ...) both: spherical interpolation (Shoemake, 1985).

    Of two independent noises it is noise again, with the same norm. Where the angle is too small to divide by its sine
    it is the straight mean.
    """
    flat = [one.flatten(1).double() for one in (x, y)]
    cosine = torch.nn.functional.cosine_similarity(*flat).clamp(-1, 1)
    angle = cosine.acos().view(-1, *[1] * (x.ndim - 1))
    straight = angle.sin() < 1e-6
    sine = torch.where(straight, torch.ones_like(angle), angle.sin())
    first = torch.where(straight, 1 - share + 0 * angle, ((1 - share) * angle).sin() / sine)
    second = torch.where(straight, share + 0 * angle, (share * angle).sin() / sine)
    return (first * x + second * y).to(x.dtype)


def animation(images: Sequence[Image.Image], seconds: float = 3.0) -> bytes:
    """An animated PNG that goes through the pictures and back for ever, a round in so many seconds; 8 bits a colour.

    Raises ValueError, one sentence, for fewer than two pictures, for several sizes, or a time that is not above 0.
    """
    if len(images) < 2 or len({image.size for image in images}) > 1 or not seconds > 0:
        raise ValueError("An animation takes two pictures or more, all of one size, and a time above 0 seconds.")
    frames = [image.convert("RGB") for image in (*images, *images[-2:0:-1])]
    file = io.BytesIO()
    each = max(1, round(1000 * seconds / len(frames)))
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=each, loop=0)
    return file.getvalue()
