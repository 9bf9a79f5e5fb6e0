"""fastkd.integrations.trl beside TRL itself: the losses, and a training run of each trainer."""

import copy
import inspect
from unittest import mock

import datasets
import pytest
import tokenizers
import torch
import transformers
from torch.distributed.tensor import Shard, distribute_tensor
from trl import DistillationConfig
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

from fastkd import functional
from fastkd.integrations import trl as ours

B, L, V = 3, 11, 50
THEIR_GKD_LOSS, THEIR_HEAD_LOSS = GKDTrainer.generalized_jsd_loss, distillation_trainer._chunked_divergence_loss


def drawn(*size, learns=True, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).requires_grad_(learns)


LABELS = torch.where(torch.arange(B * L).view(B, L) % 3 == 0, -100, 7)


@pytest.mark.parametrize("beta", [0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [None, LABELS], ids=["all rows", "labels"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)], ids=["none", "int", "tensor"])
def test_gkd(beta, labels, reduction, count):
    student, teacher, found = drawn(B, L, V), drawn(B, L, V, learns=False, seed=1), []
    for loss_function in (ours.generalized_jsd_loss, THEIR_GKD_LOSS):
        loss = loss_function(student, teacher, labels, beta, 2.0, reduction, count)
        found.append((loss.detach(), torch.autograd.grad(loss, student)[0]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [None, 17, torch.tensor(17)], ids=["none", "int", "tensor"])
@pytest.mark.parametrize("more", [{}, {"scale": 0.5, "softcap": 3.0, "bias": True}], ids=["plain", "more"])
def test_heads(beta, count, more):
    hidden, weight, bias = drawn(B, L, 8), drawn(V, 8, seed=1), drawn(V, seed=2)
    teacher = drawn(B, L, 12, learns=False, seed=3), drawn(V, 12, learns=False, seed=4)
    options = {"num_items_in_batch": count, "temperature": 2.0}
    if more:
        for side, of_bias in (("student", bias), ("teacher", drawn(V, learns=False, seed=5))):
            options |= {
                f"{side}_lm_head_bias": of_bias,
                f"{side}_logit_scale": more["scale"],
                f"{side}_final_logit_softcapping": more["softcap"],
            }
    leaves, found = (hidden, weight, bias) if more else (hidden, weight), []
    for loss_function in (ours.chunked_divergence_loss, THEIR_HEAD_LOSS):
        loss, entropy, valid = loss_function(hidden, teacher[0], weight, teacher[1], LABELS != -100, beta, **options)
        found.append([loss.detach(), entropy.detach(), valid, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_heads_that_are_sharded(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, found = torch.distributed.init_device_mesh("cpu", (1,)), []
        hidden, weight, teacher = drawn(B, L, 8), drawn(V, 8, seed=1), drawn(V, 8, seed=2)
        of_teacher = drawn(B, L, 8, seed=3)
        sharded = [distribute_tensor(x.detach(), mesh, [Shard(0)]).requires_grad_() for x in (weight, teacher)]
        for s, t in ((weight, teacher), sharded):
            loss, *_ = ours.chunked_divergence_loss(hidden, of_teacher, s, t, LABELS != -100, 0.3)
            grads = torch.autograd.grad(loss, (hidden, s))
            found.append([loss.detach(), grads[0], grads[1].full_tensor() if s is sharded[0] else grads[1]])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)
    finally:
        torch.distributed.destroy_process_group()


def test_heads_that_deepspeed_has_sharded_are_an_error():
    hidden, weight = drawn(B, L, 8), torch.nn.Parameter(torch.empty(0))
    weight.ds_id = 3
    with pytest.raises(RuntimeError, match="lm_head: DeepSpeed's ZeRO-3 has sharded it"):
        ours.chunked_divergence_loss(hidden, hidden, weight, weight, LABELS != -100, 0.5)


def test_nothing_counts():
    hidden, weight = drawn(B, L, 8), drawn(V, 8, seed=1)
    loss, entropy, valid = ours.chunked_divergence_loss(hidden, hidden, weight, weight, torch.zeros(B, L), 0.5)
    assert (loss, entropy, valid) == (0, 0, 0)
    assert ours.generalized_jsd_loss(hidden, hidden.detach(), torch.full((B, L), -100)) == 0


def test_the_arguments_are_theirs():
    for mine, theirs in (
        (ours.generalized_jsd_loss, THEIR_GKD_LOSS),
        (ours.chunked_divergence_loss, THEIR_HEAD_LOSS),
    ):
        of = [inspect.signature(x).parameters for x in (mine, theirs)]
        assert [(x.name, x.default) for x in of[0].values()] == [(x.name, x.default) for x in of[1].values()]


def test_patched_and_not():
    before = GKDTrainer.generalized_jsd_loss
    ours.patch()
    ours.patch()
    assert GKDTrainer.generalized_jsd_loss is ours.generalized_jsd_loss
    assert distillation_trainer._chunked_divergence_loss is ours.chunked_divergence_loss
    ours.unpatch()
    ours.unpatch()
    assert GKDTrainer.generalized_jsd_loss is before is THEIR_GKD_LOSS
    assert distillation_trainer._chunked_divergence_loss is THEIR_HEAD_LOSS
    with pytest.raises(ValueError, match="reduction: 'batchmean', 'mean' or 'sum' wanted, got 'none'"):
        ours.generalized_jsd_loss(drawn(2, 3, 4), drawn(2, 3, 4), reduction="none")
    with pytest.raises(AttributeError, match="has no attribute 'SFTTrainer'"):
        ours.SFTTrainer  # noqa: B018


@pytest.fixture(autouse=True)
def unpatched():
    yield
    ours.unpatch()


# Training runs

WORDS = ["a", "teacher", "tells", "its", "student", "which", "word", "comes", "next", "and", "why", "that", "one"]


def tokenizer():
    names = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>", *WORDS]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({x: i for i, x in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    found.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    return found


def language_model(width, seed):
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = transformers.LlamaConfig(vocab_size=5 + len(WORDS), max_position_embeddings=64, **sizes, **tokens)
    return transformers.LlamaForCausalLM(config)


def options(folder):
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "disable_tqdm": True, "report_to": "none", "max_steps": 3,
        "save_strategy": "no", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "learning_rate": 1e-2, "gradient_checkpointing": False, "seed": 3,
    }  # fmt: skip


def trained(trainer):
    trainer.train()
    logs = [{k: v for k, v in x.items() if k in ("loss", "grad_norm", "entropy")} for x in trainer.state.log_history]
    return logs, [x.detach().clone() for x in trainer.model.parameters()]


def agree(runs):
    (logs, parameters), (their_logs, theirs) = runs
    assert len(logs) == len(their_logs) > 3
    for step, their_step in zip(logs, their_logs, strict=True):
        assert step == pytest.approx(their_step, rel=1e-4, abs=1e-6)
    for x, y in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def runs_of(make, patched):
    """By a subclass or a patch, and by TRL alone."""
    found = []
    for mine in (True, False):
        if mine and patched:
            ours.patch()
        spies = [mock.patch.object(functional, name, wraps=getattr(functional, name)) for name in ("js_div", "kd_loss")]
        with spies[0] as one, spies[1] as other:
            found.append(trained(make(mine and not patched)))
            assert (one.called or other.called) is mine
        ours.unpatch()
    return found


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "subclass"])
def test_gkd_trainer(tmp_path, patched):
    words = [" ".join(WORDS[i : i + 4]) for i in range(8)]
    turns = [[{"role": "user", "content": x}, {"role": "assistant", "content": x}] for x in words]
    first, teacher = language_model(8, 0), language_model(16, 1)

    def make(subclass):
        arguments = GKDConfig(**options(tmp_path), lmbda=0.0, beta=0.3, max_length=32)
        return (ours.GKDTrainer if subclass else GKDTrainer)(
            model=copy.deepcopy(first), teacher_model=teacher, args=arguments, processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"messages": turns}),
        )  # fmt: skip

    agree(runs_of(make, patched))


@pytest.mark.parametrize("patched", [True, False], ids=["patched", "subclass"])
def test_distillation_trainer(tmp_path, patched):
    prompts = [" ".join(WORDS[i : i + 3]) for i in range(8)]
    first, teacher = language_model(8, 0), language_model(16, 1)

    def make(subclass):
        arguments = DistillationConfig(**options(tmp_path), beta=0.3, max_completion_length=6, temperature=1.3)
        of = ours.DistillationTrainer if subclass else distillation_trainer.DistillationTrainer
        return of(
            model=copy.deepcopy(first), teacher_model=teacher, args=arguments, processing_class=tokenizer(),
            train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
        )  # fmt: skip

    agree(runs_of(make, patched))
