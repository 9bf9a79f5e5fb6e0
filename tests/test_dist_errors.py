"""Bad input of dist_loss, its module and its ops."""

import pytest
import torch

import fastkd
from fastkd.functional import dist_loss

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
