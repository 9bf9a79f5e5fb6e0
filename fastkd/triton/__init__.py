"""The schedules in Triton: kernels for NVIDIA and AMD, behind ops of a namespace of their own."""

from .. import _library

NAMESPACE = "fastkd_triton"


def register() -> None:
    """Defines the ops, for tensors on GPUs; for the interpreter, which has those of the CPU, as well."""
    from .. import ops
    from . import (
        angles,
        attention,
        complement,
        dist,
        features,
        head,
        pairs,
        pkt,
        rows,
        rows_phases,
        scale,
        standardize,
        triplet,
    )

    schedules = (
        rows,
        rows_phases,
        head,
        standardize,
        complement,
        dist,
        pairs,
        angles,
        pkt,
        triplet,
        features,
        attention,
        scale,
    )
    implementations = {name: getattr(next(s for s in schedules if hasattr(s, name)), name) for name in ops.NAMES}
    library = _library.define(NAMESPACE)
    for key in ("CUDA", "CPU"):
        for name, implementation in implementations.items():
            library.impl(name, implementation, key)
    ops.use_namespace(NAMESPACE)
