"""The losses as functions. Student first, teacher second; options are keywords."""

import torch

from . import _backend, _check, reference
from ._check import LogitsOptions

# What each loss is with its two sides exchanged: the call that gives the teacher its gradient where both learn.
_EXCHANGED = {
    "kl_div": "reverse_kl_div({})",
    "reverse_kl_div": "kl_div({})",
    "js_div": "js_div({}, beta=1 - beta)",
    **{
        loss: f"{loss}({{}})"
        for loss in (
            "rkd_distance", "rkd_angle", "rkd_loss", "similarity_preserving", "gram_mse",
            "feature_mse", "feature_cosine", "attention_transfer",
        )
    },
}  # fmt: skip

_DOCSTRING = r"""{title}

    With :math:`p = \mathrm{{softmax}}(student / T)` and
    :math:`q = \mathrm{{softmax}}(teacher / T_{{teacher}})` the loss of a row is

    .. math:: T^2 {formula}

    {notes}

    One pass reads student and teacher and, where a gradient is wanted, writes it; nothing else of
    their size is held (on the CPU each thread keeps scratch memory of 12 bytes a class, 24 in
    float64, from call to call). All terms are computed so that nothing cancels when student and
    teacher agree: near convergence, where plain PyTorch in float32 has lost most digits of a
    divergence (at a loss of 5e-7), the relative error stays below 2e-4.

    Args:
        student: raw logits ``[*, V]``, any strides; float16, bfloat16, float32 or float64.
        teacher: raw logits ``[*, V]``; the dtype may differ. Probabilities go in as their logarithms,
            with ``teacher_temperature=1``. A constant: one that requires a gradient,
            while gradients are recorded, is an error.{both}{parameter}
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

    Logits of -inf are allowed and never give NaN: {extremes} A row without any possible class has
    loss 0 (the teacher's) or +inf (the student's) and gradient 0. A row of NaN or +inf gives NaN.
    The gradient has the student's dtype; it is computed in forward, except for float16 and
    ``"none"``, where backward computes it from the logits (in float16 it would vanish before a loss
    scaler could help). A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.
            The values of tensor temperatures and normalizers are checked on the CPU only; on
            other devices, where looking would cost a synchronisation, they propagate.

    Source: {source}
    """

_BOTH_LEARN = """ Where both sides
            learn, ``{}(a, b.detach())`` and ``{}(b, a.detach(){})`` have their gradients."""


def _logits_loss(divergence, student, teacher, options, called=None):
    """Checks what a logit loss is given, and hands it to the backend; called: by the user, where that is another."""
    called = called or divergence
    _check.logits_loss(student, teacher, options)
    exchanged, note = _EXCHANGED.get(called), ""
    if options.teacher_temperature is not options.temperature:
        exchanged = None if options.t_squared else exchanged  # it would multiply by the other temperature
        note = ", temperature and teacher_temperature exchanged"
    _check.constant_teacher(teacher, called, exchanged, note + ", without inplace" * options.inplace)
    backend = _backend.select(student.device)
    if backend == "torch":
        return reference.logits_loss(divergence, student, teacher, options)
    from .ops import rows

    return rows.logits_loss(_backend.namespace(backend), divergence, student, teacher, options)


