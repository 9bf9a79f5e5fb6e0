"""dist_loss: values and gradients against its formula in extended precision."""

import unittest.mock

import pytest
import torch
import torch.nn.functional as F
from conftest import gradcheck
from dist_truth import dist_truth
from tolerances import FLOOR, NEAR_CONVERGENCE, error

import fastkd
from fastkd.functional import dist_loss

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHAPES = {
    "digits": (32, 10),
    "two_classes": (5, 2),
    "one_class": (5, 1),
    "one_row": (1, 40),
    "odd": (37, 333),
    "one_block": (20, 512),
    "block_and_one": (3, 1025),
    "sequence": (2, 30, 65),
    "many_dims": (2, 1, 2, 1, 3, 1, 2, 9),
    "vector": (50,),
    "many_chunks": (700, 33),
    "long_rows": (3, 9001),
    "no_rows": (0, 7),
    "no_rows_in_the_middle": (3, 0, 7),
}


def logits(shape, dtype=torch.float32, teacher_dtype=None, near=None):
    """near: how far the student is from the teacher."""
    generator = torch.Generator().manual_seed(sum(shape))
    teacher = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    student = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if near is not None:
        student = teacher + near * student
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def some_rows(shape):
    return torch.rand(shape[:-1], generator=torch.Generator().manual_seed(1)) < 0.6


def run(student, teacher, upstream=1.0, **options):
    student = student.detach().requires_grad_()
    loss = dist_loss(student, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss * upstream, student)[0]


def check(student, teacher, upstream=1.0, tolerance=1.0, constant=1e-15, **options):
    loss, grad = run(student, teacher, upstream, **options)
    loss_ref, grad_ref = dist_truth(student, teacher, constant=constant, **options)
    compute = torch.float64 if torch.float64 in (student.dtype, teacher.dtype) else torch.float32
    assert loss.dtype is compute
    assert (grad.dtype, grad.shape) == (student.dtype, student.shape)
    assert error(loss, loss_ref) <= 2 * tolerance * FLOOR[compute]
    grad_ref = grad_ref * upstream
    stored = 2 * error(grad_ref.to(grad.dtype), grad_ref)
    assert error(grad, grad_ref) <= 40 * tolerance * FLOOR[compute] + stored


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_matches_the_formula(backend, shape, dtype, masked):
    student, teacher = logits(shape, dtype)
    options = {"mask": some_rows(shape)} if masked else {}
    check(student, teacher, upstream=512.0, **options)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0), (0.0, 0.0)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2, 1e-30])
def test_options(backend, temperature, weights, eps):
    student, teacher = logits((50, 60))
    check(student, teacher, temperature=temperature, inter_weight=weights[0], intra_weight=weights[1], eps=eps)


