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
# [![Open In
# Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/diffusion-notebooks/diffusion-notebooks/blob/main/notebooks/09_finetune_lora.ipynb)
#
# # Fine-tuning with LoRA
#
# You teach a model a thing, a style and one particular house that it has never seen, from a handful of pictures and in
# about a minute, and measure what it learned and what it forgot.
#
# | | Colab with a T4 (`sd15`) | any CPU (`storybook-sd`) |
# |---|---|---|
# | Download | 2.2 GB in every new session | none |
# | RAM | about 5 GB (estimated) | about 1.5 GB |
# | VRAM | about 10 GB (estimated) | none |
# | Time | about 15 minutes on a T4, download included (estimated) | about 90 seconds on a CPU with two cores |
#
# You need to know what training is, from [06 Noise and training](06_noise_and_training.ipynb), and how the prompt
# gets into the UNet, from [02 Inside Stable Diffusion 1.5](02_sd15_internals.ipynb).
#
# Figures say on which *rung* they stand. **Rung 1** is a small model that is part of this repository, whose pictures
# can be graded. On a GPU most pictures are **rung 2**, Stable Diffusion 1.5: to look at, nothing is claimed from
# them.

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
import random

import diffusers
import matplotlib.pyplot as plt
import numpy as np
import torch
import transformers
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

# %%
from helpers import lora
from helpers.generate import Settings, own_size
from helpers.images import ROOT, grid
from helpers.loading.download import LoadError
from helpers.metrics import mean_with_interval
from helpers.panel import prompt_panel
from helpers.pipelines import choose, load

# %%
from storybook import probe
from storybook.judge import judge
from storybook.sample import seen_prompts
from storybook.world import COLOURS, KINDS, SETTINGS, Scene, Thing, caption, render
from storybook.world.novel import ink_drawings, newcomers, off_ink
from training.inversion import add_word, fit_word, save_word
from training.lora import encode, fit

# %%
MODEL = "sd15"  # @param ["sd15", "storybook-sd"]
model = choose(MODEL)
pipe = load(model)
storybook, size = model.name == "storybook-sd", own_size(pipe)[0]
diffusers.utils.logging.set_verbosity_error()  # stock loading warns of every part that a file leaves as it is
transformers.utils.logging.set_verbosity_error()
# The large model learns more slowly, and less of it fits into one batch.
how = {"batch_size": 4, "learning_rate": 3e-3} if storybook else {"batch_size": 2, "learning_rate": 3e-4}
at_once, longer, steps, several = (14, 1, 10, 14) if storybook else (4, 3, 20, 4)

# %% [markdown]
# ## 1. The low-rank update, by hand
#
# **Idea.** A layer multiplies by a matrix $W$. Training all of it for a dozen pictures is slow, needs a copy of the
# model for every new thing, and spoils what the model knew. LoRA leaves $W$ as it is and adds the product of two thin
# matrices beside it, and only those learn:
#
# $$y = W x + B A x \qquad A: r \times d_\text{in} \quad B: d_\text{out} \times r$$
#
# $r$ is the *rank*. $A$ begins random and $B$ begins as zero, so at first nothing changes.
#
# **Code.** Take one layer of the model, the one that makes keys from the prompt in the middle of the UNet.

# %%
source = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
W, rank = source.weight.detach().float().cpu(), 4
d_out, d_in = W.shape
generator = torch.Generator().manual_seed(0)
A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
B = torch.randn(d_out, rank, generator=generator) / rank**0.5  # as if it had learned already
x = torch.randn(5, d_in, generator=generator)
by_hand = x @ W.T + (x @ A.T) @ B.T
print(f"W has {W.numel():,} numbers, A and B together {A.numel() + B.numel():,}")
assert A.numel() + B.numel() == rank * (d_in + d_out)

# %% [markdown]
# **Library.** `peft` puts the two matrices beside a layer of any network. `alpha` is a volume knob: what is added is
# $\frac{\alpha}{r}BA$, and with $\alpha=r$ it is the product as it is.

