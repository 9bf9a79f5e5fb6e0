"""TopKLogProbs: a teacher of which the best classes of each row are known."""

import functools

import literal
import pytest
import torch
from tolerances import FLOOR, NEAR_CONVERGENCE, error
from top_k_checks import (
    DTYPES,
    LEADING,
    LOSSES,
    MASK,
    OPTIONS,
    ROWS,
    TAILS,
    TARGET,
    K,
    V,
    check,
    dense,
    inputs,
    run,
    truth,
)

import fastkd
from fastkd import LinearLogits, TopKLogProbs, functional


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_of_these_classes(backend, name, tail, options, dtype):
    options = dict(OPTIONS[options])
    if options.get("reduction") == "none":
        options["upstream"] = 1 + ROWS
    if "teacher_temperature" in options:
        options["scale"] = 2.0
    check(name, *inputs(dtype), tail, **options)


@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_renormalized_probabilities_are_softened_exactly(backend, name):
    """Those of temperature 1 at temperature 3 are those of the logits over 3."""
    student, indices, log_probs = inputs(padded=False)
    found = run(name, student, indices, log_probs, "renormalize", temperature=3.0)
    logits = (log_probs + 5.0) / 2  # logits over 2 have any constant
    of_logits = run(name, student, indices, logits.log_softmax(-1), "renormalize", 2.0, temperature=3.0)
    for a, b in zip(found, of_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("sides", ["plain", "softcap", "half"])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("name", ["kl_div", "adaptive_kl_div", "kd_loss of js_div"])
def test_beside_a_students_head(backend, name, tail, sides):
    """The gradients of hidden states, weight and bias are those of its logits."""
    _, indices, log_probs = inputs()
    dtype = torch.bfloat16 if sides == "half" else torch.float32
    parts = [torch.randn(*LEADING, 9), torch.randn(V, 9), torch.randn(V)]
    parts = [x.to(dtype).requires_grad_() for x in parts]
    options = {"softcap": 2.0} if sides == "softcap" else {}
    student = LinearLogits(*parts, slab_bytes=8 * V * 4, **options)
    few = TopKLogProbs(indices, log_probs, tail=tail)
    for given in ({}, {"mask": MASK}):
        loss = LOSSES[name](student, few, **given)
        grads = torch.autograd.grad(loss, parts)
        expected = LOSSES[name](student.logits(), few, **given)
        torch.testing.assert_close(loss, expected)
        for x, right in zip(grads, torch.autograd.grad(expected, parts), strict=True):
            assert error(x, right) <= 8 * FLOOR[torch.float32] + (2 * FLOOR[dtype] if dtype != torch.float32 else 0)


def test_a_bucket_of_hardly_anything_keeps_its_digits(backend):
    """A mass of 1e-7 on both sides: what 1 less the others has lost."""
    student = torch.cat([torch.tensor([[9.0, 8.0, 7.0]]), -12.0 + 0.1 * torch.arange(40)[None]], -1)
    exact = student.double().log_softmax(-1)
    indices, log_tail = torch.tensor([[0, 2, 1]]), exact[:, 3:].logsumexp(-1) + 0.3
    assert 1e-8 < log_tail.exp() < 1e-5
    log_probs = exact[:, [0, 2, 1]] + (1 - log_tail.exp()).log() - (1 - exact[:, 3:].exp().sum(-1)).log()
    loss, grad = run("kl_div", student, indices, log_probs.float(), log_tail=log_tail.float())
    _, of_right = truth("kl_div", student, indices, log_probs, "bucket", log_tail=log_tail)
    assert 0 <= loss < 1e-6
    assert error(grad[:, 3:], of_right[:, 3:]) <= 1e-4


def test_loss_is_never_below_0_and_0_where_nothing_is_to_learn(backend):
    student = torch.randn(50, 300)
    log_probs, indices = student.log_softmax(-1).topk(16)
    for name in ("kl_div", "js_div", "reverse_kl_div"):
        loss, grad = run(name, student, indices, log_probs, reduction="none")
        assert (loss >= 0).all()
        assert loss.max() <= 1e-6
        assert grad.abs().max() <= 1e-4


def test_all_classes_known(backend):
    """Then it is the loss of logits."""
    student, teacher = torch.randn(5, 12), torch.randn(5, 12)
    log_probs, indices = teacher.log_softmax(-1).topk(12)
    for tail in TAILS:
        loss, grad = run("kl_div", student, indices, log_probs, tail)
        leaf = student.clone().requires_grad_()
        right = functional.kl_div(leaf, teacher)
        torch.testing.assert_close(loss, right.detach(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grad, torch.autograd.grad(right, leaf)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tail", [*TAILS, "ignore"])
def test_rows_that_do_not_count_may_hold_anything(backend, tail):
    student, indices, log_probs = inputs()
    expected = run("kl_div", student, indices, log_probs, tail, mask=MASK)
    student[~MASK], log_probs[~MASK], indices[~MASK] = torch.nan, 7.0, 10**6
    found = run("kl_div", student, indices, log_probs, tail, mask=MASK)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert not found[1][~MASK].any()
    assert run("kl_div", student, indices, log_probs, tail, mask=torch.zeros_like(MASK))[0] == 0


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_in_place(backend, dtype, reduction, tail):
    student, indices, log_probs = inputs(dtype)
    few, grads = TopKLogProbs(indices, log_probs, tail=tail), []
    for inplace in (False, True):
        leaf = student.clone().requires_grad_()
        functional.js_div(leaf * 1, few, inplace=inplace, reduction=reduction).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("tail", TAILS)
def test_no_rows(backend, tail):
    for leading in ((0,), (3, 0)):
        loss, grad = run("kl_div", *inputs(leading=leading, padded=False), tail)
        assert (loss, grad.shape) == (0, (*leading, V))


@pytest.mark.parametrize("leading", [(), (1,), (2, 3, 4)], ids=str)
def test_any_leading_dimensions(backend, leading):
    student, indices, log_probs = inputs(leading=leading)
    check("kl_div", student, indices, log_probs, "bucket", reduction="sum")
    if len(leading) == 3:
        turned = [x.transpose(0, 1) for x in (student, indices, log_probs)]
        check("kl_div", *turned, "bucket", reduction="sum")


def test_slabs(backend, monkeypatch):
    from fastkd.ops import standardize, top_k

    monkeypatch.setattr(top_k, "_SLAB", 5 * (K + 1))
    monkeypatch.setitem(standardize.SLAB, "cpu", 5 * V)
    for reduction in ("none", "sum"):
        for name in ("js_div", "kd_loss of kl_div"):
            check(name, *inputs(), "bucket", reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("laid", ["classes first", "every other class", "rows at every alignment"])
def test_strided_logits(kernel, laid, dtype):
    student, indices, log_probs = inputs(dtype, leading=(21,))
    shape = {"classes first": (V, 21), "every other class": (21, 2 * V), "rows at every alignment": (21, V + 3)}[laid]
    whole = torch.zeros(shape, dtype=dtype)
    view = whole.T if laid == "classes first" else whole[:, ::2] if laid == "every other class" else whole[:, 1 : V + 1]
    view.copy_(student)
    few = TopKLogProbs(indices, log_probs)
    target = TARGET.flatten()
    for options in ({}, {"target": target}):
        loss = functools.partial(functional.kd_loss if options else functional.kl_div, teacher=few, **options)
        leaf = whole.requires_grad_()
        laid_out = (
            leaf.T if laid == "classes first" else leaf[:, ::2] if laid == "every other class" else leaf[:, 1 : V + 1]
        )
        (strided,) = torch.autograd.grad(loss(laid_out), laid_out)
        plain = student.clone().requires_grad_()
        torch.testing.assert_close(strided, torch.autograd.grad(loss(plain), plain)[0])


def test_more_classes_than_bits_and_many_that_are_known(kernel):
    """On a GPU the bits of shared memory stand for several classes then."""
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(2, 300001, generator=generator)
    log_probs, indices = torch.randn(2, 300001, generator=generator).log_softmax(-1).topk(300)
    found = run("kl_div", student, indices, log_probs)
    with fastkd.backend("torch"):
        expected = run("kl_div", student.double(), indices, log_probs.double())
    for x, right in zip(found, expected, strict=True):
        assert error(x, right) <= 32 * FLOOR[torch.float32]


@pytest.mark.parametrize("soft_weight", [0.0, 1.0])
@pytest.mark.parametrize("hard_weight", [0.0, 1.0])
def test_weights_of_both_parts(backend, hard_weight, soft_weight):
    student, indices, log_probs = inputs()
    few, weights = TopKLogProbs(indices, log_probs), {"hard_weight": hard_weight, "soft_weight": soft_weight}
    leaf = student.requires_grad_()
    counts = TARGET != -100
    loss = functional.kd_loss(leaf, few, TARGET, label_smoothing=0.1, **weights)
    hard = torch.nn.functional.cross_entropy(leaf.flatten(0, 1), TARGET.flatten(), label_smoothing=0.1)
    right = hard_weight * hard + soft_weight * functional.kl_div(leaf, few, mask=counts)
    torch.testing.assert_close(loss, right)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (loss, right)))


@pytest.mark.parametrize("tail", TAILS)
def test_gradients_numerically(backend, tail):
    student, indices, log_probs = inputs(torch.float64, leading=(4,), V=9, classes=9, K=3)
    few = TopKLogProbs(indices, log_probs, tail=tail)
    for name in ("kl_div", "reverse_kl_div", "alpha_beta_div"):
        assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, few), student.requires_grad_(), fast_mode=True)  # noqa: B023


