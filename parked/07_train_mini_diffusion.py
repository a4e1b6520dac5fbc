# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/diffusion-notebooks/diffusion-notebooks/blob/main/notebooks/07_train_mini_diffusion.ipynb)
#
# # Train it yourself
#
# You write a text-to-image model in about 150 lines, train it in front of you until it draws what you ask for, and break
# it in six ways that such models are broken in.
#
# | | Colab with a T4 (not needed) | any CPU |
# |---|---|---|
# | Download | none | none |
# | RAM | about 2 GB | about 2 GB |
# | VRAM | under 1 GB (estimated) | none |
# | Time | about 1 minute on a T4 (estimated) | about 1½ minutes on a CPU with two cores |
#
# It helps to have written the sampling loop in [03 The denoising loop](03_denoising_loop.ipynb) and met the loss in
# [06 Noise and training](06_noise_and_training.ipynb).
#
# A model that starts from nothing needs minutes before it draws anything (section 7 shows the curve). So this page brings
# weights that are *half trained*, 1.2 MB of them, and you train them on. Everything else is made on the page.

# %% cellView="form"
# @title Setup
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = "https://github.com/diffusion-notebooks/diffusion-notebooks"

# On Colab: fetch the repository, then install what is missing. Elsewhere all is in place already.
if "google.colab" in sys.modules and Path.cwd().name != "notebooks":
    folder = Path(REPOSITORY).name
    if not Path(folder).exists():
        if subprocess.run(["git", "clone", "--quiet", "--depth=1", "--branch=main", REPOSITORY]).returncode:
            raise RuntimeError(f"{REPOSITORY} could not be fetched: check the network, then run this cell again.")
    os.chdir(Path(folder, "notebooks"))
    have = {str(d.name).lower().replace("_", "-") for d in importlib.metadata.distributions()}
    wanted = [line for line in Path("../requirements.txt").read_text().splitlines() if ">=" in line]
    missing = [line for line in wanted if line.split(">=")[0] not in have]
    if missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *missing], check=True)

# Notebooks live in notebooks/; `helpers` and `storybook` live one folder up.
if str(Path.cwd().parent) not in sys.path:
    sys.path.insert(0, str(Path.cwd().parent))

# %%
import csv
import json
import math
import tempfile
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from IPython.display import display
from torch import nn

# %%
from helpers.images import grid
from helpers.loading.versions import no_bars
from storybook.judge import judge, share
from storybook.sample import held_out_prompts, seen_prompts
from storybook.write_dataset import training_scenes, write
from training import mini
from training.dataset import encode, read, to_square, to_tensor
from training.loop import Schedule, choose_attention_kernel, train
from training.mini import add_noise, follow, timestep_embedding

# %%
SEED = 0  # @param {type:"integer"}
torch.manual_seed(SEED)
choose_attention_kernel()  # on a CPU the plain products train faster than the fused kernel
device = "cuda" if torch.cuda.is_available() else "cpu"
work = Path(tempfile.mkdtemp())
print(f"training on {device}")

# %% [markdown]
# ## 1. Pictures and captions
#
# **Idea.** A training set is a folder: pictures in `images`, and `captions.json`, which says what each of them shows.
# The command `python -m storybook.write_dataset FOLDER --single` writes such a folder from the storybook world, one thing
# in each picture. Eight pairs of colour and thing, such as red trees, are never in it: they are our exam.

# %%
folder = work / "storybook"
write(folder, 240, training_scenes(single=True))
captions = json.loads((folder / "captions.json").read_text())
print(*list(captions.items())[:3], sep="\n")

# %%
# The first five pictures of the folder, each with its caption.
names = list(captions)[:5]
grid([to_square(folder / "images" / name, 128) for name in names], labels=[captions[name] for name in names])

# %% [markdown]
# `read` takes anyone's pictures, in any format and size: `to_square` scales each until it covers a square, and keeps the
# middle. What cannot work is said in one sentence, before any work starts.

# %%
paths, texts = read(folder)
for file, caption in (("lost.png", "a red boat"), ("00000.png", " ")):
    spoiled = captions | {file: caption}
    (folder / "captions.json").write_text(json.dumps(spoiled))
    try:
        read(folder)
    except (FileNotFoundError, ValueError) as error:
        print(str(error).replace(str(folder), "FOLDER"))
(folder / "captions.json").write_text(json.dumps(captions))
assert read(folder) == (paths, list(captions.values()))

# %% [markdown]
# ## 2. Encode once
#
# **Idea.** The VAE and the text encoder of the bundled storybook-sd stay as they are; only the UNet in between learns. So
# their answers never change, and we compute them once: for each picture the latents, for each caption one row of numbers a
# token.

# %%
# NBVAL_CHECK_OUTPUT
with no_bars():
    vae, text_encoder, tokenizer = mini.bundled(device)