@pytest.mark.parametrize("shape", [(37, 333), (2, 30, 65), (50,), (700, 33), (3, 0, 7), (2, 40, 3, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standardized_logits(backend, shape, masked, dtype):
    """Rows of few classes too, of which some are impossible or equal; and what lies far from 0."""
    student, teacher = logits(shape, dtype)
    dim = 1 if len(shape) == 4 else -1
    if student.numel() and len(shape) > 1:
        student, teacher = student + 64, teacher - 128
        for x, row in ((student, 0), (teacher, 1)):
            x.movedim(dim, -1)[..., row : row + 1, ::3] = -torch.inf
        student.movedim(dim, -1)[..., 2, :] = 0.25
    options = {"mask": some_rows((shape[0], *shape[2:], 1) if dim == 1 else shape)} if masked else {}
    # deviations, and what the gradient is less by them, have roundings of their own
    check(student, teacher, upstream=512.0, tolerance=4, standardize=True, temperature=2.0, dim=dim, **options)


def test_standardized_logits_in_slabs_of_any_size(kernel):
    from fastkd.ops import standardize

    student, teacher = logits((6, 5, 33))
    whole = run(student, teacher, standardize=True)
    for most in (1, 4, 7):
        with unittest.mock.patch.dict(standardize.SLAB, {"cpu": most * 33}):
            for found, wanted in zip(run(student, teacher, standardize=True), whole, strict=True):
                # on a GPU the order of a row's sums depends on where in memory it begins
                assert error(found, wanted) <= (FLOOR[torch.float32] if kernel.startswith("cuda") else 0)


@pytest.mark.parametrize("near", [1e-2, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_keeps_its_digits_near_convergence(backend, dtype, near):
    """Down to a loss below 5e-7; less eps, of which 1 - ab / (|a| |b| + eps) has nearly nothing but."""
    student, teacher = logits((200, 100), dtype, near=near)
    loss, grad = run(student, teacher, eps=1e-30)
    loss_ref, grad_ref = dist_truth(student, teacher, eps=1e-30)
    digits = 1.0 if dtype is torch.float32 else 1e-6
    assert error(loss, loss_ref) <= digits * NEAR_CONVERGENCE * (1e-3 / near if near < 1e-3 else 1)
    rounding = digits * 2e-7 / near if dtype is torch.float32 else 1e-15 / near
    assert error(grad, grad_ref) <= 20 * rounding


def test_equal_sides_have_no_loss_and_no_gradient(backend):
    student, _ = logits((30, 50))
    loss, grad = run(student, student.clone(), eps=1e-30)
    assert loss <= 1e-12
    assert grad.abs().max() <= 1e-10


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_dtypes(backend, dtype, teacher_dtype):
    check(*logits((20, 300), dtype, teacher_dtype), upstream=512.0)


LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "slice": lambda x: F.pad(x, (3, 2))[:, 3:-2],
    "every_other_row": lambda x: x.repeat_interleave(2, 0)[::2],
    "every_other_class": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of", ["student", "teacher", "both"])
def test_any_layout(backend, layout, of):
    student, teacher = logits((70, 90))
    student = LAYOUTS[layout](student) if of != "teacher" else student
    teacher = LAYOUTS[layout](teacher) if of != "student" else teacher
    check(student, teacher)


@pytest.mark.parametrize("shape", [(2, 7, 11, 19), (1, 5, 60, 40), (2, 1100, 3, 3), (3, 40, 2, 2), (4, 6, 5)], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_maps(backend, shape, masked, dtype):
    student, teacher = logits(shape, dtype)
    options = {"mask": some_rows((shape[0], *shape[2:], 1))} if masked else {}
    check(student, teacher, dim=1, **options)


def test_maps_that_lie_otherwise(backend):
    student, teacher = logits((2, 7, 11, 19))
    check(student, teacher.to(memory_format=torch.channels_last), dim=1)
    check(student.to(memory_format=torch.channels_last), teacher.to(memory_format=torch.channels_last), dim=1)


@pytest.mark.parametrize("maps", [False, True])
def test_masked_rows_may_hold_anything(backend, maps):
    student, teacher = logits((2, 40, 6))
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 3] = mask[1, 7] = mask[0, 0] = False
    loss_ref, grad_ref = run(student, teacher, mask=mask)
    for i, j in ((0, 3), (1, 7), (0, 0)):
        student[i, j], teacher[i, j] = torch.nan, torch.inf
    if maps:
        student, teacher = (x.movedim(-1, 1).contiguous() for x in (student, teacher))
        loss, grad = run(student, teacher, mask=mask, dim=1)
        grad = grad.movedim(1, -1)
    else:
        loss, grad = run(student, teacher, mask=mask)
        assert torch.equal(loss, loss_ref)
        assert torch.equal(grad, grad_ref)
    torch.testing.assert_close(loss, loss_ref)
    torch.testing.assert_close(grad, grad_ref)
    assert (grad[~mask] == 0).all()


def test_a_mask_broadcasts(backend):
    student, teacher = logits((4, 5, 6))
    mask = torch.tensor([True, False, True, True, False])
    loss, grad = run(student, teacher, mask=mask)
    loss_ref, grad_ref = run(student[:, mask], teacher[:, mask])
    torch.testing.assert_close(loss, loss_ref)
    torch.testing.assert_close(grad[:, mask], grad_ref)
    assert (grad[:, ~mask] == 0).all()


def test_without_a_row_that_counts_there_is_no_loss(backend, poisoned):
    student, teacher = logits((6, 30))
    student[2] = torch.nan
    loss, grad = run(student, teacher, mask=torch.zeros(6, dtype=torch.bool))
    assert loss == 0
    assert (grad == 0).all()


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("V", [3, 7, 100, 1000, 9000])
def test_a_constant_row_has_correlation_0(backend, side, V):
    sides = list(logits((4, V)))
    sides[side][1:3] = torch.tensor([[0.1], [1e3]])
    check(*sides, eps=1e-30, tolerance=4)
    loss, grad = run(*(x[1:3] for x in sides), intra_weight=0.0, eps=1e-30)
    assert loss == 1
    assert (grad == 0).all()


@pytest.mark.parametrize("side", [0, 1])
def test_a_constant_column_has_correlation_0(backend, side):
    sides = list(logits((300, 30)))
    sides[side][:] = sides[side][:1]
    loss, grad = run(*sides, inter_weight=0.0, eps=1e-30)
    assert loss == 1
    assert (grad == 0).all()
    sides = list(logits((300, 30)))
    sides[side][:, 4] = -torch.inf
    check(*sides, eps=1e-30, tolerance=4)
    _, grad = run(*sides)
    assert side or (grad[:, 4] == 0).all()


def test_what_differs_by_rounding_errors_alone_is_constant(backend):
    """The rows hold the same probabilities in another order, which are summed in another."""
    order = torch.stack([torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(99)]) for _ in range(200)])
    teacher = torch.randn(100)[order]
    student = torch.randn(200, 100)
    check(student, teacher, eps=1e-30, constant=1e-6)


@pytest.mark.parametrize("side", [0, 1])
def test_rows_without_any_possible_class(backend, side):
    sides = list(logits((40, 30)))
    sides[side][[0, 7]] = -torch.inf
    check(*sides)
    if side == 0:
        assert (run(*sides)[1][[0, 7]] == 0).all()


def test_impossible_classes(backend):
    student, teacher = logits((40, 30))
    student[torch.rand(40, 30) < 0.3] = -torch.inf
    teacher[torch.rand(40, 30) < 0.3] = -torch.inf
    check(student, teacher)


def test_large_and_shifted_logits(backend):
    student, teacher = logits((40, 300))
    check(student * 100, teacher * 100, tolerance=8)
    check((student * 8).round() / 8 + 1024, (teacher * 8).round() / 8 - 2048, tolerance=4)
    near = (teacher * 64).round() / 64
    loss, grad = run(near + 1024, near, eps=1e-30)  # the same probabilities
    assert loss <= 1e-9
    assert grad.abs().max() <= 1e-7


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_nan_is_not_hidden(backend, bad, side):
    sides = list(logits((40, 30)))
    sides[side][3, 4] = bad
    loss, grad = run(*sides)
    assert loss.isnan()
    assert grad[3].isnan().all()


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4)], ids=str)
def test_gradcheck(backend, shape):
    student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(shape, dtype=torch.float64)
    mask = some_rows(shape)
    assert gradcheck(backend, lambda s: dist_loss(s, teacher, mask=mask, temperature=2.0, eps=0.01), (student,))


