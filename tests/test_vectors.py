"""The loops of the CPU's kernels over classes are loops over vectors: a condition that the compiler makes a branch of,
or a struct that it keeps in memory, makes them several times as slow, and nothing else would show it."""

import re
import shutil
import subprocess

import pytest
from cuda_tools import ROOT, missing

from fastkd._divergences import ENTRIES

SOURCE = """
#include "cpu/rows_chunks.h"
namespace fastkd::avx2 {
template <class D>
D made(double x) {
  if constexpr (requires { D(x, x); }) return D(x, x);
  else return D(x);
}
using D = FUNCTOR<TYPE>;
void run(double x, const TYPE* s, const TYPE* t, TYPE* w, int64_t n, const void* k, void* block, TYPE* grad) {
  const auto& scale = *static_cast<const Scale<TYPE>*>(k);
  auto& sums = *static_cast<RowsBlock*>(block);
  if constexpr (D::kCentred) reduce_chunk_to_grad(made<D>(x), s, t, w, n, scale, sums, grad);
  else reduce_chunk(made<D>(x), s, t, w, n, scale, sums);
}
}
"""
LEAST = 30  # instructions with a vector of 32 bytes; of loops over single classes there are none or a few


def compile_command():
    """As the build compiles the kernels with AVX2. Without it, or with another compiler, the test is skipped; in CI it
    fails."""
    for ninja in ROOT.glob("build/cmake-*/build.ninja"):
        rule = re.search(
            r"^build \S*fastkd_avx2\.dir/csrc/cpu/rows_kernel\.cpp\.o: (\w+).*?(?=^build )",
            ninja.read_text(),
            re.MULTILINE | re.DOTALL,
        )
        if rule:
            found = dict(re.findall(r"^  (DEFINES|FLAGS|INCLUDES) = (.*)$", rule[0], re.MULTILINE))
            compiler = re.search(r"CMAKE_CXX_COMPILER:\w+=(.*)", (ninja.parent / "CMakeCache.txt").read_text())[1]
            version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
            if "Free Software Foundation" not in version:
                missing("build by GCC")
            return [compiler, *" ".join(found.values()).split()]
    missing("build for AVX2")


@pytest.mark.gates
@pytest.mark.parametrize("type_", ["float", "double"])
@pytest.mark.parametrize("functor", [entry.functor for entry in ENTRIES])
def test_a_divergence_is_computed_in_vectors(tmp_path, functor, type_):
    objdump = shutil.which("objdump")
    assert objdump, "no objdump, which comes with the compiler"
    source, code = tmp_path / "loop.cpp", tmp_path / "loop.o"
    source.write_text(SOURCE)
    subprocess.run(
        [*compile_command(), f"-DFUNCTOR={functor}", f"-DTYPE={type_}", "-c", source, "-o", code], check=True, cwd=ROOT
    )
    listing = subprocess.run([objdump, "-d", "--no-show-raw-insn", code], capture_output=True, text=True, check=True)
    assert sum("%ymm" in line for line in listing.stdout.splitlines()) >= LEAST
