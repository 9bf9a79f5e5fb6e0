"""The losses as functions. Student first, teacher second; options are keywords."""

from . import _backend, _check, reference
from ._check import LogitsOptions


def kl_div(
    student,
    teacher,
    *,
    temperature=1.0,
    teacher_temperature=None,
    t_squared=True,
    mask=None,
    weight=None,
    reduction="batchmean",
    normalizer=None,
    inplace=False,
):
    r"""Kullback-Leibler divergence of the student from the teacher, both softened by a temperature.

    With :math:`p = \mathrm{softmax}(student / T)` and
    :math:`q = \mathrm{softmax}(teacher / T_{teacher})` the loss of a row is

    .. math:: T^2 \sum_v q_v (\log q_v - \log p_v)

    and its gradient :math:`T (p - q)`. It is computed as
    :math:`\sum_v q_v (e^{w_v} - 1 - w_v)`, :math:`w = \log p - \log q`, a sum of terms that are
    all >= 0: near convergence, where ``F.kl_div`` in float32 has lost every digit (a loss of
    5e-7), the relative error stays below 2e-4. One pass reads student and teacher and, where a
    gradient is wanted, writes it; nothing else of their size is held (on the CPU each thread keeps
    scratch memory of 12 bytes a class, 24 in float64, from call to call).

    Args:
        student: raw logits ``[*, V]``, any strides; float16, bfloat16, float32 or float64.
        teacher: raw logits ``[*, V]``; the dtype may differ. A constant: no gradient flows to it.
        temperature: T, a positive number, or a tensor that broadcasts to the leading
            dimensions (one per row). Default 1.
        teacher_temperature: the teacher's own; default: ``temperature``.
        t_squared: multiply by T**2, so that gradients keep their size when T changes
            (Hinton et al.). Default True.
        mask: bool ``[*]``, True: the row counts. A masked row has loss 0 and gradient 0 whatever
            it holds. Default: every row counts.
        weight: float ``[*]``, multiplies the row's loss; the divisor does not change.
        reduction: ``"none"`` (a loss per row, shape ``[*]``), ``"sum"``, ``"batchmean"`` (sum /
            rows that count, the default) or ``"mean"`` (sum / (rows that count x V)).
        normalizer: a positive number or a tensor of one element that replaces the divisor, for
            gradient accumulation and several ranks; a tensor may be 0 where no row counts. Not with
            ``"none"``.
        inplace: write the gradient over the student's logits, which saves the memory of one
            gradient. For logits that nothing else needs: they must not be a leaf, and a later
            differentiable use of them raises in backward. Not under ``torch.compile``.

    Returns:
        The loss, float64 where an input is float64, else float32. No rows, or none that
        counts: 0.

    Logits of -inf are allowed: q = 0 contributes 0, p = 0 where q > 0 gives +inf, never NaN. A
    row of NaN or +inf gives NaN. The gradient has the student's dtype; it is computed in
    forward, except for float16 and ``"none"``, where backward computes it from the logits (in
    float16 it would vanish before a loss scaler could help). A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.
            The values of tensor temperatures and normalizers are checked on the CPU only; on
            other devices, where looking would cost a synchronisation, they propagate.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    options = LogitsOptions(
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        t_squared=t_squared,
        mask=mask,
        weight=weight,
        reduction=reduction,
        normalizer=normalizer,
        inplace=inplace,
    )
    return _logits_loss("kl_div", student, teacher, options)


def _logits_loss(divergence, student, teacher, options):
    """Checks what a logit loss is given, and hands it to the backend."""
    _check.logits_loss(student, teacher, options)
    if _backend.select(student.device) == "torch":
        return reference.logits_loss(divergence, student, teacher, options)
    from .ops import rows  # needs the compiled library

    return rows.logits_loss(divergence, student, teacher, options)