pixels = to_tensor([to_square(path, 128) for path in paths[:4]]).to(device)
with torch.no_grad():
    posterior = vae.encode(pixels).latent_dist
    tokens = tokenizer(texts[:4], padding="max_length", truncation=True, return_tensors="pt").input_ids
    rows = text_encoder(tokens.to(device))[0]
latents = posterior.mean * vae.config.scaling_factor
print(f"pixels {tuple(pixels.shape)}, latents {tuple(latents.shape)}, text {tuple(rows.shape)}")

# %% [markdown]
# **Library.** `encode` does this for the folder, and keeps the result in it under a name made of the contents of all
# files. The second call reads it back.

# %%
data = encode(folder, vae, text_encoder, tokenizer)
again = encode(folder, vae, text_encoder, tokenizer)
assert all(torch.equal(data[name], again[name]) for name in data)
assert torch.allclose(data["latents"][:4, 0].float(), latents.cpu(), atol=0.02)
assert torch.allclose(data["text"][:4].float(), rows.cpu(), atol=0.02)
numbers = pixels[0].numel() / latents[0].numel()
print(f"{len(paths)} pictures encoded, {numbers:.0f} times fewer numbers in each; spread {latents.std():.2f}")

# %% [markdown]
# ## 3. The network, block by block
#
# **Idea.** The UNet gets noisy latents, the time $t$ and the text, and answers with something of the latents' shape. It
# has two levels, 16 × 16 and 8 × 8. The time comes as a row of waves, since a network hears a row of numbers better than
# one number between 0 and 1,000.

# %%
# Each row is one time step as the network hears it: 40 numbers, cosines on the left, sines on the right.
times = torch.arange(0.0, 1000, 10)
plt.figure(figsize=(5, 2.4))
plt.imshow(timestep_embedding(times, 40), aspect="auto", extent=(0, 40, 1000, 0), cmap="coolwarm")
plt.xlabel("number")
plt.ylabel("$t$")
plt.show()


# %% [markdown]
# A *residual block* adds what it has found to what came in. The time shifts all pixels of a channel alike.

# %%
class ResidualBlock(nn.Module):
    def __init__(self, inputs, outputs, time_width):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time_width, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x, time):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


# %% [markdown]
# *Attention*: each position asks a question of all tokens, and gets a mixture of their values, weighted by how well each
# key fits. PyTorch does it in one call.

# %%
class Attention(nn.Module):
    def __init__(self, width, context_width, heads=4):
        super().__init__()
        self.heads, self.query = heads, nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(context_width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x, context):
        parts = (self.query(x), *self.key_value(context).chunk(2, -1))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


# %% [markdown]
# That one call is this formula, $\mathrm{softmax}(QK^\top/\sqrt{d})\,V$:

# %%
q, k, v = (torch.randn(2, 4, n, 16) for n in (64, 32, 32))
weights = (q @ k.transpose(2, 3) / math.sqrt(16)).softmax(-1)  # 64 positions, 32 tokens
assert torch.allclose(F.scaled_dot_product_attention(q, k, v), weights @ v, atol=1e-5)
print(f"each row of {tuple(weights.shape)} sums to {weights.sum(-1).mean():.2f}")


# %% [markdown]
# A *transformer block* lets positions look at each other (*self-attention*), then at the text (*cross-attention*), then
# think alone.

# %%
class TransformerBlock(nn.Module):
    def __init__(self, width, text_width):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.to_itself, self.to_text = Attention(width, width), Attention(width, text_width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x, text):
        tokens = x.flatten(2).transpose(1, 2)
        normed = self.norms[0](tokens)
        tokens = tokens + self.to_itself(normed, normed)
        tokens = tokens + self.to_text(self.norms[1](tokens), text)
        return (tokens + self.mlp(self.norms[2](tokens))).transpose(1, 2).unflatten(2, x.shape[-2:])


# %%
# NBVAL_CHECK_OUTPUT
x, embedded, text = torch.randn(2, 64, 8, 8), torch.randn(2, 80), torch.randn(2, 32, 128)
for block, more in ((ResidualBlock(64, 64, 80), embedded), (TransformerBlock(64, 128), text)):
    print(f"{type(block).__name__:17} {tuple(x.shape)} -> {tuple(block(x, more).shape)}")
    assert block(x, more).shape == x.shape


# %% [markdown]
# Now the whole. The way down halves the picture; the way up doubles it, and takes at each level what the way down had at
# *that* level: the *skips*. The last layer starts at zero, so the network begins by answering "nothing", which is the mean.

