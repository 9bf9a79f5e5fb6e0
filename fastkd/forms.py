"""What may stand in place of logits: hidden states with a head, from which they are made a slab of rows at a time."""

import torch
from torch import Tensor

from . import _check
from .reference import compute_dtype, without_autocast


class LinearLogits:
    r"""Logits as hidden states and the head that makes them, of a student or of a teacher.

    .. math:: z = scale \cdot (hidden\, weight^\top + bias), \qquad
              softcap \cdot \tanh(z / softcap) \text{ where there is a softcap}

    Every loss of logits takes it in place of a tensor ``[*, V]``, but for ``dist_loss``. The logits are made a slab of
    rows at a time, in float32 (in float64 where hidden and weight are), and never held whole; student and teacher may
    be of either form. The gradients are those of hidden, weight and bias, as far as they require one: what is frozen
    costs nothing, neither product nor memory. They are computed in forward, as those of logits are, and nothing of the
    size of logits is kept. With ``reduction="none"``, and for a student in float16, backward makes the logits once
    more.

    The logits are not rounded to the type of hidden and weight before they are compared. In half precision their
    gradient is rounded once, on a GPU, for the products back to hidden and weight; on the CPU it is not rounded at all.
    The gradient of weight and bias is summed in float32, in memory of its size, and rounded once.

    Inside ``torch.autocast`` hidden, weight and bias are taken in autocast's dtype, as ``torch.nn.Linear`` takes them:
    each call makes a copy of the head, also of a frozen one, and the gradient is rounded to that dtype.

    A row that a mask leaves out may hold anything, NaN too: it reaches no gradient. On the CPU it costs nothing.

    Args:
        hidden: the last hidden states ``[*, H]``.
        weight: of the head, ``[V, H]``, in the dtype of ``hidden``; that of the embeddings where these are tied.
        bias: of the head, ``[V]``, in the same dtype. Default: none.
        scale: what the logits are multiplied by, a positive number, such as Cohere's ``logit_scale``. Default 1.
        softcap: what they stay below in size, a positive number, such as Gemma's ``final_logit_softcapping``. Default:
            none.
        slab_bytes: memory for the logits of a slab, a positive whole number; a slab has one row at least. Default: 32
            MiB on the CPU, 512 MiB on a GPU, and 64 rows where these are more.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Example:
        >>> import torch, fastkd
        >>> from fastkd.functional import kl_div
        >>> head, teacher_head = torch.nn.Linear(8, 100, bias=False), torch.nn.Linear(16, 100, bias=False)
        >>> hidden, teacher_hidden = torch.randn(2, 5, 8, requires_grad=True), torch.randn(2, 5, 16)
        >>> student = fastkd.LinearLogits(hidden, head.weight)
        >>> teacher = fastkd.LinearLogits(teacher_hidden, teacher_head.weight.detach())
        >>> kl_div(student, teacher, temperature=2.0).backward()
        >>> hidden.grad.shape, head.weight.grad.shape
        (torch.Size([2, 5, 8]), torch.Size([100, 8]))
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        scale: float = 1.0,
        softcap: float | None = None,
        slab_bytes: int | None = None,
    ) -> None:
        _check.linear_logits(hidden, weight, bias, scale, softcap, slab_bytes)
        self.hidden = hidden
        self.weight = weight
        self.bias = bias
        self.scale = scale
        self.softcap = softcap
        self.slab_bytes = slab_bytes

    def __repr__(self) -> str:
        bias = "" if self.bias is None else ", bias"
        return f"LinearLogits(hidden {list(self.hidden.shape)}, weight {list(self.weight.shape)}{bias})"

    def logits(self) -> Tensor:
        """The whole logits ``[*, V]``, by plain PyTorch: in float32 or float64, differentiable."""
        dtype = compute_dtype(self.weight)
        hidden, weight, bias = (None if x is None else x.to(dtype) for x in (self.hidden, self.weight, self.bias))
        with without_autocast(self.weight.device):
            logits = torch.nn.functional.linear(hidden, weight, bias) * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def _with_tensors(form, hidden, weight, bias):
    return LinearLogits(hidden, weight, bias, scale=form.scale, softcap=form.softcap, slab_bytes=form.slab_bytes)


def in_dtype(form: LinearLogits, dtype: torch.dtype) -> LinearLogits:
    """The same in another dtype."""
    return _with_tensors(form, *(None if x is None else x.to(dtype) for x in (form.hidden, form.weight, form.bias)))


def logits_of_rows(form: LinearLogits, mask: Tensor | None) -> Tensor:
    """Whole logits, to which the hidden states of rows that do not count give nothing; else the gradient of the weight
    would be NaN where these are. mask: bool, one per row, or None."""
    if mask is not None:
        form = _with_tensors(form, form.hidden.masked_fill(~mask[..., None], 0), form.weight, form.bias)
    return form.logits()


def logits_of(side: Tensor | LinearLogits, num_classes: int | None = None) -> Tensor:
    """A tensor that is like the logits of a side, the first so many or all of them: in shape, dtype and device, and
    where they are a tensor in all else. It holds no memory of its own."""
    if isinstance(side, LinearLogits):
        classes = len(side.weight) if num_classes is None else num_classes
        return side.hidden.detach().new_empty(()).expand(*side.hidden.shape[:-1], classes)
    return side if num_classes is None else side[..., :num_classes]