# %%
# NBVAL_CHECK_OUTPUT
net = torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=False))
_ = net.load_state_dict({"0.weight": W})
net = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"]), net)
fresh = net(x)
assert torch.allclose(fresh, x @ W.T, atol=1e-6)  # B is zero
with torch.no_grad():
    _ = net[0].lora_A["default"].weight.copy_(A), net[0].lora_B["default"].weight.copy_(B)
assert torch.allclose(net(x), by_hand, atol=1e-5)
assert torch.linalg.matrix_rank(B @ A) == rank
print("by hand = peft, and the update has rank", torch.linalg.matrix_rank(B @ A).item())

# %% [markdown]
# **Predict, then run.** $A$ is random and $B$ is zero. Which of the two changes in the very first step of training?

# %%
new = inject_adapter_in_model(
    LoraConfig(r=rank, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(d_in, d_out))
)
new(x).square().sum().backward()
moves = {part: getattr(new[0], part)["default"].weight.grad.abs().sum().item() > 0 for part in ("lora_A", "lora_B")}
print(moves)
assert moves == {"lora_A": False, "lora_B": True}

# %% [markdown]
# <details><summary>Answer</summary>
#
# Only $B$. What $A$ should do differently depends on what $B$ makes of it, and $B$ makes nothing of it yet: the
# gradient of $A$ has the factor $B^\top$. Were both zero, nothing would ever move.
#
# </details>
#
# **Merging.** Since $Wx + BAx = (W + BA)\,x$, a trained adapter can be added to the weights, and drawing costs nothing
# more than before. Section 5 does it with the whole model.
#
# ## 2. What the model has never seen
#
# Three newcomers. A *zorp* is a one-eyed creature, a new kind of thing; the *zik house* is one particular house, of which there is only one; and
# *ink drawings* are a style. The words are made up, so that no model knows them: the small one spells them.

# %%
# Rung 1. Pictures to learn from: zorps, the zik house, ink drawings. Each picture comes with its caption.
TAUGHT = ("red", "blue", "yellow", "white")  # zorps of other colours are kept for the examination
zorps = newcomers("creature", 16, colours=TAUGHT, size=size)
castles = newcomers("castle", 6, size=size)
inks = ink_drawings(24, size=size)
shown = [(pictures[k], captions[k]) for pictures, captions in (zorps, castles, inks) for k in range(5)]
grid([p.resize((128, 128)) for p, _ in shown], columns=5, labels=[text for _, text in shown])


# %%
def draw(prompts, pipe=pipe, guidance=None, first_seed=0):
    """One picture for each prompt, the k-th from seed first_seed + k, several at once."""
    images = []
    for k in range(0, len(prompts), at_once):
        part = prompts[k : k + at_once]
        seeds = [torch.Generator("cpu").manual_seed(first_seed + k + j) for j in range(len(part))]
        scale = guidance or pipe.model.guidance
        images += pipe(part, generator=seeds, num_inference_steps=steps, guidance_scale=scale).images
    return images


# %%
# Rung 1 (on a GPU rung 2). What the model draws for words that it has never met.
wanted = [
    "a green zorp in the snow",
    "a pink zorp by the sea",
    "a zik house at sunset",
    "an ink drawing of a boat by the sea",
]
naive = draw(wanted)
grid(naive, columns=4, labels=wanted)

# %% [markdown]
# ## 3. Who examines?
#
# The storybook judge has no name for a zorp. But what it *can* read, colour and setting, it reads on zorps too,
# although it never saw one: the next cell counts. For the kind we fit a *probe*: one linear layer on the judge's
# inner features, which learns in a moment to tell fresh renders of zorps and zik houses from fresh renders of
# everything else. The cell after it counts how often it is right on renders that it was not fitted on.
#
# Trust it only so far: it knows clean renders alone, and to it a botched drawing may well look more like a zorp than
# like anything else. So look at the pictures, too.


