"""Values and gradients of the relational losses, against float64."""

import pytest
import relation_cases as cases
import torch
from conftest import cpu_levels
from relation_cases import DTYPES, LOSSES
from relation_checks import HALF_OPERANDS, MODULES, NEAR_CONVERGENCE, NOTHING, PROMISED, check, rounding, run
from relation_truth import TRUTH, published
from tolerances import FLOOR, error

from fastkd import functional
from fastkd._dtypes import compute_dtype
from fastkd.ops import similarity

pytestmark = pytest.mark.products


@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.CASES), ids=str)
def test_matches_float64(backend, name, case, dtype):
    check(backend, name, case, dtype)


@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.NEAR, PROMISED), ids=str)
def test_near_convergence(backend, name, case, dtype):
    assert case.truth(name, dtype)[0] < 1e-6
    check(backend, name, case, dtype, NEAR_CONVERGENCE)


@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.NOTHING), ids=str)
def test_nothing_to_learn(backend, name, case, dtype):
    student, teacher = case.inputs(dtype)
    loss, grad = run(LOSSES[name], student, teacher)
    assert (loss.dtype, grad.dtype, grad.shape) == (compute_dtype(student, teacher), dtype, student.shape)
    # of pkt a rounding of probabilities counts 1e-7 times, by its eps
    assert loss.abs() <= NOTHING[loss.dtype] ** 2 + (1e-7 * NOTHING[loss.dtype] if name == "pkt" else 0.0)
    assert grad.double().norm() <= NOTHING[loss.dtype]
    if len(student) < 2:
        assert loss == 0
        assert not grad.any()


@pytest.mark.parametrize("backend", cpu_levels(), indirect=True)
@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.LARGE, PROMISED), ids=str)
def test_many_samples(backend, name, case, dtype):
    check(backend, name, case, dtype)


@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.float32, torch.float64), (torch.float64, torch.float16), (torch.bfloat16, torch.float32),
     (torch.float16, torch.bfloat16), (torch.float32, torch.float16), (torch.float16, torch.float64)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", LOSSES)
def test_dtypes_and_widths_may_differ(backend, name, dtype, teacher_dtype):
    student, teacher = cases.MIXED.inputs(dtype, teacher_dtype)
    loss, grad = run(LOSSES[name], student, teacher)
    loss_ref, grad_ref = cases.MIXED.truth(name, dtype, teacher_dtype)
    compute = compute_dtype(student, teacher)
    assert (loss.dtype, grad.dtype) == (compute, dtype)
    half = 0.0
    if backend.startswith(("cuda", "triton")) and compute == torch.float32:
        half = max(HALF_OPERANDS.get(x, 0.0) for x in (dtype, teacher_dtype))
    assert error(loss, loss_ref) <= PROMISED[compute] + half
    assert error(grad, grad_ref) <= PROMISED[compute] + rounding(grad, grad_ref, compute) + half


@pytest.mark.parametrize("shape", [(7, 5, 9), (21, 12, 12)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_published_code(backend, name, shape):
    N, width, teacher_width = shape
    generator = torch.Generator().manual_seed(N)
    student = torch.randn(N, width, generator=generator, dtype=torch.float64)
    teacher = 2 * torch.randn(N, teacher_width, generator=generator, dtype=torch.float64)
    loss_ref, grad_ref = published(name, student, teacher)
    for out in (run(LOSSES[name], student, teacher), TRUTH[name](student, teacher)):
        assert error(out[0], loss_ref) <= 1e-12
        assert error(out[1], grad_ref) <= 1e-12
    loss, grad = run(LOSSES[name], student.float(), teacher.float())
    assert error(loss, loss_ref) <= PROMISED[torch.float32]
    assert error(grad, grad_ref) <= PROMISED[torch.float32]


def test_values_by_hand(backend):
    """A right-angled triangle 3-4-5 against an equilateral one, and the unit vectors of a plane."""
    student = torch.tensor([[0.0, 0], [3, 0], [0, 4]])
    teacher = torch.tensor([[0.0, 0], [2, 0], [1, 3**0.5]])
    # distances / mean: 3/4, 1, 5/4 against 1; six ordered pairs of nine
    assert functional.rkd_distance(student, teacher).item() == pytest.approx(4 / 16 / 2 / 9, rel=1e-6)
    # cosines 0, 3/5, 4/5 against 1/2, each of two ordered triples of 27
    squares = 0.5**2 + 0.1**2 + 0.3**2
    assert functional.rkd_angle(student, teacher).item() == pytest.approx(2 * squares / 2 / 27, rel=1e-6)
    # similarities: the identity against all ones, in rows of length 1
    equal = functional.similarity_preserving(torch.eye(2), torch.ones(2, 3)).item()
    assert equal == pytest.approx(2 * ((1 - 0.5**0.5) ** 2 + 0.5) / 4, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "rkd_loss"])
def test_equal_samples_have_no_gradient_from_each_other(backend, name, dtype):
    """Exactly none, where all are equal; the published code has NaN, or a million."""
    student = torch.tensor([[0.1, -3.7, 1e3]]).expand(11, 3).to(dtype)
    loss, grad = run(LOSSES[name], student, torch.randn(11, 4))
    assert loss > 0
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "relational_triplet"])
def test_a_student_that_is_its_teacher(backend, name, dtype):
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    loss, grad = run(LOSSES[name], x, x.clone())
    assert 0 <= loss <= 1e-12
    assert grad.double().norm() <= 1e-6


# similarity_preserving's ways


@pytest.fixture(params=["features", "samples", "few"])
def way(request, monkeypatch):
    """By products of features, or of samples; the latter in one op, where all pairs are one block."""
    monkeypatch.setattr(similarity, "_by_features", lambda *_: request.param == "features")
    if request.param != "few":
        monkeypatch.setattr(similarity, "are_few", lambda *_: False)
    return request.param