# %%
class UNet(nn.Module):
    def __init__(self, channels=4, fine=40, coarse=64, text_width=128):
        super().__init__()
        time = 2 * fine
        self.time = nn.Sequential(nn.Linear(fine, time), nn.SiLU(), nn.Linear(time, time), nn.SiLU())
        self.enter, self.down = nn.Conv2d(channels, fine, 3, padding=1), ResidualBlock(fine, fine, time)
        self.shrink = nn.Conv2d(fine, fine, 3, stride=2, padding=1)
        self.down2, self.middle, self.up2 = (ResidualBlock(n, coarse, time) for n in (fine, coarse, 2 * coarse))
        self.look_down, self.look_middle, self.look_up = (TransformerBlock(coarse, text_width) for _ in range(3))
        self.grow, self.up = nn.Conv2d(coarse, fine, 3, padding=1), ResidualBlock(2 * fine, fine, time)
        self.norm, self.leave = nn.GroupNorm(8, fine), nn.Conv2d(fine, channels, 3, padding=1)
        _ = [nn.init.zeros_(part) for part in self.leave.parameters()]


# %%
def forward(self, x, t, text):
    time = self.time(timestep_embedding(t, 40))
    large = self.down(self.enter(x), time)  # 16 x 16
    small = self.look_down(self.down2(self.shrink(large), time), text)  # 8 x 8
    h = self.look_middle(self.middle(small, time), text)
    h = self.look_up(self.up2(torch.cat([h, small], 1), time), text)  # the skip of 8 x 8
    h = self.grow(F.interpolate(h, scale_factor=2.0))
    h = self.up(torch.cat([h, large], 1), time)  # the skip of 16 x 16
    return self.leave(F.silu(self.norm(h)))


UNet.forward = forward

# %% [markdown]
# **Library.** `training/mini.py` has the same network for the commands below. With the same weights, the two agree.

# %%
# NBVAL_CHECK_OUTPUT
halfway, _ = mini.load("data/mini_noise.safetensors")
ours = UNet()
ours.load_state_dict(halfway.state_dict())
x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([100.0, 900.0]), data["text"][:2].float()
with torch.no_grad():
    assert torch.equal(ours(x, t, text), halfway(x, t, text))
print(f"{sum(p.numel() for p in ours.parameters()):,} weights, {tuple(x.shape)} -> {tuple(ours(x, t, text).shape)}")

# %% [markdown]
# ## 4. What it has to learn
#
# **Idea.** Mix latents and noise, and ask for the noise: $\mathcal L = \lVert \varepsilon - \varepsilon_\theta(x_t, t, c)
# \rVert^2$, averaged over pictures, times and noises (see [06](06_noise_and_training.ipynb)). One caption in ten is
# replaced by the empty one, so that the network also learns to answer without a text: *guidance* will need that.

# %%
kept = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)  # alpha-bar of Stable Diffusion


def draw_batch(indices, generator):
    mean, std = data["latents"][indices].float().unbind(1)
    latents = mean + std * torch.randn(mean.shape, generator=generator)
    noise = torch.randn(mean.shape, generator=generator)
    u = (torch.arange(len(indices)) + torch.rand(len(indices), generator=generator)) / len(indices)
    dropped = torch.rand(len(indices), generator=generator) < 0.1
    text = torch.where(dropped[:, None, None], data["empty"], data["text"][indices])
    return latents, noise, u, text.float()


# %% [markdown]
# The times `u` are shares of 1,000, one from each of 32 equal slices, so that no batch is all easy or all hard. **Predict,
# then run:** which loss does a network that answers "nothing" have?

# %%
latents, noise, u, text = draw_batch(torch.arange(32), torch.Generator().manual_seed(SEED))
t = (1000 * u).long()
level = kept[t][:, None, None, None]
noisy = level.sqrt() * latents + (1 - level).sqrt() * noise
first = (UNet()(noisy, t, text) - noise).square().mean().item()
assert abs(first - 1) < 0.05 and torch.equal(noisy, add_noise(latents, noise, u, "noise")[0])
print(f"the first loss: {first:.3f}")

# %% [markdown]
# <details><summary>Answer</summary>
#
# 1, up to chance: the mean square of noise with unit variance. A first loss far from 1 is a sign that something is scaled
# wrongly.
#
# </details>
#
# ## 5. The loop
#
# **Code.** All of training. Three lines guard it: the *learning rate* warms up, because the first steps' gradients are the
# wildest; a gradient longer than 1 is shortened, so that one odd batch cannot throw the weights far; and an *average* of
# the weights over time (EMA) is what draws in the end.

# %%
def by_hand(unet, steps, peak):
    optimizer, losses = torch.optim.AdamW(unet.parameters()), []
    average = [p.detach().clone() for p in unet.parameters()]
    for step in range(steps):
        generator = torch.Generator().manual_seed(1009 * step)  # as in training/loop.py
        indices = torch.randint(len(texts), (32,), generator=generator)
        latents, noise, u, text = draw_batch(indices, generator)
        noisy, t, target = add_noise(latents, noise, u, "noise")
        loss = (unet(noisy, t, text) - target).square().mean()
        optimizer.param_groups[0]["lr"] = peak * (step + 1) / steps  # all of it is warm-up here
        losses.append(update(unet, optimizer, loss, average))
    return losses


