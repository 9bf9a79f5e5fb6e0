"""fastkd.integrations.torchdistill beside torchdistill's own losses, as its registry makes them of YAML."""

import pytest
import torch
import yaml
from torchdistill.losses import mid_level, registry

from fastkd.integrations import torchdistill as ours

B, C = 12, 10
LOGITS = "student_module_path: fc, student_module_io: output, teacher_module_path: head, teacher_module_io: output"
OUTPUTS = "student_output_path: layer, teacher_output_path: block"
PAIR = "student: {io: output, path: layer}, teacher: {io: output, path: block}"
CASES = {
    "kd": f"{{key: KDLoss, kwargs: {{{LOGITS}, temperature: 4.0, alpha: 0.3}}}}",
    "kd soft": f"{{key: KDLoss, kwargs: {{{LOGITS}, temperature: 4.0, alpha: 0}}}}",
    "kd mean": f"{{key: KDLoss, kwargs: {{{LOGITS}, temperature: 2.0, alpha: 0.3, beta: 2, reduction: mean}}}}",
    "kd sum, smoothed": f"{{key: KDLoss, kwargs: {{{LOGITS}, temperature: 2.0, alpha: 1, beta: 2, reduction: sum, "
    "label_smoothing: 0.1}}",
    "standardized": f"{{key: LogitStdKDLoss, kwargs: {{{LOGITS}, temperature: 2.0, alpha: 0.5, beta: 9}}}}",
    "dist": f"{{key: DISTLoss, kwargs: {{{LOGITS}, beta: 1.0, gamma: 2.0, tau: 4.0}}}}",
    "pkt": f"{{key: PKTLoss, kwargs: {{{LOGITS}, eps: 0.0000001}}}}",
    "rkd": f"{{key: RKDLoss, kwargs: {{{OUTPUTS}, dist_factor: 1.0, angle_factor: 2.0, reduction: mean}}}}",
    "rkd distances": f"{{key: RKDLoss, kwargs: {{{OUTPUTS}, dist_factor: 1.0, angle_factor: 0, reduction: mean}}}}",
    "at": f"{{key: ATLoss, kwargs: {{at_pairs: {{one: {{{PAIR}, weight: 3}}, two: {{{PAIR}}}}}, mode: code}}}}",
}
THEIRS = {
    "kd none": f"{{key: KDLoss, kwargs: {{{LOGITS}, temperature: 4.0, alpha: 0, reduction: none}}}}",
    "eps": f"{{key: LogitStdKDLoss, kwargs: {{{LOGITS}, temperature: 2.0, alpha: 0.5, eps: 0.1}}}}",
    "rkd sum": f"{{key: RKDLoss, kwargs: {{{OUTPUTS}, dist_factor: 1.0, angle_factor: 2.0, reduction: sum}}}}",
    "at paper": f"{{key: ATLoss, kwargs: {{at_pairs: {{one: {{{PAIR}}}}}, mode: paper}}}}",
}


@pytest.fixture(autouse=True)
def registered():
    """Their own losses stand there again after each test."""
    before = dict(registry.MIDDLE_LEVEL_LOSS_DICT)
    ours.register()
    yield
    registry.MIDDLE_LEVEL_LOSS_DICT.update(before)


def outputs():
    generator = torch.Generator().manual_seed(0)

    def drawn(*size):
        return torch.randn(size, generator=generator)

    student = {"fc": {"output": drawn(B, C)}, "layer": {"output": drawn(B, 6, 4, 4)}}
    teacher = {"head": {"output": drawn(B, C)}, "block": {"output": drawn(B, 8, 4, 4)}}
    for x in student.values():
        x["output"].requires_grad_()
    return student, teacher, torch.arange(B) % C


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_theirs(name):
    config, found = yaml.safe_load(CASES[name]), []
    mine = registry.get_mid_level_loss(config)
    assert type(mine).__module__ == ours.__name__
    for loss in (mine, getattr(mid_level, config["key"])(**config["kwargs"])):
        student, teacher, labels = outputs()
        value = loss(student, teacher, labels)
        leaves = [x["output"] for x in student.values()]
        found.append([value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_what_is_not_the_same_loss_stays_theirs():
    config = yaml.safe_load(f"{{key: SPKDLoss, kwargs: {{{OUTPUTS}, reduction: batchmean}}}}")
    assert type(registry.get_mid_level_loss(config)) is mid_level.SPKDLoss


@pytest.mark.parametrize("name", THEIRS)
def test_other_arguments_are_their_own_losses(name):
    config = yaml.safe_load(THEIRS[name])
    assert type(registry.get_mid_level_loss(config)) is getattr(mid_level, config["key"])
    with pytest.raises(ValueError, match="wanted, got"):
        getattr(ours, config["key"])(**config["kwargs"])
