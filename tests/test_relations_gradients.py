"""How the relational losses go through autograd: the same bits, upstream, retained and accumulated gradients, NaN."""

import pytest
import relation_cases as cases
import torch
from relation_cases import DTYPES, LOSSES
from relation_checks import run
from relation_truth import TRUTH
from tolerances import FLOOR, error

from fastkd import _check

pytestmark = pytest.mark.products


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
