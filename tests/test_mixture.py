"""The mixture whose scores are known: its formulas against torch's gradients, against samples, against known cases."""

import matplotlib
import pytest
import torch

from helpers.mixture import Mixture, cloud, example, planes, shade, sliced_wasserstein

matplotlib.use("Agg")

MIXTURE = example()
LEVELS = [(1.0, 0.1), (0.8, 0.6), (0.1, 0.99)]


def some_points(count=200, seed=0):
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed)).double()


def one_gaussian(mean, std):
    return Mixture(torch.ones(1), torch.tensor([mean]), torch.tensor([std]))


@pytest.mark.parametrize("a, b", LEVELS)
def test_the_score_is_the_gradient_of_the_log_density(a, b):
    x = some_points().requires_grad_()
    (gradient,) = torch.autograd.grad(MIXTURE.log_density(x, a, b).sum(), x)
    assert torch.allclose(gradient, MIXTURE.score(x.detach(), a, b))


@pytest.mark.parametrize("a, b", LEVELS)
def test_the_four_answers_belong_together(a, b):
    x = some_points()
    score, clean, noise, v = (f(x, a, b) for f in (MIXTURE.score, MIXTURE.clean, MIXTURE.noise, MIXTURE.velocity))
    assert torch.allclose(a * clean + b * noise, x)
    assert torch.allclose(noise, -b * score)
    assert torch.allclose(v, a * noise - b * clean)


def test_best_guess_and_doubt_agree_with_samples():
    generator = torch.Generator().manual_seed(1)
    x0, _ = MIXTURE.sample(1_000_000, generator)
    x = 0.8 * x0 + 0.6 * torch.randn(x0.shape, generator=generator)
    place = torch.tensor([0.3, 0.2])
    near = x0[(x - place).norm(dim=1) < 0.07]
    assert torch.allclose(near.mean(0), MIXTURE.clean(place, 0.8, 0.6), atol=0.08)
    assert near.var(0).mean() == pytest.approx(MIXTURE.doubt(place, 0.8, 0.6).item(), rel=0.08)


def test_doubt_is_the_smallest_mean_squared_error():
    generator = torch.Generator().manual_seed(2)
    x0, _ = MIXTURE.sample(100_000, generator)
    x = 0.9 * x0 + 0.44 * torch.randn(x0.shape, generator=generator)
    error = (MIXTURE.clean(x, 0.9, 0.44) - x0).square().mean().item()
    assert error == pytest.approx(MIXTURE.doubt(x, 0.9, 0.44).mean().item(), rel=0.03)


def test_one_gaussian_in_one_dimension_is_the_textbook_case():
    gaussian = one_gaussian([2.0], 0.5)
    x, a, b = torch.tensor([[1.0]]), 0.6, 0.8
    variance = a**2 * 0.25 + b**2
    assert gaussian.score(x, a, b).item() == pytest.approx((a * 2 - 1) / variance)
    assert gaussian.doubt(x, a, b).item() == pytest.approx(0.25 * b**2 / variance)
    assert gaussian.log_density(x, 1.0).item() == pytest.approx(
        torch.distributions.Normal(2.0, 0.5).log_prob(x).item(), rel=1e-5
    )


def test_levels_may_be_tensors():
    x, a, b = some_points(3).float(), torch.tensor([[1.0], [0.8], [0.1]]), torch.tensor([[0.1], [0.6], [0.99]])
    for method in ("score", "clean", "noise", "velocity", "doubt", "log_density", "shares"):
        together = getattr(MIXTURE, method)(x, a, b)
        alone = torch.stack([getattr(MIXTURE, method)(x[k], *LEVELS[k]) for k in range(3)])
        assert torch.allclose(together, alone, atol=1e-4), method


def test_a_noised_mixture_has_the_density_of_its_noised_samples():
    grid = torch.linspace(-5, 5, 201)
    x = torch.cartesian_prod(grid, grid)
    for a, b in LEVELS:
        density = MIXTURE.log_density(x, a, b).exp() * 0.05**2
        assert density.sum().item() == pytest.approx(1, abs=0.01)
        assert (density @ x.square().mean(-1)).item() == pytest.approx(a**2 + b**2, rel=0.02)


def test_the_example_has_mean_0_and_variance_1():
    mean, variance = MIXTURE.moments()
    assert torch.allclose(mean, torch.zeros(2), atol=1e-5)
    assert variance.mean().item() == pytest.approx(1, rel=1e-5)
    points, which = MIXTURE.sample(200_000, torch.Generator().manual_seed(3))
    assert torch.allclose(points.var(0), variance, rtol=0.02)
    assert torch.allclose(which.bincount() / 200_000, MIXTURE.weights, atol=0.005)


def test_exact_samples_have_exact_shares():
    points, which = MIXTURE.sample(1000, torch.Generator().manual_seed(3), exact=True)
    assert points.shape == (1000, 2)
    assert which.bincount().tolist() == (1000 * MIXTURE.weights).round().int().tolist()


def test_a_label_takes_its_part_of_the_mixture():
    left = MIXTURE.given(0)
    assert set(left.labels) == {0} and left.weights.sum().item() == pytest.approx(1)
    assert torch.equal(left.means, MIXTURE.means[:2])
    with pytest.raises(ValueError, match="No Gaussian has the label 7"):
        MIXTURE.given(7)


@pytest.mark.parametrize(
    "fields, message",
    [
        ((torch.ones(2) / 2, torch.zeros(3, 2), torch.ones(2)), "k means|means of shape"),
        ((torch.ones(2), torch.zeros(2, 2), torch.ones(2)), "add up to 1"),
        ((torch.ones(2) / 2, torch.zeros(2, 2), torch.zeros(2)), "above 0"),
        ((torch.ones(2) / 2, torch.zeros(2, 2), torch.ones(2), (1,)), "1 labels"),
    ],
)
def test_a_wrong_mixture_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Mixture(*fields)


def test_the_distance_of_shifted_clouds_is_known():
    """Moved by d, a cloud is |cos| * d away when seen from each side: 2 / pi * d on average."""
    points = some_points(500)
    assert sliced_wasserstein(points, points[torch.randperm(500)]).item() == pytest.approx(0, abs=1e-9)
    moved = sliced_wasserstein(points, points + torch.tensor([0.5, 0.0]), directions=512).item()
    assert moved == pytest.approx(0.5 * 2 / torch.pi, rel=1e-3)


def test_distances_of_several_clouds_at_once():
    many = torch.stack([some_points(100, seed) for seed in range(3)])
    truth = some_points(100, 9)
    assert torch.allclose(
        sliced_wasserstein(many, truth), torch.stack([sliced_wasserstein(one, truth) for one in many])
    )
    with pytest.raises(ValueError, match="equally many points"):
        sliced_wasserstein(some_points(10), some_points(11))


def test_pictures_can_be_drawn():
    first, second = planes(["density", "points"])
    shade(first, MIXTURE, 0.9, 0.4)
    points, which = MIXTURE.sample(50, torch.Generator().manual_seed(0))
    cloud(second, points, torch.tensor(MIXTURE.labels)[which])
    assert first.images and second.collections
    matplotlib.pyplot.close("all")
