"""Our training loop beside diffusers' train_text_to_image recipe, in turn: `python -m benchmarks.training`.

Both train the same UNet on the same pictures with the same batch, precision and optimizer. Ours takes latents and text
that were encoded once; the recipe reads, encodes and embeds at every step, as that script does. Each run is a process
of its own, so that its peak memory is its own. `--draw` compares drawing in batches with drawing one by one, by the
stock pipeline; the time to 80 % judged accuracy is read from the table that `tools.mini_curves` measured.

Last run, 2026-11-22, `--steps 10`, two x86-64 cores that were busy with other work too, torch 2.13, bfloat16, batch 32:
mini 2.80 and 2.41 steps/s against 0.56 and 0.59 (5.0 and 4.1 times as fast), peak memory 758 and 520 MiB against 688
and 693; the first of ours also encoded the folder. storybook-sd's UNet, drawing and a GPU have not been measured.
"""

import argparse
import csv
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from torch.utils.data import DataLoader

from helpers.images import ROOT
from storybook.sample import seen_prompts
from storybook.write_dataset import close_ups, in_brief, write
from training.dataset import encode, read, to_square, to_tensor
from training.loop import Schedule, choose_attention_kernel, make_accelerator, train
from training.mini import ALPHA_BAR, Denoising, UNet, batches, bundled

BATCH, PICTURES, WARM = 32, 128, 3


class Wrapped(torch.nn.Module):
    """diffusers' UNet with the arguments and the answer of ours."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, t, text):
        return self.unet(x, t, text).sample


def new_unet(model: str) -> torch.nn.Module:
    """Random weights in the shape of `training.mini.UNet` or of storybook-sd's UNet."""
    torch.manual_seed(0)
    if model == "mini":
        return UNet()
    return Wrapped(
        UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(ROOT / "models/storybook-sd/unet"))
    )


def ours(folder: Path, model: str, steps: int) -> list[float]:
    """Seconds of each step of `training.loop.train`."""
    encoded = encode(folder, *bundled(str(make_accelerator().device)))
    make_batch, starts = batches(encoded), []

    def timed(indices, generator):
        starts.append(time.perf_counter())
        return make_batch(indices, generator)

    unet = new_unet(model)
    with tempfile.TemporaryDirectory() as runs:
        train("ours", Denoising(unet), unet, timed, PICTURES, Schedule(steps + 1, BATCH, 1e-4), runs=Path(runs))
    return [later - start for start, later in zip(starts, starts[1:], strict=False)]


def recipe(folder: Path, model: str, steps: int) -> list[float]:
    """Seconds of each step of the recipe: a DataLoader, the frozen parts in the loop, AdamW, gradients cut at 1."""
    accelerator = make_accelerator()
    vae, text_encoder, tokenizer = bundled(str(accelerator.device))
    paths, captions = read(folder)
    unet, scheduler = new_unet(model), DDPMScheduler.from_config(DDPMScheduler.load_config(SCHEDULER))
    assert torch.allclose(scheduler.alphas_cumprod, ALPHA_BAR, rtol=1e-4)

    def collate(chosen):
        ids = tokenizer([captions[i] for i in chosen], padding="max_length", truncation=True, return_tensors="pt")
        return to_tensor([to_square(paths[i], 128) for i in chosen]), ids.input_ids

    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=True)
    loader = DataLoader(range(len(paths)), BATCH, shuffle=True, collate_fn=collate)
    unet, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    seconds = []
    while len(seconds) < steps:
        start = time.perf_counter()
        for pixels, ids in loader:
            with torch.no_grad(), accelerator.autocast():
                latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
                text = text_encoder(ids)[0]
            noise = torch.randn_like(latents)
            t = torch.randint(1000, (len(latents),), device=latents.device)
            answer = unet(scheduler.add_noise(latents, noise, t), t.float(), text)
            loss = (answer.float() - noise.float()).square().mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
            seconds.append(time.perf_counter() - start)
            start = time.perf_counter()
    return seconds[:steps]


SCHEDULER = ROOT / "models/storybook-sd/scheduler"
WAYS = {"ours": ours, "recipe": recipe}


def one(way: str, folder: Path, model: str, steps: int) -> None:
    """Run one way and print a line of JSON: steps a second without the first few, and peak memory in MiB."""
    choose_attention_kernel()
    seconds = WAYS[way](folder, model, steps + WARM)[WARM:]
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # KiB on Linux
    print(json.dumps({"steps_per_second": len(seconds) / sum(seconds), "peak_mib": peak}))


def compare(model: str, steps: int, rounds: int) -> None:
    """A B A B: both ways in turn, each in a fresh process, and the ratio of their speeds in each round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        write(folder, PICTURES, close_ups(), say=in_brief)
        for index in range(rounds):
            found = {}
            for way in WAYS:
                arguments = ["--way", way, "--folder", str(folder), "--model", model, "--steps", str(steps)]
                command = [sys.executable, "-m", "benchmarks.training", *arguments]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
                found[way] = json.loads(done.stdout.splitlines()[-1])
                speed, peak = found[way].values()
                print(f"round {index + 1}, {model}, {way:6}: {speed:.2f} steps/s, peak {peak:.0f} MiB", flush=True)
            ratio = found["ours"]["steps_per_second"] / found["recipe"]["steps_per_second"]
            print(f"round {index + 1}, {model}: ours is {ratio:.2f} times as fast")


def drawing(count: int = 16) -> None:
    """Pictures a second of storybook-sd, 10 steps: all in one batch, and one call for each."""
    pipe = DiffusionPipeline.from_pretrained(ROOT / "models/storybook-sd")
    pipe.set_progress_bar_config(disable=True)
    prompts = seen_prompts(count)
    pipe(prompts[:2], num_inference_steps=2)
    for _ in range(2):
        for name, parts in {"one batch": [prompts], "one by one": [[prompt] for prompt in prompts]}.items():
            start = time.perf_counter()
            for part in parts:
                pipe(part, num_inference_steps=10)
            print(f"{name}: {count / (time.perf_counter() - start):.2f} pictures/s", flush=True)


def time_to(accuracy: float) -> None:
    """When each run of `tools.mini_curves` first had that share of pictures right, pairs seen in training."""
    table = ROOT / "notebooks/data/mini_training.csv"
    if not table.exists():
        print(f"{accuracy:.0%} judged accuracy: not measured yet; `python -m tools.mini_curves` makes {table.name}")
        return
    with table.open() as file:
        rows = list(csv.DictReader(file))
    for objective in sorted({row["objective"] for row in rows}):
        reached = [row for row in rows if row["objective"] == objective and float(row["seen"]) >= accuracy]
        best = max(float(row["seen"]) for row in rows if row["objective"] == objective)
        when = f"after {float(reached[0]['seconds']):.0f} s" if reached else f"not reached; the most was {best:.0%}"
        print(f"{accuracy:.0%} judged accuracy, {objective}: {when}")


def main() -> None:
    """All of it, or one way in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=("mini", "storybook-sd"), default="mini")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--draw", action="store_true", help="drawing instead of training")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        one(args.way, args.folder, args.model, args.steps)
    elif args.draw:
        drawing()
    else:
        compare(args.model, args.steps, args.rounds)
        time_to(0.8)


if __name__ == "__main__":
    main()
