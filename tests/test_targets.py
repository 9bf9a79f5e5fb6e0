"""kd_loss: the cross-entropy with a target beside a divergence from the teacher."""

import functools
import itertools
import unittest.mock

import cases
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from rows_checks import DTYPES, cancellation, eager, logit_size, run, storage_error
from tolerances import FLOOR, TIMES_EAGER, error
from truth import truth, upstream_like

import fastkd
from fastkd import functional, reference
from fastkd._divergences import BY_NAME, parameters_of
from fastkd.functional import kd_loss

WEIGHTS = {"hard_weight": 0.3, "soft_weight": 0.6}
SMOOTHING = (0.0, 0.1)
CASES = [case for case in cases.FINITE if case.options.get("normalizer") is None or case.name == "normalized"]


def targets(student, ignored=True):
    """A class for each row; where there are some rows, one is ignored."""
    rows, V = student.shape[:-1], student.shape[-1]
    target = torch.randint(V, rows, generator=torch.Generator().manual_seed(V))
    if ignored and target.numel() > 2:
        target.view(-1)[1] = -100
    return target


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", cases.KINDS)
def test_both_parts_match_float64(backend, name, case, dtype, smoothing):
    student, teacher, options = case.inputs(dtype)
    target, (divergence, _, beta) = targets(student), name.partition("-")
    parameter = {"beta": float(beta)} if beta else {}
    for reduction in ("none", "batchmean"):
        given = {**options, **WEIGHTS, **parameter, "target": target, "label_smoothing": smoothing}
        if reduction == "none":
            given.pop("normalizer", None)
        loss, grad = run(kd_loss, student, teacher, divergence=divergence, reduction=reduction, **given)
        of_truth = functools.partial(truth, divergence, student, teacher, reduction=reduction, **given)
        loss_ref, grad_ref = of_truth()
        compute = reference.compute_dtype(student, teacher)
        assert loss.dtype == compute
        assert grad.dtype == dtype
        tolerance = 4 * FLOOR[compute] * logit_size(student) * (5 if beta else 1)  # as for the divergence alone
        plain = cancellation(name, student, teacher, options) if backend == "torch" else 1
        assert error(loss, loss_ref) <= tolerance * plain
        terms = of_truth(terms_of_gradient=True)[1]
        tolerance *= max(1.0, (terms.norm() / grad_ref.norm()).nan_to_num(1.0, posinf=1e300).item())
        assert error(grad, grad_ref) <= tolerance + 2 * storage_error(grad, grad_ref)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("V", [40, 300])
@pytest.mark.parametrize("name", BY_NAME)
def test_any_divergence_may_be_the_soft_part(backend, name, V, temperature):
    """Also at the hard part's own temperature, of which a kernel need not sum twice."""
    student, teacher, target = torch.randn(6, V), torch.randn(6, V), torch.randint(V, (6,))
    parameter = {
        entry.name: torch.linspace(entry.low, min(entry.high, 2.0), 6) if entry.per_row else 0.3
        for entry in parameters_of(name)
    }
    options = {"temperature": temperature, "reduction": "none"}
    loss, grad = run(kd_loss, student, teacher, target=target, divergence=name, **WEIGHTS, **parameter, **options)
    soft, soft_grad = run(getattr(functional, name), student, teacher, **parameter, **options)
    hard, hard_grad = run(lambda s, _: F.cross_entropy(s, target, reduction="none"), student, teacher)
    torch.testing.assert_close(loss, 0.3 * hard + 0.6 * soft)
    torch.testing.assert_close(grad, 0.3 * hard_grad + 0.6 * soft_grad)


