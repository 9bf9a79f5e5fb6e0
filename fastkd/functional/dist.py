r"""The DIST loss: the student's probabilities correlate with the teacher's, in place of being equal to them."""

from torch import Tensor

from .. import _backend, _check, _dtensor, _sharded_heads, reference
from .._types import Logits, ProcessGroup, WholeTeacher
from ..forms import LinearLogits, Probabilities, TopKLogProbs, logits_of, logits_of_rows
from ._logits_loss import beside_group, of_forms


def _dist_loss(student, teacher, options, dim):
    """Checks what the loss is given, and hands it to the backend."""
    if isinstance(student, LinearLogits) or isinstance(teacher, LinearLogits):
        student, teacher, group, mesh = _sharded_heads.of_ranks(student, teacher, options.group)
        loss = _checked_loss(student, teacher, options._replace(group=group), dim)
        return loss if mesh is None else _sharded_heads.replicated(loss, mesh)
    return _checked_loss(student, teacher, options, dim)


def _checked_loss(student, teacher, options, dim):
    """The same, of which heads are no DTensors that are split by classes."""
    if options.group is not None:
        beside_group("dist_loss", student, teacher, options)
    forms = of_forms(student, teacher, options, dim)
    if forms:  # in checks, and where only shape, dtype and device matter, tensors that hold nothing stand for them
        if isinstance(forms[1], TopKLogProbs):
            raise ValueError("teacher: dist_loss needs all classes of the teacher; TopKLogProbs know the best alone")
        student, teacher, dim = logits_of(forms[0]), logits_of(forms[1]), -1
    _check.class_dim(dim, student, teacher)
    if _dtensor.given(student, teacher, *options):
        return _dtensor.dist_loss(_dist_loss, student, teacher, options, dim)
    if dim != -1:  # views: the backends take any strides
        student, teacher = student.movedim(dim, -1), teacher.movedim(dim, -1)
    _check.dist_loss(student, teacher, options, dim, bool(forms))
    if not options.inplace:
        _check.not_overwritten(student)
    _check.constant_teacher(teacher, "dist_loss", "dist_loss({})", ", without inplace" * options.inplace)
    mask = _check.for_rows(options.mask, student.shape[:-1])
    if forms and isinstance(forms[1], Probabilities):
        _check.probabilities_teacher(forms[1], "dist_loss", student, options.num_classes, mask)
    options = options._replace(mask=mask)
    return _computed(*(forms or (student, teacher)), options, student.device)


def _computed(student, teacher, options, device):
    """The loss of what has been checked."""
    if isinstance(teacher, Tensor):
        teacher = teacher[..., : options.num_classes]
    backend = _backend.select(device)
    if options.group is not None:
        from .. import _split_classes

        return _split_classes.dist_loss(backend, student, teacher, options)
    if backend == "torch":
        sides = [logits_of_rows(x, options.mask) if isinstance(x, LinearLogits) else x for x in (student, teacher)]
        if isinstance(sides[1], Tensor):
            sides[1] = sides[1][..., : options.num_classes]
        return reference.dist_loss(*sides, options)
    from ..ops import dist, dist_forms

    logits = isinstance(student, Tensor) and isinstance(teacher, Tensor)
    return (dist if logits else dist_forms).dist_loss(_backend.namespace(backend), student, teacher, options)


