"""standardize=True: logits less their mean, over their standard deviation, and the gradient through both."""

import functools
import inspect
import unittest.mock

import cases
import pytest
import torch
from conftest import gradcheck
from integration_checks import both
from rows_checks import cancellation, logit_size, run, storage_error
from tolerances import FLOOR, NEAR_CONVERGENCE, error
from truth import truth

import fastkd
from fastkd import functional
from fastkd._dtypes import compute_dtype
from fastkd.ops import standardize

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = {name: functools.partial(loss, standardize=True) for name, loss in cases.LOSSES.items()}


def right(name, student, teacher, **options):
    name, _, beta = name.partition("-")
    return truth(name, student, teacher, **{"standardize": True, **options}, **({"beta": float(beta)} if beta else {}))


def what_cancels(name, student, teacher, **options):
    """How large the terms of the gradient are beside itself: of two classes nothing but the 1e-7 is left of them."""
    terms, grad = (right(name, student, teacher, terms_of_gradient=x, **options)[1] for x in (True, False))
    return max(1.0, (terms.norm() / grad.norm()).nan_to_num(1.0, posinf=1e300).item())


def check(name, student, teacher, loss_function=None, plain=False, **options):
    """Against extended precision. The gradient is rounded once to the dtype of the student."""
    loss, grad = run(loss_function or LOSSES[name], student, teacher, **options)
    loss_ref, grad_ref = right(name, student, teacher, **options)
    compute = compute_dtype(student, teacher)
    assert loss.dtype == compute
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    # a skewed mean, and powers of what is standardized
    tolerance = 4 * FLOOR[compute] * logit_size(student) * (5 if name == "js_div-0.1" else 1)
    assert error(loss, loss_ref) <= tolerance * (cancellation(name, student, teacher, options) if plain else 1)
    options = {"terms": what_cancels(name, student, teacher, **options)}
    assert error(grad, grad_ref) <= tolerance * options["terms"] + 2 * storage_error(grad, grad_ref)
    return loss, grad


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", cases.FINITE, ids=str)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.of_each_kind
def test_matches_extended_precision(backend, name, case, dtype):
    for reduction in ("none", "batchmean"):
        student, teacher, options = case.inputs(dtype)
        if reduction == "none":
            options.pop("normalizer", None)
        check(name, student, teacher, plain=backend == "torch", reduction=reduction, **options)


def logits(*shape, size=2.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(shape))
    return [(size * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("shift", [0.0, 5.0, 1e4])
@pytest.mark.parametrize("V", [100, 5000])
@pytest.mark.parametrize("name", ["kl_div", "reverse_kl_div", "js_div"])
def test_near_convergence(kernel, name, V, shift):
    """A student that is the teacher but for size and place, and a little: a loss of 5e-7."""
    generator = torch.Generator().manual_seed(3)
    teacher = 2 * torch.randn(64, V, generator=generator)
    student = 1.5 * (teacher + (4e-3 if "js" in name else 2e-3) * torch.randn(64, V, generator=generator)) + shift
    loss, grad = run(LOSSES[name], student, teacher)
    loss_ref, grad_ref = right(name, student, teacher)
    assert loss_ref < 6e-7 or shift == 1e4  # which rounds what is given
    assert error(loss, loss_ref) <= NEAR_CONVERGENCE
    assert error(grad, grad_ref) <= NEAR_CONVERGENCE


def test_a_student_of_another_size_has_nothing_to_learn(backend):
    """Twice the logits are rounded alike: not a bit differs, but for the 1e-7."""
    student, teacher = logits(8, 300)
    for factor, shift in ((2.0, 0.0), (1.0, 0.0)):
        loss, grad = run(LOSSES["kl_div"], factor * teacher + shift, teacher)
        assert loss <= 1e-12
        assert grad.abs().max() <= 1e-7
    assert run(LOSSES["kl_div"], student, teacher)[0] > 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [2, 33, 2500])
@pytest.mark.parametrize("value", [0.0, 0.1, -317.3, 1e4])
def test_a_constant_row_is_uniform_and_has_no_gradient(backend, value, V, dtype):
    student, teacher = logits(3, V, dtype=dtype)
    student[1] = value
    rows = {"reduction": "none"}
    loss, grad = run(LOSSES["kl_div"], student, teacher, **rows)
    uniform = run(LOSSES["kl_div"], torch.zeros_like(student), teacher, **rows)
    assert torch.equal(loss[1], uniform[0][1])
    assert not grad[1].any()
    assert not uniform[1].any()
    if V > 2:
        assert grad[::2].any()
    student[1, 0] = -torch.inf  # does not count
    assert not run(LOSSES["reverse_kl_div"], student, teacher, **rows)[1][1].any()


@pytest.mark.parametrize("name", LOSSES)
def test_one_possible_class(backend, name):
    student, teacher = logits(4, 40)
    student[1, 1:], teacher[1, 1:] = -torch.inf, -torch.inf
    student[2], teacher[3] = -torch.inf, -torch.inf
    loss, grad = run(LOSSES[name], student, teacher, reduction="none")
    assert (loss[2], loss[3]) == (torch.inf, 0)
    assert loss[1].abs() <= 1e-12
    assert not grad[1:].any()
    assert grad[0].any()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", LOSSES)
def test_impossible_classes_of_one_side(backend, name, side):
    student, teacher = logits(5, 300)
    (student if side == "student" else teacher)[:, 10:90] = -torch.inf
    check(name, student, teacher, plain=backend == "torch", reduction="none")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_is_loud(backend, value):
    student, teacher = logits(3, 40)
    student[1, 7] = value
    for options in ({}, {"dim": 1}):
        s, t = (x.T[None].contiguous() if options else x for x in (student, teacher))
        loss, grad = run(LOSSES["kl_div"], s, t, reduction="none", **options)
        loss, grad = (loss[0], grad[0].T) if options else (loss, grad)
        assert loss.isnan().tolist() == [False, True, False]
        assert grad[1].isnan().all()
        assert grad[::2].isfinite().all()
    mask = torch.tensor([True, False, True])
    loss, grad = run(LOSSES["kl_div"], student, teacher, mask=mask)
    assert loss.isfinite()
    assert not grad[1].any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.2, 3.0)], ids=str)
