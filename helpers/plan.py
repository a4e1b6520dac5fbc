"""Which way of running a model fits this machine: `plan("sd35-medium", Budget.detect())`, by arithmetic that is shown.

The sums are over the model's own sizes (helpers.sizes) plus the constants below; GiB are 2**30 bytes.
"""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from helpers.registry import Model, find
from helpers.sizes import Part, parts

if TYPE_CHECKING:  # helpers.memory imports this file
    from helpers.memory import Budget

GIB = 2**30
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
T5, CLIPS = "text_encoder_3", ("text_encoder", "text_encoder_2")
WITHOUT_T5 = ("no-t5", "model-offload", "group-offload")

CONTEXT_GIB = 0.4  # of the GPU's memory that PyTorch never sees: CUDA's context and kernels
# Anonymous RAM of Python and the libraries, CUDA's among them. tests/rehearsal measured 0.31 on a CPU before the first
# weight is read, and 0.36 when every network has been imported.
PROCESS_GIB = {"cuda": 2.5, "mps": 1.0, "cpu": 0.34}
ENCODE_GIB = 0.1  # activations of one text encoder for one prompt, and on a GPU the workspace of cuBLAS
# On a CPU, as measured: T5's 64 heads compare 256 tokens, in float32; a CLIP's 20 or fewer compare 77.
ENCODE_CPU_GIB = {T5: 0.07, "text_encoder": 0.01, "text_encoder_2": 0.01}
DENOISE_GIB = 0.3  # activations of the network in half precision for a megapixel and its unguided twin
DECODE_GIB = 2.4  # the VAE's, with cuDNN's workspace, for a megapixel in half precision and 128 channels
# The same on a CPU, where the VAE is in float32. The widest layer takes 2 * 128 channels, 1 GiB, and gives 128: its
# input, oneDNN's copy of it, what the shortcut keeps, and the output in two layouts are 4 GiB. As measured, 0.1 comes
# on top for a picture of any size.
DECODE_CPU_GIB, DECODE_CPU_KEPT_GIB = 4.0, 0.1
PINNED = 1.6  # of a tensor's size, over the shapes in SD3.5's blocks; by the allocator's rule, not measured
TABLE_BYTES = 16  # for an entry of the position table: diffusers computes it in float64, in two copies

# Fastest first: seconds of one more picture of a prompt that is known already, as a multiple of the resident plan's.
RELATIVE_TIME = {
    "resident": 1.0,
    "staged": 1.0,
    "resident-nf4": 1.0,
    "no-t5": 1.0,
    "model-offload": 1.3,
    "group-offload": 2.0,
    "sequential-offload": 4.0,
    "cpu": 50.0,
}
ABOUT = {
    "resident": "everything stays on the GPU",
    "staged": "the text encoders are read one by one onto the GPU, and freed before the rest takes their place; "
    "a new prompt reads them again",
    "resident-nf4": "everything stays on the GPU, with T5 in four bits",
    "no-t5": "T5 is left out, which long prompts suffer from; a new prompt reads the two small encoders again",
    "model-offload": "the parts take turns on the GPU and wait in RAM",
    "group-offload": "the transformer waits in RAM and passes through the GPU block by block, without T5",
    "sequential-offload": "every layer is copied to the GPU for its turn, T5's too",
    "cpu": "the CPU does it all",
}


@dataclass(frozen=True)
class Plan:
    """One way of running a model. The peaks are what the sums predict."""

    name: str  # a key of RELATIVE_TIME
    why: str  # one sentence with the sums
    peak_vram_gib: float  # of PyTorch's tensors
    peak_ram_gib: float  # anonymous memory of this process; the page cache is not in it
    relative_time: float  # see RELATIVE_TIME
    refused: dict[str, str] = field(default_factory=dict)  # the other plans, each with the reason
    dtype: str = "float16"  # of the weights, as torch spells it


class DoesNotFit(RuntimeError):
    """No plan fits this machine; the message is one sentence."""


