"""Values and gradients of the relational losses, against float64."""

import functools

import pytest
import relation_cases as cases
import torch
from conftest import cpu_levels
from relation_cases import DTYPES, LOSSES
from relation_truth import TRUTH, published
from tolerances import FLOOR, error

import fastkd
from fastkd import _check, functional
from fastkd._dtypes import compute_dtype
from fastkd.ops import similarity

pytestmark = pytest.mark.products

# A BLAS may add up D products in any order: the sum is off by at most D u times their magnitudes, u = 2^-24 or 2^-53,
# and by about sqrt(D) u, as roundings fall on both sides. The widths here are at most 130, so that this is 130 u and 11 u;
# each step after it adds a few u. 5e-6 is 80 u: seven times what any order gives, and less than the worst that one could.
# In float64 1e-12 is 9000 u, as d^2 of pairs that are just not near is off by up to 2^8 times more: 11 u 2^8 = 2800 u.
PROMISED = {torch.float32: 5e-6, torch.float64: 1e-12}
# The loss is a square of differences: of a loss of 1e-6 they are 1e-3 of the relations, whose own 11 u and more count
# 1000 times: 7e-4 in float32, and 1e-12 (and 3e-10 of a pair that is just not near, as few are) in float64.
NEAR_CONVERGENCE = {torch.float32: 1e-3, torch.float64: 1e-10}
NOTHING = {torch.float32: 1e-6, torch.float64: 1e-14}
# Of a loss: kernels for GPUs multiply what half precision holds of centred embeddings.
HALF_OPERANDS = {torch.float16: 1e-3, torch.bfloat16: 4e-3}


def run(loss_function, student, teacher, upstream=1.0, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student, torch.full_like(loss, upstream))
    return loss.detach(), grad


def rounding(grad, ref, compute):
    """Of a gradient to its dtype, relative to its norm: twice, and float16's smallest step."""
    if grad.dtype == compute or not ref.numel():
        return 0.0
    step = 2.0**-25 if grad.dtype == torch.float16 else 0.0
    return 2 * FLOOR[grad.dtype] + step * ref.numel() ** 0.5 / max(ref.norm().item(), 1e-30)


def check(backend, name, case, dtype, promised=PROMISED):
    student, teacher = case.inputs(dtype)
    loss, grad = run(LOSSES[name], student, teacher, **case.options_of(name))
    loss_ref, grad_ref = case.truth(name, dtype)
    compute = compute_dtype(student, teacher)
    assert (loss.dtype, loss.shape) == (compute, ())
    assert (grad.dtype, grad.shape) == (dtype, student.shape)
    promised = promised[compute]
    if name == "rkd_angle" and compute == torch.float64:
        promised *= case.spread
    on_gpu = backend.startswith(("cuda", "triton")) and name not in cases.SIMILARITIES
    assert error(loss, loss_ref) <= promised + (HALF_OPERANDS.get(dtype, 0.0) if on_gpu else 0.0)
    assert error(grad, grad_ref) <= promised + rounding(grad, grad_ref, compute)


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


# Gradients


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_again(kernel, name):
    student, teacher = cases.Case("again", "", 19, (19, 8)).inputs(torch.float32)
    first, again = run(LOSSES[name], student, teacher), run(LOSSES[name], student.clone(), teacher.clone())
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])


