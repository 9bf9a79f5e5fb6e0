"""adaptive_kl_div: which classes are the teacher's head, and what its share of the differences makes of the weights."""

import functools

import numpy as np
import pytest
import torch
from rows_checks import run
from tolerances import FLOOR, error
from truth import truth

from fastkd import _backend, _check, functional, reference
from fastkd._calls import HeadWeight
from fastkd.functional import adaptive_kl_div, kl_div, reverse_kl_div, symmetric_kl_div
from fastkd.ops import head


def weights(backend, student, teacher, mu=0.5, mask=None):
    """Of KL(p || q) in each row, as a backend computes them."""
    name = backend.partition("-")[0]
    if name == "torch":
        log_p, log_q = (x.log_softmax(-1) for x in (student, teacher))
        return reference.OF_DERIVED["adaptive_kl_div"](log_p, log_q, mu, teacher).squeeze(-1).double()
    options = _check.LogitsOptions(1.0, 1.0, True, mask, None, "none", None, False, mu)
    return head.student_weight(_backend.namespace(name), student, teacher, options)


def in_head(teacher, mu):
    """Word for word: classes with q >= tau, for the smallest tau whose classes sum to at most mu; and the best."""
    heads = []
    for q, logits in zip(torch.softmax(teacher.double(), -1), teacher, strict=True):
        values, which = logits.unique(return_inverse=True)
        mass = torch.zeros(len(values), dtype=torch.float64).index_add(0, which, q)
        fits = values[mass.flip(0).cumsum(0).flip(0) <= mu]
        heads.append(logits >= (fits.min() if len(fits) else logits.max()))
    return torch.stack(heads)


def expected(student, teacher, mu):
    difference = (student.double().softmax(-1) - teacher.double().softmax(-1)).abs()
    tail = torch.where(in_head(teacher, mu), 0.0, difference).sum(-1)
    return tail / difference.sum(-1)


KINDS = {
    "random": lambda t: t,
    "flat": lambda t: t / 10,
    "peaked": lambda t: t * 10,
    "equal in groups": lambda t: t.round(),
    "two values": lambda t: t.sign(),
    "all equal": torch.zeros_like,
    "best ones equal": lambda t: t.clamp(max=0.5),
    "impossible classes": lambda t: t.index_fill(-1, torch.arange(0, t.shape[-1], 3), -torch.inf),
    "far from 0": lambda t: t + 1000,
    "zeros of both signs": lambda t: torch.where(t > 0, -0.0, 0.0),
}


@pytest.mark.parametrize("mu", [0.0, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("V", [1, 10, 77, 1300])
def test_the_weights_are_those_of_the_head(backend, V, kind, mu):
    rows = 20 if V < 70 else 2
    teacher, student = KINDS[kind](2 * torch.randn(rows, V)), 2 * torch.randn(rows, V)
    found = weights(backend, student, teacher, mu)
    assert found.dtype == torch.float64
    wanted = expected(student, teacher, mu) if V > 1 else torch.full((rows,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(found, wanted.nan_to_num(0.5), rtol=2e-4 if kind == "far from 0" else 2e-5, atol=2e-6)


def test_hand_computed_heads(backend):
    """q is 0.4, 0.3, 0.2, 0.1, and once more with equal ones."""
    teacher = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.3, 0.1, 0.3, 0.3]]).log()
    student = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.1, 0.4, 0.2, 0.3]]).log()
    # |p - q|: 0.3 of 0.1, 0.3 of 0.4, 0.1 of 0.2, 0.1 of 0.3; and 0.2, 0.3 of 0.1, 0.1, 0
    for mu, tails in ((0.0, (5 / 8, 1 / 2)), (0.69, (5 / 8, 1 / 2)), (0.71, (4 / 8, 1 / 2)), (0.89, (4 / 8, 1 / 2)),
                      (0.91, (3 / 8, 1 / 2))):  # fmt: skip
        torch.testing.assert_close(
            weights(backend, student, teacher, mu), torch.tensor(tails).double(), rtol=1e-5, atol=0
        )


@pytest.mark.parametrize("V", [50, 700])
def test_the_order_of_classes_and_the_number_of_threads_do_not_matter(backend, V, threads):
    teacher, student = torch.randn(9, V).mul(4).round() / 2, torch.randn(9, V)
    # the same differences wherever the head ends within a group would show
    found = weights(backend, student, teacher, 0.4)
    order = torch.randperm(V)
    torch.testing.assert_close(weights(backend, student[:, order], teacher[:, order], 0.4), found, rtol=1e-6, atol=0)
    threads(1)
    assert torch.equal(weights(backend, student, teacher, 0.4), found)