def _logits_function(name, **documentation):
    """The loss of a divergence that has no parameter of its own."""

    def loss(
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
        if teacher_temperature is None:
            teacher_temperature = temperature
        options = LogitsOptions(
            temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, 0.0
        )  # fmt: skip
        return _logits_loss(name, student, teacher, options)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = _DOCSTRING.format(**{"parameter": "", "notes": "", "both": "", **documentation})
    return loss


kl_div = _logits_function(
    "kl_div",
    title="Kullback-Leibler divergence of the student from the teacher, both softened by a temperature.",
    formula=r"\sum_v q_v (\log q_v - \log p_v)",
    notes=r"and its gradient :math:`T (p - q)`.",
    both=_BOTH_LEARN.format("kl_div", "reverse_kl_div", ""),
    extremes="q = 0 contributes 0, p = 0 where q > 0 gives +inf.",
    source='Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.',
)
soft_cross_entropy = _logits_function(
    "soft_cross_entropy",
    title="Cross-entropy of the student with the teacher's distribution as soft labels.",
    formula=r"\left(-\sum_v q_v \log p_v\right)",
    notes="``kl_div`` plus the teacher's entropy: the gradient is the same, the loss does not go to 0.",
    extremes="q = 0 contributes 0, p = 0 where q > 0 gives +inf.",
    source='Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.',
)
reverse_kl_div = _logits_function(
    "reverse_kl_div",
    title="Kullback-Leibler divergence of the teacher from the student: it seeks the teacher's modes.",
    formula=r"\sum_v p_v (\log p_v - \log q_v)",
    notes=r"and its gradient :math:`T p (\log p - \log q - KL)`.",
    both=_BOTH_LEARN.format("reverse_kl_div", "kl_div", ""),
    extremes="p = 0 contributes 0; a class with q = 0 that the student can give makes the row's loss +inf, "
    "which has no gradient: the row's is 0.",
    source='Gu, Dong, Wei, Huang, "MiniLLM: Knowledge Distillation of Large Language Models", 2024.',
)


def js_div(
    student,
    teacher,
    *,
    beta=0.5,
    temperature=1.0,
    teacher_temperature=None,
    t_squared=True,
    mask=None,
    weight=None,
    reduction="batchmean",
    normalizer=None,
    inplace=False,
):
    _check.share("beta", beta)
    if teacher_temperature is None:
        teacher_temperature = temperature
    options = LogitsOptions(
        temperature, teacher_temperature, t_squared, mask, weight, reduction, normalizer, inplace, float(beta)
    )  # fmt: skip
    return _logits_loss(_JS_DIV_ENDS.get(beta, "js_div"), student, teacher, options, "js_div")


_JS_DIV_ENDS = {0: "kl_div", 1: "reverse_kl_div"}  # by beta


js_div.__doc__ = _DOCSTRING.format(
    title="Generalised Jensen-Shannon divergence between student and teacher.",
    formula=r"\left(\beta \sum_v q_v (\log q_v - \log m_v) + (1 - \beta) \sum_v p_v (\log p_v - \log m_v)\right), "
    r"\quad m = \beta q + (1 - \beta) p",
    notes="bounded by log 2 before T^2; symmetric at beta = 0.5. In float32 its relative error far from convergence\n"
    "    is about 1e-7 / min(beta, 1 - beta).",
    both=_BOTH_LEARN.format("js_div", "js_div", ", beta=1 - beta"),
    parameter="\n        beta: the teacher's share of the mixture, from 0 to 1. By convention 0 is ``kl_div`` and\n"
    "            1 is ``reverse_kl_div`` (the formula itself goes to 0 at both ends). Default 0.5.",
    extremes="a class that one side cannot give is like any other.",
    source='Agarwal et al., "On-Policy Distillation of Language Models" (GKD), 2024.',
)


_RELATIONAL = r"""{title}

    .. math:: {formula}

    {notes}

    Args:
        student: embeddings ``[N, D_s]``, any strides; float16, bfloat16, float32 or float64.
        teacher: embeddings ``[N, D_t]``; width and dtype may differ. A constant: one that requires a gradient, while
            gradients are recorded, is an error.{options}

    Returns:
        The loss, float64 where an input is float64, else float32. Of fewer than two samples 0.

    The gradient has the student's dtype; it is computed in forward. {equal} A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.
            Embeddings that are not finite are an error on the CPU where there is no mask; on other devices,
            where looking would cost a synchronisation, they give NaN.

    Source: {source}
    """
_RKD_SOURCE = 'Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.'
_RKD_EQUAL = "Equal samples have no gradient from each other."


_MASK_OPTION = """
        mask: bool ``[N]``, True: the row counts. The others are not there: N is the number of those that count,
            their gradient is 0, and they may hold anything. Default: every row counts."""
_ROW_OPTIONS = (
    _MASK_OPTION
    + """
        weight: float ``[N]``, multiplies the terms of row i; the divisor does not change."""
)


def _relational_loss(name, student, teacher, *options):
    """Hands a relational loss, whose arguments have been checked, to the backend."""
    if teacher is not None:
        _check.constant_teacher(teacher, name, _EXCHANGED.get(name))
    backend = _backend.select(student.device)
    if backend == "torch":
        with reference.without_autocast(student.device):
            return getattr(reference, name)(student, teacher, *options)
    from .ops import relations

    return getattr(relations, name)(_backend.namespace(backend), student, teacher, *options)


def rkd_distance(student, teacher, *, normalize="mean", delta=1.0, mask=None, weight=None):
    _check.embeddings(student, teacher, mask, weight)
    _check.normalize(normalize)
    _check.number("delta", delta)
    return _relational_loss("rkd_distance", student, teacher, normalize == "mean", float(delta), mask, weight)


rkd_distance.__doc__ = _RELATIONAL.format(
    title="Distance-wise relational distillation: the student's samples keep the teacher's relative distances.",
    formula=r"\frac{1}{N^2} \sum_{ij} \mathrm{Huber}_\delta"
    r"\left(\frac{d^s_{ij}}{\mu^s} - \frac{d^t_{ij}}{\mu^t}\right),\quad"
    r"d_{ij} = \sqrt{\max(\|x_i - x_j\|^2, 10^{-12})},\ d_{ii} = 0",
    notes="with the mean distance mu of different samples; the gradient flows through the student's mean.\n"
    "    No matrix [N, N] is held: beside the inputs a few arrays of their size and tiles of fixed size.",
    options="""
        normalize: ``"mean"``, the default: distances are divided by their mean; None: they are not.
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1."""
    + _MASK_OPTION
    + """
        weight: float ``[N]``, multiplies the terms ij of row i; neither the divisor nor mu changes.""",
    equal=_RKD_EQUAL,
    source=_RKD_SOURCE,
)


def rkd_angle(student, teacher, *, delta=1.0, mask=None):
    _check.embeddings(student, teacher, mask)
    _check.number("delta", delta)
    return _relational_loss("rkd_angle", student, teacher, float(delta), mask)


rkd_angle.__doc__ = _RELATIONAL.format(
    title="Angle-wise relational distillation: the student's triplets keep the teacher's angles.",
    formula=r"\frac{1}{N^3} \sum_{aik} \mathrm{Huber}_\delta(\psi^s_{aik} - \psi^t_{aik}),\quad"
    r"\psi_{aik} = \left\langle \frac{x_i - x_a}{\|x_i - x_a\|}, \frac{x_k - x_a}{\|x_k - x_a\|} \right\rangle",
    notes="the cosine at a of every triplet, 0 where a is i or k or equals one. O(N^2 D + N^3) work, no\n"
    "    tensor [N, N, N]: beside the inputs a few arrays of their size and strips [512, N] or [1024, N].",
    options="""
        delta: where Huber's loss turns from quadratic to linear, a positive number. Default 1."""
    + _MASK_OPTION,
    equal=_RKD_EQUAL,
    source=_RKD_SOURCE,
)


def rkd_loss(
    student, teacher, *, distance_weight=25.0, angle_weight=50.0, distance_delta=1.0, angle_delta=1.0, mask=None
):  # fmt: skip
    _check.embeddings(student, teacher, mask)
    _check.at_least_zero("distance_weight", distance_weight)
    _check.at_least_zero("angle_weight", angle_weight)
    _check.number("distance_delta", distance_delta)
    _check.number("angle_delta", angle_delta)
    options = (float(angle_weight), float(angle_delta), float(distance_weight), float(distance_delta))
    return _relational_loss("rkd_loss", student, teacher, *options, mask)


rkd_loss.__doc__ = _RELATIONAL.format(
    title="Relational distillation by distances and angles together, which share their work.",
    formula=r"w_d\, \mathrm{rkd\_distance} + w_a\, \mathrm{rkd\_angle}",
    notes="see :func:`rkd_distance` and :func:`rkd_angle`.",
    options="""
        distance_weight, angle_weight: finite numbers of at least 0; a loss of weight 0 is not computed.
            Defaults 25 and 50.
        distance_delta, angle_delta: where Huber's losses turn from quadratic to linear. Default 1."""
    + _MASK_OPTION,
    equal=_RKD_EQUAL,
    source=_RKD_SOURCE,
)


def similarity_preserving(student, teacher, *, mask=None, weight=None):
    _check.embeddings(student, teacher, mask, weight)
    return _relational_loss("similarity_preserving", student, teacher, mask, weight)


similarity_preserving.__doc__ = _RELATIONAL.format(
    title="Similarity-preserving distillation: samples that excite the teacher alike do so in the student.",
    formula=r"\frac{1}{N^2} \sum_i \left\| \frac{G^s_i}{\|G^s_i\|} - \frac{G^t_i}{\|G^t_i\|} \right\|^2,"
    r"\quad G = X X^T",
    notes="computed from products [N, D] x [D, D] where N is large, linear in N, else from blocks of rows of G:\n"
    "    the cheaper way. No matrix [N, N] is held.\n"
    "    Tensors of more dimensions are flattened by the caller, ``x.flatten(1)``.",
    options=_ROW_OPTIONS,
    equal="A row of zeros in G stays zero, and has no gradient.",
    source='Tung, Mori, "Similarity-Preserving Knowledge Distillation", 2019.',
)


def gram_mse(student, teacher, *, normalize=True, clamp=None, mask=None, weight=None):
    _check.batches_of_embeddings(student, teacher, mask, weight)
    _check.flag("normalize", normalize)
    _check.clamp(clamp)
    if clamp == "teacher":  # exchanged it would be the student's
        _check.constant_teacher(teacher)
    return _relational_loss("gram_mse", student, teacher, normalize, clamp, mask, weight)


gram_mse.__doc__ = (
    _RELATIONAL.format(
        title="Gram matrix distillation: similarities between samples, or between the patches of an image, are kept.",
        formula=r"\frac{1}{N^2} \sum_{ij} \left( \langle s_i, s_j \rangle - \langle t_i, t_j \rangle \right)^2",
        notes="of rows of length 1 (at least 1e-12; a row of zeros stays), or as they are. Computed from\n"
        "    products [N, D] x [D, D] where N is large, linear in N, else from blocks of rows: the cheaper way.\n"
        "    No matrix [N, N] is held. Of ``[B, N, D]``, dense features as those of vision transformers, it is the\n"
        "    mean over B.",
        options="""
        normalize: whether rows are divided by their length. Default True.
        clamp: ``"both"``: negative similarities count as 0; ``"teacher"``: the teacher's do; None, the default.
            With either, rows are compared with all others: O(N^2 D) work, the memory stays linear.
        mask: bool, one per row, ``[N]`` or ``[B, N]``; True: the row counts. The others are not there: N is the
            number of those that count, their gradient is 0, and they may hold anything. A batch's sample without
            any is not there either.
        weight: float, one per row, multiplies the terms ij of row i; the divisor does not change. Rows are then
            compared with all others, as with a clamp.""",
        equal="A row of zeros has no gradient.",
        source='Siméoni et al., "DINOv3", 2025, as Gram anchoring.',
    )
    .replace("embeddings ``[N, D_s]``,", "embeddings ``[N, D_s]`` or ``[B, N, D_s]``,")
    .replace("teacher: embeddings ``[N, D_t]``;", "teacher: embeddings ``[N, D_t]`` or ``[B, N, D_t]``;")
    .replace("Of fewer than two samples 0.", "Of no samples 0.")
)


def pkt(student, teacher, *, eps=1e-7, mask=None, weight=None):
    _check.embeddings(student, teacher, mask, weight)
    _check.eps(eps)
    return _relational_loss("pkt", student, teacher, float(eps), mask, weight)


pkt.__doc__ = _RELATIONAL.format(
    title="Probabilistic knowledge transfer: the student keeps the probabilities with which samples are alike.",
    formula=r"\frac{1}{N^2} \sum_{ij} t_{ij} \log \frac{t_{ij} + \epsilon}{s_{ij} + \epsilon},\quad"
    r"s_{ij} = \frac{\cos_{ij} + 1}{\sum_k (\cos_{ik} + 1)},\ "
    r"\cos_{ij} = \left\langle \frac{x_i}{\|x_i\| + \epsilon}, \frac{x_j}{\|x_j\| + \epsilon} \right\rangle",
    notes="of the student's embeddings, t of the teacher's. The sums over rows have a closed form, so one sweep over\n"
    "    half of the pairs makes loss and gradient, in strips of cosines. No matrix [N, N] is held.",
    options="""
        eps: what is added to probabilities and to the lengths of rows, a number of at least 1e-37. Default 1e-7,
            as published."""
    + _ROW_OPTIONS,
    equal="A row of zeros has no gradient.",
    source='Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", 2018.',
)


def relational_triplet(
    student, teacher=None, labels=None, *, margin=1.0, positives=None, mask=None, weight=None, return_active=False
):  # fmt: skip
    _check.triplet(student, teacher, labels, positives, mask, weight)
    _check.number("margin", margin)
    _check.flag("return_active", return_active)
    if labels is not None:
        teacher = None
    loss, active = _relational_loss(
        "relational_triplet", student, teacher, labels, positives or 0, float(margin), mask, weight
    )  # fmt: skip
    return (loss, active) if return_active else loss


relational_triplet.__doc__ = r"""Contrastive relations: similar samples are nearer than all others, by a margin.

    .. math:: \frac{1}{N} \sum_i \frac{1}{|neg(i)|} \sum_{j \in pos(i)} \sum_{k \in neg(i)}
        \max(0,\ margin + d_{ij} - d_{ik}),\quad d_{ij} = \sqrt{\max(\|s_i - s_j\|^2, 10^{-12})}

    of the student's distances. pos(i) are the other samples of i's label, or the nearest neighbours that i has in the
    teacher; neg(i) are all the rest. The loss is often printed with the signs of :math:`d_{ij}` and :math:`d_{ik}`
    exchanged; that form pushes similar samples apart, so this is the one that is computed.

    All triplets count, and none is held: distances are made strip by strip, and of a row all its triplets follow from
    ranks of its negatives among its positives. No tensor ``[N, N]`` is held, forward or backward.

    Args:
        student: embeddings ``[N, D_s]``, any strides; float16, bfloat16, float32 or float64.
        teacher: embeddings ``[N, D_t]``, whose nearest neighbours are the positives. A constant: one that requires a
            gradient, while gradients are recorded, is an error. Where there are labels they decide, and the teacher is
            not looked at.
        labels: integers ``[N]``, the class of each row.
        margin: a positive number. Default 1.
        positives: how many of the teacher's nearest neighbours, from 1 to N - 1; of equally near ones any. Default: 5,
            or N - 2 in batches of fewer than 7.
        mask: bool ``[N]``, True: the row counts. The others are not there: N is the number of those that count,
            their gradient is 0, and they may hold anything. Default: every row counts.
        weight: float ``[N]``, multiplies the terms of row i; the divisor does not change.
        return_active: whether the share of active triplets, those that have a loss, is returned as well: a float32
            tensor without dimensions, for which nothing waits. Default False.

    Returns:
        The loss, float64 where an input is float64, else float32; or (loss, share). A row without positives or without
        negatives has loss 0.

    The gradient has the student's dtype; it is computed in forward. Equal samples have no gradient from each other. A
    second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.
            Embeddings that are not finite are an error on the CPU where there is no mask; on other devices, where
            looking would cost a synchronisation, they give NaN.

    Source: Schroff et al., "FaceNet", 2015; of all triplets of a batch: Hermans et al., "In Defense of the Triplet
    Loss for Person Re-Identification", 2017.
    """


def _constant_relation_teacher(divergence, teacher, teacher_keys, same_temperature):
    exchanged = {"kl_div": '"reverse_kl_div"', "reverse_kl_div": '"kl_div"', "js_div": '"js_div", beta=1 - beta'}
    if teacher_keys is not None:
        _check.constant_teacher(teacher_keys, name="teacher_keys")
    if teacher_keys is not None or divergence not in exchanged:
        _check.constant_teacher(teacher)
    note = "" if same_temperature else ", temperature and teacher_temperature exchanged"
    _check.constant_teacher(teacher, "relation_kl", f"relation_kl({{}}, divergence={exchanged.get(divergence)})", note)


def relation_kl(
    student,
    teacher,
    *,
    temperature=1.0,
    teacher_temperature=None,
    divergence="kl_div",
    beta=0.5,
    normalize=False,
    student_keys=None,
    teacher_keys=None,
    mask=None,
    key_mask=None,
    weight=None,
):
    _check.relation(student, teacher, student_keys, teacher_keys, mask, key_mask, weight)
    _check.divergence(divergence, reference.DIVERGENCES)
    _check.share("beta", beta)
    _check.flag("normalize", normalize)
    _check.temperature("temperature", temperature, student)
    if teacher_temperature is None:
        teacher_temperature = temperature
    else:
        _check.temperature("teacher_temperature", teacher_temperature, student)
    _constant_relation_teacher(divergence, teacher, teacher_keys, teacher_temperature is temperature)
    exclude_self = student_keys is None
    if student_keys is student and teacher_keys is teacher:
        student_keys = teacher_keys = None
    elif student_keys is student:
        student_keys = student.view_as(student)
        key_mask = mask if key_mask is None else key_mask
    if divergence == "js_div":
        divergence = _JS_DIV_ENDS.get(beta, divergence)
    return _relational_loss(
        "relation_kl", student, teacher, student_keys, teacher_keys, exclude_self, normalize, divergence,
        float(beta), temperature, teacher_temperature, mask, key_mask, weight,
    )  # fmt: skip


relation_kl.__doc__ = r"""Divergence of student's and teacher's relations: a softmax over similarities for each sample.

    .. math:: \frac{1}{N} \sum_i \mathrm{KL}\left(q_i \,\|\, p_i\right),\quad
        p_i = \mathrm{softmax}_j \frac{\langle s_i, k^s_j \rangle}{\sqrt{D_s}\, T},\quad
        q_i = \mathrm{softmax}_j \frac{\langle t_i, k^t_j \rangle}{\sqrt{D_t}\, T_{teacher}}

    over the other samples, :math:`j \ne i`; or over keys, such as a queue or a memory bank. Of attention heads
    ``[B, H, L, D]`` it is the mean over B, H and L. With ``student_keys=student, teacher_keys=teacher`` a sample is
    compared with itself as well: MiniLMv2's loss is this one of queries, of keys and of values, or of the three
    stacked to ``[3, B, H, L, D]``.

    No tensor ``[N, M]`` is held, forward or backward: the similarities are made strip by strip, 2 N M (D_s + D_t)
    flops for the loss and 4 N M D_s for the gradient.

    Args:
        student: embeddings ``[*, N, D_s]``, any strides; float16, bfloat16, float32 or float64.
        teacher: embeddings ``[*, N, D_t]``; width and dtype may differ. A constant: one that requires a gradient, while
            gradients are recorded, is an error. Where both sides learn, and there are no keys, the same call with the
            two exchanged has the other's gradient: of ``"kl_div"`` with ``"reverse_kl_div"`` and the other way round,
            of ``"js_div"`` with ``beta=1 - beta``.
        temperature: T, a positive number, or a tensor that broadcasts to ``[*, N]``. Default 1. The loss is not
            multiplied by T**2.
        teacher_temperature: the teacher's own; default: ``temperature``.
        divergence: ``"kl_div"``, the default, ``"reverse_kl_div"``, ``"js_div"`` or ``"soft_cross_entropy"``, as the
            logit losses of these names.
        beta: of ``"js_div"``. Default 0.5.
        normalize: similarities are cosines over T: rows and keys are divided by their length (of at least 1e-12; a
            row of zeros has no gradient), and nothing by sqrt(D). Default False.
        student_keys, teacher_keys: ``[*, M, D_s]`` and ``[*, M, D_t]``, what rows are compared with. student_keys have
            a gradient where they require one, teacher_keys are constants as the teacher is. Default: the other rows.
        mask: bool, broadcastable to ``[*, N]``, True: the row counts. The others are not there: they have no loss
            and gradient 0, no row is compared with them, and they may hold anything.
        key_mask: bool, broadcastable to ``[*, M]``, True: rows are compared with the key. Default: with every one;
            without other keys, or with ``student_keys=student``, with those of ``mask``.
        weight: float, broadcastable to ``[*, N]``, multiplies the row's loss; the divisor, the number of rows that
            count, does not change.

    Returns:
        The loss, float64 where an input is float64, else float32. A row that is compared with nothing has loss 0.

    The gradient has the student's dtype; it is computed in forward. A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.
            Embeddings that are not finite are an error on the CPU where there is no mask; on other devices, where
            looking would cost a synchronisation, they give NaN.

    Source: Wang et al., "MiniLM", 2020, and "MiniLMv2", 2021; with keys and cosines: Fang et al., "SEED", 2021.
    """


def _feature_loss(feature, student, teacher, mask, weight, reduction, layer_weights, return_layers, dim):
    """Checks what a feature loss is given, and hands it to the backend."""
    listed = isinstance(student, (list, tuple))
    students, teachers = ([x] if isinstance(x, torch.Tensor) and not listed else x for x in (student, teacher))
    _check.features(students, teachers, dim)
    name = "feature_cosine" if feature == "cosine" else "feature_mse"
    for x in teachers:
        _check.constant_teacher(x, name, _EXCHANGED[name])
    dims = [_check.dim_of(x, dim) % x.dim() for x in students]
    masks = [] if mask is None else _check.per_layer("mask", mask, students, dim, _check.is_mask)
    weights = [] if weight is None else _check.per_layer("weight", weight, students, dim, _check._floating)
    _check.reduction(reduction)
    if layer_weights is None:
        layer_weights = [1.0] * len(students)
    else:
        _check.layer_weights(layer_weights, len(students))
    _check.flag("return_layers", return_layers)
    backend = _backend.select(students[0].device)
    arguments = (list(students), list(teachers), dims, masks, weights, reduction, [float(x) for x in layer_weights])
    if backend == "torch":
        loss, layers = reference.feature_loss(feature, *arguments)
    else:
        from .ops import elements

        loss, layers = elements.feature_loss(_backend.namespace(backend), feature, *arguments)
    if reduction == "none":
        shapes = [[*x.shape[:at], *x.shape[at + 1 :]] for x, at in zip(students, dims, strict=True)]
        parts = loss.split([x.numel() // x.shape[at] for x, at in zip(students, dims, strict=True)])
        rows = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        loss = rows if listed else rows[0]
    return (loss, layers) if return_layers else loss


_FEATURE = r"""{title}

    .. math:: {formula}

    {notes}

    One pass reads student and teacher and, where a gradient is wanted, writes it. Lists of tensors, one
    for each layer, are one call: one kernel on a GPU, one parallel region on the CPU.

    Args:
        student: features ``[*, D]``, or maps ``[B, C, H, W]`` whose features are the channels, in any
            memory format; or a list of these. float16, bfloat16, float32 or float64.
        teacher: the same shapes; dtypes may differ. A constant: one that requires a gradient, while gradients are
            recorded, is an error. Where both sides learn, the same call with the two exchanged has the other's
            gradient.{options}
        mask: bool, the shape without the features, True: the row counts. A masked row has loss 0 and
            gradient 0 whatever it holds. With lists one for all layers, or a list of one for each.
        weight: float, of the mask's shape, multiplies the row's loss; the divisor does not change.
        reduction: {reduction}
        layer_weights: finite numbers of at least 0, one for each layer, of its loss in the sum. Default 1.
        return_layers: also return each layer's own loss, without its weight, ``[layers]`` and detached.
        dim: where the features are. Default: 1 of tensors with four dimensions, which are taken for maps (attention
            heads ``[B, H, L, D]`` want ``dim=-1``), and the last of those with fewer. Five and more dimensions, such
            as video ``[B, C, T, H, W]``, want it said.

    Returns:
        The loss, float64 where an input is float64, else float32; with ``return_layers`` a pair. No rows,
        or none that counts: 0.

    The gradient has the student's dtype; it is computed in forward, except for float16 and ``"none"``,
    where backward computes it from the features. A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.

    Source: {source}
    """


def feature_mse(
    student,
    teacher,
    *,
    normalize=None,
    mask=None,
    weight=None,
    reduction="mean",
    layer_weights=None,
    return_layers=False,
    dim=None,
):
    _check.feature_normalize(normalize)
    feature = normalize or "squares"
    return _feature_loss(feature, student, teacher, mask, weight, reduction, layer_weights, return_layers, dim)


feature_mse.__doc__ = _FEATURE.format(
    title="Mean squared difference of features, of one layer or of all layers in one call.",
    formula=r"\frac{1}{N D} \sum_{nk} (\hat s_{nk} - \hat t_{nk})^2",
    notes=r"""with :math:`\hat x` the rows as they are, over their length, or standardized.""",
    options="""
        normalize: None, the default; ``"l2"``: rows over their length (of at least 1e-12; a row of zeros has
            no gradient); ``"standardize"``: rows less their mean, over sqrt(variance + 1e-6).""",
    reduction='``"mean"`` (sum / (rows that count x D), the default), ``"batchmean"`` (sum / rows that\n'
    '            count), ``"sum"`` or ``"none"`` (a loss per row; of lists a list).',
    source='Romero et al., "FitNets: Hints for Thin Deep Nets", 2015.',
)


def feature_cosine(
    student, teacher, *, mask=None, weight=None, reduction="mean", layer_weights=None, return_layers=False, dim=None
):
    return _feature_loss("cosine", student, teacher, mask, weight, reduction, layer_weights, return_layers, dim)


feature_cosine.__doc__ = _FEATURE.format(
    title="One minus the cosine between student's and teacher's features.",
    formula=r"\frac{1}{N} \sum_n \left(1 - \frac{\langle s_n, t_n \rangle}{\|s_n\| \|t_n\|}\right)",
    notes="computed as half the squared difference of rows of length 1, so that nothing cancels near convergence.\n"
    "    Lengths are of at least 1e-12; a row of zeros has no gradient, and a loss of 1/2 beside any other.",
    options="",
    reduction='``"mean"`` and ``"batchmean"`` (sum / rows that count, the default), ``"sum"`` or ``"none"`` (a\n'
    "            loss per row; of lists a list).",
    source='Sanh et al., "DistilBERT", 2019.',
)


def attention_transfer(student, teacher, *, p=2):
    _check.maps(student, teacher)
    _check.exponent("p", p)
    _check.constant_teacher(teacher, "attention_transfer", _EXCHANGED["attention_transfer"])
    backend = _backend.select(student.device)
    if backend == "torch":
        return reference.attention_transfer(student, teacher, float(p))
    from .ops import attention

    return attention.attention_transfer(_backend.namespace(backend), student, teacher, float(p))


attention_transfer.__doc__ = r"""Attention transfer: the student looks where the teacher looks.

    .. math:: \frac{1}{B H W} \sum_{bhw} \left(f^s_{bhw} - f^t_{bhw}\right)^2,\quad
        f = \frac{A}{\|A\|},\ A = \frac{1}{C} \sum_c |x_c|^p

    with the lengths of maps over H W, of at least 1e-12. What is summed over channels is never stored.

    Args:
        student: maps ``[B, C, H, W]``, in any memory format; float16, bfloat16, float32 or float64.
        teacher: maps ``[B, C, H, W]``; the number of channels and the dtype may differ. A constant: one that
            requires a gradient, while gradients are recorded, is an error. Where both sides learn, the same call
            with the two exchanged has the other's gradient.
        p: the power, a finite number of at least 1; whole ones up to 4 are fastest. Default 2.

    Returns:
        The loss, float64 where an input is float64, else float32. Of no samples 0.

    The gradient has the student's dtype; it is computed in forward, in float16 in backward. A map of zeros
    has none. A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.

    Source: Zagoruyko and Komodakis, "Paying More Attention to Attention", 2017.
    """


def linear_feature_mse(
    student,
    projector_weight,
    teacher,
    *,
    projector_bias=None,
    normalize=None,
    mask=None,
    weight=None,
    reduction="mean",
    dim=None,
):
    _check.projector(student, projector_weight, projector_bias, teacher, dim)
    _check.constant_teacher(teacher)
    _check.feature_normalize(normalize)
    rows = [teacher]  # what masks and weights are one per row of
    if mask is not None:
        (mask,) = _check.per_layer("mask", mask, rows, dim, _check.is_mask)
    if weight is not None:
        (weight,) = _check.per_layer("weight", weight, rows, dim, _check._floating)
    _check.reduction(reduction)
    dim = _check.dim_of(student, dim) % student.dim()
    feature, backend = normalize or "squares", _backend.select(student.device)
    arguments = (feature, student, projector_weight, projector_bias, teacher, dim, mask, weight, reduction)
    if backend == "torch":
        loss = reference.linear_feature_loss(*arguments)
    else:
        from .ops import elements

        loss = elements.linear_feature_loss(_backend.namespace(backend), *arguments)
    return loss.view([*student.shape[:dim], *student.shape[dim + 1 :]]) if reduction == "none" else loss


linear_feature_mse.__doc__ = r"""Mean squared difference of projected student features and a teacher's of another width.

    .. math:: \mathrm{feature\_mse}(student\, W^\top + b,\ teacher)

    with gradients to student, projector_weight and projector_bias, all by torch's matrix products. Of maps
    ``[B, C, H, W]`` the projector is a 1x1 convolution over the channels. Of the projected features only the
    residual is kept, in their own place.

    Args:
        student: features ``[*, D_s]``, or maps ``[B, D_s, H, W]`` in any memory format; float16, bfloat16, float32 or
            float64.
        projector_weight: W, ``[D_t, D_s]``, of the student's dtype (any under autocast).
        teacher: features ``[*, D_t]``, or maps ``[B, D_t, H, W]``; the dtype may differ. A constant: one that requires
            a gradient, while gradients are recorded, is an error.
        projector_bias: b, ``[D_t]``. Default: none.
        normalize, mask, weight, reduction, dim: as in :func:`feature_mse`.

    Returns:
        The loss, float64 where an input is float64, else float32.

    The residual has the dtype of the projection. A second derivative raises.

    Raises:
        TypeError, ValueError, RuntimeError: naming the argument, before anything is computed.

    Source: Romero et al., "FitNets: Hints for Thin Deep Nets", 2015.
    """