# %%
def known(count, seed):
    """Fresh renders of everything that the model knows."""
    rng, kinds = random.Random(seed), tuple(KINDS)
    return [render(Scene((Thing(kinds[k % len(kinds)]),), SETTINGS[k % 7]), rng, 64) for k in range(count)]


def renders(seed, count=120):
    new = {"zorp": "creature", "zik house": "castle"}
    groups = {word: newcomers(what, count, seed, size=64)[0] for word, what in new.items()}
    return {**groups, "known": known(2 * count, seed)}


examiner = probe.fit(renders(seed=1))

# %%
fresh = renders(seed=2, count=35)
for name, pictures in fresh.items():
    hits = [seen == name for seen in probe.read(examiner, pictures)]
    print(f"probe right on {name:10} {np.mean(hits):.0%} of {len(hits)} fresh renders")
    assert np.mean(hits) > 0.85
pictures, captions = newcomers("creature", 35, seed=2)
read = judge(pictures, [text.replace("zorp", "house") for text in captions])
print(
    "the judge on zorps: colour right {:.0%}, setting right {:.0%}".format(
        *(np.mean([row[part] for row in read]) for part in ("colour", "setting"))
    )
)


# %% [markdown]
# A zorp is *right* if the probe sees a zorp and the judge sees the colour and the setting that were asked for. The
# examination asks for the four colours in which the model is never shown a zorp, in all seven settings.


# %%
def examine(images, prompts):
    """For each picture: is it a zorp, of the colour and in the setting that its prompt asks for?"""
    rows = judge(images, [prompt.replace("zorp", "house") for prompt in prompts])
    kinds = probe.read(examiner, images)
    return [k == "zorp" and row["colour"] and row["setting"] for k, row in zip(kinds, rows, strict=True)]


def share(values):
    mean, low, high, count = mean_with_interval([bool(value) for value in values])
    return f"{mean:.0%} of {count} (95 % interval {max(low, 0):.0%} to {high:.0%})"


others = [colour for colour in COLOURS if colour not in TAUGHT]
questions = newcomers("creature", 14, colours=others, size=8)[1][:several]

# %% [markdown]
# ## 4. Teach the thing
#
# **Code.** Three calls. `encode` turns pictures into latents and captions into what the text encoder makes of them,
# once. `attach` puts the two thin matrices beside the layers. `fit` is the training loop of page 07: take some
# latents, add noise, let the network predict it, go down the gradient of the error. Only the adapter gets a gradient.

# %%
examples = encode(pipe, *zorps)
count = lora.attach(pipe, "zorp", rank=8, layers="all")
total = sum(p.numel() for name, p in pipe.unet.named_parameters() if "lora_" not in name)
print(f"the adapter has {count:,} weights, the UNet {total:,}: {count / total:.1%}")
frozen = {name: p.detach().clone() for name, p in pipe.unet.named_parameters() if "lora_" not in name}

# %% [markdown]
# **Predict, then run.** The adapter is attached but not trained. Is the picture another one?

# %%
difference = np.abs(np.asarray(draw(wanted[:4])[0], int) - np.asarray(naive[0], int)).max()
print("largest difference to the picture of section 2, in 0..255:", difference)
assert difference == 0 or not storybook

# %% [markdown]
# <details><summary>Answer</summary>
#
# It is the same picture, to the last bit on a CPU, because $B = 0$.
#
# </details>

# %%
losses = fit(pipe, examples, steps=150 * longer, **how)
assert all(torch.equal(p, frozen[name]) for name, p in pipe.unet.named_parameters() if name in frozen)

# %%
# Rung 1 (on a GPU rung 2). The error while it learned, each point the mean of ten steps.
figure, axes = plt.subplots(figsize=(5, 2.4), layout="constrained")
axes.plot(np.arange(5, len(losses), 10), np.reshape(losses, (-1, 10)).mean(1), "o-")
axes.set(xlabel="step", ylabel="error of the predicted noise", ylim=(0, None))
plt.show()

