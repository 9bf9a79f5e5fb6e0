"""The divergences between a row of student and a row of teacher logits: one entry each, from which all else follows.

An entry's ``name`` is that of its function in :mod:`fastkd.functional`, of its reference in plain PyTorch
(``fastkd/reference/divergences.py``, ``_NAME``), of Triton's function (``fastkd/triton/divergences.py``, ``NAME``) and
of its C++ header (``csrc/math/divergences/NAME.h``). Its number in the ops is its place in the list; the build runs
this file, which prints C++ headers. Nothing is imported from torch, as the build runs it without.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable


ENDLESS = sys.float_info.max


@dataclass
class Parameter:
    """The number that a divergence has of its own. One for all rows, or one per row. No tuple: torch.compile would take
    all of its numbers for ones that may change, and compile twice."""

    name: str
    default: float
    low: float
    high: float
    ends: dict[float, str]  # what the divergence is, by convention, where the parameter is this number
    per_row: bool = True  # else one for all rows

    @property
    def range(self) -> str:
        """In an error."""
        return f"from {self.low:g} to {self.high:g}" if self.high < ENDLESS else f"of at least {self.low:g}"


class Divergence(NamedTuple):
    """What is known about a divergence besides its mathematics."""

    name: str
    functor: str
    centred: bool  # the slopes of a row add up to 0, so that their sum need not be known
    teacher_entropy: bool = False  # the teacher's entropy is a part of it
    parameter: Parameter | None = None
    second: Parameter | None = None
    given: str = "Probabilities"  # what it is given of a class; see csrc/math/divergence.h
    two_sums: bool = False  # its loss is no sum over classes


REGISTRY = {
    entry.name: entry
    for entry in (
        Divergence("kl_div", "ForwardKL", centred=True),
        Divergence("soft_cross_entropy", "SoftCrossEntropy", centred=True, teacher_entropy=True),
        Divergence("reverse_kl_div", "ReverseKL", centred=False),
        Divergence(
            "js_div",
            "JensenShannon",
            centred=False,
            parameter=Parameter("beta", 0.5, 0.0, 1.0, {0.0: "kl_div", 1.0: "reverse_kl_div"}),
        ),
        Divergence(
            "symmetric_kl_div",
            "SymmetricKL",
            centred=False,
            parameter=Parameter("student_weight", 0.5, 0.0, 1.0, {0.0: "kl_div", 1.0: "reverse_kl_div"}),
        ),
        Divergence(
            "skew_kl_div",
            "SkewKL",
            centred=False,
            parameter=Parameter("alpha", 0.1, 0.0, 1.0, {0.0: "kl_div"}),
        ),
        Divergence(
            "skew_reverse_kl_div",
            "SkewReverseKL",
            centred=False,
            parameter=Parameter("alpha", 0.1, 0.0, 1.0, {0.0: "reverse_kl_div"}),
        ),
        Divergence("total_variation", "TotalVariation", centred=False),
        Divergence("negative_log_acceptance", "NegativeLogAcceptance", centred=False, two_sums=True),
        Divergence(
            "alpha_beta_div",
            "AlphaBeta",
            centred=False,
            parameter=Parameter("alpha", 0.2, 0.0, ENDLESS, {}),
            second=Parameter("beta", 0.7, 0.0, ENDLESS, {}),
            given="Logs",
        ),
        Divergence("bernoulli_kl_div", "BernoulliKL", centred=True, given="LogOdds"),
    )
}
# What only losses of a target have: the divergence between the classes beside it.
NON_TARGET = Divergence("non_target_kl", "NonTargetKL", centred=True, teacher_entropy=True)


class TargetLoss(NamedTuple):
    """A loss that parts a row's target from its other classes; see csrc/common/rows_params.h."""

    number: int
    parameter: Parameter
    second: Parameter | None = None


TARGET_LOSSES = {
    "dkd_loss": TargetLoss(1, Parameter("beta", 8.0, 0.0, ENDLESS, {}), Parameter("alpha", 1.0, 0.0, ENDLESS, {})),
    "nkd_loss": TargetLoss(2, Parameter("gamma", 1.5, 0.0, ENDLESS, {})),
}


class Derived(NamedTuple):
    """A divergence of the registry whose own parameter, one per row, is computed from the logits (fastkd/ops/head.py).
    The user gives another one."""

    name: str
    divergence: str
    parameter: Parameter
    second: Parameter | None = None


