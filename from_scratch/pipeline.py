"""From a prompt to a picture: the parts put together.

Shapes: B pictures, C channels of the latents, h x w their size, an eighth of the picture's; M tokens of D channels.
"""

import secrets
import warnings
from collections.abc import Callable
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from from_scratch import samplers
from from_scratch.clip import CLIPTextEncoder
from from_scratch.tokenizer import Tokenizer
from from_scratch.unet import UNet
from from_scratch.vae import VAE

MOST_PIXELS = 2048 * 2048  # of one picture; far more would take all of the memory
NO_TOKENIZER = "There is no tokenizer, as single files hold none: use load(path, config=FOLDER)."


def upright(image: Image.Image, name: str = "image") -> Image.Image:
    """The picture as viewers show it: turned as its EXIF data say, 16 bits of grey (which PIL cuts off) made 8."""
    if not isinstance(image, Image.Image):
        raise ValueError(f"The {name} is of type {type(image).__name__}: give a PIL image.")
    if image.mode in ("I", "F") or 0 in image.size:
        raise ValueError(f"The {name} is {image.width}x{image.height}, {image.mode}: give one of 8 bits, 0 to 255.")
    try:
        image = ImageOps.exif_transpose(image)
    except OSError as error:
        raise ValueError(f"The {name} cannot be read: {error}.") from None
    eight_bits = image.mode[:4] != "I;16"
    return image if eight_bits else Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))


def to_tensor(image: Image.Image, height: int, width: int) -> Tensor:
    """A picture of any size and mode -> (1, 3, height, width) in [-1, 1]. Says so if that changes anything."""
    image = upright(image)
    if (image.mode, image.size) != ("RGB", (width, height)):
        clear = ", transparent parts in white" if image.has_transparency_data else ""
        what = f"The image is {image.width}x{image.height}, {image.mode}"
        warnings.warn(f"{what}: it is made {width}x{height}, RGB{clear}.", stacklevel=3)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)  # (height, width, 3) in [0, 1]
    return 2 * pixels.permute(2, 0, 1)[None] - 1


