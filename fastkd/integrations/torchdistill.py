"""torchdistill: its losses under their keys, with their arguments and their numbers, computed by fastkd. A
configuration in YAML stays as it is; the script that reads it says once, before it is read:

.. code-block:: python

    import fastkd.integrations.torchdistill

    fastkd.integrations.torchdistill.register()  # KDLoss, LogitStdKDLoss, DISTLoss, ATLoss, PKTLoss, RKDLoss

What fastkd has no loss for stays torchdistill's own: ``reduction: 'none'`` of KDLoss and LogitStdKDLoss, another
``eps`` than 1e-7 of the latter, ``mode: 'paper'`` of ATLoss, another ``reduction`` than ``'mean'`` of RKDLoss; and
SPKDLoss, which divides rows of similarities by the sum of their sizes, where the paper, and ``similarity_preserving``,
have their length. What differs: no gradient flows to the teacher, and of a row or column without spread DISTLoss makes
a correlation of 0.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import functional

IO = Mapping[str, Mapping[str, Tensor]]


class _OfTwo(torch.nn.Module):
    """A loss of what a module of the student and one of the teacher had as input or output."""

    def __init__(
        self, student_module_path: str, student_module_io: str, teacher_module_path: str, teacher_module_io: str
    ) -> None:
        super().__init__()
        self.student_module_path: str = student_module_path
        self.student_module_io: str = student_module_io
        self.teacher_module_path: str = teacher_module_path
        self.teacher_module_io: str = teacher_module_io

    @staticmethod
    def computes(options: Mapping[str, Any]) -> bool:
        """Whether fastkd has this loss with these arguments."""
        return True

    def both(self, student_io_dict: IO, teacher_io_dict: IO) -> tuple[Tensor, Tensor]:
        student = student_io_dict[self.student_module_path][self.student_module_io]
        return student, teacher_io_dict[self.teacher_module_path][self.teacher_module_io].detach()


class KDLoss(_OfTwo):
    """alpha CE + beta T^2 KL(q, p), as ``torchdistill.losses.mid_level.KDLoss`` has it: without labels, or with an
    alpha of 0 or None, KL(q, p) alone, and not times T^2. p and q are softmax(logits / T) over dimension 1.

    Args:
        student_module_path: of whose module the logits ``[B, C, *]`` are.
        student_module_io: ``"input"`` or ``"output"`` of it.
        teacher_module_path: the same of the teacher.
        teacher_module_io: the same of the teacher.
        temperature: T.
        alpha: the weight of the cross-entropy. Default: none.
        beta: the weight of the divergence. Default: 1 - alpha.
        reduction: ``"batchmean"``: the divergence is divided by B; ``"mean"``: by the number of logits; ``"sum"``.
        kwargs: what ``torch.nn.CrossEntropyLoss`` takes.

    Source: torchdistill 1.1.5.
    """

    standardizes: bool = False

    @staticmethod
    def computes(options: Mapping[str, Any]) -> bool:
        """Whether fastkd has this loss with these arguments."""
        return options.get("reduction", "batchmean") != "none"

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        if reduction not in ("batchmean", "mean", "sum"):
            raise ValueError(f"reduction: 'batchmean', 'mean' or 'sum' wanted, got {reduction!r}")
        self.temperature: float = temperature
        self.alpha: float | None = alpha
        self.beta: float = 1 - (alpha or 0) if beta is None else beta
        self.reduction: str = reduction
        self.cross_entropy_loss: torch.nn.Module = torch.nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def forward(
        self, student_io_dict: IO, teacher_io_dict: IO, targets: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss; targets: labels ``[B, *]``, or None."""
        student, teacher = self.both(student_io_dict, teacher_io_dict)
        soft = functional.kl_div(
            student, teacher, temperature=self.temperature, t_squared=False, standardize=self.standardizes, dim=1,
            reduction=self.reduction, normalizer=len(student) if self.reduction == "batchmean" else None,
        )  # fmt: skip
        if not self.alpha or targets is None:
            return soft
        return self.alpha * self.cross_entropy_loss(student, targets) + self.beta * self.temperature**2 * soft


class LogitStdKDLoss(KDLoss):
    """:class:`KDLoss` of which the divergence sees standardized logits, ``[B, C]``: less their mean, over their
    standard deviation.

    Args:
        args: as of KDLoss, but that ``eps``, what is added to the standard deviation, follows the temperature: 1e-7.
        kwargs: as of KDLoss.

    Source: torchdistill 1.1.5; https://arxiv.org/abs/2403.01427.
    """

    standardizes: bool = True

    @staticmethod
    def computes(options: Mapping[str, Any]) -> bool:
        """Whether fastkd has this loss with these arguments."""
        return KDLoss.computes(options) and options.get("eps", 1e-7) == 1e-7

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        eps: float = 1e-7,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        if eps != 1e-7:
            raise ValueError(f"eps: 1e-7 wanted, got {eps!r}")
        super().__init__(
            student_module_path, student_module_io, teacher_module_path, teacher_module_io, temperature, alpha, beta,
            reduction, **kwargs,
        )  # fmt: skip


