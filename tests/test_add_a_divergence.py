"""A new divergence, added to a copy of the sources in the four places that docs/adding-a-loss.md names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tools import ROOT, Compiler

TORCH = Path(torch.__file__).parent

HEADER = """
#pragma once
#include <cmath>
#include "math/divergence.h"

namespace fastkd::FASTKD_ISA {

// 1/2 sum (sqrt p - sqrt q)^2. Its derivative by log p is -sqrt(p q) / 2, up to a multiple of p:
// (p - sqrt(p q)) / 2, which is 0 where p = q.
template <class T>
struct SquaredHellinger {
  static constexpr bool kCentred = false, kTeacherEntropy = false;
  FASTKD_HD explicit SquaredHellinger(double = 0) {}

  FASTKD_HD T loss(Element<T> e) const { return T(0.5) * difference(e) * difference(e); }
  FASTKD_HD T slope(Element<T> e) const { return T(0.5) * std::sqrt(e.p) * difference(e); }

 private:
  static FASTKD_HD T difference(Element<T> e) {  // sqrt p - sqrt q = sqrt q (e^(w / 2) - 1)
    return is_near(e.w) ? std::sqrt(e.q) * expm1_series(e.w / 2) : std::sqrt(e.p) - std::sqrt(e.q);
  }
};

}  // namespace fastkd::FASTKD_ISA
"""

ENTRY = """
        Divergence("squared_hellinger", "SquaredHellinger", centred=False),
"""

REFERENCE = '''
def _squared_hellinger(log_p, log_q, _=None):
    """1/2 sum (sqrt p - sqrt q)^2 = 1/2 sum q (e^(w / 2) - 1)^2"""
    p, q = log_p.exp(), log_q.exp()
    w = torch.where((p == 0) | (q == 0), 0.0, log_p - log_q)
    near = q * torch.expm1(w.clamp(-1, 1) / 2).square()
    far = p + q - 2 * torch.exp(torch.where((p == 0) | (q == 0), -torch.inf, (log_p + log_q) / 2))
    return torch.where((w.abs() < 1) & (p > 0) & (q > 0), near, far).sum(-1) / 2
'''

TRITON = """
@triton.jit
def squared_hellinger(p, q, w, parameter, OF_ROWS: tl.constexpr):
    half = 0.5 * w
    near = tl.sqrt(q) * (half + half * half * bregman_series(half))
    difference = tl.where(is_near(w), near, tl.sqrt(p) - tl.sqrt(q))
    return 0.5 * difference * difference, 0.5 * tl.sqrt(p) * difference
"""

# In another process: loss and gradient beside those of the reference in float64, far and near.
CHECK = """
import sys
import torch
import fastkd
from fastkd.functional import relation_kl
from fastkd.functional._logits_loss import _logits_loss
from fastkd._check import LogitsOptions

def run(backend, dtype, student, teacher, reduction):
    x = student.to(dtype).requires_grad_()
    options = LogitsOptions(2.0, 2.0, True, None, None, reduction, None, False, 0.0)
    with fastkd.backend(backend):
        loss = _logits_loss("squared_hellinger", x, teacher.to(dtype), options)
    return loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()

torch.manual_seed(1)
teacher = torch.randn(6, 300)
for student in (torch.randn(6, 300), teacher + 1e-4 * torch.randn(6, 300)):
    for reduction in ("sum", "none"):
        expected = run("torch", torch.float64, student, teacher, reduction)
        for dtype, promised in ((torch.float32, 2e-4), (torch.float64, 1e-10)):
            for found, exact in zip(run(sys.argv[1], dtype, student, teacher, reduction), expected, strict=True):
                assert (found - exact).norm() <= promised * exact.norm(), (dtype, reduction, found, exact)
x = torch.randn(9, 5)
with fastkd.backend(sys.argv[1]):
    assert relation_kl(x, 2 * x, divergence="squared_hellinger") > 0
print("right")
"""


def add(folder):
    """The new divergence, in each of the four places."""
    (folder / "csrc/math/divergences/squared_hellinger.h").write_text(HEADER)
    for path, before, text in (
        ("fastkd/_divergences.py", '        Divergence("reverse_kl_div"', ENTRY.lstrip("\n")),
        ("fastkd/reference/divergences.py", "# Each takes log p", REFERENCE.lstrip("\n") + "\n\n"),
        ("fastkd/triton/divergences.py", "# By number: each takes", TRITON.lstrip("\n") + "\n\n"),
    ):
        whole = (folder / path).read_text()
        assert whole.count(before) == 1
        (folder / path).write_text(whole.replace(before, text + before))


SOURCES = ("isa", "rows*", "scale", "relation_kl_few", "samples_kernel")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A copy with the divergence in it, and the library of the rows schedule."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("csrc", "fastkd"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "lib"))
    add(folder)
    generated = folder / "generated"
    generated.mkdir()
    for script, argument, header in (
        ("_schemas.py", "", "calls.h"),
        ("_divergences.py", "list", "divergence_list.h"),
        ("_divergences.py", "functors", "divergence_functors.h"),
    ):
        command = [sys.executable, folder / "fastkd" / script, argument]
        (generated / header).write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    compiler = Compiler(tmp_path_factory.mktemp("objects"))
    compiler.flags = [f"-I{folder / 'csrc'}", f"-I{generated}", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden"]
    compiler.flags += ["-fopenmp-simd", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
    compiler.flags += ["-DFASTKD_X86=0", "-isystem", TORCH / "include"]
    # every file of the rows schedule, what they share, and the loss of relations that walks it
    sources = [path for name in SOURCES for path in (folder / "csrc" / "cpu").glob(f"{name}.cpp")]
    objects = [compiler.build(f"{path.stem}.o", "-c", path) for path in sources]
    links = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
    library = compiler.build("rows.so", "-shared", *objects, *links)
    (folder / "fastkd" / "lib").mkdir()
    shutil.copy(library, folder / "fastkd" / "lib" / "libfastkd_cpu.so")
    return folder


@pytest.mark.long
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_divergence_of_ones_own(built, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(built), str(ROOT / "tests")])}
    check = CHECK if backend == "cpu" else "import triton_interpreter\n" + CHECK
    run = subprocess.run(
        [sys.executable, "-c", check, backend], cwd=built, env=environment, capture_output=True, text=True, check=False
    )
    assert run.stdout == "right\n", run.stderr
