"""relation_kl on the CPU where rows are their own keys: both orders of a pair from one product."""

import pytest
import torch
from conftest import cpu_levels
from relation_checks import PROMISED, rounding, run
from tolerances import error

import fastkd
from fastkd import functional
from fastkd.ops import relation_kl

pytestmark = pytest.mark.products


@pytest.fixture
def pairs_taken(monkeypatch):
    """Counts the samples that are computed so."""
    taken = []
    original = relation_kl._Strips._of_pairs

    def counted(self, *arguments):
        taken.append(1)
        return original(self, *arguments)

    monkeypatch.setattr(relation_kl._Strips, "_of_pairs", counted)
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(relation_kl.BLOCK, device, 700)
    return taken


@pytest.mark.parametrize("backend", cpu_levels(), indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"itself": True}, {"normalize": True, "temperature": 0.07},
                                     {"temperature": 0.9, "teacher_temperature": 3.0}, {"masked": True}], ids=str)  # fmt: skip
def test_both_orders_of_a_pair(backend, pairs_taken, options, dtype):
    generator = torch.Generator().manual_seed(5)
    student, teacher = (torch.randn(90, width, generator=generator).to(dtype) for width in (6, 9))
    options = dict(options)
    if options.pop("masked", False):
        mask = torch.rand(90, generator=generator) < 0.7
        options |= {"mask": mask, "weight": torch.rand(90, generator=generator)}
    itself = options.pop("itself", False)

    def loss_of(x, y):
        keys = {"student_keys": x, "teacher_keys": y} if itself else {}
        return functional.relation_kl(x, y, **keys, **options)

    loss, grad = run(loss_of, student, teacher)
    assert len(pairs_taken) == 1
    with fastkd.backend("torch"):
        expected, expected_grad = run(loss_of, student.double(), teacher.double())
    compute = torch.promote_types(dtype, torch.float32)
    assert error(loss, expected) <= PROMISED[compute]
    assert error(grad, expected_grad) <= PROMISED[compute] + rounding(grad, expected_grad, compute)


@pytest.mark.parametrize("backend", cpu_levels(), indirect=True)
def test_both_orders_near_convergence(backend, pairs_taken):
    generator = torch.Generator().manual_seed(6)
    teacher = torch.randn(90, 16, generator=generator)
    student = teacher + 1e-4 * torch.randn(90, 16, generator=generator)
    loss, grad = run(functional.relation_kl, student, teacher)
    assert len(pairs_taken) == 1
    with fastkd.backend("torch"):
        expected, expected_grad = run(functional.relation_kl, student.double(), teacher.double())
    assert expected < 1e-7
    assert error(loss, expected) <= 1e-3
    # A logit is a sum of 16 products about as large as itself: rounded, it is off by 4 * 2^-24. So is the teacher's,
    # and they differ by 1.4e-4. Twice that share.
    assert error(grad, expected_grad) <= 2 * 4 * 2**-24 * 2**0.5 / 1.4e-4


@pytest.mark.parametrize(
    ("factor", "options"),
    [(20.0, {}), (1.0, {"temperature": 0.05}), (1.0, {"divergence": "reverse_kl_div"}),
     (1.0, {"temperature": torch.ones(90).index_fill(0, torch.tensor(7), 2.0)}), (1.0, {"key_mask": torch.ones(90, dtype=torch.bool)})],
    ids=str,
)  # fmt: skip
def test_whole_rows_where_both_orders_would_not_do(pairs_taken, factor, options):
    """Exponentials out of range, other divergences, temperatures of rows, other keys."""
    generator = torch.Generator().manual_seed(7)
    student, teacher = (factor * torch.randn(90, width, generator=generator) for width in (6, 9))
    loss, grad = run(functional.relation_kl, student, teacher, **options)
    assert not pairs_taken
    with fastkd.backend("torch"):
        expected, expected_grad = run(functional.relation_kl, student.double(), teacher.double(), **options)
    assert error(loss, expected) <= PROMISED[torch.float32]
    assert error(grad, expected_grad) <= PROMISED[torch.float32]


def test_a_nan_is_not_lost_in_pairs(pairs_taken, monkeypatch):
    monkeypatch.setattr("fastkd._check.arguments.values_known", lambda _: False)
    student = torch.randn(90, 6)
    student[80, 2] = torch.nan
    loss, _ = run(functional.relation_kl, student, torch.randn(90, 4))
    assert loss.isnan()


def test_the_strips_ops_check_their_own_contract():
    here, row = torch.ones(9), torch.rand(9)
    right = [torch.randn(3, 7), torch.randn(3, 7), here, 1.0, 0.5, 2]
    sums = torch.zeros(9, 2, dtype=torch.float64)
    torch.ops.fastkd.relation_kl_sums(*right, sums)
    assert (sums[2:] > 0).all()
    assert not sums[:2].any()
    torch.ops.fastkd.relation_kl_weights_(*(x.clone() if isinstance(x, torch.Tensor) else x for x in right), *[row] * 5)
    for at, wrong in ((0, torch.randn(3, 7).half()), (1, torch.randn(7, 3).T), (1, torch.randn(2, 7)), (2, here[:8]),
                      (3, 0.0), (4, float("inf")), (5, 3), (5, -1)):  # fmt: skip
        arguments = [*right[:at], wrong, *right[at + 1 :]]
        with pytest.raises(RuntimeError, match="wanted"):
            torch.ops.fastkd.relation_kl_sums(*arguments, sums)
        with pytest.raises(RuntimeError, match="wanted"):
            torch.ops.fastkd.relation_kl_weights_(*arguments, *[row] * 5)
    with pytest.raises(RuntimeError, match="sums: float64"):
        torch.ops.fastkd.relation_kl_sums(*right, sums.float())
    with pytest.raises(RuntimeError, match="one per sample wanted"):
        torch.ops.fastkd.relation_kl_weights_(*right, *[row] * 4, row[:8])
