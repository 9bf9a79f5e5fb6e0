"""A gradient that forward has computed: what backward does with it."""

from collections.abc import Callable
from typing import Any

import torch

from .. import _transforms
from .._calls import ScaleCall


def is_wanted(student: torch.Tensor) -> bool:
    """Whether autograd asks for that of a student."""
    return student.requires_grad and torch.is_grad_enabled()


def all_scaled(scale_: Any, grads: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """Each of grads * upstream, in their memory where nothing else will need it. Whether upstream is 1
    is looked at where it lies: the host waits for no device."""
    if torch.compiler.is_compiling() or type(upstream) is not torch.Tensor:
        return [grad * upstream for grad in grads]
    if torch._C._autograd._get_current_graph_task_keep_graph():  # there may be another backward
        return [grad * upstream for grad in grads]
    scale_(*ScaleCall(x=grads, factor=upstream))
    return grads


def scaled(scale_: Any, grad: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """The same of one."""
    return all_scaled(scale_, [grad], upstream)[0]


def forbid_double_backward(gradient: Callable[..., Any], *arguments: Any) -> Any:
    """gradient(*arguments), unless it is to be differentiated again. Autograd might find no path that leads by here,
    and count a second derivative as 0: so the gradient itself is refused."""
    _transforms.refuse("grad_outputs", arguments[-1])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "create_graph=True: fastkd's kernels have no second derivatives; inside 'with fastkd.backend(\"torch\")' "
            "plain PyTorch computes the loss, and has them"
        )
    return gradient(*arguments)
