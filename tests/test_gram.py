"""gram_mse beyond what every relational loss is tested for: batches, masks, its two ways."""

import pytest
import relation_cases as cases
import torch
import torch.nn.functional as F
from conftest import gradcheck
from relation_checks import NEAR_CONVERGENCE, PROMISED, check, run
from relation_truth import TRUTH
from tolerances import FLOOR, error

import fastkd
from fastkd import functional
from fastkd.ops import gram

pytestmark = pytest.mark.products

CLAMPS = (None, "teacher", "both")


@pytest.fixture(params=["features", "samples", "few"])
def way(request, monkeypatch):
    """By products of features, or of samples; the latter in one op, where all pairs are one block."""
    monkeypatch.setattr(gram, "_by_features", lambda *_: request.param == "features")
    if request.param != "few":
        monkeypatch.setattr(gram, "are_few", lambda *_: False)
    return request.param


@pytest.mark.parametrize("block", [1, 40, 900, 2**19])
@pytest.mark.parametrize(("name", "case", "dtype"), [x for x in cases.each(cases.CASES) if x[0] == "gram_mse"], ids=str)
def test_both_ways(way, monkeypatch, name, case, dtype, block):
    monkeypatch.setattr(gram, "BLOCK", {"cpu": block, "cuda": block})
    check("cpu", name, case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [6, 300])
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_near_convergence(way, noise, N, dtype):
    """By features nearly all digits of the squares cancel."""
    generator = torch.Generator().manual_seed(N)
    teacher = torch.randn(N, 16, generator=generator).to(dtype)
    student = teacher + noise * torch.randn(N, 16, generator=generator).to(dtype)
    loss, grad = run(functional.gram_mse, student, teacher)
    loss_ref, grad_ref = TRUTH["gram_mse"](student, teacher)
    tolerance = max(NEAR_CONVERGENCE[dtype] * 1e-3 / noise, 8 * 2.0**-52 / loss_ref.item())
    assert error(loss, loss_ref) <= tolerance
    assert error(grad, grad_ref) <= tolerance


def test_takes_the_cheaper_way():
    assert gram._by_features(8192, 256, 256)
    assert gram._by_features(1000, 16, 16)
    assert not gram._by_features(64, 512, 512)
    assert not gram._by_features(256, 64, 2048)


def batch(dtype=torch.float32):
    student, teacher = torch.randn(3, 40, 6), torch.randn(3, 40, 9)
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("block", [1, 700, 4000, 2**19])
@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_batch_is_the_mean_of_its_samples(backend, way, monkeypatch, block, clamp, dtype):
    monkeypatch.setattr(gram, "BLOCK", {"cpu": block, "cuda": block})
    student, teacher = batch(dtype)
    loss, grad = run(functional.gram_mse, student, teacher, upstream=64.0, clamp=clamp)
    each = [run(functional.gram_mse, s, t, upstream=64.0, clamp=clamp) for s, t in zip(student, teacher, strict=True)]
    assert error(loss, torch.stack([x for x, _ in each]).mean()) <= PROMISED[torch.float32]
    assert error(grad, torch.stack([x.double() for _, x in each]) / 3) <= PROMISED[torch.float32] + 4 * FLOOR[dtype]


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_masked_rows_are_not_there(backend, way, dtype, normalize, clamp):
    """Whatever they hold; a sample without rows is not there either."""
    student, teacher = batch(dtype)
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[1] = False
    options = {"normalize": normalize, "clamp": clamp}
    hidden = student.masked_fill(~mask[..., None], torch.nan)
    loss, grad = run(
        functional.gram_mse, hidden, teacher.masked_fill(~mask[..., None], torch.inf), mask=mask, **options
    )
    each = [run(functional.gram_mse, student[b][mask[b]], teacher[b][mask[b]], upstream=0.5, **options) for b in (0, 2)]
    compute = torch.promote_types(dtype, torch.float32)
    assert error(loss, (each[0][0] + each[1][0]) / 2) <= PROMISED[compute]
    for b, (_, expected) in zip((0, 2), each, strict=True):
        assert error(grad[b][mask[b]], expected) <= PROMISED[compute] + 8 * FLOOR[dtype]
    assert not grad[~mask].any()
    one, _ = run(functional.gram_mse, hidden[0], teacher[0], mask=mask[0], **options)
    assert error(one, each[0][0]) <= PROMISED[compute]


