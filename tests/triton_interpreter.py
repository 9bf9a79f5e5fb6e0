"""Makes Triton's interpreter fit for tests. To be imported before any kernel, wherever kernels run on CPU tensors.

As it comes, the interpreter is silently wrong: it truncates float32 to bfloat16, takes the bits of a
float64 for a bfloat16, multiplies bfloat16 in tl.dot as bits, and reads and writes past the end of
tensors. It has no driver, which autotune asks for. It wraps all of triton.language anew for every
launch and every call of a function, which takes longer than most kernels. Of each tensor it makes a shape,
a type and their names anew, and it looks for overflow in a dozen steps, which it then ignores: most of the time
that kernels take. And it passes on NumPy's warnings about NaN and infinity, which a GPU does not have.

All of that is mended in private classes of Triton, so only versions that were looked at are accepted.
"""

import os
import warnings

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
import triton
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

KNOWN = ("3.6.0", "3.7.0", "3.7.1", "3.9.0")

if triton.__version__.partition("+")[0] not in KNOWN:
    raise RuntimeError(
        f"tests/triton_interpreter.py mends the interpreter of Triton {', '.join(KNOWN)}, not that of "
        f"{triton.__version__}: compare triton/runtime/interpreter.py, then add the version to KNOWN"
    )

_Builder = interpreter.InterpreterBuilder
_original_convert, _original_cast = interpreter._convert_float, _Builder.cast_impl
_original_dot, _original_patch = _Builder.create_dot, interpreter._patch_lang
_original_load, _original_store = _Builder.create_masked_load, _Builder.create_masked_store
_original_atomic = _Builder.create_atomic_rmw
_original_arguments = interpreter.GridExecutor._init_args_hst
_original_launch = interpreter.GridExecutor.__call__
_original_broadcast = TritonSemantic.broadcast_impl_value
_original_numpy_type = interpreter._get_np_dtype
_original_tensor = tl.core.tensor.__init__


def _to_float32(bits):
    """bfloat16, as uint16, to float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _to_bfloat16(x):
    """float32 to bfloat16, as uint16: to the nearest, ties to even."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded).reshape(np.shape(x))


def _convert_float(x, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16 and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
        return _to_bfloat16(x)
    if source == tl.bfloat16 and target == tl.float32:
        return _to_float32(x).view(np.uint32).reshape(x.shape)
    return _original_convert(x, source, target, rounding)


def _cast(self, source, target):
    if target.scalar == tl.bfloat16 and source.dtype.scalar in (tl.float16, tl.float64):
        source = _original_cast(self, source, tl.float32)
    return _original_cast(self, source, target)


def _dot(self, a, b, accumulator, *options):
    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle(_to_float32(x.data), tl.float32)

    return _original_dot(self, widened(a), widened(b), accumulator, *options)


class _Bounds:
    """Where the tensors of the current launch begin and end, sorted."""

    starts = ends = np.empty(0, np.uint64)

    @classmethod
    def of_launch(cls, tensors):
        ranges = sorted({_range(x) for x in _flat(tensors) if isinstance(x, torch.Tensor) and x.numel()})
        cls.starts, cls.ends = np.array(ranges, np.uint64).reshape(-1, 2).T

    @classmethod
    def check(cls, what, pointers, mask):
        used = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[used].astype(np.uint64)
        if not addresses.size:
            return
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8 or 1)
        tensor = np.searchsorted(cls.starts, addresses, side="right") - 1
        outside = (tensor < 0) | (addresses + size > cls.ends[np.maximum(tensor, 0)])
        if outside.any():
            raise IndexError(f"{what} out of bounds: {outside.sum()} of {addresses.size} addresses are in no tensor")
        if (addresses % size).any():
            raise IndexError(f"{what} misaligned")


def _flat(arguments):
    """Tensors may be in tuples."""
    for x in arguments:
        if isinstance(x, tuple):
            yield from _flat(x)
        else:
            yield x


