"""The stages of `make train`: what they ask of the models, and that every stage works."""

import math
import random
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

from storybook import sample
from storybook.train import data, sd, sd3
from storybook.train.__main__ import train_all
from storybook.train.sharpen import SharpDecoding
from storybook.train.vae import fine_detail, new_vae
from storybook.world import parse, render


def test_timesteps_come_as_often_as_min_snr_weighs_them():
    """One from each slice of equal probability; the noisy ones, where SNR < 5, equally often, clean ones seldom."""
    drawn = torch.cat([sd.draw_timesteps(100, torch.Generator().manual_seed(seed)) for seed in range(500)])
    counts = drawn.bincount(minlength=1000).float()
    assert drawn.min() >= 0 and drawn.max() <= 999
    assert counts[400:].std() / counts[400:].mean() < 0.2
    assert counts[:50].mean() / counts[400:].mean() == pytest.approx(sd.LEAST_SHARE, rel=0.2)
    assert (drawn[:100].diff() >= 0).all()


def test_glance_notes_what_the_judge_reads(tmp_path, monkeypatch):
    """Renders in place of drawn pictures are right, and progress.csv says so."""
    monkeypatch.setattr(sample, "draw", lambda pipe, prompts, guidance: [
        render(parse(prompt), random.Random(k)) for k, prompt in enumerate(prompts)
    ])  # fmt: skip
    pipeline = type("StableDiffusionPipeline", (), {"set_progress_bar_config": lambda self, **settings: None})()
    sample.glance(pipeline, tmp_path / "samples-000250.png")
    header, row = (tmp_path / "progress.csv").read_text().splitlines()
    assert header == "step,single_things,pairs"
    step, one, two = row.split(",")
    assert step == "250" and float(one) >= 0.9 and float(two) >= 0.9


def test_sigmas_are_logit_normal():
    sigmas = sd3.logit_normal(1000, torch.Generator().manual_seed(0))
    logits = torch.logit(sigmas)
    assert abs(logits.mean() - math.log(sd3.SHIFT)) < 0.01 and abs(logits.std() - 1) < 0.02


def test_the_t5_tokenizer_knows_the_world_and_spells_the_rest():
    tokenizer = sd3.new_t5(16)[1]
    assert tokenizer.tokenize("A red boat") == ["\u2581A", "\u2581red", "\u2581boat"]
    assert tokenizer.unk_token_id not in tokenizer("a zebra, twice").input_ids


def test_most_batches_hold_whole_captions_and_only_they_go_through_the_compiled_transformer(monkeypatch):
    tokenizer = sd3.new_t5(16)[1]
    captions = data.captions(data.scenes("train", 2000), 0)
    assert max(len(ids) for ids in tokenizer(captions).input_ids) <= sd3.T5_LENGTHS[0]
    asked = []

    def network(name):
        return lambda noisy, *more, **options: asked.append(name) or (noisy,)

    monkeypatch.setattr(sd3.FlowMatching, "context", lambda *told: (None, None))
    objective = sd3.FlowMatching(torch.nn.Identity(), [], torch.nn.Identity())
    objective.learned[0].forward = network("plain")
    latents = torch.ones(2, 16, 2, 2)
    batch = latents, torch.zeros_like(latents), torch.tensor([0.0, 0.5]), None
    for compiled in (None, network("compiled")):
        objective.compiled = compiled
        for length in set(sd3.T5_LENGTHS):
            asked.clear()
            loss = objective(*batch, torch.zeros(2, length, dtype=int), torch.ones(2))["loss"]
            assert asked == ["compiled" if compiled and length == sd3.T5_LENGTHS[0] else "plain"]
            assert loss.item() == pytest.approx((2**2 + 1.5**2) / 2)  # (1 - sigma) x - (noise - x), x all ones


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (16, 1), (16, 2)])
def test_training_goes_on_from_a_model_for_other_pixels_or_with_patches(tmp_path, side, patch):
    """The same weights, but for the table of places; a patch of four that are alike counts half, its mean is drawn."""
    torch.manual_seed(0)
    before, (t5, _) = sd3.new_transformer(side, 16, 16), sd3.new_t5(16)
    if patch == 2:
        before = SD3Transformer2DModel.from_config(before.config, patch_size=2)
    torch.nn.init.normal_(before.proj_out.weight)
    before.save_pretrained(tmp_path / "transformer")
    t5.save_pretrained(tmp_path / "text_encoder_3")
    after, (other_t5, _) = sd3.new_transformer(16, 16, 16), sd3.new_t5(16)
    table = after.pos_embed.pos_embed.clone()
    sd3.go_on_from(tmp_path, after, other_t5)
    assert torch.equal(after.pos_embed.pos_embed, table)
    assert all(torch.equal(a, b) for a, b in zip(t5.parameters(), other_t5.parameters(), strict=True))
    state, resized = after.state_dict(), {"pos_embed.proj.weight", "proj_out.weight", "proj_out.bias"}
    for name, weights in before.state_dict().items():
        if name != "pos_embed.pos_embed" and not (patch == 2 and name in resized):
            assert torch.equal(weights, state[name]), name
    with torch.no_grad():
        flat = torch.randn(1, 16, 1, 1).expand(1, 16, patch, patch)
        read = [
            model.pos_embed.proj(part) - model.pos_embed.proj.bias[:, None, None]
            for model, part in ((before, flat), (after, flat[..., :1, :1]))
        ]
        hidden = torch.randn(1, 128)
        drawn = before.proj_out(hidden).unflatten(-1, (patch, patch, 16)).mean((1, 2)), after.proj_out(hidden)
    assert torch.allclose(read[0], patch * read[1], atol=1e-4)
    assert torch.allclose(*drawn, atol=1e-4)


