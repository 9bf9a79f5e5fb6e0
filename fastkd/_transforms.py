"""Function transforms of torch.func and forward-mode AD: plain PyTorch has them, the kernels refuse them. Without this,
``torch.func.jvp`` of a loss would be 0 without a word, as the kernels know no tangents."""

import torch
from torch.autograd import forward_ad

from . import _backend

_FORWARD_MODE = ("torch.func.jvp", "forward-mode AD")


def _transform_of(x):
    """The name of the transform that a tensor takes part in; empty where there is none."""
    if torch.compiler.is_compiling():
        from . import _untraced

        # torch.compile traces anew where this level is another; which tensors are part of it, it cannot tell
        return "forward-mode AD" if forward_ad._current_level >= 0 else _untraced.transform()
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return "forward-mode AD"
    if torch._C._functorch.is_legacy_batchedtensor(x):  # of backward alone
        return "is_grads_batched=True"
    return look_for_transform()


def look_for_transform():
    """The transform of torch.func that is under way."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    if interpreter is None or interpreter.key().name not in ("Grad", "Vmap", "Jvp"):
        return ""
    return f"torch.func.{interpreter.key().name.lower()}"


def refuse(name: str, x: torch.Tensor) -> None:
    """Raises where an argument takes part in a transform and kernels would compute it."""
    transform = _transform_of(x)
    if transform and _backend.select(x.device) != "torch":
        raise RuntimeError(
            f"{name}: fastkd's kernels have no rules for {transform}; inside 'with fastkd.backend(\"torch\")' "
            "plain PyTorch computes the loss, and has them"
        )


def refuse_all(name: str, x: torch.Tensor, why: str) -> None:
    """Raises where an argument takes part in a transform, whatever computes it."""
    if transform := _transform_of(x):
        raise RuntimeError(f"{name}: fastkd has no {transform} {why}")


def refuse_forward_mode(name: str, x: torch.Tensor) -> None:
    """Raises where PyTorch itself has no forward mode for what plain PyTorch computes."""
    transform = _transform_of(x)
    if transform in _FORWARD_MODE:
        raise RuntimeError(
            f"{name}: fastkd has no {transform} for distances between samples, as torch.cdist has none; "
            "torch.func.grad and backward work"
        )
