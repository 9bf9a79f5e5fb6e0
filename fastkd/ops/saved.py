"""What autograd keeps of a call for its backward, by the names of the call's fields."""

from typing import Any

import torch


def is_inference(x: Any) -> bool:
    """Whether autograd refuses to watch over a tensor: those that were made in inference mode cannot be saved."""
    return isinstance(x, torch.Tensor) and not torch.compiler.is_compiling() and x.is_inference()


def save(ctx: Any, call: tuple[Any, ...], *others: torch.Tensor) -> None:
    """Keeps a call, and other tensors. Autograd sees to it that nobody overwrites its tensors before backward."""
    watched = [x if isinstance(x, torch.Tensor) and not is_inference(x) else None for x in call]
    ctx.save_for_backward(*watched, *others)
    ctx.rest = tuple(None if kept is not None else x for x, kept in zip(call, watched, strict=True))


def restored(ctx: Any, kind: Any) -> tuple[Any, ...]:
    """The call that ``save`` was given, of the NamedTuple ``kind``, and the others."""
    saved, count = ctx.saved_tensors, len(kind._fields)
    fields = [x if kept is None else kept for x, kept in zip(ctx.rest, saved[:count], strict=True)]
    return kind(*fields), *saved[count:]
