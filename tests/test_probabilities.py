"""Probabilities: a teacher whose probabilities are given, and need not sum to 1."""

import functools

import pytest
import torch
from probabilities_checks import (
    DTYPES,
    GENERATED,
    LEADING,
    LOSSES,
    MASK,
    OPTIONS,
    PARAMETERS,
    TARGET,
    V,
    check,
    inputs,
    run,
    truth,
)
from rows_checks import storage_error
from tolerances import FLOOR, NEAR_CONVERGENCE, error

import fastkd
from fastkd import LinearLogits, Probabilities, TopKLogProbs, functional
from fastkd._divergences import BY_NAME


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sums", ["one", "any"])
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_definition(backend, name, sums, options, dtype):
    options = dict(OPTIONS[options])
    if options.get("reduction") == "none":
        options["upstream"] = 1 + GENERATED
    check(name, *inputs(dtype, sums), **options)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters(backend, name, which):
    options = PARAMETERS[name][which]
    check(name, *inputs(), **options)


@pytest.mark.parametrize("name", ["js_div", "symmetric_kl_div", "skew_kl_div", "skew_reverse_kl_div"])
def test_at_the_ends_of_its_range_a_parameter_is_another_divergence(backend, name):
    """By convention, for a number and for rows alike."""
    student, teacher = inputs()
    entry = BY_NAME[name].parameter
    for value, other in entry.ends.items():
        expected = run(LOSSES[other], student, teacher)
        for x in (value, torch.full(LEADING, value), torch.tensor(value)):
            for a, b in zip(run(LOSSES[name], student, teacher, **{entry.name: x}), expected, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["kl_div", "soft_cross_entropy", "js_div", "total_variation", "alpha_beta_div"])
def test_probabilities_of_zero(backend, name):
    check(name, *inputs(sums="zeros"))


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_of_zeros_knows_nothing(backend, name):
    student, teacher = inputs()
    teacher[0, 3] = 0
    loss, grad = run(LOSSES[name], student, teacher, reduction="none")
    assert loss[0, 3] == 0
    assert not grad[0, 3].any()
    counts = torch.ones(LEADING, dtype=torch.bool)
    counts[0, 3] = False
    expected = run(LOSSES[name], student, teacher, reduction="none", mask=counts)
    for a, b in zip((loss, grad), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["reverse_kl_div", "symmetric_kl_div"])
def test_what_the_teacher_rules_out_is_infinite(backend, name):
    student, teacher = inputs()
    teacher[1, 1, 5] = 0
    loss, grad = run(LOSSES[name], student, teacher, reduction="none")
    assert loss[1, 1] == torch.inf
    assert not grad[1, 1].any()
    assert loss.isinf().sum() == 1


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("T", [1.0, 2.5])
def test_coins(backend, T, standardize):
    """Of bernoulli_kl_div they are those of its coins; q = 0 and q = 1 are sure."""
    student, _ = inputs()
    teacher = torch.rand(*LEADING, V, generator=torch.Generator().manual_seed(1))
    if not standardize:
        teacher[0, 0, :2] = torch.tensor([0.0, 1.0])
    options = {"temperature": T, "standardize": standardize}
    logits = 2 * torch.logit(teacher.double())
    leaf = student.double().requires_grad_()
    expected = functional.bernoulli_kl_div(leaf, logits, **options)
    loss, grad = run(functional.bernoulli_kl_div, student, teacher, own=2.0, **options)
    assert error(loss, expected.detach()) <= 32 * FLOOR[torch.float32]
    assert error(grad, torch.autograd.grad(expected, leaf)[0]) <= 32 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", ["kl_div", "adaptive_kl_div", "total_variation"])
def test_standardized_they_stand_for_logits(backend, name):
    student, teacher = inputs()
    for a, b in zip(
        run(LOSSES[name], student, teacher, standardize=True, temperature=0.7),
        run_of_logits(LOSSES[name], student, teacher.log(), standardize=True, temperature=0.7),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def run_of_logits(loss, student, teacher, **options):
    leaf = student.detach().clone().requires_grad_()
    found = loss(leaf, teacher, **options)
    return found.detach(), torch.autograd.grad(found, leaf)[0]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 2.0), (1.5, 0.0)], ids=str)