@pytest.mark.parametrize(("which", "head"), [("cpu", False), ("cpu", True), ("torch", False)])
def test_compiled(which, head):
    def loss(student, indices, log_probs, weight):
        student = LinearLogits(student, weight) if head else student
        return functional.js_div(student, TopKLogProbs(indices, log_probs))

    with fastkd.backend(which):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (6, 9):
            student, indices, log_probs = inputs(leading=(rows,))
            weight = torch.randn(V, V)
            leaf, found = student.requires_grad_(), []
            for function in (compiled, loss):
                value = function(leaf, indices, log_probs, weight)
                found.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
            torch.testing.assert_close(*found)


def test_compiled_with_a_temperature_that_changes():
    student, indices, log_probs = inputs()

    def loss(T):
        return functional.kl_div(student, TopKLogProbs(indices, log_probs, temperature=T), temperature=T)

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for T in (1.0, 2.0, 3.0):
        torch.testing.assert_close(compiled(T), loss(T))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_near_convergence(backend, temperature):
    generator = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(64, 3000, generator=generator)
    student = teacher + 2e-3 * torch.randn(teacher.shape, generator=generator)
    log_probs, indices = (teacher.double() / temperature).log_softmax(-1).topk(64)
    log_tail = torch.log1p(-log_probs.exp().sum(-1)).float()
    log_probs = log_probs.float()
    options = {"scale": temperature, "log_tail": log_tail, "temperature": temperature}
    loss, grad = run("kl_div", student, indices, log_probs, **options)
    # what float32 has left of the probabilities of the teacher is what there is to learn
    right, of_right = truth(
        "kl_div", student, indices, log_probs, "bucket", **{**options, "log_tail": log_tail.double()}
    )
    assert right < 1e-5
    assert error(loss, right) <= NEAR_CONVERGENCE
    assert error(grad, of_right) <= 5 * NEAR_CONVERGENCE


