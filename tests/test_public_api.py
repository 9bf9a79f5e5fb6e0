"""What a reader or an editor sees of the losses without running them: signatures, types, docstrings, examples."""

import doctest
import importlib
import inspect
import pickle
import re
import typing

import pytest

import fastkd
from fastkd import _divergences, _types, functional, modules

FAMILIES = {
    "logits": "logits",
    "cross_entropy": "logits",
    "mixtures": "logits",
    "skew": "logits",
    "adaptive": "logits",
    "beyond_kl": "logits",
    "targets": "logits",
    "kd": "logits",
    "dist": "logits",
    "features": "features",
    "relations": "relations",
    "rkd": "relations",
    "similarity": "relations",
}  # of a file
MODULES = {  # by function
    "kl_div": "KLDivLoss",
    "soft_cross_entropy": "SoftCrossEntropyLoss",
    "reverse_kl_div": "ReverseKLDivLoss",
    "js_div": "JSDivLoss",
    "symmetric_kl_div": "SymmetricKLDivLoss",
    "skew_kl_div": "SkewKLDivLoss",
    "skew_reverse_kl_div": "SkewReverseKLDivLoss",
    "total_variation": "TotalVariationLoss",
    "adaptive_kl_div": "AdaptiveKLDivLoss",
    "negative_log_acceptance": "NegativeLogAcceptanceLoss",
    "alpha_beta_div": "AlphaBetaDivLoss",
    "bernoulli_kl_div": "BernoulliKLDivLoss",
    "kd_loss": "KDLoss",
    "dkd_loss": "DKDLoss",
    "nkd_loss": "NKDLoss",
    "dist_loss": "DISTLoss",
    "feature_mse": "FeatureMSELoss",
    "feature_smooth_l1": "FeatureSmoothL1Loss",
    "feature_cosine": "FeatureCosineLoss",
    "attention_transfer": "AttentionTransferLoss",
    "linear_feature_mse": "LinearFeatureMSELoss",
    "rkd_distance": "RKDDistanceLoss",
    "rkd_angle": "RKDAngleLoss",
    "rkd_loss": "RKDLoss",
    "similarity_preserving": "SimilarityPreservingLoss",
    "gram_mse": "GramMSELoss",
    "pkt": "PKTLoss",
    "relation_kl": "RelationKLLoss",
    "relational_triplet": "RelationalTripletLoss",
}
# The module owns the projector: it has what torch.nn.Linear is made with in place of the function's two tensors.
OF_THE_PROJECTOR = {"student_features", "teacher_features", "bias", "device", "dtype"}
PROJECTOR = {"projector_weight", "projector_bias"}
losses = pytest.mark.parametrize(("function", "module"), MODULES.items(), ids=MODULES)


def test_every_divergence_has_its_name_among_the_types():
    assert typing.get_args(_types.Divergence) == tuple(_divergences.OF_RELATIONS)
    assert typing.get_args(_types.SoftDivergence) == tuple(_divergences.BY_NAME)


def test_every_parameter_of_a_divergence_is_one_of_kd_loss():
    of_divergences = {p.name for name in _divergences.BY_NAME for p in _divergences.parameters_of(name)}
    assert of_divergences <= set(parameters(functional.kd_loss))


def parameters(function):
    return {name: p for name, p in inspect.signature(function).parameters.items() if name != "self"}


def documented(docstring):
    """The names of the section Args."""
    section = re.search(r"^( *)Args:\n((?:\1 +.*\n|\n)*)", inspect.cleandoc(docstring) + "\n", re.MULTILINE)
    return re.findall(r"^    (\w+): ", section[2], re.MULTILINE) if section else []


def shared_by(function):
    """The module whose docstring says what holds for all losses of a family."""
    return f"fastkd.functional.{FAMILIES[function.__module__.rpartition('.')[2]]}"


def of(function, module):
    return getattr(functional, function), getattr(fastkd, module)


def test_every_loss_is_a_function_and_a_module():
    assert sorted(MODULES) == sorted(name for name in functional.__all__ if name.islower())  # but for results of theirs
    assert sorted(MODULES.values()) == sorted(modules.__all__)
    others = {"LinearLogits", "Probabilities", "TopKLogProbs", "backend", "functional", "metrics"}
    assert set(modules.__all__) | others == set(fastkd.__all__)
    for function, module in MODULES.items():
        found, made = of(function, module)
        assert made is getattr(modules, module)
        family = found.__module__.rpartition(".")[2]
        assert family in FAMILIES
        assert made.__module__ == f"fastkd.modules.{family}"


