"""What torch asks of an operator: schemas, fakes, gradcheck, compile, export, autocast."""

import cases
import pytest
import torch
import torch._dynamo.testing
from tolerances import FLOOR, error

import fastkd
from fastkd import _backend, functional
from fastkd.ops import rows

without_triton = pytest.mark.skipif(bool(_backend.unavailable("triton")), reason=_backend.unavailable("triton"))
if torch.cuda.is_available():  # these tests have CPU tensors, which Triton takes under its interpreter only
    without_triton = pytest.mark.skip(reason="Triton computes on the GPU here; test_gpu.py has these")


def op_calls(backend_name):
    """Every op with arguments that it accepts."""
    ops = rows.OPS[_backend.namespace(backend_name)]
    student, teacher = torch.randn(3, 4, 20), torch.randn(3, 4, 20)
    rows_of = torch.rand(12) + 0.5
    plain = (0, 0.0, 2.0, None, 2.0, None, True, None, None, 2, None, None)
    full = (2, 0.0, 1.0, rows_of, 3.0, None, False, torch.rand(12) < 0.7, rows_of, 0, None, None)
    normalized = (3, 0.3, 2.0, None, 1.0, rows_of, True, None, None, 1, None, torch.tensor(5.0))
    for name, options in (("plain", plain), ("full", full), ("normalized", normalized)):
        for save in (0, 1, 2):
            yield f"rows_fwd-{name}-{save}", ops.fwd, (student, teacher, *options, save)
        yield f"rows_fwd_-{name}", ops.fwd_, (student.clone(), teacher, *options)
        stats = ops.fwd(student, teacher, *options, rows.STATS)[2]
        upstream = torch.rand(12) if options[9] == 0 else torch.rand(())
        yield f"rows_bwd-{name}", ops.bwd, (student, teacher, *options, stats, upstream)
        yield f"rows_bwd_-{name}", ops.bwd_, (student.clone(), teacher, *options, stats, upstream)
    half = student.bfloat16().transpose(0, 1)
    for factor in (1.0, 0.5):
        yield f"scale_-{factor}", ops.scale_, (student.clone(), torch.tensor(factor))
    yield "rows_fwd-bfloat16", ops.fwd, (half, teacher.transpose(0, 1), *plain, 1)


CALLS = {
    f"{backend_name}-{name}": (op, arguments)
    for backend_name in ("cpu", "triton")
    if not _backend.unavailable(backend_name) and _backend.serves(backend_name, "cpu")
    for name, op, arguments in op_calls(backend_name)
}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op, arguments = CALLS[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("name", cases.LOSSES)
def test_gradcheck(backend, name, reduction):
    loss_function = cases.LOSSES[name]
    student, teacher = (
        torch.randn(3, 7, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 7, dtype=torch.float64),
    )
    options = {
        "temperature": torch.rand(3, dtype=torch.float64) + 1,
        "teacher_temperature": 2.0,
        "mask": torch.tensor([True, False, True]),
        "weight": torch.rand(3, dtype=torch.float64),
        "reduction": reduction,
    }
    assert torch.autograd.gradcheck(lambda s: loss_function(s, teacher, **options), student)
    assert torch.autograd.gradcheck(lambda s: loss_function(s, teacher), student)


def both(function, student, teacher, *rest):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, *rest)
    (grad,) = torch.autograd.grad((loss * 0.5).sum(), student)
    return loss.detach(), grad


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


