"""fastkd in other people's training loops, beside what these compute themselves."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastkd

transformers = pytest.importorskip("transformers")

from fastkd.integrations.transformers import TeacherLoss  # noqa: E402

V, LENGTH = 40, 12


def language_model(width, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=V, max_position_embeddings=LENGTH, use_cache=True, **sizes)
    )


def samples(count, seed=0):
    """Of several lengths, padded, the first tokens of each without a label."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in torch.randint(4, LENGTH + 1, (count,), generator=generator).tolist():
        tokens, at = torch.randint(V, (LENGTH,), generator=generator), torch.arange(LENGTH)
        labels = torch.where((at < length) & (at >= length // 3), tokens, -100)
        found.append({"input_ids": tokens, "attention_mask": (at < length).long(), "labels": labels})
    return found


def batch(of):
    return {name: torch.stack([x[name] for x in of]) for name in of[0]}


def train(student, data, folder, loss, **options):
    options = {"per_device_train_batch_size": 4, "learning_rate": 0.1, "max_grad_norm": 0.0} | options
    arguments = transformers.TrainingArguments(
        output_dir=folder, use_cpu=True, disable_tqdm=True, report_to="none", save_strategy="no", max_steps=2,
        optim="sgd", lr_scheduler_type="constant", logging_steps=1, **options,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model=student, args=arguments, train_dataset=data, eval_dataset=data, compute_loss_func=loss
    )
    trainer.train()
    return trainer


LOSSES = {
    "kl_div": functools.partial(fastkd.functional.kl_div, temperature=2.0),
    "module": fastkd.JSDivLoss(beta=0.3),
    "kd_loss": fastkd.KDLoss(temperature=2.0, hard_weight=0.3),
}


def by_hand(name, student, teacher, labels, count):
    """In plain PyTorch, of logits that are a position apart from their labels."""
    s, t, labels = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    s, t, labels = (x[labels != -100] for x in (s, t, labels))
    kl = F.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="sum", log_target=True) * 4
    if name == "kl_div":
        return kl / count
    return (0.5 * kl + 0.3 * F.cross_entropy(s, labels, reduction="sum")) / count


@pytest.mark.parametrize("name", ["kl_div", "kd_loss"])
def test_the_loss_is_that_of_labelled_positions(name):
    student, teacher, given = language_model(8, 0), language_model(16, 1), batch(samples(5))
    inputs = {x: given[x] for x in ("input_ids", "attention_mask")}
    loss = TeacherLoss(student, teacher, LOSSES[name])
    for count in (None, torch.tensor(17)):
        outputs = student(**inputs, num_items_in_batch=count)
        found = loss(outputs, given["labels"], num_items_in_batch=count)
        labelled = (given["labels"][:, 1:] != -100).sum() if count is None else count
        right = by_hand(name, student(**inputs).logits, teacher(**inputs).logits.detach(), given["labels"], labelled)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(x, list(student.parameters())) for x in (found, right)]
        for ours, of_right in zip(*grads, strict=True):
            torch.testing.assert_close(ours, of_right, rtol=1e-4, atol=1e-6)
    assert all(x.grad is None for x in teacher.parameters())


def test_labels_that_are_shifted_already_and_arguments_by_place():
    student, teacher, given = language_model(8, 0), language_model(16, 1), batch(samples(5))
    loss = TeacherLoss(student, teacher, LOSSES["kl_div"])
    inputs = given["input_ids"], given["attention_mask"]
    found = loss(student(*inputs), given["labels"])
    shifted = F.pad(given["labels"][:, 1:], (0, 1), value=-100)
    again = loss(student(*inputs, shift_labels=shifted), None)
    torch.testing.assert_close(again, found)


@pytest.mark.parametrize("name", LOSSES)
def test_a_step_is_the_same_however_it_is_divided(tmp_path, name):
    teacher, data, found = language_model(16, 1), samples(16), []
    for size, steps in ((8, 1), (2, 4)):
        student = language_model(8, 0)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = train(student, data, tmp_path, TeacherLoss(student, teacher, LOSSES[name]), **options)
        found.append([*(x.detach() for x in student.parameters()), torch.tensor(trainer.state.log_history[0]["loss"])])
        assert trainer.evaluate()["eval_loss"] > 0
    before = list(language_model(8, 0).parameters())
    assert not torch.equal(found[0][0], before[0])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


RANKS = """
import sys
sys.path.insert(0, {tests!r})
import torch
import test_integrations as at
student, teacher = at.language_model(8, 0), at.language_model(16, 1)
loss = at.TeacherLoss(student, teacher, at.LOSSES["kd_loss"])
trainer = at.train(student, at.samples(16), {folder!r}, loss, per_device_train_batch_size=4, ddp_backend="gloo")
if trainer.args.process_index == 0:
    torch.save([x.detach() for x in student.parameters()], {folder!r} + "/parameters.pt")
"""


