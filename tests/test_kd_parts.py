"""kd_loss with return_parts: what is told of a loss besides itself."""

import pytest
import torch
import torch.nn.functional as F
from test_targets import targets
from tolerances import FLOOR, error
from truth import truth

import fastkd
from fastkd import functional
from fastkd._divergences import BY_NAME
from fastkd.functional import KDParts, kd_loss

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPTIONS = {"hard_weight": 0.3, "soft_weight": 0.6, "temperature": 2.0}


def logits(*shape, dtype=torch.float32, scale=2.0):
    generator = torch.Generator().manual_seed(sum(shape))
    return tuple((scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype) for _ in range(2))


def entropy_of(logits, temperature, coins=False):
    x = logits.double() / temperature
    if coins:
        p = torch.stack([x.sigmoid(), (-x).sigmoid()], -1)
        return torch.special.entr(p).sum((-1, -2))
    return torch.special.entr(x.softmax(-1)).sum(-1)


def right(student, teacher, target, *, divergence="kl_div", mask=None, dim=-1, **options):
    """hard, soft, student_entropy, teacher_entropy, agreement."""
    s, t = (x.movedim(dim, -1) for x in (student, teacher))
    T, smoothing = options.get("temperature", 1.0), options.get("label_smoothing", 0.0)
    teacher_T = options.get("teacher_temperature", T)
    counts = target != -100
    counts = counts if mask is None else counts & mask
    s, t, classes = s[counts], t[counts], target[counts]
    hard = F.cross_entropy(s.double(), classes, reduction="none", label_smoothing=smoothing)
    compared = (s, t)
    if options.get("standardize"):
        compared = [(x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-7) for x in (s.double(), t.double())]
    keep = ("t_squared", "standardize", "alpha", "beta", "mu", "student_weight")
    soft_options = {name: options[name] for name in keep if name in options}
    soft = truth(divergence, s, t, temperature=T, teacher_temperature=teacher_T, reduction="none", **soft_options)[0]
    coins = divergence == "bernoulli_kl_div"
    entropies = [entropy_of(x, of, coins) for x, of in zip(compared, (T, teacher_T), strict=True)]
    agree = (s.double().argmax(-1) == t.double().argmax(-1)).double()
    return [x.double().mean() if len(x) else torch.tensor(0.0) for x in (hard, soft, *entropies, agree)]


def check(student, teacher, target, tolerance=4.0, **options):
    """Parts against float64; loss and gradient are those that there are without them."""
    x = student.detach().requires_grad_()
    found = kd_loss(x, teacher, target, return_parts=True, **options)
    grad = torch.autograd.grad(found.loss.sum(), x)[0]
    y = student.detach().requires_grad_()
    loss = kd_loss(y, teacher, target, **options)
    assert torch.equal(found.loss, loss)
    assert torch.equal(grad, torch.autograd.grad(loss.sum(), y)[0])
    reduction = options.pop("reduction", "batchmean")
    assert found.loss.shape == (target.shape if reduction == "none" else ())
    weights = ("hard_weight", "soft_weight", "weight", "normalizer")
    wanted = right(student, teacher, target, **{name: x for name, x in options.items() if name not in weights})
    for name, value, ref in zip(KDParts._fields[1:], found[1:], wanted, strict=True):
        assert (value.shape, value.dtype, value.requires_grad) == ((), loss.dtype, False), name
        assert error(value, ref) <= tolerance * FLOOR[loss.dtype], (name, value, ref)
    return found


SHAPES = {
    "lanes": (70, 10),
    "two_classes": (5, 2),
    "one_class": (5, 1),
    "rows": (6, 700),
    "sequence": (3, 5, 333),
    "long_rows": (2, 9001),
    "vector": (40,),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_the_parts_are_right(backend, shape, dtype, reduction):
    student, teacher = logits(*shape, dtype=dtype)
    if len(shape) > 1:
        student.view(-1, shape[-1])[0], teacher.view(-1, shape[-1])[0] = 0.5, 0.25  # of equal classes the first
    # entropies of two classes that are nearly sure have a logarithm of nearly 1
    check(student, teacher, targets(student), tolerance=16, reduction=reduction, **OPTIONS)


@pytest.mark.parametrize("divergence", BY_NAME)
def test_of_any_divergence(backend, divergence):
    for shape in ((40, 12), (4, 600)):
        student, teacher = logits(*shape)
        check(student, teacher, targets(student), tolerance=40, divergence=divergence, **OPTIONS)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.2},
        {"standardize": True},
        {"standardize": True, "reduction": "none", "label_smoothing": 0.1},
        {"teacher_temperature": 0.5, "t_squared": False},
        {"hard_weight": 0.0},
        {"soft_weight": 0.0},
        {"soft_weight": 0.0, "standardize": True},
        {"hard_weight": 0.0, "soft_weight": 0.0},
        {"weight": torch.tensor([0.0, 2.0, 1.0, 0.5])[:, None]},
        {"reduction": "sum"},
        {"normalizer": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("V", [9, 1030])
def test_options(backend, options, V):
    """The parts are before all weights, and means whatever the reduction is."""
    student, teacher = logits(4, 5, V)
    check(student, teacher, targets(student), tolerance=16, **OPTIONS | options)


@pytest.mark.parametrize("scale", [9.0, 30.0])
@pytest.mark.parametrize("V", [8, 300])
def test_entropies_of_coins_that_are_nearly_sure(backend, scale, V):
    student, teacher = logits(6, V)
    student, teacher = scale * student.sign() - student, scale * teacher.sign() + teacher
    check(student, teacher, targets(student), tolerance=40, divergence="bernoulli_kl_div")


@pytest.mark.parametrize("divergence", ["kl_div", "bernoulli_kl_div"])
def test_of_equal_classes_the_first_is_the_best(backend, divergence):
    """Also of those that lie far apart, which kernels look at one after the other."""
    student, teacher = logits(3, 2600)
    teacher[:, 5] = 20.0
    for first, agreement in ((20.0, 1.0), (0.0, 0.0)):
        student[:, 5], student[:, [1500, 2500]] = first, 20.0
        found = kd_loss(student, teacher, torch.arange(3), divergence=divergence, return_parts=True)
        assert found.agreement == agreement


def test_rows_that_threads_share(threads):
    student, teacher = logits(3, 40000)
    found = []
    for count in (1, 2, 3):
        threads(count)
        found.append(check(student, teacher, targets(student), tolerance=16, **OPTIONS))
    for parts in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(parts, found[0], strict=True))


