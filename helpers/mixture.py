"""Rung 0: a mixture of Gaussians, of which all that a diffusion model has to learn is known exactly.

A point is noised as `x = a * x0 + b * noise`. In every method `x` is (..., dimensions), and `a` and `b` are numbers, or
tensors that broadcast against `x`. A noised mixture is a mixture again: density, score and best guesses are formulas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

COLOURS = ("#27567b", "#d1495b", "#66a182", "#edae49")  # of the labels 0, 1, 2, 3 in pictures
SPAN = 2.6  # pictures reach from -SPAN to SPAN
SHOWN = 2000  # points of a cloud that are drawn: more make the picture's file large and show no more


@dataclass(frozen=True, eq=False)
class Mixture:
    """Gaussians with `weights` (k), `means` (k, dimensions) and one standard deviation each, `stds` (k).

    `labels` says for each to which class it belongs, for models with a condition. Raises ValueError if the lengths
    differ, a weight or a standard deviation is not above 0, or the weights do not add up to 1.
    """

    weights: torch.Tensor
    means: torch.Tensor
    stds: torch.Tensor
    labels: tuple[int, ...] = ()

    def __post_init__(self):
        count = len(self.weights)
        if self.means.ndim != 2 or len(self.means) != count or self.stds.shape != (count,):
            raise ValueError("A mixture of k Gaussians takes k weights, means of shape (k, dimensions) and k stds.")
        if self.labels and len(self.labels) != count:
            raise ValueError(f"There are {count} Gaussians and {len(self.labels)} labels: give one label for each.")
        if (self.weights <= 0).any() or (self.stds <= 0).any() or abs(self.weights.sum().item() - 1) > 1e-5:
            raise ValueError("Weights and stds must be above 0, and the weights must add up to 1.")

    def sample(self, count: int, generator: torch.Generator, exact: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """`count` points (count, dimensions), and which Gaussian each comes from (count).

        With `exact` each Gaussian gets its share to within one point, in order, instead of by chance.
        """
        if exact:
            which = torch.searchsorted(self.weights.cumsum(0), (torch.arange(count) + 0.5) / count)
            which = which.clamp(max=len(self.weights) - 1)
        else:
            which = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator)
        return self.means[which] + self.stds[which, None] * noise, which

    def given(self, label: int) -> "Mixture":
        """The mixture of the Gaussians with this label. Raises ValueError if there is none."""
        keep = [k for k, own in enumerate(self.labels) if own == label]
        if not keep:
            raise ValueError(f"No Gaussian has the label {label}: there are {sorted(set(self.labels))}.")
        weights = self.weights[keep]
        return Mixture(weights / weights.sum(), self.means[keep], self.stds[keep], tuple(label for _ in keep))

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance of each coordinate."""
        mean = self.weights @ self.means
        return mean, self.weights @ (self.means - mean).square() + self.weights @ self.stds.square()

    def log_density(self, x, a=1.0, b=0.0) -> torch.Tensor:
        """Of the noised mixture, (...)."""
        return self._log_parts(x, a, b).logsumexp(-1)

    def shares(self, x, a=1.0, b=0.0) -> torch.Tensor:
        """How likely it is that `x` comes from each of the Gaussians, (..., k)."""
        return self._log_parts(x, a, b).softmax(-1)

    def score(self, x, a=1.0, b=0.0) -> torch.Tensor:
        """The gradient of the log-density with respect to `x`."""
        away = self._columns(a) * self.means.to(x) - x[..., None, :]
        return (self.shares(x, a, b)[..., None] * away / self._variances(x, a, b)[..., None]).sum(-2)

    def clean(self, x, a, b) -> torch.Tensor:
        """The best guess of the clean point, the mean of all `x0` that could have become `x`."""
        shares, gain = self.shares(x, a, b)[..., None], self._gain(x, a, b)[..., None]
        centres = self.means.to(x)
        return (shares * (centres + gain * (x[..., None, :] - self._columns(a) * centres))).sum(-2)

    def noise(self, x, a, b) -> torch.Tensor:
        """The best guess of the noise in `x`."""
        return -b * self.score(x, a, b)

    def velocity(self, x, a, b) -> torch.Tensor:
        """The best guess of `v = a * noise - b * x0`."""
        return a * self.noise(x, a, b) - b * self.clean(x, a, b)

    def doubt(self, x, a, b) -> torch.Tensor:
        """The variance of a coordinate of `x0` around `clean`, averaged over the coordinates, (...)."""
        gain, stds, centres = self._gain(x, a, b)[..., None], self.stds.to(x)[:, None], self.means.to(x)
        guesses = centres + gain * (x[..., None, :] - self._columns(a) * centres)  # one for each Gaussian
        within = (1 - gain * self._columns(a)) * stds**2
        between = (guesses - self.clean(x, a, b)[..., None, :]).square()
        return (self.shares(x, a, b)[..., None] * (within + between)).sum(-2).mean(-1)

    @staticmethod
    def _columns(value):
        """A number as it is; a tensor (..., 1) made to broadcast against (..., k, dimensions)."""
        return value[..., None] if torch.is_tensor(value) and value.ndim else value

    def _variances(self, x, a, b) -> torch.Tensor:
        return a**2 * self.stds.to(x) ** 2 + b**2 + torch.zeros_like(x[..., :1])

    def _gain(self, x, a, b) -> torch.Tensor:
        """How far a guess of x0 follows x, for each Gaussian."""
        return a * self.stds.to(x) ** 2 / self._variances(x, a, b)

    def _log_parts(self, x, a, b) -> torch.Tensor:
        variances = self._variances(x, a, b)
        squares = (x[..., None, :] - self._columns(a) * self.means.to(x)).square().sum(-1)
        size = self.means.shape[1]
        return self.weights.to(x).log() - squares / (2 * variances) - size / 2 * (2 * math.pi * variances).log()


