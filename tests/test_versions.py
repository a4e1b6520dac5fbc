"""Bars and warnings of diffusers and transformers: silent for a while, afterwards as they were."""

import io
import os
import subprocess
import sys
from itertools import product
from logging import StreamHandler
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from helpers.loading.versions import as_before, dtype_keyword, no_bars, only_errors

LOGGINGS = (diffusers.utils.logging, transformers.utils.logging)


def shown() -> list[bool]:
    """Whether diffusers, transformers and the Hub client show bars."""
    return [*(logging.is_progress_bar_enabled() for logging in LOGGINGS), not are_progress_bars_disabled()]


def show(wanted) -> None:
    for logging, on in zip(LOGGINGS, wanted, strict=False):
        (logging.enable_progress_bar if on else logging.disable_progress_bar)()
    (enable_progress_bars if wanted[2] else disable_progress_bars)()


@pytest.fixture(autouse=True)
def as_they_were():
    before, level = shown(), transformers.utils.logging.get_verbosity()
    yield
    show(before)
    transformers.utils.logging.set_verbosity(level)


@pytest.mark.parametrize("before", [*product([True, False], repeat=3)], ids=str)
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_no_bars(before, error):
    show(before)
    assert shown() == list(before)
    try:
        with no_bars():
            assert shown()[:2] == [False, False]
            if error is not None:
                raise error
    except KeyboardInterrupt:
        assert error is not None
    assert shown() == list(before)


def test_no_bars_where_the_environment_forbids_them():
    """The Hub client warns of whoever enables its bars against the environment."""
    code = "from helpers.loading.versions import no_bars\nwith no_bars(): pass"
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("level", ["INFO", "WARNING", "ERROR"])
def test_only_errors(level):
    logger, written = transformers.utils.logging.get_logger(f"transformers.{level}"), io.StringIO()
    logger.addHandler(StreamHandler(written))  # some versions pass nothing on to pytest's own handler
    transformers.utils.logging.set_verbosity(getattr(transformers.utils.logging, level))
    with pytest.raises(ZeroDivisionError), only_errors():
        logger.warning("a package is missing")
        logger.error("the file is damaged")
        _ = 1 / 0
    logger.warning("afterwards")
    said = written.getvalue()
    assert "missing" not in said and "damaged" in said
    assert ("afterwards" in said) == (level != "ERROR")
    assert transformers.utils.logging.get_verbosity() == getattr(transformers.utils.logging, level)


def test_the_default_dtype_is_the_one_before():
    with pytest.raises(KeyboardInterrupt), as_before():
        torch.set_default_dtype(torch.float16)
        raise KeyboardInterrupt
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(("version", "keyword"), [("0.39.0", "torch_dtype"), ("0.40.0", "dtype"), ("1.0", "dtype")])
def test_the_keyword_that_a_version_knows(monkeypatch, version, keyword):
    monkeypatch.setattr(diffusers, "__version__", version)
    assert dtype_keyword(torch.float16) == {keyword: torch.float16}
