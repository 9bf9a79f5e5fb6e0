"""Bad input to the feature losses is a clear error that names the argument, and the layer."""

import pytest
import torch

import fastkd
from fastkd import functional
from fastkd.ops import attention, features
from fastkd.ops.numbers import as_tensor

S, T = torch.randn(4, 10), torch.randn(4, 10)
LAYERS = [torch.randn(4, 5), torch.randn(3, 6, 7)]
TEACHERS = [torch.randn(4, 5), torch.randn(3, 6, 7)]
MASK = torch.ones(4, dtype=torch.bool)

# student, teacher, options, error, message
BAD = {
    "student_is_no_tensor": (1.0, T, {}, TypeError, "student: a tensor, or a list of one for each layer wanted, got float"),
    "teacher_is_a_list": (S, [T, T], {}, ValueError, "teacher: one tensor for each of the student's 1 layers wanted, got 2"),
    "teacher_is_none": (S, None, {}, TypeError, "teacher: a tensor, or a list"),
    "no_layers": ([], [], {}, ValueError, "student: at least one layer wanted, got an empty list"),
    "as_many_layers": (LAYERS, TEACHERS[:1], {}, ValueError, "teacher: one tensor for each of the student's 2 layers wanted, got 1"),
    "shape_of_a_layer": (LAYERS, [T[:, :5], torch.randn(3, 6, 8)], {}, ValueError, r"teacher: the student's shape \[3, 6, 7\] wanted in layer 1, got \[3, 6, 8\]"),
    "would_broadcast": (S, T[:1], {}, ValueError, r"teacher: the student's shape \[4, 10\] wanted, got \[1, 10\]"),
    "a_layer_is_no_tensor": ([S, "x"], [T, T], {}, TypeError, "student: a torch.Tensor wanted, got str"),
    "integer": (S.long(), T, {}, TypeError, "student: float16, bfloat16, float32 or float64 features wanted, got torch.int64"),
    "integer_layer": ([S, S], [T, T.int()], {}, TypeError, "teacher: float16, .* features in layer 1 wanted"),
    "scalar": (torch.tensor(1.0), torch.tensor(1.0), {}, ValueError, r"student: features of shape \[\*, D\] wanted"),
    "no_features": (S[:, :0], T[:, :0], {}, ValueError, r"student: at least one feature wanted, got shape \[4, 0\]"),
    "sparse": (S, T.to_sparse(), {}, TypeError, "teacher: a dense tensor wanted"),
    "devices_differ": (S, T.to("meta"), {}, ValueError, "teacher: a tensor on the student's device cpu wanted, got meta"),
    "layers_on_devices": ([S, S.to("meta")], [T, T.to("meta")], {}, ValueError, "student: all layers on one device wanted"),
    "dim": (S, T, {"dim": 2}, ValueError, r"dim: a dimension of shape \[4, 10\] wanted, got 2"),
    "five_dimensions": (torch.ones(2, 3, 2, 2, 2), torch.ones(2, 3, 2, 2, 2), {}, ValueError, r"dim: wanted of five and more dimensions \(1 where they are video, .*\); got None and shape \[2, 3, 2, 2, 2\]"),
    "five_dimensions_of_a_layer": ([S, torch.ones(2, 3, 2, 2, 2)], [T, torch.ones(2, 3, 2, 2, 2)], {}, ValueError, "dim: wanted in layer 1 of five and more dimensions"),
    "dim_is_text": (S, T, {"dim": "last"}, TypeError, "dim: a whole number wanted, got str"),
    "mask_shape": (S, T, {"mask": MASK[:3]}, ValueError, r"mask: a shape that broadcasts to \[4\] wanted, one per row; got \[3\]"),
    "mask_per_element": (S, T, {"mask": S > 0}, ValueError, r"mask: a shape that broadcasts to \[4\] wanted"),
    "mask_fits_no_layer": (LAYERS, TEACHERS, {"mask": MASK}, ValueError, r"mask: a shape that broadcasts to \[3, 6\] wanted in layer 1, one per row; got \[4\]"),
    "mask_list_length": (LAYERS, TEACHERS, {"mask": [MASK]}, ValueError, "mask: one tensor for all layers, or one for each of 2 wanted, got 1"),
    "mask_float": (S, T, {"mask": MASK.float()}, TypeError, "mask: torch.bool wanted"),
    "mask_device": (S, T, {"mask": MASK.to("meta")}, ValueError, "mask: a tensor on the student's device"),
    "weight_number": (S, T, {"weight": 2.0}, TypeError, "weight: a torch.Tensor wanted"),
    "weight_integer": (S, T, {"weight": torch.ones(4, dtype=torch.long)}, TypeError, "weight: a floating dtype wanted"),
    "weight_learned": (S, T, {"weight": torch.ones(4, requires_grad=True)}, ValueError, "weight: no gradient flows to it"),
    "reduction": (S, T, {"reduction": "average"}, ValueError, "reduction: one of none, sum, batchmean, mean wanted"),
    "layer_weights_number": (S, T, {"layer_weights": 2.0}, TypeError, "layer_weights: a list of numbers wanted, got float"),
    "layer_weights_length": (LAYERS, TEACHERS, {"layer_weights": [1.0]}, ValueError, "layer_weights: one for each of 2 layers wanted, got 1"),
    "layer_weights_negative": (S, T, {"layer_weights": [-1.0]}, ValueError, "layer_weights: a finite number of at least 0 wanted, got -1"),
    "layer_weights_nan": (S, T, {"layer_weights": [float("nan")]}, ValueError, "layer_weights: a finite number"),
    "layer_weights_text": (S, T, {"layer_weights": ["1"]}, TypeError, "layer_weights: a number wanted, got str"),
    "return_layers": (S, T, {"return_layers": 1}, TypeError, "return_layers: True or False wanted, got 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("loss", ["feature_mse", "feature_smooth_l1", "feature_cosine"])
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_features_are_checked(backend_name, loss, name):
    student, teacher, options, error, message = BAD[name]
    with fastkd.backend(backend_name), pytest.raises(error, match=f"^{message}"):
        getattr(functional, loss)(student, teacher, **options)


@pytest.mark.parametrize("value", ["L2", "mean", "", True, 2])
def test_normalize_is_checked(value):
    for call in (
        lambda: functional.feature_mse(S, T, normalize=value),
        lambda: fastkd.FeatureMSELoss(normalize=value),
        lambda: functional.feature_smooth_l1(S, T, normalize=value),
        lambda: fastkd.FeatureSmoothL1Loss(normalize=value),
    ):
        with pytest.raises(ValueError, match=r"^normalize: None, 'l2' or 'standardize' wanted, got"):
            call()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (-0.5, ValueError, "a finite number of at least 0 wanted, got -0.5"),
        (float("inf"), ValueError, "a finite number of at least 0 wanted, got inf"),
        (float("nan"), ValueError, "a finite number of at least 0 wanted, got nan"),
        (10**400, ValueError, "a finite number of at least 0 wanted, got 1000"),
        ("1", TypeError, "a number wanted, got str"),
        (True, TypeError, "a number wanted, got bool"),
        (None, TypeError, "a number wanted, got NoneType"),
        (torch.tensor(1.0), TypeError, "a number wanted, got Tensor"),
    ],
)
def test_beta_is_checked(value, error, message):
    for call in (
        lambda: functional.feature_smooth_l1(S, T, beta=value),
        lambda: fastkd.FeatureSmoothL1Loss(beta=value),
    ):
        with pytest.raises(error, match=f"^beta: {message}"):
            call()