# %%
def update(unet, optimizer, loss, average, decay=0.9):
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        for old, new in zip(average, unet.parameters(), strict=True):
            old.lerp_(new, 1 - decay)
    return loss.item()


# %% [markdown]
# **Library.** `training/loop.py` is the one loop of this repository: what trained the bundled models, what page 09 uses.
# It adds what a long run needs: a log, checkpoints, resuming after a kill to bitwise the same weights, half precision where
# the processor multiplies it, several processes. Eight steps of both, from the same weights:

# %%
torch.manual_seed(SEED)
start = UNet().state_dict()
hand, library = UNet(), mini.UNet()
hand.load_state_dict(start)
library.load_state_dict(start)
losses = by_hand(hand, 8, 2e-3)
short = Schedule(steps=8, batch_size=32, learning_rate=2e-3, warmup=8)
run = train("eight", mini.Denoising(library), library, mini.batches(data), len(texts), short, runs=work)
logged = [float(row["loss"]) for row in csv.DictReader((run / "log.csv").open())]
print(*(f"{a:.3f} {b:.3f}" for a, b in zip(losses, logged, strict=True)), sep="\n")
assert max(abs(a - b) for a, b in zip(losses, logged, strict=True)) < 0.02 and losses[-1] < losses[0]

# %% [markdown]
# ## 6. Watch it learn
#
# The half-trained weights know colours and settings, but most shapes are still mush. We train them on for 80 steps, and
# look at the same six prompts, from the same noise, on the way.

# %%
def draw(unet, prompts, steps=10, guidance=3.0, sampler=mini.reverse, seed=SEED, **settings):
    text, empty = (mini.embed(t, text_encoder, tokenizer) for t in (prompts, [""]))
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed)).to(device)
    latents = sampler(mini.guided(unet, text, empty, guidance), noise, steps, **settings)
    return mini.decode(vae, latents)


# %%
watched = ["a red boat by the sea", "a blue house in the snow", "a large yellow star at night"]
watched += ["a green mushroom in a meadow", "a pink heart on a plain background", "a purple rocket at sunset"]
unet, _ = mini.load("data/mini_noise.safetensors")
unet.to(device)
strip = [draw(unet, watched)]
settings = {"batch_size": 32, "learning_rate": 1e-3, "warmup": 10, "ema_decay": 0.95}
plan = Schedule(steps=80, save_every=40, **settings)
denoising, make_batch = mini.Denoising(unet), mini.batches(data)
run = train("more", denoising, unet, make_batch, len(texts), plan, lambda s: strip.append(draw(unet, watched)), work)

# %%
# Six prompts from the same noise: with the half-trained weights, after 40 more steps, and after 80.
labels = watched + [""] * 12
grid([picture for row in strip for picture in row], columns=6, labels=labels)

# %% [markdown]
# The log has one loss a step. It jumps about, since each batch has other times in it. So measure the loss *at* each time,
# with the same noise before and after, on 64 pictures that are in nobody's training set.

# %%
fresh = work / "fresh"
write(fresh, 64, ((s, r) for k, (s, r) in enumerate(training_scenes(single=True)) if k >= 20_000))
exam = encode(fresh, vae, text_encoder, tokenizer)


@torch.no_grad()
def loss_at(unet, u, exam, objective="noise"):
    noise = torch.randn(len(exam["text"]), 4, 16, 16, generator=torch.Generator().manual_seed(1))
    batch = (exam["latents"][:, 0].float(), noise, torch.full((len(noise),), u), exam["text"].float())
    return mini.Denoising(unet, objective)(*(part.to(device) for part in batch))["loss"].item()


# %%
# Loss by time: half-trained weights, and after the page's steps. On the right the losses of the log, one a step.
halfway = mini.load("data/mini_noise.safetensors")[0].to(device)
shares = [0.05, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9]
before, after = ([loss_at(model, u, exam) for u in shares] for model in (halfway, unet))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.semilogy(shares, before, "o--", label="half trained")
left.semilogy(shares, after, "o-", label="80 steps later")
left.set(xlabel="$t$ / 1000", ylabel="loss on fresh pictures")
left.legend()
right.plot([float(row["loss"]) for row in csv.DictReader((run / "log.csv").open())])
right.set(xlabel="step", ylabel="loss of the batch")
plt.show()

# %%
print(f"mean over times: {sum(before) / 7:.4f} half trained, {sum(after) / 7:.4f} now")
assert sum(after) < sum(before) and before[0] > 4 * before[-1]

# %% [markdown]
# Little noise is the hard case: what is left of the noise hides among the picture's own detail, and the loss there is
# largest, whichever weights you take.
#
# ## 7. Draw, and have it judged
#
# **Code.** Sampling goes the way back: predict the noise, work out the clean latents that this implies, mix them with less
# noise, repeat. With `eta = 0` the noise that goes back in is the predicted one (DDIM), with `eta = 1` most of it is fresh
# (DDPM). *Guidance* asks twice, with the text and without, and goes further in the direction of the difference.