def test_a_limit_that_is_the_mass_of_some_classes(backend):
    """Where sums of floating-point numbers cannot tell on which side it lies, the head is one of two all the same."""
    V = 600
    teacher, student = torch.randn(1, V), torch.randn(1, V)
    top = teacher.max()
    difference = (student.double().softmax(-1) - teacher.double().softmax(-1)).abs()
    for near in (0.2, 0.4):
        depth = near * np.log(V / 0.7)
        mu = teacher.double().softmax(-1)[teacher > top - depth].sum().item()
        for step in (-3, -1, 0, 1, 3):
            found = weights(backend, student, teacher, mu + step * 2e-8)
            bounds = teacher[0].sort(descending=True).values
            shares = torch.stack([(difference * (teacher <= x)).sum() / difference.sum() for x in bounds])
            at = (bounds > top - depth).sum()
            assert (shares[at - 2 : at + 3] - found).abs().min() < 1e-5


@pytest.mark.parametrize("likely", ["outside of the sample", "in the sample", "in the first chunk"])
def test_a_sample_that_is_like_no_other_class(backend, likely):
    """The CPU's kernel looks at every eighth class first, from the fourth on."""
    V = 7500
    at = torch.arange(V) % 8
    chosen = {
        "outside of the sample": at == 0,
        "in the sample": at == 4,
        "in the first chunk": torch.arange(V) < 256,
    }
    for mu in (0.1, 0.5, 0.9):
        teacher, student = torch.randn(2, V) + 6 * chosen[likely], torch.randn(2, V)
        found = weights(backend, student, teacher, mu)
        torch.testing.assert_close(found, expected(student, teacher, mu), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("V", [1023, 1024, 1025, 2049, 262143, 262208])
def test_a_sample_of_any_vocabulary(V):
    teacher, student = 3 * torch.randn(1, V), torch.randn(1, V)
    found = weights("cpu", student, teacher, 0.5)
    torch.testing.assert_close(found, expected(student, teacher, 0.5), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mu", [0.0, 0.3, 0.9, 1.0])
def test_matches_float64(backend, mu, dtype):
    student, teacher = (2 * torch.randn(6, 300, dtype=torch.float64).to(dtype) for _ in range(2))
    loss, grad = run(functools.partial(adaptive_kl_div, mu=mu), student, teacher, temperature=2.0, reduction="none")
    loss_ref, grad_ref = truth("adaptive_kl_div", student, teacher, mu=mu, temperature=2.0, reduction="none")
    compute = reference.compute_dtype(student)
    assert error(loss, loss_ref) <= 40 * FLOOR[compute]
    assert error(grad, grad_ref) <= 40 * FLOOR[compute] + 2 * FLOOR[dtype]


@pytest.mark.parametrize("V", [10, 500])
def test_it_is_symmetric_kl_div_with_these_weights(backend, V):
    student, teacher = torch.randn(4, V), torch.randn(4, V)
    own = weights(backend, student, teacher, 0.3)
    loss, grad = run(functools.partial(adaptive_kl_div, mu=0.3), student, teacher)
    wanted, wanted_grad = run(functools.partial(symmetric_kl_div, student_weight=own), student, teacher)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad)
    assert run(functools.partial(adaptive_kl_div, mu=1.0), student, teacher)[0] == run(kl_div, student, teacher)[0]


def test_only_the_tail_differs(backend):
    """The weight of the forward divergence is 0, which may then be infinite."""
    teacher = torch.tensor([[5.0, 1.0, 0.0, 0.0]])
    student = torch.tensor([[5.0, 0.0, 1.0, 0.0]])  # p = q of the best class
    assert weights(backend, student, teacher, 0.5) == 1
    loss, grad = run(adaptive_kl_div, student, teacher)
    wanted, wanted_grad = run(reverse_kl_div, student, teacher)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize("dim", [-1, 1])
@pytest.mark.parametrize("V", [12, 500])
def test_rows_that_have_no_share(backend, V, dim):
    """Equal, masked, NaN, or without a possible class: the weight is 1/2, so that nothing else is disturbed."""
    student, teacher = torch.randn(20, V), torch.randn(20, V)
    loss = functools.partial(adaptive_kl_div, reduction="none")
    before = run(loss, student, teacher)
    mask = torch.ones(20, dtype=torch.bool)
    student[0] = teacher[0]
    mask[1], student[1], teacher[1, 3] = False, torch.nan, torch.inf
    student[2], teacher[3] = -torch.inf, -torch.inf
    student[4, 5], teacher[5, 6] = torch.nan, torch.inf
    if dim == 1:
        student, teacher = student.T.contiguous().T, teacher.T.contiguous().T
    if backend != "torch":
        assert torch.equal(
            weights(backend, student, teacher, mask=mask)[:6], torch.full((6,), 0.5, dtype=torch.float64)
        )
    rows, grad = run(loss, student, teacher, mask=mask)
    assert rows[:4].tolist() == [0, 0, torch.inf, 0]
    assert not grad[:4].any()
    assert rows[4:6].isnan().all()
    assert grad[4:6].isnan().any(-1).all()
    torch.testing.assert_close(rows[6:], before[0][6:])
    torch.testing.assert_close(grad[6:], before[1][6:])


def test_near_convergence_the_share_keeps_its_digits(backend):
    teacher = 2 * torch.randn(8, 1000)
    student = teacher + 1e-5 * torch.randn(8, 1000)
    w = student.double() - teacher.double()
    q = teacher.double().softmax(-1)
    difference = (q * (w - (q * w).sum(-1, keepdim=True))).abs()  # to first order
    wanted = torch.where(in_head(teacher, 0.5), 0.0, difference).sum(-1) / difference.sum(-1)
    torch.testing.assert_close(weights(backend, student, teacher), wanted, rtol=3e-2, atol=1e-3)


@pytest.mark.parametrize("V", [10, 2000])
def test_no_gradient_flows_through_the_weights(V):
    student, teacher = torch.randn(3, V, dtype=torch.float64), torch.randn(3, V, dtype=torch.float64)
    own = weights("cpu", student, teacher)
    grads = [
        run(f, student, teacher)[1] for f in (adaptive_kl_div, functools.partial(symmetric_kl_div, student_weight=own))
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_as_the_soft_part_of_kd_loss(backend, reduction):
    student, teacher, target = torch.randn(6, 40), torch.randn(6, 40), torch.randint(40, (6,))
    target[2] = -100
    loss = functools.partial(functional.kd_loss, target=target, divergence="adaptive_kl_div", mu=0.3, soft_weight=1.0)
    found, grad = run(functools.partial(loss, hard_weight=0.0), student, teacher, temperature=2.0, reduction=reduction)
    alone = functools.partial(adaptive_kl_div, mu=0.3, mask=target != -100)
    wanted, wanted_grad = run(alone, student, teacher, temperature=2.0, reduction=reduction)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(grad, wanted_grad)


def test_mu_is_a_number():
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    with pytest.raises(TypeError, match=r"^mu: a number wanted, got Tensor"):
        adaptive_kl_div(student, teacher, mu=torch.full((3,), 0.5))
    with pytest.raises(TypeError, match=r"^mu: a number wanted, got Tensor"):
        functional.kd_loss(
            student, teacher, torch.tensor([0, 1, 2]), divergence="adaptive_kl_div", mu=torch.tensor(0.5)
        )
    with pytest.raises(ValueError, match=r"^mu: divergence='kl_div' has no parameter"):
        functional.kd_loss(student, teacher, torch.tensor([0, 1, 2]), mu=0.5)


def test_a_teacher_that_learns_is_not_told_of_two_calls():
    with pytest.raises(ValueError, match=r"^teacher: .*detach\(\) it$"):
        adaptive_kl_div(torch.randn(3, 5), torch.randn(3, 5, requires_grad=True))


def test_the_op_is_what_torch_expects():
    for dtype, mask in ((torch.float32, None), (torch.float64, torch.tensor([True, False, True]))):
        student, teacher = torch.randn(3, 7, dtype=dtype), torch.randn(3, 7)
        weight = torch.empty(3, dtype=torch.float64)
        call = HeadWeight(student, teacher, 1.0, None, 2.0, None, mask, 0.5, None, weight)
        torch.library.opcheck(torch.ops.fastkd.head_weight.default, tuple(call))


@pytest.mark.parametrize(
    ("change", "match"),
    [({"mu": 1.5}, "mu: a number from 0 to 1 wanted, got 1.5"), ({"temperature": 0.0}, "temperature: a positive"),
     ({"student_weight": torch.empty(2, dtype=torch.float64)}, "student_weight: a contiguous float64 tensor"),
     ({"mu_tensor": torch.full((3,), 0.5, dtype=torch.float64)}, "mu: one number")],
)  # fmt: skip
def test_the_op_checks_what_it_is_given(change, match):
    call = HeadWeight(torch.randn(3, 7), torch.randn(3, 7), 1.0, None, 1.0, None, None, 0.5, None,
                      torch.empty(3, dtype=torch.float64))._replace(**change)  # fmt: skip
    with pytest.raises(RuntimeError, match=match):
        torch.ops.fastkd.head_weight(*call)