@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "kind", ["plain", "large", "shifted", "impossible target", "one class", "learned", "far from it"]
)
def test_the_hard_part_is_as_good_as_cross_entropy(backend, kind, dtype, smoothing):
    student = torch.randn(5, 1 if kind == "one class" else 700, dtype=dtype)
    target = torch.randint(student.shape[-1], (5,))
    rows = torch.arange(5)
    if kind == "large":
        student *= 1e4
    elif kind == "shifted":
        student += 1e6
    elif kind == "impossible target":
        student[rows, target] = -torch.inf
    elif kind == "learned":
        student[rows, target] = 30
    elif kind == "far from it":
        student[rows, target] = -300
    teacher = torch.randn_like(student)
    options = {"label_smoothing": smoothing, "reduction": "none"}
    loss, grad = run(kd_loss, student, teacher, target=target, hard_weight=1, soft_weight=0, temperature=3.0, **options)
    theirs, their_grad = run(lambda s, _: F.cross_entropy(s, target, **options), student, teacher)
    right, right_grad = run(lambda s, _: F.cross_entropy(s, target, **options), student.double(), teacher)
    if dtype is torch.float64:
        right, right_grad = truth(
            "kl_div", student, teacher, target=target, hard_weight=1, soft_weight=0, **options
        )  # fmt: skip
    assert error(loss, right) <= TIMES_EAGER * error(theirs, right) + FLOOR[dtype]
    assert error(grad, right_grad) <= TIMES_EAGER * error(their_grad, right_grad) + FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_a_row_without_a_target_counts_for_nothing(backend, reduction):
    student, teacher = torch.randn(6, 30), torch.randn(6, 30)
    target = torch.tensor([3, 7, -1, 29, -1, 0])
    student[2], teacher[4] = torch.nan, torch.inf
    options = {"ignore_index": -1, "reduction": reduction, "temperature": 2.0}
    loss, grad = run(kd_loss, student, teacher, target=target, **options)
    left = target >= 0
    fewer, fewer_grad = run(kd_loss, student[left], teacher[left], target=target[left], **options)
    assert not grad[~left].any()
    if reduction == "none":
        assert not loss[~left].any()
        grad, fewer_grad = grad[left] / upstream_like(loss)[left, None], fewer_grad / upstream_like(fewer)[:, None]
        loss = loss[left]
    else:
        grad = grad[left]
    torch.testing.assert_close(loss, fewer)
    torch.testing.assert_close(grad, fewer_grad)


