"""Runs each plan on a checkpoint of `checkpoint.py` and compares the peaks with what the plan predicted.

    python tests/rehearsal/measure.py build/sd35 --plans staged no-t5 --sizes 512 768 1024   # on a GPU, under T4 limits
    python tests/rehearsal/measure.py build/sd35 --plans cpu --sizes 256 --steps 1           # on a CPU
    python tests/rehearsal/measure.py build/tiny --plans staged cpu --sizes 64               # tries the script itself

Every measurement has a process of its own. RAM is anonymous memory (RssAnon and RssShmem of /proc: pinned memory is
counted as shared), sampled every 5 ms; on CUDA the process may have --vram GiB, whatever the card has. Prints a table
in Markdown, and with --out writes the figures as JSON too.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [path for path in (str(ROOT),) if path not in sys.path]

GIB = 2**30
PROMPTS = ("a red boat by the sea", "a blue house in snow")
# A T4 of free Colab, which the GPU plays.
VRAM_GIB, RAM_GIB, CAPABILITY = 14.75, 12.7, (7, 5)
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors")


class AnonymousRam:
    """`with AnonymousRam() as ram: ...`, then `ram.peak_gib`."""

    def __enter__(self) -> "AnonymousRam":
        self.peak_gib, self._done = anonymous_gib(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self.peak_gib = max(self.peak_gib, anonymous_gib())

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak_gib = max(self.peak_gib, anonymous_gib())


def anonymous_gib() -> float:
    """Of this process, now; 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024 / GIB


def measure(folder: Path, name: str, side: int, steps: int, vram_gib: float) -> dict:
    """Load, draw two prompts, draw the second again; in this process. The figures, or what went wrong."""
    import torch

    from helpers.generate import Settings, generate
    from helpers.memory import Budget
    from helpers.pipelines import load
    from helpers.plan import plans
    from helpers.planned import PlannedPipeline
    from helpers.registry import Model

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_per_process_memory_fraction(vram_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
        torch.zeros(1, device="cuda")  # the context, which is part of the process and not of the plan
        budget = Budget("cuda", vram_gib, RAM_GIB, CAPABILITY, 100.0, True)
    else:
        budget = Budget("cpu", 0.0, 8.0, None, 100.0)
    PlannedPipeline.step_down = lambda *_: None  # a plan that does not fit should say so
    model = Model("rehearsal", "StableDiffusion3Pipeline", side, steps, 7.0, PROMPTS, folder=str(folder.resolve()))
    plan = plans(model, budget, side, side)[name]
    figures = {
        "plan": name,
        "side": side,
        "dtype": plan.dtype,
        "predicted_vram_gib": plan.peak_vram_gib,
        "predicted_ram_gib": plan.peak_ram_gib,
        "process_gib": anonymous_gib(),
    }
    times = []
    watch = lambda *_: times.append(time.perf_counter())  # noqa: E731
    start = time.perf_counter()
    try:
        with AnonymousRam() as ram:
            pipe = load(model, plan)
            figures["load_s"] = time.perf_counter() - start
            for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[1]):
                times.clear()
                start = time.perf_counter()
                generate(pipe, Settings(prompt, height=side, width=side), watch, say=lambda _: None)
                figures.setdefault("picture_s", []).append(time.perf_counter() - start)
    except RuntimeError as error:
        figures["error"] = str(error)
    between = [b - a for a, b in zip(times, times[1:], strict=False)]
    figures["step_s"] = statistics.median(between) if between else None
    figures["ram_gib"] = ram.peak_gib
    if cuda:
        torch.cuda.synchronize()
        figures["vram_gib"] = torch.cuda.max_memory_allocated() / GIB
        figures["vram_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return figures


def table(rows: list[dict]) -> str:
    """As the page shows it; measured / predicted."""
    lines = [
        "| plan | size | VRAM GiB | RAM GiB | s a step | s: first, new prompt, known prompt | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        vram = f"{row['vram_gib']:.2f} / {row['predicted_vram_gib']:.2f}" if "vram_gib" in row else "-"
        ram = f"{row['ram_gib']:.2f} / {row['predicted_ram_gib']:.2f}"
        step = f"{row['step_s']:.2f}" if row.get("step_s") else "-"
        pictures = ", ".join(f"{seconds:.1f}" for seconds in row.get("picture_s", []))
        error = row.get("error", "")
        lines.append(f"| {row['plan']} | {row['side']} | {vram} | {ram} | {step} | {pictures} | {error} |")
    return "\n".join(lines)


def machine() -> str:
    from importlib.metadata import version

    import torch

    what = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return f"{date.today()}, {what}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plans", nargs="+", required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vram", type=float, default=VRAM_GIB, help="GiB that the GPU may use")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--here", action="store_true", help="measure one plan at one size in this process")
    arguments = parser.parse_args()
    if arguments.here:
        one = measure(arguments.folder, arguments.plans[0], arguments.sizes[0], arguments.steps, arguments.vram)
        print(json.dumps(one))
        return
    rows = []
    for side in arguments.sizes:
        for name in arguments.plans:
            given = [
                "--plans",
                name,
                "--sizes",
                str(side),
                "--steps",
                str(arguments.steps),
                "--vram",
                str(arguments.vram),
            ]
            command = [sys.executable, __file__, str(arguments.folder), *given, "--here"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
            else:  # killed by the system, most likely for its memory
                print(f"{name} at {side}: ended with {done.returncode}\n{done.stderr[-2000:]}", flush=True)
    print(f"\n{machine()}\n\n{table(rows)}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
