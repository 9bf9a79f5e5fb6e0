"""dist_loss of what stands in place of logits: heads, and a teacher's probabilities."""

import pytest
import torch
from rows_checks import storage_error
from tolerances import FLOOR, NEAR_CONVERGENCE, error

import fastkd
from fastkd import LinearLogits, Probabilities, TopKLogProbs, functional
from fastkd.functional import dist_loss

LEADING, H, V = (4, 9), 7, 50
ROWS = torch.rand(LEADING, generator=torch.Generator().manual_seed(0))
MASK = ROWS < 0.6
OPTIONS = {
    "plain": {},
    "masked": {"mask": MASK, "temperature": 2.0},
    "one of both": {"inter_weight": 0.0, "intra_weight": 3.0, "eps": 1e-3},
    "standardized": {"standardize": True, "mask": MASK},
    "num_classes": {"num_classes": V - 7},
}


def heads(dtype=torch.float32, seed=0, learns=True):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(size, generator=generator, dtype=torch.float64) for size in ((*LEADING, H), (V, H), (V,))]
    return [x.to(dtype).requires_grad_(learns) for x in parts]


def whole(parts, **options):
    return LinearLogits(*(x.double() for x in parts), **options).logits()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", ["student", "teacher", "both", "softcap"])
@pytest.mark.parametrize("options", OPTIONS)
def test_it_is_the_loss_of_the_logits(backend, options, sides, dtype):
    """And the gradients of hidden states, weight and bias are theirs."""
    options, student, teacher = OPTIONS[options], heads(dtype), heads(dtype, 1, learns=False)
    how = {"softcap": 3.0, "scale": 0.7} if sides == "softcap" else {}
    right_student, right_teacher = whole(student, **how), whole(teacher)
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    s = LinearLogits(*student, slab_bytes=9 * V * compute.itemsize, **how)
    t = LinearLogits(*teacher, slab_bytes=9 * V * compute.itemsize)
    if sides == "student":
        t = right_teacher = right_teacher.to(compute)
    if sides == "teacher":
        leaf = right_student.detach().to(compute).requires_grad_()
        s, student, right_student = leaf, [leaf], leaf.double()
    loss = dist_loss(s, t, **options)
    with fastkd.backend("torch"):
        right = dist_loss(right_student, right_teacher.double(), **options)
    assert loss.dtype is compute
    assert error(loss.detach(), right.detach()) <= 64 * FLOOR[compute]
    grads = torch.autograd.grad(512 * loss, student), torch.autograd.grad(512 * right, student)
    for grad, of_right in zip(*grads, strict=True):
        stored = 2 * storage_error(grad, of_right.double()) if dtype is torch.bfloat16 else 0
        assert error(grad, of_right) <= 400 * FLOOR[compute] + stored


def by_hand(student, q, T, eps=1e-8):
    """From the definition: one less correlations along rows and along columns."""
    p = (student.double() / T).softmax(-1).flatten(0, -2)
    q = q.double().flatten(0, -2)

    def apart(dim):
        a, b = (x - x.mean(dim, keepdim=True) for x in (p, q))
        return (1 - (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + eps)).mean()

    return T**2 * (apart(1) + apart(0))


@pytest.mark.parametrize("T", [1.0, 2.0])
@pytest.mark.parametrize("own", [1.0, 2.0])
def test_probabilities(backend, own, T):
    """As they are at their own temperature, and softened at another."""
    generator = torch.Generator().manual_seed(2)
    student = torch.randn(*LEADING, V, generator=generator)
    given = torch.rand(*LEADING, V, generator=generator) * (0.5 + ROWS[..., None]) / V
    leaf, right_leaf = student.requires_grad_(), student.detach().double().requires_grad_()
    loss = dist_loss(leaf, Probabilities(given, temperature=own), temperature=T)
    softened = given.double() ** (own / T)
    right = by_hand(right_leaf, given if own == T else softened / softened.sum(-1, keepdim=True), T)
    assert error(loss.detach(), right.detach()) <= 64 * FLOOR[torch.float32]
    grads = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(right, right_leaf)[0]
    assert error(*grads) <= 400 * FLOOR[torch.float32]