def example() -> Mixture:
    """Five Gaussians in the plane, of two classes: 0 on the left, 1 on the right. Mean 0, variance 1 on average."""
    raw = Mixture(
        weights=torch.tensor([0.25, 0.20, 0.25, 0.15, 0.15]),
        means=torch.tensor([[-1.5, 0.7], [-0.9, -1.2], [1.0, 1.2], [1.6, -0.3], [0.5, -1.3]]),
        stds=torch.tensor([0.18, 0.14, 0.20, 0.12, 0.14]),
        labels=(0, 0, 1, 1, 1),
    )
    mean, variance = raw.moments()
    size = variance.mean().sqrt()
    return Mixture(raw.weights, (raw.means - mean) / size, raw.stds / size, raw.labels)


def sliced_wasserstein(points: torch.Tensor, others: torch.Tensor, directions: int = 32) -> torch.Tensor:
    """How far apart two clouds of equally many points in the plane are, (..., n, 2) each, as one number a pair (...).

    Seen from each of `directions` sides the clouds are lines of n points; these are matched in order, and the mean
    distance is taken over points and sides. It is 0 only for equal clouds; two samples of one distribution are a little
    apart, so compare with that. Raises ValueError for other shapes.
    """
    if points.shape[-2:] != others.shape[-2:] or points.shape[-1] != 2:
        raise ValueError("Both clouds must have equally many points in the plane, shape (..., n, 2).")
    angles = torch.arange(directions) * math.pi / directions
    views = torch.stack([angles.cos(), angles.sin()]).to(points)
    return ((points @ views).sort(-2).values - (others @ views).sort(-2).values).abs().mean((-2, -1))


# Pictures


def planes(titles: Sequence[str], columns: int | None = None, size: float = 2.3) -> list[Axes]:
    """Empty square plots side by side, all with the same span and no ticks."""
    columns = columns or len(titles)
    rows = -(-len(titles) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(size * columns, (size + 0.25) * rows), dpi=80, squeeze=False)
    axes = list(grid.flat)
    for one in axes[len(titles) :]:
        one.set_axis_off()
    for one, title in zip(axes, titles, strict=False):
        one.set(xlim=(-SPAN, SPAN), ylim=(-SPAN, SPAN), xticks=[], yticks=[], aspect="equal")
        one.set_title(title, fontsize=9)
    figure.set_layout_engine("tight")
    return axes[: len(titles)]


def cloud(axes: Axes, points: torch.Tensor, labels: torch.Tensor | None = None, size: float = 2) -> None:
    """Points of the plane, SHOWN of them at most, coloured by label where there are labels."""
    every = -(-len(points) // SHOWN)
    colours = COLOURS[0] if labels is None else [COLOURS[label] for label in labels[::every].tolist()]
    axes.scatter(*points[::every].detach().T.numpy(), s=size, c=colours, linewidths=0, alpha=0.6)


def lattice(count: int) -> torch.Tensor:
    """The points of an even grid over the plane, (count * count, 2)."""
    line = torch.linspace(-SPAN, SPAN, count + 2)[1:-1]
    return torch.cartesian_prod(line, line)


def shade(axes: Axes, mixture: Mixture, a: float = 1.0, b: float = 0.0) -> None:
    """The density of the noised mixture as a grey backdrop, darker where it is higher."""
    line = torch.linspace(-SPAN, SPAN, 121)
    points = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    density = mixture.log_density(points, a, b).exp().sqrt()  # the root shows faint places too
    axes.imshow(density, extent=(-SPAN, SPAN, -SPAN, SPAN), origin="lower", cmap="Greys", vmax=1.6 * density.max())


def arrows(axes: Axes, places: torch.Tensor, steps: torch.Tensor, colour: str = COLOURS[1]) -> None:
    """An arrow at each place, as long as its step is."""
    axes.quiver(*places.T, *steps.T, color=colour, angles="xy", scale_units="xy", scale=1, width=0.006)
