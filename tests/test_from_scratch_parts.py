"""Every part of from_scratch against diffusers and transformers with the same random weights, in float32."""

import pytest
import random_sd
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding

from benchmarks.parity_full import difference, ours
from from_scratch import attention, layers
from from_scratch.unet import timestep_embedding

TOLERANCE = 1e-5
# Group norms of small values show a wrong epsilon, those of large ones do not.
SCALES = (1.0, 0.01)


@pytest.fixture(autouse=True)
def no_gradients():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def unets():
    theirs = random_sd.unet()
    return ours("unet", theirs), theirs


@pytest.mark.parametrize("heads", [1, 2])
def test_text_encoder(heads):
    theirs = random_sd.text_encoder(300, heads=heads, layers=3)
    tokens = torch.randint(0, 300, (3, 77))
    made = ours("text_encoder", theirs)
    assert difference(made(tokens), theirs(tokens)[0]) < TOLERANCE
    assert difference(made(tokens[:, :9]), made(tokens)[:, :9]) < TOLERANCE  # what comes later changes nothing before


@pytest.mark.parametrize("config", [{}, {"widths": (16, 24, 32), "layers": 1, "groups": 8, "scaling_factor": 0.7}])
@pytest.mark.parametrize("scale", SCALES)
def test_vae(config, scale):
    theirs = random_sd.vae(**config)
    made = ours("vae", theirs)
    images = scale * torch.randn(2, 3, 48, 32)
    mean, deviation = made.distribution(images)
    expected = theirs.encode(images).latent_dist
    assert difference(mean, expected.mean) < TOLERANCE
    assert difference(deviation, expected.std) < TOLERANCE
    noise = torch.randn_like(mean)
    latents = (expected.mean + expected.std * noise) * theirs.config.scaling_factor
    assert difference(made.encode(images, noise), latents) < TOLERANCE
    z = scale * torch.randn(2, 4, 6, 4)
    assert difference(made.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample) < TOLERANCE


def test_timestep_embedding():
    times = torch.tensor([1, 21, 981, 999])
    expected = get_timestep_embedding(times, 320, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(timestep_embedding(times, 320), expected)


def setting(theirs, scale: float, channels: int):
    """Random input of a block, the time embedding and a prompt of 9 words."""
    x, context = scale * torch.randn(2, channels, 8, 6), torch.randn(2, 9, theirs.config.cross_attention_dim)
    return x, torch.randn(2, 4 * theirs.config.block_out_channels[0]), context


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_down_blocks(unets, level, scale):
    made, theirs = (unet.down_blocks[level] for unet in unets)
    x, time, context = setting(unets[1], scale, (32, 32, 64, 96)[level])
    more = {"encoder_hidden_states": context} if level < 3 else {}
    result, skips = made(x, torch.nn.functional.silu(time), context)
    expected, expected_skips = theirs(x, time, **more)
    assert difference(result, expected) < TOLERANCE
    assert len(skips) == len(expected_skips)
    for a, b in zip(skips, expected_skips, strict=True):
        assert difference(a, b) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
def test_mid_block(unets, scale):
    made, theirs = (unet.mid_block for unet in unets)
    x, time, context = setting(unets[1], scale, 96)
    expected = theirs(x, time, encoder_hidden_states=context)
    assert difference(made(x, torch.nn.functional.silu(time), context), expected) < TOLERANCE


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_up_blocks(unets, level, scale):
    made, theirs = (unet.up_blocks[level] for unet in unets)
    x, time, context = setting(unets[1], scale, (96, 96, 96, 64)[level])
    reads = [resnet.conv1.in_channels for resnet in theirs.resnets]
    writes = theirs.resnets[0].conv1.out_channels
    before = [x.shape[1]] + [writes] * (len(reads) - 1)
    skips = [scale * torch.randn(2, r - b, 8, 6) for r, b in zip(reads, before, strict=True)][::-1]
    more = {"encoder_hidden_states": context} if level > 0 else {}
    expected = theirs(x, tuple(skips), time, **more)
    following = [torch.empty(2, 1, 16, 12)]  # the next level's skip, which gives the size to grow to
    assert difference(made(x, torch.nn.functional.silu(time), context, following + skips), expected) < TOLERANCE


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (9, 13), (3, 5)])
def test_unet_at_any_size(unets, size):
    made, theirs = unets
    x, context = torch.randn(2, 4, *size), torch.randn(2, 77, 64)
    expected = theirs(x, 981, context).sample
    assert difference(made(x, 981, context), expected) < TOLERANCE
    assert difference(made(x, torch.tensor([981, 981]), context), expected) < TOLERANCE


