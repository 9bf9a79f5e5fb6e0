"""The package from outside: installed without kernels, built without tools, started by hand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd

ROOT = Path(__file__).parents[1]


def python(code, cwd=None, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


@pytest.fixture
def without_kernels(tmp_path):
    """The package as it is where nothing could be compiled."""
    shutil.copytree(ROOT / "fastkd", tmp_path / "fastkd", ignore=shutil.ignore_patterns("lib", "__pycache__"))
    return {"PYTHONPATH": str(tmp_path), "cwd": tmp_path}


def test_without_kernels_it_computes_and_warns_once(without_kernels):
    run = python(
        "import torch, fastkd; print(fastkd.__file__)\n"
        "s = torch.zeros(2, 2, requires_grad=True); t = torch.tensor([[1.0, 0.0]] * 2)\n"
        "for _ in range(3): loss = fastkd.functional.kl_div(s, t)\n"
        "loss.backward(); print(f'{loss.item():.6f}', s.grad[0, 0].item() < 0)\n"
        "logits = s * 1; fastkd.KLDivLoss(inplace=True)(logits, t).backward()",
        **without_kernels,
    )
    assert run.returncode == 0, run.stderr
    assert without_kernels["PYTHONPATH"] in run.stdout
    assert "0.110944 True" in run.stdout
    assert run.stderr.count("without its compiled kernels") == 1


def test_without_kernels_asking_for_them_is_an_error(without_kernels):
    run = python("import fastkd", FASTKD_BACKEND="cpu", **without_kernels)
    assert run.returncode != 0
    assert "FASTKD_BACKEND: the backend 'cpu' cannot be used" in run.stderr


def test_a_broken_library_says_so(without_kernels, tmp_path):
    (tmp_path / "fastkd" / "lib").mkdir()
    (tmp_path / "fastkd" / "lib" / "libfastkd_cpu.so").write_bytes(b"no library")
    run = python("import fastkd", **without_kernels)
    assert run.returncode == 0
    assert "libfastkd_cpu.so does not load in torch" in run.stderr


def build(*changes, **environment):
    """setup.py build_ext, after changes to what it finds."""
    return python(
        "import runpy, sys, sysconfig, setuptools, setuptools.command.bdist_wheel, setuptools.command.build_ext\n"
        + "\n".join(changes)
        + "\nsys.argv = ['setup.py', '-q', 'build_ext', '--build-lib', '/nonexistent']\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r})",
        **environment,
    )


def test_a_missing_compiler_is_one_sentence(tmp_path):
    run = build(PATH=str(tmp_path), CXX="")
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1].startswith("fastkd: no C++ compiler found")


def test_a_missing_torch_is_one_sentence():
    run = build(
        "sys.path = [p for p in sys.path if 'site-packages' not in p]",
        "sysconfig.get_path = lambda name: '/nonexistent'",
    )
    assert run.returncode != 0
    assert run.stderr.strip().splitlines()[-1].startswith("fastkd: no torch >= 2.10 is installed here")


def test_import_brings_no_compiler_along():
    """They take a second, and are wanted where something is compiled. Neither does a first step need them."""
    run = python(
        "import sys, torch\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'triton', 'sympy'}\n"
        "before = set(sys.modules)\n"
        "import fastkd; print(sorted((set(sys.modules) - before) & heavy))\n"
        "fastkd.KLDivLoss()(torch.zeros(2, 2, requires_grad=True), torch.zeros(2, 2)).backward()\n"
        "fastkd.PKTLoss()(torch.eye(2, requires_grad=True), torch.eye(2)).backward()\n"
        "print(sorted((set(sys.modules) - before) & heavy))"
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["[]", "[]"]


def test_main_tells_what_will_be_used():
    run = subprocess.run([sys.executable, "-m", "fastkd"], capture_output=True, text=True, check=True)
    for line in ("fastkd ", "torch ", "backend cpu ", "instruction set ", "threads "):
        assert re.search(rf"^{line}", run.stdout, re.MULTILINE), run.stdout
    assert re.search(r"^cpu tensors use +cpu$", run.stdout, re.MULTILINE)
    run = python("import runpy; runpy.run_module('fastkd', run_name='__main__')", FASTKD_BACKEND="torch")
    assert "torch (FASTKD_BACKEND)" in run.stdout


@pytest.mark.parametrize("level", ["baseline", "nonsense"])
def test_the_environment_chooses_the_instruction_set(level):
    run = python(
        "import torch, fastkd; print(torch.ops.fastkd.cpu_isa('?'))\n"
        "fastkd.functional.kl_div(torch.ones(2, 3), torch.ones(2, 3))",
        FASTKD_CPU_ISA=level,
    )
    if level == "nonsense":
        assert run.returncode != 0
        assert "FASTKD_CPU_ISA: baseline, avx2 or avx512 wanted, got 'nonsense'" in run.stderr
    else:
        assert run.stdout.strip() == level, run.stderr


def test_backend_is_chosen_and_given_back():
    student, teacher = torch.randn(3, 4), torch.randn(3, 4)
    with fastkd.backend("torch"):
        with fastkd.backend("cpu"):
            fastkd.functional.kl_div(student, teacher)
        with pytest.raises(ZeroDivisionError), fastkd.backend("cpu"):
            raise ZeroDivisionError
        assert fastkd._backend.select(student.device) == "torch"
    assert fastkd._backend.select(student.device) == "cpu"


def test_backend_refuses_what_it_cannot_do():
    with (
        pytest.raises(ValueError, match=r"^backend: one of cuda, triton, cpu, torch wanted, got 'gpu'"),
        fastkd.backend("gpu"),
    ):
        pass
    with pytest.raises(RuntimeError, match=r"^backend: the backend 'cuda' cannot be used: "), fastkd.backend("cuda"):
        pass
