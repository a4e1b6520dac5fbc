"""Edits by hand beside the library's, on small models of random weights: both kinds, number by number."""

import io
from datetime import UTC, datetime

import diffusers
import ipywidgets as widgets
import numpy as np
import pytest
import random_sd
import random_sd3
import torch
from diffusers import DDIMInverseScheduler
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from helpers.editing import Denoiser, Exact, Walk, encode, first_level, noise_like, pictures, run, seeded
from helpers.editing_between import animation, slerp
from helpers.editing_inpaint import inpaint, noised
from helpers.editing_inversion import distance, invert
from helpers.editing_mask import MaskControls, mask_from, on_latents, shape_mask, tinted
from helpers.editing_photo import prepared
from helpers.mixture import Mixture, example

PROMPTS = ["a red boat by the sea", "a blue star"]
KINDS = {"StableDiffusion": random_sd.pipeline, "StableDiffusion3": random_sd3.pipeline}
SIDE = 64


@pytest.fixture(scope="module", params=KINDS)
def pipe(request, tmp_path_factory):
    made = KINDS[request.param](tmp_path_factory.mktemp(request.param))
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def images():
    ramp = np.linspace(0, 255, SIDE)
    one = np.stack([np.tile(ramp, (SIDE, 1)), np.tile(ramp[:, None], (1, SIDE)), np.full((SIDE, SIDE), 90)], -1)
    return [Image.fromarray(one.astype(np.uint8)), Image.fromarray(one[::-1].astype(np.uint8))]


def other(pipe, task: str):
    """The library's class for a task, of the same parts."""
    cls = getattr(diffusers, type(pipe).__name__.replace("Pipeline", f"{task}Pipeline"))
    more = {"requires_safety_checker": False} if "3" not in cls.__name__ else {}
    made = cls(**pipe.components, **more)
    made.set_progress_bar_config(disable=True)
    return made


def asked(steps: int, seeds: list[int]) -> dict:
    return {"num_inference_steps": steps, "guidance_scale": 3.0, "generator": seeded(seeds), "output_type": "latent"}


def close(mine: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(mine, theirs, atol=2e-4 * max(1.0, theirs.abs().max().item()))


# One notation for both


def test_a_run_is_the_pipelines(pipe):
    noise = noise_like(torch.zeros(2, pipe.vae.config.latent_channels, 8, 8), seeded([3, 4]))
    mine = run(Denoiser(pipe, PROMPTS, 3, 3.0, "house"), noise)
    theirs = pipe(PROMPTS, negative_prompt=["house"] * 2, height=SIDE, width=SIDE, **asked(3, [3, 4])).images
    assert close(mine, theirs)
    assert not close(mine, run(Denoiser(pipe, PROMPTS, 3, 3.0), noise))


def test_without_guidance_the_network_is_asked_once(pipe):
    denoiser, seen = Denoiser(pipe, PROMPTS[:1], 2, 1.0), []
    network = getattr(pipe, "unet", None) or pipe.transformer
    hook = network.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    x = noise_like(torch.zeros(1, pipe.vae.config.latent_channels, 8, 8), seeded([0]))
    mine = run(denoiser, x)
    hook.remove()
    assert seen == [1, 1]
    theirs = pipe(PROMPTS[0], height=SIDE, width=SIDE, **asked(2, [0]) | {"guidance_scale": 1.0}).images
    assert close(mine, theirs)


@pytest.mark.parametrize(("steps", "strength"), [(5, 0.5), (4, 1.0)])
def test_from_a_picture_as_the_library_does(pipe, images, steps, strength):
    """With 5 steps and 0.5 the two classes begin at different levels."""
    generators = seeded([3, 4])
    known = encode(pipe, images, generators)
    first = first_level(pipe, steps, strength)
    denoiser = Denoiser(pipe, PROMPTS, steps, 3.0)
    mine = run(denoiser, denoiser.mix(known, noise_like(known, generators), first), first)
    theirs = other(pipe, "Img2Img")(PROMPTS, image=images, strength=strength, **asked(steps, [3, 4])).images
    assert close(mine, theirs)


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 25])
def test_first_levels_are_the_librarys(pipe, steps):
    img2img = other(pipe, "Img2Img")
    img2img.scheduler.set_timesteps(steps)
    for strength in (0.15, 0.28, 0.5, 0.55, 0.7, 0.99, 1.0):
        left = len(img2img.get_timesteps(steps, strength, "cpu")[0])
        if left:
            assert steps - first_level(pipe, steps, strength) == left, strength
        else:
            with pytest.raises(ValueError, match=f"strength of {strength:g} leaves none of {steps} steps"):
                first_level(pipe, steps, strength)


