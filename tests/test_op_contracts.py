"""Ops that are called past the functions: each still refuses what it would read out of bounds."""

import pytest
import torch

from fastkd import _backend
from fastkd._calls import RowsCall, RowsForward
from fastkd.ops import relations, rows
from fastkd.ops.numbers import as_tensor

S, T = torch.randn(4, 10), torch.randn(4, 10)


def test_the_op_checks_its_own_contract():
    """Called past the functions, an op still refuses what it would read out of bounds."""
    call = RowsCall(S, T, 0, 0.0, None, 1.0, None, 1.0, None, True, None, None, 0.25, None)
    ops, loss = rows.OPS["fastkd"], torch.empty(())
    wrong_calls = {
        "same shape": {"teacher": T[:, :5]},
        "divergence": {"divergence": 77},
        "mask": {"mask": torch.ones(3, dtype=torch.bool)},
        "normalizer": {"scale": -1.0},
        "scale_tensor": {"scale_tensor": torch.ones(())},
        "temperature": {"temperature": -1.0},
        "weight": {"weight": torch.ones(4, dtype=torch.float64)},
        "beta: a number from 0 to 1 wanted, got 1.1": {"divergence": 3, "parameter": 1.1},
        "parameter: a number from 0 to 0 wanted": {"divergence": 0, "parameter": 0.1},
        "beta: a contiguous": {"divergence": 3, "parameter_rows": torch.full((4,), 0.5)},
        "beta: a number from 0 to 1 wanted, got nan": {
            "divergence": 3,
            "parameter_rows": torch.full((4,), torch.nan).double(),
        },
        "temperature: a tensor .* of the right dtype wanted": {"temperature_rows": torch.tensor(1.0).double()},
        "temperature: a positive finite number wanted, got 0": {"temperature_rows": torch.tensor(0.0)},
        "float16, bfloat16": {"student": S.long(), "teacher": T.long()},
    }
    target, numbers = torch.zeros(4, dtype=torch.int64), torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    for match, values in {
        "target: a contiguous": (target[:3], numbers),
        "target: .* of the right dtype": (target.int(), numbers),
        "target: classes from 0 to": (target + 1000, numbers),
        "target_numbers: three numbers": (target, None),
        "target_numbers: three .* in float64": (target, numbers.float()),
        "hard_weight: ": (target, numbers - 1),
        "soft_weight: ": (target, numbers * torch.tensor([1, torch.inf, 1])),
        "label_smoothing: a number from 0 to 1 wanted, got 2": (target, numbers + torch.tensor([0, 0, 2])),
    }.items():
        wrong_calls[match] = {"target": values[0], "target_numbers": values[1]}
    for match, wrong in wrong_calls.items():
        with pytest.raises(RuntimeError, match=match):
            ops.fwd(*call._replace(**wrong), *RowsForward(loss, None, None))
    wrong_outputs = {
        "loss": (torch.empty(3), None, None),
        "grad": (loss, torch.empty(4, 5), None),
        "stats": (loss, None, torch.empty(4, 4, dtype=torch.float64)),
        "parts: of a loss with a target": (loss, None, None, torch.empty(4, 5, dtype=torch.float64)),
    }
    for match, outputs in wrong_outputs.items():
        with pytest.raises(RuntimeError, match=match):
            ops.fwd(*call, *RowsForward(*outputs))
    with pytest.raises(RuntimeError, match="parts: a contiguous float64 tensor"):
        ops.fwd(
            *call._replace(target=target, target_numbers=numbers), *RowsForward(loss, None, None, torch.empty(4, 5))
        )
    stats, grad = torch.empty(4, 7, dtype=torch.float64), torch.empty_like(S)
    for match, rest in {
        "stats": (torch.ones(2), torch.ones(()), grad),
        "upstream": (stats, torch.ones(3), grad),
        "grad": (stats, torch.ones(()), grad.double()),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            ops.bwd(*call, *rest)
    scale = torch.empty((), dtype=torch.float64)
    for match, wrong in {
        "mask": (torch.ones(3, dtype=torch.bool), None, 4, 1, scale),
        "normalizer": (None, torch.ones(2), 4, 1, scale),
        "scale": (None, torch.ones(()), 4, 1, scale.float()),
    }.items():
        with pytest.raises(RuntimeError, match=match):
            ops.inverse_divisor(*wrong)


def relational_ops(backend_name):
    ops = relations.OPS[_backend.namespace(backend_name)]
    yield (
        "pairs_fwd",
        lambda s=S, t=T, relation=0, delta=1.0: ops.pairs_fwd(s, t, None, None, relation, as_tensor(delta), True, True),
    )
    yield (
        "angles_fwd",
        lambda s=S, t=T, delta=1.0, weight=1.0: ops.angles_fwd(s, t, None, as_tensor(weight, delta, weight, 1.0), True),
    )
    yield (
        "angles_fwd",
        lambda s=S, t=T, delta=1.0, weight=1.0: ops.angles_fwd(s, t, None, as_tensor(1.0, 1.0, weight, delta), True),
    )


def test_the_relational_ops_check_their_own_contract():
    """Called past the functions, an op still refuses what it would read out of bounds."""
    for name, op in relational_ops("cpu"):
        op()
        for student, teacher in (
            (S[0], T),
            (S, T[0]),
            (S[None], T),
            (S, T[:3]),
            (S[:3], T),
            (S[:, :0], T),
            (S, T[:, :0]),
        ):
            with pytest.raises(RuntimeError, match=r"student and teacher: .*wanted"):
                op(student, teacher)
        for student, teacher, side in ((S.long(), T, "student"), (S, T.cfloat(), "teacher")):
            with pytest.raises(RuntimeError, match=f"{side}: float16, bfloat16"):
                op(student, teacher)
        for delta in (0.0, -1.0, float("nan"), float("inf")):
            with pytest.raises(RuntimeError, match="delta: a positive finite number wanted"):
                op(delta=delta)
        if name == "pairs_fwd":
            for relation in (-1, 1, 77):
                with pytest.raises(RuntimeError, match="relation: unknown number"):
                    op(relation=relation)
        else:
            for weight in (-1.0, float("nan"), float("inf")):
                with pytest.raises(RuntimeError, match="weight: a finite number of at least 0 wanted"):
                    op(weight=weight)


def test_similarity_fwd_checks_its_own_contract():
    op = torch.ops.fastkd.similarity_fwd
    op(S, T, None, None, True)
    for student, teacher in ((S[0], T), (S, T[0]), (S[None], T), (S, T[:3]), (S[:3], T), (S, T[:1])):
        with pytest.raises(RuntimeError, match=r"student and teacher: .*wanted"):
            op(student, teacher, None, None, True)
    for student, teacher, side in ((S.long(), T, "student"), (S, T.cfloat(), "teacher")):
        with pytest.raises(RuntimeError, match=f"{side}: float16, bfloat16"):
            op(student, teacher, None, None, True)
