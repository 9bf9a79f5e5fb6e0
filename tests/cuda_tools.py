"""What the tests of the CUDA sources need of NVIDIA's tools: where they are, or why a test is skipped."""

import os
import sysconfig
from pathlib import Path

import pytest


def cuda_include():
    """The folder of CUDA's host headers, or None."""
    roots = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", *pip_roots()]
    for root in filter(None, roots):
        include = Path(root) / "include"
        if (include / "cuda_runtime_api.h").is_file() and (include / "cuda_bf16.h").is_file():
            return include
    return None


def pip_roots():
    """Where the packages nvidia-cuda-nvcc, -runtime, -crt and -cccl install to."""
    return [Path(sysconfig.get_path(name)) / "nvidia" / "cu13" for name in ("purelib", "platlib")]


def missing(what):
    """Skips the test; where the tools are promised to be there, as in CI, it fails."""
    if os.environ.get("FASTKD_REQUIRE_CUDA_TOOLS") == "1":
        pytest.fail(f"FASTKD_REQUIRE_CUDA_TOOLS=1, but there is no {what}")
    pytest.skip(f"no {what}")


def require_cuda_include():
    include = cuda_include()
    if include is None:
        missing("CUDA headers in $CUDA_HOME, /usr/local/cuda or site-packages/nvidia/cu13")
    return include