@pytest.mark.parametrize("maps", [False, True])
def test_the_same_bits_again(kernel, maps):
    student, teacher = logits((300, 90))
    if maps:
        student, teacher = (x.T.contiguous().T for x in (student, teacher))
    first = run(student, teacher)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(student, teacher), strict=True))


@pytest.mark.parametrize("shape", [(700, 33), (40, 3001), (17, 5)], ids=str)
@pytest.mark.parametrize("maps", [False, True])
def test_the_same_bits_with_any_number_of_threads(threads, shape, maps):
    student, teacher = logits(shape)
    if maps:
        student, teacher = (x.T.contiguous().T for x in (student, teacher))
    found = []
    for count in (1, 2, 3, 8):
        threads(count)
        found.append(run(student, teacher))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inplace_writes_the_gradient_over_the_student(backend, dtype, standardize):
    student, teacher = logits((60, 70), dtype)
    expected = run(student, teacher, upstream=3.0, standardize=standardize)
    leaf = student.clone().requires_grad_()
    z = leaf * 1
    loss = dist_loss(z, teacher, inplace=True, standardize=standardize)
    (3.0 * loss).backward()
    assert torch.equal(loss.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])
    if backend != "torch":
        assert torch.equal(z.detach(), expected[1])


def test_after_inplace_the_logits_are_gone(backend):
    student, teacher = logits((6, 7))
    z = student.requires_grad_() * 1
    loss = dist_loss(z, teacher, inplace=True)
    with pytest.raises(ValueError, match=r"^student: these logits.* have been overwritten"):
        dist_loss(z, teacher)
    with pytest.raises(RuntimeError, match="used again"):
        (loss + z.sum()).backward()


def test_both_sides_learn_by_two_calls(backend):
    a, b = (x.requires_grad_() for x in logits((20, 30)))
    with pytest.raises(
        ValueError, match=r"^teacher: .*dist_loss\(student, teacher.detach\(\)\) and dist_loss\(teacher, "
    ):
        dist_loss(a, b)
    grads = torch.autograd.grad(dist_loss(a, b.detach()), a) + torch.autograd.grad(dist_loss(b, a.detach()), b)
    for x, y, grad in ((a, b, grads[0]), (b, a, grads[1])):
        assert error(grad, dist_truth(x, y)[1]) <= 1e-4


def test_backward_twice(backend):
    student, teacher = logits((20, 30))
    student.requires_grad_()
    loss = dist_loss(student, teacher)
    first = torch.autograd.grad(loss, student, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, student)[0])


def test_without_gradients_the_loss_is_the_same(backend):
    student, teacher = logits((20, 30))
    expected, _ = run(student, teacher)
    with torch.inference_mode():
        assert torch.equal(dist_loss(student, teacher), expected)
        inference = teacher.clone()
        mask = torch.ones(20, dtype=torch.bool)
    loss, _ = run(student, inference, mask=mask)
    torch.testing.assert_close(loss, expected)