@pytest.mark.parametrize("block", [1, 40, 2**19])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in cases.CASES if "similarity_preserving" in case.losses], ids=str
)  # fmt: skip
def test_similarity_both_ways(way, monkeypatch, case, dtype, block):
    for name in ("SAMPLES_BLOCK", "FEATURES_BLOCK"):
        monkeypatch.setattr(similarity, name, {"cpu": block, "cuda": block})
    check("cpu", "similarity_preserving", case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("N", [6, 300])
@pytest.mark.parametrize("noise", [1e-3, 1e-5])
def test_similarity_near_convergence(way, noise, N, dtype):
    """By features 1 - cos is far below a rounding of 1 in float32."""
    generator = torch.Generator().manual_seed(N)
    teacher = torch.randn(N, 16, generator=generator).to(dtype)
    student = teacher + noise * torch.randn(N, 16, generator=generator).to(dtype)
    loss, grad = run(functional.similarity_preserving, student, teacher)
    loss_ref, grad_ref = TRUTH["similarity_preserving"](student, teacher)
    tolerance = max(NEAR_CONVERGENCE[dtype] * 1e-3 / noise, 4 * 2.0**-52 / (loss_ref.item() * N / 2))
    assert error(loss, loss_ref) <= tolerance
    assert error(grad, grad_ref) <= tolerance


def test_similarity_takes_the_cheaper_way():
    assert similarity._by_features(8192, 256, 256)
    assert similarity._by_features(1000, 16, 16)
    assert not similarity._by_features(64, 512, 512)
    assert not similarity._by_features(256, 64, 2048)


# rkd_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weights", [(25.0, 50.0), (1, 0.5), (3.0, 0), (0, 2.0), (0.0, 0.0)], ids=str)
def test_rkd_loss_is_the_weighted_sum(backend, weights, dtype):
    student, teacher = cases.MIXED.inputs(dtype)
    distance, angle = weights
    options = {"distance_delta": 0.4, "angle_delta": 0.8}
    loss, grad = run(
        functional.rkd_loss, student, teacher, distance_weight=distance, angle_weight=angle, **options
    )  # fmt: skip
    by_distance = run(functional.rkd_distance, student, teacher, delta=0.4)
    by_angle = run(functional.rkd_angle, student, teacher, delta=0.8)
    for out, d, a in zip((loss, grad), by_distance, by_angle, strict=True):
        assert error(out, distance * d + angle * a) <= 4 * FLOOR[dtype]
    if not any(weights):
        assert loss == 0
        assert not grad.any()


def test_rkd_loss_has_the_published_weights(backend):
    student, teacher = cases.MIXED.inputs(torch.float32)
    loss, grad = run(functional.rkd_loss, student, teacher)
    again = run(functional.rkd_loss, student, teacher, distance_weight=25, angle_weight=50)
    assert torch.equal(loss, again[0])
    assert torch.equal(grad, again[1])
    assert error(loss, cases.MIXED.truth("rkd_loss", torch.float32)[0]) <= PROMISED[torch.float32]


# Layout


def laid_out(kind, x):
    """The same values, laid out differently."""
    if kind == "transposed":
        return x.T.contiguous().T
    if kind == "every_other_feature":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[:, ::2]
    if kind == "slice":
        return torch.cat([x[:, :1], x, x], 1)[:, 1 : 1 + x.shape[1]]
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # misaligned


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["transposed", "every_other_feature", "slice", "misaligned"])
@pytest.mark.parametrize("name", LOSSES)
def test_any_strides(backend, name, kind, dtype):
    student, teacher = cases.MIXED.inputs(dtype)
    plain = run(LOSSES[name], student, teacher)
    for s, t in ((laid_out(kind, student), teacher), (student, laid_out(kind, teacher))):
        loss, grad = run(LOSSES[name], s, t)
        assert error(loss, plain[0]) <= 4 * FLOOR[loss.dtype]
        assert error(grad, plain[1]) <= 4 * FLOOR[dtype]


@pytest.mark.parametrize("name", LOSSES)
def test_expanded_embeddings(backend, name):
    """Stride 0: one sample for all, and one feature for all."""
    row, column, other = torch.randn(1, 6), torch.randn(9, 1), torch.randn(9, 4)
    column += column.sign()  # a gradient's rounding error is that of unit rows over the row's length
    if name == "pkt":  # opposite samples, whose probability is what rounding leaves of 0
        column = column.abs()
    for x in (row.expand(9, 6), column.expand(9, 6)):
        for ours, compact in ((run(LOSSES[name], x, other), run(LOSSES[name], x.clone(), other)),
                              (run(LOSSES[name], other, x), run(LOSSES[name], other, x.clone()))):  # fmt: skip
            assert error(ours[0], compact[0]) <= 4 * FLOOR[torch.float32]
            assert (ours[1] - compact[1]).norm() <= 1e-6


# Modules


@pytest.mark.parametrize("name", LOSSES)
def test_module_equals_function(backend, name):
    student, teacher = torch.randn(9, 5), torch.randn(9, 4)
    options = getattr(MODULES[name], "keywords", {})
    module = MODULES[name]()
    ours, function = run(module, student, teacher), run(LOSSES[name], student, teacher, **options)
    assert torch.equal(ours[0], function[0])
    assert torch.equal(ours[1], function[1])
    for option, value in options.items():
        assert f"{option}={value!r}" in repr(module)
    assert not list(module.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_module_has_the_functions_defaults(name):
    student, teacher = torch.randn(9, 5), torch.randn(9, 4)
    module = getattr(MODULES[name], "func", MODULES[name])()
    assert torch.equal(module(student, teacher), LOSSES[name](student, teacher))