DERIVED = {
    entry.name: entry
    for entry in (
        Derived(
            "adaptive_kl_div",
            "symmetric_kl_div",
            Parameter("mu", 0.5, 0.0, 1.0, {1.0: "kl_div"}, per_row=False),
        ),
    )
}
BY_NAME: dict[str, Divergence | Derived] = {**REGISTRY, **DERIVED}  # what users know by name
# Those of relation_kl, which has beta and no other parameter, and compares distributions.
OF_RELATIONS = [
    name
    for name, entry in REGISTRY.items()
    if (entry.parameter is None or entry.parameter.name == "beta")
    and entry.given == "Probabilities"
    and not entry.two_sums
]
ENTRIES = [*REGISTRY.values(), NON_TARGET]  # by number
NUMBERS = {entry.name: number for number, entry in enumerate(ENTRIES)}


_PARAMETERS = {
    name: tuple(parameter for parameter in (entry.parameter, entry.second) if parameter is not None)
    for name, entry in (*BY_NAME.items(), *TARGET_LOSSES.items())
}


def parameters_of(name: str) -> tuple[Parameter, ...]:
    """Of a divergence, or of a loss of a target."""
    return _PARAMETERS[name]


def digest() -> str:
    """Which divergence has which number."""
    return ",".join(NUMBERS)


def list_header() -> str:
    """``divergence_list.h``: the enumeration of all divergences."""
    functors = " ".join(f"X({entry.functor})" for entry in ENTRIES)
    return f"""// Written by fastkd/_divergences.py.
#pragma once
#include <cstdint>

#define FASTKD_FOR_EACH_DIVERGENCE(X) {functors}

namespace fastkd {{

#define FASTKD_ENUMERATOR(name) k##name,
enum class Divergence : int64_t {{ FASTKD_FOR_EACH_DIVERGENCE(FASTKD_ENUMERATOR) kCount }};
#undef FASTKD_ENUMERATOR

struct ParameterRange {{
  const char *name, *wanted;
  double low, high;
}};
// Of each divergence's two parameters; of one that there is not, 0 alone.
inline constexpr ParameterRange kParameterRanges[][2] = {{{_ranges(ENTRIES)}}};
inline constexpr ParameterRange kTargetLossRanges[][2] = {{{_ranges(TARGET_LOSSES.values())}}};
inline constexpr const char* kDivergencesDigest = "{digest()}";

}}  // namespace fastkd"""


def _ranges(entries: Iterable[Divergence | TargetLoss]) -> str:
    def of(parameter: Parameter | None) -> str:
        p = parameter or Parameter("parameter", 0.0, 0.0, 0.0, {})
        return f'{{"{p.name}", "a number {p.range}", {p.low!r}, {p.high!r}}}'

    return ", ".join(f"{{{of(entry.parameter)}, {of(entry.second)}}}" for entry in entries)


def functors_header() -> str:
    """``divergence_functors.h``: the functors, which must be what the entries say."""
    lines = ["// Written by fastkd/_divergences.py.", "#pragma once", '#include "divergence_list.h"']
    lines += [f'#include "math/divergences/{entry.name}.h"' for entry in ENTRIES]
    lines += ["", "namespace fastkd::FASTKD_ISA {", ""]
    for entry in ENTRIES:
        facts = (("kCentred", entry.centred), ("kTeacherEntropy", entry.teacher_entropy))
        said = f'"fastkd/_divergences.py says something else of {entry.name}"'
        for fact, value in facts:
            lines.append(f"static_assert({entry.functor}<float>::{fact} == {str(value).lower()}, {said});")
        lines.append(f"static_assert(given<{entry.functor}<float>>() == Given::k{entry.given}, {said});")
        lines.append(f"static_assert(kTwoSums<{entry.functor}<float>> == {str(entry.two_sums).lower()}, {said});")
    lines += ["", "template <Divergence, class T>", "struct OfDivergence;"]
    for entry in ENTRIES:
        functor = f"{{ using type = {entry.functor}<T>; }}"
        lines.append(f"template <class T> struct OfDivergence<Divergence::k{entry.functor}, T> {functor};")
    lines += ["template <Divergence kWhich, class T>", "using FunctorOf = typename OfDivergence<kWhich, T>::type;"]
    return "\n".join([*lines, "", "}  // namespace fastkd::FASTKD_ISA"])


PRINTED = {
    "list": list_header,
    "functors": functors_header,
    "names": lambda: ";".join(entry.functor for entry in ENTRIES),
}

if __name__ == "__main__":
    print(PRINTED[sys.argv[1]](), end="")