def test_masked_rows_and_maps(backend):
    student, teacher = logits(2, 7, 5, 6)
    target = targets(student.movedim(1, -1))
    mask = torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    check(student, teacher, target, dim=1, mask=mask, tolerance=16, **OPTIONS)
    bad = student.clone()
    bad.movedim(1, -1)[~mask] = torch.nan
    found, same = (kd_loss(x, teacher, target, dim=1, mask=mask, return_parts=True) for x in (student, bad))
    assert all(torch.equal(a, b) for a, b in zip(found, same, strict=True))


@pytest.mark.parametrize("V", [6, 700])
def test_per_row_temperatures(backend, V):
    student, teacher = logits(12, V)
    target, T = targets(student), torch.linspace(0.5, 4.0, 12)
    found = kd_loss(student, teacher, target, temperature=T, return_parts=True)
    rows = [kd_loss(student[i], teacher[i], target[i], temperature=T[i].item(), return_parts=True) for i in range(12)]
    counts = (target != -100).double()
    for name in KDParts._fields[1:]:
        ref = (torch.stack([getattr(x, name) for x in rows]).double() * counts).sum() / counts.sum()
        assert error(getattr(found, name), ref) <= 8 * FLOOR[torch.float32], name


@pytest.mark.parametrize("V", [4, 300])
def test_where_no_row_counts_all_is_0(backend, V):
    student, teacher = logits(3, V)
    student[1] = torch.nan
    for found in (
        kd_loss(student.requires_grad_(), teacher, torch.full((3,), -100), return_parts=True),
        kd_loss(student[:0], teacher[:0], torch.zeros(0, dtype=torch.long), return_parts=True),
    ):
        assert all(x == 0 for x in found)


@pytest.mark.parametrize("V", [4, 300])
def test_impossible_classes(backend, V):
    """A class without probability has no entropy; a row of such classes has none, and its best class is the first."""
    student, teacher = logits(3, V)
    student[0, 1:], teacher[0, 1:] = -torch.inf, -torch.inf
    student[1, 2], student[2], teacher[2] = -torch.inf, -torch.inf, -torch.inf
    target = torch.zeros(3, dtype=torch.long)
    found = kd_loss(student, teacher, target, return_parts=True)
    assert found.hard == torch.inf
    alone = kd_loss(student[:1], teacher[:1], target[:1], return_parts=True)
    assert alone == (0, 0, 0, 0, 0, 1)
    nothing = kd_loss(student[2:], teacher[2:], target[:1], return_parts=True)
    assert nothing[1:] == (torch.inf, 0, 0, 0, 1)
    assert found.teacher_entropy > 0


def test_nan_is_not_hidden(backend):
    for V in (5, 400):
        student, teacher = logits(4, V)
        student[1, 2] = torch.nan
        found = kd_loss(student, teacher, torch.zeros(4, dtype=torch.long), return_parts=True)
        for value in (found.loss, found.hard, found.soft, found.student_entropy):
            assert value.isnan()
        assert not found.teacher_entropy.isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("standardize", [False, True])
def test_before_the_gradient_is_written_over_the_student(backend, dtype, standardize):
    student, teacher = logits(9, 200, dtype=dtype)
    target, options = targets(student), OPTIONS | {"standardize": standardize}
    expected = kd_loss(student, teacher, target, return_parts=True, **options)
    leaf = student.clone().requires_grad_()
    found = kd_loss(leaf * 1, teacher, target, inplace=True, return_parts=True, **options)
    found.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    own = student.clone().requires_grad_()
    kd_loss(own, teacher, target, **options).backward()
    assert torch.equal(leaf.grad, own.grad)


def test_the_module(backend):
    student, teacher = logits(6, 20)
    target = targets(student)
    found = fastkd.KDLoss(return_parts=True, **OPTIONS)(student, teacher, target)
    assert isinstance(found, functional.KDParts)
    assert found == kd_loss(student, teacher, target, return_parts=True, **OPTIONS)
    assert found._fields == ("loss", "hard", "soft", "student_entropy", "teacher_entropy", "agreement")
    for bad in (1, None, "yes"):
        with pytest.raises(TypeError, match=r"^return_parts: .*wanted"):
            fastkd.KDLoss(return_parts=bad)
        with pytest.raises(TypeError, match=r"^return_parts: .*wanted"):
            kd_loss(student, teacher, target, return_parts=bad)


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compiled(backend_name):
    def step(student, teacher, target):
        return kd_loss(student, teacher, target, return_parts=True, **OPTIONS)

    with fastkd.backend(backend_name):
        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
        for N in (9, 7):
            student, teacher = logits(N, 30)
            target = targets(student)
            x, y = student.clone().requires_grad_(), student.clone().requires_grad_()
            found, expected = compiled(x, teacher, target), step(y, teacher, target)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b)
            grads = [torch.autograd.grad(f.loss, z)[0] for f, z in ((found, x), (expected, y))]
            torch.testing.assert_close(*grads)
