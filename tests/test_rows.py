"""Values and gradients of the logit losses, against the reference in float64."""

import functools
import math

import cases
import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from tolerances import FLOOR, NEAR_CONVERGENCE, TIMES_EAGER, error
from truth import kl_div as truth
from truth import truth as truth_of
from truth import upstream_like

import fastkd
from fastkd import functional, reference
from fastkd._divergences import DERIVED, REGISTRY

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ["none", "sum", "batchmean", "mean"]


def run(loss_function, student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = loss_function(student, teacher, **options)
    (grad,) = torch.autograd.grad(loss, student, upstream_like(loss))
    return loss.detach(), grad


def eager(name, student, teacher, temperature=1.0):
    """What people write, in the dtype that they have: one value per row."""
    log_p, log_q = F.log_softmax(student / temperature, -1), F.log_softmax(teacher / temperature, -1)

    def kl(a, b):  # of b from a, as F.kl_div has it
        return F.kl_div(a, b, reduction="none", log_target=True).sum(-1)

    name, _, beta = name.partition("-")
    beta = float(beta or 0.5)
    if name == "kl_div":
        rows = kl(log_p, log_q)
    elif name == "reverse_kl_div":
        rows = kl(log_q, log_p)
    elif name == "soft_cross_entropy":
        rows = -(log_q.exp() * log_p).sum(-1)
    elif name == "symmetric_kl_div":
        rows = (kl(log_p, log_q) + kl(log_q, log_p)) / 2
    elif name == "adaptive_kl_div":
        (q, order), p = log_q.exp().sort(-1, descending=True), log_p.exp()
        in_head = torch.zeros_like(p).scatter(-1, order, (q.cumsum(-1) <= 0.5).to(p.dtype)) > 0
        in_head |= log_q == log_q.amax(-1, keepdim=True)
        difference = (p - log_q.exp()).abs()
        share = ((difference * in_head).sum(-1) / difference.sum(-1)).detach()
        rows = share * kl(log_p, log_q) + (1 - share) * kl(log_q, log_p)
    elif name == "total_variation":
        rows = (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    elif name == "negative_log_acceptance":
        rows = -torch.minimum(log_p.exp(), log_q.exp()).sum(-1).log()
    elif name == "alpha_beta_div":
        rows = -((0.2 * log_q + 0.7 * log_p).exp() - ((0.9 * log_q).exp() * 0.2 + (0.9 * log_p).exp() * 0.7) / 0.9)
        rows = rows.sum(-1) / 0.14
    elif name.startswith("skew"):
        own, other = (log_q, log_p) if name == "skew_kl_div" else (log_p, log_q)
        rows = kl(torch.logaddexp(own + math.log(0.1), other + math.log(0.9)), own)
    else:
        log_m = torch.logaddexp(log_p + math.log(1 - beta), log_q + math.log(beta))
        rows = beta * kl(log_m, log_q) + (1 - beta) * kl(log_m, log_p)
    return rows * temperature**2


def right(name, student, teacher, **options):
    """The truth for one of cases.LOSSES."""
    name, _, beta = name.partition("-")
    return truth_of(name, student, teacher, **options, **({"beta": float(beta)} if beta else {}))


SKEWED = 5  # js_div at beta = 0.1: its two terms, and log(m / p), are 1 / beta times what they leave


def check(name, case, dtype, reduction, plain_pytorch):
    student, teacher, options = case.inputs(dtype)
    if reduction == "none":
        options.pop("normalizer", None)
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction=reduction, **options)
    loss_ref, grad_ref = right(name, student, teacher, reduction=reduction, **options)

    compute = reference.compute_dtype(student, teacher)
    assert loss.dtype == compute
    assert grad.dtype == dtype
    assert grad.shape == student.shape
    if (name, case.name) == ("negative_log_acceptance", "huge_logits"):  # a rate of e^-1000 is 0, as its docstring says
        assert loss.isinf().all()
        assert not grad.any()
        return
    tolerance = 4 * FLOOR[compute] * logit_size(student)
    if name == "js_div-0.1":
        tolerance *= SKEWED
    assert error(loss, loss_ref) <= tolerance * (cancellation(name, student, teacher, options) if plain_pytorch else 1)
    tolerance *= what_cancels(name, student, teacher, reduction=reduction, **options)
    assert error(grad, grad_ref) <= tolerance + 2 * storage_error(grad, grad_ref)


def what_cancels(name, student, teacher, **options):
    """How large the two terms of the gradient are beside itself: they cancel where p is all on one class."""
    name = name.partition("-")[0]
    if name not in DERIVED and REGISTRY[name].centred:
        return 1.0
    terms, grad = (right(name, student, teacher, terms_of_gradient=x, **options)[1] for x in (True, False))
    return max(1.0, (terms.norm() / grad.norm()).nan_to_num(1.0, posinf=1e300).item())


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FINITE, ids=str)
def test_kl_div_matches_float64(backend, case, dtype, reduction):
    check("kl_div", case, dtype, reduction, backend == "torch")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FINITE, ids=str)