def plan(model: Model | str, budget: "Budget", height: int | None = None, width: int | None = None) -> Plan:
    """The fastest plan that fits, for pictures of `height` x `width` pixels (default: the model's own size).

    It depends on its arguments and the model's sizes only. Raises ValueError for an unknown name, DoesNotFit if
    nothing fits.
    """
    model = find(model)
    every = plans(model, budget, height, width)
    best = next((name for name in RELATIVE_TIME if name in every and not every[name].refused), None)
    if best is None:
        small = ("cpu", "sequential-offload") if budget.device != "cpu" else ("cpu",)
        smallest = min((every[name] for name in small), key=_ram)
        raise DoesNotFit(f"{model.name} fits into no plan on this machine: {smallest.refused[smallest.name]}.")
    reasons = {name: one.refused.get(name) or _rather(one, every[best]) for name, one in every.items() if name != best}
    return replace(every[best], refused=reasons)


def next_plan(
    after: str, model: Model | str, budget: "Budget", height: int | None = None, width: int | None = None
) -> Plan | None:
    """The fastest plan below the one named `after` that fits and needs no more of the GPU; None if there is none."""
    below = list(RELATIVE_TIME)[list(RELATIVE_TIME).index(after) + 1 :]
    if budget.device != "cpu":
        below.remove("cpu")  # an hour is no answer to a lack of memory
    every = plans(model, budget, height, width)
    enough = every[after].peak_vram_gib if budget.device != "cpu" else float("inf")
    return next(
        (every[name] for name in below if not every[name].refused and every[name].peak_vram_gib <= enough), None
    )


def plans(model: Model | str, budget: "Budget", height: int | None = None, width: int | None = None) -> dict[str, Plan]:
    """Every plan by name, also those that do not fit: these have the reason in `refused`, under their own name."""
    model = find(model)
    sizes, source = parts(model)
    # A bundled model's own size is in its folder, and never above this.
    pixels = (height or model.size or 512) * (width or model.size or 512)
    return {name: _sum_up(name, model, sizes, source, budget, pixels / 2**20) for name in RELATIVE_TIME}


def _sum_up(name: str, model: Model, sizes: dict[str, Part], source: str, budget: "Budget", megapixels: float) -> Plan:
    dtype = _dtype(name, sizes, budget, megapixels)
    vram, ram = _sums(name, dtype, sizes, budget, megapixels)
    peak_vram, peak_ram = sum(vram.values()), sum(ram.values())
    problem = _cannot(name, sizes, budget)
    if problem is None and peak_vram + CONTEXT_GIB > budget.vram_gib and budget.device != "cpu" and name != "cpu":
        problem = f"{_written(vram | {'the driver': CONTEXT_GIB})} on the GPU, which has {budget.vram_gib:.2f}"
    in_ram = [ram]
    if budget.device == "mps":  # one memory for both; the table is gone before the weights are there
        in_ram.append(vram | {"Python and libraries": PROCESS_GIB["mps"]})
    most = _most(*in_ram)
    if problem is None and sum(most.values()) > budget.ram_gib:
        problem = f"{_written(most)} of RAM, of which {budget.ram_gib:.2f} are free"
    where = f"{_written(vram)} on the GPU and " if vram else ""
    about = ABOUT[name]
    if name == "model-offload" and T5 in sizes:
        everything = PROCESS_GIB[budget.device] + sum(_gib(part, dtype) for part in sizes.values())
        about += f", without T5, with which there would be {everything:.2f} GiB in RAM"
    why = f"{about}: {where}{_written(ram)} of RAM, in {dtype}; sizes {source}."
    refused = {name: problem} if problem else {}
    return Plan(name, why, peak_vram, peak_ram, RELATIVE_TIME[name], refused, dtype)


