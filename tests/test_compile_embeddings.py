"""torch.compile and torch.export of the losses of embeddings: relations and features."""

import pickle

import pytest
import relation_cases
import torch
import torch._dynamo.testing
from integration_checks import COMPILED, RELATIONAL, both, compiler_of
from tolerances import FLOOR, error

import fastkd
from fastkd import functional

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(("backend_name", "dtype"), COMPILED, ids=str)
def test_compile_fullgraph_of_relations(dtype, backend_name):
    def training_loss(student, teacher):
        return sum(loss(student * 2, teacher) for loss in RELATIONAL.values())

    arguments = torch.randn(9, 6).to(dtype), torch.randn(9, 4).to(dtype)
    with fastkd.backend(backend_name):
        loss, grad = both(training_loss, *arguments)
        compiled_loss, compiled_grad = both(
            torch.compile(training_loss, fullgraph=True, backend=compiler_of(backend_name)), *arguments
        )
    assert error(compiled_loss, loss) < 8 * FLOOR[torch.float32]
    assert error(compiled_grad, grad) < 4 * FLOOR[dtype]


@pytest.mark.parametrize("name", relation_cases.LOSSES)
def test_compile_dynamic_shapes_of_relations(name):
    loss_function = RELATIONAL[name]
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_function, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for N, width in ((4, 5), (9, 6), (40, 17), (5, 33)):
        student, teacher = torch.randn(N, width), torch.randn(N, width + 2)
        loss, grad = both(loss_function, student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
        counts.append(counter.frame_count)  # 2 where dynamo starts anew, having taken a default for a symbol
    assert len(set(counts)) == 1


def test_compile_with_options_that_change():
    """They become symbols; what cannot be checked then, the op checks."""
    compiled = torch.compile(
        lambda s, t, delta, weight: (
            functional.rkd_loss(s, t, distance_delta=delta, angle_weight=weight)
            + functional.rkd_distance(s, t, delta=delta)
            + functional.pkt(s, t, eps=delta)
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    student, teacher = torch.randn(7, 5), torch.randn(7, 4)
    for delta, weight in ((1.0, 2.0), (0.5, 3.0), (0.3, 0.5)):
        expected = functional.rkd_loss(student, teacher, distance_delta=delta, angle_weight=weight)
        expected += functional.rkd_distance(student, teacher, delta=delta)
        expected += functional.pkt(student, teacher, eps=delta)
        assert torch.equal(compiled(student, teacher, delta, weight), expected)
    with pytest.raises((RuntimeError, ValueError), match="delta: a positive finite number wanted"):
        compiled(student, teacher, -0.7, 1.0)
    with pytest.raises((RuntimeError, ValueError), match="weight: a finite number of at least 0 wanted"):
        compiled(student, teacher, 0.9, -1.5)


@pytest.mark.parametrize(
    "module", [fastkd.RKDDistanceLoss, fastkd.RKDAngleLoss, fastkd.RKDLoss, fastkd.SimilarityPreservingLoss]
)
def test_compile_and_export_a_relational_module(module):
    student, teacher = torch.randn(8, 6), torch.randn(8, 4)
    loss, grad = both(module(), student, teacher)
    compiled_loss, compiled_grad = both(torch.compile(module(), fullgraph=True, backend="aot_eager"), student, teacher)
    assert torch.equal(compiled_loss, loss)
    assert error(compiled_grad, grad) < FLOOR[torch.float32]
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module(), (student, teacher), dynamic_shapes=({0: batch}, {0: batch}))
    student, teacher = torch.randn(11, 6), torch.randn(11, 4)
    assert torch.equal(program.module()(student, teacher), module()(student, teacher))


@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compile_with_one_layer_twice(backend_name):
    """Several students learn from one teacher's layer, and one student from several; one mask for all."""

    def loss(a, b, t, u, mask):
        return (
            functional.feature_mse([a, b], [t, t], mask=mask)
            + functional.feature_mse([a, a], [t, u], mask=mask, normalize="l2")
            + functional.feature_cosine([a, a], [t, t])
        )

    a, b = (torch.randn(4, 6, requires_grad=True) for _ in range(2))
    constants = torch.randn(4, 6), torch.randn(4, 6), torch.tensor([True, False, True, True])
    with fastkd.backend(backend_name):
        plain = loss(a, b, *constants)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(a, b, *constants)
        assert error(compiled.detach(), plain.detach()) <= FLOOR[torch.float32]
        for x, y in zip(torch.autograd.grad(compiled, (a, b)), torch.autograd.grad(plain, (a, b)), strict=True):
            assert error(x, y) <= FLOOR[torch.float32]


def feature_losses():
    """Modules and what they are given."""
    maps, teacher_maps = torch.randn(2, 5, 4, 4), torch.randn(2, 5, 4, 4)
    layers = [torch.randn(3, 4, 6), maps], [torch.randn(3, 4, 6), teacher_maps]
    yield "mse", fastkd.FeatureMSELoss(), layers
    yield "l2", fastkd.FeatureMSELoss(normalize="l2", layer_weights=[1, 2]), layers
    yield "none", fastkd.FeatureMSELoss(normalize="standardize", reduction="none"), (maps, teacher_maps)
    yield "smooth l1", fastkd.FeatureSmoothL1Loss(beta=0.5, normalize="l2"), layers
    yield "cosine", fastkd.FeatureCosineLoss(), (maps, teacher_maps)
    yield "attention", fastkd.AttentionTransferLoss(), (maps, torch.randn(2, 3, 4, 4))
    yield "projector", fastkd.LinearFeatureMSELoss(6, 8), (torch.randn(3, 4, 6), torch.randn(3, 4, 8))
    yield "maps", fastkd.LinearFeatureMSELoss(5, 8), (maps, torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize(("module", "inputs"), [pytest.param(m, i, id=name) for name, m, i in feature_losses()])
def test_compile_and_export_a_feature_module(module, inputs):
    def step(module):
        students = [x.detach().requires_grad_() for x in (inputs[0] if isinstance(inputs[0], list) else [inputs[0]])]
        loss = module(students if isinstance(inputs[0], list) else students[0], inputs[1])
        return loss, *torch.autograd.grad(loss.sum(), (*students, *module.parameters()))

    torch._dynamo.reset()
    plain, compiled = step(module), step(torch.compile(module, fullgraph=True, backend="aot_eager"))
    assert all(torch.equal(a, b) for a, b in zip(plain, compiled, strict=True))
    program = torch.export.export(module, inputs)
    assert torch.equal(program.module()(*inputs), module(*inputs))
    again = pickle.loads(pickle.dumps(module))
    assert torch.equal(again(*inputs), module(*inputs))
    assert repr(again) == repr(module)