@pytest.mark.parametrize("name", list(cases.LOSSES)[1:])
@pytest.mark.of_each_kind
def test_others_match_float64(backend, name, case, dtype):
    for reduction in ("none", "batchmean"):
        check(name, case, dtype, reduction, backend == "torch")


def logit_size(student):
    """A logit of size z is known to z units in the last place, and so is its exponential."""
    finite = student[student.isfinite()].double()
    return max(1.0, finite.abs().max().item() / 8) if finite.numel() else 1.0


def cancellation(name, student, teacher, options):
    """Plain PyTorch subtracts logarithms of size log V, and is off by that much more."""
    rows = right(name, student, teacher, **{**options, "reduction": "none", "normalizer": None, "t_squared": False})[0]
    rows = rows[(rows > 0) & rows.isfinite()]
    return max(1.0, math.log(student.shape[-1]) / rows.min().item()) if rows.numel() else 1.0


def storage_error(grad, ref):
    """One rounding to the gradient's dtype, relative to the gradient's norm; in float16 many
    gradients are so small that its smallest step, 2^-24, is what limits them."""
    if grad.dtype in (torch.float32, torch.float64) or not ref.numel():
        return 0.0
    step = 2.0**-25 if grad.dtype == torch.float16 else 0.0
    return FLOOR[grad.dtype] + step * math.sqrt(ref.numel()) / max(ref.norm().item(), 1e-30)


