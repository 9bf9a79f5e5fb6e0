"""Values and gradients of the feature losses, against float64, and what their callers may rely on."""

import functools

import feature_cases as cases
import pytest
import torch
import torch.nn.functional as F
from conftest import gradcheck
from feature_cases import LOSSES, REDUCTIONS
from feature_truth import truth
from tolerances import FLOOR, error

from fastkd import functional

PROMISED = {torch.float32: 2e-6, torch.float64: 2e-14}
# Relative to a loss of 1e-6 the roundings of rows of length 1 are 1e-7 / 1e-3 of their difference.
NEAR_CONVERGENCE = {torch.float32: 2e-4, torch.float64: 1e-12}


def compute_dtype(*tensors):
    return torch.float64 if torch.float64 in {x.dtype for x in tensors} else torch.float32


def run(loss_function, student, teacher, upstream=None, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student, torch.ones_like(loss) if upstream is None else upstream)
    return loss.detach(), grad


def rounding(grad, ref, compute):
    """Of a gradient to its dtype, relative to its norm: twice, and float16's smallest step."""
    if grad.dtype == compute:
        return 0.0
    step = 2.0**-25 if grad.dtype == torch.float16 else 0.0
    return 2 * FLOOR[grad.dtype] + step * ref.numel() ** 0.5 / max(ref.norm().item(), 1e-30)


def check(name, student, teacher, promised=PROMISED, upstream=None, **options):
    loss, grad = run(LOSSES[name], student, teacher, upstream, **options)
    loss_ref, grad_ref = truth(name, student, teacher, upstream, **options)
    compute = compute_dtype(student, teacher)
    assert (loss.dtype, loss.shape) == (compute, loss_ref.shape)
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert error(loss, loss_ref) <= promised[compute]
    assert error(grad, grad_ref) <= promised[compute] + rounding(grad, grad_ref, compute)
    return loss, grad


@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.CASES), ids=str)
def test_matches_float64(backend, name, case, dtype):
    upstream = torch.tensor(16.0, dtype=compute_dtype(*case.inputs(dtype)))  # or float16 would underflow
    check(name, *case.inputs(dtype), upstream=upstream)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.CASES[2:14], cases.DTYPES[::2]), ids=str)
def test_masks_weights_and_reductions(backend, name, case, dtype, reduction):
    student, teacher = case.inputs(dtype)
    options = case.options()
    where = options["mask"].unsqueeze(1 if student.dim() == 4 else -1).expand_as(student)
    hidden = student.clone().masked_fill_(~where, torch.nan) if case.layout is None else student
    rows = torch.rand(case.rows(), generator=case.generator()) + 0.5
    upstream = rows if reduction == "none" else None
    loss, grad = run(LOSSES[name], hidden, teacher, upstream, reduction=reduction, **options)
    loss_ref, grad_ref = truth(name, student, teacher, upstream, reduction=reduction, **options)
    assert error(loss, loss_ref) <= PROMISED[torch.float32]
    assert error(grad, grad_ref) <= PROMISED[torch.float32] + rounding(grad, grad_ref, torch.float32)
    assert not grad[~where].any()


@pytest.mark.parametrize(("name", "case", "dtype"), cases.each(cases.NEAR), ids=str)
def test_near_convergence(backend, name, case, dtype):
    check(name, *case.inputs(dtype), NEAR_CONVERGENCE)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "teacher_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float64), (torch.float16, torch.bfloat16), (torch.float64, torch.float16)],
    ids=str,
)  # fmt: skip
def test_dtypes_may_differ(backend, name, dtype, teacher_dtype):
    case = cases.Case("mixed", "", (6, 21))
    student, teacher = case.inputs(dtype, teacher_dtype)
    check(name, student, teacher, upstream=torch.tensor(16.0, dtype=compute_dtype(student, teacher)))


@pytest.mark.parametrize("name", LOSSES)
def test_layouts_may_differ(backend, name):
    student, teacher = cases.Case("layouts", "", (2, 7, 5, 9)).inputs(torch.float32)
    for s, t in ((cases.channels_last(student), teacher), (student, cases.channels_last(teacher))):
        check(name, s, t)
    expanded = torch.randn(2, 7, 1, 1).expand(2, 7, 5, 9)
    check(name, expanded, teacher)
    check(name, student, expanded)