@pytest.mark.parametrize("layers, widths, plain", [(1, (64, 96), 0), (3, (32, 64, 64), 2)])
def test_unet_of_other_widths_and_depths(layers, widths, plain):
    theirs = random_sd.unet(widths, layers, plain, context=48, heads=4, groups=16)
    x, context = torch.randn(1, 4, 8, 8), torch.randn(1, 20, 48)
    times = torch.tensor([21])
    assert difference(ours("unet", theirs)(x, times, context), theirs(x, times, context).sample) < TOLERANCE


def test_a_first_level_without_attention():
    """As in the bundled model; its channels need not suit the heads of the others."""
    theirs = UNet2DConditionModel(
        block_out_channels=(36, 64, 96),
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    theirs = random_sd.randomise(theirs, 1)
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 9, 32)
    assert difference(ours("unet", theirs)(x, 5, context), theirs(x, 5, context).sample) < TOLERANCE


def test_a_batch_may_be_at_different_times(unets):
    made, theirs = unets
    x, context, times = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 64), torch.tensor([1, 801])
    assert difference(made(x, times, context), theirs(x, times, context).sample) < TOLERANCE


def test_gradients_are_those_of_diffusers(unets):
    torch.manual_seed(0)
    x, context, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 64), torch.randint(0, 200, (1, 20))
    vae, text = random_sd.vae(), random_sd.text_encoder(200)
    my_vae, my_text, images = ours("vae", vae), ours("text_encoder", text), torch.randn(1, 3, 32, 32)
    runs = [
        (unets[0], lambda: unets[0](x, 500, context), lambda: unets[1](x, 500, context).sample, unets[1]),
        (my_vae, lambda: my_vae.decode(x) / 9, lambda: vae.decode(x / vae.config.scaling_factor).sample / 9, vae),
        (my_vae, lambda: my_vae.distribution(images)[0], lambda: vae.encode(images).latent_dist.mean, vae),
        (my_text, lambda: my_text(tokens), lambda: text(tokens)[0], text),
    ]
    for mine, run, run_theirs, theirs in runs:
        with torch.enable_grad():
            run().square().mean().backward()
            run_theirs().square().mean().backward()
        found = [w.grad.norm() for w in mine.parameters() if w.grad is not None]
        expected = [w.grad.norm() for w in theirs.parameters() if w.grad is not None]
        assert len(found) == len(expected) > 0
        assert difference(torch.stack(found).sort()[0], torch.stack(expected).sort()[0]) < 1e-4
        mine.zero_grad()
        theirs.zero_grad()


def test_upsampling_is_nearest_then_a_convolution():
    layer, size = layers.Upsample(12), (9, 14)
    x = torch.randn(1, 12, *size)
    expected = layer.conv(torch.nn.functional.interpolate(x, scale_factor=2.0))
    assert difference(layer(x), expected) < TOLERANCE
    odd = (2 * size[0] - 1, 2 * size[1])
    assert difference(layer(x, odd), layer.conv(torch.nn.functional.interpolate(x, size=odd))) < TOLERANCE


def test_attention_map_is_what_attention_weighs_with():
    q, k, v = torch.randn(2, 10, 16), torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    table = attention.attention_map(q, k, heads=4)
    assert difference(table.sum(-1), torch.ones(2, 4, 10)) < TOLERANCE
    weighed = (table @ attention.split_heads(v, 4)).transpose(1, 2).flatten(2)
    assert difference(attention.attention(q, k, v, heads=4), weighed) < TOLERANCE
