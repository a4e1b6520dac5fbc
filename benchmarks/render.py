"""Pictures a second that the storybook world draws on one core: `python -m benchmarks.render`."""

import platform
import random
import statistics
import time

from storybook.world import random_scene, render


def renders_per_second(size: int, count: int = 300) -> float:
    """Scene, random details and drawing included."""
    rng = random.Random(0)
    start = time.perf_counter()
    for _ in range(count):
        render(random_scene(rng), rng, size)
    return count / (time.perf_counter() - start)


def main() -> None:
    """The median of five rounds for each size."""
    for size in (64, 128, 256):
        rounds = [renders_per_second(size) for _ in range(5)]
        print(f"{size}x{size}: {statistics.median(rounds):.0f} pictures a second")
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
