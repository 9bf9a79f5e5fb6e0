"""What the tests of LinearLogits share: inputs, the loss of whole logits, and a comparison of both."""

import functools

import torch
from tolerances import FLOOR, error

import fastkd
from fastkd import LinearLogits, functional
from fastkd._divergences import BY_NAME, TARGET_LOSSES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEADING, V = (3, 7), 45
N = 21
TARGET = (torch.arange(N) * 17 % (V - 6)).reshape(LEADING)
TARGET[1, 2] = -100
WITH_TARGET = ("kd_loss", *TARGET_LOSSES)
LOSSES = {name: getattr(functional, name) for name in BY_NAME}
LOSSES |= {name: functools.partial(getattr(functional, name), target=TARGET) for name in WITH_TARGET}
SIDES = ("both", "student", "teacher")
ROWS = torch.rand(LEADING, generator=torch.Generator().manual_seed(0))
MASK = ROWS < 0.6
SMALL = 8 * V * 8  # a slab of eight rows, of sixteen in float32
OPTIONS = {
    "plain": {},
    "masked": {"mask": MASK, "reduction": "none"},
    "of_rows": {"temperature": 0.5 + ROWS, "teacher_temperature": 2.0, "weight": 1 + ROWS},
    "standardized": {"standardize": True, "normalizer": 3.0},
    "num_classes": {"num_classes": V - 6, "mask": MASK},
}


def inputs(dtype=torch.float32, leading=LEADING, seed=0, V=V, size=1.0, H=(12, 20)):
    """Hidden states, weights and biases of student and teacher, in float64 but rounded to a dtype."""
    generator = torch.Generator().manual_seed(seed)
    sides = []
    for width in H:
        hidden, weight, bias = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((*leading, width), (V, width), (V,))
        )
        sides.append([x.to(dtype) for x in (hidden, size * weight / width**0.5, bias)])
    return sides


FORMS = ({"scale": 0.7, "softcap": 3.0, "slab_bytes": SMALL}, {"slab_bytes": SMALL // 2})


def run(loss_function, student, teacher, sides="both", forms=FORMS, upstream=None, **options):
    """The loss, and the gradients of what the student is made of. sides: which are LinearLogits."""
    student = [x.detach().clone().requires_grad_() for x in student]
    of_student, of_teacher = (LinearLogits(*x, **form) for x, form in zip((student, teacher), forms, strict=True))
    if sides == "student":
        of_teacher = of_teacher.logits()
    if sides == "teacher":
        of_student = of_student.logits()
    loss = loss_function(of_student, of_teacher, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)


def whole(loss_function, student, teacher, dtype, forms=FORMS, **options):
    """The same by plain PyTorch, of whole logits in another dtype."""

    def of_logits(of_student, of_teacher, **options):
        with fastkd.backend("torch"):
            return loss_function(of_student.logits(), of_teacher.logits(), **options)

    student, teacher = ([x.to(dtype) for x in side] for side in (student, teacher))
    return run(of_logits, student, teacher, forms=forms, **options)


def check(loss_function, student, teacher, sides="both", forms=FORMS, **options):
    """Loss and gradients are as near to the truth as twice those of whole logits in float32 are, and roundings."""
    dtype = student[0].dtype
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    found = run(loss_function, student, teacher, sides, forms, **options)
    truth, eager = (whole(loss_function, student, teacher, x, forms, **options) for x in (torch.float64, compute))
    assert found[0].dtype == compute
    assert error(found[0], truth[0]) <= 2 * error(eager[0], truth[0]) + 2 * FLOOR[compute]
    for name, x, right, of_eager, like in zip(
        ("hidden", "weight", "bias"), found[1], truth[1], eager[1], student, strict=True
    ):
        assert (x.dtype, x.shape) == (like.dtype, like.shape)
        # a gradient of logits that is rounded once for the products, and a product that is
        rounding = 2 * FLOOR[dtype] if dtype.itemsize == 2 else 4 * FLOOR[dtype]
        assert error(x, right) <= 2 * error(of_eager, right) + rounding, name
    return found