@pytest.mark.parametrize("name", ["kl_div", "js_div", "total_variation", "adaptive_kl_div", "bernoulli_kl_div"])
def test_beside_labels(backend, name, weights, dtype):
    """The hard part knows nothing of the teacher's sums."""
    student, teacher = inputs(dtype, "any")
    teacher = teacher.clamp(max=1)
    hard_weight, soft_weight = weights
    loss, grad = run(
        functools.partial(functional.kd_loss, divergence=name, hard_weight=hard_weight, soft_weight=soft_weight),
        student, teacher, target=TARGET, weight=1 + GENERATED, label_smoothing=0.1, temperature=1.0,
    )  # fmt: skip
    counts, leaf = TARGET != -100, student.double().requires_grad_()
    hard = torch.nn.functional.cross_entropy(
        leaf.flatten(0, 1), TARGET.flatten(), label_smoothing=0.1, reduction="none"
    ).view(LEADING)
    hard = (hard * (1 + GENERATED))[counts].mean()
    with fastkd.backend("torch"):
        soft = getattr(functional, name)(
            leaf, Probabilities(teacher.double()), mask=counts, weight=(1 + GENERATED).double()
        )
    right = hard_weight * hard + soft_weight * soft
    compute = torch.float64 if dtype is torch.float64 else torch.float32
    assert error(loss, right.detach()) <= 32 * FLOOR[compute]
    of_right = torch.autograd.grad(right, leaf)[0]
    assert error(grad, of_right) <= 32 * FLOOR[compute] + storage_error(grad, of_right)


@pytest.mark.parametrize("name", ["kl_div", "js_div", "total_variation", "bernoulli_kl_div"])
def test_parts(backend, name):
    student, teacher = inputs()
    teacher = teacher.clamp(max=1)
    options = {"divergence": name, "temperature": 2.0, "teacher_temperature": 1.0, "mask": MASK}
    found = functional.kd_loss(student, Probabilities(teacher), TARGET, return_parts=True, **options)
    counts = MASK & (TARGET != -100)
    soft = getattr(functional, name)(
        student, Probabilities(teacher), temperature=2.0, teacher_temperature=1.0, mask=counts
    )
    torch.testing.assert_close(found.soft, soft)
    hard = torch.nn.functional.cross_entropy(student[counts], TARGET[counts])
    torch.testing.assert_close(found.hard, hard)
    torch.testing.assert_close(found.loss, (soft + hard) / 2)
    agreement = (student.argmax(-1) == teacher.argmax(-1))[counts].float().mean()
    torch.testing.assert_close(found.agreement, agreement)
    if name != "bernoulli_kl_div":
        q, log_p = teacher[counts], (student[counts] / 2).log_softmax(-1)
        torch.testing.assert_close(found.teacher_entropy, -(q * q.log()).sum(-1).mean())
        torch.testing.assert_close(found.student_entropy, -(log_p.exp() * log_p).sum(-1).mean())


def parted(name, student, teacher, T, alpha=1.0, beta=8.0, gamma=1.5):
    """dkd_loss and nkd_loss at temperature T, as published, whatever q sums to; that of nkd_loss's hard part is 1."""
    q = teacher.double()
    softened = q if T == 1 else q ** (1 / T) / (q ** (1 / T)).sum(-1, keepdim=True)
    sides = [(student.double() / T).softmax(-1), softened, student.double().softmax(-1), q]
    rows = []
    for *of_row, y in zip(*(x.flatten(0, -2) for x in sides), TARGET.flatten(), strict=True):
        if y < 0:
            continue
        others = torch.arange(len(of_row[0])) != y
        a, b, a_1, b_1 = of_row
        a_rest, b_rest = a[others], b[others]
        a_hat, b_hat = a_rest / a_rest.sum(), b_rest / b_rest.sum()
        if name == "dkd_loss":
            two = b[y] * (b[y] / a[y]).log() + b_rest.sum() * (b_rest.sum() / a_rest.sum()).log()
            rows.append(T**2 * (alpha * two + beta * (b_hat * (b_hat / a_hat).log()).sum()))
        else:
            rows.append(-b_1[y] * a_1[y].log() - gamma * T**2 * (b_hat * a_hat.log()).sum())
    return torch.stack(rows).mean()