@pytest.mark.parametrize("tail", TAILS)
def test_the_gradient_of_both_parts_is_rounded_once(kernel, tail):
    """Where they nearly cancel."""
    student, indices, log_probs = inputs(torch.bfloat16, padded=False)
    few = TopKLogProbs(indices, log_probs.float(), tail=tail)
    target = indices[..., 0]
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = student.detach().to(dtype).requires_grad_()
        loss = functional.kd_loss(leaf, few, target, hard_weight=0.5, soft_weight=0.5)
        grads.append(torch.autograd.grad(loss, leaf)[0].double())
    assert ((grads[0] - grads[1]).abs() <= 2.0**-8 * grads[1].abs() + 1e-9).all()


@pytest.mark.parametrize("tail", [*TAILS, "ignore"])
def test_a_teacher_in_float64(backend, tail):
    """The student is read as it is, in place too."""
    student, indices, log_probs = inputs()
    few = TopKLogProbs(indices, log_probs.double(), tail=tail)
    leaf = student.clone().requires_grad_()
    loss = functional.kd_loss(leaf * 1, few, TARGET, temperature=torch.ones(LEADING), inplace=True)
    assert loss.dtype is torch.float64
    single = functional.kd_loss(leaf, TopKLogProbs(indices, log_probs, tail=tail), TARGET)
    torch.testing.assert_close(loss.float(), single)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (loss, single)))


