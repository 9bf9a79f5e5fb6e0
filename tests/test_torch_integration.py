"""What torch asks of an operator: schemas, fakes, gradcheck, compile, export, autocast."""

import functools
import pickle

import cases
import pytest
import relation_cases
import torch
import torch._dynamo.testing
from conftest import gradcheck
from tolerances import FLOOR, error

import fastkd
from fastkd import _backend, functional
from fastkd._calls import DistCall, RowsCall, RowsForward
from fastkd._divergences import NON_TARGET, NUMBERS
from fastkd._dtypes import compute_dtype
from fastkd.ops import attention, dist, features, relations, rows, standardize
from fastkd.ops.numbers import as_tensor

without_triton = pytest.mark.skipif(bool(_backend.unavailable("triton")), reason=_backend.unavailable("triton"))
if torch.cuda.is_available():  # these tests have CPU tensors, which Triton takes under its interpreter only
    without_triton = pytest.mark.skip(reason="Triton computes on the GPU here; test_gpu.py has these")


def op_calls(backend_name):
    """Every op with arguments that it accepts."""
    ops = rows.OPS[_backend.namespace(backend_name)]
    student, teacher = torch.randn(3, 4, 20), torch.randn(3, 4, 20)
    rows_of = torch.rand(12) + 0.5
    plain = RowsCall(student, teacher, 0, 0.0, None, 2.0, None, 2.0, None, True, None, None, 0.25, None)
    full = plain._replace(
        divergence=2, temperature=1.0, temperature_rows=rows_of, teacher_temperature=3.0, t_squared=False,
        mask=torch.rand(12) < 0.7, weight=rows_of, scale=1.0,
    )  # fmt: skip
    divided = plain._replace(
        divergence=3, parameter_rows=rows_of.double() / 2, teacher_temperature_rows=rows_of,
        scale_tensor=torch.tensor(0.2, dtype=torch.float64),
    )  # fmt: skip
    targets = full._replace(target=torch.arange(12), target_numbers=as_tensor(0.3, 0.6, 0.1))
    decoupled = targets._replace(
        divergence=NUMBERS[NON_TARGET.name], parameter=8.0, target_loss=1, second_parameter_rows=rows_of.double(),
        target_numbers=None,
    )  # fmt: skip
    normalized = decoupled._replace(parameter_rows=rows_of.double(), target_loss=2, second_parameter_rows=None)
    two_sums, coins = (
        full._replace(divergence=NUMBERS[name]) for name in ("negative_log_acceptance", "bernoulli_kl_div")
    )
    powers = divided._replace(divergence=NUMBERS["alpha_beta_div"], second_parameter_rows=rows_of.double())
    calls = {
        "plain": (plain, ()),
        "full": (full, (3, 4)),
        "divided": (divided, ()),
        "targets": (targets, (3, 4)),
        "decoupled": (decoupled, (3, 4)),
        "normalized": (normalized, ()),
        "two_sums": (two_sums, (3, 4)),
        "powers": (powers, ()),
        "one_power_of_all": (powers._replace(parameter=0.3, parameter_rows=None), ()),
        "coins": (coins, (3, 4)),
    }
    for name, (call, shape) in calls.items():
        stats = torch.empty(3, 4, rows.STATS_SIZE, dtype=torch.float64)
        saved = {"nothing": (None, None), "gradient": (torch.empty_like(student), None), "statistics": (None, stats)}
        for what, outputs in saved.items():
            yield f"rows_fwd-{name}-{what}", ops.fwd, (*call, *RowsForward(torch.empty(shape), *outputs))
        if name == "targets":
            parts = torch.empty(3, 4, rows.PARTS_SIZE, dtype=torch.float64)
            yield f"rows_fwd-{name}-parts", ops.fwd, (*call, *RowsForward(torch.empty(shape), None, stats, parts))
        ops.fwd(*call, *RowsForward(torch.empty(shape), None, stats))
        upstream = torch.rand(shape).reshape(-1)
        yield f"rows_bwd-{name}", ops.bwd, (*call, stats, upstream, torch.empty_like(student))
    scale = torch.empty((), dtype=torch.float64)
    for name, counted in (("rows", (full.mask, None)), ("given", (full.mask, torch.tensor(5.0)))):
        yield f"inverse_divisor-{name}", ops.inverse_divisor, (*counted, 12, 20, scale)
    half = student.bfloat16().transpose(0, 1)
    for factor in (1.0, 0.5):
        yield f"scale_-{factor}", ops.scale_, ([student.clone(), student.clone()], torch.tensor(factor))
    yield from standardized_calls(backend_name, plain, targets, student)
    call = plain._replace(student=half, teacher=teacher.transpose(0, 1))
    yield "rows_fwd-bfloat16", ops.fwd, (*call, *RowsForward(torch.empty(()), torch.empty_like(half), None))


