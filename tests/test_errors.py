"""Bad input: its own clear error, naming the argument, and nothing changed."""

import functools

import pytest
import torch

import fastkd
from fastkd import functional
from fastkd._divergences import BY_NAME

S, T = torch.randn(4, 10), torch.randn(4, 10)


def sparse():
    return T.to_sparse()


BAD = {
    "student_is_no_tensor": ([1.0, 2.0], T, {}, TypeError, "student"),
    "teacher_is_no_tensor": (S, None, {}, TypeError, "teacher"),
    "shapes_differ": (S, T[:, :9], {}, ValueError, "teacher"),
    "shapes_would_broadcast": (S, T[:1], {}, ValueError, "teacher"),
    "dimensions_differ": (S, T[0], {}, ValueError, "teacher"),
    "no_dimensions": (torch.tensor(1.0), torch.tensor(1.0), {}, ValueError, "student"),
    "no_classes": (S[:, :0], T[:, :0], {}, ValueError, "student"),
    "integer_student": (S.long(), T, {}, TypeError, "student"),
    "integer_teacher": (S, T.int(), {}, TypeError, "teacher"),
    "bool_student": (S > 0, T, {}, TypeError, "student"),
    "complex_teacher": (S, T.cfloat(), {}, TypeError, "teacher"),
    "float8_student": (S.to(torch.float8_e4m3fn), T, {}, TypeError, "student"),
    "sparse_teacher": (S, T.to_sparse(), {}, TypeError, "teacher"),
    "sparse_student": (S.to_sparse_csr(), T, {}, TypeError, "student"),
    "nested_student": (torch.nested.nested_tensor([S[0], S[1]]), T[:2], {}, TypeError, "student"),
    "devices_differ": (S, T.to("meta"), {}, ValueError, "teacher"),
    "temperature_zero": (S, T, {"temperature": 0.0}, ValueError, "temperature"),
    "temperature_negative": (S, T, {"temperature": -1}, ValueError, "temperature"),
    "temperature_nan": (S, T, {"temperature": float("nan")}, ValueError, "temperature"),
    "temperature_inf": (S, T, {"temperature": float("inf")}, ValueError, "temperature"),
    "temperature_text": (S, T, {"temperature": "2"}, TypeError, "temperature"),
    "temperature_bool": (S, T, {"temperature": True}, TypeError, "temperature"),
    "temperature_none": (S, T, {"temperature": None}, TypeError, "temperature"),
    "temperature_tensor_zero": (S, T, {"temperature": torch.tensor([1.0, 0, 1, 1])}, ValueError, "temperature"),
    "temperature_tensor_nan": (S, T, {"temperature": torch.tensor(torch.nan)}, ValueError, "temperature"),
    "temperature_tensor_shape": (S, T, {"temperature": torch.ones(3)}, ValueError, "temperature"),
    "temperature_tensor_per_class": (S, T, {"temperature": torch.ones(4, 10)}, ValueError, "temperature"),
    "temperature_tensor_integer": (S, T, {"temperature": torch.ones(4, dtype=torch.int)}, TypeError, "temperature"),
    "temperature_tensor_device": (S, T, {"temperature": torch.ones(4, device="meta")}, ValueError, "temperature"),
    "temperature_learned": (S, T, {"temperature": torch.ones(4, requires_grad=True)}, ValueError, "temperature"),
    "teacher_temperature_zero": (S, T, {"teacher_temperature": 0.0}, ValueError, "teacher_temperature"),
    "teacher_temperature_shape": (S, T, {"teacher_temperature": torch.ones(5)}, ValueError, "teacher_temperature"),
    "mask_no_tensor": (S, T, {"mask": [True] * 4}, TypeError, "mask"),
    "mask_float": (S, T, {"mask": torch.ones(4)}, TypeError, "mask"),
    "mask_uint8": (S, T, {"mask": torch.ones(4, dtype=torch.uint8)}, TypeError, "mask"),
    "mask_shape": (S, T, {"mask": torch.ones(5, dtype=torch.bool)}, ValueError, "mask"),
    "mask_per_class": (S, T, {"mask": torch.ones(4, 10, dtype=torch.bool)}, ValueError, "mask"),
    "mask_device": (S, T, {"mask": torch.ones(4, dtype=torch.bool, device="meta")}, ValueError, "mask"),
    "weight_number": (S, T, {"weight": 2.0}, TypeError, "weight"),
    "weight_integer": (S, T, {"weight": torch.ones(4, dtype=torch.long)}, TypeError, "weight"),
    "weight_shape": (S, T, {"weight": torch.ones(4, 1)}, ValueError, "weight"),
    "weight_learned": (S, T, {"weight": torch.ones(4, requires_grad=True)}, ValueError, "weight"),
    "reduction_unknown": (S, T, {"reduction": "average"}, ValueError, "reduction"),
    "reduction_none": (S, T, {"reduction": None}, ValueError, "reduction"),
    "normalizer_zero": (S, T, {"normalizer": 0}, ValueError, "normalizer"),
    "normalizer_zero_tensor": (S, T, {"normalizer": torch.tensor(0)}, ValueError, "normalizer"),
    "normalizer_negative": (S, T, {"normalizer": -2}, ValueError, "normalizer"),
    "normalizer_inf": (S, T, {"normalizer": torch.inf}, ValueError, "normalizer"),
    "normalizer_huge": (S, T, {"normalizer": 10**400}, ValueError, "normalizer"),
    "normalizer_tiny": (S, T, {"normalizer": 1e-320}, ValueError, "normalizer"),
    "temperature_huge": (S, T, {"temperature": 10**400}, ValueError, "temperature"),
    "normalizer_text": (S, T, {"normalizer": "4"}, TypeError, "normalizer"),
    "normalizer_shape": (S, T, {"normalizer": torch.ones(4)}, ValueError, "normalizer"),
    "normalizer_without_reduction": (S, T, {"normalizer": 4, "reduction": "none"}, ValueError, "normalizer"),
    "normalizer_negative_tensor": (S, T, {"normalizer": torch.tensor(-2.0)}, ValueError, "normalizer"),
    "normalizer_nan_tensor": (S, T, {"normalizer": torch.tensor(torch.nan)}, ValueError, "normalizer"),
    "normalizer_bool_tensor": (S, T, {"normalizer": torch.tensor(True)}, TypeError, "normalizer"),
    "normalizer_complex": (S, T, {"normalizer": torch.tensor(1j)}, TypeError, "normalizer"),
    "t_squared_number": (S, T, {"t_squared": 2}, TypeError, "t_squared"),
    "standardize_number": (S, T, {"standardize": 1}, TypeError, "standardize"),
    "inplace_number": (S, T, {"inplace": 1}, TypeError, "inplace"),
    "inplace_unfolded": (lambda: (torch.randn(20, requires_grad=True).mul(1).unfold(0, 10, 1)[:4], T), None, {"inplace": True}, ValueError, "inplace"),
    "inplace_chunk": (lambda: (torch.randn(8, 10, requires_grad=True).mul(1).chunk(2)[0], T), None, {"inplace": True}, ValueError, "inplace"),
    "inplace_leaf_that_is_a_view": (lambda: (torch.randn(5, 10)[1:].requires_grad_(), T), None, {"inplace": True}, ValueError, "inplace"),
    "normalizer_learned": (S, T, {"normalizer": torch.ones((), requires_grad=True)}, ValueError, "normalizer"),
    "inplace_leaf": (S.clone().requires_grad_(), T, {"inplace": True}, ValueError, "inplace"),
    "inplace_view_of_leaf": (S.clone().requires_grad_()[1:], T[1:], {"inplace": True}, ValueError, "inplace"),
    "inplace_expanded": (S[:1].clone().requires_grad_().mul(1).expand(4, 10), T, {"inplace": True}, ValueError, "inplace"),
    "inplace_shared": (lambda: (x := S.clone().requires_grad_() * 1, x.detach()), None, {"inplace": True}, ValueError, "inplace"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_error_names_the_argument(name, backend_name):
    student, teacher, options, error, argument = BAD[name]
    if callable(student) and not isinstance(student, torch.Tensor):
        student, teacher = student()
    before = student.detach().clone() if isinstance(student, torch.Tensor) else None
    with (
        fastkd.backend(backend_name),
        pytest.raises(error, match=rf"^{argument}: .*(wanted|detach|cannot|several|share|replace)"),
    ):
        functional.kl_div(student, teacher, **options)
    if before is not None and before.layout is torch.strided and not before.is_nested and before.is_floating_point():
        assert torch.equal(student.detach().float(), before.float())


@pytest.mark.parametrize(
    ("beta", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("half", TypeError), (True, TypeError)],
)
@pytest.mark.parametrize(
    ("function", "module", "parameter"),
    [("js_div", "JSDivLoss", "beta"), ("symmetric_kl_div", "SymmetricKLDivLoss", "student_weight"),
     ("skew_kl_div", "SkewKLDivLoss", "alpha"), ("skew_reverse_kl_div", "SkewReverseKLDivLoss", "alpha"),
     ("adaptive_kl_div", "AdaptiveKLDivLoss", "mu")],
)  # fmt: skip
def test_a_parameter_out_of_its_range_is_refused(function, module, parameter, beta, error):
    for make in (functools.partial(getattr(functional, function), S, T), getattr(fastkd, module)):
        with pytest.raises(error, match=rf"^{parameter}: a number .*wanted"):
            make(**{parameter: beta})


@pytest.mark.parametrize(
    ("value", "error"),
    [(-1e-9, ValueError), (float("nan"), ValueError), (float("inf"), ValueError), ("half", TypeError), (True, TypeError),
     (None, TypeError)],
)  # fmt: skip
@pytest.mark.parametrize("parameter", ["alpha", "beta"])
def test_powers_are_numbers_of_at_least_0(parameter, value, error):
    for make in (functools.partial(functional.alpha_beta_div, S, T), fastkd.AlphaBetaDivLoss):
        with pytest.raises(error, match=rf"^{parameter}: a number .*wanted"):
            make(**{parameter: value})


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [(torch.full((3,), 0.5), ValueError, "a shape that broadcasts"), (torch.ones(4).long(), TypeError, "float"),
     (torch.full((4,), -0.5), ValueError, "values of at least 0 wanted"),
     (torch.tensor(torch.nan), ValueError, "values of at least 0 wanted"),
     (torch.full((4,), 0.5, requires_grad=True), ValueError, "gradient")],
    ids=["shape", "dtype", "range", "NaN", "gradient"],
)  # fmt: skip
@pytest.mark.parametrize("parameter", ["alpha", "beta"])
def test_alpha_beta_div_refuses_a_tensor_of_powers(parameter, value, error, match):
    with pytest.raises(error, match=f"^{parameter}: .*{match}"):
        functional.alpha_beta_div(S, T, **{parameter: value})


@pytest.mark.parametrize("name", ["negative_log_acceptance", "alpha_beta_div", "bernoulli_kl_div"])
def test_relation_kl_refuses_what_compares_no_distributions_class_by_class(name):
    with pytest.raises(ValueError, match=rf"^divergence: one of .*js_div.* wanted, got '{name}'"):
        functional.relation_kl(S, T, divergence=name)


def test_relation_kl_refuses_a_divergence_whose_parameter_it_has_not():
    with pytest.raises(ValueError, match=r"^divergence: one of .*js_div.* wanted, got 'skew_kl_div'"):
        functional.relation_kl(S, T, divergence="skew_kl_div")


@pytest.mark.parametrize(
    ("beta", "error", "match"),
    [(torch.full((3,), 0.5), ValueError, "a shape that broadcasts"), (torch.ones(4).long(), TypeError, "float"),
     (torch.full((4,), 1.5), ValueError, "values from 0 to 1 wanted"), (torch.tensor(torch.nan), ValueError, "from 0 to 1"),
     (torch.full((4,), 0.5, requires_grad=True), ValueError, "gradient")],
    ids=["shape", "dtype", "range", "NaN", "gradient"],
)  # fmt: skip
@pytest.mark.parametrize("loss", [functional.js_div, functools.partial(functional.relation_kl, divergence="js_div")])
def test_js_div_refuses_a_tensor_of_betas(loss, beta, error, match):
    with pytest.raises(error, match=f"^beta: .*{match}"):
        loss(S, T, beta=beta)


LOGIT_LOSSES = [getattr(functional, name) for name in BY_NAME]


@pytest.mark.parametrize("widths", [(10, 16), (16, 10)])
def test_padded_heads_are_told_of_num_classes(widths):
    student, teacher = (torch.randn(4, width) for width in widths)
    with pytest.raises(
        ValueError, match=r"^teacher: .* wanted, got .* num_classes=10 takes the classes that both have$"
    ):
        functional.kl_div(student, teacher)
    with pytest.raises(ValueError, match=r"got \[3, 16\]$"):  # it does not help here
        functional.kl_div(student, torch.randn(3, 16))


@pytest.mark.parametrize("loss", LOGIT_LOSSES, ids=lambda f: f.__name__)
def test_every_logit_loss_checks_what_it_is_given(loss):
    with pytest.raises(ValueError, match=r"^teacher: the student's shape \[4, 10\] wanted, got \[4, 9\]"):
        loss(S, T[:, :9])
    with pytest.raises(ValueError, match=r"^temperature: a positive finite number wanted, got 0"):
        loss(S, T, temperature=0)
    with pytest.raises(
        TypeError, match=f"{loss.__name__}.* unexpected keyword argument 'temprature'|unexpected keyword"
    ):
        loss(S, T, temprature=2.0)


def test_options_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        functional.kl_div(S, T, 2.0)


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"temperature": 0}, ValueError, "temperature"),
        ({"teacher_temperature": -1.0}, ValueError, "teacher_temperature"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"reduction": "average"}, ValueError, "reduction"),
        ({"t_squared": 2}, TypeError, "t_squared"),
        ({"standardize": None}, TypeError, "standardize"),
        ({"inplace": None}, TypeError, "inplace"),
    ],
)
@pytest.mark.parametrize("module", [fastkd.KLDivLoss, fastkd.JSDivLoss])
def test_module_checks_its_options_when_it_is_built(module, options, error, argument):
    with pytest.raises(error, match=f"^{argument}: "):
        module(**options)