def _range(x):
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _load(self, pointers, mask, *options):
    _Bounds.check("load", pointers, mask)
    return _original_load(self, pointers, mask, *options)


def _store(self, pointers, value, mask, *options):
    _Bounds.check("store", pointers, mask)
    return _original_store(self, pointers, value, mask, *options)


def _atomic(self, operation, pointers, value, mask, *options):
    _Bounds.check("atomic", pointers, mask)
    return _original_atomic(self, operation, pointers, value, mask, *options)


def _arguments(self, positional, named):
    on_host = _original_arguments(self, positional, named)
    _Bounds.of_launch([*on_host[0], *on_host[1].values()])
    return on_host


def _launch(self, *positional, **named):
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning)
        return _original_launch(self, *positional, **named)


def _broadcast(self, a, b):
    if a.type.is_block() and b.type.is_block() and a.handle.data.shape == b.handle.data.shape:
        return a, b
    return _original_broadcast(self, a, b)


def _overflow(self, a, b, operation):
    """Nothing looks at what it finds but with debug=True, which no kernel here is launched with."""


# What is the same for all tensors of a shape or a type is made once.
_shapes, _sizes, _numpy_types = {}, {}, {}


def _tensor(self, handle, type_):
    shape = type_.shape if type_.is_block() else ()
    if shape not in _shapes:
        _original_tensor(self, handle, type_)
        _shapes[shape] = self.shape, self.numel
    self.handle, self.type, self.dtype = handle, type_, type_.scalar
    self.shape, self.numel = _shapes[shape]


def _block_type(self, element_ty, shape):
    """Without a name, which nothing but messages asks for: below."""
    shape = tuple(x.value if isinstance(x, tl.constexpr) else x for x in shape)
    if not shape:
        raise TypeError("0d block_type is forbidden")
    if shape not in _sizes:
        _sizes[shape] = validate_block_shape(shape)
    self.element_ty, self.shape, self.numel = element_ty, shape, _sizes[shape]


def _numpy_type(type_):
    scalar = type_.scalar
    if scalar.is_ptr():
        return np.dtype(np.uint64)
    if scalar.name not in _numpy_types:
        _numpy_types[scalar.name] = _original_numpy_type(scalar)
    return _numpy_types[scalar.name]


class _Once:
    """Wraps what a function sees of triton.language, for good."""

    seen = set()  # noqa: RUF012

    @classmethod
    def patch(cls, function):
        visible = tuple(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)
        if visible not in cls.seen:
            cls.seen.add(visible)
            _original_patch(function)
            tl.core.tensor.__index__ = lambda x: int(x.handle.data.item())  # NumPy 2.4 refuses what 3.6.0 does
        return cls

    @staticmethod
    def restore():
        pass


class _Driver:
    """Stands in for a GPU's: autotune takes the first configuration."""

    def get_benchmarker(self):
        def benchmark(call, quantiles=None):
            call()
            return [1.0, 1.0, 1.0]

        return benchmark

    def get_current_target(self):
        return triton.backends.compiler.GPUTarget("cuda", 90, 32)


interpreter._convert_float, interpreter._patch_lang = _convert_float, _Once.patch
_Builder.cast_impl, _Builder.create_dot = _cast, _dot
_Builder.create_masked_load, _Builder.create_masked_store, _Builder.create_atomic_rmw = _load, _store, _atomic
interpreter.GridExecutor._init_args_hst, interpreter.GridExecutor.__call__ = _arguments, _launch
TritonSemantic.broadcast_impl_value, TritonSemantic.binary_op_sanitize_overflow_impl = _broadcast, _overflow
tl.core.tensor.__init__, tl.core.block_type.__init__ = _tensor, _block_type
tl.core.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
interpreter._get_np_dtype = _numpy_type
triton.runtime.driver.set_active(_Driver())
