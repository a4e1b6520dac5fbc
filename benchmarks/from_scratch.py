"""How fast from_scratch is, and how much memory it takes, next to diffusers: `python -m benchmarks.from_scratch`.

Stable Diffusion 1.5 at full size with random weights. The two draw in turn, A B A B, in one process, so that whatever
else the machine does slows both; a ratio is the median of the pairs' ratios, below 1 where from_scratch takes less.
Loading time and peak memory are each measured in a process of its own. Prints Markdown. On two cores this takes
half an hour to an hour and 12 GB of memory; --quick, at a hundredth of the size, shows only that it works.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)  # started as a script, this file would hide the package of the same name

import torch  # noqa: E402

PROMPT = "a red boat by the sea"
SIDES = ("from_scratch", "diffusers")


def seconds(work: Callable) -> float:
    """How long `work()` takes."""
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float, float]:
    """Median seconds of both, and the median ratio. The caller has warmed them up."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repeats)]
    return (*map(statistics.median, zip(*pairs, strict=True)), statistics.median(a / b for a, b in pairs))


def row(name: str, ours: float, theirs: float, ratio: float | None = None, unit: str = "s") -> None:
    ratio = ours / theirs if ratio is None else ratio
    print(f"| {name} | {ours:.3g} {unit} | {theirs:.3g} {unit} | {ratio:.2f} |", flush=True)


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


def forwards(folder: Path, device: str, dtype: torch.dtype, quick: bool, repeats: int) -> None:
    """One call of the UNet: at the usual size, at others, and for more pictures."""
    from diffusers import UNet2DConditionModel

    from from_scratch import load

    mine = load(folder, dtype=dtype, device=device).unet
    theirs = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=dtype).to(device).eval()
    width, unit = theirs.config.cross_attention_dim, 1 if quick else 8
    kind = str(dtype).removeprefix("torch.")

    def compare(pictures: int, size: int) -> None:
        side = size // 8 // 8 * unit
        x = torch.randn(2 * pictures, 4, side, side, device=device, dtype=dtype)
        context = torch.randn(2 * pictures, 77, width, device=device, dtype=dtype)
        with torch.no_grad():
            if pictures * size <= 512:  # longer calls notice no first time
                mine(x, 500, context), theirs(x, 500, context)
            found = in_turn(lambda: mine(x, 500, context), lambda: theirs(x, 500, context), repeats)
        row(f"UNet, {kind}, {size}x{size}, pictures: {pictures}", *found)

    for size in (512, 256, 384, 768):
        compare(1, size)
    for pictures in (2, 4):
        compare(pictures, 512)
    if device == "cpu":
        x, context = torch.randn(2, 4, 8 * unit, 8 * unit), torch.randn(2, 77, width)
        work, speed = operations(theirs, x, context), rates(quick)
        floors = ", ".join(f"{work / rate:.3g} s at the rate of a {name}" for name, rate in speed.items())
        note = f"the least time for the first row's {work:,.3g} billion operations: {floors}"
        print(f"| {note} | | | |", flush=True)


def drawers(folder: Path, device: str, dtype: torch.dtype, sides: tuple[str, ...]) -> dict[str, Callable]:
    """For each side a function that draws a picture with DDIM in so many steps."""
    made = {}
    if "from_scratch" in sides:
        from from_scratch import load

        sd = load(folder, dtype=dtype, device=device)
        made["from_scratch"] = lambda steps: sd.generate(PROMPT, steps=steps, seed=0, sampler="ddim")
    if "diffusers" in sides:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
        pipe.set_progress_bar_config(disable=True)
        made["diffusers"] = lambda steps: pipe(
            PROMPT, num_inference_steps=steps, generator=torch.Generator().manual_seed(0)
        )
    return made


def child(task: str, side: str, folder: Path) -> None:
    """In a process of its own: load, perhaps draw two steps; print seconds of loading and peak memory in GiB."""
    if side == "from_scratch":
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
        drawers(folder, "cpu", torch.float32, (side,))[side](2)
    unit = 2**30 if platform.system() == "Darwin" else 2**20
    print(json.dumps([taken, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit]))


def in_children(task: str, folder: Path, repeats: int) -> dict[str, list[list[float]]]:
    """[seconds, peak GiB] of every run, for both sides, in turn."""
    found = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            command = [sys.executable, "-m", "benchmarks.from_scratch", "--child", task, side, "--folder", str(folder)]
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
    return f"{cpu}, {torch.get_num_threads()} threads{gpu}{load}; Python {platform.python_version()}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a hundredth of the size")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of each measurement")
    parser.add_argument("--folder", type=Path, help="where the random model is kept from run to run (2.1 GB)")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child, options.folder)

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "model_index.json").exists():
            from benchmarks.models import save

            save(folder, options.quick)
        measure(folder, options.quick, options.repeats)


def measure(folder: Path, quick: bool, repeats: int) -> None:
    """All measurements, as a Markdown table."""
    size = "512x512" if not quick else "quick"
    print(machine() + "\n\n| | from_scratch | diffusers | ratio |\n|---|---|---|---|", flush=True)
    loading = in_children("load", folder, repeats)
    for name, column, unit in (("loading, float16 on disk, float32 in memory", 0, "s"), ("its peak memory", 1, "GiB")):
        row(name, *(statistics.median(run[column] for run in loading[side]) for side in SIDES), unit=unit)
    picture = in_children("picture", folder, 1)
    row(f"peak memory of a picture, {size}", *(picture[side][0][1] for side in SIDES), unit="GiB")
    kinds = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        kinds += [("cuda", torch.float32), ("cuda", torch.float16), ("cuda", torch.bfloat16)]
    for device, dtype in kinds:
        forwards(folder, device, dtype, quick, repeats)
        steps, draw = 2 if quick else 20, drawers(folder, device, dtype, SIDES)
        draw["from_scratch"](1), draw["diffusers"](1)
        pairs = repeats if quick or device != "cpu" else 1  # each takes minutes
        found = in_turn(lambda: draw["from_scratch"](steps), lambda: draw["diffusers"](steps), pairs)  # noqa: B023
        row(f"picture, {device}, {str(dtype).removeprefix('torch.')}, {size}, {steps} steps", *found)


if __name__ == "__main__":
    main()
