"""A gradient that forward has computed: what backward does with it."""

from collections.abc import Callable
from typing import Any

import torch

from .. import _transforms


def all_times(scale_: Any, grads: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """Each of grads * upstream, in their memory where nothing else will need it. Whether upstream is 1
    is looked at where it lies: the host waits for no device."""
    if torch.compiler.is_compiling() or type(upstream) is not torch.Tensor:
        return [grad * upstream for grad in grads]
    if torch._C._autograd._get_current_graph_task_keep_graph():  # there may be another backward
        return [grad * upstream for grad in grads]
    scale_(grads, upstream)
    return grads


def times(scale_: Any, grad: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    """The same of one."""
    return all_times(scale_, [grad], upstream)[0]


def once(gradient: Callable[..., Any], *arguments: Any) -> Any:
    """gradient(*arguments), which raises when it is differentiated: it must not count as 0."""
    _transforms.refuse("grad_outputs", arguments[-1])
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        with torch.no_grad():
            grad = gradient(*arguments)
        return _Once.apply(grad, torch.zeros((), requires_grad=True))
    return gradient(*arguments)


class _Once(torch.autograd.Function):
    """The anchor requires a gradient, so that autograd comes by here and does not take the second
    derivative for 0."""

    @staticmethod
    def forward(ctx, grad, anchor):
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, _):
        raise RuntimeError("fastkd: second derivatives are not implemented")