RELATIONAL = {
    "rkd_distance": fastkd.RKDDistanceLoss,
    "rkd_angle": fastkd.RKDAngleLoss,
    "rkd_loss": fastkd.RKDLoss,
    "similarity_preserving": fastkd.SimilarityPreservingLoss,
}


def with_one(value):
    x = T.clone()
    x[2, 3] = value
    return x


BAD_EMBEDDINGS = {
    "student_is_no_tensor": ([[1.0, 2.0]] * 4, T, TypeError, "student: a torch.Tensor wanted"),
    "teacher_is_none": (S, None, TypeError, "teacher: a torch.Tensor wanted"),
    "student_is_a_vector": (S[0], T, ValueError, r"student: embeddings of shape \[N, D\] wanted, got \[10\]"),
    "teacher_is_a_vector": (S, T[:, 0], ValueError, r"teacher: embeddings of shape \[N, D\] wanted, got \[4\]"),
    "student_is_a_sequence": (S[None], T, ValueError, r"student: embeddings of shape \[N, D\] wanted, got \[1, 4, 10\]"),
    "teacher_is_a_map": (S, T[:, :, None, None], ValueError, r"teacher: embeddings of shape \[N, D\] wanted"),
    "student_is_a_scalar": (torch.tensor(1.0), T, ValueError, r"student: embeddings of shape \[N, D\] wanted, got \[\]"),
    "as_many_rows": (S, T[:3], ValueError, "teacher: the student's 4 rows wanted, got 3"),
    "rows_would_broadcast": (S, T[:1], ValueError, "teacher: the student's 4 rows wanted, got 1"),
    "no_student_features": (S[:, :0], T, ValueError, r"student: at least one feature wanted, got shape \[4, 0\]"),
    "no_teacher_features": (S, T[:, :0], ValueError, r"teacher: at least one feature wanted, got shape \[4, 0\]"),
    "integer_student": (S.long(), T, TypeError, "student: float16, bfloat16, float32 or float64 embeddings wanted"),
    "bool_teacher": (S, T > 0, TypeError, "teacher: float16, .* embeddings wanted, got torch.bool"),
    "complex_teacher": (S, T.cfloat(), TypeError, "teacher: float16, .* embeddings wanted, got torch.complex64"),
    "float8_student": (S.to(torch.float8_e4m3fn), T, TypeError, "student: float16, .* embeddings wanted"),
    "sparse_teacher": (S, T.to_sparse(), TypeError, "teacher: a dense tensor wanted, got torch.sparse_coo"),
    "sparse_student": (S.to_sparse_csr(), T, TypeError, "student: a dense tensor wanted, got torch.sparse_csr"),
    "nested_student": (torch.nested.nested_tensor([S[0], S[1]]), T[:2], TypeError, "student: a dense tensor wanted"),
    "devices_differ": (S, T.to("meta"), ValueError, "teacher: a tensor on the student's device cpu wanted, got meta"),
    "nan_student": (with_one(torch.nan), T, ValueError, "student: finite embeddings wanted"),
    "inf_teacher": (S, with_one(-torch.inf), ValueError, "teacher: finite embeddings wanted"),
    "inf_half_student": (with_one(1e5).half(), T, ValueError, "student: finite embeddings wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_EMBEDDINGS)
@pytest.mark.parametrize("loss", RELATIONAL)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_embeddings_are_checked(backend_name, loss, name):
    student, teacher, error, message = BAD_EMBEDDINGS[name]
    strided = isinstance(student, torch.Tensor) and student.layout is torch.strided and not student.is_nested
    before = student.clone() if strided else None
    for call in (getattr(functional, loss), RELATIONAL[loss]()):
        with fastkd.backend(backend_name), pytest.raises(error, match=f"^{message}"):
            call(student, teacher)
    if strided:
        torch.testing.assert_close(student.float(), before.float(), rtol=0, atol=0, equal_nan=True)


NO_NUMBERS = [
    ("1", TypeError),
    (None, TypeError),
    (True, TypeError),
    (torch.tensor(1.0), TypeError),
    ([1.0], TypeError),
]
NOT_FINITE = [(value, ValueError) for value in (-1, -1e-9, float("nan"), float("inf"))]
BAD_OPTIONS = [
    *(
        (loss, option, value, error, "a .*number wanted")
        for loss, option in (("rkd_distance", "delta"), ("rkd_angle", "delta"), ("rkd_loss", "distance_delta"), ("rkd_loss", "angle_delta"))
        for value, error in (*NO_NUMBERS, *NOT_FINITE, (0, ValueError), (0.0, ValueError))
    ),
    *(
        ("rkd_loss", option, value, error, "a .*number .*wanted")
        for option in ("distance_weight", "angle_weight")
        for value, error in (*NO_NUMBERS, *NOT_FINITE)
    ),
    *(
        ("rkd_distance", "normalize", value, ValueError, "'mean' or None wanted, got")
        for value in ("max", "Mean", "", True, False, 1, ["mean"])
    ),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "option", "value", "error", "message"), BAD_OPTIONS)
def test_relational_options_are_checked(loss, option, value, error, message):
    """By the function, and by the module when it is built."""
    with pytest.raises(error, match=f"^{option}: {message}"):
        getattr(functional, loss)(S, T, **{option: value})
    with pytest.raises(error, match=f"^{option}: {message}"):
        RELATIONAL[loss](**{option: value})


@pytest.mark.parametrize("loss", RELATIONAL)
def test_relational_options_are_keywords_and_known(loss):
    for call in (lambda *a, **k: getattr(functional, loss)(S, T, *a, **k), RELATIONAL[loss]):
        with pytest.raises(TypeError, match="positional"):
            call(1.0)
        with pytest.raises(TypeError, match="unexpected keyword argument 'detla'"):
            call(detla=1.0)
