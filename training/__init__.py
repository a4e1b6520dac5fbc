"""Training: the one loop, a folder of pictures and captions, a small conditional UNet. It imports none of ours."""