@pytest.mark.long
def test_a_step_is_the_same_on_two_processes(tmp_path):
    script, root = tmp_path / "ranks.py", Path(fastkd.__file__).parents[1]
    script.write_text(RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert run.returncode == 0, run.stderr
    student = language_model(8, 0)
    loss = TeacherLoss(student, language_model(16, 1), LOSSES["kd_loss"])
    train(student, samples(16), tmp_path, loss, per_device_train_batch_size=8)
    for one, two in zip(student.parameters(), torch.load(tmp_path / "parameters.pt"), strict=True):
        torch.testing.assert_close(one.detach(), two, rtol=1e-4, atol=1e-5)


class Classifier(torch.nn.Module):
    """Not of transformers; it returns a dict, and takes what the teacher does not."""

    def __init__(self, width):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 5))

    def forward(self, pixels, dropped=None):
        return {"logits": self.layers(pixels)}


class Teacher(Classifier):
    def forward(self, pixels):
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.layers(pixels)


def test_models_of_ones_own(tmp_path):
    torch.manual_seed(0)
    first, teacher = Classifier(4), Teacher(8).train()
    data = [{"pixels": torch.randn(6), "labels": torch.tensor(i % 5)} for i in range(16)]
    found = []
    for size, steps in ((8, 1), (2, 4)):
        student = copy.deepcopy(first)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options["label_names"] = ["labels"]
        train(student, data, tmp_path, TeacherLoss(student, teacher, LOSSES["kd_loss"]), **options)
        found.append(list(student.parameters()))
    torch.testing.assert_close(*found)


def test_a_teacher_that_a_device_map_has_placed_stays_there():
    student, teacher = Classifier(4), Teacher(8)
    teacher.layers.to("meta")
    loss, pixels = TeacherLoss(student, teacher, LOSSES["kl_div"]), torch.randn(7, 6)
    teacher.hf_device_map = {"": "meta"}
    teacher.layers.forward = lambda x: torch.zeros(len(x), 5)
    assert loss(student(pixels), None) > 0
    assert next(teacher.parameters()).is_meta


def test_without_labels_every_row_counts():
    torch.manual_seed(0)
    student, teacher, pixels = Classifier(4), Teacher(8), torch.randn(7, 6)
    loss = TeacherLoss(student, teacher, LOSSES["kl_div"], gradient_accumulation_steps=4)
    found = loss(student(pixels, dropped=3), None)
    with torch.no_grad():
        of_teacher = teacher.layers(pixels)
    torch.testing.assert_close(found * 4, LOSSES["kl_div"](student.layers(pixels), of_teacher))


def test_bad_input():
    student, teacher = Classifier(4), Teacher(8)
    with pytest.raises(TypeError, match=r"student: a torch\.nn.Module wanted, got str"):
        TeacherLoss("student", teacher, LOSSES["kl_div"])
    with pytest.raises(TypeError, match=r"teacher: a torch\.nn.Module wanted, got str"):
        TeacherLoss(student, "teacher", LOSSES["kl_div"])
    with pytest.raises(TypeError, match="loss: a module or function of fastkd wanted, got str"):
        TeacherLoss(student, teacher, "kl_div")
    with pytest.raises(TypeError, match="shift: True, False or None wanted, got 1"):
        TeacherLoss(student, teacher, LOSSES["kl_div"], shift=1)
    with pytest.raises(ValueError, match="gradient_accumulation_steps: a whole number of at least 1 wanted, got 0"):
        TeacherLoss(student, teacher, LOSSES["kl_div"], gradient_accumulation_steps=0)
    loss, pixels = TeacherLoss(student, teacher, LOSSES["kd_loss"]), torch.randn(3, 6)
    outputs = student(pixels)
    with pytest.raises(ValueError, match="labels: KDLoss wants a label for each row, and there are none"):
        loss(outputs, None)
    with pytest.raises(ValueError, match="student: it has not been called since the last loss"):
        loss(outputs, torch.zeros(3, dtype=torch.int64))
    student(pixels)
    with pytest.raises(ValueError, match="student: no logits in what it returned, which is dict"):
        loss({"loss": torch.zeros(())}, torch.zeros(3, dtype=torch.int64))
    loss.remove()
    student(pixels)
    with pytest.raises(ValueError, match="student: it has not been called since the last loss"):
        loss(outputs, torch.zeros(3, dtype=torch.int64))