@pytest.mark.parametrize("shift", [(100.0, -100.0), (1000.0, 0.0), (-1e4, 1e4)], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", cases.LOSSES)
@pytest.mark.of_each_kind
def test_no_worse_than_eager_when_shifted(kernel, name, shift, temperature):
    """A constant between student and teacher must not be what the difference is rounded by."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3 * torch.randn(64, 1000, generator=generator) + c for c in shift)
    ours = run(cases.LOSSES[name], student, teacher, temperature=temperature, reduction="none")
    ref = right(name, student, teacher, temperature=temperature, reduction="none")
    theirs = run(lambda s, t: eager(name, s, t, temperature), student, teacher)
    floor = FLOOR[torch.float32]
    if name == "skew_kl_div":  # which eager code sums up without a multiple of p, far better here and worse near q = p
        floor *= what_cancels(name, student, teacher, temperature=temperature, reduction="none")
    for out, eager_out, exact in zip(ours, theirs, ref, strict=True):
        assert error(out, exact) <= max(TIMES_EAGER * error(eager_out, exact), floor)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("temperatures", [(1.0, 1.0), (1.0, 2.0), (2.0, 1.0)], ids=str)
@pytest.mark.parametrize("name", cases.LOSSES)
def test_a_block_of_impossible_classes_on_one_side(backend, name, temperatures, side, reduction):
    """Never NaN: +inf where a class is impossible for one and the divergence asks for it of the other."""
    student, teacher = torch.randn(2, 2500) - 200, torch.randn(2, 2500) - 200
    (student if side == "student" else teacher)[:, :1024] = -torch.inf
    options = {"reduction": reduction, "temperature": temperatures[0], "teacher_temperature": temperatures[1]}
    loss, grad = run(cases.LOSSES[name], student, teacher, **options)
    endless = {"student": ("kl_div", "soft_cross_entropy"), "teacher": ("reverse_kl_div",)}[side]
    assert bool(loss.isinf().all()) == (name in (*endless, "symmetric_kl_div", "adaptive_kl_div"))
    loss_ref, grad_ref = right(name, student, teacher, **options)
    tolerance = 2 * FLOOR[torch.float32] * logit_size(student)
    assert error(loss, loss_ref) < tolerance
    assert error(grad, grad_ref) < tolerance


@pytest.mark.parametrize("V", [7, 1025, 33000])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_a_student_without_a_possible_class(backend, name, V):
    """The loss is infinite, and no finite step changes that; the other rows are as they were."""
    student, teacher = torch.randn(3, V), torch.randn(3, V)
    others = run(cases.LOSSES[name], student, teacher, reduction="none")
    student[1] = -torch.inf
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction="none")
    assert loss[1] == torch.inf
    assert not grad[1].any()
    assert torch.equal(loss[::2], others[0][::2])
    assert torch.equal(grad[::2], others[1][::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("V", [7, 33000])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_nothing_is_read_before_it_is_written(kernel, poisoned, name, V, dtype):
    """Nor left unwritten: a masked row has no statistics, and a gradient of 0."""
    student, teacher = torch.randn(2, 3, V).to(dtype)
    mask = torch.tensor([True, False, True])
    for reduction in ("none", "batchmean"):
        loss, grad = run(cases.LOSSES[name], student, teacher, mask=mask, reduction=reduction)
        assert loss.isfinite().all()
        assert grad.isfinite().all()
        assert not grad[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_teacher_made_in_inference_mode(backend, reduction, dtype):
    student = torch.randn(4, 20).to(dtype)
    with torch.inference_mode():
        teacher, mask = torch.randn(4, 20).to(dtype), torch.tensor([True, False, True, True])
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction, mask=mask)
    expected = run(functional.kl_div, student, teacher.clone(), reduction=reduction, mask=mask.clone())
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_normalizer_tensors_of_any_shape_and_dtype(backend, dtype, shape):
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    loss = functional.kl_div(student, teacher, normalizer=torch.full(shape, 7, dtype=dtype))
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    assert error(loss, functional.kl_div(student, teacher, normalizer=7)) < FLOOR[torch.float32]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (3, 1), (1, 5)], ids=str)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_masks_and_weights_broadcast_to_the_rows(backend, shape, reduction):
    student, teacher = torch.randn(3, 5, 20), torch.randn(3, 5, 20)
    weight = torch.rand(shape)
    mask = weight < weight.max() if weight.numel() > 1 else torch.ones(shape, dtype=torch.bool)
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction, mask=mask, weight=weight)
    whole = {"mask": mask.expand(3, 5).contiguous(), "weight": weight.expand(3, 5).contiguous()}
    expected = run(functional.kl_div, student, teacher, reduction=reduction, **whole)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    for wrong in ((15,), (3, 5, 1), (5, 3), (2, 1)):
        with pytest.raises(ValueError, match=r"^mask: a shape that broadcasts to \[3, 5\] wanted, one per row; got"):
            functional.kl_div(student, teacher, mask=torch.ones(wrong, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"^weight: a shape that broadcasts to \[3, 5\] wanted, one per row; got"):
            functional.kl_div(student, teacher, weight=torch.ones(wrong))


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0), torch.zeros(1)], ids=["int", "float", "int64", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_normalizer_of_zero_is_for_batches_where_no_row_counts(backend, dtype, zero):
    """As a number or as a tensor: transformers hands a Trainer's loss either."""
    student, teacher = torch.randn(4, 20).to(dtype), torch.randn(4, 20)
    loss, grad = run(functional.kl_div, student, teacher, mask=torch.zeros(4, dtype=torch.bool), normalizer=zero)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(student))
    some = torch.tensor([True, False, True, True])
    assert functional.kl_div(student, teacher, mask=some, normalizer=zero) == torch.inf
    assert functional.kl_div(student[:0], teacher[:0], normalizer=zero) == 0
    with pytest.raises(ValueError, match=r"^normalizer: 0 is wanted only where no row counts"):
        functional.kl_div(student, teacher, normalizer=zero)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("shape", [(64, 10), (32, 1000), (4, 32000)], ids=str)