@pytest.mark.parametrize("name", LOSSES)
def test_layers_in_one_call(backend, name):
    """Of different shapes and dtypes; each as if it were alone."""
    shapes = [(3, 4, 10), (2, 5, 3, 3), (6, 17), (1, 9)]
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float32]
    students = [torch.randn(shape).to(dtype).requires_grad_() for shape, dtype in zip(shapes, dtypes, strict=True)]
    teachers = [torch.randn(shape) for shape in shapes]
    weights = [1.0, 0.5, 0.0, 3]
    loss, layers = LOSSES[name](students, teachers, layer_weights=weights, return_layers=True)
    grads = torch.autograd.grad(loss, students)
    assert not layers.requires_grad
    total = 0.0
    for student, teacher, weight, layer, grad in zip(students, teachers, weights, layers, grads, strict=True):
        alone, alone_grad = run(LOSSES[name], student, teacher)
        total += weight * alone.double()
        assert error(layer, alone) <= 4 * FLOOR[torch.float32]
        assert error(grad, weight * alone_grad.double()) <= 4 * FLOOR[student.dtype]
    assert error(loss, total) <= 4 * FLOOR[torch.float32]
    rows = LOSSES[name](students, teachers, layer_weights=weights, reduction="none")
    assert [list(x.shape) for x in rows] == [[3, 4], [2, 3, 3], [6], [1]]
    alone = LOSSES[name](students[1], teachers[1], reduction="none")
    assert error(rows[1], 0.5 * alone) <= 4 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", LOSSES)
def test_masks_and_weights_broadcast_to_the_rows(backend, name):
    """Of each layer, of maps too: one mask of the batch's samples serves layers of several sizes."""
    maps = [torch.randn(3, 8, 4, 4), torch.randn(3, 6, 2, 2)]
    targets = [torch.randn_like(x) for x in maps]
    mask, weight = torch.tensor([True, False, True]).view(3, 1, 1), torch.rand(3, 1, 1)
    loss = LOSSES[name](maps, targets, mask=mask, weight=weight)
    whole = {
        "mask": [mask.expand(3, n, n).contiguous() for n in (4, 2)],
        "weight": [weight.expand(3, n, n) for n in (4, 2)],
    }
    assert torch.equal(loss, LOSSES[name](maps, targets, **whole))
    found = run(LOSSES[name], maps[0], targets[0], mask=mask, weight=weight)
    expected = run(LOSSES[name], maps[0], targets[0], mask=whole["mask"][0], weight=whole["weight"][0])
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_every_position_of_maps_has_its_own_weight(backend, name):
    """Also where neighbours are computed together."""
    case = next(case for case in cases.CASES if case.name == "aligned_maps")
    check(name, *case.inputs(torch.float32), reduction="sum", **case.options())


