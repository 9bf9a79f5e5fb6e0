"""mask and weight of the relational losses: rows that are not there, and rows that count more."""

import pytest
import torch
import torch.nn.functional as F
from conftest import gradcheck
from relation_cases import DTYPES, LOSSES
from relation_checks import MODULES, PROMISED, rounding, run
from relation_truth import nearest
from tolerances import FLOOR, error

from fastkd import functional
from fastkd._dtypes import compute_dtype

pytestmark = pytest.mark.products

N = 24  # the fewer, the sooner an interpreter is done
GENERATOR = torch.Generator().manual_seed(5)
S, T = torch.randn(N, 6, generator=GENERATOR), torch.randn(N, 9, generator=GENERATOR)
MASKS = {
    "some": torch.rand(N, generator=GENERATOR) < 0.6,
    "prefix": torch.arange(N) < 11,
    "not_the_first": torch.arange(N) > 0,
    "two": (torch.arange(N) == 3) | (torch.arange(N) == 20),
    "all": torch.ones(N, dtype=torch.bool),
}
WEIGHTED = [name for name in LOSSES if name not in ("rkd_angle", "rkd_loss")]  # a triplet is no row's
WEIGHT = torch.rand(N, generator=GENERATOR) * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LOSSES)
def test_masked_rows_are_not_there(backend, name, mask, dtype):
    mask, student, teacher = MASKS[mask], S.to(dtype), T.to(dtype)
    hidden = student.masked_fill(~mask[:, None], torch.nan), teacher.masked_fill(~mask[:, None], torch.inf)
    loss, grad = run(LOSSES[name], *hidden, 64.0, mask=mask)
    expected, expected_grad = run(LOSSES[name], student[mask], teacher[mask], 64.0)
    promised = PROMISED[compute_dtype(student, teacher)]
    # of a loss that is 0 by mathematics what rounding leaves of it
    assert error(loss, expected) <= promised or max(loss, expected) <= promised**2
    assert not grad[~mask].any()
    bound = promised + rounding(grad, expected_grad, loss.dtype)
    assert error(grad[mask], expected_grad) <= bound or max(grad.norm(), expected_grad.norm()) <= 64 * promised


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_hardly_any_row_is_left(backend, name, dtype, left):
    mask = torch.arange(N) == (7 if left else N)
    student, teacher = (x.to(dtype).masked_fill(~mask[:, None], torch.nan) for x in (S, T))
    loss, grad = run(LOSSES[name], student, teacher, mask=mask)
    assert loss.abs() <= 1e-12
    assert grad.double().norm() <= 1e-6
    assert not grad[~mask].any()
    if name != "gram_mse":  # of which one row is compared with itself
        assert loss == 0
        assert not grad.any()


@pytest.mark.parametrize("name", ["similarity_preserving", "pkt"])
def test_a_single_row_has_nothing_to_learn_whatever_its_length_rounds_to(backend, name):
    """Divided by its own length a row is 1, but for a rounding that depends on the row and on the processor."""
    for row in range(N):
        loss, grad = run(LOSSES[name], S, T, mask=torch.arange(N) == row)
        assert loss == 0
        assert not grad.any()


def distances(x, mean=True):
    d = (x[:, None] - x[None]).square().sum(2).clamp(min=1e-12).sqrt()
    d = d * (1 - torch.eye(len(x), dtype=x.dtype))
    return d / (d.sum() / (len(x) * (len(x) - 1))) if mean else d


def similar(x):
    return F.normalize(x @ x.T, dim=1)


def cosines(x):
    return F.normalize(x, dim=1) @ F.normalize(x, dim=1).T


def probabilities(x):
    x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
    return (x @ x.T + 1) / (x @ x.T + 1).sum(1, keepdim=True)


def log_softmax(x):
    s = (x @ x.T / x.shape[1] ** 0.5).masked_fill(torch.eye(len(x), dtype=torch.bool), -torch.inf)
    return F.log_softmax(s, 1).masked_fill(torch.eye(len(x), dtype=torch.bool), -1e4)