@pytest.mark.parametrize("name", cases.LOSSES)
@pytest.mark.of_each_kind
def test_no_worse_than_eager(backend, name, shape, temperature, dtype):
    generator = torch.Generator().manual_seed(7)
    student, teacher = (3 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    ours = run(cases.LOSSES[name], student, teacher, temperature=temperature, reduction="none")
    ref = right(name, student, teacher, temperature=temperature, reduction="none")
    theirs = run(lambda s, t: eager(name, s, t, temperature), student, teacher)
    floor = FLOOR[reference.compute_dtype(student, teacher)], FLOOR[dtype]
    for out, eager_out, exact, least in zip(ours, theirs, ref, floor, strict=True):
        skewed = SKEWED if name == "js_div-0.1" else 1
        assert error(out, exact) <= max(TIMES_EAGER * error(eager_out, exact), least * skewed)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shift", [0.0, 5.0])
@pytest.mark.parametrize("V", [100, 5000])
# The loss of the first does not go to 0, and those of the others go there with the difference and not with its square.
@pytest.mark.parametrize(
    "name",
    [name for name in cases.LOSSES if name not in ("soft_cross_entropy", "total_variation", "negative_log_acceptance")],
)
def test_near_convergence(backend, name, V, shift, temperature):
    """A loss of 5e-7: F.kl_div in float32 has lost it, the fused form has not."""
    generator = torch.Generator().manual_seed(3)
    size = 2e-3 if "js" in name else 1e-3  # a Jensen-Shannon divergence is 4 times as small, and more
    size *= 0.6 if name == "alpha_beta_div" else 1  # of many classes with a power below 1 it is larger
    teacher = 2 * torch.randn(64, V, generator=generator)
    student = teacher + size * torch.randn(64, V, generator=generator) + shift
    options = {"temperature": temperature, "t_squared": True}
    loss, grad = run(cases.LOSSES[name], student, teacher, **options)
    loss_ref, grad_ref = right(name, student, teacher, **options)
    assert loss_ref < 6e-7
    assert error(loss, loss_ref) <= NEAR_CONVERGENCE
    eager_loss, eager_grad = run(lambda s, t: eager(name, s, t, temperature).mean(), student, teacher)
    if name not in (
        "symmetric_kl_div",
        "adaptive_kl_div",
    ):  # the first-order terms of its two halves cancel, in eager code too
        assert error(eager_loss, loss_ref) > 5 * NEAR_CONVERGENCE  # or this test is too easy
    assert error(grad, grad_ref) <= TIMES_EAGER * error(eager_grad, grad_ref)


@pytest.mark.parametrize("V", [100, 5000])
def test_total_variation_near_convergence(backend, V):
    """Every class is on its side of p = q by far more than a rounding: so is the gradient's sign."""
    generator = torch.Generator().manual_seed(3)
    teacher = 2 * torch.randn(64, V, generator=generator)
    signs = torch.where(torch.arange(V) % 2 == 0, 1.0, -1.0)
    student = teacher + 1e-3 * signs * (1 + torch.rand(64, V, generator=generator))
    loss, grad = run(functional.total_variation, student, teacher)
    loss_ref, grad_ref = right("total_variation", student, teacher)
    assert error(loss, loss_ref) <= NEAR_CONVERGENCE
    assert error(grad, grad_ref) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("alpha", [1e-3, 1e-6, 1e-8])
@pytest.mark.parametrize("name", ["skew_kl_div", "skew_reverse_kl_div"])
def test_a_small_alpha_still_bounds_the_loss(backend, name, alpha):
    """An impossible class of one side costs -log alpha times the other's probability, and no more."""
    impossible, possible = torch.tensor([[0.0, -torch.inf, 1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    pair = (impossible, possible) if name == "skew_kl_div" else (possible, impossible)
    for number in (alpha, torch.tensor([alpha], dtype=torch.float64)):
        loss, grad = run(functools.partial(getattr(functional, name), alpha=number), *pair)
        loss_ref, grad_ref = truth_of(name, *pair, alpha=alpha)
        assert error(loss, loss_ref) <= 8 * FLOOR[torch.float32]
        assert error(grad, grad_ref) <= 8 * FLOOR[torch.float32]


@pytest.mark.parametrize("name", ["symmetric_kl_div", "skew_kl_div", "skew_reverse_kl_div"])
def test_parameters_of_rows_and_their_ends(backend, name):
    """Each row as a call of its own has it; an end is another divergence, for single rows as well."""
    entry = REGISTRY[name].parameter
    student, teacher, _ = cases.Case("parameters of rows", "", (5, 70)).inputs(torch.float32)
    numbers = torch.tensor([0.0, 0.3, 1e-3, 0.97, 1.0], dtype=torch.float64)
    function = getattr(functional, name)
    loss, grad = run(functools.partial(function, **{entry.name: numbers}), student, teacher, reduction="none")
    for row, number in enumerate(numbers.tolist()):
        one = student[row : row + 1], teacher[row : row + 1]
        alone = run(functools.partial(function, **{entry.name: number}), *one, reduction="none")
        factor = upstream_like(loss)[row] / upstream_like(alone[0])
        assert error(loss[row], alone[0][0]) <= 8 * FLOOR[torch.float32]
        assert error(grad[row], alone[1][0] * factor) <= 8 * FLOOR[torch.float32]
        if number in entry.ends:
            assert error(loss[row], run(getattr(functional, entry.ends[number]), *one)[0]) <= 8 * FLOOR[torch.float32]
        elif number == 1:
            assert loss[row] == 0
            assert not grad[row].any()


@pytest.mark.parametrize("name", ["skew_kl_div", "skew_reverse_kl_div", "total_variation"])
def test_classes_that_one_side_cannot_give_are_like_any_other(backend, name):
    student, teacher, _ = cases.Case("one-sided", "", (4, 50)).inputs(torch.float32)
    student[:, ::3], teacher[:, 1::3] = -torch.inf, -torch.inf
    loss, grad = run(getattr(functional, name), student, teacher)
    loss_ref, grad_ref = right(name, student, teacher)
    assert error(loss, loss_ref) <= 8 * FLOOR[torch.float32]
    assert error(grad, grad_ref) <= 16 * FLOOR[torch.float32]


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_may_differ(backend, dtype, teacher_dtype):
    student, teacher, _ = cases.Case("mixed", "", (5, 300)).inputs(dtype, teacher_dtype)
    loss, grad = run(functional.kl_div, student, teacher, temperature=2.0)
    loss_ref, grad_ref = truth(student, teacher, temperature=2.0)
    compute = reference.compute_dtype(student, teacher)
    assert (loss.dtype, grad.dtype) == (compute, dtype)
    assert error(loss, loss_ref) <= 2 * FLOOR[compute]
    assert error(grad, grad_ref) <= 2 * FLOOR[compute] + (FLOOR[dtype] if dtype != compute else 0)


def strided(kind, x):
    """The same values, laid out differently."""
    if kind == "shifted":  # logits[:, :-1], as every language model's loss has it
        return torch.cat([x, x[:, :1]], 1)[:, :-1]
    if kind == "transposed":
        return x.transpose(-1, 0).contiguous().transpose(-1, 0)
    if kind == "every_other_class":
        return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]
    if kind == "channels_first":
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if kind == "misaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("kind", ["shifted", "transposed", "every_other_class", "channels_first", "misaligned"])
def test_any_strides(backend, kind, reduction, dtype):
    student, teacher, _ = cases.Case("strided", "", (3, 4, 70)).inputs(dtype)
    plain = run(functional.kl_div, student, teacher, reduction=reduction, temperature=2.0)
    for s, t in ((kind, ""), ("", kind), (kind, kind)):
        loss, grad = run(
            functional.kl_div, strided(s, student), strided(t, teacher), reduction=reduction, temperature=2.0
        )
        if backend.startswith(("cuda", "triton")):  # the order of a sum follows the alignment
            assert error(loss, plain[0]) <= 2 * FLOOR[loss.dtype]
            assert error(grad, plain[1]) <= 2 * FLOOR[dtype]
        else:
            assert torch.equal(loss, plain[0])
            assert torch.equal(grad, plain[1])


def test_expanded_teacher(backend):
    """One teacher row for all students: stride 0."""
    student, teacher = torch.randn(8, 40), torch.randn(40)
    loss, grad = run(functional.kl_div, student, teacher.expand(8, 40))
    loss2, grad2 = run(functional.kl_div, student, teacher.repeat(8, 1))
    assert torch.equal(loss, loss2)
    assert torch.equal(grad, grad2)


def test_offsets_beyond_32_bits(backend):
    """A row that begins more than 2^31 elements into its storage. The pages between are never touched."""
    V, far = 40, 2**31 + 100
    values = torch.randn(4, V, generator=torch.Generator().manual_seed(1)).bfloat16()
    student = torch.empty(far + V, dtype=torch.bfloat16).as_strided((2, V), (far, 1))
    student.copy_(values[:2])
    teacher = values[2:]
    loss, grad = run(functional.kl_div, student, teacher)
    loss_compact, grad_compact = run(functional.kl_div, values[:2], teacher)
    assert loss == loss_compact
    assert torch.equal(grad, grad_compact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_student_without_a_possible_class_the_teacher_has(backend, reduction, dtype):
    """p = 0 where q > 0: +inf, as the mathematics says, and a finite gradient."""
    student, teacher = torch.randn(4, 20).to(dtype), torch.randn(4, 20).to(dtype)
    student[1, 3] = -torch.inf
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction)
    assert (loss if reduction == "batchmean" else loss[1]) == torch.inf
    assert grad.isfinite().all()
    expected = torch.softmax(student.double(), -1) - torch.softmax(teacher.double(), -1)
    expected = expected * (upstream_like(loss).double()[:, None] if reduction == "none" else 1 / 4)
    assert error(grad, expected) < 2 * FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_rows_without_any_possible_class(backend, name, side, reduction):
    student, teacher = torch.randn(3, 20), torch.randn(3, 20)
    plain = run(cases.LOSSES[name], student, teacher, reduction=reduction)
    if side != "teacher":
        student[1] = -torch.inf
    if side != "student":
        teacher[1] = -torch.inf
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction=reduction)
    assert torch.equal(grad[1], torch.zeros(20))
    assert torch.equal(grad[::2], plain[1][::2])
    if reduction == "none":
        assert loss[1] == (torch.inf if side == "student" else 0.0)
        assert torch.equal(loss[::2], plain[0][::2])
    else:
        assert not loss.isnan()


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_nan_and_inf_propagate(backend, name, side, value):
    """A row that cannot be computed says so, and says it of itself alone."""
    student, teacher = torch.randn(3, 2000), torch.randn(3, 2000)
    plain = run(cases.LOSSES[name], student, teacher, reduction="none")
    (student if side == "student" else teacher)[1, 1500] = value
    loss, grad = run(cases.LOSSES[name], student, teacher, reduction="none")
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    assert torch.equal(loss[::2], plain[0][::2])
    assert torch.equal(grad[::2], plain[1][::2])


@pytest.mark.parametrize("name", [name for name in cases.LOSSES if name != "soft_cross_entropy"])
def test_equal_logits_give_nothing(kernel, name):
    """Student = teacher: exactly 0, loss and gradient; plain PyTorch is off by a rounding."""
    x = torch.randn(5, 3000)
    loss, grad = run(cases.LOSSES[name], x, x.clone(), temperature=3.0)
    assert loss == 0
    assert torch.equal(grad, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(64, 1000), (3, 50000), (1, 128256)], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_same_bits_whatever_the_threads(threads, name, shape, reduction):
    student, teacher = torch.randn(shape), torch.randn(shape)
    results = []
    for n in (1, 2, 3, 2):
        threads(n)
        results.append(run(cases.LOSSES[name], student, teacher, reduction=reduction))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


def test_float16_gradients_survive_a_loss_scaler(backend):
    """Gradients below 2^-24 times a scale of 2^16 are numbers again: they must not be rounded to
    float16 before they are multiplied."""
    student, teacher, _ = cases.Case("scaled", "", (4, 4000)).inputs(torch.float16)
    s = student.requires_grad_()
    loss = functional.kl_div(s, teacher, normalizer=512) * 2.0**16
    (grad,) = torch.autograd.grad(loss, s)
    _, grad_ref = truth(student, teacher, normalizer=512)
    assert error(grad_ref.half(), grad_ref) > 4 * FLOOR[torch.float16]  # or this test is too easy
    assert error(grad, grad_ref * 2.0**16) < 2 * FLOOR[torch.float16]


@pytest.mark.parametrize("factor", [1.0, 0.5, 0.0, -3.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradient_is_applied(backend, dtype, factor):
    student, teacher, _ = cases.Case("upstream", "", (6, 50)).inputs(dtype)
    (plain,) = torch.autograd.grad(functional.kl_div(student.requires_grad_(), teacher), student)
    (grad,) = torch.autograd.grad(functional.kl_div(student, teacher) * factor, student)
    assert error(grad, plain.double() * factor) <= 2 * FLOOR[dtype]


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_retained_graph_gives_the_same_again(backend, reduction, factor):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    loss = (functional.kl_div(student, teacher, reduction=reduction) * factor).sum()
    grads = [torch.autograd.grad(loss, student, retain_graph=again)[0] for again in (True, True, False)]
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, student)


def test_gradients_accumulate(backend):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    functional.kl_div(student, teacher).backward()
    once = student.grad.clone()
    functional.kl_div(student, teacher).backward()
    assert torch.equal(student.grad, 2 * once)


def test_no_gradient_is_computed_for_nobody(backend):
    student, teacher = torch.randn(6, 50, requires_grad=True), torch.randn(6, 50)
    with torch.no_grad():
        assert not functional.kl_div(student, teacher).requires_grad
    assert not functional.kl_div(student.detach(), teacher).requires_grad


def test_masked_rows_get_exactly_nothing(backend):
    student, teacher, options = cases.Case("masked rows", "", (9, 50), options={"mask": cases.some_rows}).inputs(
        torch.float32
    )
    for reduction in REDUCTIONS:
        loss, grad = run(functional.kl_div, student, teacher, reduction=reduction, **options)
        assert torch.equal(grad[~options["mask"]], torch.zeros_like(grad[~options["mask"]]))
        assert grad[options["mask"]].abs().sum(-1).min() > 0
        if reduction == "none":
            assert torch.equal(loss == 0, ~options["mask"])


def test_js_div_ends_are_the_kl_divergences(backend):
    student, teacher = torch.randn(6, 50), torch.randn(6, 50)
    for beta, same in ((0, functional.kl_div), (1, functional.reverse_kl_div)):
        ours, theirs = (
            run(functools.partial(functional.js_div, beta=beta), student, teacher),
            run(same, student, teacher),
        )
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("V", [5, 300, 9000])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_beta_for_each_row(backend, dtype, reduction, V):
    """The ends too are those of single rows."""
    beta = torch.tensor([0.0, 0.5, 1.0, 0.01, 0.9, 1 - 1e-6, 1e-6, 0.3], dtype=dtype)
    if V == 9000:
        beta = beta[:4]
    student, teacher, _ = cases.Case("beta", "", (len(beta), V)).inputs(dtype)
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher, reduction=reduction)
    upstream = upstream_like(loss).expand(beta.shape)
    losses, bounds = [], []
    for row, b in enumerate(beta.tolist()):
        exact, exact_grad = truth_of("js_div", student[row : row + 1], teacher[row : row + 1], beta=b)
        losses.append(exact)
        skewed = 1 if b in (0, 1) else 1 / min(b, 1 - b)
        least = FLOOR[dtype] * max(8, skewed / 2)
        bounds.append(least * exact)
        if reduction == "none":
            assert error(loss[row], exact) < least
        assert error(grad[row], exact_grad[0] * upstream[row]) < least
    if reduction == "sum":
        assert (loss - sum(losses)).abs() < sum(bounds) + 8 * FLOOR[dtype] * sum(losses)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_beta_of_half_precision_is_taken_as_it_is(backend, dtype):
    student, teacher, _ = cases.Case("beta", "", (4, 50)).inputs(torch.float32)
    beta = torch.tensor(0.002, dtype=dtype)
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher)
    for out, exact in zip((loss, grad), truth_of("js_div", student, teacher, beta=beta.item()), strict=True):
        assert error(out, exact) < 8 * FLOOR[torch.float32] / beta.item()


@pytest.mark.parametrize("beta", [1e-8, 1 - 1e-9])
def test_js_div_of_a_beta_that_rounds_to_an_end(backend, beta):
    student, teacher = torch.tensor([[200.0, 0.0, -200.0]] * 2), torch.tensor([[-200.0, 0.0, 200.0]] * 2)
    student[1, 0] = teacher[1, 1] = -torch.inf
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher, reduction="none")
    assert ((loss > -1e-6) & (loss < math.log(2))).all()
    assert grad.isfinite().all()


