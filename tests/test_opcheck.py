"""Every op as torch.library.opcheck looks at it: its schema, its fake, and how it is traced."""

import pytest
import torch

from fastkd import _backend
from fastkd._calls import DistCall, RowsCall, RowsForward, RowsStatistics, RowsSums
from fastkd._divergences import NON_TARGET, NUMBERS
from fastkd._dtypes import compute_dtype
from fastkd.ops import attention, dist, features, relations, rows, standardize
from fastkd.ops.numbers import as_tensor

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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
        if call.target_loss == 0:
            some = call if call.target is None else call._replace(target=call.target - 6)  # some of them elsewhere
            if call.target is not None:
                some = some._replace(target_numbers=as_tensor(0.3, 0.6, 0.1, 40.0))
            sums = torch.empty(3, 4, 3, dtype=torch.float64)
            yield f"rows_statistics-{name}", ops.statistics, (*some, *RowsStatistics(stats.clone()))
            yield f"rows_sums-{name}", ops.sums, (*some, *RowsSums(stats, sums, torch.empty_like(student)))
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
