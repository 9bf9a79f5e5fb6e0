"""Relational losses: values and gradients, and what their callers may rely on."""

import pytest
import torch
from tolerances import FLOOR, error

import fastkd
from fastkd import _backend, functional
from fastkd.ops import similarity

FLOAT32 = 5e-6  # of float32 inputs, in norm
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}


def truth(student, teacher):
    """Loss and gradient in float64, from the definition."""
    x, y = student.detach().double().requires_grad_(), teacher.double()

    def unit(rows):
        length = rows.square().sum(1, keepdim=True)
        return torch.where(length == 0, 0.0, rows / torch.where(length == 0, 1.0, length).sqrt())

    loss = (unit(x @ x.T) - unit(y @ y.T)).square().sum() / max(len(x), 1) ** 2
    (grad,) = torch.autograd.grad(loss, x)
    return loss.detach(), grad


def both(loss_function, student, teacher, upstream=1.0):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher)
    (grad,) = torch.autograd.grad(loss * upstream, student)
    return loss.detach(), grad


def embeddings(N, student_width, teacher_width, dtype=torch.float32):
    generator = torch.Generator().manual_seed(N + student_width)
    make = lambda D: torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return make(student_width), make(teacher_width)


SHAPES = {
    "one_sample": (1, 5, 3),  # cos = 1
    "two_samples": (2, 3, 4),
    "one_feature": (9, 1, 1),  # all of rank one: cos = +-1
    "few_samples": (17, 40, 70),  # by samples
    "many_samples": (300, 12, 20),  # by features
    "wide_teacher": (200, 8, 130),
    "wide_student": (200, 130, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_gradient(backend, shape, dtype):
    student, teacher = embeddings(*shape, dtype)
    upstream = 65536.0 if dtype is torch.float16 else 1.0  # else the gradient leaves float16's range
    loss, grad = both(functional.similarity_preserving, student, teacher, upstream)
    true_loss, true_grad = truth(student, teacher)
    assert loss.dtype == (torch.float64 if dtype is torch.float64 else torch.float32)
    assert (grad.dtype, grad.shape) == (dtype, student.shape)
    limit = 1e-12 if dtype is torch.float64 else FLOAT32
    size = max(true_loss.item(), 1e-3)
    assert (loss.double() - true_loss).abs() < limit * size
    if shape[0] > 1 and shape[1] > 1:  # else the gradient is 0
        assert error(grad.double() / upstream, true_grad) < limit + ROUNDING.get(dtype, 0)


@pytest.mark.parametrize(
    ("student_dtype", "teacher_dtype"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_dtypes_may_differ(backend, student_dtype, teacher_dtype):
    student, teacher = embeddings(30, 7, 9)
    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    loss, grad = both(functional.similarity_preserving, student, teacher)
    true_loss, true_grad = truth(student, teacher)
    assert error(loss, true_loss) < FLOAT32
    assert grad.dtype == student_dtype
    assert error(grad, true_grad) < FLOAT32 + ROUNDING.get(student_dtype, 0)


@pytest.mark.parametrize("way", ["_samples", "_features"])
@pytest.mark.parametrize("block", [1, 100, 10**6])
def test_both_ways_agree_in_blocks_of_any_size(monkeypatch, way, block):
    monkeypatch.setattr(similarity, "_by_features", lambda *_: way == "_features")
    monkeypatch.setattr(similarity, "SAMPLES_BLOCK", {"cpu": block, "cuda": block})
    monkeypatch.setattr(similarity, "FEATURES_BLOCK", {"cpu": block, "cuda": block})
    student, teacher = embeddings(60, 20, 33)
    loss, grad = both(functional.similarity_preserving, student, teacher)
    true_loss, true_grad = truth(student, teacher)
    assert error(loss, true_loss) < FLOAT32
    assert error(grad, true_grad) < FLOAT32


def test_the_cheaper_way_is_taken():
    assert not similarity._by_features(256, 512, 512)
    assert similarity._by_features(8192, 256, 256)


@pytest.mark.parametrize("N", [20, 500])
@pytest.mark.parametrize("noise", [1e-2, 1e-4])
def test_near_convergence(kernel, N, noise):
    """By features 2 - 2 cos would have no digit left in float32. The gradient is no worse than plain PyTorch's."""
    teacher, _ = embeddings(N, 24, 24)
    student = teacher + noise * torch.randn(N, 24, generator=torch.Generator().manual_seed(1))
    loss, grad = both(functional.similarity_preserving, student, teacher)
    true_loss, true_grad = truth(student, teacher)
    assert error(loss, true_loss) < 2e-4
    with fastkd.backend("torch"):
        _, plain = both(functional.similarity_preserving, student, teacher)
    assert error(grad, true_grad) < 2 * error(plain, true_grad) + FLOAT32


@pytest.mark.parametrize("N", [8, 200])
def test_samples_of_zeros(backend, N):
    student, teacher = embeddings(N, 6, 5)
    student[3], teacher[1:3] = 0, 0
    loss, grad = both(functional.similarity_preserving, student, teacher)
    true_loss, true_grad = truth(student, teacher)
    assert error(loss, true_loss) < FLOAT32
    assert error(grad, true_grad) < FLOAT32


@pytest.mark.parametrize("N", [6, 100])
def test_any_strides(backend, N):
    student, teacher = embeddings(N, 10, 12)
    expected = both(functional.similarity_preserving, student[:, ::2].contiguous(), teacher[:, 1:4].contiguous())
    got = both(functional.similarity_preserving, student[:, ::2], teacher[:, 1:4])
    turned = both(functional.similarity_preserving, student[:, ::2].T.contiguous().T, teacher[:, 1:4].T.contiguous().T)
    for loss, grad in (got, turned):
        assert error(loss, expected[0]) < FLOAT32
        assert error(grad, expected[1]) < FLOAT32


def test_no_samples(backend):
    student = torch.empty(0, 4, requires_grad=True)
    loss = functional.similarity_preserving(student, torch.empty(0, 3))
    loss.backward()
    assert loss == 0
    assert student.grad.shape == (0, 4)


def test_equal_inputs_give_nothing(backend):
    teacher, _ = embeddings(100, 6, 6)
    loss, grad = both(functional.similarity_preserving, teacher, teacher)
    assert loss.abs() < 1e-12
    assert grad.norm() < 1e-8


def test_same_bits_again(kernel):
    student, teacher = embeddings(300, 12, 20)
    first, again = (both(functional.similarity_preserving, student, teacher) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("N", [20, 400])
def test_float16_gradient_survives_until_the_loss_scaler(kernel, N):
    student, teacher = embeddings(N, 8, 8, torch.float16)
    _, grad = both(functional.similarity_preserving, student, teacher, upstream=65536.0)
    _, true_grad = truth(student, teacher)
    assert error(grad.double() / 65536, true_grad) < 2 * ROUNDING[torch.float16]


def test_upstream_and_two_backwards(kernel):
    student, teacher = embeddings(50, 6, 7)
    student.requires_grad_()
    _, expected = truth(student, teacher)
    loss = functional.similarity_preserving(student, teacher) * 0.5
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, student, retain_graph=True)
        assert error(grad, 0.5 * expected) < FLOAT32
    assert error(torch.autograd.grad(loss, student)[0], 0.5 * expected) < FLOAT32


def test_second_derivative_raises(kernel):
    student, teacher = embeddings(5, 6, 7)
    student.requires_grad_()
    loss = functional.similarity_preserving(student, teacher)
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        (grad.square().sum() + student.sum()).backward()


def test_the_teacher_is_a_constant(backend):
    student, teacher = embeddings(5, 6, 7)
    student.requires_grad_()
    teacher.requires_grad_()
    functional.similarity_preserving(student, teacher).backward()
    assert teacher.grad is None
    with torch.inference_mode():
        made_here = teacher.detach() + 0
    assert functional.similarity_preserving(student, made_here).requires_grad
    with torch.no_grad():
        assert not functional.similarity_preserving(student, teacher).requires_grad


@pytest.mark.parametrize("N", [4, 40])
def test_gradcheck(backend, N):
    student, teacher = embeddings(N, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda s: functional.similarity_preserving(s, teacher), student.requires_grad_())


@pytest.mark.parametrize("N", [4, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("save", [True, False])
def test_opcheck(N, dtype, save):
    torch.library.opcheck(similarity.FWD, (*embeddings(N, 5, 3, dtype), save))


def test_compiled_and_exported():
    torch._dynamo.reset()
    compiled = torch.compile(functional.similarity_preserving, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((40, 8, 6), (300, 12, 20), (5, 60, 70)):
        student, teacher = embeddings(*shape)
        loss, grad = both(functional.similarity_preserving, student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(
        fastkd.SimilarityPreservingLoss(), embeddings(10, 5, 6), dynamic_shapes=({0: batch}, {0: batch})
    )
    student, teacher = embeddings(70, 5, 6)
    assert torch.equal(program.module()(student, teacher), functional.similarity_preserving(student, teacher))


def test_meta_tensors_have_shapes():
    student = torch.empty(4, 5, device="meta", requires_grad=True)
    loss = functional.similarity_preserving(student, torch.empty(4, 6, device="meta"))
    loss.backward()
    assert (loss.shape, student.grad.shape) == ((), (4, 5))


def test_module_equals_function(backend):
    student, teacher = embeddings(30, 7, 9)
    assert torch.equal(
        fastkd.SimilarityPreservingLoss()(student, teacher), functional.similarity_preserving(student, teacher)
    )


X, Y = torch.randn(6, 4), torch.randn(6, 3)
BAD = {
    "student_is_no_tensor": (None, Y, TypeError, "student"),
    "student_1d": (X[0], Y, ValueError, "student"),
    "teacher_3d": (X, Y[None], ValueError, "teacher"),
    "numbers_of_samples_differ": (X, Y[:5], ValueError, "teacher"),
    "no_features": (X[:, :0], Y, ValueError, "student"),
    "integer_student": (X.long(), Y, TypeError, "student"),
    "complex_teacher": (X, Y.cfloat(), TypeError, "teacher"),
    "sparse_teacher": (X, Y.to_sparse(), TypeError, "teacher"),
    "devices_differ": (X, Y.to("meta"), ValueError, "teacher"),
    "nan_student": (torch.full((6, 4), torch.nan), Y, ValueError, "student"),
    "infinite_teacher": (X, Y / 0, ValueError, "teacher"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_error_names_the_argument(name, backend_name):
    student, teacher, raised, argument = BAD[name]
    with fastkd.backend(backend_name), pytest.raises(raised, match=rf"^{argument}: .*wanted"):
        functional.similarity_preserving(student, teacher)


def test_the_torch_backend_is_the_reference():
    student, teacher = embeddings(30, 7, 9)
    with fastkd.backend("torch"):
        assert _backend.select(student.device) == "torch"
        loss = functional.similarity_preserving(student, teacher)
    assert error(loss, functional.similarity_preserving(student, teacher)) < FLOAT32