@losses
def test_function_module_and_docstrings_name_the_same_options(function, module):
    function, module = of(function, module)
    assert documented(function.__doc__) == list(parameters(function))
    assert documented(module.__doc__) == list(parameters(module.__init__))
    assert documented(module.forward.__doc__) == list(parameters(module.forward))
    of_module = {*parameters(module.__init__), *parameters(module.forward)}
    if "projector_weight" in parameters(function):
        assert of_module >= OF_THE_PROJECTOR
        of_module = of_module - OF_THE_PROJECTOR | PROJECTOR
    assert of_module == set(parameters(function))


@losses
def test_module_has_the_functions_defaults_and_types(function, module):
    function, module = of(function, module)
    constructor = parameters(module.__init__)
    for name, p in parameters(function).items():
        if name in constructor:
            assert constructor[name].default == p.default, name
            assert constructor[name].annotation in (p.annotation, *typing.get_args(p.annotation), float | None), name
        elif name not in PROJECTOR:
            assert parameters(module.forward)[name].annotation == p.annotation, name
            assert parameters(module.forward)[name].default == p.default, name
    assert inspect.signature(module.forward).return_annotation == inspect.signature(function).return_annotation


@losses
def test_signatures_are_literal_and_typed(function, module):
    """Each stands in its own file, and nothing in it is made elsewhere."""
    for found in (
        getattr(functional, function),
        *(getattr(getattr(fastkd, module), n) for n in ("__init__", "forward")),
    ):
        signature = inspect.signature(found)
        assert signature.return_annotation is not inspect.Signature.empty
        for name, p in parameters(found).items():
            assert p.annotation is not inspect.Parameter.empty, name
            assert p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD), name
        assert found.__qualname__ in (function, f"{module}.{found.__name__}")
    for name, p in parameters(getattr(functional, function)).items():
        tensors = name in ("student", "teacher", "target", "labels", "projector_weight")
        assert (p.kind is p.POSITIONAL_OR_KEYWORD) == tensors, name


@losses
def test_docstrings_have_formula_shape_source_and_example(function, module):
    function, module = of(function, module)
    for wanted in (".. math::", "Args:", "Returns:", "Raises:", "Example:", ">>> ", "Source: ", shared_by(function)):
        assert wanted in function.__doc__, wanted
    shared = importlib.import_module(shared_by(function)).__doc__
    for wanted in ("**The teacher is a constant.**", "**The loss**", "**The gradient**", "**Memory.**", "**Errors**"):
        assert wanted in shared, wanted
    for wanted in (f":func:`fastkd.functional.{function.__name__}`", "Shape:", "Example:", ">>> "):
        assert wanted in module.__doc__, wanted
    for name, p in parameters(function).items():
        if p.default is not inspect.Parameter.empty:
            text = re.search(rf"^ +{name}: (.*?)(?=^        \w+: |^$)", function.__doc__, re.MULTILINE | re.DOTALL)[1]
            assert "efault" in text, name


@pytest.mark.parametrize("package", ["functional", "modules"])
@pytest.mark.parametrize("family", FAMILIES)
def test_examples_run(package, family):
    found = importlib.import_module(f"fastkd.{package}.{family}")
    done = doctest.testmod(found)
    made_here = {name for name, x in vars(found).items() if getattr(x, "__module__", None) == found.__name__}
    losses_here = made_here & {*MODULES, *MODULES.values()}
    assert done.attempted >= 5 * len(losses_here) > 0  # statements of an example
    assert done.failed == 0


@losses
def test_a_module_prints_its_options(function, module):
    """What repr says makes the module again."""
    made = getattr(fastkd, module)
    constructor = set(parameters(made.__init__))
    assert set(made._options) == constructor - OF_THE_PROJECTOR
    if constructor & OF_THE_PROJECTOR:
        assert made(3, 5).extra_repr() == "normalize=None, reduction='mean', dim=None"
        return
    assert list(made._options) == list(parameters(made.__init__))
    assert repr(eval(repr(made()), vars(fastkd))) == repr(made())


def test_printed_options_in_full():
    assert repr(fastkd.JSDivLoss(beta=0.25)) == (
        "JSDivLoss(beta=0.25, temperature=1.0, teacher_temperature=None, t_squared=True, standardize=False, dim=-1, "
        "num_classes=None, reduction='batchmean', inplace=False, group=None)"
    )
    assert repr(fastkd.SimilarityPreservingLoss()) == "SimilarityPreservingLoss(group=None)"


def test_functions_and_modules_are_pickled():
    made = pickle.loads(pickle.dumps(fastkd.LinearFeatureMSELoss(3, 5, normalize="l2")))
    assert made.normalize == "l2"
    assert list(made.state_dict()) == ["projector.weight", "projector.bias"]
    assert pickle.loads(pickle.dumps(functional.kl_div)) is functional.kl_div
