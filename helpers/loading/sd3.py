"""Stable Diffusion 3 under a plan: a stock pipeline whose networks come to the device that computes, and leave again.

`open_pipeline` gives it all its networks at once, with weights that stay in their files, memory-mapped. When diffusers
calls one, a hook of accelerate's copies its weights to the device, and the plan says who leaves for it. So the pipeline
may be used in every way that diffusers knows, with its classes for other tasks and with adapters, under every plan.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import chain
from pathlib import Path

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.hooks import HookRegistry
from safetensors import safe_open
from tqdm.auto import tqdm

from helpers.loading.machine import GIB, Budget, free, letting_go
from helpers.loading.plan import CONTEXT_GIB, T5, Plan, next_plan
from helpers.loading.registry import Model
from helpers.loading.sizes import weight_files
from helpers.loading.versions import no_bars, watched

ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2", T5: "tokenizer_3"}
CORE = ("transformer", "vae")
T5_TOKENS = 256  # what StableDiffusion3Pipeline lets T5 read, unless it is told otherwise
REMEMBERED = 64  # texts, of which each takes about 10 MB
SLOW_BYTES = 2**28  # reading more than this is shown
GROUP_HOOKS = ("group_offloading", "layer_execution_tracker", "lazy_prefetch_group_offloading")


def open_pipeline(model: Model, folder: Path, plan: Plan, device: str) -> diffusers.DiffusionPipeline:
    """The pipeline in `folder` (layout of diffusers, safetensors) under `plan`, to run on `device`.

    Nothing large is read yet, but T5 where it is in four bits: `pipe.stage.prepare()` reads what stays under the plan.
    On a CPU there is nothing to offload to, so that the offloading plans just keep their parts there. It gets the
    attributes `stage`, `plan` and `unload`. Raises KeyError for a missing tensor, ValueError for one of another shape.
    """
    index = json.loads((folder / "model_index.json").read_text())
    tokenizers = {
        name: getattr(transformers, index[name][1]).from_pretrained(folder / name, local_files_only=True)
        for encoder, name in ENCODERS.items()
        if index[encoder][0] is not None and not (encoder == T5 and plan.t5 is None)
    }
    scheduler = getattr(diffusers, index["scheduler"][1]).from_pretrained(folder / "scheduler")
    stage = Stage(model, folder, index, plan, torch.device(device))
    parts = dict.fromkeys((*ENCODERS, *ENCODERS.values())) | tokenizers
    parts |= {name: network.module for name, network in stage.networks.items()}
    pipe = diffusers.StableDiffusion3Pipeline(scheduler=scheduler, **parts)
    stage.pipe, pipe.stage, pipe.plan, pipe.unload = pipe, stage, plan, stage.unload
    stage.attach()
    return pipe


def open_network(cls: type, folder: Path) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A network of diffusers or transformers, its weights in the files, memory-mapped; and these tensors by name.

    Raises KeyError if the files lack a tensor, ValueError if one has another shape than the configuration says.
    """
    if issubclass(cls, diffusers.ModelMixin):
        with torch.device("meta"):  # nothing is computed either, where the position table would take 3.4 GiB
            network = cls.from_config(cls.load_config(folder))
    else:
        with init_empty_weights(include_buffers=False):
            network = cls(cls.config_class.from_pretrained(folder))
    tensors = {}
    for name in weight_files([f"{folder.name}/{file.name}" for file in folder.iterdir()], None)[folder.name]:
        with safe_open(folder.parent / name, "pt") as weights:
            tensors |= {key: weights.get_tensor(key) for key in weights.keys()}
    try:
        missing = set(network.load_state_dict(tensors, strict=False, assign=True).missing_keys)
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    missing -= set(getattr(network, "_tied_weights_keys", None) or ())
    if missing:
        raise KeyError(f"{folder.name} lacks {min(missing)}")
    if hasattr(network, "tie_weights"):
        network.tie_weights()
    return network.eval(), tensors