@pytest.mark.parametrize("strength", [0, -1, 1.5, float("nan")])
def test_strengths_that_are_none(pipe, strength):
    with pytest.raises(ValueError, match="leaves none of 20 steps"):
        first_level(pipe, 20, strength)


def test_levels_end_where_the_next_begin(pipe):
    """Also for a number of steps that does not divide the trained timesteps."""
    walk, x = Walk(pipe.scheduler, 7), torch.ones(1, 1, 1, 1)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(7)
    for k, t in enumerate(scheduler.timesteps):
        assert float(t) == walk.times[k]
        output = 0.3 * x
        assert walk.mix(*walk.split(x, output, k), k + 1).item() == pytest.approx(
            scheduler.step(output, t, x).prev_sample.item(), abs=1e-5
        )
    with pytest.raises(ValueError, match="steps 0 are not a whole number"):
        Walk(pipe.scheduler, 0)


def test_encode_takes_the_mean_or_a_sample(pipe, images):
    mean = encode(pipe, images)
    assert torch.equal(mean, encode(pipe, images))
    assert not torch.equal(mean, encode(pipe, images, seeded([0, 1])))
    for wrong in ([], seeded([1])):
        with pytest.raises(ValueError, match="a generator for each or none"):
            encode(pipe, images if wrong else [], wrong or None)


def test_pictures_come_back_as_the_vae_keeps_them(pipe, images):
    vae, x = pipe.vae, pipe.image_processor.preprocess(images)
    with torch.no_grad():
        theirs = vae.decode(vae.encode(x).latent_dist.mode()).sample
    mine = pictures(pipe, encode(pipe, images))
    theirs = pipe.image_processor.postprocess(theirs, "pil")
    assert all(np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1 for a, b in zip(mine, theirs, strict=True))


# Inpainting


def half(images) -> Image.Image:
    return shape_mask(images[0].size, "rectangle", (50, 100), (0, 100))


@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_replacement_is_the_librarys(pipe, images, strength):
    generators, steps = seeded([3, 4]), 5
    known = encode(pipe, images, generators)
    noise, mask = noise_like(known, generators), on_latents(half(images), pipe.vae_scale_factor)
    denoiser, first = Denoiser(pipe, PROMPTS, steps, 3.0), first_level(pipe, steps, strength)
    # At full strength the library's class starts from noise alone.
    x = noise if strength == 1 else denoiser.mix(known, noise, first)
    mine = inpaint(denoiser, x, known, mask, noise, first)
    theirs = other(pipe, "Inpaint")(
        PROMPTS, image=images, mask_image=half(images), height=SIDE, width=SIDE, strength=strength,
        **asked(steps, [3, 4]),
    ).images  # fmt: skip
    assert close(mine, theirs)
    assert torch.equal(mine[..., :4], known[..., :4])


def test_resampling_asks_as_often_as_so_many_runs(pipe, images):
    known = encode(pipe, images[:1])
    noise, mask = noise_like(known, seeded([3])), on_latents(half(images), pipe.vae_scale_factor)
    denoiser = Denoiser(pipe, PROMPTS[:1], 4, 1.0)
    plain, seen = denoiser.output, []
    denoiser.output = lambda x, k: seen.append((k, x)) or plain(x, k)
    drawn = inpaint(denoiser, noise, known, mask, noise, rounds=3, jump=2, generators=seeded([8]))
    assert [k for k, _ in seen] == [0, 1, 0, 1, 0, 1, 2, 3, 2, 3, 2, 3]
    behind = [x[..., :4] for k, x in seen if k == 1]
    assert torch.equal(behind[0], denoiser.mix(known, noise, 1)[..., :4])
    assert not close(behind[0], behind[1])  # each round has noise of its own
    assert torch.equal(drawn[..., :4], known[..., :4])
    assert not close(drawn, inpaint(denoiser, noise, known, mask, noise))


def test_noised_latents_have_the_level_that_they_go_up_to(pipe):
    walk, clean = Walk(pipe.scheduler, 10), torch.full((1, 4, 100, 100), 2.0)
    low = walk.mix(clean, noise_like(clean, seeded([1])), 6)
    high = noised(walk, low, 6, 2, seeded([2]))
    assert high.mean().item() == pytest.approx(2 * walk.a[2], abs=0.02)
    assert high.std().item() == pytest.approx(walk.b[2], abs=0.02)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"jump": 0}, {"rounds": 2}])
def test_rounds_that_cannot_be(pipe, wrong):
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="Give 1 round or more"):
        inpaint(Walk(pipe.scheduler, 2), x, x, x, x, **wrong)


# Inversion