def test_masks_and_ignored_targets_add_up(backend):
    student, teacher = torch.randn(6, 30), torch.randn(6, 30)
    target, mask = torch.tensor([3, 7, -100, 29, 5, 0]), torch.tensor([True, False, True, True, True, False])
    both = kd_loss(student, teacher, target, mask=mask)
    torch.testing.assert_close(both, kd_loss(student, teacher, target.masked_fill(~mask, -100)))
    # of a row that is masked the target may be anything
    torch.testing.assert_close(both, kd_loss(student, teacher, target.masked_fill(~mask, 1000), mask=mask))


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
@pytest.mark.parametrize("normalizer", [None, 0, torch.tensor(0.0)], ids=str)
def test_no_row_has_a_target(backend, reduction, normalizer):
    if reduction == "none" and normalizer is not None:
        normalizer = None
    student, target = torch.randn(4, 9), torch.full((4,), -100)
    loss, grad = run(kd_loss, student, torch.randn(4, 9), target=target, reduction=reduction, normalizer=normalizer)
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize(("hard", "soft"), [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("shape", [(9, 20), (3, 1500)], ids=str)
@pytest.mark.parametrize("name", ["kl_div", "js_div"])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_weight_of_0_leaves_out_what_is_infinite(backend, hard, soft, shape, name, reduction):
    student, teacher, target = torch.randn(shape), torch.randn(shape), torch.arange(4, 4 + shape[0])
    student[:, 0 if hard else 4] = -torch.inf  # a class that the teacher gives, or the target of the first row
    if not hard:
        teacher[:, 4] = -torch.inf
    elif not soft:
        teacher[0], teacher[1, 3] = torch.nan, torch.inf
    options = {"hard_weight": hard, "soft_weight": soft, "divergence": name, "reduction": reduction}
    loss, grad = run(kd_loss, student, teacher, target=target, **options)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    assert loss.any() == (hard + soft > 0)


@pytest.mark.parametrize("V", [20, 3000])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", ["kl_div", "reverse_kl_div"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)  # which take other kernels on a GPU
def test_rows_whose_soft_part_has_no_gradient_learn_the_target(backend, name, reduction, V, dtype):
    student, teacher = torch.randn(9, V, dtype=dtype), torch.randn(9, V, dtype=dtype)
    teacher[0] = -torch.inf  # no class is possible
    teacher[1, 5] = -torch.inf  # the reverse divergence is +inf
    target = torch.randint(V, (9,))
    target[:2] = torch.tensor([V - 1, 5])
    loss, grad = run(
        kd_loss, student, teacher, target=target, divergence=name, hard_weight=1.0, soft_weight=1.0, reduction=reduction
    )
    _, soft_grad = run(getattr(functional, name), student, teacher, reduction=reduction)
    hard, hard_grad = run(lambda s, _: F.cross_entropy(s, target, reduction=reduction), student, teacher)
    torch.testing.assert_close(grad, hard_grad + soft_grad)
    if reduction == "none":
        torch.testing.assert_close(loss[0], hard[0])
        assert loss[1].isinf() == (name == "reverse_kl_div")


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("V", [9, 1500])
def test_a_student_without_a_possible_class(backend, V, reduction):
    student, teacher = torch.randn(9, V), torch.randn(9, V)
    student[0] = -torch.inf
    loss, grad = run(kd_loss, student, teacher, target=torch.randint(V, (9,)), reduction=reduction)
    assert loss.flatten()[0] == torch.inf
    assert loss.flatten()[1:].isfinite().all()
    assert not grad[0].any()
    assert grad[1:].isfinite().all()
    assert grad[1:].any(1).all()


def test_a_target_that_nobody_looked_at(backend):
    """As on a GPU, where a look would have to wait, and under torch.compile: past the check of the function."""
    for V, dtype, out_of_range in itertools.product((9, 1500), (torch.float32, torch.float64), (-1, "V", 2**40)):
        student, teacher = torch.randn(3, V, dtype=dtype), torch.randn(3, V, dtype=dtype)
        target = torch.tensor([1, V if out_of_range == "V" else out_of_range, 2])
        options = {"target": target, "label_smoothing": 0.1, "reduction": "none"}
        with unittest.mock.patch("fastkd._check.logits.values_known", return_value=False):
            if backend.startswith("cpu"):
                with pytest.raises(RuntimeError, match=f"target: classes from 0 to {V - 1} wanted, got {target[1]}"):
                    kd_loss(student, teacher, **options)
                continue
            loss, grad = run(kd_loss, student, teacher, **options)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False]
        assert grad[::2].isfinite().all()


@pytest.mark.parametrize("V", [19, 1500])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_maps(backend, reduction, V):
    student, teacher = torch.randn(2, V, 3, 9), torch.randn(2, V, 3, 9)
    target = torch.randint(V, (2, 3, 9))
    target[0, 0, 0] = 255
    options = {"temperature": 2.0, "reduction": reduction, "ignore_index": 255, "label_smoothing": 0.1}
    loss, grad = run(kd_loss, student, teacher, target=target, dim=1, **options)
    rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
    other, other_grad = run(kd_loss, *rows, target=target, **options)
    torch.testing.assert_close(loss, other)
    torch.testing.assert_close(grad, other_grad.movedim(-1, 1))


@pytest.mark.parametrize("name", ["kl_div", "reverse_kl_div"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("V", [40, 2500, None])
def test_the_gradient_may_be_written_over_the_student(backend, V, reduction, name):
    if V:
        student, teacher, target = torch.randn(12, V), torch.randn(12, V), torch.randint(V, (12,))
    else:  # rows that lie side by side
        student, teacher = (torch.randn(2, 19, 3, 9).movedim(1, -1) for _ in range(2))
        target = torch.randint(19, (2, 3, 9))
    options = {"temperature": 2.0, "reduction": reduction, "divergence": name, "label_smoothing": 0.1}
    loss, grad = run(kd_loss, student, teacher, target=target, **options)
    in_place, its_grad = run(
        lambda s, t, **o: kd_loss(s * 1, t, inplace=True, **o), student, teacher, target=target, **options
    )
    assert torch.equal(loss, in_place)
    assert torch.equal(grad, its_grad)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_targets_of_any_integer_type(backend, dtype):
    student, teacher, target = torch.randn(4, 200), torch.randn(4, 200), torch.tensor([0, 8, 156, 3])
    assert torch.equal(kd_loss(student, teacher, target), kd_loss(student, teacher, target.to(dtype)))
    # 156 is what -100 would be as a uint8
    with pytest.raises(ValueError, match="target: classes from 0 to 99"):
        kd_loss(student[:, :100], teacher[:, :100], target.to(dtype))


def test_compile_with_an_ignored_class_that_changes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(kd_loss, fullgraph=True, backend=counter)
    student, teacher, target = torch.randn(6, 10), torch.randn(6, 10), torch.arange(6)
    for ignored in (-100, 3, 5, 7, 2, -1):
        torch.testing.assert_close(
            compiled(student, teacher, target, ignore_index=ignored),
            kd_loss(student, teacher, target, ignore_index=ignored),
        )
    assert counter.frame_count <= 2


@pytest.mark.parametrize("V", [10, 2000])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_rows_of_several_temperatures(backend, name, reduction, V):
    """Of some the exponentials of both parts are powers of each other."""
    student, teacher, target = torch.randn(12, V), torch.randn(12, V), torch.randint(V, (12,))
    temperature = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.5, 0.5, 5.0, 2.0, 1.0, 1.0, 8.0, 3.0])
    options = {"divergence": name, "temperature": temperature, "label_smoothing": 0.1, "reduction": reduction}
    loss, grad = run(kd_loss, student, teacher, target=target, **options)
    of_truth = {x: y for x, y in options.items() if x != "divergence"}
    right, right_grad = truth(name, student, teacher, target=target, **of_truth)
    assert error(loss, right) <= 4 * FLOOR[torch.float32]
    assert error(grad, right_grad) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("shape", [(1000, 40), (70, 1000), (3, 40000)], ids=str)
def test_same_bits_whatever_the_threads(threads, shape):
    student, teacher, target = torch.randn(shape), torch.randn(shape), torch.randint(shape[1], shape[:1])
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(run(kd_loss, student, teacher, target=target, temperature=2.0, label_smoothing=0.1))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_derivatives_are_right(backend):
    student, teacher = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 8).double()
    target = torch.tensor([0, 7, -100])
    for name, reduction in itertools.product(("kl_div", "js_div"), ("none", "batchmean")):
        loss = functools.partial(
            kd_loss, teacher=teacher, target=target, divergence=name, temperature=1.5, reduction=reduction,
            label_smoothing=0.2,
        )  # fmt: skip
        assert torch.autograd.gradcheck(loss, (student,), fast_mode=True)