class DISTLoss(_OfTwo):
    """:func:`fastkd.functional.dist_loss` of logits ``[B, C]``.

    Args:
        student_module_path: as of KDLoss.
        student_module_io: as of KDLoss.
        teacher_module_path: as of KDLoss.
        teacher_module_io: as of KDLoss.
        beta: the weight of correlations along rows. Default: 1.
        gamma: the weight of those along columns. Default: 1.
        tau: the temperature. Default: 1.
        eps: that of the correlation. Default: 1e-8.
        kwargs: taken and not looked at, as there.

    Source: torchdistill 1.1.5.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        beta: float = 1.0,
        gamma: float = 1.0,
        tau: float = 1.0,
        eps: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.beta: float = beta
        self.gamma: float = gamma
        self.tau: float = tau
        self.eps: float = eps

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        """The loss."""
        return functional.dist_loss(
            *self.both(student_io_dict, teacher_io_dict), inter_weight=self.beta, intra_weight=self.gamma,
            temperature=self.tau, eps=self.eps,
        )  # fmt: skip


class PKTLoss(_OfTwo):
    """:func:`fastkd.functional.pkt` of embeddings ``[B, D]``.

    Args:
        student_module_path: of whose module the embeddings are.
        student_module_io: ``"input"`` or ``"output"`` of it.
        teacher_module_path: the same of the teacher.
        teacher_module_io: the same of the teacher.
        eps: as of ``pkt``. Default: 1e-7.

    Source: torchdistill 1.1.5.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        eps: float = 1e-7,
    ) -> None:
        super().__init__(student_module_path, student_module_io, teacher_module_path, teacher_module_io)
        self.eps: float = eps

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        """The loss."""
        return functional.pkt(*self.both(student_io_dict, teacher_io_dict), eps=self.eps)


class RKDLoss(_OfTwo):
    """:func:`fastkd.functional.rkd_loss` of outputs that are flattened to ``[B, D]``.

    Args:
        student_output_path: the module of the student whose output is looked at.
        teacher_output_path: the same of the teacher.
        dist_factor: the weight of distances.
        angle_factor: the weight of angles.
        reduction: ``"mean"``.
        kwargs: taken and not looked at, as there.

    Source: torchdistill 1.1.5.
    """

    @staticmethod
    def computes(options: Mapping[str, Any]) -> bool:
        """Whether fastkd has this loss with these arguments."""
        return options.get("reduction") == "mean"

    def __init__(
        self,
        student_output_path: str,
        teacher_output_path: str,
        dist_factor: float,
        angle_factor: float,
        reduction: str,
        **kwargs: Any,
    ) -> None:
        super().__init__(student_output_path, "output", teacher_output_path, "output")
        if reduction != "mean":
            raise ValueError(f"reduction: 'mean' wanted, got {reduction!r}")
        self.dist_factor: float = dist_factor
        self.angle_factor: float = angle_factor

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        """The loss."""
        student, teacher = (x.flatten(1) for x in self.both(student_io_dict, teacher_io_dict))
        distances: Any = self.dist_factor and self.dist_factor * functional.rkd_distance(student, teacher)
        angles: Any = self.angle_factor and self.angle_factor * functional.rkd_angle(student, teacher)
        return distances + angles


class ATLoss(torch.nn.Module):
    """:func:`fastkd.functional.attention_transfer` of pairs of feature maps ``[B, C, H, W]``, each times its weight.

    Args:
        at_pairs: by any name ``student`` and ``teacher``, each with ``io`` and ``path``, and ``weight``, by default 1.
        mode: ``"code"``, that of the authors' code.
        kwargs: taken and not looked at, as there.

    Source: torchdistill 1.1.5.
    """

    @staticmethod
    def computes(options: Mapping[str, Any]) -> bool:
        """Whether fastkd has this loss with these arguments."""
        return options.get("mode", "code") == "code"

    def __init__(self, at_pairs: Mapping[str, Mapping[str, Any]], mode: str = "code", **kwargs: Any) -> None:
        super().__init__()
        if mode != "code":
            raise ValueError(f"mode: 'code' wanted, got {mode!r}")
        self.at_pairs: Mapping[str, Mapping[str, Any]] = at_pairs

    def forward(self, student_io_dict: IO, teacher_io_dict: IO, *args: Any, **kwargs: Any) -> Tensor:
        """The loss."""
        found = []
        for pair in self.at_pairs.values():
            student = student_io_dict[pair["student"]["path"]][pair["student"]["io"]]
            teacher = teacher_io_dict[pair["teacher"]["path"]][pair["teacher"]["io"]]
            found.append(pair.get("weight", 1) * functional.attention_transfer(student, teacher.detach()))
        return torch.stack(found).sum()


LOSSES: tuple[type[torch.nn.Module], ...] = (KDLoss, LogitStdKDLoss, DISTLoss, ATLoss, PKTLoss, RKDLoss)


def register() -> None:
    """From here on torchdistill's keys are fastkd's losses, in this process, but for arguments that these do not have:
    see each loss's ``computes``."""
    from torchdistill.losses import mid_level
    from torchdistill.losses.registry import register_mid_level_loss

    for ours in LOSSES:
        register_mid_level_loss(key=ours.__name__)(_or_theirs(ours, getattr(mid_level, ours.__name__)))


def _or_theirs(ours: Any, theirs: Any) -> Callable[..., Any]:
    def make(**options: Any) -> Any:
        return (ours if ours.computes(options) else theirs)(**options)

    return make
