"""As in the real module; huggingface_hub imports it when it looks for a token."""


class Error(Exception):
    """What most of Colab's own errors are."""
