"""The table of cases that the suite is cut down to: nothing that it promises is lost."""

import itertools

from covering import KERNEL, LONG, ON_HOST, covering, family


def feasible():
    """Parameters that may not be combined freely, as those of tests: a case names its losses, and a loss its dtypes."""
    backends = "cpu-a", "cpu-b", "c", "d", "e"
    for backend, name, dtype, case in itertools.product(backends, range(7), range(4), range(20)):
        if (name + case) % 3 and (name + dtype) % 5:
            yield {"backend": backend, "name": name, "dtype": dtype, "case": case}


CASES = list(feasible())
COSTS = [{"d": ON_HOST, "e": LONG}.get(case["backend"], 1) for case in CASES]


def kernels(cases, of=lambda _, value: value):
    return {tuple((x, of(x, case[x])) for x in KERNEL) for case in cases if case["backend"] != "e"}


def test_every_pair_that_exists_is_covered():
    def pairs(cases):
        return {pair for case in cases for pair in itertools.combinations(case.items(), 2)}

    chosen = [CASES[i] for i in covering(CASES, COSTS)]
    assert pairs(chosen) == pairs(CASES)
    assert len(chosen) < len(CASES) / 8


def test_every_triple_that_exists_is_covered_by_more():
    """But for those of a loss and a backend that takes long; the CPU's instruction sets count as one."""

    def triples(cases):
        alike = [{name: family(name, value) for name, value in case.items()} for case in cases]
        found = {triple for case in alike for triple in itertools.combinations(case.items(), 3)}
        return {x for x in found if "name" not in dict(x) or dict(x).get("backend") not in ("d", "e")} | kernels(cases)

    pairs = covering(CASES, COSTS)
    more = covering(CASES, COSTS, 3, begun=pairs)
    assert not set(pairs) & set(more)
    assert triples([CASES[i] for i in (*pairs, *more)]) == triples(CASES)
    assert len(more) < len(CASES) / 2


def test_every_kernel_is_covered_where_kernels_are_compiled():
    """By pairs on the CPU with one instruction set or another, and by triples with all of them."""
    assert kernels([CASES[i] for i in covering(CASES, COSTS)], family) == kernels(CASES, family)


def test_the_choice_is_always_the_same_and_leaves_what_is_long_to_others():
    """Processes that share the tests collect them each for itself."""
    chosen = covering(CASES, COSTS)
    assert chosen == covering(list(map(dict, CASES)), COSTS)
    long = sum(COSTS[i] == LONG for i in chosen)
    assert long == len({case["case"] for case in CASES})  # its pairs with the longest list, and no more


def test_values_that_cannot_be_hashed_and_values_that_are_equal():
    unhashable = [1], [1]
    assert covering([{"x": value} for value in unhashable], [1, 1]) == [0, 1]
    assert covering([{"x": 1}, {"x": True}, {"x": 1}], [1, 1, 1]) == [0, 1]
