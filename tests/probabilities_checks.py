"""What the tests of Probabilities share: inputs, the losses by their definition, and a comparison of both."""

import literal
import torch
from rows_checks import storage_error
from tolerances import FLOOR, error

from fastkd import Probabilities, functional

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEADING, V = (3, 7), 40
GENERATED = torch.rand(LEADING, generator=torch.Generator().manual_seed(0))
MASK = GENERATED < 0.6
TARGET = torch.arange(21).reshape(LEADING) * 17 % (V - 8)
TARGET[1, 2] = -100
LOSSES = {name: getattr(functional, name) for name in literal.ROWS}
# whether the teacher's temperature is the one that the probabilities were taken at
OPTIONS = {
    "plain": {},
    "masked": {"mask": MASK, "reduction": "none"},
    "at_2": {"temperature": 2.0, "own": 2.0, "weight": 1 + GENERATED},
    "softened": {"temperature": 0.5 + GENERATED, "teacher_temperature": 3.0},
    "some_softened": {"teacher_temperature": torch.where(MASK, 1.0, 3.0)},
    "num_classes": {"num_classes": V - 8, "mask": MASK, "normalizer": 3.0, "t_squared": False, "temperature": 2.0},
}
PARAMETERS = {
    "js_div": [{"beta": 0.2}, {"beta": GENERATED}],
    "symmetric_kl_div": [{"student_weight": 0.9}, {"student_weight": GENERATED}],
    "skew_kl_div": [{"alpha": 0.4}, {"alpha": GENERATED}],
    "skew_reverse_kl_div": [{"alpha": 0.4}, {"alpha": GENERATED}],
    "alpha_beta_div": [{"alpha": 1.2, "beta": 0.3}, {"alpha": 0.1 + GENERATED, "beta": 0.5}],
    "adaptive_kl_div": [{"mu": 0.3}, {"mu": 0.7}],
}


def inputs(dtype=torch.float32, sums="any", leading=LEADING, V=V):
    """A student's logits, and what is given of the teacher: rows that sum to 1, or to anything, also with zeros."""
    generator = torch.Generator().manual_seed(V)
    student = 2 * torch.randn(*leading, V, generator=generator, dtype=torch.float64)
    teacher = (2 * torch.randn(*leading, V, generator=generator, dtype=torch.float64)).softmax(-1)
    if sums != "one":
        teacher = teacher * (0.3 + 1.4 * torch.rand(*leading, 1, generator=generator, dtype=torch.float64))
    if sums == "zeros":
        teacher[..., 1::3] = 0
    return student.to(dtype), teacher.to(dtype)


def truth(name, student, teacher, own=1.0, upstream=None, **options):
    """Loss and gradient in float64, from the definition."""
    student = student.detach().double().requires_grad_()
    parameters = {key: options.pop(key) for key in ("alpha", "beta", "student_weight", "mu") if key in options}
    parameters = {key: x.double()[..., None] if isinstance(x, torch.Tensor) else x for key, x in parameters.items()}
    z, q = student[..., : options.get("num_classes")], teacher.double()[..., : options.get("num_classes")]
    mask = options.get("mask", torch.ones(z.shape[:-1], dtype=torch.bool))
    z = torch.where(mask[..., None], z, 0.0)
    T = torch.as_tensor(options.get("temperature", 1.0)).expand(z.shape[:-1])[..., None]
    of_teacher = torch.as_tensor(options.get("teacher_temperature", T.squeeze(-1))).expand(z.shape[:-1])[..., None]
    softened = q ** (own / of_teacher.double())
    q = torch.where(of_teacher == own, q, softened / softened.sum(-1, keepdim=True))
    lp = (z / T.double()).log_softmax(-1)
    rows = literal.ROWS[name](lp.exp(), q, lp, torch.where(q == 0, 1e-300, q).log(), **parameters)
    rows = rows * (T.squeeze(-1).double() ** 2 if options.get("t_squared", True) else 1.0) * options.get("weight", 1.0)
    rows = torch.where(mask, rows, 0.0)
    loss = rows if options.get("reduction") == "none" else rows.sum() / options.get("normalizer", mask.sum())
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), torch.autograd.grad(loss, student, upstream)[0]


def run(loss, student, teacher, own=1.0, upstream=None, **options):
    leaf = student.detach().clone().requires_grad_()
    found = loss(leaf, Probabilities(teacher, temperature=own), **options)
    upstream = torch.ones_like(found) if upstream is None else upstream.to(found.dtype)
    return found.detach(), torch.autograd.grad(found, leaf, upstream)[0]


def check(name, student, teacher, times=32, **options):
    loss, grad = run(LOSSES[name], student, teacher, **options)
    right, of_right = truth(name, student, teacher, **options)
    compute = torch.float64 if student.dtype is torch.float64 else torch.float32
    assert loss.dtype == compute
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert error(loss, right) <= times * FLOOR[compute]
    assert error(grad, of_right) <= times * FLOOR[compute] + storage_error(grad, of_right)
