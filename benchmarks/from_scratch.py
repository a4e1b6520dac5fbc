"""How fast from_scratch is, and how much memory it takes, next to diffusers:

    python -m benchmarks.from_scratch

Stable Diffusion 1.5 at full size with random weights, and four blocks of 3.5 Medium's MMDiT-X. The two work in turn,
A B B A, in one process, so that whatever else the machine does slows all; a ratio is the median of the rounds'
ratios to diffusers, below 1 where from_scratch takes less. Loading time and peak memory are each measured in a process
of its own. Prints Markdown, each row when it is known, one call of the UNet at 512x512 first. On two cores this takes
about an hour and 12 GB of memory (--parts takes some of it); --cpu-time is for cores that have other work too; --cuda
measures the GPU alone, in minutes; --quick, at a hundredth of the size, shows only that it works.
"""

import argparse
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # started as a script, this file would hide the package of the same name

import torch  # noqa: E402

PROMPT = "a red boat by the sea"
PARTS = ("sd15", "sd35", "picture", "loading")  # calls of 1.5's networks, of 3.5's, whole pictures, files and memory
clock = time.perf_counter
SIDES = ("from_scratch", "diffusers")


def seconds(work: Callable) -> float:
    """How long `work()` takes."""
    start = clock()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def in_turn(work: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side in every round; every other round goes backwards. The caller has warmed them up."""
    found = {side: [] for side in work}
    for n in range(repeats):
        for side in list(work)[:: -1 if n % 2 else 1]:
            found[side].append(seconds(work[side]))
    return found


def row(name: str, found: dict[str, list[float]], unit: str = "s") -> None:
    """The medians of both sides, and of the ratios."""
    cells = [f"{statistics.median(found[side]):.3g} {unit}" for side in SIDES]
    ratios = [ours / theirs for ours, theirs in zip(*(found[side] for side in SIDES), strict=True)]
    print(f"| {' | '.join([name, *cells, f'{statistics.median(ratios):.2f}'])} |", flush=True)


def rates(quick: bool) -> dict[str, float]:
    """Billions of multiplications and additions a second, float32 on the CPU, in the two kinds of products."""
    n = 512 if quick else 2048
    a, b = torch.randn(n, n), torch.randn(n, n)
    x = torch.randn(2, 320, 16 if quick else 64, 16 if quick else 64)
    conv = torch.nn.Conv2d(320, 320, 3, padding=1)
    work = {"matrix product": (lambda: a @ b, 2 * n**3), "3x3 convolution": (lambda: conv(x), 18 * 320 * x.numel())}
    found = {}
    with torch.no_grad():
        for name, (function, operations) in work.items():
            function()
            found[name] = operations / min(seconds(function) for _ in range(5)) / 1e9
    return found


def operations(unet, latents: torch.Tensor, context: torch.Tensor) -> float:
    """Multiplications and additions of one call, in billions."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.device("meta"), counter, sdpa_kernel(SDPBackend.MATH):
        unet.to("meta")(latents.to("meta"), torch.ones(1), context.to("meta"))
    return counter.get_total_flops() / 1e9


def calls(name: str, networks: dict[str, Callable], arguments: tuple, repeats: int, warm: bool = True) -> None:
    """A row of the table: one call of each side's network."""
    work = {side: partial(network, *arguments) for side, network in networks.items()}
    with torch.no_grad():
        if warm:
            in_turn(work, 1)
        row(name, in_turn(work, repeats))


def sd15(folder: Path, device: str, dtype: torch.dtype, quick: bool, repeats: int) -> None:
    """One call of the UNet, at the usual size, at others, and for more pictures; one of the VAE's decoder."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from from_scratch import load

    unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).eval()
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=dtype).to(device).eval()
    ours = load(folder, dtype=dtype, device=device)
    unets = {"from_scratch": ours.unet, "diffusers": unet}
    decoders = {
        "from_scratch": ours.vae.decode,
        "diffusers": lambda z: vae.decode(z / vae.config.scaling_factor).sample,
    }
    context_channels, kind = unet.config.cross_attention_dim, str(dtype).removeprefix("torch.")

    def latents(pictures: int, size: int) -> torch.Tensor:
        side = size // (64 if quick else 8)
        return torch.randn(pictures, 4, side, side, device=device, dtype=dtype)

    for pictures, size in ((1, 512), (1, 256), (1, 384), (1, 768), (2, 512), (4, 512)):
        context = torch.randn(2 * pictures, 77, context_channels, device=device, dtype=dtype)
        arguments, warm = (latents(2 * pictures, size), 500, context), pictures * size <= 512  # longer ones need none
        calls(f"UNet, {kind}, {size}x{size}, pictures: {pictures}", unets, arguments, repeats, warm)
        if warm and size == 512:
            calls(f"VAE decoder, {kind}, {size}x{size}", decoders, (latents(1, size),), repeats)
    if device == "cpu":
        x, context = latents(2, 512), torch.randn(2, 77, context_channels)
        work, speed = operations(unet, x, context), rates(quick)
        floors = ", ".join(f"{work / rate:.3g} s at the rate of a {name}" for name, rate in speed.items())
        note = f"the least time for the first row's {work:,.3g} billion operations: {floors}"
        print(f"| {note} | | | |", flush=True)


def sd35(device: str, dtype: torch.dtype, quick: bool, repeats: int) -> None:
    """One call of 3.5 Medium's MMDiT-X at full width and with all its tokens, but with four of its 24 blocks, of which
    all are built like one of these: two whose image attends twice, one whose image does not, the last one.
    """
    from benchmarks.models import mmdit
    from benchmarks.parity_full import ours

    theirs = mmdit(quick, layers=4, dual=2).to(device, dtype)
    mine, config = ours("transformer", theirs), theirs.config
    networks = {
        "from_scratch": mine,
        "diffusers": lambda x, t, context, pooled: theirs(x, context, pooled, t).sample,
    }
    context = torch.randn(2, 333, config.joint_attention_dim, device=device, dtype=dtype)
    pooled = torch.randn(2, config.pooled_projection_dim, device=device, dtype=dtype)
    t = torch.full((2,), 500.0, device=device)
    for size in (512, 1024):
        side = size // (64 if quick else 8)
        x = torch.randn(2, 16, side, side, device=device, dtype=dtype)
        name = f"MMDiT-X, 4 of 24 blocks, {str(dtype).removeprefix('torch.')}, {size}x{size}, pictures: 1"
        calls(name, networks, (x, t, context, pooled), repeats, warm=size == 512)


def drawer(folder: Path, device: str, dtype: torch.dtype, side: str) -> Callable:
    """A function that draws a picture with DDIM in so many steps."""
    if side != "diffusers":
        from from_scratch import load

        sd = load(folder, dtype=dtype, device=device)
        return lambda steps: sd.generate(PROMPT, steps=steps, seed=0, sampler="ddim")
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    return lambda steps: pipe(PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0))


def child(task: str, side: str, folder: Path) -> None:
    """In a process of its own: load, perhaps draw two steps; print seconds of loading and peak memory in GiB."""
    if side != "diffusers":
        import from_scratch

        def read():
            return from_scratch.load(folder)
    else:
        from diffusers import StableDiffusionPipeline

        def read():
            return StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)

    def load() -> None:
        sd = read()
        for part in (sd.unet, sd.vae, sd.text_encoder):
            for weight in part.parameters():
                weight.sum()  # a mapped file is only read when it is used

    if task == "load":
        taken = seconds(load)
    else:
        taken = 0.0
        drawer(folder, "cpu", torch.float32, side)(2)
    print(json.dumps([taken, peak()]))


def peak() -> float:
    """The most memory that this process has had, in GiB. Linux says so itself: getrusage counts the parent's there."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if platform.system() == "Darwin" else 2**20)


def in_children(task: str, folder: Path, repeats: int) -> dict[str, list[list[float]]]:
    """[seconds, peak GiB] of every run, for all sides, in turn."""
    found = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.from_scratch", "--child", task, side, "--folder", str(folder)]
            command += ["--cpu-time"] if clock is time.process_time else []
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def machine() -> str:
    """What the figures were measured on, in one line."""
    import diffusers
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    versions = f"torch {torch.__version__}, diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    day = time.strftime("%Y-%m-%d")
    return f"{day}, {cpu}, {torch.get_num_threads()} threads{gpu}{load}; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of all threads, not of the clock on the wall")
    parser.add_argument("--cuda", action="store_true", help="on the GPU alone")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each measurement")
    parser.add_argument("--folder", type=Path, help="where the random model is kept from run to run (2.1 GB)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cpu_time:
        global clock
        clock = time.process_time
    if options.child:
        return child(*options.child, options.folder)
    if options.cuda and not torch.cuda.is_available():
        sys.exit("There is no GPU that PyTorch can use here: run this without --cuda, or on a machine with CUDA.")

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if set(options.parts) != {"sd35"} and not (folder / "model_index.json").exists():
            from benchmarks.models import save

            save(folder, options.quick)
        measure(folder, options.parts, options.quick, options.cuda, options.repeats)


def measure(folder: Path, parts: Sequence[str], quick: bool, cuda: bool, repeats: int) -> None:
    """The measurements of these PARTS, as a Markdown table; `cuda`: those of the GPU alone."""
    size, what = "512x512" if not quick else "quick", "CPU time" if clock is time.process_time else ""
    print(f"{machine()}\n\n| {' | '.join([what, *SIDES, 'ratio'])} |\n|{'---|' * 4}", flush=True)
    kinds = [] if cuda else [("cpu", torch.float32)]
    if torch.cuda.is_available():
        kinds += [("cuda", torch.float32), ("cuda", torch.float16), ("cuda", torch.bfloat16)]
    for device, dtype in kinds:
        if "sd15" in parts:
            sd15(folder, device, dtype, quick, repeats)
        if "sd35" in parts:
            sd35(device, dtype, quick, repeats)
        if "picture" not in parts:
            continue
        steps = 2 if quick else 20
        draw = {side: drawer(folder, device, dtype, side) for side in SIDES}
        in_turn({side: partial(function, 1) for side, function in draw.items()}, 1)
        rounds = repeats if quick or device != "cpu" else 1  # each takes minutes
        found = in_turn({side: partial(function, steps) for side, function in draw.items()}, rounds)
        row(f"picture, {device}, {str(dtype).removeprefix('torch.')}, {size}, {steps} steps", found)
        del draw
    if not cuda and "loading" in parts:
        loading, picture = in_children("load", folder, repeats), in_children("picture", folder, 1)
        row("loading, float16 on disk, float32 in memory", {side: [run[0] for run in loading[side]] for side in SIDES})
        row("its peak memory", {side: [run[1] for run in loading[side]] for side in SIDES}, "GiB")
        row(f"peak memory of a picture, {size}", {side: [picture[side][0][1]] for side in SIDES}, "GiB")


if __name__ == "__main__":
    main()
