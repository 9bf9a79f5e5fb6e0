"""Few samples on the CPU: similarity_preserving, gram_mse and pkt in one op, csrc/cpu/samples.cpp.

Each is two matrices of inner products, a kernel over their rows and a product for the gradient. In calls of torch's own
ops there are 20 to 30, which take longer than the arithmetic of a batch of 32 to 512.
"""

import torch

from .. import _library
from .._relation_calls import SamplesCall
from .numbers import as_tensor

SIMILARITY, GRAM, PKT = range(3)  # the numbers of csrc/cpu/samples.cpp
_NO_EPS = as_tensor(0.0)  # of relations that have none
FEW = 128  # samples, whose products take less time than calls of a few ops


def are_few(x: torch.Tensor, block: dict[str, int], by_features: bool = False) -> bool:
    """Whether all pairs of rows of x are one block, and the op is there. by_features: products of features are cheaper
    than those of samples, which then serve for FEW alone."""
    one_block = x.device.type == "cpu" and len(x) * len(x) <= block["cpu"] and not _library.cpu_missing
    return one_block and (len(x) <= FEW or not by_features)


def few_samples(
    student: torch.Tensor,
    teacher: torch.Tensor,
    relation: int,
    mask: torch.Tensor | None,
    weight: torch.Tensor | None,
    save: bool,
    normalize: bool = False,
    clamp: int = 0,
    eps: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the gradient where it is saved."""
    mask = mask if mask is None else mask.contiguous()
    eps = _NO_EPS if eps is None else eps
    call = SamplesCall(
        student=student, teacher=teacher, relation=relation, normalize=normalize, clamp=clamp, eps=eps, mask=mask,
        weight=weight, save=save,
    )  # fmt: skip
    return torch.ops.fastkd.samples_fwd.default(*call)
