"""The ops of a schedule in each namespace that has an implementation of them."""

from collections.abc import Callable
from typing import TypeVar

import torch

Ops = TypeVar("Ops")


def _fake(*_):
    """The ops write into what they are given, and return nothing."""


def ops_of(namespace: str, kind: Callable[..., Ops], names: tuple[str, ...]) -> Ops:
    """Of a namespace that _library has defined; torch.compile is told what they return."""
    for name in names:
        torch.library.register_fake(f"{namespace}::{name}", _fake)
    return kind(*(getattr(getattr(torch.ops, namespace), name).default for name in names))