def mask_to_tensor(mask: Image.Image, height: int, width: int, factor: int) -> Tensor:
    """A mask of any size -> (1, 1, height / factor, width / factor): 1 where it is white, to be drawn anew, else 0."""
    mask = upright(mask, "mask").convert("L").resize((width, height), Image.Resampling.LANCZOS)
    white = torch.from_numpy(np.asarray(mask, dtype=np.float32) / 255 >= 0.5).float()[None, None]
    return F.interpolate(white, size=(height // factor, width // factor), mode="nearest")


def to_image(pixels: Tensor) -> Image.Image:
    """(3, H, W), about in [-1, 1] -> a PIL image. Rounds; cutting off would darken every pixel by half a step."""
    if not torch.isfinite(pixels).all():
        advice = "try float32 or bfloat16" if pixels.dtype == torch.float16 else "its weights may be damaged"
        raise FloatingPointError(f"The decoded picture has values that are not finite: {advice}.")
    pixels = ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


class Pipeline:
    """What Stable Diffusion 1.5 and 3.5 have in common: pictures to latents and back, and the loop between.

    `size` is the (height, width) in pixels of training, `grid` the pixels of which height and width are multiples. Each
    adds `encode_prompts`, whose result is handed to its predictions.
    """

    def __init__(self, vae: VAE, size: tuple[int, int], grid: int, weight: Tensor):
        self.vae, self.size, self.grid = vae, size, grid
        self.device, self.dtype = weight.device, weight.dtype  # as one weight's, so all weights'

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
        grid, (own_height, own_width) = self.grid, self.size
        if image is not None:
            own_width, own_height = (max(side - side % grid, grid) for side in image.size)
        sides = (own_height if height is None else height, own_width if width is None else width)
        for name, side in zip(("height", "width"), sides, strict=True):
            if not isinstance(side, Integral) or side < grid or side % grid:
                raise ValueError(f"The {name} is {side!r}: give a positive multiple of {grid} pixels.")
        if sides[0] * sides[1] > MOST_PIXELS:
            raise ValueError(f"{sides[1]}x{sides[0]} pixels are too many: give at most 2048x2048, or as many in all.")
        return int(sides[0]), int(sides[1])

    def draw(
        self, prompt, negative_prompt, image, mask, strength, guidance, seed, height, width, on_step, method, predict
    ):
        """What `generate` does in each of them, with its arguments and two more: `method` is a sampler, and
        `predict(latents, index, prompts)` gives what a step of it reads; `prompts` are the encoded prompts, after the
        negative ones if guidance is above 1.
        """
        given = {"prompt": prompt, "negative_prompt": negative_prompt, "image": image, "mask": mask, "seed": seed}
        lists = {name: len(value) for name, value in given.items() if isinstance(value, list)}
        count = next(iter(lists.values()), 1)
        for name, length in lists.items():
            if length != count or count == 0:
                raise ValueError(f"There are {length} of {name} for {count} pictures: give one, or one for each.")
        each = (value if isinstance(value, list) else [value] * count for value in given.values())
        prompts, negatives, images, masks, seeds = each
        seeds = [secrets.randbits(32) if s is None else s for s in seeds]
        try:
            "".join(prompts + negatives).encode()
        except (TypeError, UnicodeEncodeError):
            raise ValueError("prompt and negative_prompt are not text: give a string, or a list of them.") from None
        if mask is not None and image is None:
            raise ValueError("There is a mask but no image: give the picture of which the mask is a part.")
        if not (isinstance(strength, Real) and 0 <= strength <= 1):
            raise ValueError(f"strength is {strength!r}: give a number from 0, nothing changes, to 1, all of it may.")
        if not (isinstance(guidance, Real) and -1000 <= guidance <= 1000):
            raise ValueError(f"guidance is {guidance!r:.20}: give a number; 4 to 8 are usual and 1 switches it off.")
        if not all(isinstance(s, Integral) and 0 <= s < 2**63 for s in seeds):
            raise ValueError(f"seed is {seed!r}: give a whole number from 0 on, or a list of them.")
        seeds = [seed + k for k in range(count)] if isinstance(seed, Integral) else seeds
        images = [upright(i) for i in images] if image is not None else []
        height, width = self.picture_size(images[0] if images else None, height, width)

        # The prompt: with guidance, the negative prompts and the prompts go through every model as one batch.
        encoded = self.encode_prompts(negatives + prompts if guidance > 1 else prompts)

        # The start: noise, or the image with as much noise as the step expects at which it enters.
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        steps = len(method.timesteps)
        start, clean, keep = 0, None, None
        if images:
            start = method.entry(strength)
            clean = torch.cat([self.encode_image(i, height, width, g) for i, g in zip(images, generators, strict=True)])
        noise = self.noise(height, width, generators)
        if mask is not None:
            keep = 1 - torch.cat([mask_to_tensor(m, height, width, self.vae.factor) for m in masks]).to(self.device)
        if clean is None or (keep is not None and strength == 1):
            latents = method.first(noise)
        else:
            latents = method.add_noise(clean, noise, start)

        for index in range(start, steps):
            predicted = predict(latents, index, encoded)
            latents = method.step(latents, predicted, index, lambda: self.noise(height, width, generators))
            if keep is not None:
                latents = (1 - keep) * latents + keep * method.add_noise(clean, noise, index + 1)
            if on_step is not None:
                on_step(index + 1 - start, steps - start, latents)

        pictures = self.decode(latents)
        return pictures if lists else pictures[0]


class StableDiffusion(Pipeline):
    """Draws by `generate`. `size` is the (height, width) in pixels of training. `from_scratch.load` makes one."""

    def __init__(self, text_encoder: CLIPTextEncoder, vae: VAE, unet: UNet, tokenizer: Tokenizer | None, size: tuple):
        super().__init__(vae, size, vae.factor, unet.conv_in.weight)
        self.text_encoder, self.unet, self.tokenizer = text_encoder, unet, tokenizer

    def encode_prompts(self, prompts: list[str]) -> Tensor:
        """B prompts -> the context (B, M, D) that the UNet reads. Warns of what did not fit and was cut off."""
        if self.tokenizer is None:
            raise ValueError(NO_TOKENIZER)
        return self.text_encoder(self.tokenizer.encode(prompts).to(self.device))

    def predict_noise(self, x: Tensor, timestep: int, context: Tensor, guidance: float) -> Tensor:
        """(B, C, h, w) -> the noise in it, in float32. Classifier-free guidance (Ho & Salimans 2022) above 1:
        ε = ε(negative) + guidance (ε(prompt) - ε(negative)); `context` (2 B, M, D) has the negative prompts first.
        """
        x = x.to(self.dtype)
        if guidance <= 1:
            return self.unet(x, timestep, context).float()
        negative, positive = self.unet(torch.cat([x, x]), timestep, context).float().chunk(2)
        return negative + guidance * (positive - negative)

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

        image     start from this picture instead of from noise (Meng et al. 2021)
        strength  0 to 1, the share of the steps that are run with an image, so how much may change
        mask      white where the image is drawn anew; elsewhere its latents are put back after every step
        guidance  how far to go beyond the prompt's own prediction, away from the negative prompt's; 1 or less: off
        seed      picture k of a batch has the seed `seed + k`, or its own from a list; None: another one each time
        sampler   "ddpm", "ddim", "euler" or "dpm++2m"; height and width are in pixels, multiples of 8
        on_step   is called after every step as on_step(step, steps, latents), step from 1 on, latents (B, C, h, w)

        Raises ValueError, one sentence, for anything that cannot be drawn.
        """
        method = samplers.make(sampler, steps)

        def predict(latents: Tensor, index: int, context: Tensor) -> Tensor:
            return self.predict_noise(method.model_input(latents, index), method.timesteps[index], context, guidance)

        return self.draw(
            prompt, negative_prompt, image, mask, strength, guidance, seed, height, width, on_step, method, predict
        )
