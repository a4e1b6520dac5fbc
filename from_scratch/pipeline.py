"""From a prompt to a picture: the parts put together.

Shapes: B pictures, C channels of the latents, h x w their size, an eighth of the picture's; M tokens of D channels.
"""

import math
import secrets
import warnings
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from from_scratch import samplers
from from_scratch.clip import CLIPTextEncoder
from from_scratch.tokenizer import Tokenizer
from from_scratch.unet import KeysValues, UNet
from from_scratch.vae import VAE


def memory_layout(device: torch.device | str) -> torch.memory_format:
    """On a CPU a pixel's channels lie side by side: convolutions, norms and attention then need no rearranging.

    On other devices PyTorch's group norm puts them back one after the other, so they stay that way.
    """
    return torch.channels_last if torch.device(device).type == "cpu" else torch.contiguous_format


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB; what is transparent becomes white. Says so if that changed anything."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"The image is of type {type(image).__name__}: give a PIL image.")
    if image.mode == "RGB":
        return image
    if image.has_transparency_data:
        warnings.warn(f"The image is {image.mode}: its transparent parts are put on white.", stacklevel=4)
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    warnings.warn(f"The image is {image.mode}: it is converted to RGB.", stacklevel=4)
    return image.convert("RGB")


def to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture of any size and mode -> (1, 3, height, width) in [-1, 1]."""
    image = to_rgb(image)
    if image.size != (width, height):
        warnings.warn(f"The image is {image.width}x{image.height}: it is resized to {width}x{height}.", stacklevel=3)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)  # (height, width, 3) in [0, 1]
    return 2 * pixels.permute(2, 0, 1)[None] - 1


def mask_to_tensor(mask: Image.Image, height: int, width: int, factor: int) -> Tensor:
    """A mask of any size -> (1, 1, height / factor, width / factor): 1 where it is white, to be drawn anew, else 0."""
    if not isinstance(mask, Image.Image):
        raise ValueError(f"The mask is of type {type(mask).__name__}: give a PIL image.")
    mask = mask.convert("L")
    if mask.size != (width, height):
        mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    white = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255 >= 0.5).float()[None, None]
    return F.interpolate(white, size=(height // factor, width // factor), mode="nearest")


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W), about in [-1, 1] -> a PIL image. Rounds; cutting off would darken every pixel by half a step."""
    if not torch.isfinite(pixels).all():
        raise FloatingPointError("The decoded picture has values that are not finite: try float32 or bfloat16.")
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def one_each(name: str, value, count: int) -> list:
    """A list of `count`: the value itself if it is one, else the same for all."""
    values = value if isinstance(value, list) else [value] * count
    if len(values) != count:
        raise ValueError(f"There are {len(values)} of {name} for {count} pictures: give one, or one for each.")
    return values


