"""Benchmarks: one file per schedule, every provider in the same run. ``python -m bench --help``."""

import os

# torch.compile's helper processes load torch while the first cases run, on the same cores, and
# every parallel operation of eager PyTorch then waits for them: 12 ms instead of 30 µs.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