class Network:
    """One network of a pipeline. `here` says whether its weights are where they compute, in the dtype of the plan."""

    def __init__(self, name: str, cls: type, folder: Path, plan: Plan, device: torch.device):
        self.name, self.plan, self.device, self.here = name, plan, device, False
        self.module, self._files = open_network(cls, folder)
        if name == "vae":  # in float32 on a CPU, and some callers have other dtypes than it
            for part in (self.module.encoder, self.module.decoder):
                part.register_forward_pre_hook(lambda part, given: _cast(given, _dtype(part)))

    def come(self, device: torch.device) -> None:
        """Copy the weights to `device`, adapters too. If that is interrupted, they stay in the files."""
        tensors = list(self._tensors())
        size = sum(tensor.nbytes for _, tensor in tensors)
        hidden = size < SLOW_BYTES or not watched()
        bar = tqdm(total=size, desc=f"reading {self.name}", unit="B", unit_scale=True, leave=False, disable=hidden)
        try:
            with bar, letting_go():
                for key, tensor in tensors:
                    source = self._files.get(key, tensor.data)
                    tensor.data = source.to(device).to(self._dtype(key, source))
                    bar.update(source.nbytes)
        except BaseException:
            self.leave()
            raise
        self.here = True

    def leave(self) -> None:
        """Take the weights away, whoever else still refers to the network. What was attached to it stays."""
        for key, tensor in self._tensors():
            tensor.data = self._files.get(key, tensor.data.cpu())
        self.here = False

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor with its name in the files; those of adapters, which are in no file, have other names."""
        for key, tensor in chain(self.module.named_parameters(), self.module.named_buffers()):
            yield key.replace(".base_layer", ""), tensor

    def _dtype(self, key: str, tensor: torch.Tensor) -> torch.dtype:
        if key not in self._files or not tensor.is_floating_point():
            return tensor.dtype
        if self.name == "vae" and self.device.type == "cpu":
            # Convolutions in float16 are a hundred times slower on a CPU, and copy each pixel's 3 x 3 neighbourhood.
            return torch.float32
        name = self.plan.t5 if self.name == T5 else self.plan.dtype
        if self.name == T5 and name == "float16" and key.endswith("DenseReluDense.wo.weight"):
            return torch.float32  # its sums exceed what float16 can hold
        return getattr(torch, name)


class FourBits:
    """T5 in four bits, made once and then moved as it is. The interface of `Network`."""

    def __init__(self, name: str, cls: type, folder: Path, plan: Plan, device: torch.device):
        # transformers remembers whether bitsandbytes was there when it first looked; a cell may have brought it since.
        getattr(transformers.utils.is_bitsandbytes_available, "cache_clear", lambda: None)()
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=getattr(torch, plan.dtype)
        )
        with no_bars(), letting_go():
            self.module = cls.from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                device_map={"": device},
                dtype=torch.bfloat16,  # in float16 the third of T5 that is never quantized would be in float32
                quantization_config=how,
            ).eval()
        self.name, self.plan, self.here = name, plan, True

    def come(self, device: torch.device) -> None:
        self.module.to(device)
        self.here = True

    def leave(self) -> None:
        self.module.to("cpu")
        self.here = False


class FromFiles(ModelHook):
    """Lets a network come when it is called. `execution_device` is where diffusers looks for the device."""

    def __init__(self, stage: "Stage", name: str):
        self.stage, self.name, self.execution_device = stage, name, stage.device

    def pre_forward(self, module, *args, **kwargs):
        self.stage.enter(self.name)
        if self.name == "transformer":
            dtype = _dtype(module)
            args, kwargs = _cast(args, dtype), dict(zip(kwargs, _cast(kwargs.values(), dtype), strict=True))
        return args, kwargs


class PromptEncoder:
    """Makes prompt embeddings under every plan, and remembers what encoders said that come only for a new text."""

    def __init__(self, stage: "Stage"):
        self._stage = stage
        self._known: dict[str, dict] = {}  # by encoder: tokens and keywords -> its answer, in RAM

    @torch.no_grad()
    def __call__(self, prompt: str, negative_prompt: str = "") -> dict[str, torch.Tensor]:
        """What the pipeline takes in the place of the texts: embeddings (1, L, D) and pooled ones (1, P) of each.

        The same numbers as `pipe.encode_prompt`, but each encoder comes once, for both texts, and only if one is new.
        """
        stage, texts = self._stage, [prompt, negative_prompt]
        if stage.encoders_leave:
            for name, tokenizer in ENCODERS.items():
                if name in stage.networks:
                    length = T5_TOKENS if name == T5 else stage.pipe.tokenizer_max_length
                    how = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
                    more = {} if name == T5 else {"output_hidden_states": True}  # as the pipeline asks it
                    stage.networks[name].module(getattr(stage.pipe, tokenizer)(texts, **how).input_ids, **more)
        found = stage.pipe.encode_prompt(prompt, None, None, negative_prompt=negative_prompt)
        names = "prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"
        return {name: one.to(getattr(torch, stage.plan.dtype)) for name, one in zip(names, found, strict=True)}

    def remembering(self, network: "Network | FourBits") -> Callable:
        """The network's forward, which lets it come for texts that are new, one by one, and leave afterwards."""
        ask, kept = network.module.forward, self._known.setdefault(network.name, {})

        @wraps(ask)
        def forward(input_ids: torch.Tensor, **more):
            keys = [(tuple(row), *sorted(more.items())) for row in input_ids.tolist()]
            adapted = getattr(network.module, "peft_config", None)  # then the answer depends on more than the text
            known = {} if adapted else kept
            new = {key: row for key, row in zip(keys, input_ids, strict=True) if key not in known}
            try:
                with letting_go():
                    for key, row in new.items():
                        known[key] = _moved([ask(row[None].to(self._stage.device), **more)], "cpu")
            finally:
                self._stage.leave(network.name)
            answer = _moved([known[key] for key in keys], self._stage.device)
            for key in list(known)[:-REMEMBERED]:
                del known[key]
            return answer

        return forward

    def forget(self) -> None:
        """Ask again from now on."""
        for known in self._known.values():
            known.clear()


