"""What this machine has, and what a piece of work used of it. One GiB is 2**30 bytes."""

import gc
import importlib.util
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from helpers.plan import GIB as GIB
from helpers.plan import DoesNotFit as DoesNotFit
from helpers.plan import Plan as Plan
from helpers.plan import plan as plan


@dataclass(frozen=True)
class Budget:
    """What there is to spend: free right now, except `vram_gib`, which is the whole card."""

    device: str  # "cuda", "mps" or "cpu"
    vram_gib: float  # 0 on a CPU; on Apple silicon what the GPU may take of the shared memory
    ram_gib: float
    capability: tuple[int, int] | None  # CUDA compute capability, (7, 5) on a T4
    disk_gib: float  # where downloads go
    bitsandbytes: bool = False  # is installed, for weights in four bits

    @classmethod
    def detect(cls) -> "Budget":
        """Measure this machine."""
        ram = _free_ram() / GIB
        disk = _free_disk() / GIB
        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            four_bits = importlib.util.find_spec("bitsandbytes") is not None
            return cls("cuda", card.total_memory / GIB, ram, (card.major, card.minor), disk, four_bits)
        if torch.backends.mps.is_available():
            return cls("mps", torch.mps.recommended_max_memory() / GIB, ram, None, disk)
        return cls("cpu", 0.0, ram, None, disk)


@dataclass
class Usage:
    """Filled when the block of `meter()` ends."""

    seconds: float = 0.0
    peak_vram_gib: float = 0.0  # of PyTorch's tensors on the GPU; 0 without CUDA
    peak_ram_gib: float = 0.0  # resident memory of this process


@contextmanager
def meter() -> Iterator[Usage]:
    """Measure a block: `with meter() as used: ...`, then read `used.seconds` and the peaks, even if the block raised.

    RAM is sampled every 20 ms, since the operating system keeps no peak that can be reset.
    """
    usage, process, done = Usage(), psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            peak = max(peak, process.memory_info().rss)

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
        usage.peak_ram_gib = max(peak, process.memory_info().rss) / GIB


def free() -> None:
    """Give back what nothing refers to any more. `del pipe` first: a living variable keeps its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._C._host_emptyCache()  # pinned RAM, which group offloading takes and PyTorch would keep
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _free_ram() -> int:
    """Bytes free on the machine or left in the container's own limit (cgroup 2), whichever is less."""
    available = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):
        return available
    return available if limit == "max" else min(available, max(0, int(limit) - used))


def _free_disk() -> int:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():  # the cache is made by the first download
        folder = folder.parent
    return shutil.disk_usage(folder).free
