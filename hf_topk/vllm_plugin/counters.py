"""Counters beside vLLM's own at `/metrics`: how the head ran."""

import atexit
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ..model.head import TopKExpertsHead

# The folder through which processes of one server pass counters on, by the name that vLLM's own has and by ours.
FOLDER_OF_VLLM, FOLDER = "PROMETHEUS_MULTIPROC_DIR", "HF_TOPK_COUNTERS_DIR"
HELP = {
    "hf_topk:sparse_steps": "Calls of the head that ran sparse.",
    "hf_topk:dense_steps": "Calls of the head that ran dense.",
    "hf_topk:rows_read": "Rows of the head that were multiplied, the always-on tokens' among them.",
}
KEYS = {name: mmap_key(name, f"{name}_total", [], [], text) for name, text in HELP.items()}


class CountersOfWorkers(Collector):
    """Shows what worker processes have counted in the process that answers to Prometheus."""

    def __init__(self, folder: Path) -> None:
        """Show the counters in a folder, which may not exist yet."""
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        """All counters, summed over processes."""
        yield from MultiProcessCollector.merge([str(file) for file in self.folder.glob("*.db")])


def offer_counters() -> None:
    """Show workers' counters in this process, if it is the one that starts the others, which inherit the folder's name.

    Where vLLM itself passes counters on through a folder, it shows these as well.
    """
    if FOLDER_OF_VLLM in os.environ or FOLDER in os.environ:
        return
    folder = Path(tempfile.gettempdir(), f"hf_topk-{uuid.uuid4().hex}")
    os.environ[FOLDER] = str(folder)
    atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    REGISTRY.register(CountersOfWorkers(folder))


class StepCounters:
    """Counts how a head ran, in the format of Prometheus' client for several processes.

    Attributes:
        counts: by name.
    """

    def __init__(self, head: TopKExpertsHead, *, is_counting: bool) -> None:
        """Count for a head, in one process of those that share it."""
        self.head, self.is_counting = head, is_counting
        self.counts = dict.fromkeys(HELP, 0)
        self._file: MmapedDict | None = None

    def count(self, positions: int, is_sparse: bool) -> None:
        """Count a call on so many positions."""
        if not self.is_counting:
            return
        head = self.head
        picked = head.num_experts_per_tok * head.expert_size
        rows = head.num_always_on + (min(head.num_rescored, picked) if head.screens else picked)
        self.counts["hf_topk:sparse_steps" if is_sparse else "hf_topk:dense_steps"] += 1
        self.counts["hf_topk:rows_read"] += positions * rows if is_sparse else head.out_features
        self._file = self._file or _open_file()
        for name, count in self.counts.items():
            self._file.write_value(KEYS[name], count, time.time())


def _open_file() -> MmapedDict:
    folder = Path(os.environ.get(FOLDER_OF_VLLM) or os.environ[FOLDER])
    folder.mkdir(mode=0o700, exist_ok=True)
    return MmapedDict(str(folder / f"counter_hf_topk_{os.getpid()}_{uuid.uuid4().hex}.db"))