# %%
# Rung 1 (on a GPU rung 2). Above before, below after: zorps in colours that the model never saw on one.
taught = draw(questions)
pipe.disable_lora()
plain = draw(questions[:4])
pipe.enable_lora()
grid(plain + taught[:4], columns=4, labels=questions[:4] * 2)

# %%
if storybook:
    print("zorps right:", share(examine(taught, questions)))
    assert np.mean(examine(taught, questions)) > 0.3

# %% [markdown]
# ## 5. Teach the style, and use both
#
# A second adapter beside the first one. Attaching it makes it the only active one. A style changes every pixel, so we
# take larger steps.

# %%
ink_examples = encode(pipe, *inks)
_ = lora.attach(pipe, "ink", rank=8, layers="all")
bold = {**how, "learning_rate": how["learning_rate"] * 5 / 3}
ink_losses = fit(pipe, ink_examples, steps=120 * longer, **bold)
print("adapters:", lora.names(pipe), "active:", pipe.get_active_adapters())

# %% [markdown]
# **Predict, then run.** One adapter learned zorps in colour, the other one ink drawings of known things. Nobody ever
# showed a zorp in ink. What happens when both products are added, $Wx + B_1A_1x + B_2A_2x$?

# %%
# Rung 1 (on a GPU rung 2). With the ink adapter alone, with both, and with half as much of the ink.
drawings = [
    "an ink drawing of a boat by the sea",
    "an ink drawing of a tree at sunset",
    "an ink drawing of a zorp in the snow",
]
rows, gentle = [], 2 if storybook else model.guidance  # the usual scale overdoes what is new about a style
for active, weights in ((["ink"], [1.0]), (["zorp", "ink"], [1.0, 1.0]), (["zorp", "ink"], [1.0, 0.5])):
    pipe.set_adapters(active, weights)
    rows.append(draw(drawings, guidance=gentle))
grid(sum(rows, []), columns=3, labels=drawings + ["both adapters"] * 3 + ["half as much ink"] * 3)

# %%
pipe.disable_lora()
groups = {
    "renders in ink": inks[0][:8],
    "without the adapter": draw(drawings[:2], guidance=gentle),
    "with it": rows[0][:2],
}
pipe.enable_lora()
distances = {name: np.mean([off_ink(picture) for picture in pictures]) for name, pictures in groups.items()}
for name, distance in distances.items():
    print(f"{name:20} mean distance to the colours of ink on paper, in 0..255: {distance:.1f}")
assert distances["with it"] < distances["without the adapter"] / 2 or not storybook

# %% [markdown]
# <details><summary>Answer</summary>
#
# Each does roughly what it did alone. But they were trained apart, and nothing makes sure that they do not get into
# each other's way: compare the third pictures of the rows. The number beside an adapter's name multiplies its product,
# so half as much ink leaves more of the rest.
#
# </details>
#
# ## 6. A file, merging, and files of others
#
# **Library.** `save` writes what everyone reads: a safetensors file with $A$ and $B$ for each layer. A pipeline that
# knows nothing of this page loads it with the stock call and draws the same picture.

# %%
pipe.set_adapters("zorp")
(mine,) = draw(wanted[:1])
path = lora.save(pipe, "zorp", ROOT / "outputs/lora/zorp.safetensors")
stock = load(model)
stock.load_lora_weights(path.parent, weight_name=path.name)
(theirs,) = draw(wanted[:1], pipe=stock)
difference = np.abs(np.asarray(mine, int) - np.asarray(theirs, int)).max()
print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB; largest difference in 0..255: {difference}")
assert difference <= (1 if storybook else 40)

# %% [markdown]
# **Merged.** The products go into the weights, the adapter is gone, and the answer is the same.

# %%
latents, t = torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1)), torch.tensor(500)
given = latents.to(stock.device, stock.unet.dtype), t.to(stock.device), examples.texts[0][:1].to(stock.device)
with torch.no_grad():
    apart = stock.unet(*given).sample.float()
    lora.merge(stock)
    merged = stock.unet(*given).sample.float()
