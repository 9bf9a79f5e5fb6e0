"""The logits of K classes of each row, and of all others together: see ops/top_k.py."""

from typing import Any, NamedTuple

import torch


class Ops(NamedTuple):
    """One implementation of the ops of the schedule."""

    fwd: Any
    bwd: Any


NAMES = ("complement_fwd", "complement_bwd")
OPS: dict[str, Ops] = {}  # by namespace


def _fake(*_):
    """The ops write into what they are given, and return nothing."""


def use_namespace(namespace: str) -> None:
    """Makes the ops of a namespace, which _library has defined, known here."""
    for name in NAMES:
        torch.library.register_fake(f"{namespace}::{name}", _fake)
    OPS[namespace] = Ops(*(getattr(getattr(torch.ops, namespace), name).default for name in NAMES))


use_namespace("fastkd")