def standardized_calls(backend_name, plain, targets, student):
    namespace = _backend.namespace(backend_name)
    ops, kernels = rows.OPS[rows.standardized(namespace)], standardize.OPS[namespace]
    stats, grad = torch.empty(3, 4, rows.STATS_SIZE, dtype=torch.float64), torch.empty_like(student)
    for name, call, shape in (("plain", plain, ()), ("targets", targets, (3, 4))):
        fwd, bwd = ops.fwd, ops.bwd
        for what, outputs in {"nothing": (None, None), "gradient": (grad, None), "statistics": (None, stats)}.items():
            arguments = (*fwd.args, *call, *RowsForward(torch.empty(shape), *outputs))
            yield f"standardized_rows_fwd-{name}-{what}", fwd.func, arguments
        arguments = (*bwd.args, *call, stats, torch.rand(shape).reshape(-1), grad)
        yield f"standardized_rows_bwd-{name}", bwd.func, arguments
    half, mask, moments = student.bfloat16(), targets.mask, torch.empty(12, 3, dtype=torch.float64)
    for what, given in (("alone", None), ("moments", moments)):
        yield f"standardize_fwd-{what}", kernels.fwd, (half, mask, torch.empty_like(student), given)
    kernels.fwd(half, None, torch.empty_like(student), moments)
    for what, addend in (("alone", None), ("addend", torch.randn_like(student))):
        yield f"standardize_bwd-{what}", kernels.bwd, (half, mask, moments, grad, addend, torch.empty_like(half))


def relational_calls(backend_name):
    """The same of the relational losses."""
    ops = relations.OPS[_backend.namespace(backend_name)]
    student, teacher = torch.randn(9, 6), torch.randn(9, 4)
    inputs = {
        "float32": (student, teacher),
        "float16": (student.half(), teacher.double()),
        "bfloat16": (student.bfloat16().T.contiguous().T, teacher[:, ::2]),
        "one_sample": (student[:1], teacher[:1]),
        "no_samples": (student[:0], teacher[:0]),
    }
    for name, pair in inputs.items():
        for save in (False, True):
            of_rows = None, None
            if save:
                count = torch.tensor(min(2, len(pair[0])))
                of_rows = count, torch.rand(len(pair[0]), dtype=compute_dtype(*pair))
            yield f"pairs_fwd-{name}-{save}", ops.pairs_fwd, (*pair, *of_rows, 0, as_tensor(0.5), True, save)
            yield (
                f"angles_fwd-{name}-{save}",
                ops.angles_fwd,
                (*pair, of_rows[0], as_tensor(2.0, 0.5, 1.0, 1.0), save),
            )
            if backend_name == "cpu":  # it is one for all
                yield f"similarity_fwd-{name}-{save}", ops.similarity_fwd, (*pair, None, None, save)
                mask = torch.rand(len(pair[0])) < 0.7
                yield f"gram_fwd-{name}-{save}", ops.gram_fwd, (*pair, save, 0, mask if save else None, None, save)
                rows = (mask, torch.rand(len(mask))) if save else (None, None)
                yield f"similarity_fwd-rows-{name}-{save}", ops.similarity_fwd, (*pair, *rows, save)
                yield f"gram_fwd-rows-{name}-{save}", ops.gram_fwd, (*pair, save, 0, *rows, save)
                for relation in range(3 if name in ("float16", "one_sample") else 0):
                    options = (relation, True, 0, as_tensor(1e-3), *rows, save)
                    yield f"samples_fwd-{relation}-{name}-{save}", torch.ops.fastkd.samples_fwd, (*pair, *options)
                yield f"pkt-{name}-{save}", ops.pkt_fwd, (*pair, as_tensor(1e-3), *rows, "fastkd", save)
                labels = torch.arange(len(mask)) % 3
                for how, similar in (
                    ("labels", (None, labels, 0)),
                    ("teacher", (pair[1], None, min(2, len(mask) - 1))),
                ):
                    options = (*similar, as_tensor(1.0), *rows, "fastkd", save)
                    yield f"triplet-{how}-{name}-{save}", torch.ops.fastkd.triplet_fwd, (pair[0], *options)
                for keys in (None, pair):
                    options = (keys is None, True, "fastkd", 0, 0.0, None, 1.0, None, 0.5, None, mask[None], None, None)
                    arguments = (*(x[None] for x in pair), *(keys and x[None] for x in keys or pair), *options)
                    yield f"relation_kl-{name}-{save}-{keys is None}", torch.ops.fastkd.relation_kl_fwd, (
                        *arguments, save, save and keys is not None)  # fmt: skip
                yield (
                    f"gram_fwd-batch-{name}-{save}",
                    ops.gram_fwd,
                    (*(x[None] for x in pair), True, 2, None, None, save),
                )
    yield "pairs_fwd-plain", ops.pairs_fwd, (student, teacher, None, None, 0, as_tensor(1.0), False, True)
    strips = getattr(torch.ops, _backend.namespace(backend_name))
    rows = [torch.rand(9) for _ in range(5)]
    strip = torch.randn(3, 7), torch.randn(3, 7), torch.zeros(9, dtype=torch.float64), *rows
    yield "pkt_strip_", strips.pkt_strip_, (*strip, 1e-7, 2)
    index = torch.arange(9)
    of_samples = index, index // 3 * 3, index // 3 * 3 + 3, index > 0, torch.tensor(8), torch.rand(9)
    x = torch.randn(9, 4)
    for grad in (None, torch.zeros(9, 4)):
        triplets = x[2:5] @ x.T, x, x.square().sum(1), *of_samples, 1.0, 2, grad
        yield f"triplet_strip_-{grad is None}", strips.triplet_strip_, triplets
    if backend_name == "cpu":
        strip = torch.randn(3, 7), torch.randn(3, 7), torch.ones(9), 1.0, 0.5, 2
        yield "relation_kl_sums", torch.ops.fastkd.relation_kl_sums, (*strip, torch.zeros(9, 2, dtype=torch.float64))
        yield "relation_kl_weights_", torch.ops.fastkd.relation_kl_weights_, (*strip, *rows)
    yield "angles_fwd-angle", ops.angles_fwd, (student, teacher, None, as_tensor(1.0, 1.0, 0.0, 1.0), True)