print(f"largest difference {(apart - merged).abs().max():.1e}, of answers up to {apart.abs().max():.1f}")
assert (apart - merged).abs().max() < (1e-5 if storybook else 0.05) and lora.names(stock) == []

# %% [markdown]
# **Files of others.** Programs of the kohya family write names without dots, *up* and *down* for $B$ and $A$, and an
# alpha of their own. Such a file, made here from our numbers with $\alpha = 2r$, must act twice as strongly:

# %%
ours, foreign = load_file(path), {}
for key, value in ours.items():
    layer, _, which = key.removeprefix("unet.").partition(".lora_")
    if layer.endswith(("to_q", "to_k", "to_v")):
        name = f"lora_unet_{layer.replace('.', '_')}"
        foreign[f"{name}.lora_{'down' if which[0] == 'A' else 'up'}.weight"] = value
        foreign[f"{name}.alpha"] = torch.tensor(16.0)  # twice the rank
save_file(foreign, path.with_name("foreign.safetensors"))
print(*sorted(foreign)[:3], sep="\n")

# %%
lora.load(stock, path.with_name("foreign.safetensors"), "foreign")
spot = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
delta = stock.unet.get_submodule(spot).get_delta_weight("foreign").float().cpu()
down, up = (ours[f"unet.{spot}.lora_{part}.weight"].float() for part in "AB")
assert torch.allclose(delta, 2 * up @ down, atol=1e-5 if storybook else 1e-2)
print("the foreign adapter adds 2 B A")

# %% [markdown]
# What does not fit is refused in one sentence before anything is touched: an adapter for another kind of model, half a
# file, or one of the old kinds of file, which can run code when they are opened.