def test_sharpening_leaves_the_encoder_alone_and_each_opponent_learns_from_its_own_loss():
    """The decoder would like the discriminator to be wrong: that wish must not reach the discriminator's weights."""
    torch.manual_seed(0)
    vae = new_vae(32, widths=(8, 8, 8, 16))
    game = SharpDecoding(vae)
    images, noise = torch.rand(2, 3, 32, 32) * 2 - 1, torch.randn(2, 4, 4, 4)
    losses = game(images, torch.ones(2, 1, 32, 32), noise)
    losses["loss"].backward(retain_graph=True)
    for part in (vae.encoder, vae.quant_conv):
        assert all(parameter.grad is None for parameter in part.parameters())
    for part in (vae.decoder, vae.post_quant_conv):
        assert all(parameter.grad.norm() > 0 for parameter in part.parameters())
    weights = list(game.discriminator.parameters())
    alone = torch.autograd.grad(losses["told_apart"], weights)
    assert all(
        torch.allclose(weight.grad, own, rtol=1e-4, atol=1e-7) for weight, own in zip(weights, alone, strict=True)
    )


def test_every_stage_runs_and_writes_a_folder_that_stock_diffusers_draws_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = ["--pictures", "32", "--steps", "2", "--batch-size", "4"]
    monkeypatch.setattr("storybook.train.judge.WEIGHTS", tmp_path / "models/judge.safetensors")
    for stage in ("sd", "sd3"):  # 64 pictures each, from models that have learned nothing
        monkeypatch.setattr(f"storybook.train.{stage}.glance", lambda pipeline, path: None)
    own = data.pictures
    monkeypatch.setattr(data, "pictures", lambda split, count, *more: own(split, min(count, 32), *more))  # fresh ones
    train_all(["--size", "64"], few)
    from diffusers import DiffusionPipeline

    for name in ("storybook-sd", "storybook-sd3"):
        pipeline = DiffusionPipeline.from_pretrained(f"models/{name}")
        assert pipeline("a red boat", num_inference_steps=2).images[0].size == (64, 64)
        parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
        assert {part.dtype for part in parts} == {torch.float32}
    assert not list(Path("outputs").rglob("*.partial*"))


def test_fine_detail_is_all_there_is_in_noise_and_nothing_in_a_slope():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 64, 64, generator=generator)
    wave = torch.sin(torch.arange(64) * 2 * torch.pi * 2 / 64).expand(4, 3, 64, 64)  # two whole waves
    assert fine_detail(noise).mean() == pytest.approx(0.75**0.5, abs=0.01)  # three quarters of all frequencies
    assert fine_detail(wave).max() < 1e-3
    assert fine_detail(torch.nn.functional.avg_pool2d(noise, 3, 1, 1)).max() < 0.6


def test_a_longer_file_of_pictures_serves_for_a_shorter_one(tmp_path):
    data.pictures("train", 8, 32, cache=tmp_path)
    data.pictures("train-more", 4, 32, cache=tmp_path)
    assert len(data.pictures("train", 3, 32, cache=tmp_path)) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["train-8-32.npy", "train-more-4-32.npy"]


def test_the_training_pictures_are_rebuilt_from_their_numbers(tmp_path):
    first = data.pictures("train", 8, 32, cache=tmp_path / "a")
    again = data.pictures("train", 8, 32, cache=tmp_path / "b")
    assert (first == again).all()
    assert first.std() > 10


def test_one_caption_in_ten_is_empty_and_pairs_come_twice():
    scenes = data.scenes("fresh", 1000)
    texts = data.captions_for_guidance(scenes, torch.Generator().manual_seed(0))
    assert 70 <= texts.count("") <= 130
    order = data.by_things(scenes)
    assert all(order.count(index) == len(scenes[index].things) for index in range(50))