def test_it_is_what_people_write(backend):
    """Hinton's loss, as it stands in a training loop."""
    student, teacher, target = torch.randn(8, 100), torch.randn(8, 100), torch.randint(100, (8,))
    loss = kd_loss(student, teacher, target, temperature=4.0, hard_weight=0.1, soft_weight=0.9)
    soft = eager("kl_div", student, teacher, 4.0).mean()
    torch.testing.assert_close(loss, 0.1 * F.cross_entropy(student, target) + 0.9 * soft)


def test_the_module_is_the_function(backend):
    student, teacher, target = torch.randn(4, 9), torch.randn(4, 9), torch.randint(9, (4,))
    module = fastkd.KDLoss(divergence="skew_kl_div", alpha=0.2, temperature=2.0, label_smoothing=0.1, **WEIGHTS)
    options = {"divergence": "skew_kl_div", "alpha": 0.2, "temperature": 2.0, "label_smoothing": 0.1, **WEIGHTS}
    assert torch.equal(module(student, teacher, target), kd_loss(student, teacher, target, **options))


@pytest.mark.parametrize(
    ("changed", "kind", "message"),
    [
        ({"target": None}, TypeError, "target: a torch.Tensor wanted"),
        ({"target": torch.zeros(4)}, TypeError, "target: whole numbers"),
        ({"target": torch.zeros(4, dtype=torch.bool)}, TypeError, "target: whole numbers"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target: shape \[4\] wanted"),
        ({"target": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"target: shape \[4\] wanted"),
        ({"target": torch.tensor([0, 1, 9, 2])}, ValueError, "target: classes from 0 to 8 wanted, or .* got 9"),
        ({"target": torch.tensor([0, 1, -1, 2])}, ValueError, "target: classes from 0 to 8 wanted, or .* got -1"),
        ({"hard_weight": -1.0}, ValueError, "hard_weight: "),
        ({"soft_weight": float("nan")}, ValueError, "soft_weight: "),
        ({"hard_weight": "1"}, TypeError, "hard_weight: "),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing: a number from 0 to 1"),
        ({"ignore_index": 1.0}, TypeError, "ignore_index: "),
        ({"reduction": "mean"}, ValueError, "reduction: 'none', 'sum' or 'batchmean'"),
        ({"reduction": "max"}, ValueError, "reduction: 'none', 'sum' or 'batchmean' .* got 'max'"),
        ({"normalizer": 0}, ValueError, "normalizer: 0 is wanted only where no row counts"),
        ({"target": torch.zeros(4, dtype=torch.uint16)}, TypeError, "target: whole numbers .* got torch.uint16"),
        ({"target": torch.zeros(4, dtype=torch.int64).to_sparse()}, TypeError, "target: a dense tensor"),
        ({"divergence": "kl"}, ValueError, "divergence: one of kl_div"),
        ({"beta": 0.5}, ValueError, "beta: divergence='kl_div' has no parameter"),
        ({"divergence": "js_div", "alpha": 0.5}, ValueError, "alpha: divergence='js_div' has beta"),
        ({"divergence": "js_div", "beta": 2.0}, ValueError, "beta: "),
        ({"teacher": torch.randn(4, 9, requires_grad=True)}, ValueError, r"teacher: no gradient .* detach\(\) it$"),
    ],
)  # fmt: skip
def test_bad_input(backend, changed, kind, message):
    given = {"student": torch.randn(4, 9), "teacher": torch.randn(4, 9), "target": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(kind, match=message):
        kd_loss(**given | changed)
    options = {name: x for name, x in changed.items() if name not in ("target", "teacher", "normalizer")}
    if options:
        with pytest.raises(kind, match=message):
            fastkd.KDLoss(**options)
