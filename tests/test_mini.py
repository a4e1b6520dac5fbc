"""The small UNet: its parts, both objectives, sampling beside diffusers, its file, drawing in shares, the whole run."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import save_file

from storybook.write_dataset import write
from training import mini
from training.draw_mini import draw
from training.mini import ALPHA_BAR, SHARES, Attention, Denoising, UNet, add_noise, batches, follow, guided, reverse

ROOT = Path(__file__).parent.parent
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


def small_unet(seed=0):
    """A UNet whose answers depend on all that it is given."""
    torch.manual_seed(seed)
    unet = UNet(widths=(8, 16), text_width=128)
    torch.nn.init.normal_(unet.leave.weight, std=0.1)
    return unet.eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("mini") / "unet.safetensors"
    mini.save(small_unet(), path, "noise")
    return path


def test_attention_is_the_formula():
    torch.manual_seed(0)
    attention, x, text = Attention(16, 12), torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    key, value = attention.key_value(text).chunk(2, -1)
    found = []
    for head in range(4):
        part = slice(4 * head, 4 * head + 4)
        scores = attention.query(x)[..., part] @ key[..., part].transpose(1, 2) / 2
        found.append(scores.softmax(-1) @ value[..., part])
    assert torch.allclose(attention(x, text), attention.out(torch.cat(found, -1)), atol=1e-5)


def test_the_unet_keeps_shapes_hears_time_and_text_and_starts_at_nothing():
    unet, x, text = small_unet(), torch.randn(2, 4, 8, 12), torch.randn(2, 5, 128)
    t = torch.tensor([10.0, 900.0])
    answer = unet(x, t, text)
    assert answer.shape == x.shape
    assert not torch.allclose(answer, unet(x, t.flip(0), text), atol=1e-4)
    assert not torch.allclose(answer, unet(x, t, text.flip(0)), atol=1e-4)
    assert UNet()(torch.randn(1, 4, 16, 16), torch.ones(1), torch.randn(1, 32, 128)).abs().max() == 0


def test_the_last_row_of_the_text_goes_where_the_time_goes():
    """With nothing coming out of cross-attention, the last row is heard, and it alone."""
    unet, x, t, text = small_unet(), torch.randn(2, 4, 8, 8), torch.tensor([10.0, 900.0]), torch.randn(2, 5, 128)
    for look in (unet.look_down, unet.look_middle, unet.look_up):
        torch.nn.init.zeros_(look.to_text.out.weight)
    others, last = text.clone(), text.clone()
    others[:, :-1], last[:, -1] = 3.0, 3.0
    assert torch.equal(unet(x, t, text), unet(x, t, others))
    assert not torch.allclose(unet(x, t, text), unet(x, t, last), atol=1e-4)


def test_fine_detail_reaches_the_output_by_the_first_skip():
    """A checkerboard vanishes in the smaller level; only the aligned skip can carry it."""
    unet, t, text = small_unet(), torch.ones(1), torch.randn(1, 5, 128)
    x = torch.randn(1, 4, 8, 8)
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    change = unet(x + 0.1 * board, t, text) - unet(x, t, text)
    blurred = F.avg_pool2d(change, 2)
    assert blurred.abs().mean() < 0.5 * change.abs().mean()


def test_noise_is_that_of_the_library():
    theirs = DDIMScheduler(**SCHEDULE)
    assert torch.allclose(theirs.alphas_cumprod, ALPHA_BAR, rtol=1e-4)
    latents, noise, u = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0.0, 0.5, 1.0])
    noisy, t, target = add_noise(latents, noise, u, "noise")
    assert t.tolist() == [0, 500, 999] and torch.equal(target, noise)
    assert torch.allclose(noisy, theirs.add_noise(latents, noise, t), atol=1e-5)
    noisy, t, target = add_noise(latents, noise, u, "flow")
    assert torch.equal(noisy[0], latents[0]) and torch.equal(noisy[2], noise[2]) and t.tolist() == [0, 500, 1000]
    assert torch.allclose(noisy - u[:, None, None, None] * target, latents, atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_reverse_loop_is_that_of_the_library(eta):
    unet, text, empty = small_unet(), torch.randn(2, 5, 128), torch.randn(1, 5, 128)
    predict, x = guided(unet, text, empty, 2.0), torch.randn(2, 4, 8, 8)
    scheduler = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(10)
    theirs, generator = x, torch.Generator().manual_seed(1)
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(predict(theirs, t), t, theirs, eta=eta, generator=generator).prev_sample
    ours = reverse(predict, x, 10, eta, torch.Generator().manual_seed(1))
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3) and not torch.allclose(ours, x, atol=0.1)


def test_following_the_flow_is_that_of_the_library():
    unet, text, empty = small_unet(), torch.randn(2, 5, 128), torch.randn(1, 5, 128)
    predict, x = guided(unet, text, empty, 2.0), torch.randn(2, 4, 8, 8)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / 7 for k in range(7)])
    theirs = x
    with torch.no_grad():
        for t in scheduler.timesteps:
            theirs = scheduler.step(predict(theirs, t), t, theirs).prev_sample
    assert torch.allclose(follow(predict, x, 7), theirs, atol=1e-4)


def test_guidance_of_one_is_the_answer_with_the_text():
    unet, text, empty, x = small_unet(), torch.randn(2, 5, 128), torch.randn(1, 5, 128), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        with_text, without = (unet(x, torch.full((2,), 300.0), c) for c in (text, empty.expand_as(text)))
        assert torch.allclose(guided(unet, text, empty, 1.0)(x, 300), with_text, atol=1e-5)
        assert torch.allclose(guided(unet, text, empty, 3.0)(x, 300), 3 * with_text - 2 * without, atol=1e-4)


def test_batches_drop_captions_and_spread_times():
    count = 4000
    encoded = {
        "latents": torch.stack([torch.full((8, 4, 2, 2), 3.0), torch.full((8, 4, 2, 2), 0.5)], 1).half(),
        "text": torch.arange(1, 9).half()[:, None, None].expand(8, 2, 3),
        "empty": torch.zeros(1, 2, 3).half(),
    }
    indices = torch.arange(count) % 8
    for objective in mini.OBJECTIVES:
        latents, noise, u, text = batches(encoded, objective)(indices, torch.Generator().manual_seed(0))
        assert latents.mean() == pytest.approx(3, abs=0.02) and latents.std() == pytest.approx(0.5, abs=0.02)
        assert (text[:, 0, 0] == 0).float().mean() == pytest.approx(0.1, abs=0.02)
        assert (text[text[:, 0, 0] > 0][:, 0, 0] == (indices + 1)[text[:, 0, 0] > 0]).all()
        middle = ((u > 0.25) & (u < 0.75)).float().mean()
        # of the flow's times P(|normal| < ln 3), of the others half of the timesteps, none of which is held back
        assert middle == pytest.approx(0.728 if objective == "flow" else 500 * SHARES.max().item(), abs=0.01)
    assert (batches(encoded, dropout=0.0)(indices, torch.Generator())[3] > 0).all()


def test_times_come_as_often_as_min_snr_weighting_would_weigh_them():
    """The library's own ratios; where it would weigh less than 0.15, that share."""
    snr = compute_snr(DDIMScheduler(**SCHEDULE), torch.arange(1000))
    weights = (snr.clamp(max=5) / snr).clamp(min=0.15)
    assert torch.allclose(SHARES, weights / weights.sum(), rtol=1e-3)
    encoded = {"latents": torch.zeros(1, 2, 4, 2, 2), "text": torch.zeros(1, 2, 3), "empty": torch.zeros(1, 2, 3)}
    u = batches(encoded)(torch.zeros(20_000, dtype=torch.long), torch.Generator().manual_seed(0))[2]
    drawn = torch.bincount((1000 * u).long() // 100, minlength=10) / len(u)
    assert torch.allclose(drawn, SHARES.view(10, 100).sum(1), atol=1e-3)


def test_a_file_keeps_network_and_objective(checkpoint):
    unet, objective = mini.load(checkpoint)
    x, t, text = torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 5, 128)
    assert objective == "noise" and torch.allclose(unet(x, t, text), small_unet()(x, t, text), atol=1e-2)