def test_the_way_back_is_the_librarys(tmp_path, images):
    pipe = random_sd.pipeline(tmp_path)
    scheduler = DDIMInverseScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(5)
    x = known = encode(pipe, images)
    denoiser = Denoiser(pipe, PROMPTS, 5, 2.0)
    with torch.no_grad():
        for k, t in zip(reversed(range(5)), scheduler.timesteps, strict=True):
            x = scheduler.step(denoiser.output(x, k), t, x).prev_sample
            if k == 2:
                assert close(invert(denoiser, known, first=2), x)
    assert close(invert(denoiser, known), x)


@pytest.mark.parametrize("steps", [10, 40])
def test_the_way_back_of_one_gaussian_is_known(pipe, steps):
    """A single Gaussian only shrinks or grows: where the level's spread is s, x / s stays."""
    gaussian = Mixture(torch.ones(1), torch.zeros(1, 1), torch.tensor([0.5]))
    exact, x = Exact(gaussian, pipe.scheduler, steps), torch.tensor([[0.3]]).double()
    found = invert(exact, x)
    spread = (0.25 * exact.a[0] ** 2 + exact.b[0] ** 2) ** 0.5
    end = (0.25 * exact.a[-1] ** 2 + exact.b[-1] ** 2) ** 0.5
    assert found.item() == pytest.approx(0.3 * spread / end, rel=4 / steps)


def test_asking_again_at_the_upper_end_comes_back_closer(pipe):
    exact = Exact(example(), pipe.scheduler, 80)
    x = example().sample(50, torch.Generator().manual_seed(0))[0].double()
    once, again = (distance(run(exact, invert(exact, x, rounds=rounds)), x) for rounds in (1, 6))
    assert again < once / 5
    with pytest.raises(ValueError, match="1 round or more"):
        invert(exact, x, rounds=0)


def test_distance_is_beside_the_second():
    assert distance(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 2.0])) == pytest.approx(0.5)


# Between


def test_slerp_keeps_the_norm_and_lerp_does_not():
    x, y = (noise_like(torch.zeros(2, 4, 32, 32), seeded([seed, seed + 1])) for seed in (0, 5))
    assert torch.allclose(slerp(x, y, 0.0), x, atol=1e-5) and torch.allclose(slerp(x, y, 1.0), y, atol=1e-5)
    middle = slerp(x, y, 0.5)
    own, of_arc, of_line = (one.flatten(1).norm(dim=1) for one in (x, middle, (x + y) / 2))
    assert torch.allclose(of_arc, own, rtol=0.05) and torch.allclose(of_line, 0.7 * own, rtol=0.05)
    first, second = (torch.nn.functional.cosine_similarity(middle.flatten(1), end.flatten(1)) for end in (x, y))
    assert torch.allclose(first, second, atol=0.05)


def test_slerp_of_what_points_the_same_way_is_straight():
    x = torch.ones(2, 3, 1, 1)
    assert torch.allclose(slerp(x, 3 * x, 0.25), 1.5 * x)


def test_an_animation_goes_there_and_back():
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 100, 200)]
    with Image.open(io.BytesIO(animation(frames, 2.0))) as moving:
        assert moving.n_frames == 4 and moving.info["loop"] == 0
        shades = []
        for index in range(4):
            moving.seek(index)
            shades.append(moving.convert("RGB").getpixel((0, 0))[0])
            assert moving.info["duration"] == 500
    assert shades == [0, 100, 200, 100]
    for wrong in (frames[:1], [*frames, Image.new("RGB", (9, 8))]):
        with pytest.raises(ValueError, match="two pictures or more, all of one size"):
            animation(wrong)


# Masks


