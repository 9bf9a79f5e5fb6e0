"""The schedules in Triton: kernels for NVIDIA and AMD, behind ops of a namespace of their own."""

from .. import _library

NAMESPACE = "fastkd_triton"


def register():
    """Defines the ops, for tensors on GPUs; for the interpreter, which has those of the CPU, as well."""
    from ..ops import relations
    from ..ops import rows as schedule
    from . import pairs, rows, triples

    implementations = {name: getattr(rows, name) for name in schedule.NAMES}
    implementations |= {"pairs_fwd": pairs.pairs_fwd, "triples_fwd": triples.triples_fwd}
    library = _library.define(NAMESPACE)
    for key in ("CUDA", "CPU"):
        for name, implementation in implementations.items():
            library.impl(name, implementation, key)
    schedule.use_namespace(NAMESPACE)
    relations.use_namespace(NAMESPACE)