def test_the_hard_loss_sees_logits_as_they_are(backend, weights, reduction, dtype):
    student, teacher = logits(2, 30, 70, size=3.0, dtype=dtype)
    target = torch.arange(60).reshape(2, 30) % 70
    target[0, 3] = -100
    student[0, 3], student[1, :, 5], teacher[1, :, 5] = torch.nan, -torch.inf, -torch.inf
    temperatures = {"temperature": torch.linspace(1, 4, 30), "teacher_temperature": 2.0}
    options = {"target": target, "hard_weight": weights[0], "soft_weight": weights[1], "reduction": reduction}
    kd_loss = functools.partial(functional.kd_loss, standardize=True)
    check("kl_div", student, teacher, kd_loss, plain=backend == "torch", **options)
    student[1, :, 5] = 0
    options |= {**temperatures, "label_smoothing": 0.1}
    check("kl_div", student, teacher, kd_loss, plain=backend == "torch", **options)


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_and_strides(backend, dtype, reduction):
    student, teacher = logits(4, 6, 90, dtype=dtype)
    target = torch.arange(24).reshape(4, 6)
    for loss_function in (LOSSES["js_div"], functools.partial(functional.kd_loss, standardize=True, target=target)):
        loss, grad = run(loss_function, student, teacher, reduction=reduction)
        in_place = run(
            lambda s, t, f=loss_function, **o: f(s * 1, t, inplace=True, **o), student, teacher, reduction=reduction
        )
        apart = torch.zeros(4, 6, 180, dtype=dtype)[..., ::2].copy_(student)
        strided = run(loss_function, apart, teacher.transpose(0, 1).contiguous().transpose(0, 1), reduction=reduction)
        for found in (in_place, strided):
            assert error(found[0], loss) <= FLOOR[torch.float32]
            assert error(found[1], grad) <= 2 * FLOOR[dtype]


def test_expanded_student(backend):
    student, teacher = logits(3, 50)
    leaf = student[:1].clone().requires_grad_()
    LOSSES["kl_div"](leaf.expand(3, 50), teacher, reduction="sum").backward()
    wanted = run(LOSSES["kl_div"], student[:1].expand(3, 50).contiguous(), teacher, reduction="sum")[1]
    assert error(leaf.grad, wanted.sum(0, keepdim=True)) <= 2 * FLOOR[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_maps_are_their_pixels(backend, layout, dtype):
    student, teacher = logits(2, 19, 5, 13, dtype=dtype)
    if layout == "channels_last":
        student, teacher = (x.to(memory_format=torch.channels_last) for x in (student, teacher))
    options = {"mask": torch.arange(5)[:, None] != 2, "weight": torch.linspace(0.5, 1.5, 13)}
    target = torch.arange(130).reshape(2, 5, 13) % 19
    for loss_function in (LOSSES["kl_div"], functools.partial(functional.kd_loss, standardize=True, target=target)):
        loss, grad = run(loss_function, student, teacher, dim=1, **options)
        rows = [x.movedim(1, -1).contiguous() for x in (student, teacher)]
        wanted, wanted_grad = run(loss_function, *rows, **options)
        assert error(loss, wanted) <= 2 * FLOOR[compute_dtype(student)]
        assert error(grad.movedim(1, -1), wanted_grad) <= 2 * FLOOR[dtype]
        if backend != "torch":
            assert grad.stride() == student.stride()


@pytest.mark.parametrize("most", [1, 3, 7])
def test_slabs_are_one_call(kernel, most):
    """Each row's loss and gradient have the same bits in a slab of any size; sums are those of slabs."""
    student, teacher = logits(2, 3, 3, 33, dtype=torch.bfloat16)
    options = {"temperature": torch.linspace(1, 2, 3), "mask": torch.arange(3)[:, None] != 1, "weight": torch.rand(3)}
    options["target"] = torch.arange(18).reshape(2, 3, 3) % 33
    kd_loss = functools.partial(functional.kd_loss, standardize=True, divergence="js_div", beta=torch.rand(3, 1))
    for layout in (lambda x: x, lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1)):
        s, t = layout(student), layout(teacher)
        for reduction in ("none", "batchmean"):
            whole = run(kd_loss, s, t, reduction=reduction, **options)
            with unittest.mock.patch.dict(standardize.SLAB, {"cpu": most * 33}):
                assert len(list(standardize.slabs(torch.Size((2, 3, 3)), most))) >= 18 / most
                parts = run(kd_loss, s, t, reduction=reduction, **options)
            assert error(parts[0], whole[0]) <= FLOOR[torch.float32]
            tolerance = 0 if layout(student) is student else FLOOR[torch.bfloat16]  # few neighbours are walked as rows
            assert error(parts[1], whole[1]) <= tolerance