# %%
@torch.no_grad()
def backwards(unet, x, text, empty, steps, guidance):
    for k in range(steps):
        t, after = round(1000 - 1000 * k / steps) - 1, round(1000 - 1000 * (k + 1) / steps) - 1
        level, goal = kept[t], kept[after] if after >= 0 else torch.tensor(1.0)
        times = torch.full((2 * len(x),), float(t), device=x.device)
        without, wanted = unet(torch.cat([x, x]), times, torch.cat([empty.expand_as(text), text])).chunk(2)
        noise = without + guidance * (wanted - without)
        clean = (x - (1 - level).sqrt() * noise) / level.sqrt()
        x = goal.sqrt() * clean + (1 - goal).sqrt() * noise
    return x


# %% [markdown]
# **Library.** `mini.reverse` has both samplers in the same few lines, and diffusers' `DDIMScheduler` agrees with them.

# %%
text, empty = (mini.embed(t, text_encoder, tokenizer) for t in (watched, [""]))
noise = torch.randn(6, 4, 16, 16, generator=torch.Generator().manual_seed(SEED)).to(device)
predict = mini.guided(unet, text, empty, 3.0)
betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
right_way = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}


@torch.no_grad()
def by_library(scheduler, x, steps=10):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(predict(x, t), t, x).prev_sample
    return x


# %%
found = backwards(unet, noise, text, empty, 10, 3.0)
assert torch.allclose(found, mini.reverse(predict, noise, 10), atol=0.01)
assert torch.allclose(found, by_library(DDIMScheduler(**betas, **right_way), noise), atol=0.01)
mini.save(unet, work / "mini.safetensors", "noise")
direct = mini.generate_images_direct(unet_path=work / "mini.safetensors", device=device, prompts=watched, steps=10)
print(f"three loops agree; a file of {(work / 'mini.safetensors').stat().st_size / 1e6:.1f} MB drew {len(direct)} more")

# %% [markdown]
# `generate_images_direct` is all of it in one call, from a checkpoint: text embedding, noise, the loop, decoding. It opens
# safetensors files only: a `.pt` file may hold programs that run when it is opened.

# %%
# DDIM and DDPM, 20 steps each from the same noise, and what `generate_images_direct` drew from the file in 10.
generator = torch.Generator().manual_seed(SEED)
drawn = draw(unet, watched, 20) + draw(unet, watched, 20, eta=1.0, generator=generator) + direct
grid(drawn, columns=6, labels=["DDIM"] * 6 + ["DDPM"] * 6 + ["direct"] * 6)

# %% [markdown]
# **Judged.** Looking at pictures is easy to do kindly. The judge of this repository reads what a picture shows; it was
# trained on renders alone. Here are 24 prompts with pairs of colour and thing that training pictures show, and 24 with the
# eight pairs that none shows, before and after the page's steps.

# %%
exams = {"seen pairs": seen_prompts(24), "held-out pairs": held_out_prompts(24)}
parts = ("object", "colour", "setting")
rights = {}
for name, prompts in exams.items():
    for when, model in (("half trained", halfway), ("80 steps later", unet)):
        rights[name, when] = share(judge(draw(model, prompts), prompts), *parts)
        print(f"{name:15} {when:15} {rights[name, when]:.0%} right in object, colour and setting")

# %% [markdown]
# Twenty-four pictures are few: a share from them can be off by 20 percentage points. The whole run was judged with more,
# by `python -m tools.mini_curves`, which trained the same network from nothing with two objectives (section 9 has the
# second) and kept its table.

# %%
# Accuracy against minutes of training on two CPU cores, from nothing; bands are 95 % intervals.
table = list(csv.DictReader(Path("data/mini_training.csv").open()))
figure, panels = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True, layout="constrained")
for axes, objective in zip(panels, mini.OBJECTIVES, strict=True):
    chosen = [row for row in table if row["objective"] == objective]
    minutes = [float(row["seconds"]) / 60 for row in chosen]
    for sort in ("seen", "held_out"):
        low, middle, high = ([100 * float(row[sort + end]) for row in chosen] for end in ("_low", "", "_high"))
        axes.plot(minutes, middle, label=sort.replace("_", "-") + " pairs")
        axes.fill_between(minutes, low, high, alpha=0.2)
    axes.set(title=objective, xlabel="minutes", ylabel="% right", ylim=(0, 100))
    axes.legend()
plt.show()

# %% [markdown]
# **Memorised?** A model that only knows its pictures by heart would draw copies of them. So look for the nearest training
# picture of each drawing, and compare the distance with that of *fresh* renders, which cannot be copies.

