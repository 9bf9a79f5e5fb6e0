"""torch.compile and torch.export of the logit losses: whole graphs, shapes and numbers that change."""

import pytest
import torch
import torch._dynamo.testing
from integration_checks import COMPILED, both, compiler_of
from tolerances import FLOOR, error

import fastkd
from fastkd import functional

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize(("backend_name", "dtype"), COMPILED, ids=str)
@pytest.mark.parametrize("reduction", ["none", "batchmean"])
def test_compile_fullgraph(reduction, dtype, backend_name):
    def training_loss(student, teacher, mask, temperature):
        return functional.kl_div(
            student * 2, teacher, temperature=temperature, mask=mask, weight=mask.float() + 1, reduction=reduction
        ) + functional.kl_div(student[:, :-1], teacher[:, :-1], temperature=2.0).mean()  # fmt: skip

    arguments = (
        torch.randn(4, 3, 50).to(dtype),
        torch.randn(4, 3, 50).to(dtype),
        torch.rand(4, 3) < 0.7,
        torch.rand(4, 3) + 1,
    )
    with fastkd.backend(backend_name):
        loss, grad = both(training_loss, *arguments)
        compiled_loss, compiled_grad = both(
            torch.compile(training_loss, fullgraph=True, backend=compiler_of(backend_name)), *arguments
        )
    assert error(compiled_loss, loss) < 2 * FLOOR[torch.float32]
    assert error(compiled_grad, grad) < 2 * FLOOR[dtype]


@pytest.mark.parametrize(("backend_name", "dtype"), COMPILED, ids=str)
@pytest.mark.parametrize("name", ["kd_loss", "dkd_loss", "nkd_loss"])
def test_compile_fullgraph_of_targets(name, dtype, backend_name):
    """Shapes that change are compiled once more."""

    def training_loss(student, teacher, target, mask):
        options = {"temperature": 2.0, "mask": mask, "weight": mask.float() + 1, "ignore_index": 0}
        return getattr(functional, name)(student * 2, teacher, target, **options)

    compiled = torch.compile(training_loss, fullgraph=True, dynamic=True, backend=compiler_of(backend_name))
    for B, V in ((4, 50), (9, 33)):
        logits = [torch.randn(B, 3, V).to(dtype) for _ in range(2)]
        arguments = *logits, torch.randint(V, (B, 3)), torch.rand(B, 3) < 0.7
        with fastkd.backend(backend_name):
            loss, grad = both(training_loss, *arguments)
            compiled_loss, compiled_grad = both(compiled, *arguments)
        assert error(compiled_loss, loss) < 2 * FLOOR[torch.float32]
        assert error(compiled_grad, grad) < 2 * FLOOR[dtype]


def test_compile_of_a_teacher_made_in_inference_mode():
    """Where forward makes the gradient; elsewhere PyTorch refuses in the call."""
    compiled = torch.compile(functional.kl_div, fullgraph=True, backend="aot_eager")
    student = torch.randn(4, 20)
    with torch.inference_mode():
        teacher = torch.randn(4, 20)
    loss, grad = both(functional.kl_div, student, teacher)
    compiled_loss, compiled_grad = both(compiled, student, teacher)
    assert torch.equal(compiled_loss, loss)
    assert error(compiled_grad, grad) < FLOOR[torch.float32]
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        compiled(student.half().requires_grad_(), teacher)


