"""Which of a test's cases stand for all: so many that every two values of its parameters occur together.

Nearly every fault shows with one value of one parameter, or with two that meet: a kernel that is wrong for one dtype, a
backend that forgets an option. Three parameters of a few dozen values have thousands of cases and a few hundred pairs.
Beside pairs, every backend meets every loss in every dtype, as that is what a kernel is compiled for, on the CPU with
one instruction set or another; Triton's interpreter, which compiles nothing, has pairs alone. ``make test-sweep`` goes
on until every three values have occurred together. Of three kinds of three it has some: where a test is marked
``of_each_kind``, those of one divergence of each kind; of CUDA's kernels on the host, which take five times as long as
the CPU's, a loss meets no two more, as to them it is a functor in kernels that are the same for all; and the CPU's
instruction sets, which are the same sources, count as one, but that each of them meets every loss in every dtype. ``make test ARGS="--part all"`` has all cases, and
``make mutations`` tells which planted faults are found by pairs.

Libraries that make such tables (allpairspy, covertable) start from parameters that may be combined freely. Ours may
not: a case names its losses and dtypes, and where told so by a filter allpairspy 2.5.1 left out 173 of the pairs of
``test_relations.py::test_matches_float64`` that exist. So the table is chosen from the cases that exist.
"""

import heapq
import itertools

KERNEL = ("backend", "name", "dtype")
LONG = 20  # what a case costs that Triton's interpreter runs, where one of the CPU costs 1: it has pairs alone
ON_HOST = 5  # one that runs CUDA's kernels on the host


def family(name, value):
    """A value as threes have it."""
    is_cpu = name in ("backend", "kernel") and isinstance(value, str) and value.startswith("cpu-")
    return "cpu" if is_cpu else value


def covering(cases, costs, together=2, begun=()):
    """Indices of the cases, dictionaries of the same parameters, that cover all pairs, or however many values are to
    occur together: those that a greedy choice finds, which takes the case that covers most for what it costs. The same
    every time. begun: cases that are there already; the others that are needed are returned."""
    numbers = {}

    def number(value):
        """Equal values have equal numbers, in the order of their appearance."""
        try:
            return numbers.setdefault((type(value), value), len(numbers))
        except TypeError:  # not hashable
            return numbers.setdefault(id(value), len(numbers))

    def numbered(case):
        return [(name, number(value)) for name, value in case.items()]

    covered_by = []
    for case, cost in zip(cases, costs, strict=True):
        found, alike = numbered(case), numbered({name: family(name, value) for name, value in case.items()})
        covered = set(itertools.combinations(alike if together > 2 else found, min(together, len(found))))
        if together > 2 and cost >= ON_HOST:
            covered = {values for values in covered if not {"backend", "name"} <= {key for key, _ in values}}
        if set(KERNEL) <= set(case) and cost < LONG:
            covered.add(tuple(x for x in (found if together > 2 else alike) if x[0] in KERNEL))
        covered_by.append(covered)
    left, chosen = set().union(*covered_by).difference(*(covered_by[i] for i in begun)), []
    best = [(-len(covered) / cost, i) for i, (covered, cost) in enumerate(zip(covered_by, costs, strict=True))]
    heapq.heapify(best)
    while left:
        _, i = heapq.heappop(best)
        gain = len(covered_by[i] & left) / costs[i]
        if gain and best and gain < -best[0][0]:  # others have become better
            heapq.heappush(best, (-gain, i))
        elif gain:
            chosen.append(i)
            left -= covered_by[i]
    return sorted(chosen)