# %%
def to_nearest(pictures):
    asked = to_tensor(pictures).flatten(1)
    distances = torch.cdist(asked, known.flatten(1)) / asked.shape[1] ** 0.5 / 2  # root mean square, 0 to 1
    return distances.min(1)


known = to_tensor([to_square(path, 128) for path in paths])
drawn = draw(unet, watched, 20)
near, which = to_nearest(drawn)
fresh_near, _ = to_nearest([to_square(path, 128) for path in read(fresh)[0]])
print(f"to the nearest of {len(paths)} training pictures: drawn {near.median():.3f}, fresh {fresh_near.median():.3f}")
assert near.min() > 0.5 * fresh_near.min()

# %%
# Above what the model drew, below the nearest of its 240 training pictures.
nearest = [to_square(paths[index], 128) for index in which]
grid(drawn + nearest, columns=6, labels=[f"{d:.3f}" for d in near] + ["nearest"] * 6)

# %% [markdown]
# ## 8. Six ways to fail
#
# Many models of this kind are built from tutorials and draw fog. Here are six faults that we found in one of them, each
# put into the working model, one at a time. First three faults of *sampling*: the weights are right, the loop is not.
#
# **Fault 1: other betas.** `DDPMScheduler(1000)` has its own default schedule, linear from 0.0001 to 0.02. A network
# that learned on Stable Diffusion's is told the wrong amount of noise at every step.
#
# **Fault 2: clipped latents.** The same default, `clip_sample=True`, cuts the clean latents to -1 to 1 in each step. That
# is right for pixels; latents of unit variance are often outside.
#
# **Fault 3: no empty captions in training.** Then guidance asks the network something that it has never seen. We play
# that with zeros in the place of the text, as that model did with no text at all.
#
# **Predict, then run:** which of the three does the most damage?

# %%
prompts = seen_prompts(18)
text = mini.embed(prompts, text_encoder, tokenizer)
noise = torch.randn(18, 4, 16, 16, generator=torch.Generator().manual_seed(SEED)).to(device)
predict = mini.guided(unet, text, empty, 3.0)
loops = {
    "as it should be": DDIMScheduler(**betas, **right_way),
    "1: linear betas": DDIMScheduler(**right_way),
    "2: clipped": DDIMScheduler(**betas, **(right_way | {"clip_sample": True})),
}
faults = {name: mini.decode(vae, by_library(loop, noise, 15)) for name, loop in loops.items()}
predict = mini.guided(unet, text, torch.zeros_like(empty), 3.0)
faults["3: an empty caption never seen"] = mini.decode(vae, by_library(loops["as it should be"], noise, 15))

# %%
# The same prompts and the same noise: the right loop, then the three faults.
for name, pictures in faults.items():
    print(f"{name:32} {share(judge(pictures, prompts), *parts):4.0%} of {len(prompts)} right")
rows = [picture for pictures in faults.values() for picture in pictures[:6]]
grid(rows, columns=6, labels=[name for name in faults for _ in range(6)])

# %%
outside = (data["latents"][:, 0].float().abs() > 1).float().mean()
at = {name: loop.alphas_cumprod[500].sqrt() for name, loop in loops.items()}
print(f"latents outside -1 to 1: {outside:.0%}")
print(f"share of the picture at t = 500: {at['as it should be']:.2f}, told by linear betas: {at['1: linear betas']:.2f}")
assert outside > 0.2 and at["1: linear betas"] < 0.7 * at["as it should be"]


# %% [markdown]
# **Fault 4: skips that do not line up.** In that model the skip of each level was shrunk by one level before it was
# handed over, so the way up never saw the fine detail of the noise that it had to predict. We train both networks from
# nothing, for the same 40 steps, on little noise, where detail is what counts.

# %%
class Misaligned(mini.UNet):
    def forward(self, x, t, text):
        time = self.time(timestep_embedding(t, self.enter.out_channels))
        large = self.down(self.enter(x), time)
        small = self.look_down(self.down2(self.shrink(large), time), text)
        h = self.look_middle(self.middle(small, time), text)
        h = self.look_up(self.up2(torch.cat([h, small], 1), time), text)
        h, blurred = (F.interpolate(part, scale_factor=2.0) for part in (h, F.interpolate(large, scale_factor=0.5)))
        return self.leave(F.silu(self.norm(self.up(torch.cat([self.grow(h), blurred], 1), time))))


# %%
def low_noise(indices, generator):
    latents, noise, u, text = draw_batch(indices, generator)
    return latents, noise, 0.3 * u, text


quick = Schedule(steps=40, batch_size=16, learning_rate=3e-3, warmup=5)
skips = {}
for name, network in (("aligned", mini.UNet), ("misaligned", Misaligned)):
    torch.manual_seed(SEED)
    built = network()
    train(name, mini.Denoising(built), built, low_noise, len(texts), quick, runs=work)
    skips[name] = loss_at(built, 0.15, exam)