def test_second_derivatives_of_the_reference():
    student = torch.randn(2, 4, dtype=torch.float64)
    for name, loss in cases.LOSSES.items():
        if name == "adaptive_kl_div":  # of which a part is a constant
            continue
        kinked = name in ("total_variation", "negative_log_acceptance")
        equal = [] if kinked else [student.clone()]
        for teacher in (torch.randn(2, 4, dtype=torch.float64), *equal):
            with fastkd.backend("torch"):
                hessian = torch.autograd.functional.hessian(lambda s, f=loss, t=teacher: f(s, t), student).reshape(8, 8)
                step = 1e-5 * torch.eye(8, dtype=torch.float64).reshape(8, 2, 4)
                slopes = [run(loss, student + h, teacher)[1] - run(loss, student - h, teacher)[1] for h in step]
            assert error(hessian, torch.stack(slopes).reshape(8, 8) / 2e-5) < 1e-5


@pytest.mark.parametrize("beta", [1e-3, 0.25, 0.9, 0.999])
def test_js_div_of_any_beta(backend, beta):
    student, teacher, _ = cases.Case("beta", "", (8, 300)).inputs(torch.float32)
    loss, grad = run(functools.partial(functional.js_div, beta=beta), student, teacher)
    ref = truth_of("js_div", student, teacher, beta=beta)
    theirs = run(lambda s, t: eager(f"js_div-{beta}", s, t).mean(), student, teacher)
    for out, eager_out, exact in zip((loss, grad), theirs, ref, strict=True):
        tolerance = max(TIMES_EAGER * error(eager_out, exact), 4 * FLOOR[torch.float32])
        if backend == "torch":  # autograd's terms with q and with p cancel
            tolerance /= min(beta, 1 - beta)
        assert error(out, exact) < tolerance


