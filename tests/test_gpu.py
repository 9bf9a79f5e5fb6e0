"""What only a GPU can show: nothing waits for it, graphs, streams, devices, and the choice of backend.

The numbers are tested with everyone's: test_rows.py runs its cases on cuda-gpu and triton-gpu.
"""

import cases
import pytest
import torch
from tolerances import FLOOR, error

import fastkd
from fastkd import _backend, functional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
BACKENDS = [name for name in ("cuda", "triton") if not _backend.unavailable(name)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastkd.backend(request.param):
        yield request.param


def logits(*shape, dtype=torch.bfloat16):
    student, teacher = torch.randn(*shape, device="cuda").to(dtype), torch.randn(*shape, device="cuda").to(dtype)
    return student.requires_grad_(), teacher


def test_the_choice_is_cuda():
    assert _backend.automatic("cuda") == BACKENDS[0]


@pytest.mark.parametrize("name", cases.LOSSES)
@pytest.mark.parametrize("V", [10, 1000, 50257, 128256])
def test_same_as_the_reference_end_to_end(backend, name, V):
    student, teacher = logits(16, V, dtype=torch.float32)
    loss = cases.LOSSES[name](student, teacher, temperature=2.0)
    (grad,) = torch.autograd.grad(0.5 * loss, student)
    with fastkd.backend("torch"):
        exact = student.detach().double().requires_grad_()
        right = cases.LOSSES[name](exact, teacher.double(), temperature=2.0)
        (right_grad,) = torch.autograd.grad(0.5 * right, exact)
    assert error(loss, right) < 40 * FLOOR[torch.float32]
    assert error(grad, right_grad) < 40 * FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_nothing_waits_for_the_device(backend, reduction, dtype):
    student, teacher = logits(64, 1000, dtype=dtype)
    mask, weight = torch.rand(64, device="cuda") < 0.7, torch.rand(64, device="cuda")
    normalizer = torch.tensor(5.0, device="cuda") if reduction != "none" else None

    def step():
        loss = functional.js_div(student, teacher, mask=mask, weight=weight, normalizer=normalizer, reduction=reduction)
        (loss * 0.5).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("V", [1000, 128256])
def test_a_graph_replays_the_step(backend, V, reduction):
    student, teacher = logits(8, V)
    mask = torch.ones(8, dtype=torch.bool, device="cuda")

    def step():
        student.grad = None
        loss = functional.kl_div(student, teacher, temperature=2.0, mask=mask, reduction=reduction).sum()
        (loss * 0.5).backward()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
        grad = student.grad
    with torch.no_grad():
        student.copy_(torch.randn_like(student))
        teacher.copy_(torch.randn_like(teacher))
        mask[3] = False
    graph.replay()
    found = loss.clone(), grad.clone()
    expected = step()
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], student.grad)


def test_the_current_stream_is_used(backend):
    student, teacher = logits(256, 32000)
    expected = functional.kl_div(student, teacher).detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = torch.zeros_like(student)
        torch.cuda._sleep(10_000_000)
        later.copy_(student)
        loss = functional.kl_div(later, teacher)
    stream.synchronize()
    assert torch.equal(loss.detach(), expected)


def test_the_same_bits_again(backend):
    student, teacher = logits(300, 32000)
    results = []
    for _ in range(3):
        loss = functional.js_div(student, teacher)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_one_gradient_of_memory_or_none(backend):
    N, V = 512, 32000
    student, teacher = logits(N, V)
    gradient = N * V * 2

    def peak(step):
        step()
        student.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before

    def train():
        (0.5 * functional.kl_div(student, teacher)).backward()

    assert peak(train) <= gradient + (1 << 20)
    copied = peak(student.clone)
    inplace = peak(lambda: torch.autograd.grad(functional.kl_div(made := student.clone(), teacher, inplace=True), made))
    assert inplace <= copied + (1 << 20)


def test_offsets_beyond_32_bits(backend):
    V, N = 32000, 70000  # N V > 2^31
    student = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    teacher = torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    loss = functional.kl_div(student, teacher, reduction="none")
    last = functional.kl_div(student[-3:].clone(), teacher[-3:].clone(), reduction="none")
    assert error(loss[-3:], last) < 4 * FLOOR[torch.float32]


def test_compile_fullgraph(backend):
    student, teacher = logits(32, 1000)
    compiled = torch.compile(lambda s, t: functional.js_div(s, t, temperature=2.0), fullgraph=True)
    assert torch.equal(compiled(student, teacher), functional.js_div(student, teacher, temperature=2.0))


def test_tensors_on_different_devices_are_an_error(backend):
    student, teacher = logits(4, 10)
    with pytest.raises(ValueError, match=r"^teacher: a tensor on the student's device"):
        functional.kl_div(student, teacher.cpu())


def test_the_cpu_backend_refuses_gpu_tensors():
    student, teacher = logits(4, 10)
    with (
        fastkd.backend("cpu"),
        pytest.raises(RuntimeError, match=r"^backend: 'cpu' was chosen, but the tensors are on cuda"),
    ):
        functional.kl_div(student, teacher)