def test_all_masked(backend):
    student = torch.full((2, 4, 3), torch.nan)
    loss, grad = run(functional.gram_mse, student, torch.randn(2, 4, 3), mask=torch.zeros(2, 4, dtype=torch.bool))
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 0, 4), (0, 4)], ids=str)
def test_no_samples(backend, shape):
    loss, grad = run(functional.gram_mse, torch.randn(shape), torch.randn(shape))
    assert loss == 0
    assert grad.shape == shape


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_one_sample_is_like_itself(backend, dtype):
    loss, grad = run(functional.gram_mse, torch.randn(1, 5).to(dtype), torch.randn(1, 4))
    assert loss <= 1e-12
    assert grad.double().norm() <= 1e-6
    loss, _ = run(functional.gram_mse, torch.zeros(1, 5), torch.randn(1, 4))
    assert error(loss, torch.tensor(1.0)) <= 1e-6


def test_equals_the_formula(backend):
    student, teacher = batch()
    s, t = (F.normalize(x, dim=-1) for x in (student, teacher))
    assert error(functional.gram_mse(student, teacher), F.mse_loss(s @ s.mT, t @ t.mT)) <= 1e-6
    plain = functional.gram_mse(student, teacher, normalize=False)
    assert error(plain, F.mse_loss(student @ student.mT, teacher @ teacher.mT)) <= 1e-6


@pytest.mark.parametrize("clamp", CLAMPS)
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3)], ids=str)
def test_gradcheck(backend, shape, clamp):
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher, mask = torch.randn(shape, dtype=torch.float64), torch.rand(shape[:-1]) < 0.8
    mask[..., 0] = True
    for normalize in (True, False):
        assert gradcheck(
            backend,
            lambda s, n=normalize: functional.gram_mse(s, teacher, normalize=n, clamp=clamp, mask=mask),
            student,
        )


S, T = torch.randn(4, 10), torch.randn(4, 6)
BAD = {
    "vector": ((S[0], T), {}, ValueError, r"student: embeddings of shape \[N, D\] or \[B, N, D\] wanted, got \[10\]"),
    "map": ((S, T[:, :, None, None]), {}, ValueError, "teacher: embeddings of shape"),
    "rows": ((S, T[:3]), {}, ValueError, r"teacher: the student's rows \[4\] wanted, got \[3\]"),
    "batch": ((S[None], T), {}, ValueError, r"teacher: the student's rows \[1, 4\] wanted, got \[4\]"),
    "features": ((S[:, :0], T), {}, ValueError, "student: at least one feature wanted"),
    "dtype": ((S, T.long()), {}, TypeError, "teacher: float16, .* embeddings wanted"),
    "nan": ((S / 0, T), {}, ValueError, "student: finite embeddings wanted"),
    "normalize": ((S, T), {"normalize": "l2"}, TypeError, "normalize: "),
    "clamp": ((S, T), {"clamp": True}, ValueError, "clamp: None, 'teacher' or 'both' wanted, got True"),
    "mask_shape": ((S, T), {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: a shape that broadcasts to \[4\] wanted"),
    "mask_dtype": ((S, T), {"mask": torch.ones(4)}, TypeError, "mask: torch.bool wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_bad_input(backend_name, name):
    tensors, options, kind, message = BAD[name]
    module = {option: value for option, value in options.items() if option != "mask"}
    with fastkd.backend(backend_name):
        with pytest.raises(kind, match=f"^{message}"):
            functional.gram_mse(*tensors, **options)
        with pytest.raises(kind, match=f"^{message}"):
            fastkd.GramMSELoss(**module)(*tensors, **{k: v for k, v in options.items() if k == "mask"})


def test_the_op_checks_its_own_contract():
    op = torch.ops.fastkd.gram_fwd
    for student, teacher in ((S, T[:3]), (S[0], T[0]), (S[None], T)):
        with pytest.raises(RuntimeError, match="student and teacher: embeddings"):
            op(student, teacher, True, 0, None, None, True)
    with pytest.raises(RuntimeError, match=r"teacher: float16, .* wanted, got torch.int64"):
        op(S, T.long(), True, 0, None, None, False)
