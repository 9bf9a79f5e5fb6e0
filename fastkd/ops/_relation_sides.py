"""What relation_kl multiplies: the rows and keys of a side."""

import torch

from .._relation_calls import RelationKLCall
from .products import unit

HALF = (torch.float16, torch.bfloat16)


class Side:
    """The rows and the keys of a few samples, [b, N, D] and [b, M, D], as they are multiplied."""

    def __init__(
        self,
        x: torch.Tensor,
        keys: torch.Tensor | None,
        call: RelationKLCall,
        dtype: torch.dtype,
        halves: tuple[torch.dtype, ...],
    ) -> None:
        self.own_keys, normalize = keys is None, call.normalize
        self.low = x.device.type == "cuda" and not normalize and x.dtype in halves
        self.low = self.low and (self.own_keys or keys.dtype is x.dtype)
        dtype = x.dtype if self.low else dtype
        self.x, self.through = _prepared(x.to(dtype), call.mask, normalize)
        self.keys, self.keys_through = self.x, None
        if not self.own_keys:
            self.keys, self.keys_through = _prepared(keys.to(dtype), call.key_mask, normalize)
        if not self.low:
            self.keys = self.keys - _mean(self.keys, call.key_mask)

    def similarities(self, rows: slice, strip: torch.Tensor) -> torch.Tensor:
        if self.low:
            return torch.bmm(self.x[:, rows], self.keys.mT, out_dtype=strip.dtype)
        return torch.bmm(self.x[:, rows], self.keys.mT, out=strip)

    def add_gradients(
        self, rows: slice, W: torch.Tensor, grad: torch.Tensor | None, keys_grad: torch.Tensor | None
    ) -> None:
        """From W of a strip, to those that are wanted; where there are no other keys both are the rows'."""
        W = W.to(self.x.dtype)
        if grad is not None:
            self._add_product(grad[:, rows], W, self.keys)
        if keys_grad is not None:
            self._add_product(keys_grad, W.mT, self.x[:, rows])

    def _add_product(self, grad, a, b):
        if self.low:
            grad += torch.bmm(a, b, out_dtype=grad.dtype)
        elif grad.device.type != "cpu":
            grad.baddbmm_(a, b)
        else:  # whose products of a batch are slower
            for one, u, v in zip(grad, a, b, strict=True):
                one.addmm_(u, v)


def _prepared(x, mask, normalize):
    """Rows as they are multiplied, and what unit_backward wants where they are of length 1."""
    if mask is not None:  # a row that does not count may hold anything
        x = torch.where(mask[..., None], x, 0.0)
    if not normalize:
        return x, None
    x, *how = unit(x)
    return x, (x, *how)


def _mean(keys, mask):
    """Of those that count; the others are 0."""
    if mask is None:
        return keys.mean(1, keepdim=True)
    return keys.sum(1, keepdim=True) / mask.sum(1).clamp(min=1)[:, None, None]
