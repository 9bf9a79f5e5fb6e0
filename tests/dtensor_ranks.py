"""What a rank does in the tests of DTensors: lays tensors out, and compares losses of shares with those of whole tensors."""

import contextlib
import datetime
import traceback

import torch
import torch.distributed as dist
from tolerances import FLOOR, error

LEARN = ("student", "projector_weight", "projector_bias", "student_keys")  # what has a gradient
TIMES = 4  # the floor: sums over ranks are added in another order, and their divisor is rounded by itself


def placed(mesh, x, places):
    """A leaf that is laid out so; plain where nothing says how."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    if isinstance(x, list):
        return [placed(mesh, one, places) for one in x]
    if not places or not isinstance(x, torch.Tensor):
        return x
    kinds = [Replicate() if p in "RP" else Shard(int(p)) for p in places.split()]
    x = distribute_tensor(x, mesh, kinds)
    if "P" not in places:
        return x
    kinds = [Partial() if p == "P" else kind for p, kind in zip(places.split(), kinds, strict=True)]
    share = 2.0 if mesh.get_local_rank(places.split().index("P")) == 0 else -1.0  # of two ranks: they make the whole
    return DTensor.from_local(x.to_local() * share, mesh, kinds, shape=x.shape, stride=x.stride())


def leaves(arguments):
    """Those that learn, ready for a gradient."""
    found = []
    for name in LEARN:
        x = arguments.get(name)
        for one in x if isinstance(x, list) else [x]:
            if one is not None:
                found.append(one.requires_grad_())
    return found


def whole(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def computed(case, arguments):
    """The losses that a call returns, and the gradients of its leaves."""
    learn = leaves(arguments)
    if case.before is not None:
        arguments = arguments | {"student": case.before(arguments["student"])}
    result = case.function()(**arguments)
    losses, *beside = result if isinstance(result, tuple) else (result,)
    losses = losses if isinstance(losses, list) else [losses]
    # of losses by row each counts otherwise, so that a gradient that comes to another row is seen
    total = sum((x * torch.ones_like(x).cumsum(0)).sum() if x.dim() else x for x in losses)
    total.backward()
    return [*losses, *beside], learn


def compare(case, mesh):
    from torch.distributed.tensor import DTensor, Replicate

    expected, of_whole = computed(case, case.arguments())
    given = {name: placed(mesh, x, case.places.get(name, "")) for name, x in case.arguments().items()}
    got, of_shards = computed(case, given)

    def close(x, y):
        assert error(x, y) <= TIMES * FLOOR[y.dtype]

    for x, y in zip(got, expected, strict=True):
        assert isinstance(x, DTensor)
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        close(whole(x.detach()), y.detach())
        if not x.dim():
            assert all(place == Replicate() for place in x.placements)
            assert x.item() == whole(x).item()
    for x, y in zip(of_shards, of_whole, strict=True):
        assert type(x.grad) is type(x)
        assert x.grad.dtype == x.dtype
        if isinstance(x, DTensor):
            assert x.grad.placements == tuple(Replicate() if p.is_partial() else p for p in x.placements)
        close(whole(x.grad), y.grad)


def told(function, *arguments):
    """What went wrong, or nothing."""
    try:
        function(*arguments)
    except BaseException:
        return traceback.format_exc()
    return ""


@contextlib.contextmanager
def one_of(ranks, rank, store):
    torch.set_num_threads(1)
    wait = datetime.timedelta(seconds=20)  # a rank that failed alone is not waited for much longer
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=wait)
    yield dist.init_device_mesh("cpu", (2,) if ranks == 2 else (2, 2))
    dist.destroy_process_group()