def test_a_teacher_of_a_wider_type(backend):
    """The loss is in float64, the gradient in the student's own type."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(*LEADING, V, generator=generator).requires_grad_()
    hidden, weight, _ = heads(learns=False)
    logits = hidden.double() @ weight.double().T
    for teacher in (LinearLogits(hidden.double(), weight.double()), Probabilities(logits.softmax(-1))):
        loss, right = dist_loss(student, teacher), dist_loss(student.double(), logits)
        assert loss.dtype is torch.float64
        torch.testing.assert_close(loss, right, rtol=1e-12, atol=0)
        grads = [torch.autograd.grad(x, student)[0] for x in (loss, right)]
        assert grads[0].dtype is torch.float32
        torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)


def test_near_convergence(kernel):
    hidden, weight, bias = heads()
    near = hidden + 1e-3 * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    student = [near.detach().requires_grad_(), weight, bias]
    teacher = [x.detach() for x in (hidden, weight, bias)]
    loss = dist_loss(LinearLogits(*student), LinearLogits(*teacher))
    with fastkd.backend("torch"):
        right = dist_loss(whole(student), whole(teacher).detach())
    assert error(loss.detach(), right.detach()) <= 5 * NEAR_CONVERGENCE
    for grad, of_right in zip(*(torch.autograd.grad(x, student) for x in (loss, right)), strict=True):
        assert error(grad, of_right) <= 25 * NEAR_CONVERGENCE


def test_constant_rows_and_columns(backend):
    """They have correlation 0 and no gradient; rows without any possible class, and none that counts, are no NaN."""
    hidden, weight, _ = heads()
    student = torch.zeros(V)
    student[3:] = -torch.inf
    parts = [hidden, weight, student.requires_grad_()]
    teacher = Probabilities(torch.full((*LEADING, V), 1 / V))
    loss = dist_loss(LinearLogits(*parts), teacher)
    assert loss == 2
    assert not any(x.any() for x in torch.autograd.grad(loss, parts))
    nothing = torch.zeros(LEADING, dtype=torch.bool)
    loss = dist_loss(LinearLogits(*heads()), teacher, mask=nothing)
    assert loss == 0
    zeros = Probabilities(torch.zeros(*LEADING, V))
    assert dist_loss(LinearLogits(*heads()), zeros) == 2


def test_rows_that_do_not_count_may_hold_anything(backend):
    student, teacher = heads(), heads(seed=1, learns=False)
    expected = torch.autograd.grad(dist_loss(LinearLogits(*student), LinearLogits(*teacher), mask=MASK), student)
    with torch.no_grad():
        student[0][~MASK], teacher[0][~MASK] = torch.nan, torch.inf
    found = torch.autograd.grad(dist_loss(LinearLogits(*student), LinearLogits(*teacher), mask=MASK), student)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_in_place_beside_a_teachers_head(backend):
    teacher = LinearLogits(*heads(seed=1, learns=False))
    grads = []
    for inplace in (False, True):
        leaf = torch.randn(*LEADING, V, generator=torch.Generator().manual_seed(4)).requires_grad_()
        dist_loss(leaf * 1, teacher, inplace=inplace).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("which", ["cpu", "torch"])
def test_compiled(which):
    def loss(hidden, weight, teacher):
        return dist_loss(LinearLogits(hidden, weight), Probabilities(teacher))

    with fastkd.backend(which):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (6, 9):
            hidden, weight = torch.randn(rows, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
            teacher = torch.randn(rows, V).softmax(-1)
            found = [function(hidden, weight, teacher) for function in (compiled, loss)]
            torch.testing.assert_close(*found)
            grads = [torch.autograd.grad(x, (hidden, weight)) for x in found]
            torch.testing.assert_close(*grads)


def test_bad_use_is_named(backend):
    student, teacher = LinearLogits(*heads()), LinearLogits(*heads(seed=1, learns=False))
    logits = torch.randn(*LEADING, V)
    few = TopKLogProbs(torch.zeros(*LEADING, 1, dtype=torch.int64), torch.zeros(*LEADING, 1) - 1)
    with pytest.raises(ValueError, match=r"^teacher: dist_loss needs all classes"):
        dist_loss(student, few)
    with pytest.raises(ValueError, match=r"^inplace: LinearLogits have no logits"):
        dist_loss(student, teacher, inplace=True)
    with pytest.raises(ValueError, match=r"^teacher.hidden: no gradient flows"):
        dist_loss(logits, LinearLogits(*heads(seed=1)))
    with pytest.raises(TypeError, match=r"^student: logits or LinearLogits wanted, got Probabilities"):
        dist_loss(Probabilities(logits.softmax(-1)), teacher)
    with pytest.raises(ValueError, match=r"^teacher.probabilities: numbers of at least 0"):
        dist_loss(student, Probabilities(-logits.softmax(-1)))
    with pytest.raises(ValueError, match=r"^teacher: the student's shape"):
        dist_loss(logits[..., :-1], teacher)
    with pytest.raises(ValueError, match=r"^dim: the classes of LinearLogits are last"):
        dist_loss(student, teacher, dim=1)
    assert fastkd.DISTLoss()(student, teacher) == functional.dist_loss(student, teacher)
