"""relation_kl beyond what every relational loss is tested for: keys, heads, masks, divergences."""

import math

import pytest
import relation_cases as cases
import torch
import torch.nn.functional as F
from conftest import gradcheck
from relation_checks import PROMISED, check, run
from tolerances import FLOOR, error

import fastkd
from fastkd import _check, functional
from fastkd.ops import relation_kl

pytestmark = pytest.mark.products


KEYED = {"student_keys": torch.randn(2, 3, 50, 8), "teacher_keys": torch.randn(2, 3, 50, 6)}


def tensors(*shape, dtype=torch.float32):
    return torch.randn(*shape, 8).to(dtype), torch.randn(*shape, 6).to(dtype)


def naive(student, teacher, student_keys=None, teacher_keys=None, normalize=False, divergence="kl_div", beta=0.5,
          temperature=1.0, teacher_temperature=None, mask=None, key_mask=None, weight=None):  # fmt: skip
    """Every row by itself, in float64."""
    exclude = student_keys is None
    student_keys, teacher_keys = (student, teacher) if exclude else (student_keys, teacher_keys)
    x, y, kx, ky = (z.double() for z in (student, teacher, student_keys, teacher_keys))
    if normalize:
        x, y, kx, ky = (F.normalize(z, dim=-1) for z in (x, y, kx, ky))
    scales = [1.0 if normalize else z.shape[-1] ** -0.5 for z in (x, y)]
    rows, keys = x.shape[:-1], kx.shape[:-1]
    mask = torch.ones(rows, dtype=torch.bool) if mask is None else mask.expand(rows)
    key_mask = (mask if exclude else torch.ones(keys, dtype=torch.bool)) if key_mask is None else key_mask.expand(keys)
    weight = torch.ones(rows) if weight is None else weight.expand(rows)
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    T, T_teacher = (torch.as_tensor(t).double().expand(rows) for t in (temperature, teacher_temperature))
    total = 0.0
    for index in torch.cartesian_prod(*(torch.arange(n) for n in rows)).view(-1, len(rows)).tolist():
        at, i = tuple(index), index[-1]
        here = key_mask[at[:-1]].clone()
        if exclude:
            here[i] = False
        if not mask[at] or not here.any():
            continue
        s, t = kx[at[:-1]][here] @ x[at] * scales[0] / T[at], ky[at[:-1]][here] @ y[at] * scales[1] / T_teacher[at]
        loss = getattr(functional, divergence)
        options = {"beta": beta} if divergence == "js_div" else {}
        with fastkd.backend("torch"):
            total = total + weight[at].double() * loss(s[None], t[None], **options)
    return total / max(int(mask.sum()), 1)


def check_naive(student, teacher, promised, **options):
    """Value and all gradients; options may have keys."""
    found = []
    for loss_function in (functional.relation_kl, naive):
        leaves = [student.detach().requires_grad_()]
        given = dict(options)
        if "student_keys" in options:
            leaves.append(options["student_keys"].detach().requires_grad_())
            given["student_keys"] = leaves[1]
        loss = loss_function(leaves[0], teacher, **given)
        found.append((loss.detach(), *torch.autograd.grad(3 * loss, leaves)))
    for ours, right in zip(*found, strict=True):
        assert error(ours, right) <= promised + 4 * FLOOR[ours.dtype] * (ours.dtype not in PROMISED)
    return found[0]


OPTIONS = {
    "plain": {},
    "temperatures": {"temperature": 0.5, "teacher_temperature": 2.0},
    "normalize": {"normalize": True, "temperature": 0.1},
    "reverse": {"divergence": "reverse_kl_div"},
    "js": {"divergence": "js_div", "beta": 0.3, "normalize": True},
    "js_end": {"divergence": "js_div", "beta": 1},
    "cross_entropy": {"divergence": "soft_cross_entropy"},
}


