import time

import numpy as np
import pytest
import torch

from helpers.memory import GIB, Budget, free, meter


def test_budget_of_this_machine():
    budget = Budget.detect()
    assert budget.device in ("cuda", "mps", "cpu")
    assert 0 < budget.ram_gib < 10_000 and 0 <= budget.disk_gib
    assert (budget.vram_gib > 0) == (budget.device != "cpu")
    assert (budget.capability is not None) == (budget.device == "cuda")
    with pytest.raises(AttributeError):
        budget.device = "tpu"


def test_meter_sees_memory_that_is_gone_at_the_end():
    with meter() as before:
        pass
    with meter() as used:
        block = np.ones(200 * 2**20, dtype=np.uint8)  # written to, so it is resident
        time.sleep(0.1)
        del block
    assert used.peak_ram_gib > before.peak_ram_gib + 0.15
    assert 0.1 <= used.seconds < 30
    assert (used.peak_vram_gib > 0) == (torch.cuda.is_available() and torch.cuda.memory_allocated() > 0)


def test_meter_is_filled_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), meter() as used:
        _ = 1 / 0
    assert used.seconds > 0 and used.peak_ram_gib > 0


def test_free_is_safe_anywhere():
    free()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_meter_sees_the_gpu():
    with meter() as used:
        block = torch.ones(256 * 2**20, dtype=torch.uint8, device="cuda")
        del block
    assert used.peak_vram_gib * GIB >= 256 * 2**20