def feature_calls(backend_name):
    """The same of the feature losses."""
    namespace = _backend.namespace(backend_name)
    ops, attention_ops = features.OPS[namespace], attention.OPS[namespace]
    students = [torch.randn(3, 4, 6), torch.randn(2, 5, 3, 3).bfloat16().to(memory_format=torch.channels_last)]
    teachers = [torch.randn(3, 4, 6), torch.randn(2, 5, 3, 3)]
    masks, weights = [torch.rand(12) < 0.7, torch.rand(18) < 0.7], [torch.rand(12), torch.rand(18)]
    for feature, beta in [*((f, None) for f in range(4)), *((f, as_tensor(0.5)) for f in range(3))]:
        name = feature if beta is None else f"{feature}-beta"
        options = ([2, 1], feature, masks if feature % 2 else [], weights if feature > 1 else [])
        for reduction in (0, 3):
            tail = (reduction, as_tensor(1.0, 0.5), beta)
            for save in (False, True):
                yield f"features_fwd-{name}-{reduction}-{save}", ops.fwd, (students, teachers, *options, *tail, save)
            upstream = torch.rand(30) if reduction == 0 else torch.rand(())
            yield f"features_bwd-{name}-{reduction}", ops.bwd, (students, teachers, *options, *tail, upstream)
        for reduction in (0, 1):
            one = (students[0].clone(), teachers[0], 2, feature, masks[0], None, reduction, beta)
            yield f"features_fwd_-{name}-{reduction}", ops.fwd_, one
    maps = students[1], torch.randn(2, 7, 3, 3)
    for save in (False, True):
        yield f"attention_fwd-{save}", attention_ops.fwd, (*maps, as_tensor(2.0), save)
    yield "attention_bwd", attention_ops.bwd, (*maps, as_tensor(3.0), torch.rand(()))


