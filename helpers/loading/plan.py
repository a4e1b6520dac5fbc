"""Which way of running a model fits this machine: `plan("sd35-medium", Budget.detect())`, by arithmetic that is shown.

The sums are over the model's own sizes (helpers.loading.sizes) plus the constants below; GiB are 2**30 bytes.
"""

from dataclasses import dataclass, field, replace

from helpers.loading.machine import GIB, Budget
from helpers.loading.registry import Model, find
from helpers.loading.sizes import Part, parts

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
FILE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
T5 = "text_encoder_3"

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
CURE = 0.9  # a plan is an answer to full memory if its sum for the stage that failed is at most this share


@dataclass(frozen=True)
class Strategy:
    """One way of running a model: what is where, and when."""

    name: str
    about: str
    # Seconds of one more picture of a prompt that is known already, as a multiple of the resident plan's.
    time: float
    t5: str | None = "whole"  # or "nf4", in four bits; None: left out
    encoders_leave: bool = False  # the text encoders come one by one, for a text that is new, and leave again
    t5_alone: bool = False  # transformer and VAE leave the GPU for T5
    offload: str | None = None  # what diffusers moves between RAM and GPU: "model", "group" or "sequential"


# Fastest first, and among equals the one that has to read least for a new prompt.
STRATEGIES = {
    one.name: one
    for one in (
        Strategy("resident", "everything stays on the GPU", 1.0),
        Strategy("resident-nf4", "everything stays on the GPU, with T5 in four bits", 1.0, t5="nf4"),
        Strategy(
            "staged",
            "the text encoders are read one by one onto the GPU, and leave before the rest takes their place; "
            "a new prompt reads them again",
            1.0,
            encoders_leave=True,
            t5_alone=True,
        ),
        Strategy(
            "staged-nf4",
            "as staged, with T5 in four bits, which waits in RAM for a new prompt",
            1.0,
            t5="nf4",
            encoders_leave=True,
            t5_alone=True,
        ),
        Strategy(
            "no-t5",
            "T5 is left out, which long prompts suffer from; a new prompt reads the two small encoders again",
            1.0,
            t5=None,
            encoders_leave=True,
        ),
        Strategy("model-offload", "the parts take turns on the GPU and wait in RAM", 1.3, t5=None, offload="model"),
        Strategy(
            "group-offload",
            "the transformer waits in RAM and passes through the GPU block by block, without T5",
            2.0,
            t5=None,
            encoders_leave=True,
            offload="group",
        ),
        Strategy(
            "sequential-offload",
            "every layer is copied to the GPU for its turn, T5's too",
            4.0,
            offload="sequential",
        ),
        Strategy("cpu", "the CPU does it all", 50.0),
    )
}
RELATIVE_TIME = {name: one.time for name, one in STRATEGIES.items()}
WITHOUT_T5 = tuple(name for name, one in STRATEGIES.items() if one.t5 is None)


@dataclass(frozen=True)
class Plan:
    """One way of running a model on one machine. The peaks are what the sums predict."""

    name: str  # a key of STRATEGIES
    why: str  # one sentence with the sums
    peak_vram_gib: float  # of PyTorch's tensors
    peak_ram_gib: float  # anonymous memory of this process; the page cache is not in it
    relative_time: float  # see Strategy.time
    refused: dict[str, str] = field(default_factory=dict)  # the other plans, each with the reason
    dtype: str = "float16"  # of the weights, as torch spells it
    t5: str | None = None  # T5's own dtype, or "nf4"; None without T5
    stages: dict[str, float] = field(default_factory=dict)  # GiB on the GPU to "encode", "denoise" and "decode"

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.name]


class DoesNotFit(RuntimeError):
    """No plan fits this machine; the message is one sentence."""