MAPS = torch.randn(2, 3, 4, 4)
BAD_MAPS = {
    "no_tensor": (None, MAPS, {}, TypeError, "student: a torch.Tensor wanted"),
    "no_map": (MAPS[0], MAPS, {}, ValueError, r"student: maps of shape \[B, C, H, W\] wanted, got \[3, 4, 4\]"),
    "sizes": (MAPS, MAPS[..., :3], {}, ValueError, r"teacher: the student's B, H and W \[2, 4, 4\] wanted, got \[2, 4, 3\]"),
    "samples": (MAPS, MAPS[:1], {}, ValueError, "teacher: the student's B, H and W"),
    "no_channels": (MAPS, MAPS[:, :0], {}, ValueError, "teacher: at least one channel wanted"),
    "integer": (MAPS.long(), MAPS, {}, TypeError, "student: float16, .* maps wanted"),
    "device": (MAPS, MAPS.to("meta"), {}, ValueError, "teacher: a tensor on the student's device"),
    "p_is_small": (MAPS, MAPS, {"p": 0.5}, ValueError, "p: a finite number of at least 1 wanted, got 0.5"),
    "p_is_nan": (MAPS, MAPS, {"p": float("nan")}, ValueError, "p: a positive finite number wanted"),
    "p_is_text": (MAPS, MAPS, {"p": "2"}, TypeError, "p: a number wanted"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_MAPS)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_maps_are_checked(backend_name, name):
    student, teacher, options, error, message = BAD_MAPS[name]
    with fastkd.backend(backend_name), pytest.raises(error, match=f"^{message}"):
        functional.attention_transfer(student, teacher, **options)


W, B = torch.randn(6, 10), torch.randn(6)
BAD_PROJECTORS = {
    "no_tensor": ((S, None, T), {}, TypeError, "projector_weight: a torch.Tensor wanted"),
    "transposed": ((S, W.T, T[:, :6]), {}, ValueError, r"projector_weight: shape \[6, 10\] wanted, got \[10, 6\]"),
    "bias": ((S, W, T[:, :6]), {"projector_bias": B[:5]}, ValueError, r"projector_bias: shape \[6\] wanted, got \[5\]"),
    "rows": (
        (S, W, T[:3, :6]),
        {},
        ValueError,
        r"teacher: the student's shape but for its features, \[4, D\], wanted; got \[3, 6\]",
    ),
    "maps": (
        (MAPS, W[:, :3], torch.ones(2, 4, 4, 6)),
        {},
        ValueError,
        r"teacher: the student's shape but for its features, \[2, D, 4, 4\], wanted; got \[2, 4, 4, 6\]",
    ),
    "dimensions": (
        (MAPS, W[:, :3], torch.ones(2, 6, 4)),
        {},
        ValueError,
        "teacher: the student's shape but for its features",
    ),
    "no_features": (
        (S[:, :0], W[:, :0], T),
        {},
        ValueError,
        r"student: at least one feature wanted, got shape \[4, 0\]",
    ),
    "scalar": ((torch.tensor(1.0), W, T), {}, ValueError, r"student: features of shape \[\*, D\] wanted"),
    "five_dimensions": (
        (torch.ones(2, 10, 1, 1, 1), W, torch.ones(2, 6, 1, 1, 1)),
        {},
        ValueError,
        "dim: wanted of five and more",
    ),
    "dim": ((S, W, T[:, :6]), {"dim": -3}, ValueError, r"dim: a dimension of shape \[4, 10\] wanted, got -3"),
    "dim_is_text": ((S, W, T[:, :6]), {"dim": "last"}, TypeError, "dim: a whole number wanted, got str"),
    "mask_of_maps": (
        (MAPS, W[:, :3], torch.ones(2, 6, 4, 4)),
        {"mask": torch.ones(2, 6, 4) > 0},
        ValueError,
        r"mask: a shape that broadcasts to \[2, 4, 4\] wanted",
    ),
    "dtype": ((S, W.double(), T[:, :6]), {}, TypeError, "projector_weight: the student's dtype torch.float32 wanted"),
    "integer": ((S, W.long(), T[:, :6]), {}, TypeError, "projector_weight: a floating dtype wanted"),
    "device": ((S, W.to("meta"), T[:, :6]), {}, ValueError, "projector_weight: a tensor on the student's device"),
    "mask": ((S, W, T[:, :6]), {"mask": MASK[:2]}, ValueError, r"mask: a shape that broadcasts to \[4\] wanted"),
    "weight": ((S, W, T[:, :6]), {"weight": 1.0}, TypeError, "weight: a torch.Tensor wanted"),
    "normalize": ((S, W, T[:, :6]), {"normalize": "max"}, ValueError, "normalize: None"),
    "reduction": ((S, W, T[:, :6]), {"reduction": ""}, ValueError, "reduction: one of"),
}


@pytest.mark.parametrize("name", BAD_PROJECTORS)
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_projectors_are_checked(backend_name, name):
    tensors, options, error, message = BAD_PROJECTORS[name]
    with fastkd.backend(backend_name), pytest.raises(error, match=f"^{message}"):
        functional.linear_feature_mse(*tensors, **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fastkd.FeatureMSELoss(reduction="max"), ValueError, "reduction: "),
        (lambda: fastkd.FeatureMSELoss(layer_weights=[1, -1]), ValueError, "layer_weights: "),
        (lambda: fastkd.FeatureMSELoss(return_layers=None), TypeError, "return_layers: "),
        (lambda: fastkd.FeatureSmoothL1Loss(beta=1, reduction="max"), ValueError, "reduction: "),
        (lambda: fastkd.FeatureCosineLoss(layer_weights=3), TypeError, "layer_weights: "),
        (lambda: fastkd.FeatureCosineLoss(dim=1.5), TypeError, "dim: "),
        (lambda: fastkd.AttentionTransferLoss(p=0), ValueError, "p: "),
        (lambda: fastkd.LinearFeatureMSELoss(0, 4), ValueError, "student_features: at least 1 wanted, got 0"),
        (lambda: fastkd.LinearFeatureMSELoss(4, "4"), TypeError, "teacher_features: a whole number wanted"),
        (lambda: fastkd.LinearFeatureMSELoss(4, 4, dim="1"), TypeError, "dim: a whole number wanted, got str"),
        (lambda: fastkd.LinearFeatureMSELoss(4, 4, bias=1), TypeError, "bias: True or False wanted"),
    ],
)
def test_modules_check_their_options_when_they_are_built(make, error, message):
    with pytest.raises(error, match=f"^{message}"):
        make()