def _cannot(name: str, sizes: dict[str, Part], budget: "Budget") -> str | None:
    """What rules a plan out before any sum."""
    if name != "cpu" and budget.device == "cpu":
        return "there is no GPU"
    if name not in ("resident", "model-offload", "cpu") and T5 not in sizes:
        return "it is for the three text encoders of Stable Diffusion 3"
    if name == "resident-nf4" and budget.device != "cuda":
        return "bitsandbytes needs CUDA"
    if name == "resident-nf4" and not budget.bitsandbytes:
        return "bitsandbytes is not installed"
    if name.endswith("-offload") and budget.device == "mps":
        return "the GPU shares the RAM here, so that moving weights there frees nothing"
    return None


def _dtype(name: str, sizes: dict[str, Part], budget: "Budget", megapixels: float) -> str:
    if budget.device == "cpu" or name == "cpu":
        ram = _sums("cpu", "float32", sizes, budget, megapixels)[1]
        # In float16 the weights stay in the files, from which the system reads them as it needs them. That holds for
        # every plan here, also for one that is refused and yet asked for by name.
        return "float16" if T5 in sizes and sum(ram.values()) > budget.ram_gib else "float32"
    # In bfloat16 T5's `wo` need not stay in float32, which saves 1.9 GiB. A GPU before 8.0 only pretends to know
    # bfloat16, many times slower. Weights that are offloaded keep the dtype of the files, else they fill the RAM.
    ampere = budget.capability is not None and budget.capability >= (8, 0)
    return "bfloat16" if ampere and T5 in sizes and not name.endswith("-offload") else "float16"


def _sums(
    name: str, dtype: str, sizes: dict[str, Part], budget: "Budget", megapixels: float
) -> tuple[dict[str, float], dict[str, float]]:
    """What is in the GPU's memory and in RAM at the worst moment of each, in GiB."""
    full = {part: _gib(size, dtype) for part, size in sizes.items()}
    core = {part: full[part] for part in ("transformer", "unet", "vae") if part in full}
    network = next(part for part in core if part != "vae")
    double = BYTES[dtype] / 2
    denoise = {"denoising": DENOISE_GIB * megapixels * double}
    decode = {"decoding": DECODE_GIB * megapixels * double * sizes["vae"].width / 128}
    encoders = [part for part in full if part not in core]
    encode = {"encoding": ENCODE_GIB}
    clips = {part: full[part] for part in CLIPS if part in full}
    python = {"Python and libraries": PROCESS_GIB[budget.device if name != "cpu" else "cpu"]}
    table = {"building the position table": sizes[network].table * TABLE_BYTES / GIB}
    kept = {part: _anonymous(size, dtype) for part, size in sizes.items()}

    if name == "resident":
        return full | _most(denoise, decode), python | table
    if name == "resident-nf4":
        four_bits = {T5: _nf4_gib(sizes[T5])} if T5 in sizes else {}
        return full | four_bits | _most(denoise, decode), python | table
    if name == "staged":
        each = [{part: full[part]} | encode for part in encoders]
        return _most(*each, core | denoise, core | decode), python | table
    if name == "no-t5":
        each = [core | {part: clips[part]} | encode for part in clips]
        return _most(*each, core | denoise, core | decode), python | table
    if name == "model-offload":
        small = {part: size for part, size in full.items() if part != T5}
        each = [{part: small[part]} | encode for part in encoders if part != T5]
        turns = [*each, {network: full[network]} | denoise, {"vae": full["vae"]} | decode]
        return _most(*turns), python | _most(small, table)  # what was moved to the GPU and back is no file any more
    if name == "group-offload":
        rest, block = _blocks(sizes[network], dtype)
        flow = {f"{network} outside its blocks": rest, "two blocks": 2 * block, "vae": full["vae"]}
        each = [{part: clips[part]} | encode for part in clips]
        # For the copies, which go on while the GPU computes. PyTorch rounds each pinned tensor up to a power of two.
        pinned = {network: PINNED * full[network]}
        return _most(*each, flow | denoise, {"vae": full["vae"]} | decode), python | _most(pinned, table)
    if name == "sequential-offload":
        leaf = {"the largest layer": max(size.leaf for size in sizes.values()) * BYTES[dtype] / GIB}
        return _most(leaf | denoise, decode), python | _most(kept, table)
    return {}, _most(*cpu_stages(dtype, sizes, megapixels).values())