print(skips)
assert skips["aligned"] < skips["misaligned"]

# %% [markdown]
# **Fault 5: 37 pictures.** That many were in its folder, for 22,200 steps. A network can learn so few by heart: on them
# the loss goes on falling, on fresh ones it rises. Sixty more steps on 37 pictures from the half-trained weights:

# %%
few = {"latents": data["latents"][:37], "text": data["text"][:37], "empty": data["empty"]}
learner = mini.load("data/mini_noise.safetensors")[0].to(device)
narrow = Schedule(steps=60, batch_size=32, learning_rate=2e-3, warmup=5)
gaps = {"half trained": learner, "37 pictures": learner, "240 pictures": unet}
for name, model in gaps.items():
    if name == "37 pictures":
        train("few", mini.Denoising(learner), learner, mini.batches(few), 37, narrow, runs=work)
    own, others = (sum(loss_at(model, u, part) for u in (0.15, 0.3, 0.6)) / 3 for part in (few, exam))
    gaps[name] = others - own
    print(f"{name:13} its 37: {own:.4f}   64 fresh ones: {others:.4f}")
assert gaps["37 pictures"] > gaps["half trained"]

# %% [markdown]
# **Fault 6: a batch of one.** The gradient of one picture at one time points almost anywhere. Compare gradients of small
# and large batches with that of 256 examples: a cosine of 1 is the same direction, 0 is none in common.

# %%
def gradient(count, seed):
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(len(texts), (count,), generator=generator)
    halfway.zero_grad()
    mini.Denoising(halfway)(*(part.to(device) for part in draw_batch(indices, generator)))["loss"].backward()
    return torch.cat([p.grad.flatten() for p in halfway.parameters()])


whole = gradient(256, 1000)
cosines = {n: [F.cosine_similarity(gradient(n, k), whole, 0).item() for k in range(6)] for n in (1, 8, 32)}
print(*(f"batch of {n:2}: cosine {sum(found) / 6:.2f}" for n, found in cosines.items()), sep="\n")
assert sum(cosines[1]) < sum(cosines[8]) < sum(cosines[32])

# %% [markdown]
# ## 9. The same network as a rectified flow
#
# **Idea.** Stable Diffusion 3 does not ask for the noise. It draws a straight line from the picture to the noise and asks
# for the line's direction, $\varepsilon - x_0$. To draw, walk back along the answers. Same network, same pictures, same
# number of steps from nothing, and the same 80 steps here:

# %%
flow, objective = mini.load("data/mini_flow.safetensors")
flow.to(device)
flow_batches = mini.batches(data, "flow")
plan = Schedule(steps=80, **settings)
train("flow", mini.Denoising(flow, objective), flow, flow_batches, len(texts), plan, runs=work)
samplers = {"noise, DDIM": (unet, mini.reverse), "flow, Euler": (flow, follow)}

# %%
# Both objectives with 4 and with 20 steps, the same prompts and the same noise.
shown, prompts = {}, seen_prompts(18)
for name, (model, sampler) in samplers.items():
    for steps in (4, 20):
        shown[f"{name}, {steps} steps"] = draw(model, prompts, steps, sampler=sampler)
for name, pictures in shown.items():
    print(f"{name:22} {share(judge(pictures, prompts), *parts):4.0%} of {len(prompts)} right")
rows = [picture for pictures in shown.values() for picture in pictures[:6]]
grid(rows, columns=6, labels=[name for name in shown for _ in range(6)])

# %% [markdown]
# The two losses cannot be compared, since they ask for different things; the pictures can. Eighteen prompts decide
# nothing small, so the curves of section 7 are what to look at for which objective learns faster here.
#
# ## 10. What it was never shown
#
# **Idea.** A red tree is in no picture, but red things and trees are. How many pairs can be left out before a model stops
# putting them together? `python -m tools.mini_curves composition` trained the network anew with 10 % to 85 % of the 96
# pairs withheld, one large thing on a plain background, and asked each time for the same eight pairs that none had seen.

# %%
# Right in object and colour against the share of pairs withheld: pairs that were shown, and the eight that never were.
table = list(csv.DictReader(Path("data/mini_composition.csv").open()))
withheld = [100 * int(row["withheld"]) / int(row["pairs"]) for row in table]
figure, axes = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
for sort in ("seen", "held_out"):
    low, middle, high = ([100 * float(row[sort + end]) for row in table] for end in ("_low", "", "_high"))
    axes.plot(withheld, middle, "o-", label=sort.replace("_", "-") + " pairs")
    axes.fill_between(withheld, low, high, alpha=0.2)
axes.set(xlabel="% of pairs withheld", ylabel="% right", ylim=(0, 102))
axes.legend()
plt.show()

# %%
for share_out, row in zip(withheld, table, strict=True):
    print(f"{share_out:3.0f} % withheld: seen {float(row['seen']):4.0%}, held-out {float(row['held_out']):4.0%}")

