"""A relation of one's own, in a few lines of C++ and without a change of fastkd's: csrc/math/relation.h says how."""

from pathlib import Path

import pytest
import torch
from cuda_tools import Compiler, HostCompiler
from tolerances import error

from fastkd import _library
from fastkd.ops.numbers import as_tensor

RELATION = """
#include <cmath>
#include "math/relation.h"

namespace fastkd::FASTKD_ISA {

// loss = 1/N^2 sum w (log d_s - log d_t)^2
template <class T>
class LogDistance {
 public:
  FASTKD_HD LogDistance(const RelationOptions& options, const RelationSums&) : scale_(T(4 * loss_scale(options))) {}
  FASTKD_HD static double loss_scale(const RelationOptions& options) { return 1 / (double(options.N) * options.N); }
  FASTKD_HD static bool measures(const RelationOptions&) { return false; }
  FASTKD_HD static T measure(T squared) { return square_root(squared < T(1e-12) ? T(1e-12) : squared); }
  FASTKD_HD void pair(T s, T t, T w, T& loss, T&) const { loss += w * ratio(s, t) * ratio(s, t); }
  FASTKD_HD T weight(T s, T t, T w) const { return s > 0 ? scale_ * w * ratio(s, t) / (s * s) : T(0); }

  FASTKD_HD static double unclamped_slope(const RelationOptions&, const RelationSums&) { return 0; }
  FASTKD_HD static bool matters(const RelationOptions&, double, double, double) { return false; }
  FASTKD_HD T slope_weight(T, const RelationOptions&) const { return 0; }

 private:
  FASTKD_HD static T ratio(T s, T t) { return s > 0 && t > 0 ? T(std::log(s / t)) : T(0); }
  T scale_;
};

}  // namespace fastkd::FASTKD_ISA

#define FASTKD_MORE_RELATIONS(X) X(LogDistance)
"""
NUMBER = 1  # after RkdDistance
STORAGES = ("BFloat16", "Half", "Float", "Double")
TORCH = Path(torch.__file__).parent
PROMISED = {torch.float32: 5e-6, torch.float64: 1e-11}


def load(compiler, namespace, *sources):
    """The op of a library of these sources and the relation."""
    relation = compiler.folder / "log_distance.h"
    relation.write_text(RELATION)
    options = [
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-fopenmp-simd",
        f"-DFASTKD_NAMESPACE={namespace}",
        "-include",
        relation,
    ]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-isystem", TORCH / "include"]
    links = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-Wl,--version-script=csrc/exports.map"]
    objects = []
    for source in sources:
        path, *own = source.split()
        if path.endswith(".o"):
            objects.append(path)
        else:
            objects.append(compiler.build(f"{len(objects)}.o", *options, *own, "-c", path))
    _library.define(namespace)
    torch.ops.load_library(compiler.build(f"{namespace}.so", "-shared", *objects, *links))
    return getattr(torch.ops, namespace).pairs_fwd.default


@pytest.fixture(scope="module")
def cpu(tmp_path_factory):
    compiler = Compiler(tmp_path_factory.mktemp("cpu"))
    return load(compiler, "fastkd_extension_cpu", "csrc/cpu/pairs.cpp", "csrc/cpu/pairs_kernel.cpp")


@pytest.fixture(scope="module")
def cusim(tmp_path_factory):
    compiler = HostCompiler(tmp_path_factory.mktemp("cusim"))
    kernels = (f"csrc/testing/cusim_pairs.cpp -DFASTKD_PAIRS_STORAGE={name}" for name in STORAGES)
    return load(
        compiler, "fastkd_extension_cusim", "csrc/cuda/pairs.cpp -DFASTKD_CUSIM", *kernels,
        "csrc/testing/cusim_reduce.cpp", str(compiler.cusim()),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", PROMISED, ids=str)
@pytest.mark.parametrize("options", ["plain", "count and weight"])
@pytest.mark.parametrize("several_tiles", [False, True])
@pytest.mark.parametrize("schedule", [pytest.param(x, marks=pytest.mark.xdist_group(x)) for x in ("cpu", "cusim")])
@pytest.mark.long  # compiles a schedule
def test_log_distances(request, schedule, several_tiles, options, dtype):
    N = {"cpu": (40, 1400), "cusim": (40, 150)}[schedule][several_tiles]
    generator = torch.Generator().manual_seed(9)
    student, teacher = (torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype) for D in (12, 9))
    student[1] = student[0] + 1e-3  # near
    weight, there = torch.ones(N, dtype=torch.float64), N
    if options != "plain":
        weight, there = torch.rand(N, generator=generator, dtype=torch.float64), N - N // 3
    x = student[:there].double().requires_grad_()
    expected = naive(x, teacher[:there].double(), weight[:there].to(dtype).double())
    given = (None, None) if options == "plain" else (torch.tensor([there]), weight.to(dtype))
    loss, grad = request.getfixturevalue(schedule)(student, teacher, *given, NUMBER, as_tensor(1.0), False, True)
    assert error(loss, expected.detach()) <= PROMISED[dtype]
    assert error(grad[:there], torch.autograd.grad(expected, x)[0]) <= PROMISED[dtype]
    assert not grad[there:].any()


def naive(student, teacher, weight):
    i, j = torch.triu_indices(len(student), len(student), 1)
    s, t = ((x[i] - x[j]).norm(dim=1) for x in (student, teacher))
    return ((weight[i] + weight[j]) * (s.log() - t.log()).square()).sum() / len(student) ** 2