# %%
whole = path.read_bytes()
_ = path.with_name("half.safetensors").write_bytes(whole[: len(whole) // 2])
_ = path.with_name("old.ckpt").write_bytes(b"anything")
save_file({"transformer.proj_out.lora_A.weight": torch.zeros(2, 2)}, path.with_name("sd3.safetensors"))
for name in ("sd3.safetensors", "half.safetensors", "old.ckpt"):
    try:
        lora.load(stock, path.with_name(name), "bad")
    except LoadError as error:
        print(error)
assert lora.names(stock) == ["foreign"]
del stock

# %% [markdown]
# ## 7. What is forgotten?
#
# The weights are as they were, but with the adapter the model as a whole is another one. Ask it for things that have
# nothing to do with zorps, with the same noise as before.

# %%
# Rung 1 (on a GPU rung 2). Prompts without any zorp: above without the adapter, below with it.
unrelated = seen_prompts(8)[:several]
with_zorps = draw(unrelated)
pipe.disable_lora()
without = draw(unrelated)
pipe.enable_lora()
grid(without[:5] + with_zorps[:5], columns=5, labels=unrelated[:5] + ["with the adapter"] * 5)


# %%
def right(images, prompts):
    return [row["object"] and row["colour"] and row["setting"] is not False for row in judge(images, prompts)]


if storybook:
    print("right without the adapter:", share(right(without, unrelated)))
    print("right with the adapter:   ", share(right(with_zorps, unrelated)))
    print("seen as zorps:            ", share([k == "zorp" for k in probe.read(examiner, with_zorps)]))
pixels = [np.asarray(images, float) / 255 for images in (without, with_zorps)]
print(f"root mean square change of the pictures: {np.sqrt(np.mean((pixels[0] - pixels[1]) ** 2)):.3f}")

# %% [markdown]
# ## 8. Which rank, which layers?
#
# **Predict, then run.** Adapters of rank 1, 4 and 16, once beside the projections of attention alone and once beside
# every linear layer and convolution. Each was taught the same zorps for as many steps. Does rank decide, or the
# choice of layers?
#
# Training six adapters takes minutes, so the numbers are a table that `python -m tools.lora_curves` writes.

# %%
with (ROOT / "notebooks/data/lora.csv").open() as file:
    table = list(csv.DictReader(file))
print(f"{'layers':10} {'rank':>4} {'weights':>9}   {'zorps right':24} unrelated right")
for key in dict.fromkeys((row["method"], row["rank"], row["weights"]) for row in table if row["part"] == "rank"):
    found = {r["metric"]: r for r in table if r["part"] == "rank" and (r["method"], r["rank"], r["weights"]) == key}
    shown = [f"{float(r['mean']):.0%} ({float(r['low']):.0%} to {float(r['high']):.0%})" for r in found.values()]
    print(f"{key[0]:10} {key[1]:>4} {int(key[2]):9,}   {shown[0]:24} {shown[1]}")

# %%
# Rung 1. Zorps right against the number of trained weights; bars are 95 % intervals.
figure, axes = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
for method, marker in (("attention", "o"), ("all", "s")):
    rows = [r for r in table if r["part"] == "rank" and r["metric"] == "right" and r["method"] == method]
    mean, low, high = (np.array([float(r[name]) for r in rows]) for name in ("mean", "low", "high"))
    weights = [int(r["weights"]) for r in rows]
    axes.errorbar(weights, mean, (mean - low, high - mean), marker=marker, capsize=3, label=f"{method}, rank 1, 4, 16")
axes.set(xscale="log", xlabel="weights that learn", ylabel="share right", ylim=(0, 1))
axes.legend(fontsize=8)
plt.show()

# %%
found = {(r["method"], r["rank"]): float(r["mean"]) for r in table if r["part"] == "rank" and r["metric"] == "right"}
print({" ".join(key): f"{mean:.0%}" for key, mean in found.items()})
assert found["all", "16"] > found["all", "1"] and found["all", "16"] > found["attention", "16"]

# %% [markdown]
# <details><summary>Answer</summary>
#
# Both, but not alike. Beside all layers a higher rank teaches more. Beside attention alone even rank 16 stays below that,
# with a fifth of the weights. Rank 1 beside all layers and rank 4 beside attention have about as many weights, and do
# about as well. The intervals are wide, so do not read more into the figure than that.
#
# </details>
#
# ## 9. One particular house: DreamBooth
#
# **Idea.** Six pictures of the zik house, captioned "a zik house ...". The word *house* is in it on purpose: the
# model knows what houses are like. The danger is the way back: *every* house may become the zik house. *Prior
# preservation* puts as many pictures of ordinary houses into each batch, drawn by the model itself before it learns,
# so that the class stays what it was.

# %%
lora.remove(pipe, "zorp")
lora.remove(pipe, "ink")
scenes = [Scene((Thing("house", colour),), SETTINGS[k % 7]) for k, colour in enumerate(COLOURS)]
houses = [caption(scene) for scene in scenes]
own_houses = draw(houses, first_seed=500)
castle_examples, prior = encode(pipe, *castles), encode(pipe, own_houses, houses)
asked_castles = newcomers("castle", 4, size=8)[1]

# %%
subject, klass = {}, {"before": own_houses}
for name, others in (("alone", None), ("with_prior", prior)):
    _ = lora.attach(pipe, name, rank=8, layers="all")
    _ = fit(pipe, castle_examples, steps=100 * longer, prior=others, **{**bold, "batch_size": how["batch_size"] // 2})
    subject[name], klass[name] = draw(asked_castles), draw(houses, first_seed=500)
    lora.remove(pipe, name)

# %%
# Rung 1 (on a GPU rung 2). The zik house (left two) and ordinary houses: learned alone, then with prior preservation.
kept = [picture for name in subject for picture in (*subject[name][:2], *klass[name][:3])]
grid(kept, columns=5, labels=[*asked_castles[:2], *houses[:3]] * 2)

# %%
if storybook:
    for name, pictures in klass.items():
        castles_seen = [kind == "zik house" for kind in probe.read(examiner, pictures)]
        print(f"{name:10}  ordinary houses right:       {share(right(pictures, houses))}")
        print(f"{'':10}  ordinary houses seen as zik: {share(castles_seen)}")
    for name, pictures in subject.items():
        print(f"{name:10}  zik when asked for:", share([k == "zik house" for k in probe.read(examiner, pictures)]))

# %% [markdown]
# ## 10. A new word for what the model can draw: textual inversion
#
# **Idea.** Change nothing in the model but one row of its table of words: give a new word an embedding, and move only
# that until pictures of what you mean are predicted well. Such a word cannot teach the model to draw anything new; it
# can only *name* what it draws already. The model knows three designs of houses, and no word that tells them apart.


# %%
def tall_houses(count, seed):
    """Houses of the tall design in every colour and setting, and captions in which they have a name."""
    rng = random.Random(seed)
    scenes = [Scene((Thing("house", list(COLOURS)[k % 8]),), SETTINGS[k % 7]) for k in range(count)]
    pictures = [render(scene, rng, size, KINDS["house"][1]) for scene in scenes]
    return pictures, [caption(scene).replace("house", "<tall>") for scene in scenes]


rows_before = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
number = add_word(pipe, "<tall>", like="house")
word_losses = fit_word(pipe, number, *tall_houses(24, seed=3), steps=60 * longer, **{**how, "learning_rate": 2e-2})

# %%
# Rung 1 (on a GPU rung 2). The same seeds: above "house", below the new word, which says which design.
tall_prompts = [caption(scene).replace("house", "<tall>") for scene in scenes][:several]
tall = draw(tall_prompts, first_seed=500)
grid(own_houses[:5] + tall[:5], columns=5, labels=["house"] * 5 + ["<tall>"] * 5)

# %%
# NBVAL_CHECK_OUTPUT
rows_after = pipe.text_encoder.get_input_embeddings().weight.detach()
assert torch.equal(rows_after[: len(rows_before)], rows_before)
start = rows_before[pipe.tokenizer.convert_tokens_to_ids("house</w>")]
print("rows changed among the old ones: 0; the new row moved:", not torch.equal(rows_after[number], start))


# %%
def of_design(design):
    """Houses of one design in every setting, fresh renders."""
    scenes = [Scene((Thing("house"),), setting) for setting in SETTINGS for _ in range(8)]
    return [
        render(scene, random.Random(f"{design} {k}"), design=KINDS["house"][design]) for k, scene in enumerate(scenes)
    ]


by_design = probe.fit({"tall": of_design(1), "other": of_design(0) + of_design(2)})

# %%
if storybook:
    for name, pictures in (("house", own_houses), ("<tall>", tall)):
        print(f"{name:8} drawn tall: {share([kind == 'tall' for kind in probe.read(by_design, pictures)])}")

# %% [markdown]
# **Library.** The file holds one row, and the stock call reads it.

# %%
save_word(pipe, "<tall>", path.with_name("tall.safetensors"))
named = load(model)
named.load_textual_inversion(path.parent, weight_name="tall.safetensors")
heard = [one.encode_prompt(["a <tall>"], one.device, 1, False)[0].float() for one in (pipe, named)]
assert torch.allclose(*heard, atol=1e-3)

# %% [markdown]
# ## 11. The same for Stable Diffusion 3
#
# **Code.** Nothing changes but what is predicted: the velocity from picture to noise. `encode`, `attach` and `fit`
# see by the pipeline which it is. One adapter learns the thing and the style together here.

# %%
small3 = load("storybook-sd3")
both = [
    first + second for first, second in zip(newcomers("creature", 16, colours=TAUGHT), ink_drawings(16), strict=True)
]
examples3 = encode(small3, *both)
count3 = lora.attach(small3, "both", rank=8, layers="all")
before3 = draw(drawings[:1] + wanted[:2], pipe=small3)
losses3 = fit(small3, examples3, steps=120, batch_size=4, learning_rate=3e-3)

# %%
# Rung 1. storybook-sd3 before (above) and after (below): an ink drawing, and zorps in colours that it never saw.
after3 = draw(drawings[:1] + wanted[:2], pipe=small3)
grid(before3 + after3, columns=3, labels=[*drawings[:1], *wanted[:2]] * 2)

# %% [markdown]
# Compare with sections 4 and 5. This model is smaller, and its adapter learned two things at once.

# %% [markdown]
# ## What you found
#
# All of it from this page's cells and the table of section 8; `storybook-sd`, rung 1. Do not carry the *numbers* over
# to large models: this one has seen a world of twelve things, and words that it does not know are spelled in letters.

# %%
if storybook:
    seen = {name: probe.read(examiner, pictures) for name, pictures in klass.items()}
    rows = {
        "adapter, share of the UNet's weights": f"{count / total:.1%}",
        "zorps right, after": share(examine(taught, questions)),
        "unrelated prompts right, with the adapter": share(right(with_zorps, unrelated)),
        "houses still plain, zik house learned alone": share([k != "zik house" for k in seen["alone"]]),
        "houses still plain, with prior preservation": share([k != "zik house" for k in seen["with_prior"]]),
    }
    print(*(f"{what:46} {figure}" for what, figure in rows.items()), sep="\n")

# %% [markdown]
# ## Exercises
#
# **1. How many?** A layer has 320 inputs and 1280 outputs. From which rank on does LoRA have *more* weights than the
# layer's own matrix?

# %%
my_rank = None  # an integer

# %%
if my_rank is None:
    print("Nothing to check yet: replace None in the cell above.")
else:
    more = [r for r in range(1, 2000) if r * (320 + 1280) > 320 * 1280]
    assert my_rank == more[0], f"Rank {my_rank} has {my_rank * 1600:,} weights, the matrix {320 * 1280:,}."
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# $r\,(320+1280) > 320\cdot 1280$ from $r = 257$ on; at 256 they are equal.
#
# ```python
# my_rank = 257
# ```
#
# </details>
#
# **2. Half of an adapter.** Without training, write an adapter of rank 1 that is the best rank-1 stand-in for $BA$ of
# section 1. Put its two matrices into `my_A` (1 × d_in) and `my_B` (d_out × 1).

# %%
my_A, my_B = None, None

# %%
if my_A is None:
    print("Nothing to check yet: replace None in the cell above.")
else:
    update = B @ A
    best = torch.linalg.svdvals(update)[1:].square().sum().sqrt()
    assert my_B.shape == (d_out, 1) and my_A.shape == (1, d_in)
    assert torch.isclose((update - my_B @ my_A).norm(), best, rtol=1e-3), "Look at the largest singular value."
    print("Right.")

# %% [markdown]
# <details><summary>Solution</summary>
#
# The best stand-in of a matrix is made of its largest singular value and the two vectors that go with it (Eckart and
# Young):
#
# ```python
# U, S, V = torch.linalg.svd(B @ A)
# my_A, my_B = S[0] * V[:1], U[:, :1]
# ```
#
# </details>
#
# ## Play
#
# The panel with the zorps. Its note that the model has never seen the word speaks of the bundled model, and does not
# know of the adapter. Try a colour, a setting, or two zorps side by side, which no picture ever showed.

# %%
lora.load(pipe, path, "zorp")
panel = prompt_panel(pipe, Settings("a green zorp in the snow", seed=4))
panel

# %%
# What the panel shows first, for pages where no kernel is running.
grid([panel.picture], labels=[panel.picture.info["settings"].prompt])

# %% [markdown]
# ## What to read next
#
# * [LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685): sections 1 and 8 of this page.
# * [DreamBooth](https://arxiv.org/abs/2208.12242): one subject from a few pictures, and prior preservation.
# * [An Image is Worth One Word](https://arxiv.org/abs/2208.01618): textual inversion.
# * [DoRA](https://arxiv.org/abs/2402.09353) and [rsLoRA](https://arxiv.org/abs/2312.03732): two variants that peft has too.
# * [LoRA Learns Less and Forgets Less](https://arxiv.org/abs/2405.09673): section 7, measured on language models.
# * [Understanding intermediate layers using linear classifier probes](https://arxiv.org/abs/1610.01644): who examines.
# * Before: [06 Noise and training](06_noise_and_training.ipynb). Back to the map: [00 Start here](00_start_here.ipynb).