@pytest.mark.parametrize("N", [70, 300, 1100])
@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "rkd_loss"])
def test_same_bits_whatever_the_threads(threads, name, N):
    if N > 600 and name != "rkd_distance":
        N = 600
    student, teacher = cases.Case("threads", "", N, (24, 8)).inputs(torch.float32)
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        results.append(run(LOSSES[name], student, teacher))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@pytest.mark.parametrize("name", ["rkd_distance", "rkd_angle", "rkd_loss"])
def test_float16_gradients_survive_a_loss_scaler(backend, name):
    """Gradients below float16's smallest number times 2^16 are numbers again."""
    case = cases.Case("scaled", "", 20, (8, 8), lambda s, t: ((2e4 * s).clamp(-6e4, 6e4), t))
    student, teacher = case.inputs(torch.float16)
    options = {"distance_weight": 0.1, "angle_weight": 0.1} if name == "rkd_loss" else {}
    _, grad_ref = TRUTH[name](student, teacher, **options)
    assert error(grad_ref.half(), grad_ref) > 0.05  # or this test is too easy
    _, grad = run(LOSSES[name], student, teacher, 2.0**16, **options)
    assert error(grad, grad_ref * 2.0**16) <= 2 * FLOOR[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_upstream_gradient_is_applied(backend, name, dtype):
    student, teacher = cases.MIXED.inputs(dtype)
    _, plain = run(LOSSES[name], student, teacher)
    step = 2.0**-22 * plain.numel() ** 0.5 if dtype is torch.float16 else 0.0
    for factor in (0.5, 0.0, -3.0):
        _, grad = run(LOSSES[name], student, teacher, factor)
        assert (grad.double() - plain.double() * factor).norm() <= 2 * FLOOR[dtype] * abs(
            factor
        ) * plain.double().norm() + step


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_retained_graph_gives_the_same_again(backend, name, dtype, factor):
    student, teacher = cases.MIXED.inputs(dtype)
    student.requires_grad_()
    loss = LOSSES[name](student, teacher) * factor
    grads = [torch.autograd.grad(loss, student, retain_graph=again)[0] for again in (True, True, False)]
    assert grads[0].any()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_accumulate(backend, name):
    student, teacher = torch.randn(6, 5, requires_grad=True), torch.randn(6, 4)
    LOSSES[name](student, teacher).backward()
    once = student.grad.clone()
    LOSSES[name](student, teacher).backward()
    assert torch.equal(student.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_without_a_gradient_the_loss_is_the_same(backend, name, dtype):
    student, teacher = cases.MIXED.inputs(dtype)
    expected, _ = run(LOSSES[name], student, teacher)
    student.requires_grad_()
    with torch.no_grad():
        without = LOSSES[name](student, teacher)
    with torch.inference_mode():
        inference = LOSSES[name](student, teacher)
    for loss in (without, inference):
        assert not loss.requires_grad
        assert error(loss, expected) <= 4 * FLOOR[torch.float32]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_teacher_and_mask_made_in_inference_mode(backend, name, masked):
    student = torch.randn(9, 5)
    with torch.inference_mode():
        teacher, mask = torch.randn(9, 4), torch.arange(9) != 2
    options = {"mask": mask} if masked else {}
    loss, grad = run(LOSSES[name], student, teacher, **options)
    expected = run(LOSSES[name], student, teacher.clone(), **{key: x.clone() for key, x in options.items()})
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_are_not_changed(backend, name):
    student, teacher = torch.randn(9, 5) + 10, torch.randn(9, 5) + 10
    before = student.clone(), teacher.clone()
    run(LOSSES[name], student, teacher)
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in LOSSES), ("rkd_distance", {"normalize": None}), ("rkd_distance", {"delta": 0.1})],
    ids=str,
)
def test_nan_and_inf_propagate(backend, monkeypatch, name, options, side, value):
    """On devices where looking would cost a synchronisation; never a number that is wrong."""
    monkeypatch.setattr(_check.arguments, "values_known", lambda _: False)
    student, teacher = torch.randn(9, 5), torch.randn(9, 4)
    (student if side == "student" else teacher)[4, 2] = value
    loss, grad = run(LOSSES[name], student, teacher, **options)
    if backend == "torch" and ("normalize" in options or name == "relational_triplet"):  # infinite distances
        assert not loss.isfinite()
        return
    assert loss.isnan()
    assert grad.isnan().all()


# Modules

MODULES = {
    "rkd_distance": functools.partial(fastkd.RKDDistanceLoss, normalize=None, delta=0.3),
    "rkd_angle": functools.partial(fastkd.RKDAngleLoss, delta=0.3),
    "rkd_loss": functools.partial(
        fastkd.RKDLoss, distance_weight=2.0, angle_weight=3.0, distance_delta=0.3, angle_delta=0.4
    ),
    "similarity_preserving": fastkd.SimilarityPreservingLoss,
    "gram_mse": functools.partial(fastkd.GramMSELoss, normalize=False, clamp="both"),
    "pkt": fastkd.PKTLoss,
    "relational_triplet": functools.partial(fastkd.RelationalTripletLoss, margin=0.5, positives=3),
    "relation_kl": functools.partial(
        fastkd.RelationKLLoss, temperature=0.5, teacher_temperature=0.7, divergence="js_div", beta=0.3, normalize=True
    ),
}


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
