"""Checks of what stands in place of logits."""

import torch

from .arguments import DTYPES, at_least, is_tensor, number, tensor


def _dense(name, x):
    is_tensor(name, x)
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: float16, bfloat16, float32 or float64 wanted, got {x.dtype}")
    if x.layout is not torch.strided or x.is_nested:
        raise TypeError(f"{name}: a dense tensor wanted, got {'a nested one' if x.is_nested else x.layout}")


def linear_logits(hidden, weight, bias, scale, softcap, slab_bytes):
    """What LinearLogits is made with."""
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None or name != "bias":
            _dense(name, x)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        found = f"shape {list(hidden.shape)}" if hidden.dim() else "a tensor without dimensions"
        raise ValueError(f"hidden: hidden states of shape [*, H] wanted, H at least 1, got {found}")
    if weight.dim() != 2:
        raise ValueError(f"weight: a head of shape [V, H] wanted, got {list(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        turned = ", whose first dimension is the classes" if weight.shape[0] == hidden.shape[-1] else ""
        raise ValueError(
            f"weight: a head of shape [V, {hidden.shape[-1]}] wanted{turned}, for hidden states "
            f"{list(hidden.shape)}, got {list(weight.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"weight: at least one class wanted, got shape {list(weight.shape)}")
    if bias is not None and list(bias.shape) != [len(weight)]:
        raise ValueError(f"bias: shape [{len(weight)}] wanted, one for each class, got {list(bias.shape)}")
    number("scale", scale)
    if softcap is not None:
        number("softcap", softcap)
    if slab_bytes is not None:
        at_least("slab_bytes", slab_bytes, 1)


def linear_side(side, of, autocast):
    """The LinearLogits of a side, where it is used. autocast: whether their dtypes are made one there."""
    for name, x in (("weight", of.weight), ("bias", of.bias)):
        if x is None:
            continue
        if x.device != of.hidden.device:
            raise ValueError(
                f"{side}.{name}: a tensor on the device of hidden, {of.hidden.device}, wanted, got {x.device}"
            )
        if x.dtype != of.hidden.dtype and not autocast:
            raise TypeError(f"{side}.{name}: the dtype of hidden, {of.hidden.dtype}, wanted, got {x.dtype}")
    for name in ("hidden", "weight", "bias"):
        x = getattr(of, name)
        if x is not None:
            tensor(f"{side}.{name}", x)
            if side == "teacher" and x.requires_grad and torch.is_grad_enabled():
                raise ValueError(f"teacher.{name}: no gradient flows to it, and it requires one; detach() it")
