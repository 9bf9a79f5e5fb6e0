"""The logits of K classes of each row, and of all others together: see ops/top_k.py."""

from typing import Any, NamedTuple

from ._namespaces import ops_of


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    bwd: Any


NAMES = ("complement_fwd", "complement_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    OPS[namespace] = ops_of(namespace, Ops, NAMES)


use_namespace("fastkd")