def dist_calls(backend_name):
    """The same of dist_loss."""
    ops = dist.OPS[_backend.namespace(backend_name)]
    x = {"float32": torch.randn(3, 4, 20), "bfloat16": torch.randn(4, 3, 20).bfloat16().transpose(0, 1)}
    numbers, counts = as_tensor(1.0, 0.5, 2.0, 1e-8), torch.rand(12) < 0.7
    masked = {"mask": counts, "scale": 1.0, "scale_tensor": torch.tensor(0.2, dtype=torch.float64)}
    for name, student in x.items():
        for what, options in (("plain", {"mask": None, "scale": 1 / 12, "scale_tensor": None}), ("masked", masked)):
            call = DistCall(student, x["float32"], numbers=numbers, **options)
            saved = torch.empty(3, 4, dist.STATS_SIZE, dtype=torch.float64), torch.empty(dist.SLOPES_SIZE, 32)
            yield f"dist_fwd-{name}-{what}", ops.fwd, (*call, torch.empty(()), *saved)
            ops.fwd(*call, torch.empty(()), *saved)
            yield f"dist_bwd-{name}-{what}", ops.bwd, (*call, *saved, torch.tensor(2.0), torch.empty_like(student))


CALLS = {
    f"{backend_name}-{name}": (op, arguments)
    for backend_name in ("cpu", "triton")
    if not _backend.unavailable(backend_name) and _backend.serves(backend_name, "cpu")
    for calls in (op_calls, relational_calls, feature_calls, dist_calls)
    for name, op, arguments in calls(backend_name)
}


FIRST = {op: name for name, (op, _arguments) in reversed(CALLS.items())}


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    op, arguments = CALLS[name]
    # An op is traced once: with other options it comes to the same, and with Triton's, whose schemas and shapes are those
    # of the CPU's; what they write does not.
    traced = FIRST[op] == name and not name.startswith("triton")
    torch.library.opcheck(op, arguments, **({} if traced else {"test_utils": ("test_schema", "test_faketensor")}))


@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean", "mean"])
@pytest.mark.parametrize("name", [name for name in cases.LOSSES if name != "adaptive_kl_div"])  # whose g is a constant
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
    assert gradcheck(backend, lambda s: loss_function(s, teacher, **options), student)
    assert gradcheck(backend, lambda s: loss_function(s, teacher), student)


def both(function, student, teacher, *rest):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, *rest)
    (grad,) = torch.autograd.grad((loss * 0.5).sum(), student)
    return loss.detach(), grad


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()


# Each dtype with the backend whose graph is quickest to compile, each backend with one dtype.
COMPILED = [
    *(("cpu", dtype) for dtype in (torch.float32, torch.float16)),
    pytest.param("cpu", torch.bfloat16, marks=pytest.mark.long),
    ("torch", torch.float32),
    pytest.param("triton", torch.bfloat16, marks=without_triton),
]


def compiler_of(backend_name):
    """Of plain PyTorch's graphs it is the tracing that is ours; inductor would take a minute for its own operators."""
    return "aot_eager" if backend_name == "torch" else "inductor"


@pytest.mark.parametrize(("backend_name", "dtype"), COMPILED, ids=str)
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
        compiled_loss, compiled_grad = both(
            torch.compile(training_loss, fullgraph=True, backend=compiler_of(backend_name)), *arguments
        )
    assert error(compiled_loss, loss) < 2 * FLOOR[torch.float32]
    assert error(compiled_grad, grad) < 2 * FLOOR[dtype]


@pytest.mark.parametrize(("backend_name", "dtype"), COMPILED, ids=str)
@pytest.mark.parametrize("name", ["kd_loss", "dkd_loss", "nkd_loss"])
def test_compile_fullgraph_of_targets(name, dtype, backend_name):
    """Shapes that change are compiled once more."""

    def training_loss(student, teacher, target, mask):
        options = {"temperature": 2.0, "mask": mask, "weight": mask.float() + 1, "ignore_index": 0}
        return getattr(functional, name)(student * 2, teacher, target, **options)

    compiled = torch.compile(training_loss, fullgraph=True, dynamic=True, backend=compiler_of(backend_name))
    for B, V in ((4, 50), (9, 33)):
        logits = [torch.randn(B, 3, V).to(dtype) for _ in range(2)]
        arguments = *logits, torch.randint(V, (B, 3)), torch.rand(B, 3) < 0.7
        with fastkd.backend(backend_name):
            loss, grad = both(training_loss, *arguments)
            compiled_loss, compiled_grad = both(compiled, *arguments)
        assert error(compiled_loss, loss) < 2 * FLOOR[torch.float32]
        assert error(compiled_grad, grad) < 2 * FLOOR[dtype]


