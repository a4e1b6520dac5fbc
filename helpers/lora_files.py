"""Adapter files of several programs, read into one form and held against the model before anything is touched.

The form: for each layer `part.layer.lora_A.weight` (r, in) and `part.layer.lora_B.weight` (out, r), of a convolution
with the size of its kernel behind, and what is added to the layer is B A: a file's factor alpha / r is inside B.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.utils import convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from safetensors import SafetensorError, safe_open

from helpers.loading.download import LoadError

KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
KOHYA_ENDS = {"lora_down.weight": "A", "lora_up.weight": "B", "alpha": "alpha"}
CONFIG = "lora_adapter_metadata"  # where diffusers writes peft's settings in the file's header
SHOWN = 80  # characters of a layer's name


def read(path: Path, parts: Mapping[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """The adapter in a safetensors file, in the form above, if it is one for the model whose `parts` these are.

    Knows the names of diffusers, old and new, of peft, and of the kohya family. Raises LoadError, one sentence, for a
    file that is missing, damaged, a pickle, no LoRA, or made for another model.
    """
    if not path.is_file():
        raise LoadError(f"There is no file {path.name} in {path.parent.name or 'this folder'}: check the name.")
    if path.suffix != ".safetensors":
        raise LoadError(
            f"{path.name} is no safetensors file, and .ckpt, .bin and .pt can run any code when they are opened: "
            "get the adapter as .safetensors."
        )
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            config = json.loads((file.metadata() or {}).get(CONFIG, "{}"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise LoadError(f"{path.name} is damaged or not complete: get it again.") from error
    if not any("lora" in key for key in tensors):
        raise LoadError(f"{path.name} holds no LoRA: its first tensor is {min(tensors, default='missing')[:SHOWN]!r}.")
    kohya = all(key.startswith(tuple(KOHYA)) for key in tensors)
    found = _of_kohya(tensors, parts) if kohya else _of_diffusers(path, tensors, parts)
    _require_fit(path, found, tensors, parts)
    adapter = {}
    for part, layers in found.items():
        for layer, matrices in layers.items():
            factor = _factor(matrices, config, part, layer)
            adapter[f"{part}.{layer}.lora_A.weight"] = matrices["A"]
            adapter[f"{part}.{layer}.lora_B.weight"] = matrices["B"] * factor
    return adapter


def _of_kohya(tensors, parts) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """By part, layer, and which of "A", "B", "alpha". Names have _ for dots, so the model's own are looked through."""
    layers = {
        (part, name.removeprefix("text_model.").replace(".", "_")): name
        for part, module in parts.items()
        for name, _ in module.named_modules()
    }
    found = {}
    for key, value in tensors.items():
        start = next(start for start in KOHYA if key.startswith(start))
        part, (name, _, end) = KOHYA[start], key.removeprefix(start).partition(".")
        layer = layers.get((part, name.removeprefix("text_model_")), name)
        found.setdefault(part, {}).setdefault(layer, {})[KOHYA_ENDS.get(end, end)] = value
    return found


def _of_diffusers(path, tensors, parts) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """The same for names that begin with the part and have dots; the older ones say up and down."""
    found = {}
    for part, module in parts.items():
        own = {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        if own and not any("lora_A" in key for key in own):
            convert = convert_state_dict_to_peft if "text" in part else convert_unet_state_dict_to_peft
            try:
                own = convert(own)
            except ValueError as error:
                raise LoadError(f"{path.name} is a LoRA of a kind that is not known here.") from error
        for key, value in own.items():
            layer, _, end = key.partition(".lora_")
            if not hasattr(module, "text_model"):  # newer versions of transformers have no such level
                layer = layer.removeprefix("text_model.")
            found.setdefault(part, {}).setdefault(layer, {})[end.removesuffix(".weight")] = value
    return found


def _require_fit(path: Path, found, tensors, parts) -> None:
    """Every layer that the file adapts must be there, and as wide as the file has it."""
    if not set(found) & set(parts):
        theirs, ours = min(tensors).split(".")[0][:24], next(iter(parts))
        raise LoadError(f"{path.name} is for another kind of model: it adapts {theirs!r}, here there is {ours!r}.")
    for part, layers in found.items():
        own = dict(parts[part].named_modules()) if part in parts else {}
        for layer, matrices in layers.items():
            module = own.get(layer)
            if module is None or getattr(module, "weight", None) is None:
                raise LoadError(f"{path.name} is for another model: this one has no layer {layer[:SHOWN]!r}.")
            if strange := sorted(set(matrices) - {"A", "B", "alpha"}):
                raise LoadError(f"{path.name} is no plain LoRA: its layers have {strange[0][:SHOWN]!r}.")
            if not {"A", "B"} <= set(matrices):
                raise LoadError(f"{path.name} is not complete: the layer {layer[:SHOWN]!r} has one matrix of two.")
            down, up, weight = matrices["A"], matrices["B"], module.weight
            for width, wanted in ((down.shape[1], weight.shape[1]), (up.shape[0], weight.shape[0])):
                if width != wanted or down.ndim != weight.ndim or up.ndim != weight.ndim:
                    raise LoadError(
                        f"{path.name} is for another model: its layer {layer[:SHOWN]!r} is {width} wide, here {wanted}."
                    )


def _factor(matrices, config: dict, part: str, layer: str) -> float:
    """alpha / r of the file: beside the matrices, or in peft's settings, or 1 where none is told."""
    rank = matrices["A"].shape[0]
    if "alpha" in matrices:
        return matrices["alpha"].item() / rank
    patterns = config.get(f"{part}.alpha_pattern") or {}
    alpha = next((value for name, value in patterns.items() if layer.endswith(name.lstrip("^"))), None)
    alpha = config.get(f"{part}.lora_alpha", rank) if alpha is None else alpha
    return alpha / (math.sqrt(rank) if config.get(f"{part}.use_rslora") else rank)