@pytest.mark.parametrize("tail", [*TAILS, "ignore"])
@pytest.mark.parametrize("divergence", ["kl_div", "js_div"])
def test_parts(backend, tail, divergence):
    student, indices, log_probs = inputs(padded=False)
    few, counts = TopKLogProbs(indices, log_probs, tail=tail), MASK & (TARGET != -100)
    options = {"temperature": 2.0, "teacher_temperature": 1.0}
    leaf = student.clone().requires_grad_()
    found = functional.kd_loss(
        leaf, few, TARGET, mask=MASK, divergence=divergence, return_parts=True, label_smoothing=0.1, **options
    )
    soft = getattr(functional, divergence)(student, few, mask=counts, **options)
    hard = torch.nn.functional.cross_entropy(student[counts], TARGET[counts], label_smoothing=0.1)
    torch.testing.assert_close(found.soft, soft)
    torch.testing.assert_close(found.hard, hard)
    torch.testing.assert_close(found.loss.detach(), (soft + hard) / 2)
    best = indices.gather(-1, log_probs.argmax(-1, keepdim=True)).squeeze(-1)
    torch.testing.assert_close(found.agreement, (student.argmax(-1) == best)[counts].float().mean())
    if tail == "ignore":
        sides = (student / 2).log_softmax(-1).gather(-1, indices), log_probs
    else:
        sides = (x.log_softmax(-1) / 1.0 for x in dense(student / 2, indices, log_probs, tail, 1.0))
    for x, log in zip((found.student_entropy, found.teacher_entropy), sides, strict=True):
        torch.testing.assert_close(x, literal.times(log.exp(), -log).sum(-1)[counts].mean().to(x.dtype))
    plain = functional.kd_loss(leaf, few, TARGET, mask=MASK, divergence=divergence, label_smoothing=0.1, **options)
    torch.testing.assert_close(*(torch.autograd.grad(x, leaf)[0] for x in (found.loss, plain)))


def test_modules_and_narrow_types(backend):
    student, indices, log_probs = inputs()
    few = TopKLogProbs(indices, log_probs)
    for dtype in (torch.int32, torch.int16, torch.int8):
        narrow = TopKLogProbs(indices.to(dtype), log_probs)
        assert torch.equal(functional.kl_div(student, narrow), functional.kl_div(student, few))
    unsigned = inputs(padded=False)[1].to(torch.uint16)
    long = torch.randn(*LEADING, 300)
    assert functional.kl_div(long, TopKLogProbs(unsigned, inputs(padded=False)[2])).isfinite()
    assert functional.kl_div(long, TopKLogProbs(unsigned.to(torch.int8), inputs(padded=False)[2])).isfinite()
    assert torch.equal(fastkd.KLDivLoss()(student, few), functional.kl_div(student, few))
    assert repr(few) == "TopKLogProbs([3, 7, 6], tail='bucket', temperature=1.0)"
