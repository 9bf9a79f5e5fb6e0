"""Benchmarks: one file per schedule, every provider in the same run. ``python -m bench --help``."""
