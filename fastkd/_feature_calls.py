"""The arguments of each op of features, as _calls.py has those of logits.

Numbers, such as beta, are tensors in float64 on the CPU: see ops/numbers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from ._calls import Out


class LayersCall(NamedTuple):
    """What ``features_fwd`` and ``features_bwd`` begin with: features of one layer or more, whose rows are along
    feature_dim. N is the number of a layer's rows."""

    student: list[Tensor]  # one for each layer, any strides, and so is what follows
    teacher: list[Tensor]
    feature_dim: list[int]
    feature: int  # its number in ops/features.py
    mask: list[Tensor]  # [N] bool each, True: the row counts; or none at all
    weight: list[Tensor]  # [N] each, in the dtype that is computed in; or none at all
    reduction: int  # its number in ops/features.py
    layer_weights: Tensor  # a number for each layer
    beta: Tensor | None  # of smooth L1; None: squares


class LayersForward(NamedTuple):
    """What ``features_fwd`` is told besides. It returns the loss of all layers, weighted, one per row where nothing is
    reduced; each layer's own; and the gradients of the loss."""

    save: bool  # whether the gradients are wanted; else there are none


class LayersBackward(NamedTuple):
    """What ``features_bwd`` is told besides. It returns the gradients."""

    upstream: Tensor  # one element, or one per row of all layers


class OneLayerCall(NamedTuple):
    """``features_fwd_``, of one layer: the loss, per row or their sum."""

    student: Out  # any strides; the gradient is written over it
    teacher: Tensor
    feature_dim: int
    feature: int
    mask: Tensor | None  # as in LayersCall, and so is what follows
    weight: Tensor | None
    reduction: int
    beta: Tensor | None


class AttentionCall(NamedTuple):
    """What both ops of attention_transfer begin with."""

    student: Tensor  # [B, C, H, W], any strides
    teacher: Tensor  # the same, but for C
    p: Tensor  # a number


class AttentionForward(NamedTuple):
    """What ``attention_fwd`` is told besides. It returns the loss and the gradient."""

    save: bool  # whether the gradient is wanted; else it is empty


class AttentionBackward(NamedTuple):
    """What ``attention_bwd`` is told besides. It returns the gradient."""

    upstream: Tensor  # one element
