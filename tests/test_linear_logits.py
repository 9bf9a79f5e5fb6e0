"""LinearLogits: logits made of hidden states and a head, a slab of rows at a time."""

import pytest
import torch
from linear_logits_checks import (
    DTYPES,
    FORMS,
    LEADING,
    LOSSES,
    MASK,
    OPTIONS,
    ROWS,
    SIDES,
    SMALL,
    TARGET,
    WITH_TARGET,
    V,
    check,
    inputs,
    run,
    whole,
)
from tolerances import FLOOR, error

import fastkd
from fastkd import LinearLogits, functional
from fastkd.ops import _head_products
from fastkd.ops import forms as ops_forms
from fastkd.ops.slabs import slabs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", LOSSES)
def test_it_is_the_loss_of_whole_logits(backend, name, sides, options, dtype):
    student, teacher = inputs(dtype)
    options = dict(OPTIONS[options])
    if options.get("reduction") == "none":
        options["upstream"] = 1 + ROWS
    check(LOSSES[name], student, teacher, sides, **options)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ["kl_div", "total_variation", "kd_loss", "adaptive_kl_div"])
def test_rows_that_do_not_count_reach_nothing(backend, name, packed, monkeypatch):
    """Whether the host knows the mask, as here, or not, as of a GPU."""
    if not packed:
        monkeypatch.setattr(ops_forms, "_leaves_out_rows", lambda _: False)
    student, teacher = inputs()
    expected = run(LOSSES[name], student, teacher, mask=MASK)
    student[0][~MASK], teacher[0][~MASK] = torch.nan, torch.inf
    for sides in SIDES[:2]:
        loss, grads = run(LOSSES[name], student, teacher, sides, mask=MASK)
        torch.testing.assert_close(loss, expected[0])
        for a, b in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(a, b)
        assert not grads[0][~MASK].any()
    loss, grads = run(LOSSES[name], student, teacher, mask=torch.zeros_like(MASK))
    assert loss == 0
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (1,), (40,), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("sides", SIDES)
def test_any_leading_dimensions(backend, leading, sides):
    student, teacher = inputs(leading=leading)
    for reduction in ("sum", "none"):
        check(functional.kl_div, student, teacher, sides, reduction=reduction)


@pytest.mark.parametrize("sides", SIDES)
def test_any_strides(backend, sides):
    """Hidden states whose last position is cut off, and that lie [L, B, H], or beside each other."""

    def turned(x):
        x.requires_grad_()
        return x.transpose(0, 1)

    student, teacher = inputs(leading=(5, 4))
    expected = run(functional.js_div, student, teacher, sides)
    long, wide = (torch.randn(shape) for shape in ((5, 6, 12), (4, 5, 20)))
    long[:, :4], wide[...] = student[0], teacher[0].transpose(0, 1)
    leaf = long.requires_grad_()
    forms = [
        LinearLogits(leaf[:, :4], *student[1:], **FORMS[0]),
        LinearLogits(wide.transpose(0, 1), *teacher[1:], **FORMS[1]),
    ]
    if sides != "both":
        at = SIDES.index(sides) % 2
        forms[at] = forms[at].logits()
    loss = functional.js_div(*forms)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    torch.testing.assert_close(leaf.grad[:, :4], expected[1][0])
    assert not leaf.grad[:, 4:].any()