@pytest.mark.parametrize("T", [1.0, 3.0])
@pytest.mark.parametrize("name", ["dkd_loss", "nkd_loss"])
def test_losses_that_part_the_target(backend, name, T):
    student, teacher = inputs()
    loss, grad = run(getattr(functional, name), student, teacher, target=TARGET, temperature=T)
    leaf = student.double().requires_grad_()
    right = parted(name, leaf, teacher, T)
    assert error(loss, right.detach()) <= 32 * FLOOR[torch.float32]
    assert error(grad, torch.autograd.grad(right, leaf)[0]) <= 32 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", ["kl_div", "total_variation", "kd_loss"])
def test_beside_a_students_head(backend, name):
    _, teacher = inputs()
    loss = functools.partial(functional.kd_loss, target=TARGET) if name == "kd_loss" else LOSSES[name]
    parts = [x.requires_grad_() for x in (torch.randn(*LEADING, 9), torch.randn(V, 9), torch.randn(V))]
    student = LinearLogits(*parts, slab_bytes=8 * V * 4, softcap=3.0)
    for options in ({}, {"mask": MASK}):
        found = loss(student, Probabilities(teacher), **options)
        expected = loss(student.logits(), Probabilities(teacher), **options)
        torch.testing.assert_close(found, expected)
        of = [torch.autograd.grad(x, parts) for x in (found, expected)]
        for a, b in zip(*of, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["kl_div", "total_variation"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_in_place_and_in_slabs(backend, dtype, reduction, name, monkeypatch):
    from fastkd.ops import standardize

    monkeypatch.setitem(standardize.SLAB, "cpu", 5 * V)
    student, teacher = inputs(dtype)
    grads = []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        LOSSES[name](leaf * 1, Probabilities(teacher), inplace=inplace, reduction=reduction).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)
    check(name, student, teacher, reduction=reduction)


WITH_TARGETS = {
    name: functools.partial(getattr(functional, name), target=TARGET) for name in ("kd_loss", "dkd_loss", "nkd_loss")
}
WITH_TARGETS["kd_loss of js_div"] = functools.partial(WITH_TARGETS["kd_loss"], divergence="js_div")


@pytest.mark.parametrize("held", [torch.nan, torch.inf, -3.0])
@pytest.mark.parametrize("name", [*LOSSES, *WITH_TARGETS, "bernoulli_kl_div", "dist_loss"])
def test_rows_that_do_not_count_may_hold_anything(backend, name, held):
    loss = (LOSSES | WITH_TARGETS).get(name) or getattr(functional, name)
    student, teacher = inputs()
    teacher = teacher.clamp(max=1)
    expected = run(loss, student, teacher, mask=MASK)
    student[~MASK], teacher[~MASK] = torch.nan, held
    for a, b in zip(run(loss, student, teacher, mask=MASK), expected, strict=True):
        torch.testing.assert_close(a, b)
    assert run(loss, student, teacher, mask=torch.zeros_like(MASK))[0] == 0


@pytest.mark.parametrize("name", ["kl_div", "js_div", "negative_log_acceptance"])
@pytest.mark.parametrize(
    "T", [0.7, torch.tensor(0.7), torch.full(LEADING, 0.7), torch.tensor(0.7, dtype=torch.bfloat16)]
)
def test_a_temperature_is_theirs_in_any_dtype(backend, name, T):
    """That of a tensor is rounded to its own dtype, and again to what is computed in."""
    student, teacher = inputs(torch.float64)
    own = 0.7
    found = run(LOSSES[name], student, teacher, own=own, temperature=T, teacher_temperature=T)
    exact = float(torch.as_tensor(T).flatten()[0])
    expected = truth(name, student, teacher, own=exact, temperature=exact)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("size", [10.0, 1000.0])
@pytest.mark.parametrize("name", LOSSES)
def test_sums_that_are_far_from_1(backend, name, size):
    """Such as counts of what people chose."""
    student, teacher = inputs()
    check(name, student, size * teacher, times=64, reduction="none")


def test_every_divergence_is_known_for_any_sum():
    from fastkd import _masses, _terms
    from fastkd._divergences import REGISTRY

    names = set(REGISTRY) - {"bernoulli_kl_div"}
    assert set(_masses._OF) | set(_masses.WITHOUT) == names
    assert set(_terms._TERMS) | {"negative_log_acceptance"} == names


@pytest.mark.parametrize("name", ["kl_div", "total_variation"])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(backend, leading, name):
    student, teacher = inputs(leading=leading)
    if 0 in leading:
        loss, grad = run(LOSSES[name], student, teacher)
        assert (loss, grad.shape) == (0, student.shape)
        return
    check(name, student, teacher, reduction="sum", normalizer=1.0)
    if len(leading) == 3:
        check(name, *(x.transpose(0, 1) for x in (student, teacher)), reduction="sum", normalizer=1.0)


@pytest.mark.parametrize("name", ["kl_div", "js_div", "total_variation"])
def test_near_convergence(kernel, name):
    """Plain PyTorch sums probabilities in float32, and has lost what they are beside 1."""
    generator = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(64, 3000, generator=generator)
    student = teacher + 2e-3 * torch.randn(teacher.shape, generator=generator)
    teacher = teacher.double().softmax(-1).float()
    loss, grad = run(LOSSES[name], student, teacher)
    right, of_right = truth(name, student, teacher)
    assert right < 1e-3
    # of rows that sum to 1 but for rounding, what rounding left is a part of the loss
    assert error(loss, right) <= NEAR_CONVERGENCE
    if name != "total_variation":  # whose gradient jumps where p = q
        assert error(grad, of_right) <= 5 * NEAR_CONVERGENCE


def test_gradients_numerically(backend):
    student, teacher = inputs(torch.float64, leading=(4,), V=7)
    for name in ("kl_div", "symmetric_kl_div", "alpha_beta_div", "negative_log_acceptance"):
        loss = functools.partial(LOSSES[name], teacher=Probabilities(teacher))
        assert torch.autograd.gradcheck(loss, student.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(("which", "head"), [("cpu", False), ("cpu", True), ("torch", False)])
@pytest.mark.parametrize("name", ["js_div", "total_variation", "bernoulli_kl_div"])
def test_compiled(which, head, name):
    def loss(student, teacher, weight, T):
        student = LinearLogits(student, weight) if head else student
        return getattr(functional, name)(student, Probabilities(teacher, temperature=T), temperature=T)

    with fastkd.backend(which):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows, T in ((6, 1.0), (9, 2.0)):
            student, teacher = inputs(leading=(rows,))
            teacher, weight = teacher.clamp(max=1), torch.randn(V, V)
            leaf, found = student.requires_grad_(), []
            for function in (compiled, loss):
                value = function(leaf, teacher, weight, T)
                found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
            torch.testing.assert_close(*found)


@pytest.mark.parametrize("which", ["cpu", "torch"])
@pytest.mark.parametrize("form", ["probabilities", "ignored tail"])
def test_numbers_that_change_compile_twice_at_most(which, form):
    from torch._dynamo.testing import CompileCounterWithBackend

    student, teacher = inputs()
    log_probs, indices = teacher.log().log_softmax(-1).topk(4)

    def loss(x):
        if form == "probabilities":
            return functional.kl_div(student, Probabilities(teacher, temperature=x), temperature=x)
        return functional.kl_div(student, TopKLogProbs(indices, log_probs, tail="ignore", log_prob_min=-x))

    with fastkd.backend(which):
        torch.compiler.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(loss, fullgraph=True, backend=counter)
        for x in (1.0, 1.5, 2.0, 2.5):
            torch.testing.assert_close(compiled(x), loss(x))
    assert counter.frame_count <= 2


def test_modules(backend):
    student, teacher = inputs()
    given = Probabilities(teacher)
    assert torch.equal(fastkd.KLDivLoss()(student, given), functional.kl_div(student, given))
    assert repr(given) == "Probabilities([3, 7, 40], temperature=1.0)"
