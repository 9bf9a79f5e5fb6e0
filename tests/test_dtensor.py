"""DTensors: of tensors that ranks share, every loss and its gradient are those of the whole tensors."""

import functools
import pickle
from pathlib import Path

import dtensor_cases
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
from dtensor_behaviours import BEHAVIOURS, Behaviours
from dtensor_ranks import compare, one_of, told

pytestmark = [
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="torch has no gloo"),
    pytest.mark.xdist_group("dtensor"),  # one process starts the ranks, once for each group of cases
]


def work(rank, ranks, store):
    with one_of(ranks, rank, store) as mesh:
        found = {str(case): told(compare, case, mesh) for case in dtensor_cases.CASES[ranks]}
        if ranks == 2:
            behaviours = Behaviours(mesh)
            found |= {name: told(getattr(behaviours, name)) for name in BEHAVIOURS}
        Path(f"{store}-{rank}").write_bytes(pickle.dumps(found))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """By rank and name what went wrong, of so many ranks: all of it runs once, as a process takes seconds to start."""

    @functools.cache
    def run(ranks):
        store = tmp_path_factory.mktemp("dtensor") / "store"
        mp.spawn(work, (ranks, store), nprocs=ranks)
        return [pickle.loads(Path(f"{store}-{rank}").read_bytes()) for rank in range(ranks)]

    return run


NAMES = [(ranks, str(case)) for ranks, cases in dtensor_cases.CASES.items() for case in cases]


def long_where_they_are_many(ranks, name):
    """Four processes take half a minute to start."""
    return pytest.param(ranks, name, id=f"{name} ({ranks} ranks)", marks=[pytest.mark.long] if ranks > 2 else [])


@pytest.mark.parametrize(("ranks", "name"), [long_where_they_are_many(*case) for case in NAMES])
def test_loss_and_gradient_are_those_of_whole_tensors(ranks, name, results):
    for rank, found in enumerate(results(ranks)):
        assert not found[name], f"rank {rank}: {found[name]}"


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_two_ranks(name, results):
    for rank, found in enumerate(results(2)):
        assert not found[name], f"rank {rank}: {found[name]}"


def test_names_are_told_apart():
    assert len(set(NAMES)) == len(NAMES)