# %% [markdown]
# COMPOSITION_PROSE
#
# ## 11. More than one processor
#
# The loop is the same on one processor and on many: every process draws the same random numbers for the whole batch and
# takes its share of it, so the losses are those of one process. From a page, `notebook_launcher` starts the processes. With
# one device it just calls the function; with several, run this cell right after a restart, before anything else has used
# them.

# %%
from accelerate import notebook_launcher


def job():
    torch.manual_seed(SEED)
    fresh_start = mini.UNet()
    plan = Schedule(steps=4, batch_size=16, learning_rate=1e-3)
    train("launched", mini.Denoising(fresh_start), fresh_start, mini.batches(data), len(texts), plan, runs=work)


notebook_launcher(job, num_processes=max(1, torch.cuda.device_count()))
print(len((work / "launched/log.csv").read_text().splitlines()) - 1, "steps in the log")

# %% [markdown]
# At length, from a terminal, with as many processes as you name:
#
# ```bash
# python -m storybook.write_dataset pictures --count 4000 --single
# accelerate launch --multi_gpu --num_processes 2 -m training.train_mini pictures --name mine --steps 1600
# accelerate launch --multi_gpu --num_processes 2 -m training.draw_mini outputs/train/mine/weights-001600.safetensors prompts.txt drawn
# ```
#
# Kill either of them, run it again, and it goes on where it was. [docs/larger_runs.md](../docs/larger_runs.md) has the
# commands for eight cards and for several machines, and what a run of Stable Diffusion's own size takes.
#
# ## 12. Play
#
# Ask the model that you trained.


# %%
def play(prompt="a red boat by the sea", steps=20, guidance=3.0, seed=0):
    return draw(unet, [prompt], steps, guidance, seed=seed)[0].resize((256, 256))


controls = widgets.interactive(
    lambda **asked: display(play(**asked)), {"manual": True}, prompt="a red boat by the sea", steps=(1, 50, 1),
    guidance=(0.0, 10.0, 0.5), seed=(0, 99, 1),
)  # fmt: skip
controls

# %%
# The panel's default: a red boat by the sea, 20 steps, guidance 3.
play()

# %% [markdown]
# ## Exercises
#
# **1. How much is cached?** How many bytes do the cached latents (mean and spread) of one picture take in half precision?

# %%
my_bytes = None  # an integer

# %%
if my_bytes is None:
    print("Nothing to check yet: replace None in the cell above.")
else:
    assert my_bytes == data["latents"][0].nbytes, "Count the numbers of the shape (2, 4, 16, 16)."
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# my_bytes = 2 * 4 * 16 * 16 * 2
# ```
#
# </details>
#
# **2. Velocity.** With $x_t = a\,x_0 + b\,\varepsilon$ and $a^2 + b^2 = 1$, a third objective asks for $v = a\,\varepsilon -
# b\,x_0$. A sampler needs the noise: which formula gives $\varepsilon$ from $x_t$ and $v$?

# %%
def noise_from(x, v, a, b):
    return None  # your formula


# %%
clean, noise, a, b = torch.randn(5), torch.randn(5), 0.6, 0.8
if noise_from(clean, noise, a, b) is None:
    print("Nothing to check yet: replace None in the cell above.")
else:
    guess = noise_from(a * clean + b * noise, a * noise - b * clean, a, b)
    assert torch.allclose(guess, noise, atol=1e-5), "Put both definitions in and sort by the noise."
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# ```python
# def noise_from(x, v, a, b):
#     return b * x + a * v
# ```
#
# </details>
#
# **3. Your own pictures.** Put five photographs of yours and a `captions.json` into a folder, `encode` it, and train `unet`
# on for 100 steps. Which of the cells of section 7 tells you whether it has learned them by heart?
#
# <details><summary>Solution</summary>
#
# The nearest training pictures, with your folder's as `known`; and `loss_at` on your pictures beside `exam`. With five
# pictures it will be by heart.
#
# </details>
#
# ## What to read next
#
# * 09, which fine-tunes the large models with LoRA, uses the same loop.
# * [High-Resolution Image Synthesis with Latent Diffusion Models](https://arxiv.org/abs/2112.10752): the VAE, the UNet and
#   cross-attention that this page writes small.
# * [Denoising Diffusion Probabilistic Models](https://arxiv.org/abs/2006.11239) and [Denoising Diffusion Implicit
#   Models](https://arxiv.org/abs/2010.02502): the two samplers.
# * [Classifier-Free Diffusion Guidance](https://arxiv.org/abs/2207.12598): why one caption in ten is empty.
# * [Flow Straight and Fast](https://arxiv.org/abs/2209.03003): rectified flow.
# * [Compositional Abilities Emerge Multiplicatively](https://arxiv.org/abs/2310.09336): when a model begins to combine what
#   it knows.