def test_other_files_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no file .*: train one with"):
        mini.load(tmp_path / "none.safetensors")
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoint_epoch_600.pt")
    with pytest.raises(ValueError, match="is not a safetensors file; others, such as .pt, can hold programs"):
        mini.generate_images_direct(tmp_path / "checkpoint_epoch_600.pt")
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is of another architecture than training/mini.py"):
        mini.load(tmp_path / "other.safetensors")


def test_it_draws_what_the_seeds_say(checkpoint):
    both = mini.generate_images_direct(unet_path=checkpoint, device="cpu", steps=2)
    assert [image.size for image in both] == [(128, 128)] * 2
    second = mini.generate_images_direct(checkpoint, prompts=["a blue house in the snow"], steps=2, seed=1)
    assert max(abs(a - b) for a, b in zip(both[1].tobytes(), second[0].tobytes(), strict=True)) <= 1
    with pytest.raises(ValueError, match="There is nothing to draw"):
        mini.generate_images_direct(checkpoint, prompts=[])


def test_a_share_is_drawn_once_and_resumed(tmp_path, checkpoint, monkeypatch):
    """Nine prompts are two batches; of a killed run the second is drawn again, the first is left alone."""
    asked, real = [], mini.generate_images_direct

    def counted(path, device, prompts, *rest):
        asked.append(list(prompts))
        return real(path, device, prompts, *rest)

    monkeypatch.setattr("training.draw_mini.generate_images_direct", counted)
    prompts = [f"a red boat {k}" for k in range(9)]
    draw(checkpoint, prompts, tmp_path / "out", steps=1)
    assert [len(part) for part in asked] == [8, 1]
    (tmp_path / "out/00008.png").unlink()
    draw(checkpoint, prompts, tmp_path / "out", steps=1)
    assert asked[2:] == [["a red boat 8"]] and len(list((tmp_path / "out").iterdir())) == 9
    with pytest.raises(ValueError, match="00000.png was drawn with other settings"):
        draw(checkpoint, prompts, tmp_path / "out", steps=2)