@pytest.mark.parametrize("block", [1, 3000, 2**19])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_heads_and_keys(backend, monkeypatch, name, keys, block):
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(relation_kl.BLOCK, device, block)
    check_naive(*tensors(2, 3, 20), PROMISED[torch.float32], **OPTIONS[name], **(KEYED if keys else {}))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("keys", [False, True])
def test_dtypes(backend, dtype, keys):
    student, teacher = tensors(2, 3, 20, dtype=dtype)
    options = {name: x.to(dtype) for name, x in KEYED.items()} if keys else {}
    loss, grad, *_ = check_naive(student, teacher, PROMISED[torch.promote_types(dtype, torch.float32)], **options)
    assert grad.dtype == dtype
    assert loss.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("block", [1, 900, 2**19])
def test_masks_weights_and_temperatures_of_rows(backend, monkeypatch, block):
    """Padded samples hold anything; masks broadcast over heads."""
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(relation_kl.BLOCK, device, block)
    generator = torch.Generator().manual_seed(0)
    student, teacher = tensors(2, 3, 20)
    mask = torch.rand(2, 1, 20, generator=generator) < 0.7
    options = {
        "mask": mask,
        "weight": torch.rand(2, 1, 20, generator=generator),
        "temperature": 0.5 + torch.rand(3, 20, generator=generator),
        "teacher_temperature": 0.5 + torch.rand(20, generator=generator),
    }
    right = check_naive(student, teacher, PROMISED[torch.float32], **options)
    hidden = student.masked_fill(~mask[..., None], torch.nan), teacher.masked_fill(~mask[..., None], torch.inf)
    loss, grad = run(functional.relation_kl, *hidden, 3.0, **options)
    assert torch.equal(loss, right[0])
    assert torch.equal(grad, right[1])
    assert not grad[~mask.expand(2, 3, 20)].any()


def test_padded_keys(backend):
    student, teacher = tensors(2, 3, 20)
    key_mask = torch.rand(2, 1, 50, generator=torch.Generator().manual_seed(0)) < 0.6
    _, _, keys_grad = check_naive(student, teacher, PROMISED[torch.float32], **KEYED, key_mask=key_mask)
    assert not keys_grad[~key_mask.expand(2, 3, 50)].any()
    hidden = {name: x.masked_fill(~key_mask[..., None], torch.nan) for name, x in KEYED.items()}
    loss, grad = run(functional.relation_kl, student, teacher, **hidden, key_mask=key_mask)
    expected = run(functional.relation_kl, student, teacher, **KEYED, key_mask=key_mask)
    assert torch.equal(loss, expected[0])
    assert torch.equal(grad, expected[1])
    check_naive(student, teacher, PROMISED[torch.float32], key_mask=torch.arange(20) % 3 > 0)  # of the rows themselves


def test_masked_rows_are_not_there(backend):
    """As if the batch had the others alone."""
    student, teacher = tensors(30)
    mask = torch.arange(30) % 4 > 0
    for options in ({}, {"normalize": True}):
        loss, grad = run(functional.relation_kl, student, teacher, mask=mask, **options)
        alone, alone_grad = run(functional.relation_kl, student[mask], teacher[mask], **options)
        assert error(loss, alone) <= 1e-6
        assert error(grad[mask], alone_grad) <= PROMISED[torch.float32]


@pytest.mark.parametrize("normalize", [False, True])
def test_with_itself(backend, normalize):
    """Keys that are the rows: MiniLM's relations, whose gradient comes from both sides; stacked, or by themselves."""
    student, teacher = tensors(2, 3, 20)
    keys = student.double().requires_grad_()
    right = naive(keys, teacher.double(), keys, teacher.double(), normalize)
    right.backward()
    for other in (teacher, teacher.clone()):
        x = student.detach().requires_grad_()
        loss = functional.relation_kl(x, teacher, student_keys=x, teacher_keys=other, normalize=normalize)
        loss.backward()
        assert error(loss, right) <= PROMISED[torch.float32]
        assert error(x.grad, keys.grad) <= PROMISED[torch.float32]
    stacked = [torch.stack([z, z.flip(0)]) for z in (student, teacher)]
    loss = functional.relation_kl(*stacked, student_keys=stacked[0], teacher_keys=stacked[1], normalize=normalize)
    assert error(loss, right) <= PROMISED[torch.float32]


