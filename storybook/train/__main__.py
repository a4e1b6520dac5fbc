"""Rebuild every bundled model from nothing: `python -m storybook.train`, also what `make train` runs."""

import argparse

from storybook.train import clip, judge, sd, sd3, sharpen, vae


def main() -> None:
    """The stages in order; each resumes where it was interrupted."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.parse_args()
    train_all([], [])


def train_all(size: list[str], more: list[str]) -> None:
    """Every stage; `size` and `more` are further arguments that stages take, e.g. for a short run."""
    judge.main(more)
    vae.main([*size, *more])
    sharpen.main(more)
    clip.main([*size, *more])
    sd.main(more)
    vae.main([*size, *SD3_VAE, *more])
    sharpen.main(["--vae", str(sd3.OUT / "vae"), "--name", "sharpen-16", *more])
    clip.main([*size, *SECOND_CLIP, *more])
    sd3.main(more)


# storybook-sd3 has its own autoencoder, with more channels, and a second CLIP, which stays in outputs/: the
# pipeline's folder has the text half.
SD3_VAE = ["--name", "vae-16", "--out", str(sd3.OUT / "vae"), "--latent-channels", "16"]
SD3_VAE += ["--widths", "24", "48", "48", "64"]
SECOND_CLIP = ["--name", "clip-2", "--out", str(sd3.SECOND_CLIP), "--width", "48", "--steps", "350"]


if __name__ == "__main__":
    main()
