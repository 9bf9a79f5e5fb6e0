"""What only a GPU can show: nothing waits for it, graphs, streams, devices, and the choice of backend.

The numbers are tested with everyone's: test_rows.py and its like run their cases on cuda-gpu and
triton-gpu. Here are those of sizes that the host is too slow for.
"""

import cases
import pytest
import relation_cases
import torch
from gpu_tools import BACKENDS, peak_extra_bytes, replayed, without_waiting
from relation_checks import PROMISED
from tolerances import FLOOR, error

import fastkd
from fastkd import _backend, functional

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastkd.backend(request.param):
        yield request.param


def logits(*shape, dtype=torch.bfloat16):
    student, teacher = torch.randn(*shape, device="cuda").to(dtype), torch.randn(*shape, device="cuda").to(dtype)
    return student.requires_grad_(), teacher


def embeddings(N, width=64, teacher_width=48, dtype=torch.bfloat16):
    student, teacher = (torch.randn(N, D, device="cuda").to(dtype) for D in (width, teacher_width))
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

    without_waiting(step)


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

    def change():
        student.copy_(torch.randn_like(student))
        teacher.copy_(torch.randn_like(teacher))
        mask[3] = False

    found = replayed(step, student, change)
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

    def train():
        (0.5 * functional.kl_div(student, teacher)).backward()

    assert peak_extra_bytes(train, student) <= gradient + (1 << 20)
    copied = peak_extra_bytes(student.clone, student)
    inplace = peak_extra_bytes(
        lambda: torch.autograd.grad(functional.kl_div(made := student.clone(), teacher, inplace=True), made), student
    )
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


# Relations between samples

RELATIONS = relation_cases.LOSSES


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("N", [20, 300])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", RELATIONS)
def test_no_relation_waits_for_the_device(backend, name, masked, N, dtype):
    student, teacher = embeddings(N, dtype=dtype)
    mask = (torch.arange(N) % 3 > 0).cuda() if masked else None

    def step():
        (RELATIONS[name](student, teacher, mask=mask) * 0.5).backward()

    without_waiting(step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", RELATIONS)
def test_a_graph_replays_relations(backend, name, dtype):
    """What it was captured on has one spread of distances, what it is replayed on another."""
    student, teacher = embeddings(200, dtype=dtype)

    def step():
        student.grad = None
        loss = RELATIONS[name](student, teacher)
        (loss * 0.5).backward()
        return loss

    def change():
        student.copy_(torch.randn_like(student))
        student[:20] *= 1000

    loss, grad = replayed(step, student, change)
    assert error(loss, step()) <= FLOOR[torch.float32]
    assert error(grad, student.grad) <= FLOOR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "N"), [("rkd_distance", 5000), ("rkd_angle", 1100), ("rkd_loss", 300)])
def test_relations_give_the_same_bits_again(backend, name, N, dtype):
    student, teacher = embeddings(N, dtype=dtype)
    results = []
    for _ in range(3):
        loss = RELATIONS[name](student, teacher)
        results.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("name", "N", "width"),
    # all multiprocessors busy; features for several blocks of threads; a sum in many parts; the angles of
    # many features, and of more rows than are taken together in float64
    [("rkd_distance", 4100, 64), ("rkd_distance", 1000, 900), ("rkd_distance", 200, 130), ("rkd_angle", 250, 600),
     ("rkd_angle", 520, 20)],
)  # fmt: skip
def test_large_relations_match_float64(backend, name, N, width, dtype):
    student, teacher = embeddings(N, width, 48, dtype)
    loss = RELATIONS[name](student, teacher)
    (grad,) = torch.autograd.grad(loss, student)
    with fastkd.backend("torch"):
        exact = student.detach().double().requires_grad_()
        right = RELATIONS[name](exact, teacher.double())
        (right_grad,) = torch.autograd.grad(right, exact)
    assert error(loss, right) <= PROMISED[dtype]
    assert error(grad, right_grad) <= PROMISED[dtype]


def test_angles_of_several_blocks_match_float64(backend):
    """More rows than are taken together in float32; too many for the reference."""
    student, teacher = embeddings(1100, dtype=torch.float32)
    results = []
    for s, t in ((student, teacher), (student.detach().double().requires_grad_(), teacher.double())):
        loss = functional.rkd_angle(s, t)
        results.append((loss, *torch.autograd.grad(loss, s)))
    for out, ref in zip(*results, strict=True):
        assert error(out, ref) <= PROMISED[torch.float32]


@pytest.mark.parametrize("N", [16384, 65536])
def test_distances_take_memory_linear_in_the_samples(backend, N):
    """A matrix N x N of float32 would be 1 GiB, and 16 GiB."""
    D = 128
    student, teacher = embeddings(N, D, D)
    used = peak_extra_bytes(lambda: functional.rkd_distance(student, teacher).backward(), student)
    assert used <= 16 * N * D * 4 + (64 << 20)


def test_angles_take_memory_linear_in_the_samples(backend):
    """N x N x N of float32 would be 4 GiB; a constant number of matrices of 1024 x 1024 is allowed."""
    student, teacher = embeddings(1024, 512, 512, torch.float32)
    used = peak_extra_bytes(lambda: functional.rkd_angle(student, teacher).backward(), student)
    assert used <= 16 * student.numel() * 4 + (256 << 20)


def test_relations_use_the_current_stream(backend):
    student, teacher = embeddings(300)
    expected = functional.rkd_loss(student, teacher).detach()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = torch.zeros_like(student)
        torch.cuda._sleep(10_000_000)
        later.copy_(student)
        loss = functional.rkd_loss(later, teacher)
    stream.synchronize()
    assert torch.equal(loss.detach(), expected)