@pytest.mark.parametrize("slab_bytes", [1, 4 * V * 5, 4 * V * 7, 10**9])
@pytest.mark.parametrize("options", ["plain", "masked"])
def test_the_slab_changes_little(backend, options, slab_bytes):
    student, teacher = inputs()
    forms = {"slab_bytes": slab_bytes}, {}
    options = OPTIONS[options]
    upstream = {"upstream": 1 + ROWS} if "reduction" in options else {}
    a = check(functional.kl_div, student, teacher, forms=forms, **options, **upstream)
    b = run(functional.kl_div, student, teacher, forms=({}, {}), **options, **upstream)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "weight and bias", "hidden and bias", "all but bias"])
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_what_is_frozen_has_no_gradient(backend, frozen, reduction):
    student, teacher = inputs()
    expected = run(
        functional.kl_div,
        student,
        teacher,
        upstream=torch.ones(LEADING) if reduction == "none" else None,
        reduction=reduction,
    )[1]
    names = ("hidden", "weight", "bias")
    learns = [(name not in frozen) if "all but" not in frozen else name in frozen for name in names]
    made = [x.clone().requires_grad_(wanted) for x, wanted in zip(student, learns, strict=True)]
    loss = functional.kl_div(LinearLogits(*made, **FORMS[0]), LinearLogits(*teacher, **FORMS[1]), reduction=reduction)
    loss.sum().backward()
    for x, wanted, right in zip(made, learns, expected, strict=True):
        assert (x.grad is not None) == wanted
        if wanted:
            torch.testing.assert_close(x.grad, right)


def test_without_gradients(backend):
    student, teacher = inputs()
    forms = [LinearLogits(*x) for x in (student, teacher)]
    loss = functional.kl_div(*forms)
    assert not loss.requires_grad
    student[1].requires_grad_()
    with torch.no_grad():
        assert torch.equal(functional.kl_div(*forms), loss)
        assert torch.equal(functional.kl_div(forms[1], forms[0]), functional.kl_div(forms[1], forms[0]))
    torch.testing.assert_close(functional.kl_div(*forms).detach(), loss)


def test_a_tied_weight(backend):
    """Its gradient is that of both uses."""
    weight = torch.randn(V, 12, requires_grad=True)
    ids = torch.arange(8) * 5
    teacher = torch.randn(8, V)
    functional.kl_div(LinearLogits(torch.nn.functional.embedding(ids, weight), weight), teacher).backward()
    tied = weight.detach().clone().requires_grad_()
    functional.kl_div(torch.nn.functional.embedding(ids, tied) @ tied.T, teacher).backward()
    torch.testing.assert_close(weight.grad, tied.grad)


def test_a_second_backward_of_a_kept_graph(backend):
    student, teacher = inputs()
    leaf = student[0].requires_grad_()
    loss = functional.kl_div(LinearLogits(leaf, *student[1:]), LinearLogits(*teacher))
    once = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, leaf, torch.tensor(6.0))[0], 2 * once)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_in_place_beside_a_teachers_head(backend, reduction):
    student, teacher = inputs()
    logits = LinearLogits(*student).logits()
    of_teacher = LinearLogits(*teacher, slab_bytes=SMALL)
    grads = []
    for inplace in (False, True):
        leaf = logits.clone().requires_grad_()
        functional.kl_div(leaf * 1, of_teacher, inplace=inplace, reduction=reduction).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_impossible_classes(backend):
    """A bias of -inf bans a class, on both sides here."""
    student, teacher = inputs()
    student[2][3], teacher[2][3] = -torch.inf, -torch.inf
    forms = {"slab_bytes": SMALL}, {"slab_bytes": SMALL}
    for name in ("kl_div", "js_div"):
        loss, grads = run(LOSSES[name], student, teacher, forms=forms)
        right, of_right = whole(LOSSES[name], student, teacher, torch.float32, forms)
        torch.testing.assert_close(loss, right)
        torch.testing.assert_close(grads, of_right)