def test_compile_of_a_teacher_made_in_inference_mode():
    """Where forward makes the gradient; elsewhere PyTorch refuses in the call."""
    compiled = torch.compile(functional.kl_div, fullgraph=True, backend="aot_eager")
    student = torch.randn(4, 20)
    with torch.inference_mode():
        teacher = torch.randn(4, 20)
    loss, grad = both(functional.kl_div, student, teacher)
    compiled_loss, compiled_grad = both(compiled, student, teacher)
    assert torch.equal(compiled_loss, loss)
    assert error(compiled_grad, grad) < FLOOR[torch.float32]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        compiled(student.half().requires_grad_(), teacher)


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


@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_compile_dynamic_shapes_of_tokens(name):
    """Numbers are no tensors of the rows' size in a graph: where N is B times L, inductor fails to make them."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    loss_function = getattr(functional, name)
    compiled = torch.compile(
        lambda s, t: loss_function(s, t, temperature=2.0), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((2, 4, 20), (3, 5, 30)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        loss, grad = both(lambda s, t: loss_function(s, t, temperature=2.0), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert error(compiled_loss, loss) < FLOOR[torch.float32]
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["kl_div", "js_div", "relation_kl"])
def test_compile_with_one_number_that_is_a_tensor(name):
    """Student's and teacher's temperature are one tensor then, which an autograd.Function takes once."""
    loss_function = getattr(functional, name)
    compiled = torch.compile(lambda s, t, T: loss_function(s, t, temperature=T), fullgraph=True, backend="aot_eager")
    student, teacher, temperature = torch.randn(4, 20), torch.randn(4, 20), torch.tensor(2.0)
    loss, grad = both(lambda s, t: loss_function(s, t, temperature=temperature), student, teacher)
    compiled_loss, compiled_grad = both(lambda s, t: compiled(s, t, temperature), student, teacher)
    assert error(compiled_loss, loss) < FLOOR[torch.float32]
    assert error(compiled_grad, grad) < FLOOR[torch.float32]


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("given", ["mask", "normalizer"])
def test_compile_dynamic_shapes_of_what_the_device_divides_by(given, reduction):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss_function(student, teacher, mask, normalizer):
        options = {"mask": mask} if given == "mask" else {"normalizer": normalizer}
        return functional.kl_div(student, teacher, reduction=reduction, **options)

    compiled = torch.compile(loss_function, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((4, 50), (9, 64), (3, 1000), (5, 33)):
        arguments = *torch.randn(2, *shape), torch.arange(shape[0]) % 3 > 0, torch.tensor(3.0)
        loss, grad = both(loss_function, *arguments)
        compiled_loss, compiled_grad = both(compiled, *arguments)
        assert error(compiled_loss, loss) < FLOOR[torch.float32]
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count == 1


def test_compile_with_a_temperature_that_changes():
    """An annealed temperature becomes a symbol, and is compiled no more; what cannot be checked then, the op checks."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss_function(student, teacher, T):
        return functional.kl_div(student, teacher, temperature=T, teacher_temperature=T + 1)

    compiled = torch.compile(loss_function, fullgraph=True, backend=counter)
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    for temperature in (1.0, 2.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 0.5):
        loss, grad = both(loss_function, student, teacher, temperature)
        compiled_loss, compiled_grad = both(compiled, student, teacher, temperature)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count <= 2
    with pytest.raises((RuntimeError, ValueError), match="temperature: a positive finite number wanted"):
        compiled(student, teacher, -1.5)


