"""Times providers side by side: interleaved in one run, fresh inputs, medians; and peak memory."""

import contextlib
import ctypes
import datetime
import gc
import importlib.util
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastkd

from .peers import versions

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
LEAD_CYCLES = 1_000_000  # of the GPU's clock, about half a millisecond


@dataclass
class Provider:
    """Something that can be timed: ``call(*prepare())``; only the call is on the clock."""

    name: str
    prepare: Any
    call: Any
    answer: Any = None  # () -> loss and gradient (or None), to be held against the truth
    seconds: list = field(default_factory=list)

    def summary(self, first):
        """Its times, and how many times as long it took as the first provider in the same round."""
        quartiles = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return {
            "median_s": quartiles[1],
            "quartiles_s": [quartiles[0], quartiles[2]],
            "ratio": spread([mine / other for mine, other in zip(self.seconds, first.seconds, strict=True)]),
            "rounds": len(self.seconds),
        }


def spread(values):
    """Median, and between which values nine in ten lie: the 5th and the 95th percentile."""
    twentieths = statistics.quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return {"median": statistics.median(values), "low": twentieths[0], "high": twentieths[-1]}


class Processor:
    """The CPU: time and memory as the process sees them."""

    def time_once(self, provider, repeat):
        # As in a training loop: the step before was one like this. Memory that lay free while
        # another provider ran may have gone back to the system, or to the host of a virtual
        # machine, and to fetch it again took three times as long as the loss.
        provider.call(*provider.prepare())
        arguments = [provider.prepare() for _ in range(repeat)]
        start = time.perf_counter()
        for a in arguments:
            provider.call(*a)
        provider.seconds.append((time.perf_counter() - start) / repeat)

    def peak_extra_bytes(self, provider):
        """How far the process's resident memory rises above where it was, during one call; None where
        the system does not tell."""
        try:
            arguments = provider.prepare()
            gc.collect()
            with contextlib.suppress(AttributeError):  # where the C library is not glibc
                # what lies free goes back to the system: what is taken again is seen
                ctypes.CDLL(None).malloc_trim(0)
            CLEAR.write_text("5")  # the high-water mark starts again from here
            before = _resident("VmRSS")
            provider.call(*arguments)
            return max(_resident("VmHWM") - before, 0)
        except OSError:
            return None


class Gpu:
    """A GPU: time between two events of its stream, memory as torch's allocator counts it."""

    def time_once(self, provider, repeat):
        provider.call(*provider.prepare())
        arguments = [provider.prepare() for _ in range(repeat)]
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if repeat == 1:
            # In training the host runs ahead of the GPU: the launches are queued before they are
            # due. What is so small that it is timed in series is bound by the host, and shown so.
            torch.cuda._sleep(LEAD_CYCLES)
        start.record()
        for a in arguments:
            provider.call(*a)
        stop.record()
        torch.cuda.synchronize()
        provider.seconds.append(start.elapsed_time(stop) / 1e3 / repeat)

    def peak_extra_bytes(self, provider):
        arguments = provider.prepare()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        provider.call(*arguments)
        return torch.cuda.max_memory_allocated() - before


CLOCKS = {"cpu": Processor(), "cuda": Gpu()}


def _resident(key):
    for line in STATUS.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")


def interleave(benchmark, providers, rounds, repeat, device):
    """Times all providers in turn, round by round. pytest-benchmark's own clock is on the first."""
    clock = CLOCKS[device]
    first, *others = providers
    for provider in providers:  # warm-up: compilation, thread pools, scratch memory
        provider.call(*provider.prepare())
        provider.call(*provider.prepare())
    peaks = {provider.name: clock.peak_extra_bytes(provider) for provider in providers}

    def one_round():
        for provider in others:
            clock.time_once(provider, repeat)

    benchmark.pedantic(clock.time_once, args=(first, repeat), setup=one_round, rounds=rounds, iterations=1)
    return {p.name: {**p.summary(first), "peak_extra_bytes": peaks[p.name]} for p in providers}


def _output(*command):
    """What a command prints; None where it cannot be run."""
    if not shutil.which(command[0]):
        return None
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return run.stdout.strip() if run.returncode == 0 else None


def _sources():
    """None where git does not tell."""
    status = _output("git", "status", "--porcelain", "--", ":/", ":(exclude,top)bench/results")
    return {"commit": _output("git", "rev-parse", "HEAD"), "clean": None if status is None else not status}


def _gpu():
    properties = torch.cuda.get_device_properties(0)
    version = None
    if importlib.util.find_spec("triton"):
        import triton

        version = triton.__version__
    drivers = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size / 2**20,
        "driver": drivers.splitlines()[0] if drivers else None,
        "cuda": torch.version.cuda,
        "triton": version,
    }


def machine(device):
    """What a figure depends on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    isa = {} if fastkd._library.cpu_missing else {"instruction_set": torch.ops.fastkd.cpu_isa("?")}
    return {
        "device": device,
        **(_gpu() if device == "cuda" else {}),
        "cpu": model,
        "threads": torch.get_num_threads(),
        **isa,
        "torch": torch.__version__,
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
        "peers": versions(),
        "date": datetime.date.today().isoformat(),
        **_sources(),
    }