def test_the_ops_check_their_own_contract():
    """Called past the functions, an op still refuses what it would read out of bounds."""
    one = as_tensor(1.0)
    fwd, options = features.OPS["fastkd"].fwd, (1, [], [], 3, one, None, True)
    fwd([S], [T], [1], *options)
    for students, teachers, dims in (
        ([S], [T[:3]], [1]),
        ([S], [T], [2]),
        ([S, S], [T], [1, 1]),
        ([S], [T], []),
    ):
        with pytest.raises(RuntimeError, match="student and teacher: "):
            fwd(students, teachers, dims, *options[:-3], as_tensor(*(1.0 for _ in students)), None, True)
    with pytest.raises(RuntimeError, match="mask: "):
        fwd([S], [T], [1], 1, [MASK[:3]], [], 3, one, None, True)
    with pytest.raises(RuntimeError, match="weight: "):
        fwd([S], [T], [1], 1, [], [torch.ones(4).double()], 3, one, None, True)
    with pytest.raises(RuntimeError, match="feature: unknown number"):
        fwd([S], [T], [1], 4, *options[1:])
    with pytest.raises(RuntimeError, match="reduction: unknown number"):
        fwd([S], [T], [1], 1, [], [], 7, one, None, True)
    for wrong in (as_tensor(1.0, 1.0), as_tensor(-0.5), as_tensor(float("nan")), one.float()):
        with pytest.raises(RuntimeError, match="layer_weights: "):
            fwd([S], [T], [1], 1, [], [], 3, wrong, None, True)
    for wrong in (as_tensor(1.0, 1.0), as_tensor(-0.5), as_tensor(float("inf")), one.float()):
        with pytest.raises(RuntimeError, match="beta: "):
            fwd([S], [T], [1], 1, [], [], 3, one, wrong, True)
    with pytest.raises(RuntimeError, match="beta: none wanted of cosines, got 1"):
        fwd([S], [T], [1], 3, [], [], 3, one, one, True)
    with pytest.raises(RuntimeError, match="upstream: "):
        features.OPS["fastkd"].bwd([S], [T], [1], 1, [], [], 3, one, None, torch.ones(3))
    with pytest.raises(RuntimeError, match="reduction: per row or the sum"):
        features.OPS["fastkd"].fwd_(S.clone(), T, 1, 0, None, None, 3, None)
    ops = attention.OPS["fastkd"]
    for student, teacher in ((S, T), (MAPS, MAPS[:1]), (MAPS[:, :0], MAPS)):
        with pytest.raises(RuntimeError, match="student and teacher: "):
            ops.fwd(student, teacher, as_tensor(2.0), True)
    with pytest.raises(RuntimeError, match="p: a finite number"):
        ops.fwd(MAPS, MAPS, as_tensor(0.5), True)
