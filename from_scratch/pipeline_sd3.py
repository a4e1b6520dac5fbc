"""From prompts to pictures with Stable Diffusion 3 and 3.5: three text encoders, the MMDiT, the VAE.

Shapes: B pictures, C channels of the latents, h x w their size; M tokens of D channels.
"""

from collections.abc import Callable, Sequence
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from from_scratch.clip import CLIPWithProjection
from from_scratch.flow import FlowMatching
from from_scratch.mmdit import MMDiT
from from_scratch.pipeline import NO_TOKENIZER, Pipeline
from from_scratch.t5 import T5Encoder
from from_scratch.tokenizer import Tokenizer
from from_scratch.vae import VAE

NO_TEXT_ENCODERS = "There are no text encoders in this file: use load(path, config=FOLDER), a folder that has them."
T5_TOKENS = 256  # of a prompt, as in diffusers; T5 itself has no limit


class StableDiffusion3(Pipeline):
    """Draws by `generate`. `text_encoders` lists CLIP L, CLIP G and T5, and `tokenizers` theirs; T5 may be None, and
    zeros are read in its place. `shift` is the sampler's. `from_scratch.load` makes one.
    """

    def __init__(
        self,
        text_encoders: list[CLIPWithProjection | T5Encoder | None],
        vae: VAE,
        transformer: MMDiT,
        tokenizers: list[Tokenizer | None],
        size: tuple[int, int],
        shift: float,
    ):
        super().__init__(vae, size, vae.factor * transformer.patches.patch, transformer.proj_out.weight)
        self.text_encoders, self.transformer, self.tokenizers = text_encoders, transformer, tokenizers
        self.shift = shift

    def picture_size(self, image: Image.Image | None, height: int | None, width: int | None) -> tuple[int, int]:
        """As every pipeline's, and within the table of places."""
        height, width = super().picture_size(image, height, width)
        most = self.transformer.patches.size * self.grid
        if max(height, width) > most:
            raise ValueError(f"{width}x{height} pixels are too many: the model knows no places beyond {most}x{most}.")
        return height, width

    def encode_prompts(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """B prompts -> the context (B, M, D) and the prompts as a whole (B, D'). Warns of what was cut off.

        The context is CLIP's tokens, L's channels and G's side by side and zeros up to T5's D; then T5's tokens.
        """
        (clip_l, clip_g, t5), words = self.text_encoders, self.tokenizers
        if None in (clip_l, clip_g, *words[:2]) or (t5 is not None and words[2] is None):
            raise ValueError(NO_TOKENIZER if clip_l and clip_g else NO_TEXT_ENCODERS)
        (context_l, pooled_l), (context_g, pooled_g) = (
            clip(tokenizer.encode(prompts).to(self.device))
            for clip, tokenizer in ((clip_l, words[0]), (clip_g, words[1]))
        )
        clips, channels = torch.cat([context_l, context_g], dim=2), self.transformer.context_embedding.in_features
        clips = F.pad(clips, (0, channels - clips.shape[2]))
        last = clips.new_zeros(len(prompts), T5_TOKENS, channels)
        if t5 is not None:
            last = t5(words[2].encode(prompts).to(self.device))
        return torch.cat([clips, last], dim=1), torch.cat([pooled_l, pooled_g], dim=1)

    def predict_velocity(self, x, timestep, prompts, guidance, skip=(), skip_guidance=0.0) -> Tensor:
        """(B, C, h, w) -> the velocity, in float32. Classifier-free guidance (Ho & Salimans 2022) above 1, for which
        `prompts`, context and pooled, have the negative ones first. Away from what the model says without the blocks
        in `skip` it goes by v + skip_guidance (v(prompt) - v(prompt, skip)).
        """
        x = x.to(self.dtype)
        if guidance <= 1:
            return self.transformer(x, timestep, *prompts).float()
        negative, positive = self.transformer(torch.cat([x, x]), timestep, *prompts).float().chunk(2)
        velocity = negative + guidance * (positive - negative)
        if skip:
            worse = self.transformer(x, timestep, *(p.chunk(2)[1] for p in prompts), skip=skip).float()
            velocity = velocity + skip_guidance * (positive - worse)
        return velocity

    @torch.no_grad()
    def generate(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] = "",
        image: Image.Image | list[Image.Image] | None = None,
        mask: Image.Image | list[Image.Image] | None = None,
        strength: float = 0.6,
        steps: int = 28,
        guidance: float = 7.0,
        seed: int | list[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        on_step: Callable[[int, int, Tensor], None] | None = None,
        skip: Sequence[int] = (),
        skip_guidance: float = 2.8,
        skip_range: tuple[float, float] = (0.01, 0.2),
    ) -> Image.Image | list[Image.Image]:
        """Draw one RGB picture, or a list of them. The arguments are StableDiffusion.generate's, but for the sampler,
        which is Euler's, and for skip-layer guidance, which needs `guidance` above 1:

        skip           the blocks to leave out for it; for 3.5 Medium its makers advise [7, 8, 9]
        skip_guidance  how far to go away from what the model says without them
        skip_range     between which shares of the steps

        Raises ValueError, one sentence, for anything that cannot be drawn.
        """
        method, last = FlowMatching(steps, self.shift), len(self.transformer.blocks) - 1
        if not isinstance(skip, Sequence) or not all(isinstance(n, Integral) and 0 <= n <= last for n in skip):
            raise ValueError(f"skip is {skip!r}: give a list of blocks, by their numbers from 0 to {last}.")
        if skip and isinstance(guidance, Real) and guidance <= 1:
            raise ValueError(f"skip needs guidance, and guidance is {guidance!r}: give a number above 1.")
        if not (isinstance(skip_guidance, Real) and -1000 <= skip_guidance <= 1000):
            raise ValueError(f"skip_guidance is {skip_guidance!r:.20}: give a number; 2.8 is usual.")
        if not (
            isinstance(skip_range, Sequence) and len(skip_range) == 2 and all(isinstance(s, Real) for s in skip_range)
        ):
            raise ValueError(f"skip_range is {skip_range!r:.40}: give two shares of the steps, from 0 to 1.")

        def predict(latents: Tensor, index: int, prompts: tuple[Tensor, Tensor]) -> Tensor:
            now = skip if steps * skip_range[0] < index < steps * skip_range[1] else ()
            return self.predict_velocity(latents, method.timesteps[index], prompts, guidance, now, skip_guidance)

        return self.draw(
            prompt, negative_prompt, image, mask, strength, guidance, seed, height, width, on_step, method, predict
        )