def plan(
    model: Model | str, budget: Budget, height: int | None = None, width: int | None = None, count: int = 1
) -> Plan:
    """The fastest plan that fits, for `count` pictures at once of `height` x `width` pixels (default: the model's own).

    It depends on its arguments and the model's sizes only. Raises ValueError for an unknown name, DoesNotFit if
    nothing fits.
    """
    model = find(model)
    every = plans(model, budget, height, width, count)
    best = next((name for name, one in every.items() if not one.refused), None)
    if best is None:
        small = ("cpu", "sequential-offload") if budget.device != "cpu" else ("cpu",)
        smallest = min((every[name] for name in small), key=lambda one: one.peak_ram_gib)
        raise DoesNotFit(f"{model.name} fits into no plan on this machine: {smallest.refused[smallest.name]}.")
    reasons = {name: one.refused.get(name) or _rather(one, every[best]) for name, one in every.items() if name != best}
    return replace(every[best], refused=reasons)


def next_plan(
    after: Plan,
    stage: str,
    model: Model | str,
    budget: Budget,
    height: int | None = None,
    width: int | None = None,
    count: int = 1,
) -> Plan | None:
    """The fastest plan below `after` that fits and cures it: the stage that found the memory full needs less of it.

    `stage` is "encode", "denoise" or "decode". None if there is no such plan.
    """
    every = plans(model, budget, height, width, count)
    below = list(STRATEGIES)[list(STRATEGIES).index(after.name) + 1 :]
    if budget.device == "cpu":
        below = [name for name in below if name == "cpu"]  # for the others there is no GPU
    else:
        below.remove("cpu")  # an hour is no answer to a lack of memory
        below = [name for name in below if every[name].stages[stage] <= CURE * every[after.name].stages[stage]]
    return next((every[name] for name in below if not every[name].refused), None)


def plans(
    model: Model | str, budget: Budget, height: int | None = None, width: int | None = None, count: int = 1
) -> dict[str, Plan]:
    """Every plan by name, also those that do not fit: these have the reason in `refused`, under their own name."""
    model = find(model)
    sizes, source = parts(model)
    # A bundled model's own size is in its folder, and never above this.
    megapixels = (height or model.size or 512) * (width or model.size or 512) / 2**20
    return {name: _sum_up(one, model, sizes, source, budget, megapixels, count) for name, one in STRATEGIES.items()}


def _sum_up(
    strategy: Strategy,
    model: Model,
    sizes: dict[str, Part],
    source: str,
    budget: Budget,
    megapixels: float,
    count: int,
) -> Plan:
    name = strategy.name
    on_cpu = "cpu" in (name, budget.device)
    sizes_kept = {part: size for part, size in sizes.items() if part != T5 or strategy.t5 is not None}
    dtype = _dtype(on_cpu, sizes, budget, megapixels, count)
    t5 = _t5(strategy, sizes, budget, dtype)
    stages = {} if on_cpu else _vram(strategy, sizes_kept, dtype, t5, megapixels, count)
    vram = _most(*stages.values()) if stages else {}
    ram = _ram(strategy, sizes_kept, dtype, t5, budget, megapixels, count)
    problem = _cannot(strategy, sizes, budget)
    if problem is None and sum(vram.values()) + CONTEXT_GIB > budget.vram_gib and not on_cpu:
        problem = f"{_written(vram | {'the driver': CONTEXT_GIB})} on the GPU, which has {budget.vram_gib:.2f}"
    most = ram
    if budget.device == "mps" and not on_cpu:  # one memory for both
        most = vram | {"Python and libraries": PROCESS_GIB["mps"]}
    if problem is None and sum(most.values()) > budget.ram_gib:
        problem = f"{_written(most)} of RAM, of which {budget.ram_gib:.2f} are free"
    where = f"{_written(vram)} on the GPU and " if vram else ""
    about = strategy.about
    if strategy.offload == "model" and T5 in sizes:
        everything = PROCESS_GIB[budget.device] + sum(_gib(part, dtype) for part in sizes.values())
        about += f", without T5, with which there would be {everything:.2f} GiB in RAM"
    why = f"{about}: {where}{_written(ram)} of RAM, in {dtype}; sizes {source}."
    refused = {name: problem} if problem else {}
    by_stage = {stage: sum(terms.values()) for stage, terms in stages.items()}
    return Plan(name, why, sum(vram.values()), sum(ram.values()), strategy.time, refused, dtype, t5, by_stage)