CHANGING = {
    "weights of kd_loss": lambda s, t, x: functional.kd_loss(s, t, torch.arange(6), hard_weight=x, soft_weight=1 + x),
    "smoothing of kd_loss": lambda s, t, x: functional.kd_loss(s, t, torch.arange(6), label_smoothing=x),
    "dkd_loss": lambda s, t, x: functional.dkd_loss(s, t, torch.arange(6), alpha=x, beta=1 + x, temperature=1 + x),
    "nkd_loss": lambda s, t, x: functional.nkd_loss(s, t, torch.arange(6), gamma=x, temperature=1 + x),
    "js_div": lambda s, t, x: functional.js_div(s, t, beta=x),
    "alpha of alpha_beta_div": lambda s, t, x: functional.alpha_beta_div(s, t, alpha=x),
    "beta of alpha_beta_div": lambda s, t, x: functional.alpha_beta_div(s, t, beta=x),
    "temperature of standardized logits": lambda s, t, x: functional.kl_div(s, t, temperature=x, standardize=True),
    "mu": lambda s, t, x: functional.adaptive_kl_div(s, t, mu=x),
    "beta of relation_kl": lambda s, t, x: functional.relation_kl(s, t, divergence="js_div", beta=x),
    "temperature of relation_kl": lambda s, t, x: functional.relation_kl(
        s, t, temperature=x, teacher_temperature=2 * x
    ),
    "rkd_distance": lambda s, t, x: functional.rkd_distance(s, t, delta=x),
    "rkd_angle": lambda s, t, x: functional.rkd_angle(s, t, delta=x),
    "rkd_loss": lambda s, t, x: functional.rkd_loss(s, t, angle_weight=x, distance_delta=2 * x),
    "pkt": lambda s, t, x: functional.pkt(s, t, eps=x),
    "relational_triplet": lambda s, t, x: functional.relational_triplet(s, t, margin=x),
    "numbers of dist_loss": lambda s, t, x: functional.dist_loss(
        s, t, inter_weight=x, intra_weight=1 + x, temperature=2 * x, eps=x
    ),
    "layer_weights": lambda s, t, x: functional.feature_mse([s, s], [t, t], layer_weights=[x, 1.0]),
    "feature_smooth_l1": lambda s, t, x: functional.feature_smooth_l1(s, t, beta=x),
    "normalizer of features": lambda s, t, x: functional.feature_cosine(s, t, normalizer=x),
    "attention_transfer": lambda s, t, x: functional.attention_transfer(
        s.view(1, -1, 10, 1), t.view(1, -1, 10, 1), p=1 + x
    ),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("backend_name", ["cpu", pytest.param("torch", marks=pytest.mark.long)])
def test_compile_with_a_number_that_changes(name, backend_name):
    with fastkd.backend(backend_name):
        compiles_twice(CHANGING[name], (0.5, 0.25, 0.75, 0.1, 0.9, 0.3, 1.0, 0.2, 0.6, 0.05), backend_name, name)


@pytest.mark.parametrize("name", ["js_div", "feature_smooth_l1"])
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compile_with_a_beta_at_an_end(backend_name, name):
    loss = getattr(functional, name)
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    for beta in (0.0, 1.0):
        torch.compiler.reset()
        with fastkd.backend(backend_name):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            found, expected = (
                both(lambda s, t, f=f, beta=beta: f(s, t, beta=beta), student, teacher) for f in (compiled, loss)
            )
        for out, exact in zip(found, expected, strict=True):
            assert error(out, exact) < 2 * FLOOR[torch.float32]


def compiles_twice(loss_function, values, backend_name, name=""):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_function, fullgraph=True, backend=counter)
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    for x in values:
        loss, grad = both(loss_function, student, teacher, x)
        compiled_loss, compiled_grad = both(compiled, student, teacher, x)
        assert error(compiled_loss, loss) < 4 * FLOOR[torch.float32]
        assert error(compiled_grad, grad) < 4 * FLOOR[torch.float32]
    assert counter.frame_count <= 2
    if name == "normalizer of features":  # which no op is told
        assert compiled(student, teacher, -1.5).isnan()
    elif backend_name == "cpu":
        with pytest.raises((RuntimeError, ValueError), match=r"(\w+): a?.* numbers? .*wanted, got -"):
            compiled(student, teacher, -1.5)


