"""Times providers side by side: interleaved in one run, fresh inputs, medians; and peak memory."""

import gc
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastkd

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Provider:
    """Something that can be timed: ``call(*prepare())``; only the call is on the clock."""

    name: str
    prepare: Any
    call: Any
    seconds: list = field(default_factory=list)

    def time_once(self, repeat):
        # As in a training loop: the step before was one like this. Memory that lay free while
        # another provider ran may have gone back to the system, or to the host of a virtual
        # machine, and to fetch it again took three times as long as the loss.
        self.call(*self.prepare())
        arguments = [self.prepare() for _ in range(repeat)]
        start = time.perf_counter()
        for a in arguments:
            self.call(*a)
        self.seconds.append((time.perf_counter() - start) / repeat)

    def summary(self):
        quartiles = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        return {"median_s": quartiles[1], "quartiles_s": [quartiles[0], quartiles[2]], "rounds": len(self.seconds)}


def _resident(key):
    for line in STATUS.read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")


def peak_extra_bytes(provider):
    """How far the process's resident memory rises above where it was, during one call; None where
    the system does not tell."""
    try:
        arguments = provider.prepare()
        gc.collect()
        CLEAR.write_text("5")  # the high-water mark starts again from here
        before = _resident("VmRSS")
        provider.call(*arguments)
        return max(_resident("VmHWM") - before, 0)
    except OSError:
        return None


def interleave(benchmark, providers, rounds, repeat):
    """Times all providers in turn, round by round. pytest-benchmark's own clock is on the first."""
    first, *others = providers
    for provider in providers:  # warm-up: compilation, thread pools, scratch memory
        provider.call(*provider.prepare())
        provider.call(*provider.prepare())
    peaks = {provider.name: peak_extra_bytes(provider) for provider in providers}

    def one_round():
        for provider in others:
            provider.time_once(repeat)

    benchmark.pedantic(first.time_once, args=(repeat,), setup=one_round, rounds=rounds, iterations=1)
    return {p.name: {**p.summary(), "peak_extra_bytes": peaks[p.name]} for p in providers}


def machine():
    """What a figure depends on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "threads": torch.get_num_threads(),
        "instruction_set": torch.ops.fastkd.cpu_isa("?"),
        "torch": torch.__version__,
        "fastkd": fastkd.__version__,
        "python": platform.python_version(),
    }
