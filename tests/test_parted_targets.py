"""dkd_loss and nkd_loss: a row's target parted from its other classes."""

import functools
import itertools
import unittest.mock

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from rows_checks import DTYPES, cancellation, logit_size, run, storage_error
from test_targets import CASES, targets
from tolerances import FLOOR, error
from truth import truth

import fastkd
from fastkd import reference
from fastkd._divergences import parameters_of
from fastkd.functional import dkd_loss, nkd_loss

LOSSES = {"dkd_loss": dkd_loss, "nkd_loss": nkd_loss}
MODULES = {"dkd_loss": fastkd.DKDLoss, "nkd_loss": fastkd.NKDLoss}
# Of these the coins of target and rest differ little, while the loss is not that of the coins alone.
NEAR = 2e-3


def bound(name, student, teacher, target, **options):
    """As of other losses of logits; and of the target's part, which has one term where those have many, what a rounding
    of its log odds makes of it: T times the gradient there."""
    options = {"temperature": 4.0 if name == "dkd_loss" else 1.0} | options
    loss, grad = truth(name, student, teacher, target=target, reduction="sum", **options)
    T = options["temperature"] if name == "dkd_loss" else 1.0
    T = T.expand(target.shape) if isinstance(T, torch.Tensor) else torch.full(target.shape, T)
    at_target = grad.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    share = ((at_target * T).norm() / loss.abs()).nan_to_num(0.0, posinf=0.0).item()
    floor = 4 * FLOOR[reference.compute_dtype(student, teacher)]
    return floor * logit_size(student) * (1 + share)


def published(name, student, teacher, target, weights, T):
    """As it stands in the publications' code, but for -inf in the place of a large number, in float64."""
    s, t = student.double(), teacher.double()
    is_target = F.one_hot(target, s.shape[-1]).bool()
    log_p, log_q = ((x / T).masked_fill(is_target, -torch.inf).log_softmax(-1) for x in (s, t))
    if name == "dkd_loss":
        beta, alpha = weights
        coins = [
            torch.stack((p[is_target], p.masked_fill(is_target, 0).sum(-1)), -1)
            for p in ((x / T).softmax(-1) for x in (s, t))
        ]
        tckd = F.kl_div(coins[0].log(), coins[1], reduction="none").sum(-1)
        nckd = torch.where(is_target, 0, log_q.exp() * (log_q - log_p)).sum(-1)
        return T**2 * (alpha * tckd + beta * nckd)
    hard = -t.softmax(-1)[is_target] * s.log_softmax(-1)[is_target]
    return hard + weights[0] * T**2 * torch.where(is_target, 0, -log_q.exp() * log_p).sum(-1)


@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_what_was_published(backend, name, T):
    student, teacher, target = torch.randn(9, 50), torch.randn(9, 50), torch.randint(50, (9,))
    weights = [entry.default for entry in parameters_of(name)]
    loss, grad = run(LOSSES[name], student, teacher, target=target, temperature=T, reduction="none")
    theirs, their_grad = run(lambda s, t: published(name, s, t, target, weights, T), student.double(), teacher.double())
    assert error(loss, theirs) <= bound(name, student, teacher, target, temperature=T)
    assert error(grad, their_grad) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_match_float64(backend, name, case, dtype):
    student, teacher, options = case.inputs(dtype)
    target = targets(student)
    for reduction in ("none", "batchmean"):
        given = {**options, "target": target, "reduction": reduction}
        if reduction == "none":
            given.pop("normalizer", None)
        loss, grad = run(LOSSES[name], student, teacher, **given)
        of_truth = functools.partial(
            truth, name, student, teacher, **{"temperature": 4.0 if name == "dkd_loss" else 1.0} | given
        )
        loss_ref, grad_ref = of_truth()
        compute = reference.compute_dtype(student, teacher)
        assert loss.dtype == compute
        assert grad.dtype == dtype
        tolerance = 4 * FLOOR[compute] * logit_size(student)
        plain = cancellation("kl_div", student, teacher, options) if backend == "torch" else 1
        assert (
            error(loss, loss_ref)
            <= bound(
                name, student, teacher, **{key: x for key, x in given.items() if key not in ("reduction", "normalizer")}
            )
            * plain
        )
        terms = of_truth(terms_of_gradient=True)[1]
        tolerance *= max(1.0, (terms.norm() / grad_ref.norm()).nan_to_num(1.0, posinf=1e300).item())
        assert error(grad, grad_ref) <= tolerance + 2 * storage_error(grad, grad_ref)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("V", [2, 10, 1500])
def test_near_convergence(backend, V, dtype):
    """The published code's two-class distributions have lost their digits here."""
    teacher = 3 * torch.randn(8, V, dtype=dtype)
    student, target = teacher + NEAR * torch.randn(8, V, dtype=dtype), torch.randint(V, (8,))
    loss, grad = run(dkd_loss, student, teacher, target=target, beta=2.0)
    right, right_grad = truth("dkd_loss", student, teacher, target=target, beta=2.0, temperature=4.0)
    assert right < 1e-4
    assert error(loss, right) <= (2e-4 if dtype is torch.float32 else 1e-9)
    # p - q is as good as the row's sums are, which w = log p - log q is compared with
    assert error(grad, right_grad) <= FLOOR[dtype] / (NEAR / 4)


