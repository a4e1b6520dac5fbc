import gc
import sys
import time
import types
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.loading import machine
from helpers.memory import GIB, Budget, free, meter, plan


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells mapped files apart")
def test_meter_does_not_count_mapped_files(tmp_path):
    """Weights that stay in their file are no need of the process, and no plan counts them."""
    np.ones(200 * 2**20, dtype=np.uint8).tofile(tmp_path / "weights")
    with meter() as before:
        pass
    with meter() as used:
        assert np.memmap(tmp_path / "weights", np.uint8, "r").sum() == 200 * 2**20  # read, so it is resident
    assert abs(used.peak_ram_gib - before.peak_ram_gib) < 0.1


def test_meter_is_filled_when_the_block_raises():
    with pytest.raises(ZeroDivisionError), meter() as used:
        _ = 1 / 0
    assert used.seconds > 0 and used.peak_ram_gib > 0


class Circle:
    """Refers to itself, so that only the garbage collector finds it."""

    def __init__(self):
        self.itself = self


def test_free_collects_what_refers_to_itself():
    gc.disable()
    try:
        gone = weakref.ref(Circle())
        assert gone() is not None
        free()
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("device", "emptied"),
    [("cuda", ["empty_cache", "empty_host_cache"]), ("older cuda", ["empty_cache", "_host_emptyCache"]),
     ("mps", ["mps.empty_cache"]), ("cpu", [])],
)  # fmt: skip
def test_free_gives_the_gpus_memory_back(monkeypatch, device, emptied):
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device == "mps")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: calls.append("_host_emptyCache"), raising=False)
    public = None if device == "older cuda" else lambda: calls.append("empty_host_cache")
    monkeypatch.setattr(torch.accelerator, "empty_host_cache", public, raising=False)
    monkeypatch.setattr(torch.mps, "empty_cache", lambda: calls.append("mps.empty_cache"))
    free()
    assert calls == emptied


@pytest.mark.parametrize(
    ("limit", "free_gib"),
    [("max", None), (str(8 * GIB), 8 - 3 + 2), (str(2 * GIB), 1.0), (str(GIB // 2), 0.0), ("nonsense", None)],
)
def test_a_container_has_less_ram_than_the_machine(tmp_path, monkeypatch, limit, free_gib):
    """Three GiB are in use, of which two are pages of files that nobody looks at, and so as good as free."""
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{3 * GIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {GIB}\ninactive_file {2 * GIB}\nactive_file 0\n")
    machine_gib = 100.0
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: types.SimpleNamespace(available=machine_gib * GIB))
    assert Budget.detect().ram_gib == pytest.approx(machine_gib if free_gib is None else free_gib)


def test_a_package_that_was_just_installed_counts(tmp_path, monkeypatch):
    """As after a cell with pip, without a restart."""
    card = types.SimpleNamespace(total_memory=15 * GIB, major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.syspath_prepend(tmp_path)
    before = Budget.detect()
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").touch()
    after = Budget.detect()
    assert after.bitsandbytes and (before.device, before.capability) == ("cuda", (7, 5))
    if not before.bitsandbytes:
        assert plan("sd35-medium", replace(after, ram_gib=12.0)).name == "resident-nf4"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_meter_sees_the_gpu():
    with meter() as used:
        block = torch.ones(256 * 2**20, dtype=torch.uint8, device="cuda")
        del block
    assert used.peak_vram_gib * GIB >= 256 * 2**20