def triplet_rows(s, t):
    d, similar = distances(s, mean=False), nearest(t, 5)
    different = ~similar & ~torch.eye(len(s), dtype=torch.bool)
    e = (1 + d[:, :, None] - d[:, None, :]).clamp(min=0) * similar[:, :, None] * different[:, None, :]
    return e.sum((1, 2)) / different.sum(1) / len(s)


# Each row's terms of the sum, [N].
ROWS = {
    "relational_triplet": triplet_rows,
    "rkd_distance": lambda s, t: F.huber_loss(distances(s), distances(t), reduction="none").sum(1) / len(s) ** 2,
    "similarity_preserving": lambda s, t: (similar(s) - similar(t)).square().sum(1) / len(s) ** 2,
    "gram_mse": lambda s, t: (cosines(s) - cosines(t)).square().sum(1) / len(s) ** 2,
    "pkt": lambda s, t: (
        probabilities(t) * torch.log((probabilities(t) + 1e-7) / (probabilities(s) + 1e-7))
    ).sum(1) / len(s) ** 2,
    "relation_kl": lambda s, t: F.kl_div(log_softmax(s), log_softmax(t), log_target=True, reduction="none").sum(1) / len(s),
}  # fmt: skip


def weighted(name, student, teacher, weight, mask):
    """Loss and gradient in float64, from the formula."""
    x = student[mask].double().requires_grad_()
    terms = ROWS[name](x, teacher[mask].double())
    if name == "pkt":  # probabilities of a row add up to 1: the loss is of first order in their errors
        terms = terms + (probabilities(x) - probabilities(teacher[mask].double())).sum(1) / len(x) ** 2
    loss = (terms * weight[mask].double()).sum()
    grad = torch.zeros(student.shape, dtype=torch.float64)
    grad[mask] = torch.autograd.grad(loss, x)[0]
    return loss.detach(), grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", WEIGHTED)
def test_weights_multiply_the_terms_of_a_row(backend, name, masked, dtype):
    mask = MASKS["some" if masked else "all"]
    student, teacher = S.to(dtype), T.to(dtype)
    loss_ref, grad_ref = weighted(name, student, teacher, WEIGHT, mask)
    options = {"weight": WEIGHT.masked_fill(~mask, torch.nan)}
    if masked:
        options["mask"] = mask
    loss, grad = run(LOSSES[name], student, teacher, **options)
    compute = compute_dtype(student, teacher)
    half = 4e-3 if name == "rkd_distance" and backend.startswith(("cuda", "triton")) and dtype.itemsize == 2 else 0.0
    assert error(loss, loss_ref) <= PROMISED[compute] + half
    assert error(grad, grad_ref) <= PROMISED[compute] + rounding(grad, grad_ref, compute)


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "relational_triplet"])
def test_weights_near_convergence(backend, name):
    student = T + 1e-3 * torch.randn(N, 9, generator=torch.Generator().manual_seed(6))
    loss_ref, grad_ref = weighted(name, student, T, WEIGHT, MASKS["all"])
    loss, grad = run(LOSSES[name], student, T, weight=WEIGHT)
    assert error(loss, loss_ref) <= 1e-3
    assert error(grad, grad_ref) <= 1e-3


@pytest.mark.parametrize("name", WEIGHTED)
def test_equal_weights_are_a_factor(backend, name):
    loss, grad = run(LOSSES[name], S, T)
    by_weight = run(LOSSES[name], S, T, weight=torch.full((N,), 0.5, dtype=torch.float16))
    assert error(by_weight[0], 0.5 * loss) <= 4 * FLOOR[torch.float32]
    assert error(by_weight[1], 0.5 * grad) <= PROMISED[torch.float32]
    loss, grad = run(LOSSES[name], S, T, weight=torch.zeros(N))
    assert loss == 0
    assert not grad.any()


