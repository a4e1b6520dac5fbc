"""Every part of Stable Diffusion 3 in from_scratch against diffusers and transformers, with the same random weights."""

import pytest
import random_sd3
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers.models.t5.modeling_t5 import T5Attention

from benchmarks.parity_full import difference, ours
from from_scratch.flow import FlowMatching
from from_scratch.mmdit import position_table
from from_scratch.t5 import distance_buckets

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def inputs(theirs, height: int, width: int, pictures: int = 2):
    """Latents, a context of 9 tokens, and the prompts as a whole."""
    config = theirs.config
    x = torch.randn(pictures, config.in_channels, height, width)
    return x, torch.randn(pictures, 9, config.joint_attention_dim), torch.randn(pictures, config.pooled_projection_dim)


CONFIGS = {
    "SD3": {"qk_norm": None, "dual": ()},
    "SD3.5 Large": {"dual": ()},
    "SD3.5 Medium": {"dual": (0, 1)},
    "dual to the end": {"qk_norm": None, "dual": (0, 2)},
    "one block": {"layers": 1, "dual": (0,), "head_channels": 32, "heads": 3},
    "patches of a pixel": {"patch": 1, "layers": 2, "size": 24},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mmdit(name):
    theirs = random_sd3.transformer(**CONFIGS[name])
    made = ours("transformer", theirs)
    for (height, width), t in (((24, 24), 1000.0), ((8, 8), 500.0), ((6, 14), 8.93)):
        x, context, pooled = inputs(theirs, height, width)
        expected = theirs(x, context, pooled, torch.full((2,), t)).sample
        assert difference(made(x, t, context, pooled), expected) < TOLERANCE
    times = torch.tensor([1.5, 750.0])  # a batch may be at different times
    assert difference(made(x, times, context, pooled), theirs(x, context, pooled, times).sample) < TOLERANCE


@pytest.mark.parametrize("name", ["SD3", "SD3.5 Medium", "dual to the end"])
@pytest.mark.parametrize("scale", [1.0, 0.001])  # with small values a wrong epsilon shows
def test_each_block(name, scale):
    theirs = random_sd3.transformer(**CONFIGS[name])
    made = ours("transformer", theirs)
    x, context, condition = scale * torch.randn(2, 12, 128), scale * torch.randn(2, 9, 128), torch.randn(2, 128)
    for n in range(3):
        expected_context, expected = theirs.transformer_blocks[n](x, context, condition)
        image, text = made.blocks[n](x, context, torch.nn.functional.silu(condition))
        assert difference(image, expected) < TOLERANCE
        assert (text is None) == (expected_context is None) == (n == 2)
        assert text is None or difference(text, expected_context) < TOLERANCE
        theirs_attends = theirs.transformer_blocks[n].attn2
        assert (made.blocks[n].image.attn2 is None) == (theirs_attends is None)


@pytest.mark.parametrize("skip", [[1], [0, 2], [0, 1, 2]])
def test_blocks_that_are_left_out(skip):
    theirs = random_sd3.transformer()
    x, context, pooled = inputs(theirs, 8, 8)
    expected = theirs(x, context, pooled, torch.tensor([300.0, 300.0]), skip_layers=skip).sample
    made = ours("transformer", theirs)
    assert difference(made(x, 300.0, context, pooled, skip=skip), expected) < TOLERANCE
    assert difference(made(x, 300.0, context, pooled), expected) > 0.01


@pytest.mark.parametrize("patch, size, sample, base", [(2, 12, 8, 4), (1, 16, 8, 8), (2, 7, 16, 8)])
def test_the_table_of_places(patch, size, sample, base):
    theirs = random_sd3.transformer(patch=patch, size=size, sample=sample, layers=1).pos_embed
    assert difference(position_table(128, size, base), theirs.pos_embed) < 1e-6
    made = ours("transformer", random_sd3.transformer(patch=patch, size=size, sample=sample, layers=1)).patches
    for height, width in ((1, 1), (2, 5), (size, size), (size - 1, 3)):
        assert torch.equal(made.crop(height, width), theirs.cropped_pos_embed(height * patch, width * patch))


@pytest.mark.parametrize("height, width", [(7, 8), (8, 9), (26, 8), (8, 26)])
def test_latents_that_do_not_fit(height, width):
    made = ours("transformer", random_sd3.transformer(layers=1))
    x, context, pooled = torch.randn(1, 16, height, width), torch.randn(1, 9, 208), torch.randn(1, 192)
    with pytest.raises(ValueError, match=f"The latents are {height}x{width}: .* multiples of 2, at most 24"):
        made(x, 5, context, pooled)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("end", [2, 99, 50])
def test_clip_with_projection(activation, end):
    """An end of 2 is the mistake of old settings, and means the largest id."""
    theirs = random_sd3.clip(100, 128, activation, end)
    tokens = torch.randint(3, 50, (3, 77))
    tokens[0, 5:], tokens[1, 20], tokens[2, 76] = end, end, end  # padded with the end, one end, only at the end
    if end != 99:
        tokens[:, 40] = 99  # a later one with a larger id
    context, pooled = ours("clip", theirs)(tokens)
    expected = theirs(tokens, output_hidden_states=True)
    assert difference(context, expected.hidden_states[-2]) < TOLERANCE
    assert difference(pooled, expected.text_embeds) < TOLERANCE


@pytest.mark.parametrize("buckets", [32, 16])
def test_distances_of_t5(buckets):
    way = torch.arange(300)[None] - torch.arange(300)[:, None]
    expected = T5Attention._relative_position_bucket(way, True, buckets, 128)
    assert torch.equal(distance_buckets(300, buckets), expected)
    assert expected.unique().numel() == buckets - 1  # "0 later" is in none


@pytest.mark.parametrize("options, length", [({}, 256), ({"layers": 1, "heads": 5, "buckets": 8}, 7)])
def test_t5(options, length):
    theirs = random_sd3.t5(**options)
    tokens = torch.randint(0, 160, (2, length))
    assert difference(ours("t5", theirs)(tokens), theirs(tokens)[0]) < TOLERANCE


def test_t5_in_half_precision():
    """Its sums pass 65504, the largest number of float16, and are kept in float32."""
    theirs, sums = random_sd3.t5(), []
    for block in theirs.encoder.block:
        block.layer[1].DenseReluDense.wo.weight *= 6e4
    made, tokens = ours("t5", theirs), torch.randint(0, 160, (2, 20))
    made.final_layer_norm.register_forward_pre_hook(lambda module, args: sums.append(args[0].abs().max()))
    expected, half = made(tokens), made.to(torch.float16)(tokens)
    assert min(sums) > 65504
    assert half.dtype == torch.float16 and difference(half.float(), expected) < 0.01


@pytest.mark.parametrize("shift, scaling", [(0.0609, 1.5305), (-0.03, 0.97)])
def test_vae_of_sixteen_channels(shift, scaling):
    theirs = random_sd3.vae(shift, scaling)
    made = ours("vae_16", theirs)
    images = torch.randn(2, 3, 48, 32)
    expected = theirs.encode(images).latent_dist
    noise = torch.randn_like(expected.mean)
    latents = (expected.mean + expected.std * noise - shift) * scaling
    assert difference(made.encode(images, noise), latents) < TOLERANCE
    assert difference(made.encode(images), (expected.mean - shift) * scaling) < TOLERANCE
    z = torch.randn(2, 16, 6, 4)
    assert difference(made.decode(z), theirs.decode(z / scaling + shift).sample) < TOLERANCE


# The sampler.


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 2, 28, 1000])
def test_sampler(steps, shift):
    theirs, made = FlowMatchEulerDiscreteScheduler(shift=shift), FlowMatching(steps, shift)
    theirs.set_timesteps(steps)
    assert difference(made.sigmas, theirs.sigmas) < 1e-6 and difference(made.timesteps, theirs.timesteps) < 1e-6
    theirs.set_begin_index(0)
    latents, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    expected = latents
    for index in range(min(steps, 5)):
        velocity = torch.sin(3 * latents + index)
        latents = made.step(latents, velocity, index, None)
        expected = theirs.step(velocity, theirs.timesteps[index], expected).prev_sample
        assert difference(latents, expected) < TOLERANCE
    for index in {0, steps // 2, steps - 1}:
        theirs.set_begin_index(index)
        theirs._step_index = None
        noised = theirs.scale_noise(latents, theirs.timesteps[index : index + 1], noise)
        assert difference(made.add_noise(latents, noise, index), noised) < TOLERANCE
    assert torch.equal(made.add_noise(latents, noise, steps), latents)


def test_the_straight_line_is_walked_exactly():
    """With the true velocity ε - x₀ any number of steps ends at the picture."""
    picture, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    made = FlowMatching(3, 3.0)
    latents = made.first(noise)
    for index in range(3):
        latents = made.step(latents, noise - picture, index, None)
        assert difference(latents, made.add_noise(picture, noise, index + 1)) < TOLERANCE
    assert difference(latents, picture) < TOLERANCE


@pytest.mark.parametrize("steps", [0, -1, 1001, 2.5, "20", None])
def test_a_number_of_steps_that_there_is_not(steps):
    with pytest.raises(ValueError, match="steps is .*: give a whole number from 1 to 1000"):
        FlowMatching(steps, 3.0)