def test_keys_alone_may_want_a_gradient(backend):
    student, teacher = tensors(2, 3, 20)
    wanted = {**KEYED, "student_keys": KEYED["student_keys"].clone().requires_grad_()}
    functional.relation_kl(student, teacher, **wanted).backward()
    *_, right = check_naive(student, teacher, PROMISED[torch.float32], **KEYED)
    assert error(3 * wanted["student_keys"].grad, right) <= PROMISED[torch.float32]


@pytest.mark.parametrize("block", [1, 900, 2**19])
@pytest.mark.parametrize(
    ("name", "case", "dtype"), [x for x in cases.each(cases.CASES) if x[0] == "relation_kl"], ids=str
)
def test_strips(monkeypatch, name, case, dtype, block):
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(relation_kl.BLOCK, device, block)
    check("cpu", name, case, dtype)


def test_nothing_to_be_compared_with(backend):
    for student in (torch.randn(1, 4), torch.randn(0, 4), torch.randn(2, 0, 4), torch.randn(3, 1, 4)):
        loss, grad = run(functional.relation_kl, student, torch.randn(*student.shape[:-1], 5))
        assert loss == 0
        assert grad.shape == student.shape
        assert not grad.any()
    student, teacher = tensors(4)
    loss, grad = run(functional.relation_kl, student / 0, teacher, mask=torch.zeros(4, dtype=torch.bool))
    assert loss == 0
    assert not grad.any()
    loss, grad = run(functional.relation_kl, student, teacher, mask=torch.arange(4) == 2)
    assert loss == 0
    assert not grad.any()
    none = {"student_keys": torch.randn(0, 8), "teacher_keys": torch.randn(0, 6)}
    loss, grad = run(functional.relation_kl, student, teacher, **none)
    assert loss == 0
    assert not grad.any()


def test_value_by_hand(backend):
    """Two keys, logits 0 and log 3 against equal ones: log 2 - (log 1 + log 3) / 2 + log 4 - log 2 of a row."""
    keys = {"student_keys": torch.tensor([[0.0], [1]]), "teacher_keys": torch.zeros(2, 1)}
    loss = functional.relation_kl(torch.tensor([[math.log(3)]]), torch.ones(1, 1), **keys)
    assert loss.item() == pytest.approx(math.log(4 / 2) - math.log(3) / 2, rel=1e-6)


@pytest.mark.parametrize("keys", [False, True])
def test_gradcheck(backend, keys):
    student, teacher = (x.double() for x in tensors(2, 5))
    options = {name: x[0, :2, :7].double() for name, x in KEYED.items()} if keys else {}
    if keys:
        options["student_keys"].requires_grad_()
    for normalize in (False, True):

        def loss(s, n=normalize, options=options):
            return functional.relation_kl(s, teacher, normalize=n, mask=torch.arange(5) < 4, **options)

        assert gradcheck(backend, loss, student.requires_grad_())
        if keys:
            assert gradcheck(backend,
                lambda k, n=normalize: functional.relation_kl(student, teacher, normalize=n, student_keys=k,
                                                              teacher_keys=options["teacher_keys"]),
                options["student_keys"],
            )  # fmt: skip


def test_compiled():
    """Also where the keys are the rows, and where masks and temperatures are tensors."""
    student, teacher = tensors(2, 3, 20)
    options = {"mask": torch.rand(2, 1, 20) < 0.7, "temperature": torch.rand(20) + 0.5}
    for given in (options, KEYED, {"with_itself": True}):

        def loss(s, t, given=given):
            keys = {"student_keys": s, "teacher_keys": t} if "with_itself" in given else given
            return functional.relation_kl(s, t, **keys)

        expected = run(loss, student, teacher)
        found = run(torch.compile(loss, fullgraph=True, backend="aot_eager"), student, teacher)
        assert error(found[0], expected[0]) <= 1e-6
        assert error(found[1], expected[1]) <= 1e-6


