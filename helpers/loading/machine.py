"""What this machine has: memory, disk, network; and how memory is given back."""

import gc
import importlib
import importlib.util
import shutil
import threading
import traceback
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

GIB = 2**30
ANSWER_S = 3.0  # seconds that the Hub has to answer at all
CGROUP = Path("/sys/fs/cgroup")  # where Linux says what a container may use


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
            importlib.invalidate_caches()  # a package that a cell has just installed counts, without a restart
            four_bits = importlib.util.find_spec("bitsandbytes") is not None
            return cls("cuda", card.total_memory / GIB, ram, (card.major, card.minor), disk, four_bits)
        if torch.backends.mps.is_available():
            return cls("mps", torch.mps.recommended_max_memory() / GIB, ram, None, disk)
        return cls("cpu", 0.0, ram, None, disk)


def free() -> None:
    """Give back what nothing refers to any more. `del pipe` first: a living variable keeps its memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        # Pinned RAM, which group offloading takes and PyTorch would keep; older PyTorch has a private name only.
        (getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache)()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


@contextmanager
def letting_go() -> Iterator[None]:
    """If the block raises, empty the frames that the error came through, whatever it is: an interrupt too.

    A notebook keeps the latest traceback, and with it every local variable on the way: half a network, or latents.
    """
    try:
        yield
    except BaseException as error:
        seen, one = set(), error
        while one is not None and id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)  # frames that still run are left alone
            one = one.__cause__ or one.__context__
        raise


class Hub:
    """Whether the Hub answers. The first "no" is remembered, for those who can do without."""

    def __init__(self):
        self._answered: dict[str, bool] = {}  # by address

    def answers(self, again: bool = False) -> bool:
        """One try of at most ANSWER_S seconds; after a "no" only `again` tries once more. Any answer counts."""
        from huggingface_hub import constants

        address = constants.ENDPOINT
        if constants.HF_HUB_OFFLINE:
            return False
        if again or address not in self._answered:
            self._answered[address] = _answers(address)
        return self._answered[address]


HUB = Hub()


def _answers(address: str) -> bool:
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=ANSWER_S).close()
        except urllib.error.HTTPError:
            pass  # a refusal is an answer
        except urllib.error.URLError as error:
            if "SSL" not in str(error.reason):  # the Hub client may know certificates that Python does not
                return
        except (OSError, ValueError):
            return
        answered.set()

    # In a thread, since looking up a name has no limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_S)
    return answered.is_set()


def _free_ram() -> int:
    """Bytes free on the machine or left in the container's own limit (cgroup 2), whichever is less."""
    available = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return available
        used = int((CGROUP / "memory.current").read_text())
        # Pages of files that were read are counted as used, and given back whenever something needs the room.
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        left = int(limit) - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):
        return available
    return min(available, max(0, left))


def _free_disk() -> int:
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    while not folder.exists():  # the cache is made by the first download
        folder = folder.parent
    return shutil.disk_usage(folder).free