def test_the_module(backend):
    student, teacher = logits((4, 6, 5))
    module = fastkd.DISTLoss(inter_weight=2.0, intra_weight=0.5, temperature=3.0, eps=1e-6, dim=1)
    mask = some_rows((4, 5, 1))
    options = {"inter_weight": 2.0, "intra_weight": 0.5, "eps": 1e-6, "dim": 1}
    torch.testing.assert_close(module(student, teacher, mask=mask), dist_loss(student, teacher, temperature=3.0, mask=mask, **options))  # fmt: skip
    torch.testing.assert_close(module(student, teacher, temperature=1.5), dist_loss(student, teacher, temperature=1.5, **options))  # fmt: skip


BAD = {
    "inter_weight": [(-1.0, ValueError), ("1", TypeError), (torch.nan, ValueError)],
    "intra_weight": [(-1.0, ValueError), (torch.inf, ValueError), (True, TypeError)],
    "temperature": [(0.0, ValueError), (-1, ValueError), (torch.ones(4), TypeError), (None, TypeError)],
    "eps": [(0.0, ValueError), (-1e-8, ValueError), (1e-40, ValueError), ("", TypeError)],
    "standardize": [(1, TypeError), (None, TypeError)],
    "dim": [(2, ValueError), (0.5, TypeError)],
    "mask": [(torch.ones(4), TypeError), (torch.ones(3, dtype=torch.bool), ValueError), ([True] * 4, TypeError)],
    "inplace": [(1, TypeError)],
}


@pytest.mark.parametrize("argument", BAD)
def test_bad_options_are_named(backend, argument):
    for value, problem in BAD[argument]:
        with pytest.raises(problem, match=f"^{argument}: .*wanted"):
            dist_loss(torch.randn(4, 5), torch.randn(4, 5), **{argument: value})
        if argument != "mask" and not (argument == "dim" and value == 2):
            with pytest.raises(problem, match=f"^{argument}: .*wanted"):
                fastkd.DISTLoss(**{argument: value})


def test_bad_logits_are_named(backend):
    good = torch.randn(4, 5)
    for student, teacher, problem, name in (
        ([1.0], good, TypeError, "student"),
        (good, good.long(), TypeError, "teacher"),
        (good, torch.randn(4, 6), ValueError, "teacher"),
        (torch.randn(()), torch.randn(()), ValueError, "student"),
        (torch.randn(4, 0), torch.randn(4, 0), ValueError, "student"),
        (good, good.to("meta"), ValueError, "teacher"),
        (good.to_sparse(), good, TypeError, "student"),
    ):
        with pytest.raises(problem, match=f"^{name}: "):
            dist_loss(student, teacher)


def test_ops_look_at_what_they_are_given(kernel):
    from fastkd import _backend
    from fastkd.ops import dist

    x = torch.randn(4, 5)
    ops = dist.OPS[_backend.namespace(kernel.partition("-")[0])]
    rows, columns, numbers = torch.empty(4, 6).double(), torch.empty(3, 16), torch.tensor([1, 1, 1, 1e-8]).double()
    good = {"mask": None, "scale": 0.25, "scale_tensor": None, "numbers": numbers}
    out = {"loss": torch.empty(()), "rows": rows, "columns": columns}
    for i, name in enumerate(("inter_weight", "intra_weight", "temperature", "eps")):
        bad = numbers.clone()
        bad[i] = -1
        with pytest.raises((RuntimeError, ValueError), match=f"{name}: "):
            ops.fwd(x, x, **{**good, "numbers": bad}, **out)


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compiled_exported_and_without_values(backend_name):
    class Step(torch.nn.Module):
        def forward(self, student, teacher, mask):
            return dist_loss(student, teacher, mask=mask, temperature=2.0)

    student, teacher = logits((9, 20))
    mask = some_rows(student.shape)
    with fastkd.backend(backend_name):
        torch.compiler.reset()
        compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager", dynamic=True)
        for N in (9, 7, 5):
            x = student[:N].clone().requires_grad_()
            loss = compiled(x, teacher[:N], mask[:N])
            expected, grad = run(student[:N], teacher[:N], mask=mask[:N], temperature=2.0)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], grad)
        batch = torch.export.Dim("batch", min=2)
        program = torch.export.export(Step(), (student, teacher, mask), dynamic_shapes=({0: batch},) * 3)
        torch.testing.assert_close(program.module()(student[:6], teacher[:6], mask[:6]), Step()(student[:6], teacher[:6], mask[:6]))  # fmt: skip
        meta = dist_loss(student.to("meta").requires_grad_(), teacher.to("meta"))
        assert (meta.shape, meta.device.type) == ((), "meta")
        meta.backward()


def test_autocast_does_not_round(backend):
    student, teacher = logits((20, 30))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = run(student, teacher)
    torch.testing.assert_close(loss, run(student, teacher)[0])
