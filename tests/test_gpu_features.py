"""The feature losses where only a GPU can show it: see test_gpu.py."""

import re

import feature_cases
import pytest
import torch
from gpu_tools import BACKENDS, peak_extra_bytes, replayed, without_waiting
from tolerances import FLOOR, error

import fastkd
from fastkd import functional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastkd.backend(request.param):
        yield request.param


FEATURES = {**feature_cases.LOSSES, "attention_transfer": functional.attention_transfer}


def features(*shape, dtype=torch.bfloat16):
    student, teacher = (torch.randn(shape, device="cuda").to(dtype) for _ in range(2))
    return student.requires_grad_(), teacher


def layers(count, dtype=torch.bfloat16, widths=(96, 128, 160)):
    pairs = [features(8, 16, widths[i % len(widths)], dtype=dtype) for i in range(count)]
    return [s for s, _ in pairs], [t for _, t in pairs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", feature_cases.LOSSES)
def test_no_feature_loss_waits_for_the_device(backend, name, masked, dtype):
    students, teachers = layers(5, dtype)
    options = {"mask": torch.rand(8, 16, device="cuda") < 0.5} if masked else {}

    def step():
        loss, each = FEATURES[name](students, teachers, return_layers=True, **options)
        ((loss + each.sum()) * 0.5).backward()

    without_waiting(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_attention_and_projectors_do_not_wait(backend, dtype):
    student, teacher = features(4, 30, 14, 14, dtype=dtype)
    hidden, target = features(40, 24), features(40, 56)[1]
    projector = torch.randn(56, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.rand(40, device="cuda") < 0.5

    def step():
        (functional.attention_transfer(student, teacher) * 0.5).backward()
        (functional.linear_feature_mse(hidden, projector, target, mask=mask) * 0.5).backward()

    without_waiting(step)


@pytest.mark.parametrize("count", [1, 24])
@pytest.mark.parametrize("name", feature_cases.LOSSES)
def test_one_launch_for_all_layers(backend, name, count):
    """One of forward beside the small one that adds up, and one of backward; in Triton for layers of one shape."""
    students, teachers = layers(count, widths=(96, 128, 160) if backend == "cuda" else (128,))

    def step():
        (FEATURES[name](students, teachers) * 0.5).backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [event.name for event in profile.events()]
    for expected in (r"\b(features|flat)_kernel\b", r"\bscale_kernel\b"):
        assert sum(bool(re.search(expected, kernel)) for kernel in kernels) == 1, kernels


@pytest.mark.parametrize("name", FEATURES)
def test_a_graph_replays_features(backend, name):
    student, teacher = features(4, 32, 14, 14)

    def step():
        student.grad = None
        loss = FEATURES[name](student, teacher)
        (loss * 0.5).backward()
        return loss

    loss, grad = replayed(step, student, lambda: student.copy_(torch.randn_like(student)))
    assert error(loss, step()) <= FLOOR[torch.float32]
    assert error(grad, student.grad) <= FLOOR[torch.bfloat16]


@pytest.mark.parametrize(
    "shape", [(4096, 1000), (300, 20003), (64, 256, 28, 28), (4, 2048, 7, 7), (2, 3, 700, 700)], ids=str
)
@pytest.mark.parametrize("name", FEATURES)
def test_large_features_match_float64_in_one_gradient_of_memory(backend, name, shape):
    """And give the same bits again."""
    if name == "attention_transfer" and len(shape) == 2:
        shape = (1, *shape, 1)
    student, teacher = features(*shape, dtype=torch.float32)
    results = []
    for _ in range(2):
        loss = FEATURES[name](student, teacher)
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with fastkd.backend("torch"):
        exact = student.detach().double().requires_grad_()
        right = FEATURES[name](exact, teacher.double())
        (right_grad,) = torch.autograd.grad(right, exact)
    assert error(results[0][0], right) <= 2e-6
    assert error(results[0][1], right_grad) <= 2e-6
    of_maps = 16 * student.numel() // student.shape[1] if name == "attention_transfer" else 0
    used = peak_extra_bytes(lambda: FEATURES[name](student, teacher).backward(), student)
    assert used <= student.numel() * 4 + of_maps + (2 << 20)


def test_features_use_the_current_stream(backend):
    student, teacher = features(64, 300)
    expected = functional.feature_mse(student, teacher, normalize="l2").detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = torch.zeros_like(student)
        torch.cuda._sleep(10_000_000)
        later.copy_(student)
        loss = functional.feature_mse(later, teacher, normalize="l2")
    stream.synchronize()
    assert torch.equal(loss.detach(), expected)
