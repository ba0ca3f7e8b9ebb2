"""Time and memory, measured fairly, and how they are written."""

import contextlib
import ctypes
import gc
import logging
import math
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

OURS, PEAK = "this package", "matrix product"


def stopwatch(step: Callable[[], object], device: torch.device, least: float = 0.1) -> Callable[[], float]:
    """A function that gives the seconds one step takes, over as many as take `least` seconds; warms up first."""

    def seconds(calls: int) -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(calls):
            step()
        synchronise(device)
        return (time.perf_counter() - start) / calls

    seconds(1)
    calls = math.ceil(least / seconds(1))
    return lambda: seconds(calls)


def synchronise(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    contestants: dict[str, Callable[[], float]], rounds: int, title: str | None, seed: int = 0
) -> dict[str, list[float]]:
    """Let each contestant measure its seconds once in every round, each round in another order.

    Args:
        contestants: By name, what measures.
        rounds: Their number.
        title: Of the progress bar; None for no bar.
        seed: Of the orders.
    """
    samples, order = {name: [] for name in contestants}, random.Random(seed)
    total = rounds * len(contestants)
    with tqdm(total=total, desc=title, unit="sample", delay=2, leave=False, disable=title is None) as bar:
        for _ in range(rounds):
            for name in order.sample(list(contestants), len(contestants)):
                samples[name].append(contestants[name]())
                bar.update()
    return samples


def faster(samples: dict[str, list[float]], name: str, other: str) -> float:
    """The speed of `name` over that of `other`: the median, over the rounds, of the ratio within a round."""
    return float(np.median(np.divide(samples[other], samples[name])))


def compare(samples: dict[str, list[float]]) -> dict[str, dict]:
    """Medians, spread and ratios of contestants whose samples with one index were taken in one round.

    Args:
        samples: Seconds by contestant; `OURS` and `PEAK` are no peers.

    Returns:
        For each contestant "seconds", the median; "spread", the interquartile range over the median; and, where there
        are peers, "vs_fastest_peer", its speed over that of the peer with the smallest median, and "ours_is", our
        speed over its own.
    """
    rivals = [name for name in samples if name not in (OURS, PEAK)]
    fastest = min(rivals, key=lambda name: np.median(samples[name]), default=None)
    rows = {}
    for name, values in samples.items():
        low, median, high = np.percentile(values, (25, 50, 75)).tolist()
        rows[name] = {"seconds": median, "spread": (high - low) / median, "samples": values}
        if fastest is not None and OURS in samples:
            rows[name]["vs_fastest_peer"] = faster(samples, name, fastest)
            rows[name]["ours_is"] = faster(samples, OURS, name)
    return rows


def lowest_and_highest(parts: list[dict[str, list[float]]], name: str, other: str) -> tuple[float, float]:
    """The range, over processes, of the speed of `name` over that of `other`.

    The true median lies outside the range of n processes in 2 ** (1 - n) of all cases, in 3 % for six; where the range
    holds 1, the two are not told apart.

    Args:
        parts: Of each process the seconds by contestant, as `interleave` gives them.
    """
    ratios = [faster(samples, name, other) for samples in parts]
    return min(ratios), max(ratios)


def matrix_product(device: torch.device, dtype: torch.dtype, n: int | None = None) -> tuple[Callable, int]:
    """A product of two large square matrices, and its floating-point operations: what the machine can do at most."""
    n = n or (8192 if device.type == "cuda" else 2048)
    a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * n**3


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def memory_now(kind: str = "RssAnon") -> int | None:
    """Bytes that this process itself filled ("RssAnon"), or with files mapped into memory too ("VmRSS").

    None where there is no /proc to ask: only Linux has one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), None)


def return_freed_memory():
    """Give back to the system what was freed (where the C library can)."""
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


class PeakMemory:
    """The most anonymous memory inside a `with`, in `.bytes`, beyond what the process had when this was made.

    It is looked up every millisecond or so; what is shorter can be missed.
    """

    def __init__(self):
        return_freed_memory()
        self._before = memory_now()

    def __enter__(self):
        return_freed_memory()
        self._samples, self._stop = [], threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self):
        while not self._stop.wait(0.001):
            self._samples.append(memory_now())

    def __exit__(self, *exception):
        self._samples.append(memory_now())
        self._stop.set()
        self._thread.join()
        self.bytes = None if self._before is None else max(self._samples) - self._before


def in_fresh_processes(jobs: list[tuple[Callable, tuple]], title: str, method: str = "fork") -> list:
    """What each function returns for its arguments, in a process that has imported everything and computed nothing.

    Args:
        jobs: Functions and their arguments.
        title: Of the progress bar.
        method: "fork", of a process that only imported; or "spawn", which takes seconds longer, for what uses a GPU.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_in_each, jobs, title, method).result()


def _in_each(jobs: list[tuple[Callable, tuple]], title: str, method: str) -> list:
    quietly = {"initializer": logging.disable, "initargs": (logging.WARNING,)}  # they would say the same each time
    with multiprocessing.get_context(method).Pool(1, maxtasksperchild=1, **quietly) as pool:
        jobs = tqdm(jobs, desc=title, unit="process", delay=2, leave=False)
        return [pool.apply(function, arguments) for function, arguments in jobs]


def together(processes: int, function: Callable, *arguments) -> list:
    """What a function returns in each of so many new processes, a group (gloo) if they are more than one.

    Raises:
        OSError: A process was ended from outside.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool,
    ):
        group = (processes, f"file://{folder}/meeting")
        jobs = [pool.submit(_as_member, rank, *group, function, arguments) for rank in range(processes)]
        try:
            return [job.result() for job in jobs]
        except BrokenProcessPool as error:
            raise OSError("a process was ended from outside, as happens where memory is short.") from error


def _as_member(rank: int, processes: int, meeting: str, function: Callable, arguments: tuple):
    if processes == 1:
        return function(*arguments)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        return function(*arguments)
    finally:
        torch.distributed.destroy_process_group()


def under_titles(rows: list[dict], cells: Callable[[dict], list[str]]) -> list[list[str] | str]:
    """The lines of a table: the cells of each row, and above those of a case its title."""
    cases = groupby(rows, key=lambda row: row["case"])
    return [line for title, members in cases for line in (title, *map(cells, members))]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.0f}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} x"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