@pytest.mark.parametrize("leading", [(), (0,), (5,), (2, 3, 4), (7, 0), (1, 9), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_slabs_have_every_row_once(leading, most):
    x = torch.arange(torch.Size(leading).numel()).reshape(leading)
    found, row = [], 0
    for slab in standardize.slabs(torch.Size(leading), most):
        assert slab.first == row
        row = slab.last
        part = x[slab.index].reshape(-1)
        assert part.numel() == slab.last - slab.first <= most
        found += part.tolist()
    assert found == x.reshape(-1).tolist()


@pytest.mark.parametrize("shape", [(40, 1500), (3, 70000), (1, 19, 30, 40)], ids=str)
def test_the_same_bits_with_any_number_of_threads(threads, shape):
    student, teacher = logits(*shape)
    options = {"dim": 1} if len(shape) == 4 else {}
    found = []
    with fastkd.backend("cpu"):
        for count in (1, 2, 5):
            threads(count)
            found.append(run(LOSSES["js_div"], student, teacher, **options))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


# of adaptive_kl_div a share of the difference is a constant
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "adaptive_kl_div"])
def test_gradcheck(backend, name):
    student, teacher = logits(3, 7, dtype=torch.float64)
    student.requires_grad_()
    options = {"temperature": torch.tensor([1.0, 2.0, 3.0]).double(), "mask": torch.tensor([True, False, True])}
    assert gradcheck(backend, lambda s: LOSSES[name](s, teacher, **options), student)
    student, teacher = (x.detach().T.reshape(1, 7, 3) for x in (student, teacher))
    student.requires_grad_()
    assert gradcheck(backend, lambda s: LOSSES[name](s, teacher, dim=1, reduction="none"), student)


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(backend_name, dynamic):
    target = torch.arange(8) % 5

    def loss_function(s, t):
        return functional.kl_div(s, t, standardize=True) + functional.kd_loss(s, t, target[: len(s)], standardize=True)

    with fastkd.backend(backend_name):
        compiled = torch.compile(loss_function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for shape in ((8, 20), (4, 30)):
            student, teacher = logits(*shape)
            for found, wanted in zip(
                both(compiled, student, teacher), both(loss_function, student, teacher), strict=True
            ):
                assert error(found, wanted) < 2 * FLOOR[torch.float32]


WITH_TARGETS = ("KDLoss", "DKDLoss", "NKDLoss")


def test_modules():
    student, teacher = logits(4, 20)
    for name, entry in inspect.getmembers(fastkd, inspect.isclass):
        if "standardize" not in getattr(entry, "_options", ()):
            continue
        given = (student, teacher, torch.arange(4)) if name in WITH_TARGETS else (student, teacher)
        assert "standardize=True" in repr(entry(standardize=True))
        plain = entry()(*given)
        assert entry(standardize=True)(*given) != plain
        assert torch.equal(entry(standardize=False)(*given), plain)


def test_second_derivatives_and_transforms_are_refused_or_right(backend):
    student, teacher = logits(3, 9, dtype=torch.float64)
    student.requires_grad_()
    if backend == "torch":
        assert torch.autograd.gradgradcheck(lambda s: LOSSES["kl_div"](s, teacher), student)
        return
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(LOSSES["kl_div"](student, teacher), student, create_graph=True)


def test_bad_calls_of_the_ops(kernel):
    if kernel.startswith("triton"):
        return
    x, moments = torch.randn(3, 5), torch.empty(3, 3, dtype=torch.float64)
    namespace = "fastkd_cusim" if kernel.endswith("cusim") else "fastkd"
    fwd, bwd = standardize.OPS[namespace]
    for out, mask, given, message in (
        (x[:2], None, None, "out: a tensor of x's shape"),
        (x.half(), None, None, "out: float32, or float64, wanted"),
        (x.clone(), torch.ones(3), None, "mask: a contiguous tensor"),
        (x.clone(), None, moments[:2], "moments: a contiguous tensor"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fwd(x, mask, out, given)
    with pytest.raises(RuntimeError, match="addend: the dtype and strides of upstream wanted"):
        bwd(x, None, moments, x.clone(), torch.randn(5, 3).T, x.clone())
    with pytest.raises(RuntimeError, match="grad: the dtype of x wanted"):
        bwd(x, None, moments, x.clone(), None, x.half())
