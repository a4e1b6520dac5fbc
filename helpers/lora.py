"""Adapters on a loaded pipeline: attach one to be trained, save it, load one from a file, merge, remove.

LoRA (Hu et al., 2021) as peft has it: beside a layer W there is a product of two thin matrices, W x + B A x, where A
has `rank` rows and B begins as zero. How strongly an adapter acts is stock: `pipe.set_adapters(name, 0.5)`.
"""

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers.training_utils import cast_training_params
from diffusers.utils import delete_adapter_layers
from peft import LoraConfig
from peft.import_utils import is_torchao_available

from helpers.loading.download import LoadError
from helpers.lora_files import read

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
LAYERS = ("attention", "all")  # which of the network's layers get an adapter
LARGEST = 1024  # rank


def attach(
    pipe: diffusers.DiffusionPipeline, name: str, rank: int = 8, layers: str = "attention", seed: int = 0
) -> int:
    """Put a new adapter on the UNet or transformer, the only part that then learns; how many weights it has.

    `layers` is "attention" for the projections of attention alone, or "all" for convolutions and every other linear
    layer too. It changes no picture before it is trained. Raises ValueError, one sentence, for a rank other than 1 to
    1024, an unknown choice of layers, and a name that is taken or is no plain word.
    """
    require_peft()
    _require_free(pipe, name)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= LARGEST:
        raise ValueError(f"The rank {rank!r} is not a whole number from 1 to {LARGEST}: 4 to 16 is usual.")
    if layers not in LAYERS:
        raise ValueError(f"There is no choice of layers {layers!r}: take one of {', '.join(LAYERS)}.")
    network = _network(pipe)
    targets = [
        layer.removesuffix(".base_layer")  # of one that has an adapter already
        for layer, module in network.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ".lora_" not in layer
    ]
    if layers == "attention":
        targets = [layer for layer in targets if layer.endswith(ATTENTION)]
    with torch.random.fork_rng(), _quiet():  # A is random, and a cell that runs again begins the same
        torch.manual_seed(seed)
        # alpha = rank: the product is added as it is, and a file needs no word about it
        network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), name)
    cast_training_params(network)  # float32 beside a model in float16: small steps would be lost, and a scaler refuses
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def save(pipe: diffusers.DiffusionPipeline, name: str, path: str | Path) -> Path:
    """Write the adapter to a file that the stock `load_lora_weights` reads, whole or not at all; its path.

    Raises ValueError, one sentence, if there is no such adapter or the file is not to be called .safetensors.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"Adapters are saved as safetensors: call the file {path.stem}.safetensors.")
    if name not in names(pipe):
        raise ValueError(f"There is no adapter {name!r} here{_those_there(pipe)}.")
    layers = {f"{part}_lora_layers": _weights(module, name) for part, module in _parts(pipe).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as folder:
        pipe.save_lora_weights(
            folder, **{part: found for part, found in layers.items() if found}, weight_name=path.name
        )
        os.replace(Path(folder, path.name), path)
    return path


def load(pipe: diffusers.DiffusionPipeline, path: str | Path, name: str) -> None:
    """Attach the adapter in a safetensors file, whatever program wrote it, if it is one for this model.

    All of it is checked before the pipeline is touched. Raises ValueError for a name that is taken or is no plain word;
    LoadError, one sentence, for a file that is missing, damaged, a pickle, or made for another model. The pipeline is
    then as it was.
    """
    require_peft()
    _require_free(pipe, name)
    adapter = read(Path(path), _parts(pipe))
    try:
        with _quiet():
            pipe.load_lora_weights(adapter, adapter_name=name)
    except BaseException:  # an interrupt too leaves nothing half attached
        _forget(pipe, name)
        raise


def merge(pipe: diffusers.DiffusionPipeline) -> None:
    """Add all active adapters, as strongly as they act now, to the weights of the model, and take them away.

    Drawing is then as fast as without, and nothing can be taken back. Raises ValueError, one sentence, if there is
    none, or if the pipeline has a plan: its weights stay in their files, which nothing changes.
    """
    if not names(pipe):
        raise ValueError("There is no adapter to merge: attach or load one first.")
    if hasattr(pipe, "stage"):
        raise ValueError("This pipeline reads its weights from files again and again, so leave the adapter attached.")
    pipe.fuse_lora(components=list(_parts(pipe)))
    pipe.unload_lora_weights()


def remove(pipe: diffusers.DiffusionPipeline, name: str) -> None:
    """Take an adapter away; the last one leaves the model as it was. Raises ValueError if there is no such adapter."""
    if name not in names(pipe):
        raise ValueError(f"There is no adapter {name!r} here{_those_there(pipe)}.")
    _forget(pipe, name)


def names(pipe: diffusers.DiffusionPipeline) -> list[str]:
    """The adapters that are attached, active or not."""
    found = [name for part in _parts(pipe).values() for name in getattr(part, "peft_config", {})]
    return list(dict.fromkeys(found))


def require_peft() -> None:
    """Raises LoadError, one sentence, where nothing could be attached.

    Colab brings a torchao that peft refuses to work beside, at the first layer that it adapts.
    """
    try:
        is_torchao_available()
    except ImportError as error:
        raise LoadError(
            "The torchao of this machine is too old for peft: run `pip uninstall -y torchao`, then this again, with no "
            "restart between."
        ) from error


def _network(pipe) -> torch.nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _parts(pipe) -> dict[str, torch.nn.Module]:
    """What can have an adapter, by the names that files use."""
    parts = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {part: getattr(pipe, part) for part in parts if getattr(pipe, part, None) is not None}


def _those_there(pipe) -> str:
    return f", only {', '.join(names(pipe))}" if names(pipe) else ": attach or load one first"


def _weights(module: torch.nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The adapter's A and B by layer, with the factor alpha / rank of its file inside B."""
    found = {}
    for layer, adapted in module.named_modules():
        if name in getattr(adapted, "lora_A", {}):
            found[f"{layer}.lora_A.weight"] = adapted.lora_A[name].weight.detach().cpu().contiguous()
            factor = adapted.lora_alpha[name] / adapted.r[name]
            found[f"{layer}.lora_B.weight"] = (factor * adapted.lora_B[name].weight.detach()).cpu().contiguous()
    return found


def _forget(pipe, name: str) -> None:
    if set(names(pipe)) <= {name}:
        pipe.unload_lora_weights()  # the plain layers again
        return
    with _quiet():
        for part in _parts(pipe).values():
            if name in getattr(part, "peft_config", {}):
                delete_adapter_layers(part, name)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of each part that a file leaves as it is, of adapters beside others, and of those active instead."""
    level = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        diffusers.utils.logging.set_verbosity(level)


def _require_free(pipe, name: str) -> None:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"The name {str(name)[:40]!r} will not do for an adapter: use letters, digits and underscores."
        )
    if name in names(pipe):
        raise ValueError(f"There is an adapter {name!r} already: remove it first, or choose another name.")
