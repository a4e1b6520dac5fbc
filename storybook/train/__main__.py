"""Rebuild every bundled model from nothing: `python -m storybook.train`, also what `make train` runs."""

import argparse

from storybook.train import clip, judge, sd, vae


def main() -> None:
    """The stages in order; each resumes where it was interrupted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--size", type=int, default=64, help="pixels: 64 fits an evening on a CPU, 128 wants a GPU")
    args = parser.parse_args()
    size = ["--size", str(args.size)]
    vae.main(size)
    judge.main([])
    clip.main(size)
    sd.main([])


if __name__ == "__main__":
    main()