S, T = torch.randn(4, 10), torch.randn(4, 6)
K, KT = torch.randn(7, 10), torch.randn(7, 6)
BAD = {
    "vector": ((S[0], T), {}, ValueError, r"student: embeddings of shape \[\*, N, D\] wanted, got \[10\]"),
    "features": ((S, T[:, :0]), {}, ValueError, r"teacher: embeddings of shape \[\*, N, D\] wanted"),
    "rows": ((S, T[:3]), {}, ValueError, r"teacher: the student's rows \[4\] wanted, got \[3\]"),
    "dtype": ((S.long(), T), {}, TypeError, "student: float16, .* embeddings wanted"),
    "nan": ((S, T / 0), {}, ValueError, "teacher: finite embeddings wanted"),
    "nan_keys": ((S, T), {"student_keys": K / 0, "teacher_keys": KT}, ValueError, "student_keys: finite"),
    "one_side": ((S, T), {"student_keys": K}, ValueError, "teacher_keys: wanted beside student_keys"),
    "other_side": ((S, T), {"teacher_keys": KT}, ValueError, "student_keys: wanted beside teacher_keys"),
    "width": ((S, T), {"student_keys": KT, "teacher_keys": KT}, ValueError, r"student_keys: shape \[M, 10\] wanted"),
    "teacher_width": ((S, T), {"student_keys": K, "teacher_keys": K}, ValueError, r"teacher_keys: shape \[M, 6\] wanted"),
    "heads": ((S, T), {"student_keys": K[None], "teacher_keys": KT}, ValueError, r"student_keys: shape \[M, 10\] wanted"),
    "as_many": ((S, T), {"student_keys": K, "teacher_keys": KT[:5]}, ValueError, "teacher_keys: 7 wanted, as many"),
    "keys_dtype": ((S, T), {"student_keys": K, "teacher_keys": KT.int()}, TypeError, "teacher_keys: float16, .* keys"),
    "keys_list": ((S, T), {"student_keys": [1], "teacher_keys": KT}, TypeError, "student_keys: a torch.Tensor wanted"),
    "mask_shape": ((S, T), {"mask": torch.ones(3, dtype=torch.bool)}, ValueError, r"mask: a shape that broadcasts to \[4\]"),
    "mask_dtype": ((S, T), {"mask": torch.ones(4)}, TypeError, "mask: torch.bool wanted"),
    "key_mask_shape": ((S, T), {"student_keys": K, "teacher_keys": KT, "key_mask": torch.ones(4, dtype=torch.bool)}, ValueError, r"key_mask: .* \[7\]"),
    "weight_shape": ((S, T), {"weight": torch.ones(2, 4)}, ValueError, r"weight: a shape that broadcasts to \[4\]"),
    "weight_dtype": ((S, T), {"weight": torch.ones(4).int()}, TypeError, "weight: a floating dtype wanted"),
    "temperature": ((S, T), {"temperature": 0}, ValueError, "temperature: a positive finite number wanted, got 0"),
    "negative": ((S, T), {"teacher_temperature": -1.0}, ValueError, "teacher_temperature: a positive finite number"),
    "temperatures": ((S, T), {"temperature": torch.zeros(4)}, ValueError, "temperature: positive finite values"),
    "divergence": ((S, T), {"divergence": "kl"}, ValueError, "divergence: one of kl_div, .* wanted, got 'kl'"),
    "beta": ((S, T), {"beta": 2}, ValueError, "beta: a number from 0 to 1 wanted, got 2"),
    "normalize": ((S, T), {"normalize": 1}, TypeError, "normalize: True or False wanted"),
}  # fmt: skip
OF_FORWARD = ("student_keys", "teacher_keys", "mask", "key_mask", "weight")


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_bad_input(backend_name, name):
    given, options, kind, message = BAD[name]
    with fastkd.backend(backend_name), pytest.raises(kind, match=f"^{message}"):
        functional.relation_kl(*given, **options)
    if name == "temperatures":  # a module's is a number
        return
    forward = {k: v for k, v in options.items() if k in OF_FORWARD}
    with fastkd.backend(backend_name), pytest.raises(kind, match=f"^{message}"):
        fastkd.RelationKLLoss(**{k: v for k, v in options.items() if k not in OF_FORWARD})(*given, **forward)


