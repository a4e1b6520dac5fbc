"""What a piece of work used of this machine, and the face of `helpers.loading` for plans. One GiB is 2**30 bytes."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

from helpers.loading.machine import GIB as GIB
from helpers.loading.machine import Budget as Budget
from helpers.loading.machine import free as free
from helpers.loading.plan import CONTEXT_GIB as CONTEXT_GIB
from helpers.loading.plan import WITHOUT_T5 as WITHOUT_T5
from helpers.loading.plan import DoesNotFit as DoesNotFit
from helpers.loading.plan import Plan as Plan
from helpers.loading.plan import plan as plan
from helpers.loading.plan import plans as plans


@dataclass
class Usage:
    """Filled when the block of `meter()` ends."""

    seconds: float = 0.0
    peak_vram_gib: float = 0.0  # of PyTorch's tensors on the GPU; 0 without CUDA
    peak_ram_gib: float = 0.0  # of this process, as plans count it: without the files that are mapped into it


@contextmanager
def meter() -> Iterator[Usage]:
    """Measure a block: `with meter() as used: ...`, then read `used.seconds` and the peaks, even if the block raised.

    RAM is sampled every 20 ms, since the operating system keeps no peak that can be reset.
    """
    usage, process, done = Usage(), psutil.Process(), threading.Event()
    peak = _own_ram(process)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, _own_ram(process))

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    try:
        yield usage
    finally:
        if cuda:
            torch.cuda.synchronize()  # kernels run on after Python has moved on
            usage.peak_vram_gib = torch.cuda.max_memory_allocated() / GIB
        usage.seconds = time.perf_counter() - start
        done.set()
        thread.join()
        usage.peak_ram_gib = max(peak, _own_ram(process)) / GIB


def _own_ram(process: psutil.Process) -> int:
    """Resident bytes less those of mapped files, which the system drops when it needs room; only Linux tells them."""
    info = process.memory_info()
    return info.rss - getattr(info, "shared", 0)
