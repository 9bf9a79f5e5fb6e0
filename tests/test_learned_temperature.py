"""A temperature that is learned, as the recipes in docs/ write it; and what is told of tensors that wait for a gradient
in vain."""

import pytest
import torch
from recipes_checks import DTYPES, PRECISION, agree, in_float64, kl_of, logits

import fastkd
from fastkd import functional
from fastkd.functional import kl_div, reverse_kl_div

pytestmark = pytest.mark.usefixtures("computed_by")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_row", [False, True])
def test_a_learned_temperature_on_the_students_side(dtype, per_row):
    student, teacher = logits(6, 50, dtype=dtype)
    T = (1 + torch.rand(6, 1, dtype=dtype) if per_row else torch.tensor(2.0, dtype=dtype)).requires_grad_()
    rows = T.detach().squeeze(-1) if per_row else T.detach()
    weight = rows**2 if per_row else None
    loss = kl_div(student / T, teacher, temperature=1.0, teacher_temperature=rows, weight=weight)

    plain, plain_T = in_float64(student), in_float64(T)
    log_q, log_p = (teacher.double() / plain_T.detach()).log_softmax(-1), (plain / plain_T).log_softmax(-1)
    expected = kl_of(log_q, log_p)
    expected = (expected * weight.double() if per_row else expected).mean()
    got = torch.autograd.grad(loss, T, retain_graph=True)[0]
    wanted = torch.autograd.grad(expected, plain_T, retain_graph=True)[0]
    assert (got.double() - wanted).abs().max() <= PRECISION[dtype] * wanted.abs().max()
    agree(loss, expected, student, plain)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_learned_temperature_on_both_sides(dtype):
    student, teacher = logits(6, 50, dtype=dtype)
    T = torch.tensor(2.0, dtype=dtype, requires_grad=True)
    forward = kl_div(student / T, teacher, teacher_temperature=T.detach())
    through_teacher = reverse_kl_div(teacher / T, student.detach(), teacher_temperature=T.detach())
    loss = T**2 * (forward + through_teacher - through_teacher.detach())

    plain, plain_T = in_float64(student), in_float64(T)
    log_q, log_p = ((x / plain_T).log_softmax(-1) for x in (teacher.double(), plain))
    expected = plain_T**2 * kl_of(log_q, log_p).mean()
    got = torch.autograd.grad(loss, T, retain_graph=True)[0]
    wanted = torch.autograd.grad(expected, plain_T, retain_graph=True)[0]
    assert (got.double() - wanted).abs() <= 10 * PRECISION[dtype] * wanted.abs()  # terms of both signs
    agree(loss, expected, student, plain)


def test_a_divided_student_may_be_overwritten():
    student, teacher = logits(6, 50)
    T = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    gradients = [
        torch.autograd.grad(kl_div(student / T, teacher, teacher_temperature=T.detach(), inplace=inplace), (student, T))
        for inplace in (False, True)
    ]
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted)


def learned(*shape):
    return torch.full(shape, 0.5, requires_grad=True)


# What takes a tensor beside the student: by its name the functions, with what each needs.
CONSTANTS = {
    "temperature": ["kl_div", "js_div", "total_variation", "relation_kl"],
    "teacher_temperature": ["kl_div", "reverse_kl_div", "relation_kl"],
    "beta": ["js_div", "alpha_beta_div", "relation_kl"],
    "student_weight": ["symmetric_kl_div"],
    "alpha": ["skew_kl_div", "skew_reverse_kl_div", "alpha_beta_div"],
    "weight": [
        "kl_div",
        "feature_mse",
        "feature_smooth_l1",
        "feature_cosine",
        "rkd_distance",
        "pkt",
        "gram_mse",
        "relation_kl",
    ],
    "normalizer": ["kl_div", "feature_mse"],
}
CALLS = [(argument, name) for argument, names in CONSTANTS.items() for name in names]


@pytest.mark.parametrize("recorded", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("argument", "name"), CALLS)
def test_what_waits_for_a_gradient_in_vain_is_an_error_while_gradients_are_recorded(argument, name, recorded):
    loss, (student, teacher) = getattr(functional, name), logits(4, 10, dtype=torch.float32)
    value = learned(4) if argument == "weight" else learned()
    options = {"divergence": "js_div"} if (argument, name) == ("beta", "relation_kl") else {}
    for one in (student, student.detach()):
        with pytest.raises(ValueError, match=rf"^{argument}: no gradient flows to it, and it requires one; detach\(\)"):
            loss(one, teacher, **options, **{argument: value})
    expected = loss(student, teacher, **options, **{argument: value.detach()})
    with recorded():
        found = loss(student, teacher, **options, **{argument: value})
    torch.testing.assert_close(found, expected.detach())
    assert value.grad is None


def test_the_error_of_a_temperature_says_how_it_is_learned():
    student, teacher = logits(4, 10)
    told = r"; detach\(\) it\. Where T is learned, pass student / T with temperature=1 and teacher_temperature=T.detach\(\)$"
    T = torch.nn.Parameter(torch.tensor(2.0))
    for loss in (kl_div, fastkd.KLDivLoss()):
        with pytest.raises(ValueError, match=f"^temperature: .*{told}"):
            loss(student, teacher, temperature=T)
        with pytest.raises(ValueError, match=r"^teacher_temperature: .*detach\(\) it$"):
            loss(student, teacher, teacher_temperature=T)
    with pytest.raises(ValueError, match=r"^temperature: .*detach\(\) it$"):  # of embeddings: the student is no logits
        functional.relation_kl(student, teacher, temperature=T)


@pytest.mark.parametrize("module", [fastkd.KLDivLoss, fastkd.JSDivLoss, fastkd.TotalVariationLoss])
def test_a_module_that_is_made_with_a_parameter_says_how_it_is_learned(module):
    T = torch.nn.Parameter(torch.tensor(2.0))
    with pytest.raises(TypeError, match=r"^temperature: a number wanted, got Parameter\. Where T is learned, pass"):
        module(temperature=T)
    loss_function = module()
    loss_function.temperature = T  # later
    with pytest.raises(ValueError, match=r"^temperature: no gradient flows to it, .* Where T is learned, pass"):
        loss_function(*logits(4, 10))


def test_a_learned_temperature_is_refused_in_compiled_code(computed_by):
    student, teacher = logits(4, 10)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"temperature: no gradient flows to it"):
        torch.compile(kl_div, fullgraph=True, backend="eager")(student, teacher, temperature=learned())