def test_module_takes_keys_and_masks():
    student, teacher = tensors(2, 3, 20)
    options = {**KEYED, "mask": torch.rand(20) < 0.7, "key_mask": torch.rand(50) < 0.7, "weight": torch.rand(20)}
    module = fastkd.RelationKLLoss(temperature=0.5)
    assert torch.equal(
        module(student, teacher, **options), functional.relation_kl(student, teacher, temperature=0.5, **options)
    )


@pytest.mark.parametrize("side", ["student_keys", "teacher_keys"])
def test_nan_keys_propagate(backend, monkeypatch, side):
    monkeypatch.setattr(_check.arguments, "values_known", lambda _: False)
    student, teacher = tensors(2, 3, 20)
    keys = {name: x.clone() for name, x in KEYED.items()}
    keys[side][1, 2, 4, 0] = torch.nan
    loss, grad = run(functional.relation_kl, student, teacher, **keys)
    assert loss.isnan()
    assert grad[1, 2].isnan().all()


def test_the_op_checks_its_own_contract():
    rest = (None, None, True, False, "fastkd", 0, 0.0, None, 1.0, None, 1.0, None)
    for student, teacher, mask in ((S[None], T[None, :3], None), (S, T, None), (S[None], T[None], torch.ones(4) > 0)):
        with pytest.raises(RuntimeError, match="student, teacher, their keys, mask, weight and key_mask: shapes"):
            torch.ops.fastkd.relation_kl_fwd(student, teacher, *rest, mask, None, None, True, False)


@pytest.mark.parametrize(("beta", "same"), [(0.0, "kl_div"), (1.0, "reverse_kl_div")])
def test_betas_that_are_all_at_one_end(backend, beta, same):
    student, teacher = tensors(12)
    loss, grad = run(functional.relation_kl, student, teacher, divergence="js_div", beta=torch.full((12,), beta))
    expected, expected_grad = run(functional.relation_kl, student, teacher, divergence=same)
    assert error(loss, expected) <= PROMISED[torch.float32]
    assert error(grad, expected_grad) <= PROMISED[torch.float32]


@pytest.mark.parametrize("detached", [False, True])
def test_rows_as_their_own_keys_are_masked_as_rows_are(backend, detached):
    """Also where the teacher's keys are its rows under another name."""
    student, teacher = tensors(30)
    mask = torch.arange(30) % 4 > 0
    hidden, hidden_teacher = (x.masked_fill(~mask[:, None], torch.nan) for x in (student, teacher))
    keys = {"student_keys": hidden, "teacher_keys": hidden_teacher.detach() if detached else hidden_teacher}
    loss = functional.relation_kl(hidden, hidden_teacher, mask=mask, **keys)
    expected = functional.relation_kl(
        student[mask], teacher[mask], student_keys=student[mask], teacher_keys=teacher[mask]
    )  # fmt: skip
    assert error(loss, expected) <= 1e-5


@pytest.mark.parametrize("name", ["temperature", "beta"])
def test_numbers_of_rows_are_not_looked_at_where_tensors_are_fake(name):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        options = {name: torch.ones(8), "divergence": "js_div"}
        loss = functional.relation_kl(torch.randn(8, 6), torch.randn(8, 4), **options)
    assert loss.shape == ()
