"""Calling diffusers and transformers without their bars and warnings on the page, in all of the versions we allow."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from packaging.version import Version

from helpers.login import can_ask


def dtype_keyword(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """`{"dtype": dtype}` for diffusers 0.40 and up. Older ones ignore that, load float32, and want "torch_dtype"."""
    return {"dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype": dtype}


def watched() -> bool:
    """Whether a person looks on, so that a progress bar is more than litter on the page."""
    return can_ask() or sys.stderr.isatty()


@contextmanager
def as_before() -> Iterator[None]:
    """PyTorch's default dtype afterwards is the one before: diffusers changes it while it builds a network."""
    own = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(own)


@contextmanager
def no_bars() -> Iterator[None]:
    """No "Loading weights" bars on the page. Downloads are outside and keep theirs."""
    hub_quiet = are_progress_bars_disabled()
    restore = [
        module.enable_progress_bar
        for module in (diffusers.utils.logging, transformers.utils.logging)
        if module.is_progress_bar_enabled()
    ]
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        for enable in restore:
            enable()
        (disable_progress_bars if hub_quiet else enable_progress_bars)()


@contextmanager
def only_errors() -> Iterator[None]:
    """transformers logs errors alone: the first import of a pipeline warns of packages that it can do without."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
