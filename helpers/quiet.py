"""Calling diffusers and transformers without their bars and warnings on the page, in all of the versions we allow."""

from collections.abc import Iterator
from contextlib import contextmanager

import diffusers
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from packaging.version import Version


def dtype_keyword(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The keyword was renamed in diffusers 0.40; the old release ignores the new one and loads float32."""
    return {"dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype": dtype}


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
def unworried() -> Iterator[None]:
    """The first import of a pipeline warns about packages that it can do without; the page need not."""
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