def test_compile_dynamic_shapes():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t: functional.kl_div(s, t, temperature=2.0), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((4, 50), (9, 64), (2, 1000), (5, 33)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        loss, grad = both(lambda s, t: functional.kl_div(s, t, temperature=2.0), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["kl_div", "js_div"])
def test_compile_dynamic_shapes_of_tokens(name):
    """Numbers are no tensors of the rows' size in a graph: where N is B times L, inductor fails to make them."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    loss_function = getattr(functional, name)
    compiled = torch.compile(
        lambda s, t: loss_function(s, t, temperature=2.0), fullgraph=True, dynamic=True, backend=counter
    )
    for shape in ((2, 4, 20), (3, 5, 30)):
        student, teacher = torch.randn(shape), torch.randn(shape)
        loss, grad = both(lambda s, t: loss_function(s, t, temperature=2.0), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher)
        assert error(compiled_loss, loss) < FLOOR[torch.float32]
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count == 1


@pytest.mark.parametrize("name", ["kl_div", "js_div", "relation_kl"])
def test_compile_with_one_number_that_is_a_tensor(name):
    """Student's and teacher's temperature are one tensor then, which an autograd.Function takes once."""
    loss_function = getattr(functional, name)
    compiled = torch.compile(lambda s, t, T: loss_function(s, t, temperature=T), fullgraph=True, backend="aot_eager")
    student, teacher, temperature = torch.randn(4, 20), torch.randn(4, 20), torch.tensor(2.0)
    loss, grad = both(lambda s, t: loss_function(s, t, temperature=temperature), student, teacher)
    compiled_loss, compiled_grad = both(lambda s, t: compiled(s, t, temperature), student, teacher)
    assert error(compiled_loss, loss) < FLOOR[torch.float32]
    assert error(compiled_grad, grad) < FLOOR[torch.float32]


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("given", ["mask", "normalizer"])
def test_compile_dynamic_shapes_of_what_the_device_divides_by(given, reduction):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss_function(student, teacher, mask, normalizer):
        options = {"mask": mask} if given == "mask" else {"normalizer": normalizer}
        return functional.kl_div(student, teacher, reduction=reduction, **options)

    compiled = torch.compile(loss_function, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((4, 50), (9, 64), (3, 1000), (5, 33)):
        arguments = *torch.randn(2, *shape), torch.arange(shape[0]) % 3 > 0, torch.tensor(3.0)
        loss, grad = both(loss_function, *arguments)
        compiled_loss, compiled_grad = both(compiled, *arguments)
        assert error(compiled_loss, loss) < FLOOR[torch.float32]
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count == 1


def test_compile_with_a_temperature_that_changes():
    """An annealed temperature becomes a symbol, and is compiled no more; what cannot be checked then, the op checks."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss_function(student, teacher, T):
        return functional.kl_div(student, teacher, temperature=T, teacher_temperature=T + 1)

    compiled = torch.compile(loss_function, fullgraph=True, backend=counter)
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    for temperature in (1.0, 2.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0, 8.0, 0.5):
        loss, grad = both(loss_function, student, teacher, temperature)
        compiled_loss, compiled_grad = both(compiled, student, teacher, temperature)
        assert torch.equal(compiled_loss, loss)
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count <= 2
    with pytest.raises((RuntimeError, ValueError), match="temperature: a positive finite number wanted"):
        compiled(student, teacher, -1.5)


CHANGING = {
    "weights of kd_loss": lambda s, t, x: functional.kd_loss(s, t, torch.arange(6), hard_weight=x, soft_weight=1 + x),
    "smoothing of kd_loss": lambda s, t, x: functional.kd_loss(s, t, torch.arange(6), label_smoothing=x),
    "dkd_loss": lambda s, t, x: functional.dkd_loss(s, t, torch.arange(6), alpha=x, beta=1 + x, temperature=1 + x),
    "nkd_loss": lambda s, t, x: functional.nkd_loss(s, t, torch.arange(6), gamma=x, temperature=1 + x),
    "js_div": lambda s, t, x: functional.js_div(s, t, beta=x),
    "alpha of alpha_beta_div": lambda s, t, x: functional.alpha_beta_div(s, t, alpha=x),
    "beta of alpha_beta_div": lambda s, t, x: functional.alpha_beta_div(s, t, beta=x),
    "temperature of standardized logits": lambda s, t, x: functional.kl_div(s, t, temperature=x, standardize=True),
    "mu": lambda s, t, x: functional.adaptive_kl_div(s, t, mu=x),
    "beta of relation_kl": lambda s, t, x: functional.relation_kl(s, t, divergence="js_div", beta=x),
    "temperature of relation_kl": lambda s, t, x: functional.relation_kl(
        s, t, temperature=x, teacher_temperature=2 * x
    ),
    "rkd_distance": lambda s, t, x: functional.rkd_distance(s, t, delta=x),
    "rkd_angle": lambda s, t, x: functional.rkd_angle(s, t, delta=x),
    "rkd_loss": lambda s, t, x: functional.rkd_loss(s, t, angle_weight=x, distance_delta=2 * x),
    "pkt": lambda s, t, x: functional.pkt(s, t, eps=x),
    "relational_triplet": lambda s, t, x: functional.relational_triplet(s, t, margin=x),
    "numbers of dist_loss": lambda s, t, x: functional.dist_loss(
        s, t, inter_weight=x, intra_weight=1 + x, temperature=2 * x, eps=x
    ),
    "layer_weights": lambda s, t, x: functional.feature_mse([s, s], [t, t], layer_weights=[x, 1.0]),
    "feature_smooth_l1": lambda s, t, x: functional.feature_smooth_l1(s, t, beta=x),
    "normalizer of features": lambda s, t, x: functional.feature_cosine(s, t, normalizer=x),
    "attention_transfer": lambda s, t, x: functional.attention_transfer(
        s.view(1, -1, 10, 1), t.view(1, -1, 10, 1), p=1 + x
    ),
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("backend_name", ["cpu", pytest.param("torch", marks=pytest.mark.long)])
def test_compile_with_a_number_that_changes(name, backend_name):
    with fastkd.backend(backend_name):
        compiles_twice(CHANGING[name], (0.5, 0.25, 0.75, 0.1, 0.9, 0.3, 1.0, 0.2, 0.6, 0.05), backend_name, name)


@pytest.mark.parametrize("name", ["js_div", "feature_smooth_l1"])
@pytest.mark.parametrize("backend_name", ["cpu", "torch"])
def test_compile_with_a_beta_at_an_end(backend_name, name):
    loss = getattr(functional, name)
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    for beta in (0.0, 1.0):
        torch.compiler.reset()
        with fastkd.backend(backend_name):
            compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
            found, expected = (
                both(lambda s, t, f=f, beta=beta: f(s, t, beta=beta), student, teacher) for f in (compiled, loss)
            )
        for out, exact in zip(found, expected, strict=True):
            assert error(out, exact) < 2 * FLOOR[torch.float32]


def compiles_twice(loss_function, values, backend_name, name=""):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss_function, fullgraph=True, backend=counter)
    student, teacher = torch.randn(6, 10), torch.randn(6, 10)
    for x in values:
        loss, grad = both(loss_function, student, teacher, x)
        compiled_loss, compiled_grad = both(compiled, student, teacher, x)
        assert error(compiled_loss, loss) < 4 * FLOOR[torch.float32]
        assert error(compiled_grad, grad) < 4 * FLOOR[torch.float32]
    assert counter.frame_count <= 2
    if name == "normalizer of features":  # which no op is told
        assert compiled(student, teacher, -1.5).isnan()
    elif backend_name == "cpu":
        with pytest.raises((RuntimeError, ValueError), match=r"(\w+): a?.* numbers? .*wanted, got -"):
            compiled(student, teacher, -1.5)


@pytest.mark.parametrize("kind", [int, float], ids=["int", "float"])
def test_compile_with_a_normalizer_that_changes(kind):
    """A graph has its numbers built in: after the first change it is a symbol, and compiled no more."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda s, t, n: functional.kl_div(s, t, normalizer=n), fullgraph=True, backend=counter
    )  # fmt: skip
    student, teacher = torch.randn(4, 10), torch.randn(4, 10)
    for normalizer in map(kind, (3, 5, 7, 11, 13, 2, 9, 8, 20, 40)):
        loss, grad = both(lambda s, t, n=normalizer: functional.kl_div(s, t, normalizer=n), student, teacher)
        compiled_loss, compiled_grad = both(compiled, student, teacher, normalizer)
        assert error(compiled_loss, loss) < FLOOR[torch.float32]
        assert error(compiled_grad, grad) < FLOOR[torch.float32]
    assert counter.frame_count <= 2
    with pytest.raises((RuntimeError, ValueError), match="normalizer: a positive finite number wanted"):
        compiled(student, teacher, kind(-1))


def test_compile_refuses_inplace():
    compiled = torch.compile(lambda s, t: functional.kl_div(s * 2, t, inplace=True), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"inplace: not under torch\.compile"):
        compiled(torch.randn(3, 5, requires_grad=True), torch.randn(3, 5))


def test_compile_module():
    module = fastkd.KLDivLoss(temperature=3.0)
    student, teacher = torch.randn(4, 20), torch.randn(4, 20)
    loss, grad = both(module, student, teacher)
    compiled_loss, compiled_grad = both(torch.compile(module, fullgraph=True), student, teacher)
    assert torch.equal(compiled_loss, loss)
    assert error(compiled_grad, grad) < FLOOR[torch.float32]


def test_export_with_a_dynamic_batch():
    class Evaluate(torch.nn.Module):
        def forward(self, student, teacher):
            return functional.kl_div(student, teacher, temperature=2.0, reduction="none")

    batch = torch.export.Dim("batch", min=2)
    example = torch.randn(4, 50), torch.randn(4, 50)
    program = torch.export.export(Evaluate(), example, dynamic_shapes=({0: batch}, {0: batch}))
    student, teacher = torch.randn(7, 50), torch.randn(7, 50)
    expected = functional.kl_div(student, teacher, temperature=2.0, reduction="none")
    assert torch.equal(program.module()(student, teacher), expected)


@pytest.mark.parametrize("module", [fastkd.KDLoss, fastkd.DKDLoss, fastkd.NKDLoss])
def test_export_of_targets(module):
    batch = torch.export.Dim("batch", min=2)
    made = module(temperature=2.0, reduction="none")
    example = torch.randn(4, 50), torch.randn(4, 50), torch.randint(50, (4,))
    program = torch.export.export(made, example, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}))
    arguments = torch.randn(7, 50), torch.randn(7, 50), torch.randint(50, (7,))
    assert torch.equal(program.module()(*arguments), made(*arguments))


def test_compile_with_one_tensor_for_two_options():
    def loss(s, t, w, mask):
        relations = functional.relation_kl(s, t, student_keys=s, teacher_keys=t, mask=mask, key_mask=mask)
        return functional.kl_div(s, t, weight=w, temperature=w, teacher_temperature=w) + relations

    arguments = torch.randn(4, 6), torch.randn(4, 6), torch.rand(4) + 0.5, torch.tensor([True, False, True, True])
    plain, compiled = both(loss, *arguments), both(torch.compile(loss, fullgraph=True, backend="aot_eager"), *arguments)
    for x, y in zip(compiled, plain, strict=True):
        assert error(x, y) <= 4 * FLOOR[torch.float32]