@pytest.mark.parametrize("soft_weight", [0.0, 0.5])
def test_parts(backend, soft_weight):
    student, teacher = inputs()
    options = {"target": TARGET, "return_parts": True, "soft_weight": soft_weight, "label_smoothing": 0.1, "mask": MASK}
    found = functional.kd_loss(*(LinearLogits(*x, slab_bytes=SMALL) for x in (student, teacher)), **options)
    right = functional.kd_loss(*(LinearLogits(*x).logits() for x in (student, teacher)), **options)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "name", ["kl_div", "reverse_kl_div", "alpha_beta_div", "bernoulli_kl_div", "kd_loss", "dkd_loss"]
)
def test_gradients_numerically(backend, name):
    student, teacher = inputs(torch.float64, leading=(4,), V=7, H=(3, 5))
    options = {"target": TARGET.reshape(-1)[:4] % 7} if name in WITH_TARGET else {}
    of_teacher = LinearLogits(*teacher)

    def loss(*of_student):
        return getattr(functional, name)(LinearLogits(*of_student, softcap=2.0, scale=1.3), of_teacher, **options)

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in student], fast_mode=True)


def test_near_convergence(kernel):
    """A loss of 5e-7 that differs in its third digit at most from what float64 says of logits in float32."""
    (hidden, weight, _), _ = inputs(leading=(64,), V=1000, H=(64, 1), size=2.0)
    near = weight + 1.5e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) / 8
    loss = functional.kl_div(LinearLogits(hidden, near), LinearLogits(hidden, weight))
    with fastkd.backend("torch"):
        right = functional.kl_div(hidden.double() @ near.double().T, hidden.double() @ weight.double().T)
    assert 1e-7 < right < 2e-6
    # each logit is a sum of 64 products, rounded by the BLAS: not the divergence's doing
    assert error(loss, right) <= 2e-2


def test_half_precision_logits_are_not_rounded(backend):
    """The loss of whole logits in bfloat16 is wrong by some percent; this one by roundings of float32."""
    student, teacher = inputs(torch.bfloat16, leading=(32,), V=300, size=4.0)
    forms = {}, {}
    loss, _ = run(functional.kl_div, student, teacher, forms=forms)
    truth, _ = whole(functional.kl_div, student, teacher, torch.float64, forms)
    assert error(loss, truth) < 1e-5
    rounded = [(x[0] @ x[1].T + x[2]).double() for x in (student, teacher)]
    assert error(functional.kl_div(*rounded), truth) > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_in_half_precision_of_several_tiles(backend, dtype, monkeypatch):
    monkeypatch.setattr(_head_products, "TILE", 16 * 12)
    check(functional.kl_div, *inputs(dtype))


def test_the_weights_gradient_is_summed_in_float32(backend):
    """Over a thousand slabs: sums in bfloat16 would stop at 256 times a summand."""
    (hidden, weight, bias), (_, teacher, _) = inputs(torch.bfloat16, leading=(1024,), H=(8, 8))
    forms = {"slab_bytes": 1}, {}
    student = [torch.ones_like(hidden), weight, bias]
    with fastkd.backend("cpu"):
        found = run(functional.kl_div, student, [student[0], teacher, bias], forms=forms, reduction="sum")[1]
    right = whole(functional.kl_div, student, [student[0], teacher, bias], torch.float64, forms, reduction="sum")[1]
    for a, b in zip(found[1:], right[1:], strict=True):
        assert error(a, b) <= FLOOR[torch.bfloat16]


