"""Heads that lie sharded over ranks: gradients are those that FSDP2 makes where the model calls the head itself."""

import datetime
import functools
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tolerances import FLOOR, error

from fastkd import LinearLogits, functional

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.xdist_group("dtensor"),
]
V, H = 11, 6


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(4, H), torch.nn.Linear(H, V)

    def forward(self, x, makes_logits):
        hidden = self.body(x).tanh()
        return self.head(hidden) if makes_logits else hidden


def sharded(model, mesh):
    from torch.distributed.fsdp import fully_shard

    for part in (model.body, model.head, model):
        fully_shard(part, mesh=mesh)
    return model


def in_half_precision(mesh, rank):
    """FSDP2 computes in another dtype than it keeps: the head follows the hidden states."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(0)
    model = Model()
    for part in (model.body, model.head):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    hidden = model(torch.randn(5 + rank, 4), False)
    assert hidden.dtype is torch.bfloat16
    loss = functional.kl_div(LinearLogits(hidden, model.head.weight, model.head.bias), torch.randn(5 + rank, V))
    loss.backward()
    assert model.head.weight.grad.dtype is torch.float32
    assert model.head.weight.grad.to_local().isfinite().all()


def same_as_fsdp(loss, mesh, rank, frozen):
    torch.manual_seed(0)
    one, other, teacher = Model(), Model(), Model().requires_grad_(False)
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        model.head.requires_grad_(not frozen)
    one, other, teacher = (sharded(model, mesh) for model in (one, other, teacher))
    x = torch.randn(5 + rank, 4, generator=torch.Generator().manual_seed(rank))  # each rank has rows of its own
    expected = loss(one(x, True), teacher(x, True))
    expected.backward()
    sides = [LinearLogits(model(x, False), model.head.weight, model.head.bias) for model in (other, teacher)]
    assert type(sides[0].weight).__name__ == "DTensor"
    found = loss(*sides)
    found.backward()
    assert error(found.detach(), expected.detach()) <= 4 * FLOOR[torch.float32]
    for name, x in one.named_parameters():
        grad = dict(other.named_parameters())[name].grad
        if x.grad is None:
            assert grad is None, name
            continue
        assert grad.placements == x.grad.placements, name
        assert error(grad.to_local(), x.grad.to_local()) <= 16 * FLOOR[torch.float32], name


LOSSES = {
    "kl_div": functional.kl_div,
    "kd_loss": lambda s, t: functional.kd_loss(s, t, torch.zeros(len(getattr(s, "hidden", s)), dtype=torch.int64)),
    "js_div": functools.partial(functional.js_div, reduction="sum", temperature=2.0),
}


def work(rank, store):
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    try:
        meshes = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        in_half_precision(meshes[0], rank)
        for mesh in meshes:
            for name, loss in LOSSES.items():
                for frozen in (False, True):
                    try:
                        same_as_fsdp(loss, mesh, rank, frozen)
                    except Exception as problem:
                        raise AssertionError(f"{name}, frozen {frozen}, {mesh}: {traceback.format_exc()}") from problem
    finally:
        dist.destroy_process_group()


def test_gradients_are_those_of_fsdp(tmp_path):
    """Sharded alone, and replicated besides; a head that learns and one that is frozen."""
    mp.spawn(work, (str(tmp_path / "store"),), nprocs=2)