def test_two_processes_draw_each_picture_once_and_train_like_one(tmp_path, checkpoint):
    """`accelerate launch` of both commands, the pictures and the losses beside those of one process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--main_process_port", "0"]
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red boat {k}" for k in range(17)))
    options = [str(checkpoint), str(tmp_path / "prompts.txt"), str(tmp_path / "two"), "--steps", "1"]
    subprocess.run([*launch, "-m", "training.draw_mini", *options], env=environment, check=True, cwd=tmp_path)
    draw(checkpoint, (tmp_path / "prompts.txt").read_text().splitlines(), tmp_path / "one", steps=1)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) == 17 and names == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in names:
        one, two = (Image.open(tmp_path / folder / name) for folder in ("one", "two"))
        assert one.info["settings"] == two.info["settings"]
        assert max(abs(a - b) for a, b in zip(one.tobytes(), two.tobytes(), strict=True)) <= 1

    write(tmp_path / "set", 8, size=32)
    losses = {}
    for name, command in (("one", [sys.executable]), ("two", launch)):
        arguments = [str(tmp_path / "set"), "--name", name, "--steps", "4", "--batch-size", "8", "--save-every", "2"]
        variables = environment | {"ACCELERATE_MIXED_PRECISION": "no"}
        subprocess.run([*command, "-m", "training.train_mini", *arguments], env=variables, check=True, cwd=tmp_path)
        with (tmp_path / f"outputs/train/{name}/log.csv").open() as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses["one"]) == 4 and losses["one"][0] == pytest.approx(1, abs=0.1)
    assert max(abs(a - b) for a, b in zip(losses["one"], losses["two"], strict=True)) < 1e-4
    unet, objective = mini.load(tmp_path / "outputs/train/two/weights-000002.safetensors")
    assert isinstance(Denoising(unet, objective), torch.nn.Module)