def test_autocast(backend):
    """As torch.nn.Linear: products of bfloat16; logits and loss are in float32."""
    student, teacher = inputs()
    half = [[x.to(torch.bfloat16) for x in side] for side in (student, teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, grads = run(functional.kl_div, student, teacher)
        mixed = run(functional.kl_div, [half[0][0], *student[1:]], teacher)
    expected = run(functional.kl_div, *half)
    assert torch.equal(loss, expected[0])
    assert torch.equal(mixed[0], loss)
    for x, right, like in zip(grads, expected[1], student, strict=True):
        assert x.dtype == like.dtype
        assert error(x, right) <= 2 * FLOOR[torch.bfloat16]


@pytest.mark.parametrize(
    ("which", "name"), [("cpu", "kl_div"), ("cpu", "kd_loss"), ("cpu", "adaptive_kl_div"), ("torch", "kl_div")]
)
def test_compiled(which, name):
    def loss(hidden, weight, bias, of_teacher, teacher_weight, mask):
        options = {"target": TARGET.reshape(-1)[:1].expand(hidden.shape[:-1])} if name in WITH_TARGET else {}
        student = LinearLogits(hidden, weight, bias, softcap=5.0)
        return getattr(functional, name)(student, LinearLogits(of_teacher, teacher_weight), mask=mask, **options)

    with fastkd.backend(which):
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
        for rows in (6, 9):
            student, teacher = inputs(leading=(rows,))
            mask = torch.arange(rows) != 2
            leaves = [x.clone().requires_grad_() for x in student]
            results = []
            for function in (compiled, loss):
                value = function(*leaves, *teacher[:2], mask)
                results.append((value.detach(), torch.autograd.grad(value, leaves)))
            torch.testing.assert_close(*results)


def test_compiled_with_one_frozen_head_of_both_sides():
    """An autograd.Function that is compiled takes no tensor twice."""
    (hidden, weight, bias), _ = inputs()
    other = torch.randn(hidden.shape)

    def loss(hidden, other, weight, bias):
        return functional.kl_div(LinearLogits(hidden, weight, bias), LinearLogits(other, weight, bias))

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    arguments = hidden.requires_grad_(), other, weight, bias
    for function in (compiled, loss):
        value = function(*arguments)
        torch.testing.assert_close(value, loss(*arguments))
        torch.testing.assert_close(*(torch.autograd.grad(x, hidden) for x in (value, loss(*arguments))))


@pytest.mark.parametrize(
    ("name", "bad"), [("scale", -1.0), ("scale", torch.inf), ("softcap", torch.nan), ("softcap", 0.0)]
)
def test_compiled_numbers_are_checked_when_they_are_known(name, bad):
    student, teacher = inputs()

    def loss(number):
        return functional.kl_div(LinearLogits(*student, **{name: number}), LinearLogits(*teacher))

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(2.5), loss(2.5))
    torch.testing.assert_close(compiled(1.5), loss(1.5))
    with pytest.raises(RuntimeError, match=rf"^student.{name}: a positive finite number wanted"):
        compiled(bad)


def test_slabs_are_of_nearly_equal_size():
    for leading, most, sizes in (
        ((65,), 52, [33, 32]),
        ((4, 65), 52, [33, 32] * 4),
        ((3, 7), 14, [14, 7]),
        ((0,), 3, []),
    ):
        assert [slab.last - slab.first for slab in slabs(torch.Size(leading), most)] == sizes


def test_exported():
    class Model(torch.nn.Module):
        def forward(self, hidden, weight, teacher):
            return functional.kl_div(LinearLogits(hidden, weight), teacher)

    (hidden, weight, _), (of_teacher, teacher_weight, _) = inputs()
    teacher = of_teacher @ teacher_weight.T
    program = torch.export.export(Model(), (hidden, weight, teacher))
    torch.testing.assert_close(program.module()(hidden, weight, teacher), Model()(hidden, weight, teacher))


def test_checkpointed(backend):
    student, teacher = inputs()
    leaves = [x.clone().requires_grad_() for x in student]

    def loss(*x):
        return functional.kl_div(LinearLogits(*x), LinearLogits(*teacher))

    torch.utils.checkpoint.checkpoint(loss, *leaves, use_reentrant=False).backward()
    again = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close([x.grad for x in leaves], list(again))


def test_modules(backend):
    forms = [LinearLogits(*x) for x in inputs()]
    assert torch.equal(fastkd.KLDivLoss(temperature=2.0)(*forms), functional.kl_div(*forms, temperature=2.0))
    assert torch.equal(fastkd.KDLoss()(*forms, TARGET), functional.kd_loss(*forms, TARGET))


def test_it_is_printed_by_its_shapes():
    student, _ = inputs()
    assert repr(LinearLogits(*student)) == "LinearLogits(hidden [3, 7, 12], weight [45, 12], bias)"