@pytest.mark.parametrize("backend_name", ["cpu", "torch", pytest.param("triton", marks=without_triton)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compile_fullgraph(reduction, dtype, backend_name):
    def training_loss(student, teacher, mask, temperature):
        return functional.kl_div(
            student * 2, teacher, temperature=temperature, mask=mask, weight=mask.float() + 1, reduction=reduction
        ) + functional.kl_div(student[:, :-1], teacher[:, :-1], temperature=2.0).mean()  # fmt: skip

    arguments = (
        torch.randn(4, 3, 50).to(dtype),
        torch.randn(4, 3, 50).to(dtype),
        torch.rand(4, 3) < 0.7,
        torch.rand(4, 3) + 1,
    )
    with fastkd.backend(backend_name):
        loss, grad = both(training_loss, *arguments)
        compiled_loss, compiled_grad = both(torch.compile(training_loss, fullgraph=True), *arguments)
    assert error(compiled_loss, loss) < 2 * FLOOR[torch.float32]
    assert error(compiled_grad, grad) < 2 * FLOOR[dtype]


def test_compile_dynamic_shapes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t: functional.kl_div(s, t, temperature=2.0), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((4, 50), (9, 64), (2, 1000), (5, 33)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        loss, grad = both(lambda s, t: functional.kl_div(s, t, temperature=2.0), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count == 1


def test_compile_with_a_temperature_that_changes():
    """An annealed temperature becomes a symbol; what cannot be checked then, the op checks."""
    compiled = torch.compile(
        lambda s, t, T: functional.kl_div(s, t, temperature=T), fullgraph=True, backend="aot_eager"
    )
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    for temperature in (1.0, 2.0, 3.5, 4.0):
        loss, grad = both(lambda s, t, T=temperature: functional.kl_div(s, t, temperature=T), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher, temperature)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    with pytest.raises((RuntimeError, ValueError), match="temperature: a positive finite number wanted"):
        compiled(student, teacher, -1.5)


def test_compile_refuses_inplace():
    compiled = torch.compile(lambda s, t: functional.kl_div(s * 2, t, inplace=True), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"inplace: not under torch\.compile"):
        compiled(torch.randn(3, 5, requires_grad=True), torch.randn(3, 5))


def test_compile_module():
    module = fastkd.KLDivLoss(temperature=3.0)
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    loss, grad = both(module, student, teacher)
    compiled_loss, compiled_grad = both(torch.compile(module, fullgraph=True), student, teacher)
    assert torch.equal(compiled_loss, loss)
    assert error(compiled_grad, grad) < FLOOR[torch.float32]


def test_export_with_a_dynamic_batch():
    class Evaluate(torch.nn.Module):
        def forward(self, student, teacher):
            return functional.kl_div(student, teacher, temperature=2.0, reduction="none")

    batch = torch.export.Dim("batch", min=2)
    example = torch.randn(4, 50), torch.randn(4, 50)
    program = torch.export.export(Evaluate(), example, dynamic_shapes=({0: batch}, {0: batch}))
    student, teacher = torch.randn(7, 50), torch.randn(7, 50)
    expected = functional.kl_div(student, teacher, temperature=2.0, reduction="none")
    assert torch.equal(program.module()(student, teacher), expected)


def test_module_equals_function(backend):
    student, teacher, mask = torch.randn(4, 20), torch.randn(4, 20), torch.tensor([True, True, False, True])
    module = fastkd.KLDivLoss(temperature=3.0, teacher_temperature=2.0, t_squared=False, reduction="sum")
    expected = functional.kl_div(
        student, teacher, temperature=3.0, teacher_temperature=2.0, t_squared=False, reduction="sum", mask=mask
    )
    assert torch.equal(module(student, teacher, mask=mask), expected)
    per_row = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = functional.kl_div(
        student, teacher, temperature=per_row, teacher_temperature=2.0, t_squared=False, reduction="sum"
    )
    assert torch.equal(module(student, teacher, temperature=per_row), expected)
    assert "temperature=3.0" in repr(module)


def test_autocast_training_step(backend):
    model = torch.nn.Linear(8, 30)
    x, teacher = torch.randn(5, 8), torch.randn(5, 30)
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.kl_div(model(x), teacher, temperature=2.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0


def test_meta_tensors_have_shapes():
    loss = functional.kl_div(torch.empty(4, 20, device="meta"), torch.empty(4, 20, device="meta"), reduction="none")
    assert loss.shape == (4,)
    assert loss.device.type == "meta"


@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_meta_and_fake_tensors_differentiate(reduction):
    def step(student, teacher):
        loss = functional.kl_div(student.requires_grad_(), teacher, reduction=reduction)
        return torch.autograd.grad((0.5 * loss).sum(), student)[0]

    grad = step(torch.empty(4, 20, device="meta"), torch.empty(4, 20, device="meta"))
    assert (grad.shape, grad.device.type) == ((4, 20), "meta")
    with torch._subclasses.FakeTensorMode():
        assert step(torch.empty(4, 20), torch.empty(4, 20)).shape == (4, 20)
