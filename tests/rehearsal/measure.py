"""Runs each plan on a checkpoint of `checkpoint.py` and compares the peaks with what the plan predicted.

    python tests/rehearsal/measure.py build/sd35 --plans staged no-t5 --sizes 512 768 1024     # on a GPU, as on a T4
    python tests/rehearsal/measure.py build/sd35 --plans cpu --sizes 256 --steps 1 --pictures 1 # on a CPU
    python tests/rehearsal/measure.py build/tiny --plans staged cpu --sizes 64                 # tries the script itself

Every measurement has a process of its own. RAM is anonymous memory (RssAnon and RssShmem of /proc: pinned memory is
counted as shared), sampled every 5 ms; on CUDA the process may have --vram GiB, whatever the card has. --ram is only
what the plan is told: nothing stops the process from taking more. Prints a table in Markdown, for the plan "cpu" also
one of its stages, and with --out writes the figures as JSON too. Files are read through the system's page cache, which
is not counted: it is given back whenever something else needs the room.
"""

import argparse
import functools
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    """`with AnonymousRam() as ram: ...`, then `ram.peak_gib`, and of each stage that was named, `ram.stages`."""

    def __enter__(self) -> "AnonymousRam":
        self.peak_gib, self.stages, self._stage = 0.0, {}, "start"
        self._look()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before, self._stage = self._stage, name
        self._look()
        try:
            yield
        finally:
            self._look()
            self._stage = before
            print(f"{name}: {self.stages[name]:.3f} GiB", file=sys.stderr, flush=True)  # a stage may take an hour

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._look()

    def _look(self) -> None:
        name, gib = self._stage, anonymous_gib()
        self.stages[name] = max(self.stages.get(name, 0.0), gib)
        self.peak_gib = max(self.peak_gib, gib)


def name_stages(ram: AnonymousRam) -> None:
    """From now on, tell `ram` which stage a pipeline is in, in the words of `helpers.loading.plan.cpu_stages`."""
    from diffusers import AutoencoderKL, SD3Transformer2DModel

    from helpers.loading.sd3 import Network

    def named(cls: type, method: str, name) -> None:
        own = getattr(cls, method)

        @functools.wraps(own)
        def call(*given, **more):
            with ram.stage(name(*given)):
                return own(*given, **more)

        setattr(cls, method, call)

    named(Network, "come", lambda network, device: f"load {network.name}")
    named(SD3Transformer2DModel, "forward", lambda *_: "run transformer")
    named(AutoencoderKL, "decode", lambda *_: "run vae")


def name_encoders(ram: AnonymousRam, pipe) -> None:
    """The same for what the text encoders of this pipeline do between coming and leaving."""
    for name, network in pipe.stage.networks.items():
        if name.startswith("text_encoder") and hasattr(network.module, "_old_forward"):

            def call(*given, own=network.module._old_forward, name=name, **more):
                with ram.stage(f"run {name}"):
                    return own(*given, **more)

            network.module._old_forward = call