def test_a_probability_that_vanishes_where_the_teacher_has_none(backend):
    """p = e^-200 is 0 in float32, but not nothing: reverse KL is +inf there all the same."""
    student, teacher = torch.zeros(2, 5), torch.zeros(2, 5)
    student[0, 3], teacher[0, 3] = -200.0, -torch.inf
    loss, grad = run(functional.reverse_kl_div, student, teacher, reduction="none")
    assert loss[0] == torch.inf
    assert torch.equal(grad[0], torch.zeros(5))
    assert loss[1] == 0


def test_published_value():
    """Two classes at T = 1, by hand: q = (3/4, 1/4), p = (1/2, 1/2)."""
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    loss = functional.kl_div(torch.zeros(1, 2), teacher)
    assert loss.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_shape_and_stride(data):
    """Slices of a larger tensor, whatever their shape, steps and order of dimensions."""
    dims = data.draw(st.integers(1, 4))
    order = data.draw(st.permutations(range(dims)))
    slices = [
        (data.draw(st.integers(0, 2)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20 if d == 0 else 4)))
        for d in range(dims)
    ]

    def view(seed):
        sizes = [start + step * n for start, step, n in slices]
        x = torch.randn(sizes, generator=torch.Generator().manual_seed(seed))
        return x[tuple(slice(start, start + step * n, step) for start, step, n in slices)].permute(order)

    student, teacher = view(0), view(1)
    reduction = data.draw(st.sampled_from(REDUCTIONS))
    loss, grad = run(functional.kl_div, student, teacher, reduction=reduction)
    loss_ref, grad_ref = truth(student, teacher, reduction=reduction)
    # a row of one class has loss 0 and gradient 0: measured against 1
    assert (loss.double() - loss_ref).norm() <= 8 * FLOOR[torch.float32] * max(loss_ref.norm(), 1)
    assert (grad.double() - grad_ref).norm() <= 8 * FLOOR[torch.float32] * max(grad_ref.norm(), 1)
