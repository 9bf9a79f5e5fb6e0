"""``python -m fastkd``: what was built, and what will be used."""

import platform
import sys

import torch

from . import __version__, _backend, _library


def lines():
    yield "fastkd", __version__
    yield "torch", torch.__version__
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    for name in _backend.NAMES:
        yield f"backend {name}", _backend.unavailable(name) or "ready"
    if not _library.cpu_missing:
        yield "instruction set", torch.ops.fastkd.cpu_isa("?")
    yield "threads", str(torch.get_num_threads())
    chosen = _backend._chosen
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        yield f"{device} tensors use", f"{chosen} (FASTKD_BACKEND)" if chosen else _backend.automatic(device)


def main():
    rows = list(lines())
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