class StableDiffusion:
    """`generate` draws; `.text_encoder`, `.vae`, `.unet` and `.tokenizer` are its parts. `from_scratch.load` makes one.

    `size` is the (height, width) in pixels that the model was trained at.
    """

    def __init__(
        self, text_encoder: CLIPTextEncoder, vae: VAE, unet: UNet, tokenizer: Tokenizer | None, size: tuple[int, int]
    ):
        self.text_encoder, self.vae, self.unet, self.tokenizer, self.size = text_encoder, vae, unet, tokenizer, size

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    def to(self, *where: torch.device | str | torch.dtype) -> "StableDiffusion":
        """Move all parts to a device, "cpu", "cuda" or "mps", or to torch.float32, float16 or bfloat16, or both."""
        device = next((w for w in where if not isinstance(w, torch.dtype)), None)
        dtype = next((w for w in where if isinstance(w, torch.dtype)), None)
        device, dtype = device or self.device, dtype or self.dtype
        for part in (self.text_encoder, self.vae, self.unet):
            part.to(device, dtype, memory_format=memory_layout(device))
        return self

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """B prompts -> (B, M, D), what the UNet reads of them. Warns of what did not fit and was cut off."""
        if self.tokenizer is None:
            raise ValueError("There is no tokenizer, as single files hold none: use load(path, config=FOLDER).")
        return self.text_encoder(self.tokenizer.encode(prompts).to(self.device))

    def predict_noise(self, x: Tensor, timestep: int, words: list[KeysValues], guidance: float) -> Tensor:
        """(B, C, h, w) -> the noise in it, in float32. `words`: of the prompts, with guidance after the negative ones.

        Classifier-free guidance (Ho & Salimans 2022): ε = ε(negative) + guidance (ε(prompt) - ε(negative)), the two
        halves of one batch.
        """
        x = x.to(self.dtype)
        if guidance <= 1:
            return self.unet(x, timestep, words).float()
        negative, positive = self.unet(torch.cat([x, x]), timestep, words).float().chunk(2)
        return negative + guidance * (positive - negative)

    def encode_image(self, image: Image.Image, height: int, width: int, generator: torch.Generator) -> Tensor:
        """A picture -> latents (1, C, h, w) in float32, drawn from the VAE's distribution."""
        pixels = to_tensor(image, height, width).to(self.device, self.dtype)
        noise = self.noise(height, width, [generator]).to(self.dtype)
        return self.vae.encode(pixels, noise).float()

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, C, h, w) -> B pictures. One after the other, as full-size feature maps fill the memory."""
        return [to_image(self.vae.decode(z[None].to(self.dtype))[0]) for z in latents]

    def noise(self, height: int, width: int, generators: list[torch.Generator]) -> Tensor:
        """Standard normal noise (B, C, h, w). Drawn on the CPU in float32: a seed means the same picture everywhere."""
        shape = (1, self.vae.latent_channels, height // self.vae.factor, width // self.vae.factor)
        return torch.cat([torch.randn(shape, generator=g) for g in generators]).to(self.device)

    def picture_size(self, image: Image.Image | None, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width to draw: as asked for, else the image's, rounded down, else the model's own."""
        factor, (own_height, own_width) = self.vae.factor, self.size
        if isinstance(image, Image.Image):
            own_width, own_height = (max(side - side % factor, factor) for side in image.size)
        sides = (own_height if height is None else height, own_width if width is None else width)
        for name, side in zip(("height", "width"), sides, strict=True):
            if not isinstance(side, int) or side < factor or side % factor:
                raise ValueError(f"The {name} is {side!r}: give a positive multiple of {factor} pixels.")
        return sides

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        image: Image.Image | list[Image.Image] | None = None,
        mask: Image.Image | list[Image.Image] | None = None,
        strength: float = 0.8,
        steps: int = 50,
        guidance: float = 7.5,
        seed: int | list[int] | None = None,
        sampler: str = "ddpm",
        height: int | None = None,
        width: int | None = None,
        on_step: Callable[[int, int, Tensor], None] | None = None,
    ) -> Image.Image | list[Image.Image]:
        """Draw one RGB picture, or a list of them if prompt, negative_prompt, image, mask or seed is a list.

        image     start from this picture instead of from noise (Meng et al. 2021); strength, 0 to 1, is the share of
                  the steps that are run, so how much may change
        mask      white where the image is drawn anew; elsewhere its latents are put back after every step
        guidance  how far to go beyond the prompt's own prediction, away from the negative prompt's; 1 or less: off
        seed      picture k of a batch has the seed `seed + k`, or its own from a list; None: another one each time
        sampler   "ddpm", "ddim", "euler" or "dpm++2m"
        height, width  in pixels, multiples of 8
        on_step   is called after every step as on_step(step, steps, latents), with step = 1..steps and the latents
                  (B, C, h, w) of the whole batch

        Raises ValueError, one sentence, for anything that cannot be drawn.
        """
        lists = [v for v in (prompt, negative_prompt, image, mask, seed) if isinstance(v, list)]
        count = len(lists[0]) if lists else 1
        prompts = one_each("prompt", prompt, count)
        negatives = one_each("negative_prompt", negative_prompt, count)
        images, masks = one_each("image", image, count), one_each("mask", mask, count)
        seeds = [secrets.randbits(32) if s is None else s for s in one_each("seed", seed, count)]
        if count == 0 or not all(isinstance(text, str) for text in prompts + negatives):
            raise ValueError("prompt and negative_prompt are not text: give a string, or a list of them.")
        if mask is not None and image is None:
            raise ValueError("There is a mask but no image: give the picture of which the mask is a part.")
        if not (isinstance(strength, (int, float)) and 0 <= strength <= 1):
            raise ValueError(f"strength is {strength!r}: give a number from 0, nothing changes, to 1, all of it may.")
        if not (isinstance(guidance, (int, float)) and math.isfinite(guidance)):
            raise ValueError(f"guidance is {guidance!r}: give a number; 7.5 is usual and 1 switches it off.")
        if not all(isinstance(s, int) and 0 <= s < 2**63 for s in seeds):
            raise ValueError(f"seed is {seed!r}: give a whole number from 0 on, or a list of them.")
        if isinstance(seed, int):
            seeds = [seed + k for k in range(count)]
        method = samplers.make(sampler, steps)
        height, width = self.picture_size(images[0], height, width)

        # The prompt: with guidance, the negative prompts and the prompts go through every model as one batch.
        words = self.unet.keys_values(self.encode_prompts(negatives + prompts if guidance > 1 else prompts))

        # The start: noise, or the image with as much noise as the step expects at which it enters.
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        start, clean, keep = 0, None, None
        if image is not None:
            start = steps - int(steps * strength)
            clean = torch.cat([self.encode_image(i, height, width, g) for i, g in zip(images, generators, strict=True)])
        noise = self.noise(height, width, generators)
        if mask is not None:
            draw_anew = torch.cat([mask_to_tensor(m, height, width, self.vae.factor) for m in masks])
            keep = 1 - draw_anew.to(self.device)
        if clean is None or (keep is not None and strength == 1):
            latents = method.first(noise)
        else:
            latents = method.add_noise(clean, noise, start)

        for index in range(start, steps):
            x = method.model_input(latents, index)
            eps = self.predict_noise(x, method.timesteps[index], words, guidance)
            latents = method.step(latents, eps, index, lambda: self.noise(height, width, generators))
            if keep is not None:
                latents = (1 - keep) * latents + keep * method.add_noise(clean, noise, index + 1)
            if on_step is not None:
                on_step(index + 1 - start, steps - start, latents)

        pictures = self.decode(latents)
        return pictures if lists else pictures[0]