@pytest.mark.parametrize("kind", [int, float], ids=["int", "float"])
def test_compile_with_a_normalizer_that_changes(kind):
    """A graph has its numbers built in: after the first change it is a symbol, and compiled no more."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t, n: functional.kl_div(s, t, normalizer=n), fullgraph=True, backend=counter
    )  # fmt: skip
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    for normalizer in map(kind, (3, 5, 7, 11, 13, 2, 9, 8, 20, 40)):
        loss, grad = both(lambda s, t, n=normalizer: functional.kl_div(s, t, normalizer=n), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher, normalizer)
        assert error(compiled_loss, loss) < FLOOR[torch.float32]
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count <= 2
    with pytest.raises((RuntimeError, ValueError), match="normalizer: a positive finite number wanted"):
        compiled(student, teacher, kind(-1))


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


@pytest.mark.parametrize("module", [fastkd.KDLoss, fastkd.DKDLoss, fastkd.NKDLoss])
def test_export_of_targets(module):
    batch = torch.export.Dim("batch", min=2)
    made = module(temperature=2.0, reduction="none")
    example = torch.randn(4, 50), torch.randn(4, 50), torch.randint(50, (4,))
    program = torch.export.export(made, example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    arguments = torch.randn(7, 50), torch.randn(7, 50), torch.randint(50, (7,))
    assert torch.equal(program.module()(*arguments), made(*arguments))


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


# The relational losses

RELATIONAL = {
    **relation_cases.LOSSES,
    "rkd_distance_plain": functools.partial(functional.rkd_distance, normalize=None, delta=0.6),
    "rkd_angle_clamped": functools.partial(functional.rkd_angle, delta=0.2),
    "rkd_loss_clamped": functools.partial(functional.rkd_loss, distance_weight=2, distance_delta=0.3, angle_delta=0.3),
}


@pytest.mark.parametrize("name", RELATIONAL)
def test_gradcheck_of_relations(backend, name):
    student = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 4, dtype=torch.float64)
    assert gradcheck(backend, lambda s: RELATIONAL[name](s, teacher), student)


@pytest.mark.parametrize(("backend_name", "dtype"), COMPILED, ids=str)
def test_compile_fullgraph_of_relations(dtype, backend_name):
    def training_loss(student, teacher):
        return sum(loss(student * 2, teacher) for loss in RELATIONAL.values())

    arguments = torch.randn(9, 6).to(dtype), torch.randn(9, 4).to(dtype)
    with fastkd.backend(backend_name):
        loss, grad = both(training_loss, *arguments)
        compiled_loss, compiled_grad = both(
            torch.compile(training_loss, fullgraph=True, backend=compiler_of(backend_name)), *arguments
        )
    assert error(compiled_loss, loss) < 8 * FLOOR[torch.float32]
    assert error(compiled_grad, grad) < 4 * FLOOR[dtype]


@pytest.mark.parametrize("name", relation_cases.LOSSES)
def test_compile_dynamic_shapes_of_relations(name):
    loss_function = RELATIONAL[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for N, width in ((4, 5), (9, 6), (40, 17), (5, 33)):
        student, teacher = torch.randn(N, width), torch.randn(N, width + 2)
        loss, grad = both(loss_function, student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
        counts.append(counter.frame_count)  # 2 where dynamo starts anew, having taken a default for a symbol
    assert len(set(counts)) == 1


def test_compile_with_options_that_change():
    """They become symbols; what cannot be checked then, the op checks."""
    compiled = torch.compile(
        lambda s, t, delta, weight: (
            functional.rkd_loss(s, t, distance_delta=delta, angle_weight=weight)
            + functional.rkd_distance(s, t, delta=delta)
            + functional.pkt(s, t, eps=delta)
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    student, teacher = torch.randn(7, 5), torch.randn(7, 4)
    for delta, weight in ((1.0, 2.0), (0.5, 3.0), (0.3, 0.5)):
        expected = functional.rkd_loss(student, teacher, distance_delta=delta, angle_weight=weight)
        expected += functional.rkd_distance(student, teacher, delta=delta)
        expected += functional.pkt(student, teacher, eps=delta)
        assert torch.equal(compiled(student, teacher, delta, weight), expected)
    with pytest.raises((RuntimeError, ValueError), match="delta: a positive finite number wanted"):
        compiled(student, teacher, -0.7, 1.0)
    with pytest.raises((RuntimeError, ValueError), match="weight: a finite number of at least 0 wanted"):
        compiled(student, teacher, 0.9, -1.5)


@pytest.mark.parametrize(
    "module", [fastkd.RKDDistanceLoss, fastkd.RKDAngleLoss, fastkd.RKDLoss, fastkd.SimilarityPreservingLoss]
)
def test_compile_and_export_a_relational_module(module):
    student, teacher = torch.randn(8, 6), torch.randn(8, 4)
    loss, grad = both(module(), student, teacher)
    compiled_loss, compiled_grad = both(torch.compile(module(), fullgraph=True, backend="aot_eager"), student, teacher)
    assert torch.equal(compiled_loss, loss)
    assert error(compiled_grad, grad) < FLOOR[torch.float32]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module(), (student, teacher), dynamic_shapes=({0: batch}, {0: batch}))
    student, teacher = torch.randn(11, 6), torch.randn(11, 4)
    assert torch.equal(program.module()(student, teacher), module()(student, teacher))


@pytest.mark.parametrize("name", relation_cases.LOSSES)
def test_autocast_leaves_relations_alone(backend, name):
    """Embeddings in float32 keep their digits, whatever autocast does to products; those in half precision train."""
    student, teacher = torch.randn(9, 6), torch.randn(9, 4)
    loss, grad = both(RELATIONAL[name], student, teacher)
    leaf = student.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        autocast_loss = RELATIONAL[name](leaf, teacher)
    (autocast_grad,) = torch.autograd.grad(autocast_loss * 0.5, leaf)
    assert error(autocast_loss, loss) < 2 * FLOOR[torch.float32]
    assert error(autocast_grad, grad) < 2 * FLOOR[torch.float32]
    model = torch.nn.Linear(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = RELATIONAL[name](model(torch.randn(9, 8)), teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", relation_cases.LOSSES)
def test_relations_of_meta_and_fake_tensors(name, dtype):
    def step(student, teacher):
        loss = RELATIONAL[name](student.requires_grad_(), teacher)
        return loss, torch.autograd.grad(0.5 * loss, student)[0]

    loss, grad = step(*(torch.empty(4, width, device="meta", dtype=dtype) for width in (6, 3)))
    assert (loss.shape, loss.dtype, loss.device.type) == ((), torch.float32, "meta")
    assert (grad.shape, grad.dtype, grad.device.type) == ((4, 6), dtype, "meta")
    with torch._subclasses.FakeTensorMode():
        loss, grad = step(torch.empty(4, 6, dtype=dtype), torch.empty(4, 3))
        assert (loss.shape, grad.shape, grad.dtype) == ((), (4, 6), dtype)


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compile_with_one_layer_twice(backend_name):
    """Several students learn from one teacher's layer, and one student from several; one mask for all."""

    def loss(a, b, t, u, mask):
        return (
            functional.feature_mse([a, b], [t, t], mask=mask)
            + functional.feature_mse([a, a], [t, u], mask=mask, normalize="l2")
            + functional.feature_cosine([a, a], [t, t])
        )

    a, b = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    constants = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([True, False, True, True])
    with fastkd.backend(backend_name):
        plain = loss(a, b, *constants)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(a, b, *constants)
        assert error(compiled.detach(), plain.detach()) <= FLOOR[torch.float32]
        for x, y in zip(torch.autograd.grad(compiled, (a, b)), torch.autograd.grad(plain, (a, b)), strict=True):
            assert error(x, y) <= FLOOR[torch.float32]


