"""Kernels for the GPU, given CPU tensors: so that every test runs them as it runs the others.

cusim: the CUDA kernels as host code. gpu: on the GPU, to which an op's tensors are copied as they
lie, strides, offset and all, and its results back.
"""

import contextlib
import functools
import unittest.mock

import torch

from fastkd import _backend, _library, ops
from fastkd.ops import numbers

CUSIM = _library.FOLDER / "_cusim.so"


@functools.cache
def _define(name, which):
    """The namespace of the ops that a backend shall use."""
    namespace = f"fastkd_{name}_{which}" if which == "gpu" else "fastkd_cusim"
    library = _library.define(namespace)
    if which == "cusim":
        torch.ops.load_library(CUSIM)
    else:
        real = _backend.namespace(name)
        for op in ops.NAMES:
            library.impl(op, functools.partial(_on_gpu, getattr(getattr(torch.ops, real), op).default), "CPU")
    ops.use_namespace(namespace)
    return namespace


def _there(x):
    """The same tensor on the GPU: its whole storage, so that it lies as it does here."""
    if isinstance(x, list | tuple):
        return [_there(y) for y in x]
    if not isinstance(x, torch.Tensor):
        return x
    storage = x.untyped_storage().cuda()
    return torch.empty(0, dtype=x.dtype, device="cuda").set_(storage, x.storage_offset(), x.shape, x.stride())


def _back(x):
    if isinstance(x, list | tuple):
        return type(x)(_back(y) for y in x)
    return x if x is None else x.cpu()


def _on_gpu(op, *arguments):
    given = zip(op._schema.arguments, arguments, strict=False)  # defaults may be left out
    there = [x if of.name in numbers.NAMES else _there(x) for of, x in given]
    results = op(*there)
    for of, here, changed in zip(op._schema.arguments, arguments, there, strict=False):
        if of.alias_info is None or not of.alias_info.is_write or here is None:
            continue
        pairs = zip(here, changed, strict=True) if isinstance(here, list) else [(here, changed)]
        for x, y in pairs:
            x.copy_(y)
    return _back(results)


@contextlib.contextmanager
def in_place_of(name, which):
    """Lets a backend compute CPU tensors by other ops."""
    namespace, real = _define(name, which), _backend.namespace
    with unittest.mock.patch.multiple(
        _backend,
        namespace=lambda asked: namespace if asked == name else real(asked),
        serves=lambda *_: True,
        unavailable=lambda _: "",
    ):
        yield