def test_a_part_of_weight_0_is_left_out(backend):
    student, teacher, target = torch.randn(4, 20), torch.randn(4, 20), torch.tensor([3, 4, 5, 6])
    student[:, 3] = -torch.inf  # the first row's target, and another class of the others, so that either part is +inf
    both, coins, others = (
        run(dkd_loss, student, teacher, target=target, alpha=a, beta=b, reduction="none")
        for a, b in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0))
    )
    assert both[0].isinf().all()
    assert coins[0].isinf().tolist() == [True, False, False, False]
    assert others[0].isinf().tolist() == [False, True, True, True]
    torch.testing.assert_close(both[1], coins[1] + others[1])
    loss, _ = run(nkd_loss, student, teacher, target=target, gamma=0.0, reduction="none")
    assert loss.isinf().tolist() == [True, False, False, False]


@pytest.mark.parametrize("V", [2, 40, 2000])
@pytest.mark.parametrize("name", LOSSES)
def test_finite_where_published_code_is_not(backend, name, V):
    student, teacher = torch.randn(7, V), torch.randn(7, V)
    target = torch.tensor([0, 1, 0, 1, 1, 0, V - 1])
    teacher[1, 1], student[2, 0] = 1e4, 1e4  # q of the target is 1; the student is sure
    student[3], teacher[3] = 1e4 * student[3], 1e4 * teacher[3]
    student[4] += 1e4
    teacher[5, 0] = -torch.inf  # a target that the teacher cannot give
    teacher[6, : V - 1] = -torch.inf  # nothing beside the target
    for reduction in ("none", "batchmean"):
        options = {"target": target, "temperature": 2.0, "reduction": reduction}
        loss, grad = run(LOSSES[name], student, teacher, **options)
        right, right_grad = truth(name, student, teacher, **options)
        assert loss.isfinite().all()
        assert error(loss, right) <= 1e-5
        assert error(grad, right_grad) <= 1e-5


@pytest.mark.parametrize("V", [1, 9, 1500])
@pytest.mark.parametrize("name", LOSSES)
def test_rows_without_a_possible_class(backend, name, V):
    student, teacher, target = torch.randn(4, V), torch.randn(4, V), torch.zeros(4, dtype=torch.int64)
    student[0], teacher[1] = -torch.inf, -torch.inf
    student[2, 1:] = -torch.inf  # with the student there is nothing beside the target
    loss, grad = run(LOSSES[name], student, teacher, target=target, reduction="none")
    assert loss.tolist()[:2] == [torch.inf, 0]
    assert loss[2].isinf() == (V > 1)
    assert loss[3].isfinite()
    assert not grad[:3].any()
    assert grad.isfinite().all()
    assert grad[3].any() == (V > 1)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("V", [12, 1500])
def test_nan_and_infinity_are_not_hidden(backend, name, V):
    for value, side, at in itertools.product((torch.nan, torch.inf), (0, 1), (0, 5)):
        logits, target = [torch.randn(3, V), torch.randn(3, V)], torch.tensor([0, 0, 5])
        logits[side][0, at] = value
        loss, grad = run(LOSSES[name], *logits, target=target, reduction="none")
        assert loss.isnan().tolist() == [True, False, False]
        assert grad.isnan().all(1).tolist() == [True, False, False]


@pytest.mark.parametrize("name", LOSSES)
def test_weights_of_the_parts_may_be_one_per_row(backend, name):
    student, teacher, target = torch.randn(2, 3, 30), torch.randn(2, 3, 30), torch.randint(30, (2, 3))
    weights = {entry.name: torch.rand(2, 3) * 3 for entry in parameters_of(name)}
    loss, grad = run(LOSSES[name], student, teacher, target=target, reduction="none", **weights)
    for i, j in itertools.product(range(2), range(3)):
        one = {key: value[i, j].item() for key, value in weights.items()}
        row, row_grad = run(LOSSES[name], student[i, j], teacher[i, j], target=target[i, j], **one)
        torch.testing.assert_close(loss[i, j], row)
        upstream = 1 + (3 * i + j + 1) % 7
        torch.testing.assert_close(grad[i, j], row_grad * upstream / 4)


@pytest.mark.parametrize("V", [19, 1500])
@pytest.mark.parametrize("name", LOSSES)
def test_maps(backend, name, V):
    student, teacher, target = torch.randn(2, V, 3, 9), torch.randn(2, V, 3, 9), torch.randint(V, (2, 3, 9))
    target[0, 0, 0] = 255
    for reduction in ("none", "batchmean"):
        options = {"target": target, "temperature": 2.0, "reduction": reduction, "ignore_index": 255}
        loss, grad = run(LOSSES[name], student, teacher, dim=1, **options)
        rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
        other, other_grad = run(LOSSES[name], *rows, **options)
        torch.testing.assert_close(loss, other)
        torch.testing.assert_close(grad, other_grad.movedim(-1, 1))
        over, over_grad = run(
            lambda s, t, o=options: LOSSES[name](s * 1, t, dim=1, inplace=True, **o), student, teacher
        )
        assert torch.equal(over, loss)
        assert torch.equal(over_grad, grad)