def test_compile_with_one_tensor_for_two_options():
    def loss(s, t, w, mask):
        relations = functional.relation_kl(s, t, student_keys=s, teacher_keys=t, mask=mask, key_mask=mask)
        return functional.kl_div(s, t, weight=w, temperature=w, teacher_temperature=w) + relations

    arguments = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4) + 0.5, torch.tensor([True, False, True, True])
    plain, compiled = both(loss, *arguments), both(torch.compile(loss, fullgraph=True, backend="aot_eager"), *arguments)
    for x, y in zip(compiled, plain, strict=True):
        assert error(x, y) <= 4 * FLOOR[torch.float32]


def feature_losses():
    """Modules and what they are given."""
    maps, teacher_maps = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    layers = [torch.randn(3, 4, 6), maps], [torch.randn(3, 4, 6), teacher_maps]
    yield "mse", fastkd.FeatureMSELoss(), layers
    yield "l2", fastkd.FeatureMSELoss(normalize="l2", layer_weights=[1, 2]), layers
    yield "none", fastkd.FeatureMSELoss(normalize="standardize", reduction="none"), (maps, teacher_maps)
    yield "smooth l1", fastkd.FeatureSmoothL1Loss(beta=0.5, normalize="l2"), layers
    yield "cosine", fastkd.FeatureCosineLoss(), (maps, teacher_maps)
    yield "attention", fastkd.AttentionTransferLoss(), (maps, torch.randn(2, 3, 4, 4))
    yield "projector", fastkd.LinearFeatureMSELoss(6, 8), (torch.randn(3, 4, 6), torch.randn(3, 4, 8))
    yield "maps", fastkd.LinearFeatureMSELoss(5, 8), (maps, torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize(("module", "inputs"), [pytest.param(m, i, id=name) for name, m, i in feature_losses()])
def test_compile_and_export_a_feature_module(module, inputs):
    def step(module):
        students = [x.detach().requires_grad_() for x in (inputs[0] if isinstance(inputs[0], list) else [inputs[0]])]
        loss = module(students if isinstance(inputs[0], list) else students[0], inputs[1])
        return loss, *torch.autograd.grad(loss.sum(), (*students, *module.parameters()))

    torch._dynamo.reset()
    plain, compiled = step(module), step(torch.compile(module, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    program = torch.export.export(module, inputs)
    assert torch.equal(program.module()(*inputs), module(*inputs))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(*inputs), module(*inputs))
    assert repr(again) == repr(module)
