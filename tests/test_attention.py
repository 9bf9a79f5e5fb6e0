"""attention_transfer: values and gradients against float64."""

import pytest
import torch
import torch.nn.functional as F
from conftest import gradcheck
from tolerances import FLOOR, error

from fastkd import functional

PROMISED = {torch.float32: 2e-6, torch.float64: 2e-13, torch.bfloat16: 2e-6, torch.float16: 2e-6}
SHAPES = {
    "odd": ((2, 7, 5, 9), 7),
    "channels_differ": ((3, 40, 7, 7), 12),
    "many_positions": ((1, 3, 50, 60), 5),
    "many_channels": ((2, 1100, 3, 1), 4),
    "one_channel": ((2, 1, 3, 4), 1),
}


def truth(student, teacher, p, upstream=1.0):
    x = student.detach().double().requires_grad_()

    def attention(x):
        return F.normalize(x.abs().pow(p).mean(1).flatten(1), dim=1)

    loss = (attention(x) - attention(teacher.double())).square().mean()
    return loss.detach(), torch.autograd.grad(loss * upstream, x)[0]


def run(student, teacher, p=2, upstream=1.0):
    student = student.detach().requires_grad_()
    loss = functional.attention_transfer(student, teacher, p=p)
    return loss.detach(), torch.autograd.grad(loss * upstream, student)[0]


def maps(shape, teacher_channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    B, _, H, W = shape
    student = torch.randn(shape, generator=generator)
    return student.to(dtype), torch.randn(B, teacher_channels, H, W, generator=generator).to(dtype)


def check(student, teacher, p=2, upstream=1.0):
    loss, grad = run(student, teacher, p, upstream)
    loss_ref, grad_ref = truth(student, teacher, p, upstream)
    wide = torch.float64 in (student.dtype, teacher.dtype)
    assert loss.dtype == (torch.float64 if wide else torch.float32)
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert error(loss, loss_ref) <= PROMISED[student.dtype]
    step = 2.0**-25 * grad.numel() ** 0.5 / grad_ref.norm().item() if student.dtype is torch.float16 else 0.0
    assert error(grad, grad_ref) <= PROMISED[student.dtype] + 2 * FLOOR[student.dtype] + step


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_matches_float64(backend, shape, dtype):
    check(*maps(*shape, dtype), upstream=256.0)


@pytest.mark.parametrize("p", [1, 3, 4, 2.5])
def test_powers(backend, p):
    student, teacher = maps((2, 7, 5, 9), 7)
    student[0, :, 1, 1] = 0
    check(student, teacher, p)


@pytest.mark.parametrize("layout", ["channels_last", "student_channels_last", "transposed", "slice"])
def test_any_layout(backend, layout):
    student, teacher = maps((2, 12, 5, 6), 8)
    if layout == "transposed":
        student, teacher = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (student, teacher))
    elif layout == "slice":
        student, teacher = F.pad(student, (1, 2))[..., 1:-2], F.pad(teacher, (1, 2))[..., 1:-2]
    else:
        student = student.to(memory_format=torch.channels_last)
        teacher = teacher.to(memory_format=torch.channels_last) if layout == "channels_last" else teacher
    check(student, teacher)


def test_dtypes_may_differ(backend):
    student, teacher = maps((2, 6, 4, 4), 3)
    check(student.bfloat16(), teacher, upstream=256.0)
    check(student.half(), teacher.bfloat16(), upstream=256.0)
    loss, _ = run(student, teacher.double())
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("factor", [1e25, 1e-3])
def test_any_scale(backend, factor):
    student, teacher = maps((2, 6, 4, 4), 3)
    check(factor * student, teacher)


def test_a_map_of_zeros(backend):
    student, teacher = maps((3, 6, 4, 4), 3)
    student[1], teacher[2] = 0, 0
    loss, grad = run(student, teacher)
    loss_ref, grad_ref = truth(student, teacher, 2)
    assert error(loss, loss_ref) <= 2e-6
    assert not grad[1].any()
    assert error(grad, grad_ref) <= 2e-6


def test_near_convergence(backend):
    student, teacher = maps((2, 16, 5, 5), 16)
    loss, grad = run(teacher + 1e-3 * student, teacher)
    loss_ref, grad_ref = truth(teacher + 1e-3 * student, teacher, 2)
    assert error(loss, loss_ref) <= 1e-3
    assert error(grad, grad_ref) <= 1e-3


def test_gradcheck_and_no_samples(backend):
    student = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    assert gradcheck(backend, lambda s: functional.attention_transfer(s, teacher), student)
    loss, grad = run(torch.randn(0, 3, 2, 2), torch.randn(0, 4, 2, 2))
    assert loss == 0
    assert grad.shape == (0, 3, 2, 2)


def test_same_bits_whatever_the_threads(threads):
    student, teacher = maps((3, 20, 40, 40), 10)
    found = []
    for n in (1, 2, 3):
        threads(n)
        found.append(run(student, teacher))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])