def _cannot(strategy: Strategy, sizes: dict[str, Part], budget: Budget) -> str | None:
    """What rules a plan out before any sum."""
    if strategy.name != "cpu" and budget.device == "cpu":
        return "there is no GPU"
    if strategy.name not in ("resident", "model-offload", "cpu") and T5 not in sizes:
        return "it is for the three text encoders of Stable Diffusion 3"
    if strategy.t5 == "nf4" and budget.device != "cuda":
        return "bitsandbytes needs CUDA"
    if strategy.t5 == "nf4" and not budget.bitsandbytes:
        return "bitsandbytes is not installed"
    if strategy.offload is not None and budget.device == "mps":
        return "the GPU shares the RAM here, so that moving weights there frees nothing"
    return None


def _dtype(on_cpu: bool, sizes: dict[str, Part], budget: Budget, megapixels: float, count: int) -> str:
    """float16 on a GPU, as in the files. On a CPU float32, or float16 where that does not fit."""
    if not on_cpu or T5 not in sizes:
        return "float32" if on_cpu else "float16"
    # In float16 the weights stay in the files, from which the system reads them as it needs them. That holds for
    # every plan here, also for one that is refused and yet asked for by name.
    ram = _most(*cpu_stages("float32", sizes, megapixels, count).values())
    return "float16" if sum(ram.values()) > budget.ram_gib else "float32"


def _t5(strategy: Strategy, sizes: dict[str, Part], budget: Budget, dtype: str) -> str | None:
    if T5 not in sizes or strategy.t5 is None:
        return None
    if strategy.t5 == "nf4" and budget.device == "cuda":
        return "nf4"
    # In bfloat16 T5's `wo` need not be in float32, which saves 1.9 GiB. A GPU before 8.0 only pretends to know it, many
    # times slower.
    ampere = budget.capability is not None and budget.capability >= (8, 0)
    return "bfloat16" if ampere and dtype == "float16" and strategy.offload is None else dtype


def _vram(
    strategy: Strategy, sizes: dict[str, Part], dtype: str, t5: str | None, megapixels: float, count: int
) -> dict[str, dict[str, float]]:
    """What is in the GPU's memory at the worst moment of each stage, in GiB."""
    gib = {part: _gib(size, t5 if part == T5 else dtype) for part, size in sizes.items()}
    core = {part: gib[part] for part in ("transformer", "unet", "vae") if part in gib}
    encoders = {part: gib[part] for part in gib if part not in core}
    network = next(part for part in core if part != "vae")
    double = BYTES[dtype] / 2
    encoding = {"encoding": ENCODE_GIB}
    denoising = {"denoising": DENOISE_GIB * megapixels * double * count}
    # The pictures of a batch are decoded one after the other.
    decoding = {"decoding": DECODE_GIB * megapixels * double * sizes["vae"].width / 128}

    def one_by_one(beside: dict[str, float]) -> dict[str, float]:
        alone = {T5} if strategy.t5_alone else set()
        return _most(*[({} if part in alone else beside) | {part: gib[part]} | encoding for part in encoders])

    if strategy.offload == "model":
        return {
            "encode": one_by_one({}),
            "denoise": {network: gib[network]} | denoising,
            "decode": {"vae": gib["vae"]} | decoding,
        }
    if strategy.offload == "group":
        rest, block = _blocks(sizes[network], dtype)
        flow = {f"{network} outside its blocks": rest, "two blocks": 2 * block}
        vae = {"vae": gib["vae"]}
        return {"encode": one_by_one(flow | vae), "denoise": flow | vae | denoising, "decode": vae | decoding}
    if strategy.offload == "sequential":
        # Buffers stay on the GPU, and the position table is one.
        stays = {"position table": sizes[network].table * BYTES[dtype] / GIB}
        leaf = stays | {"the largest layer": max(size.leaf for size in sizes.values()) * BYTES[dtype] / GIB}
        return {"encode": leaf | encoding, "denoise": leaf | denoising, "decode": stays | decoding}
    if strategy.encoders_leave:
        return {"encode": one_by_one(core), "denoise": core | denoising, "decode": core | decoding}
    return {"encode": gib | encoding, "denoise": gib | denoising, "decode": gib | decoding}