def test_many_masked_and_weighted_rows(kernel):
    """Several tiles; the gradient's third sweep, for clamped pairs."""
    generator = torch.Generator().manual_seed(8)
    student, teacher = torch.randn(700, 12, generator=generator), torch.randn(700, 8, generator=generator)
    if not kernel.startswith("cpu"):
        student, teacher = student[:150], teacher[:150]
    weight, mask = torch.rand(len(student), generator=generator), torch.rand(len(student), generator=generator) < 0.8
    for delta in (1.0, 0.1):
        x = student[mask].double().requires_grad_()
        terms = F.huber_loss(distances(x), distances(teacher[mask].double()), reduction="none", delta=delta).sum(1)
        expected = (terms * weight[mask].double()).sum() / len(x) ** 2
        loss, grad = run(functional.rkd_distance, student, teacher, mask=mask, weight=weight, delta=delta)
        assert error(loss, expected.detach()) <= PROMISED[torch.float32]
        assert error(grad[mask], torch.autograd.grad(expected, x)[0]) <= PROMISED[torch.float32]


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(backend, name):
    student, teacher, mask = S[:6].double().requires_grad_(), T[:6].double(), torch.arange(6) != 2
    options = {"mask": mask, "weight": WEIGHT[:6]} if name in WEIGHTED else {"mask": mask}
    assert gradcheck(backend, lambda s: LOSSES[name](s, teacher, **options), student)


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_masks_and_weights_broadcast_to_the_rows(backend, name, shape):
    options = {"mask": torch.ones(shape, dtype=torch.bool)}
    whole = {"mask": MASKS["all"]}
    if name in WEIGHTED:
        options["weight"], whole["weight"] = torch.full(shape, 0.5), torch.full((N,), 0.5)
    found, expected = run(LOSSES[name], S, T, **options), run(LOSSES[name], S, T, **whole)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_masks_of_batches_broadcast(backend):
    student, teacher = torch.randn(3, 8, 5), torch.randn(3, 8, 6)
    for mask in (torch.arange(8) < 5, torch.tensor([[True], [False], [True]])):
        found = run(functional.gram_mse, student, teacher, mask=mask, weight=torch.full((1, 8), 0.5))
        whole = {"mask": mask.expand(3, 8).contiguous(), "weight": torch.full((3, 8), 0.5)}
        expected = run(functional.gram_mse, student, teacher, **whole)
        assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", LOSSES)
def test_modules_take_them(name):
    mask = MASKS["some"]
    options = {"mask": mask, "weight": WEIGHT} if name in WEIGHTED else {"mask": mask}
    function = LOSSES[name](S, T, **options, **getattr(MODULES[name], "keywords", {}))
    assert torch.equal(MODULES[name]()(S, T, **options), function)


@pytest.mark.parametrize("name", LOSSES)
def test_compiled(name):
    options = {"mask": MASKS["some"]} | ({"weight": WEIGHT} if name in WEIGHTED else {})
    compiled = torch.compile(lambda s, t: LOSSES[name](s, t, **options), fullgraph=True, backend="aot_eager")
    ours, plain = run(compiled, S, T), run(LOSSES[name], S, T, **options)
    assert error(ours[0], plain[0]) <= 4 * FLOOR[torch.float32]
    assert error(ours[1], plain[1]) <= 4 * FLOOR[torch.float32]


BAD = {
    "shape": ({"mask": torch.ones(3) > 0}, ValueError, r"mask: .*\[24\] wanted.* got \[3\]"),
    "dtype": ({"mask": torch.ones(N)}, TypeError, "mask: torch.bool wanted"),
    "number": ({"mask": True}, TypeError, "mask: a torch.Tensor wanted, got bool"),
    "weight_shape": ({"weight": torch.ones(N + 1)}, ValueError, r"weight: .*\[24\] wanted"),
    "weight_dtype": ({"weight": torch.ones(N).int()}, TypeError, "weight: a floating dtype wanted"),
    "weight_gradient": ({"weight": torch.ones(N, requires_grad=True)}, ValueError, "weight: no gradient flows to it"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", LOSSES)
def test_bad_input(name, bad):
    options, kind, message = BAD[bad]
    if "weight" in options and name not in WEIGHTED:
        kind, message = TypeError, ".*unexpected keyword argument 'weight'"
    for loss in (LOSSES[name], MODULES[name]()):
        with pytest.raises(kind, match=f"^{message}"):
            loss(S, T, **options)
