"""What the tests of autograd, torch.compile and torch.export share."""

import functools

import pytest
import relation_cases
import torch

from fastkd import _backend, functional

without_triton = pytest.mark.skipif(bool(_backend.unavailable("triton")), reason=_backend.unavailable("triton"))
if torch.cuda.is_available():  # these tests have CPU tensors, which Triton takes under its interpreter only
    without_triton = pytest.mark.skip(reason="Triton computes on the GPU here; test_gpu.py has these")


def both(function, student, teacher, *rest):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, *rest)
    (grad,) = torch.autograd.grad((loss * 0.5).sum(), student)
    return loss.detach(), grad


# Each dtype with the backend whose graph is quickest to compile, each backend with one dtype.
COMPILED = [
    *(("cpu", dtype) for dtype in (torch.float32, torch.float16)),
    pytest.param("cpu", torch.bfloat16, marks=pytest.mark.long),
    ("torch", torch.float32),
    pytest.param("triton", torch.bfloat16, marks=without_triton),
]


def compiler_of(backend_name):
    """Of plain PyTorch's graphs it is the tracing that is ours; inductor would take a minute for its own operators."""
    return "aot_eager" if backend_name == "torch" else "inductor"


# The relational losses, and some of them with other options.
RELATIONAL = {
    **relation_cases.LOSSES,
    "rkd_distance_plain": functools.partial(functional.rkd_distance, normalize=None, delta=0.6),
    "rkd_angle_clamped": functools.partial(functional.rkd_angle, delta=0.2),
    "rkd_loss_clamped": functools.partial(functional.rkd_loss, distance_weight=2, distance_delta=0.3, angle_delta=0.3),
}