def anonymous_gib() -> float:
    """Of this process, now; 0 where there is no /proc."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0.0
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem")) * 1024 / GIB


def measure(folder: Path, name: str, side: int, steps: int, vram_gib: float, ram_gib: float, pictures: int) -> dict:
    """Load, draw two prompts, draw the second again (or less); in this process. The figures, or what went wrong."""
    import torch

    from helpers.generate import Settings, decode, generate
    from helpers.loading.plan import cpu_stages, plans
    from helpers.loading.registry import Model
    from helpers.loading.sd3 import Stage
    from helpers.loading.sizes import parts
    from helpers.memory import Budget
    from helpers.pipelines import load

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_per_process_memory_fraction(vram_gib * GIB / torch.cuda.get_device_properties(0).total_memory)
        torch.zeros(1, device="cuda")  # the context, which is part of the process and not of the plan
        budget = Budget("cuda", vram_gib, ram_gib, CAPABILITY, 100.0, True)
    else:
        budget = Budget("cpu", 0.0, ram_gib, None, 100.0)
    Stage.step_down = lambda *_: None  # a plan that does not fit should say so
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
            name_stages(ram)
            pipe = load(model, plan)
            name_encoders(ram, pipe)
            figures["load_s"] = time.perf_counter() - start
            if pictures == 0:
                shape, where = (1, 16, side // 8, side // 8), pipe.stage.device
                decode(pipe, torch.zeros(shape, device=where, dtype=getattr(torch, plan.dtype)))
            for prompt in (PROMPTS[0], PROMPTS[1], PROMPTS[1])[:pictures]:
                times.clear()
                start = time.perf_counter()
                # One picture is for slow machines: if nothing else is unwanted, each encoder reads one text.
                unwanted = prompt if pictures == 1 else ""
                generate(pipe, Settings(prompt, unwanted, height=side, width=side), on_step=watch, say=lambda _: None)
                figures.setdefault("picture_s", []).append(time.perf_counter() - start)
    except RuntimeError as error:
        figures["error"] = str(error)
    between = [b - a for a, b in zip(times, times[1:], strict=False)]
    figures["step_s"] = statistics.median(between) if between else None
    figures["ram_gib"], figures["stages_gib"] = ram.peak_gib, ram.stages
    if plan.name == "cpu":
        stages = cpu_stages(plan.dtype, parts(model)[0], side * side / 2**20)
        figures["predicted_stages_gib"] = {stage: sum(terms.values()) for stage, terms in stages.items()}
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
        ram = f"{row['ram_gib']:.2f} / {row['predicted_ram_gib']:.2f}" if "picture_s" in row else "-"
        step = f"{row['step_s']:.2f}" if row.get("step_s") else "-"
        pictures = ", ".join(f"{seconds:.1f}" for seconds in row.get("picture_s", []))
        error = row.get("error", "")
        lines.append(f"| {row['plan']} | {row['side']} | {vram} | {ram} | {step} | {pictures} | {error} |")
    return "\n".join(lines)


def stage_table(row: dict) -> str:
    lines = ["| stage | predicted GiB | measured GiB | measured / predicted |", "|---|---|---|---|"]
    for stage, predicted in row["predicted_stages_gib"].items():
        if stage in row["stages_gib"]:
            measured = row["stages_gib"][stage]
            lines.append(f"| {stage} | {predicted:.2f} | {measured:.2f} | {measured / predicted:.2f} |")
    return "\n".join(lines)


def machine() -> str:
    from importlib.metadata import version

    import psutil
    import torch

    what = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    what += f", {psutil.cpu_count()} cores, {psutil.virtual_memory().total / GIB:.1f} GiB of RAM"
    return f"{date.today()}, {what}, " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plans", nargs="+", required=True)
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 768, 1024])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vram", type=float, default=VRAM_GIB, help="GiB that the GPU may use")
    parser.add_argument("--ram", type=float, default=RAM_GIB, help="GiB of RAM that the plan is made for")
    parser.add_argument(
        "--pictures", type=int, default=3, help="0: only decode; 1: a prompt; 2: and another; 3: that one again"
    )
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--here", action="store_true", help="measure one plan at one size in this process")
    arguments = parser.parse_args()
    if arguments.here:
        limits = arguments.vram, arguments.ram, arguments.pictures
        print(json.dumps(measure(arguments.folder, arguments.plans[0], arguments.sizes[0], arguments.steps, *limits)))
        return
    rows = []
    for side in arguments.sizes:
        for name in arguments.plans:
            given = {"plans": name, "sizes": side}
            given |= {key: getattr(arguments, key) for key in ("steps", "vram", "ram", "pictures")}
            words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
            command = [sys.executable, __file__, str(arguments.folder), *words, "--here"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
            else:  # killed by the system, most likely for its memory
                print(f"{name} at {side}: ended with {done.returncode}\n{done.stderr[-2000:]}", flush=True)
    print(f"\n{machine()}\n\n{table(rows)}")
    for row in rows:
        if "predicted_stages_gib" in row:
            print(f"\n{row['plan']}, {row['dtype']}, {row['side']}\n\n{stage_table(row)}")
    if arguments.out:
        arguments.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