def dist_loss(
    student: Logits,
    teacher: WholeTeacher,
    *,
    inter_weight: float = 1.0,
    intra_weight: float = 1.0,
    temperature: float = 1.0,
    eps: float = 1e-8,
    standardize: bool = False,
    dim: int = -1,
    num_classes: int | None = None,
    mask: Tensor | None = None,
    inplace: bool = False,
    group: ProcessGroup | None = None,
) -> Tensor:
    r"""One less the correlation of the student's probabilities with the teacher's, along rows and along columns.

    .. math:: T^2 \left(\frac{w_{inter}}{N} \sum_n \left(1 - \rho(p_{n\cdot}, q_{n\cdot})\right)
        + \frac{w_{intra}}{V} \sum_v \left(1 - \rho(p_{\cdot v}, q_{\cdot v})\right)\right),\quad
        \rho(x, y) = \frac{\langle a, b \rangle}{\|a\| \|b\| + \varepsilon}

    with :math:`p = \mathrm{softmax}(student / T)`, :math:`q = \mathrm{softmax}(teacher / T)`, and a and b for x and y
    less their means. A row's correlation says how the classes of one sample relate, a column's how the samples of one
    class do. The student may be more or less certain than the teacher at no cost.

    A row or column that is constant on either side has correlation 0 and no gradient: that of a class without any
    probability, all columns where one row counts, the rows of one class. What differs from its mean by no more than
    rounding errors is constant, and so is in float32 what is shorter than 1e-19. A row without any possible class has
    probability 0 for all.

    The published :math:`\varepsilon` of 1e-8 is no small number beside :math:`\|a\| \|b\|` where probabilities are
    tiny, as those of most of 100 000 tokens are: their columns have correlations near 0, and hardly a gradient,
    whatever the student does. A smaller ``eps`` or a higher temperature lets them count.

    What all losses of logits share stands in :mod:`fastkd.functional.logits`, but for this: there is one temperature
    for all rows and both sides; there is no weight, reduction or normalizer, as a column is of all rows at once; both
    forward and backward read student and teacher, which are saved for it, with 48 bytes a row and 12 a class (24 in
    float64), but no gradient; forward takes 72 bytes a class, and besides 44 for each thread of the CPU (88 in
    float64), or on a GPU 72 for each of 8 chunks of rows, or more where there are fewer than 8192 classes; DTensors
    have all rows on every rank.

    Args:
        student: raw logits ``[*, V]``, or :class:`fastkd.LinearLogits`, as the teacher may be. Of these each slab is
            made twice, forward and backward.
        teacher: raw logits ``[*, V]``, a constant. Where both learn, ``dist_loss(a, b.detach())`` and
            ``dist_loss(b, a.detach())`` have their gradients.
        inter_weight: what the mean over rows is multiplied by, at least 0. Default 1.
        intra_weight: what the mean over columns is multiplied by, at least 0. Default 1.
        temperature: T, a positive number. Default 1.
        eps: what is added to the product of lengths, at least 1e-37. Default 1e-8.
        standardize: whether each row of logits, of both sides, is first brought to mean 0 and standard deviation 1, as
            said above. Forward then holds both sides in the dtype of the loss until it ends. Default False.
        dim: where the classes are: 1 for maps ``[B, V, H, W]``. What ``[*]`` says here are the other dimensions then,
            in their order, ``[B, H, W]``. Default: the last.
        num_classes: how many classes count, the first ones of both sides, where heads are padded: widths may differ
            then, and the gradient of the other classes is 0. Default: all, of equal widths.
        mask: bool, broadcastable to ``[*]``, True where the row counts. A masked row is in no mean and in no column,
            and has gradient 0 whatever it holds. Default: every row counts.
        inplace: whether the gradient is written over the student's logits, in backward, which saves its memory. Such
            logits must not be a leaf, a later differentiable use of them raises in backward, and ``torch.compile`` is
            refused. Default False.
        group: a process group over which classes are split, as :mod:`fastkd.functional.logits` says. Thirteen numbers a
            row are exchanged forward, and one in the end; and one a row backward. Default: none.

    Returns:
        The loss, a tensor without dimensions.

    Raises:
        TypeError, ValueError, RuntimeError: an argument is not as described; the message names it.

    Example:
        >>> import torch
        >>> from fastkd.functional import dist_loss
        >>> student = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
        >>> teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
        >>> loss = dist_loss(student, teacher)
        >>> loss.backward()
        >>> round(loss.item(), 4), student.grad.shape
        (1.4249, torch.Size([2, 3]))

    Source: Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", 2022.
    """
    options = _check.DistOptions(
        inter_weight, intra_weight, temperature, eps, standardize, mask, inplace, num_classes, group
    )
    return _dist_loss(student, teacher, options, dim)