def test_shapes():
    square = np.asarray(shape_mask((100, 50), "rectangle", (10, 30), (20, 60)))
    assert square.shape == (50, 100) and (square[10:30, 10:30] == 255).all() and (square == 255).sum() == 400
    round_one = np.asarray(shape_mask((200, 200), "ellipse", (0, 100), (25, 75)))
    assert (round_one == 255).mean() == pytest.approx(np.pi / 4 / 2, abs=0.005)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (("circle", (0, 50), (0, 50)), "no shape 'circle': choose one of rectangle, ellipse"),
        (("ellipse", (50, 20), (0, 50)), "From 50 % to 20 % across is no part"),
        (("ellipse", (0, 50), (10, 10)), "From 10 % to 10 % down is no part"),
        (("rectangle", (0, 101), (0, 50)), "From 0 % to 101 % across is no part"),
        (("rectangle", (float("nan"), 50), (0, 50)), "is no part of a picture"),
    ],
)
def test_shapes_that_are_none(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        shape_mask((64, 64), *given)


def test_latents_see_a_mask_as_the_library_does():
    soft = Image.fromarray((np.random.default_rng(0).random((64, 48)) * 255).astype(np.uint8))
    processor = VaeImageProcessor(vae_scale_factor=8, do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = torch.nn.functional.interpolate(processor.preprocess(soft, 64, 48), size=(8, 6))
    assert torch.equal(on_latents(soft, 8), theirs)
    thin = Image.new("L", (64, 64))
    thin.paste(255, (9, 0, 15, 64))
    with pytest.raises(ValueError, match="one pixel of each 8 x 8, so make it wider"):
        on_latents(thin, 8)


def test_a_picture_as_a_mask():
    drawn = Image.new("RGB", (200, 100), "black")
    drawn.paste((255, 255, 255), (0, 0, 100, 100))
    mask = mask_from(drawn, (64, 64))
    assert mask.mode == "L" and (np.asarray(mask)[:, :32] == 255).all() and not np.asarray(mask)[:, 32:].any()
    with pytest.raises(ValueError, match="paint white what is to be redrawn"):
        mask_from(Image.new("RGB", (10, 10), (100, 100, 100)), (64, 64))


def test_tinted_leaves_the_rest_alone(images):
    shown = np.asarray(tinted(images[0], half(images)), int)
    own = np.asarray(images[0], int)
    assert (shown[:, :32] == own[:, :32]).all() and (shown[:, 32:] != own[:, 32:]).any(-1).all()


def upload(control: widgets.FileUpload, content: bytes) -> None:
    """What a browser sends, as ipywidgets 7 or 8 keeps it."""
    if widgets.__version__.startswith("7"):
        control.set_trait("value", {"mask.png": {"metadata": {"name": "mask.png"}, "content": content}})
    else:
        about = {"name": "mask.png", "type": "", "size": len(content), "last_modified": datetime.now(UTC)}
        control.value = ({**about, "content": memoryview(content)},)


def test_controls_make_the_mask(images):
    controls = MaskControls(images[0], across=(0, 50), down=(0, 100))
    assert np.array_equal(controls.mask, shape_mask((SIDE, SIDE), "rectangle", (0, 50), (0, 100)))
    before = controls.image.value
    controls.shape.value, controls.down.value = "ellipse", (20, 40)
    assert np.array_equal(controls.mask, shape_mask((SIDE, SIDE), "ellipse", (0, 50), (20, 40)))
    assert controls.image.value != before


def test_controls_say_what_is_wrong_and_keep_the_mask(images):
    controls = MaskControls(images[0])
    before = controls.mask
    controls.down.value = (40, 40)
    assert "From 40 % to 40 % down" in controls.message.value and controls.mask is before
    upload(controls.file, b"<script>")
    assert "not a picture" in controls.message.value and controls.mask is before
    controls.down.value = (40, 60)
    assert controls.message.value == "" and controls.mask is not before


def test_a_picture_takes_the_place_of_the_shape(images):
    controls = MaskControls(images[0])
    upload(controls.file, file_of(half(images).resize((200, 100))))
    assert np.array_equal(controls.mask, half(images)) and controls.message.value == ""


# A picture of your own


def file_of(image: Image.Image, form="PNG", **more) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **more)
    return file.getvalue()


def test_a_photo_is_upright_and_cropped(tmp_path):
    photo = Image.new("RGB", (80, 40), "red")
    photo.paste((0, 0, 255), (40, 0, 80, 40))  # blue on the right
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: the right side of the file is the bottom
    path = tmp_path / "photo.jpg"
    path.write_bytes(file_of(photo, "JPEG", exif=exif, quality=95))
    seen = prepared(path, 32, 32)
    assert seen.size == (32, 32) and seen.mode == "RGB"
    top, bottom = seen.getpixel((16, 2)), seen.getpixel((16, 29))
    assert top[0] > 200 > 60 > top[2] and bottom[2] > 200 > 60 > bottom[0]
    assert np.array_equal(seen, prepared(str(path), 32, 32)) and np.array_equal(
        seen, prepared(path.read_bytes(), 32, 32)
    )


def test_nothing_is_squeezed():
    wide = Image.new("RGB", (300, 100), "white")
    wide.paste((0, 0, 0), (100, 0, 200, 100))
    assert np.asarray(prepared(file_of(wide), 64, 64)).max() < 60  # the middle alone


def test_what_is_transparent_is_white():
    drawn = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert prepared(file_of(drawn), 16, 16).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (b"", "not a picture that can be opened"),
        (b"<svg onload=alert(1)>", "not a picture that can be opened"),
        (file_of(Image.new("RGB", (40, 40)))[:60], "not a picture that can be opened"),
        (file_of(Image.new("1", (10_000, 5_001))), "50 million are the most|50010000|10000 x 5001"),
        (file_of(Image.new("RGB", (15, 400))), "15 x 400 pixels: 16 a side are the least"),
        ("nowhere/photo.jpg", "There is no file 'nowhere/photo.jpg'"),
        (".", "cannot be read"),
    ],
)
def test_pictures_that_are_none(source, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        prepared(source, 64, 64)
    assert "\n" not in str(caught.value)
