"""Cross-entropy with labels beside a divergence from a teacher, as a module: see :mod:`fastkd.functional.kd`."""

from torch import Tensor

from .. import _check, _divergences, functional
from .._types import Logits, ProcessGroup, SoftDivergence, TargetReduction, TeacherLogits
from ._loss import _Loss


class KDLoss(_Loss):
    r"""Cross-entropy with the target beside a divergence from the teacher, in one pass over the logits.

    .. math:: w_{hard} \left(-\log \mathrm{softmax}(student)_{target}\right) + w_{soft}\, T^2 D(q, p)

    The options and what the loss does are those of :func:`fastkd.functional.kd_loss`.

    Args:
        hard_weight: what the cross-entropy is multiplied by, at least 0. Default 0.5.
        soft_weight: what the divergence is multiplied by, at least 0. Default 0.5.
        divergence: ``"kl_div"``, the default, ``"soft_cross_entropy"``, ``"reverse_kl_div"``, ``"js_div"``,
            ``"symmetric_kl_div"``, ``"skew_kl_div"``, ``"skew_reverse_kl_div"``, ``"total_variation"``,
            ``"negative_log_acceptance"``, ``"alpha_beta_div"``, ``"bernoulli_kl_div"`` or ``"adaptive_kl_div"``.
        beta: of ``js_div`` and ``alpha_beta_div``, and of no other. Default: that function's.
        student_weight: of ``symmetric_kl_div``, and of no other, from 0 to 1. Default: that function's.
        alpha: of ``skew_kl_div``, ``skew_reverse_kl_div`` and ``alpha_beta_div``, and of no other. Default: that
            function's.
        mu: of ``adaptive_kl_div``, and of no other, from 0 to 1. Default: that function's.
        temperature: T of the soft loss, a positive number. Default 1.
        teacher_temperature: the teacher's own temperature, a positive number. Default: ``temperature``.
        t_squared: whether the soft loss is multiplied by T**2. Default True.
        standardize: whether each row of logits is first brought to mean 0 and standard deviation 1, for the soft loss
            alone. Default False.
        ignore_index: the target of rows that do not count. Default -100.
        label_smoothing: from 0 to 1. Default 0.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, whose widths may differ then. Default: all.
        reduction: ``"none"``, ``"sum"`` or ``"batchmean"``. Default: ``"batchmean"``.
        inplace: whether the gradient is written over the student's logits. Default False.
        group: a process group over which classes are split. Default: none.
        return_parts: whether the loss comes in a :class:`fastkd.functional.KDParts`. Default False.

    Shape:
        student and teacher ``[*, V]``, or with V at ``dim``, and target ``[*]``; the loss has no dimensions, or ``[*]``
        with ``reduction="none"``.

    Example:
        >>> import torch, fastkd
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss_function = fastkd.KDLoss(hard_weight=0.1, soft_weight=0.9, temperature=2.0)
        >>> loss = loss_function(student, teacher, torch.tensor([0, -100]))
        >>> loss.backward()
        >>> round(loss.item(), 4)
        0.1494
    """

    _options = (
        "hard_weight",
        "soft_weight",
        "divergence",
        "beta",
        "student_weight",
        "alpha",
        "mu",
        "temperature",
        "teacher_temperature",
        "t_squared",
        "standardize",
        "ignore_index",
        "label_smoothing",
        "dim",
        "num_classes",
        "reduction",
        "inplace",
        "group",
        "return_parts",
    )

    def __init__(
        self,
        *,
        hard_weight: float = 0.5,
        soft_weight: float = 0.5,
        divergence: SoftDivergence = "kl_div",
        beta: float | None = None,
        student_weight: float | None = None,
        alpha: float | None = None,
        mu: float | None = None,
        temperature: float = 1.0,
        teacher_temperature: float | None = None,
        t_squared: bool = True,
        standardize: bool = False,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        dim: int = -1,
        num_classes: int | None = None,
        reduction: TargetReduction = "batchmean",
        inplace: bool = False,
        group: ProcessGroup | None = None,
        return_parts: bool = False,
    ) -> None:
        super().__init__()
        parameters = {"beta": beta, "student_weight": student_weight, "alpha": alpha, "mu": mu}
        found = _check.soft_divergence(divergence, parameters)
        for entry, value in zip(_divergences.parameters_of(divergence), found, strict=False):
            _check.parameter(entry, value)
        _check.hard_options(hard_weight, soft_weight, label_smoothing)
        _check.target_reduction(reduction)
        _check.logits_module(
            temperature, teacher_temperature, t_squared, standardize, dim, num_classes, reduction, inplace,
            group,
        )  # fmt: skip
        _check.whole_number("ignore_index", ignore_index)
        _check.flag("return_parts", return_parts)
        self.hard_weight = hard_weight
        self.soft_weight = soft_weight
        self.divergence: SoftDivergence = divergence
        self.beta = beta
        self.student_weight = student_weight
        self.alpha = alpha
        self.mu = mu
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.t_squared = t_squared
        self.standardize = standardize
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.dim = dim
        self.num_classes = num_classes
        self.reduction: TargetReduction = reduction
        self.inplace = inplace
        self.group = group
        self.return_parts = return_parts

    def forward(
        self,
        student: Logits,
        teacher: TeacherLogits,
        target: Tensor,
        *,
        temperature: Tensor | float | None = None,
        teacher_temperature: Tensor | float | None = None,
        mask: Tensor | None = None,
        weight: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor | functional.KDParts:
        """The loss: a tensor without dimensions, or ``[*]`` with ``reduction="none"``; or, if the module returns parts,
        a named tuple that begins with it.

        Args:
            student: raw logits ``[*, V]``, whose classes are at ``dim``, or :class:`fastkd.LinearLogits`.
            teacher: of the same shape, a constant, of either form.
            target: the class of each row, whole numbers ``[*]``.
            temperature: for this call, a number or a tensor that broadcasts to ``[*]``. Default: the module's.
            teacher_temperature: for this call, of the same form. Default: the module's.
            mask: bool, broadcastable to ``[*]``, True where the row counts. Default: every row that has a target.
            weight: float, broadcastable to ``[*]``, multiplies the row's loss. Default: 1 for every row.
            normalizer: a number, or a tensor of one element, that replaces the divisor. Default: none.
        """
        return functional.kd_loss(
            student,
            teacher,
            target,
            hard_weight=self.hard_weight,
            soft_weight=self.soft_weight,
            divergence=self.divergence,
            beta=self.beta,
            student_weight=self.student_weight,
            alpha=self.alpha,
            mu=self.mu,
            temperature=self.temperature if temperature is None else temperature,
            teacher_temperature=self.teacher_temperature if teacher_temperature is None else teacher_temperature,
            t_squared=self.t_squared,
            standardize=self.standardize,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            dim=self.dim,
            num_classes=self.num_classes,
            mask=mask,
            weight=weight,
            reduction=self.reduction,
            normalizer=normalizer,
            inplace=self.inplace,
            group=self.group,
            return_parts=self.return_parts,
        )
