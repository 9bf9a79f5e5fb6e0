"""What all metrics are: sums of batches."""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _check, _dtensor

ELEMENTS = 2**22  # of what is made of some rows at a time


def wide(x: Tensor) -> torch.dtype:
    """What sums are computed in."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def slabs(N: int, width: int) -> Iterator[slice]:
    """Ranges of N rows, of which what is so wide takes little memory."""
    step = max(ELEMENTS // max(width, 1), 1)
    for first in range(0, N, step):
        yield slice(first, min(first + step, N))


def plain(**tensors: Any) -> None:
    """No DTensors, of which each rank has a part."""
    for name, x in tensors.items():
        if _dtensor.given(x):
            raise ValueError(f"{name}: a plain tensor wanted, got a DTensor; full_tensor() makes one")


def pair(student: Any, teacher: Any, what: str) -> None:
    """Two plain tensors on one device."""
    plain(student=student, teacher=teacher)
    _check.arguments.inputs(student, teacher, what)
    _check.arguments.same_device(student, teacher)


class Metric:
    """A measure that takes batches one after the other; its subclasses say what they are."""

    names: tuple[str, ...] = ()  # of the sums that it keeps
    appends: bool = False  # whether it keeps what it was given, in place of sums
    of_many: bool = False  # whether its sums are added to others'

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begins again, as if no batch had been given."""
        self.sums: dict[str, Any] = {}
        self.widths: dict[str, int] = {}

    def update(self, *batch: Any) -> None:
        """Takes a batch."""
        raise NotImplementedError

    def compute(self) -> Any:
        """The measure of all batches since the beginning."""
        raise NotImplementedError

    def _same_widths(self, **tensors):
        """An error before anything is added, where a batch has another width than those before it."""
        for name, x in tensors.items():
            wanted = self.widths.setdefault(name, x.shape[-1])
            if x.shape[-1] != wanted:
                raise ValueError(f"{name}: the width of the batches before, {wanted}, wanted, got {x.shape[-1]}")

    def _add(self, **sums):
        for name, x in sums.items():
            if self.appends:
                self.sums.setdefault(name, []).append(x)
            else:
                self.sums[name] = self.sums[name] + x if name in self.sums else x

    def _found(self):
        """All sums, or all that was given; an error where there is nothing."""
        if not self.sums:
            raise RuntimeError(f"{type(self).__name__}.compute: no batch has been given yet; call update first")
        if self.appends:
            return {name: torch.cat(x) for name, x in self.sums.items()}
        return self.sums


def for_torchmetrics(metric: Metric) -> Any:
    """A metric of ``torchmetrics`` that is one of these, for its collections, loggers and ranks.

    It takes what ``metric.update`` takes, by the same names, and computes the same. Over several ranks torchmetrics
    adds up the sums, so that every rank has to be given a batch at least. It can be copied, but not pickled.

    Args:
        metric: a metric of this module; it belongs to what is returned from then on.

    Returns:
        An instance of ``torchmetrics.Metric``.

    Raises:
        TypeError: metric is none of this module.
        ImportError: torchmetrics is not installed.

    Example:
        >>> import torch
        >>> from fastkd import metrics
        >>> measure = metrics.for_torchmetrics(metrics.Agreement())
        >>> measure.update(torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> measure.compute().item()
        0.5
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"metric: one of fastkd.metrics wanted, got {type(metric).__name__}")
    import torchmetrics

    metric.of_many = True
    kind = type(metric)

    class Wrapped(torchmetrics.Metric):
        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.metric = metric
            for name in kind.names:
                if kind.appends:
                    self.add_state(name, default=[], dist_reduce_fx="cat")
                else:
                    self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

        @functools.wraps(kind.update)  # torchmetrics looks at its parameters
        def update(self, *batch: Any, **named: Any) -> None:
            self.metric.reset()
            self.metric.update(*batch, **named)
            for name, x in self.metric.sums.items():
                if kind.appends:
                    getattr(self, name).extend(x)
                else:
                    setattr(self, name, getattr(self, name).to(x.dtype) + x)

        def compute(self) -> Any:
            found = {name: getattr(self, name) for name in kind.names}
            self.metric.sums = {name: [x] if kind.appends and isinstance(x, Tensor) else x for name, x in found.items()}
            return self.metric.compute()

    Wrapped.__name__ = Wrapped.__qualname__ = kind.__name__
    return Wrapped()
