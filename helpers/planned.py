"""Stable Diffusion 3 under a plan: `open_pipeline(model, folder, plan)`; its networks are loaded and freed as needed.

What comes back is a StableDiffusion3Pipeline and used like one. Its `encode_prompt` is ours: under a staged plan the
text encoders are on the GPU only while they read, and what they made of a text is remembered.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers

from helpers.memory import Budget, free
from helpers.plan import T5, WITHOUT_T5, Plan, next_plan
from helpers.quiet import dtype_keyword, no_bars
from helpers.registry import Model

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", T5: "tokenizer_3"}


def stays(plan: Plan) -> bool:
    """Whether the text encoders stay loaded; else they come one by one, and only for a text that is new."""
    staged = plan.name in ("staged", "no-t5", "group-offload") or (plan.name, plan.dtype) == ("cpu", "float16")
    return not staged


def open_pipeline(model: Model, folder: Path, plan: Plan, device: str) -> "PlannedPipeline":
    """The pipeline in `folder` (layout of diffusers, safetensors) under `plan`, to run on `device`.

    Nothing large is loaded yet: `prepare()` loads what stays, and under a staged plan nothing does before the first
    prompt. On a CPU there is nothing to offload to, so that the offloading plans just keep their parts there. `model`
    is for `step_down`, and for the defaults that `generate` takes.
    """
    index = json.loads((folder / "model_index.json").read_text())
    tokenizers = {
        name: getattr(transformers, index[name][1]).from_pretrained(folder / name, local_files_only=True)
        for encoder, name in ENCODERS.items()
        if index[encoder][0] is not None and not (encoder == T5 and plan.name in WITHOUT_T5)
    }
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    nothing = dict.fromkeys(("transformer", "vae", *ENCODERS))
    pipe = PlannedPipeline(scheduler=scheduler, **nothing, **dict.fromkeys(ENCODERS.values()) | tokenizers)
    pipe.model, pipe.folder, pipe.plan, pipe.home = model, folder, plan, torch.device(device)
    transformer, vae = (json.loads((folder / part / "config.json").read_text()) for part in ("transformer", "vae"))
    pipe.default_sample_size, pipe.patch_size = transformer["sample_size"], transformer["patch_size"]
    pipe.vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    pipe.image_processor = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=pipe.vae_scale_factor)
    pipe.t5_width = transformer["joint_attention_dim"]
    pipe.embeddings = {}
    return pipe


class PlannedPipeline(diffusers.StableDiffusion3Pipeline):
    """What `open_pipeline` makes. Any of its networks may be None at a time; `plan` says why.

    `embeddings` maps (text, encoder, setting) to what the encoder made of it, on the CPU: the encoder is never asked
    for the same again. `home` is the device that computes.
    """

    @property
    def _execution_device(self) -> torch.device:
        return self.home

    def prepare(self) -> None:
        """Load what stays loaded under the plan. A second call does nothing."""
        if stays(self.plan):
            self._load_core()
        # A staged plan reads the encoders first, with the memory to themselves.

    def step_down(self, height: int | None = None, width: int | None = None) -> str | None:
        """Free everything and take the next plan that fits; a sentence about it, or None if there is none."""
        plan = next_plan(self.plan.name, self.model, Budget.detect(), height, width)
        if plan is None:
            return None
        sentence = f"The memory is full under the plan {self.plan.name}, so {plan.name} takes over."
        self.unload()
        self.plan = plan
        return sentence

    def unload(self) -> None:
        """Free every network; the next picture loads what it needs."""
        self._drop("transformer", "vae", *ENCODERS)

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt,
        prompt_2=None,
        prompt_3=None,
        device=None,
        num_images_per_prompt=1,
        do_classifier_free_guidance=True,
        negative_prompt=None,
        negative_prompt_2=None,
        negative_prompt_3=None,
        prompt_embeds=None,
        negative_prompt_embeds=None,
        pooled_prompt_embeds=None,
        negative_pooled_prompt_embeds=None,
        clip_skip=None,
        max_sequence_length=256,
        lora_scale=None,
    ):
        """As the library's, embeddings of shape (B, 77 + max_sequence_length, D) and pooled ones (B, P), or None."""
        if prompt_embeds is None:
            wanted = [_texts(text) for text in (prompt, prompt_2 or prompt, prompt_3 or prompt)]
            other = [text or negative_prompt or "" for text in (negative_prompt, negative_prompt_2, negative_prompt_3)]
            unwanted = [_texts(text, len(wanted[0])) for text in other]
            skip, length = clip_skip or 0, max_sequence_length
            texts = [a + b for a, b in zip(wanted, unwanted, strict=True)]
            for encoder, setting, both in zip(ENCODERS, (skip, skip, length), texts, strict=True):
                self._read_new(encoder, both, setting)
            t5 = all((text, T5, length) in self.embeddings for text in texts[2])
            prompt_embeds, pooled_prompt_embeds = self._embed(wanted, skip, length, t5)
            negative_prompt_embeds, negative_pooled_prompt_embeds = self._embed(unwanted, skip, length, t5)
        self._load_core()
        wanted, pooled, unwanted, unwanted_pooled = (
            None if x is None else x.repeat_interleave(num_images_per_prompt, dim=0).to(self.home, self._dtype())
            for x in (prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds)
        )
        if not do_classifier_free_guidance:
            unwanted = unwanted_pooled = None
        return wanted, unwanted, pooled, unwanted_pooled

    def _read_new(self, encoder: str, texts: list[str], setting: int) -> None:
        """Let one encoder read those of the texts that it has not read before."""
        new = [text for text in dict.fromkeys(texts) if (text, encoder, setting) not in self.embeddings]
        if not new or self._lacks(encoder):
            return
        if self.plan.name == "staged" and self.transformer is not None:
            self._drop("transformer", "vae")  # T5 and they do not fit side by side
        if stays(self.plan):
            self._load_core()
        network = getattr(self, encoder) if stays(self.plan) else self._load(encoder, self.home)
        try:
            for text in new:
                self.embeddings[text, encoder, setting] = self._read(network, encoder, text, setting)
        finally:
            del network  # before memory is given back, else the next network finds it full
            if not stays(self.plan):
                free()

    def _read(self, network, encoder: str, text: str, setting: int) -> tuple[torch.Tensor, ...]:
        """(hidden states (1, L, D), pooled (1, P)) of a CLIP, (hidden states,) of T5; as the library computes them."""
        tokenizer = getattr(self, ENCODERS[encoder])
        length = setting if encoder == T5 else self.tokenizer_max_length
        tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = tokens.input_ids.to(self.home)
        if encoder == T5:
            return (network(ids)[0].cpu(),)
        seen = network(ids, output_hidden_states=True)
        return seen.hidden_states[-2 - setting].cpu(), seen[0].cpu()

    def _embed(self, prompts: list[list[str]], skip: int, length: int, t5: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Both CLIPs side by side, padded with zeros to the width of T5, then T5's tokens, or zeros, after theirs."""
        rows, pools, nothing = [], [], (torch.zeros(1, length, self.t5_width),)
        for first, second, third in zip(*prompts, strict=True):
            clips = self.embeddings[first, "text_encoder", skip], self.embeddings[second, "text_encoder_2", skip]
            hidden = torch.cat([clip[0].to(self._dtype()) for clip in clips], dim=-1)
            hidden = torch.nn.functional.pad(hidden, (0, self.t5_width - hidden.shape[-1]))
            last = self.embeddings[third, T5, length] if t5 else nothing
            rows.append(torch.cat([hidden, last[0].to(self._dtype())], dim=-2))
            pools.append(torch.cat([clip[1].to(self._dtype()) for clip in clips], dim=-1))
        return torch.cat(rows), torch.cat(pools)

    def _load_core(self) -> None:
        """Transformer and VAE, with the encoders if these stay, and the plan's offloading."""
        if self.transformer is not None and self.vae is not None:
            return
        offloads = self.plan.name.endswith("-offload") and self.home.type != "cpu"
        place = torch.device("cpu") if offloads else self.home
        names = ["transformer", "vae"]  # the transformer first: it is built in RAM, which is still empty
        names += [name for name in ENCODERS if stays(self.plan) and not self._lacks(name)]
        try:
            for name in names:
                self.register_modules(**{name: self._load(name, place)})
            if offloads and self.plan.name == "model-offload":
                self.enable_model_cpu_offload(device=self.home)
            elif offloads and self.plan.name == "sequential-offload":
                self.enable_sequential_cpu_offload(device=self.home)
            elif offloads:
                self.vae.to(self.home)
                self.transformer.enable_group_offload(
                    onload_device=self.home,
                    offload_type="block_level",
                    num_blocks_per_group=1,
                    use_stream=self.home.type == "cuda",  # copies the next block while this one computes
                )
        except BaseException:  # an interrupt too: half a pipeline would look like a whole one
            self.unload()
            raise

    def _load(self, name: str, place: torch.device) -> torch.nn.Module:
        """One network, straight to the place where it is used: nothing passes through RAM but its file's pages."""
        library, kind = json.loads((self.folder / "model_index.json").read_text())[name]
        cls = getattr(diffusers if library == "diffusers" else transformers, kind)
        dtype = self._dtype()
        if name == "vae" and self.home.type == "cpu":
            # Convolutions in float16 are a hundred times slower on a CPU, and copy each pixel's 3 x 3 neighbourhood.
            dtype = torch.float32
        more = dtype_keyword(dtype) if library == "diffusers" else {"dtype": dtype}
        if place.type != "cpu":
            more["device_map"] = {"": place}
        if name == T5 and self.plan.name == "resident-nf4":
            more["dtype"] = torch.bfloat16  # in float16 the third of T5 that is never quantized would stay in float32
            more["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=self._dtype()
            )
        with no_bars():
            network = cls.from_pretrained(self.folder / name, use_safetensors=True, local_files_only=True, **more)
        if dtype != self._dtype():
            network.decoder.register_forward_pre_hook(lambda _, given: (given[0].to(dtype), *given[1:]))
        return network.eval()

    def _drop(self, *names: str) -> None:
        self.remove_all_hooks()
        self._all_hooks = []
        self.register_modules(**dict.fromkeys(names))
        free()

    def _lacks(self, encoder: str) -> bool:
        return encoder == T5 and (self.plan.name in WITHOUT_T5 or self.tokenizer_3 is None)

    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.plan.dtype)


def _texts(text: str | list[str], count: int = 1) -> list[str]:
    return [text] * count if isinstance(text, str) else list(text)