@pytest.mark.parametrize("normalizer", [7, torch.tensor(7), torch.tensor([7.0], dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_a_normalizer_replaces_the_divisor(backend, name, normalizer):
    """Of the sum, whatever the reduction; of all layers."""
    mask = torch.tensor([True, False, True, True])
    student, teacher, weight = torch.randn(4, 20), torch.randn(4, 20), torch.rand(4)
    options = {"mask": mask, "weight": weight}
    loss, grad = run(LOSSES[name], student, teacher, reduction="sum", **options)
    for reduction in ("mean", "batchmean", "sum"):
        found = run(LOSSES[name], student, teacher, reduction=reduction, normalizer=normalizer, **options)
        assert (found[0].dtype, found[0].shape) == (torch.float32, ())
        assert error(found[0], loss / 7) < PROMISED[torch.float32]
        assert error(found[1], grad / 7) < PROMISED[torch.float32]
    layered = {"layer_weights": [1.0, 2.0], "return_layers": True, "normalizer": normalizer}
    of_both, layers = LOSSES[name]([student] * 2, [teacher] * 2, **layered, **options)
    torch.testing.assert_close(of_both, 3 * loss / 7)
    torch.testing.assert_close(layers, (loss / 7).expand(2))


@pytest.mark.parametrize("zero", [0, torch.tensor(0)], ids=["number", "tensor"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_normalizer_of_zero_is_for_batches_where_no_row_counts(backend, name, zero):
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    nothing, some = torch.zeros(4, dtype=torch.bool), torch.tensor([True, False, True, True])
    loss, grad = run(LOSSES[name], student, teacher, mask=nothing, normalizer=zero)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(student))
    assert LOSSES[name](student, teacher, mask=some, normalizer=zero) == torch.inf
    with pytest.raises(ValueError, match=r"^normalizer: 0 is wanted only where no row counts"):
        LOSSES[name](student, teacher, normalizer=zero)
    with pytest.raises(ValueError, match=r"^normalizer: reduction='none' has no divisor"):
        LOSSES[name](student, teacher, normalizer=3, reduction="none")


@pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3, 5), None), ((2, 3, 5, 4), None), ((2, 4, 7, 6), -1), ((2, 8, 3, 4, 5), 1), ((2, 3, 2, 2, 3, 4), -2)], ids=str
)  # fmt: skip
def test_where_the_features_are(shape, dim):
    """The last of up to three dimensions, the channels of maps, and where dim says: heads, video, whatever."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    at = (1 if len(shape) == 4 else -1) if dim is None else dim
    rows = functional.feature_cosine(student, teacher, reduction="none", dim=dim)
    assert error(rows, 1 - F.cosine_similarity(student, teacher, dim=at)) <= 2e-6
    (listed,) = functional.feature_mse([student], [teacher], reduction="none", dim=dim)
    assert error(listed, (student - teacher).square().sum(at)) <= 2e-6


def test_a_mask_for_all_layers_or_one_for_each(backend):
    students, teachers = ([torch.randn(3, 4, D) for D in (5, 8)] for _ in range(2))
    mask = torch.rand(3, 4) < 0.5
    shared = functional.feature_mse(students, teachers, mask=mask, weight=torch.ones(3, 4))
    each = functional.feature_mse(students, teachers, mask=[mask, mask])
    alone = sum(functional.feature_mse(s, t, mask=mask) for s, t in zip(students, teachers, strict=True))
    assert torch.equal(shared, each)
    assert error(shared, alone) <= 4 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 5), (0, 4, 2, 2)], ids=str)
def test_no_rows(backend, name, shape):
    loss, grad = run(LOSSES[name], torch.randn(shape), torch.randn(shape))
    assert loss == 0
    assert grad.shape == shape


@pytest.mark.parametrize("name", LOSSES)
def test_all_masked(backend, name):
    student = torch.full((3, 4), torch.nan)
    loss, grad = run(LOSSES[name], student, torch.randn(3, 4), mask=torch.zeros(3, dtype=torch.bool))
    assert loss == 0
    assert not grad.any()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_propagates(backend, name):
    student = torch.randn(4, 9)
    student[2, 3] = torch.nan
    loss, grad = run(LOSSES[name], student, torch.randn(4, 9))
    assert loss.isnan()
    assert grad[2].isnan().any()
    assert grad[[0, 1, 3]].isfinite().all()


def test_equals_torch(backend):
    student, teacher = torch.randn(6, 3, 20), torch.randn(6, 3, 20)
    for ours, theirs in (
        (functional.feature_mse(student, teacher), F.mse_loss(student, teacher)),
        (
            functional.feature_mse(student, teacher, normalize="l2"),
            F.mse_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)),
        ),
        (
            functional.feature_mse(student, teacher, normalize="standardize"),
            F.mse_loss(F.layer_norm(student, (20,), eps=1e-6), F.layer_norm(teacher, (20,), eps=1e-6)),
        ),
        (functional.feature_cosine(student, teacher), (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()),
        (functional.feature_mse(student, teacher, dim=0, reduction="sum"), (student - teacher).square().sum()),
        (functional.feature_smooth_l1(student, teacher), F.smooth_l1_loss(student, teacher)),
        (functional.feature_smooth_l1(student, teacher, beta=3), F.huber_loss(student, teacher, delta=3) / 3),
        (functional.feature_smooth_l1(student, teacher, beta=0), F.l1_loss(student, teacher)),
        (
            functional.feature_smooth_l1(student, teacher, beta=0.1, normalize="l2"),
            F.smooth_l1_loss(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1), beta=0.1),
        ),
    ):
        assert error(ours, theirs) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0, 1e-300, 1e-3, 0.5, 1, 7.25, 1e30, 1e300])
def test_smooth_l1_element_by_element(backend, beta, dtype):
    """As torch's in float64: on both sides of beta and at it, where nothing differs, and at the ends of a dtype's range;
    a beta beyond the range too."""
    at = torch.tensor([0.0, 1.0, 2.0**-60, 3e-30, 1e30, 1e38 if beta == 1e300 else torch.inf], dtype=dtype)
    near = torch.tensor([0.5, 1 - 2.0**-20, 1.0, 1 + 2.0**-20, 2.0], dtype=dtype) * min(max(beta, 1e-30), 1e30)
    student = torch.cat([at, near, -at, -near])[:, None]
    loss_function = functools.partial(functional.feature_smooth_l1, beta=beta, reduction="none")
    loss, grad = run(loss_function, student, torch.zeros_like(student))
    exact = student.double().requires_grad_()
    right = F.smooth_l1_loss(exact, torch.zeros_like(exact), beta=beta, reduction="none")
    (right_grad,) = torch.autograd.grad(right.sum(), exact)
    tolerance = {"rtol": 1e-6, "atol": 1e-37} if dtype == torch.float32 else {"rtol": 1e-15, "atol": 0}
    torch.testing.assert_close(loss.double(), right.detach()[:, 0], **tolerance)
    torch.testing.assert_close(grad.double(), right_grad, **tolerance)
    assert not grad[student == 0].any()


@pytest.mark.parametrize("normalize", ["l2", "standardize"])
@pytest.mark.parametrize("shape", [(6, 20), (3, 5003), (2, 7, 5, 9)], ids=str)
def test_absolute_differences_of_normalized_rows(backend, shape, normalize):
    """The slope of each element is 1 or -1, or 0 where nothing differs: there the rows' gradient is 0."""
    student, teacher = torch.randn(shape), torch.randn(shape)
    student[1] = teacher[1]
    loss_function = functools.partial(functional.feature_smooth_l1, beta=0, normalize=normalize)
    loss, grad = run(loss_function, student, teacher)
    loss_ref, grad_ref = truth(f"feature_smooth_l1-{normalize}-0", student, teacher)
    assert error(loss, loss_ref) <= PROMISED[torch.float32]
    assert error(grad, grad_ref) <= 2 * PROMISED[torch.float32]
    assert not grad[1].any()


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(backend, name):
    student = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    teacher, mask = torch.randn(2, 3, dtype=torch.float64), torch.tensor([True, False])
    for reduction in REDUCTIONS:
        assert gradcheck(
            backend, lambda s, reduction=reduction: LOSSES[name](s, teacher, reduction=reduction, mask=mask), student
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_retained_graph_gives_the_same_again(backend, name, reduction):
    student = torch.randn(6, 9, requires_grad=True)
    loss = LOSSES[name](student, torch.randn(6, 9), reduction=reduction).sum() * 0.5
    grads = [torch.autograd.grad(loss, student, retain_graph=again)[0] for again in (True, True, False)]
    assert grads[0].any()
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_stay(backend, name):
    student, teacher = torch.randn(6, 9, requires_grad=True), torch.randn(6, 9)
    before = student.detach().clone(), teacher.clone()
    LOSSES[name](student, teacher).backward()
    assert torch.equal(student.detach(), before[0])
    assert torch.equal(teacher, before[1])


@pytest.mark.parametrize("name", LOSSES)
def test_same_bits_whatever_the_threads(threads, name):
    students, teachers = ([torch.randn(300, 700), torch.randn(4, 70, 30, 30)] for _ in range(2))
    found = []
    for n in (1, 2, 3):
        threads(n)
        leaves = [x.clone().requires_grad_() for x in students]
        loss = LOSSES[name](leaves, teachers)
        found.append((loss, *torch.autograd.grad(loss, leaves)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_normalizer_of_zero_is_looked_at_for_every_layer(backend):
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert functional.feature_mse([x[:0], y[:0]], [x[:0], x[:0]], normalizer=0) == 0
    with pytest.raises(ValueError, match="normalizer: 0 is wanted only where no row counts"):
        functional.feature_mse([x[:0], x], [x[:0], y], normalizer=0)