def cpu_stages(dtype: str, sizes: dict[str, Part], megapixels: float) -> dict[str, dict[str, float]]:
    """What is in RAM at each stage of the plan "cpu", in GiB; tests/rehearsal measures the same stages."""
    python = {"Python and libraries": PROCESS_GIB["cpu"]}
    kept = {part: _anonymous(size, dtype) for part, size in sizes.items()}
    core = {part: kept[part] for part in ("transformer", "unet", "vae") if part in kept}
    network = next(part for part in core if part != "vae")
    table = {"building the position table": sizes[network].table * TABLE_BYTES / GIB}
    double = BYTES[dtype] / 2
    stages = {}
    if dtype == "float16":  # the text encoders come one by one
        for part in [part for part in kept if part not in core]:
            stages[f"load {part}"] = python | {part: kept[part]}
            stages[f"run {part}"] = stages[f"load {part}"] | {"encoding": ENCODE_CPU_GIB[part]}
        core["vae"] = _gib(sizes["vae"], "float32")  # see helpers.planned
    else:
        core = kept
    stages[f"load {network}"] = python | table  # first of all in float32, while the RAM is still empty
    decode = DECODE_CPU_GIB * megapixels * sizes["vae"].width / 128 + DECODE_CPU_KEPT_GIB
    stages["load vae"] = python | core
    stages[f"run {network}"] = python | core | {"denoising": DENOISE_GIB * megapixels * double}
    stages["run vae"] = python | core | {"decoding": decode}
    return stages


def _gib(part: Part, dtype: str) -> float:
    """Of its weights on a GPU."""
    more = part.fp32 * 2 if dtype == "float16" else 0
    return (part.weights * BYTES[dtype] + more) / GIB


def _nf4_gib(t5: Part) -> float:
    """T5 in bfloat16 with its layers in four bits, and a float32 scale for each 64 weights."""
    return (t5.linear * (1 / 2 + 4 / 64) + (t5.weights - t5.linear) * 2) / GIB


def _anonymous(part: Part, dtype: str) -> float:
    """Of its weights in RAM after loading: those whose dtype is that of the file stay in the file, memory-mapped."""
    if part.dtype != FILE_DTYPES[dtype]:
        return _gib(part, dtype)
    return part.fp32 * 4 / GIB if dtype == "float16" else 0.0


def _blocks(part: Part, dtype: str) -> tuple[float, float]:
    """What is not in a block, and the largest block."""
    return (part.weights - part.blocks) * BYTES[dtype] / GIB, part.block * BYTES[dtype] / GIB


def _most(*sums: dict[str, float]) -> dict[str, float]:
    return max(sums, key=lambda terms: sum(terms.values()))


def _written(terms: dict[str, float]) -> str:
    """The sum as a reader checks it: "transformer 4.60 + vae 0.16 = 4.76 GiB"."""
    shown = [f"{name} {gib:.2f}" for name, gib in terms.items() if gib >= 0.005]
    total = f"{sum(terms.values()):.2f} GiB"
    return f"{' + '.join(shown)} = {total}" if len(shown) > 1 else f"{' '.join(shown[:1]).rsplit(' ', 1)[0]} {total}"


def _rather(one: Plan, best: Plan) -> str:
    """Why a plan that fits is not taken."""
    if one.relative_time > best.relative_time:
        times = one.relative_time / best.relative_time
        return f"it fits, but takes some {times:.1f} times as long as {best.name}: {one.why.partition(':')[0]}"
    better = {"no-t5": "keeps T5", "resident-nf4": "needs no rounding to four bits"}
    return f"it fits, but {best.name} is as fast and {better.get(one.name, 'reads no encoder twice')}"


def _ram(one: Plan) -> float:
    return one.peak_ram_gib