class Stage:
    """Which networks of a pipeline are on the device at the moment, and what follows when the memory is full."""

    def __init__(self, model: Model, folder: Path, index: dict, plan: Plan, device: torch.device):
        self.model, self.plan, self.device = model, plan, device
        self.pipe: diffusers.StableDiffusion3Pipeline | None = None
        self._folder, self._index = folder, index
        # T5 first: where it is made into four bits, it needs the memory to itself.
        order = dict.fromkeys((T5, *ENCODERS, *CORE))
        self.networks = {name: self._open(name) for name in order if self._has(name)}
        self.encode = PromptEncoder(self)

    @property
    def encoders_leave(self) -> bool:
        """Whether the text encoders come for a new text only. On a CPU that saves RAM in float16 alone."""
        if self.device.type == "cpu":
            return self.plan.dtype == "float16" and (self.plan.strategy.encoders_leave or self.plan.name == "cpu")
        return self.plan.strategy.encoders_leave

    @property
    def offload(self) -> str | None:
        return self.plan.strategy.offload if self.device.type != "cpu" else None

    def attach(self) -> None:
        """Hook the networks that come and go; those that diffusers offloads have hooks of its own."""
        for name, network in self.networks.items():
            if self.offload is None or (self.offload == "group" and name in ENCODERS):
                add_hook_to_module(network.module, FromFiles(self, name))
                if name in ENCODERS and self.encoders_leave:
                    network.module.forward = self.encode.remembering(network)

    def prepare(self) -> None:
        """Let come what stays under the plan. A second call does nothing. An error leaves nothing behind."""
        try:
            if self.offload is not None:
                self._offload()
            elif not self.encoders_leave:
                for name in (*CORE, *ENCODERS):
                    self.enter(name)
        except BaseException:
            self.unload()
            raise

    def enter(self, name: str) -> None:
        """Let a network come, and leave those that the plan has no room for beside it."""
        network = self.networks.get(name)
        if network is None or network.here:
            return
        if self.encoders_leave:
            # An encoder may still be here after an interrupt.
            self.leave(*ENCODERS, *(CORE if name == T5 and self.plan.strategy.t5_alone else ()))
        network.come(self.device)

    def unload(self) -> None:
        """Let every network leave; the next picture reads what it needs. Adapters stay."""
        if self.offload is not None:
            self.pipe.remove_all_hooks()
            for name in CORE:
                registry = HookRegistry.check_if_exists_or_initialize(self.networks[name].module)
                for hook in GROUP_HOOKS:
                    registry.remove_hook(hook, recurse=True)
            self.attach()
        for network in self.networks.values():
            network.leave()
        free()

    def step_down(self, stage: str, height: int | None = None, width: int | None = None, count: int = 1) -> str | None:
        """Unload, and take the next plan that cures a `stage` for which the memory is full.

        A sentence about it, or None if there is none. `stage` is "encode", "denoise" or "decode".
        """
        plan = next_plan(self.plan, stage, self.model, Budget.detect(), height, width, count)
        if plan is None:
            return None
        sentence = f"The memory is full under the plan {self.plan.name}, so {plan.name} takes over."
        self.unload()
        for network in self.networks.values():
            remove_hook_from_module(network.module)
        t5 = self.networks.pop(T5, None)
        if t5 is None:
            plan = replace(plan, t5=None)  # what was left out, and perhaps never downloaded, stays so
        old, self.plan, self.pipe.plan = self.plan, plan, plan
        for network in self.networks.values():
            network.plan = plan
        if plan.t5 is None:
            self.pipe.register_modules(**{T5: None, ENCODERS[T5]: None})
        else:
            # Moving between four bits and whole numbers takes the files again.
            self.networks[T5] = self._open(T5) if "nf4" in (plan.t5, old.t5) and plan.t5 != old.t5 else t5
            self.networks[T5].plan = plan
            self.pipe.register_modules(**{T5: self.networks[T5].module})
        self.encode.forget()
        self.attach()
        return sentence

    def has_room_for_float32(self) -> bool:
        """Whether the transformer can be in float32 while it denoises. What diffusers offloads cannot."""
        if self.plan.dtype == "float32" or self.offload is not None:
            return False
        budget, network = Budget.detect(), self.networks["transformer"].module
        if self.device.type == "cpu":
            return sum(one.numel() for one in network.parameters()) * 4 / GIB <= budget.ram_gib
        return 2 * self.plan.stages["denoise"] + CONTEXT_GIB <= budget.vram_gib

    @contextmanager
    def in_float32(self) -> Iterator[None]:
        """For a while the transformer comes in float32. The encoders do not: T5 alone would take 17.7 GiB."""
        network = self.networks["transformer"]
        self.leave("transformer")
        network.plan = replace(self.plan, dtype="float32")
        try:
            yield
        finally:
            self.leave("transformer")
            network.plan = self.plan  # which may be a smaller one by now

    def _offload(self) -> None:
        if all(network.here for name, network in self.networks.items() if name in CORE):
            return
        for name, network in self.networks.items():
            if self.offload != "group" or name in CORE:
                network.come(torch.device("cpu"))
        if self.offload == "model":
            self.pipe.enable_model_cpu_offload(device=self.device)
        elif self.offload == "sequential":
            self.pipe.enable_sequential_cpu_offload(device=self.device)
        else:
            self.networks["vae"].come(self.device)
            self.networks["transformer"].module.enable_group_offload(
                onload_device=self.device,
                offload_type="block_level",
                num_blocks_per_group=1,
                use_stream=self.device.type == "cuda",  # copies the next block while this one computes
            )

    def leave(self, *names: str) -> None:
        """Let these networks leave, those of them that are here."""
        here = [self.networks[name] for name in names if name in self.networks and self.networks[name].here]
        for network in here:
            network.leave()
        if here:
            free()

    def _has(self, name: str) -> bool:
        return self._index[name][0] is not None and not (name == T5 and self.plan.t5 is None)

    def _open(self, name: str) -> "Network | FourBits":
        library, kind = self._index[name]
        cls = getattr(diffusers if library == "diffusers" else transformers, kind)
        how = FourBits if name == T5 and self.plan.t5 == "nf4" else Network
        network = how(name, cls, self._folder / name, self.plan, self.device)
        if network.here and self.encoders_leave:
            network.leave()
        return network


def _dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _cast(values, dtype: torch.dtype) -> tuple:
    """Floating tensors among the values in `dtype`, all else as it is."""
    return tuple(
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in values
    )


def _moved(outputs: list, device) -> transformers.utils.ModelOutput:
    """What a text encoder said of several texts as if it had read them in one batch, on `device`."""

    def join(values):
        if isinstance(values[0], tuple):
            return tuple(join(list(one)) for one in zip(*values, strict=True))
        return torch.cat([value.to(device) for value in values])

    return type(outputs[0])(**{key: join([output[key] for output in outputs]) for key in outputs[0]})