@pytest.mark.parametrize("V", [40, 1100, 40000])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_may_be_written_over_the_student(backend, name, V):
    student, teacher, target = torch.randn(5, V), torch.randn(5, V), torch.randint(V, (5,))
    for reduction in ("none", "batchmean"):
        options = {"target": target, "temperature": 2.5, "reduction": reduction}
        loss, grad = run(LOSSES[name], student, teacher, **options)
        over, over_grad = run(lambda s, t, o=options: LOSSES[name](s * 1, t, inplace=True, **o), student, teacher)
        assert torch.equal(loss, over)
        assert torch.equal(grad, over_grad)


def test_a_target_that_nobody_looked_at(backend):
    """As on a GPU, where a look would have to wait, and under torch.compile: past the check of the function."""
    for (name, loss), V in itertools.product(LOSSES.items(), (9, 1500)):
        student, teacher, target = torch.randn(3, V), torch.randn(3, V), torch.tensor([1, V, 2])
        with unittest.mock.patch("fastkd._check.logits.values_known", return_value=False):
            if backend.startswith("cpu"):
                with pytest.raises(RuntimeError, match=f"target: classes from 0 to {V - 1} wanted, got {V}"):
                    loss(student, teacher, target)
                continue
            found, grad = run(loss, student, teacher, target=target, reduction="none")
        assert found.isnan().tolist() == [False, True, False], name
        assert grad.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(1000, 40), (70, 1000), (3, 40000)], ids=str)
def test_same_bits_whatever_the_threads(threads, name, shape):
    student, teacher, target = torch.randn(shape), torch.randn(shape), torch.randint(shape[1], shape[:1])
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(LOSSES[name], student, teacher, target=target, temperature=2.0))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_derivatives_are_right(backend):
    student, teacher = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8).double()
    target = torch.tensor([0, 7, -100])
    for loss, reduction in itertools.product(LOSSES.values(), ("none", "batchmean")):
        called = functools.partial(loss, teacher=teacher, target=target, temperature=1.5, reduction=reduction)
        assert torch.autograd.gradcheck(called, (student,), fast_mode=True)


@pytest.mark.parametrize("name", LOSSES)
def test_numbers_that_change_compile_once_more_at_most(name):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend=counter)
    student, teacher, target = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    for i in range(4):
        numbers = {entry.name: 0.5 + i for entry in parameters_of(name)} | {"temperature": 1.0 + i}
        x, y = (student.clone().requires_grad_() for _ in range(2))
        loss, eager = compiled(x, teacher, target, **numbers), LOSSES[name](y, teacher, target, **numbers)
        torch.testing.assert_close(loss, eager)
        for each in (loss, eager):
            each.backward()
        torch.testing.assert_close(x.grad, y.grad)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", LOSSES)
def test_the_module_is_the_function(backend, name):
    student, teacher, target = torch.randn(4, 9), torch.randn(4, 9), torch.randint(9, (4,))
    options = {entry.name: 0.7 for entry in parameters_of(name)} | {"temperature": 3.0}
    assert torch.equal(
        MODULES[name](**options)(student, teacher, target), LOSSES[name](student, teacher, target, **options)
    )
    assert torch.equal(MODULES[name]()(student, teacher, target), LOSSES[name](student, teacher, target))


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"target": torch.zeros(4)}, TypeError, "target: whole numbers"),
        ({"target": torch.tensor([0, 1, 9, 2])}, ValueError, "target: classes from 0 to 8 wanted, or .* got 9"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target: shape \[4\] wanted"),
        ({"first": -1.0}, ValueError, "{}: a number of at least 0 wanted, got -1.0"),
        ({"first": float("inf")}, ValueError, "{}: a number of at least 0 wanted"),
        ({"first": "1"}, TypeError, "{}: a number or a tensor wanted"),
        ({"first": torch.tensor([1.0, 2.0, -1.0, 0.0])}, ValueError, "{}: values of at least 0 wanted"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: "),
        ({"reduction": "mean"}, ValueError, "reduction: 'none', 'sum' or 'batchmean'"),
        ({"temperature": 0.0}, ValueError, "temperature: "),
        ({"teacher": torch.randn(4, 9, requires_grad=True)}, ValueError, r"teacher: no gradient .* detach\(\) it$"),
    ],
)
@pytest.mark.parametrize("name", LOSSES)
def test_bad_input(backend, name, changed, kind, message):
    given = {"student": torch.randn(4, 9), "teacher": torch.randn(4, 9), "target": torch.tensor([0, 1, 2, 3])}
    for entry in parameters_of(name):
        with pytest.raises(kind, match=message.format(entry.name)):
            LOSSES[name](**given | {entry.name if key == "first" else key: value for key, value in changed.items()})
