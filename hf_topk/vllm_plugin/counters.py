"""Prometheus counters of the head's calls, beside vLLM's own at `/metrics`."""

import atexit
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.mmap_dict import MmapedDict, mmap_key
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ..model.head import TopKExpertsHead

# Environment variables with the folder in which the processes of a server store counters: vLLM's own, and ours.
FOLDER_OF_VLLM, FOLDER = "PROMETHEUS_MULTIPROC_DIR", "HF_TOPK_COUNTERS_DIR"
HELP = {
    "hf_topk:sparse_steps": "Calls of the head that ran sparse.",
    "hf_topk:dense_steps": "Calls of the head that ran dense.",
    "hf_topk:rows_read": "Rows of the head that were multiplied, with those of the always-on tokens.",
}
KEYS = {name: mmap_key(name, f"{name}_total", [], [], text) for name, text in HELP.items()}


class CountersOfWorkers(Collector):
    """Collects the counters of worker processes in the process that serves `/metrics`."""

    def __init__(self, folder: Path) -> None:
        """Collect the counters in a folder, which may not exist yet."""
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        """All counters, summed over processes."""
        yield from MultiProcessCollector.merge([str(file) for file in self.folder.glob("*.db")])


def offer_counters() -> None:
    """Serve the counters in this process, and have the processes that it starts write theirs to the same folder.

    If vLLM itself has such a folder, it serves these counters as well.
    """
    if FOLDER_OF_VLLM in os.environ:
        return
    if FOLDER not in os.environ:
        folder = Path(tempfile.gettempdir(), f"hf_topk-{uuid.uuid4().hex}")
        os.environ[FOLDER] = str(folder)
        atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    _serve(Path(os.environ[FOLDER]))


@cache
def _serve(folder: Path) -> None:
    REGISTRY.register(CountersOfWorkers(folder))


class StepCounters:
    """Counts the calls of a head, in the format of Prometheus' client for several processes.

    Attributes:
        counts: by name.
    """

    def __init__(self, head: TopKExpertsHead, *, is_counting: bool) -> None:
        """Start at zero.

        Args:
            head: whose calls are counted.
            is_counting: whether this process counts: one of those that share the head.
        """
        self.head, self.is_counting = head, is_counting
        self.counts = dict.fromkeys(HELP, 0)
        self._file: MmapedDict | None = None

    def count(self, positions: int, is_sparse: bool) -> None:
        """Count a call.

        Args:
            positions: N.
            is_sparse: whether it ran sparse.
        """
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