def _ram(
    strategy: Strategy,
    sizes: dict[str, Part],
    dtype: str,
    t5: str | None,
    budget: Budget,
    megapixels: float,
    count: int,
) -> dict[str, float]:
    """What is in RAM at the worst moment, in GiB. Weights on their way to a GPU stay in the files, memory-mapped."""
    if strategy.name == "cpu" or budget.device == "cpu":
        return _most(*cpu_stages(dtype, sizes, megapixels, count).values())
    python = {"Python and libraries": PROCESS_GIB[budget.device]}
    if strategy.offload == "model":  # what was moved to the GPU and back is in no file any more
        return python | {part: _gib(size, dtype) for part, size in sizes.items()}
    if strategy.offload == "group":
        # For the copies, which go on while the GPU computes. PyTorch rounds each pinned tensor up to a power of two.
        network = next(part for part in sizes if part in ("transformer", "unet"))
        return python | {network: PINNED * _gib(sizes[network], dtype)}
    if strategy.offload == "sequential":
        return python | {part: _anonymous(size, dtype) for part, size in sizes.items()}
    if t5 == "nf4" and strategy.encoders_leave:
        return python | {T5: _gib(sizes[T5], t5)}
    return python


def cpu_stages(dtype: str, sizes: dict[str, Part], megapixels: float, count: int = 1) -> dict[str, dict[str, float]]:
    """What is in RAM at each stage of the plan "cpu", in GiB; tests/rehearsal measures the same stages."""
    python = {"Python and libraries": PROCESS_GIB["cpu"]}
    kept = {part: _anonymous(size, dtype) for part, size in sizes.items()}
    core = {part: kept[part] for part in ("transformer", "unet", "vae") if part in kept}
    network = next(part for part in core if part != "vae")
    double = BYTES[dtype] / 2
    stages = {}
    if dtype == "float16":  # the text encoders come one by one
        for part in [part for part in kept if part not in core]:
            stages[f"load {part}"] = python | {part: kept[part]}
            stages[f"run {part}"] = stages[f"load {part}"] | {"encoding": ENCODE_CPU_GIB[part]}
        core["vae"] = _gib(sizes["vae"], "float32")  # see helpers.loading.sd3
        stages[f"load {network}"] = python | {network: kept[network]}
    else:
        core = kept
    decode = DECODE_CPU_GIB * megapixels * sizes["vae"].width / 128 + DECODE_CPU_KEPT_GIB
    stages["load vae"] = python | core
    stages[f"run {network}"] = python | core | {"denoising": DENOISE_GIB * megapixels * double * count}
    stages["run vae"] = python | core | {"decoding": decode}
    return stages


def _gib(part: Part, dtype: str) -> float:
    """Of its weights where they compute; "nf4" is T5 in bfloat16 with its layers in four bits."""
    if dtype == "nf4":  # a float32 scale for each 64 weights
        return (part.linear * (1 / 2 + 4 / 64) + (part.weights - part.linear) * 2) / GIB
    more = part.fp32 * 2 if dtype == "float16" else 0
    return (part.weights * BYTES[dtype] + more) / GIB


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
    shown = {name: gib for name, gib in terms.items() if gib >= 0.005}
    total = f"{sum(terms.values()):.2f} GiB"
    if len(shown) == 1:
        return f"{next(iter(shown))} {total}"
    return f"{' + '.join(f'{name} {gib:.2f}' for name, gib in shown.items())} = {total}"


def _rather(one: Plan, best: Plan) -> str:
    """Why a plan that fits is not taken."""
    if one.relative_time > best.relative_time:
        times = one.relative_time / best.relative_time
        return f"it fits, but takes some {times:.1f} times as long as {best.name}: {one.why.partition(':')[0]}"
    if one.t5 is None:
        return f"it fits, but {best.name} is as fast and keeps T5"
    if one.t5 == "nf4" and best.t5 != "nf4":
        return f"it fits, but {best.name} is as fast and needs no rounding to four bits"
    return f"it fits, but {best.name} is as fast and reads no encoder twice"
