"""The package from outside: installed without kernels, built without tools, started by hand."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda_tools import find_tool

import fastkd
from fastkd import __main__ as main
from fastkd import _backend, _library

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


def test_a_library_of_other_sources_says_so(tmp_path):
    """It would read arguments that are not there."""
    shutil.copytree(ROOT / "fastkd", tmp_path / "fastkd", ignore=shutil.ignore_patterns("__pycache__"))
    calls = tmp_path / "fastkd" / "_calls.py"
    calls.write_text(calls.read_text().replace("    t_squared: bool\n", "    t_squared: bool\n    another: bool\n"))
    run = python("import fastkd", PYTHONPATH=str(tmp_path), cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "libfastkd_cpu.so was built from other sources than fastkd's Python" in run.stderr


def test_a_broken_library_says_so(without_kernels, tmp_path):
    (tmp_path / "fastkd" / "lib").mkdir()
    (tmp_path / "fastkd" / "lib" / "libfastkd_cpu.so").write_bytes(b"no library")
    run = python("import fastkd", **without_kernels)
    assert run.returncode == 0
    assert "libfastkd_cpu.so does not load in torch" in run.stderr


def test_every_part_is_shipped():
    """Each folder of modules, and what tells type checkers that there are types."""
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.findall(r'"([\w.]+)"', re.search(r"^packages = \[(.*)\]$", project, re.MULTILINE)[1])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "fastkd").rglob("__init__.py")}
    assert set(packages) == found
    assert 'package-data = { fastkd = ["py.typed"] }' in project
    assert (ROOT / "fastkd" / "py.typed").exists()


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


@pytest.fixture
def setup_py(monkeypatch):
    """setup.py as a module: nothing is built, and FASTKD_CUDA has its default."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "CUDA", "auto")
    return module


NVCC_KNOWS = {"80", "86", "90", "100", "103", "120", "121"}


@pytest.mark.parametrize(
    ("torch_list", "cmake_list", "told"),
    [
        ("8.0;9.0;10.0;12.0+PTX", "80-real;90-real;100-real;120", ""),
        ("12.0  9.0;9.0 9.0+PTX;", "90;120-real", ""),
        ("9.0a;10.0f;12.0a+PTX", "90a-real;100f-real;120a", ""),
        ("8.6+PTX", "86-real;90-virtual", "for 8.6+PTX the PTX of 9.0 is built"),
        ("8.6+PTX 9.0", "86-real;90", "for 8.6+PTX the PTX of 9.0 is built"),
        ("Ampere;Hopper", "80-real;86-real;90", "for 8.6+PTX the PTX of 9.0 is built"),
        ("Turing;Blackwell", "100-real;103-real;120-real;121", "7.5+PTX is left out, the kernels are for 8.0"),
        ("9.0;10.1", "90-real", "10.1 is left out, this nvcc knows 80, 86, 90, 100"),
        ("7.5", "", "7.5 is left out"),
    ],
)
def test_torchs_list_of_gpus_becomes_cmakes(setup_py, capsys, torch_list, cmake_list, told):
    assert setup_py.architectures(torch_list, NVCC_KNOWS) == cmake_list
    error = capsys.readouterr().err
    assert told in error if told else not error


@pytest.mark.parametrize("name", ["foo", "9", "8.0,9.0", "Ampere+PTX", "sm_90"])
def test_a_gpu_that_torch_does_not_know_is_an_error(setup_py, name):
    with pytest.raises(SystemExit, match=rf"^TORCH_CUDA_ARCH_LIST: numbers .* got {re.escape(repr(name))}$"):
        setup_py.architectures(f"9.0 {name}", NVCC_KNOWS)


def script(path, text):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_native_is_the_gpus_of_this_machine(setup_py, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_py.architectures("native", NVCC_KNOWS) == "80-real;90-real;100-real;120"
    assert "nvidia-smi shows no GPU" in capsys.readouterr().err
    script(tmp_path / "bin" / "nvidia-smi", "printf '12.0\\n9.0\\n12.0\\n'")
    assert setup_py.architectures("native", NVCC_KNOWS) == "90-real;120"


def test_a_list_without_a_gpu_that_can_be_served_builds_no_cuda(setup_py, tmp_path, monkeypatch, capsys):
    """On a machine with an older GPU the list is often set for it: the CPU's kernels are still wanted."""
    nvcc = 'case $1 in --version) echo "release 13.0, V13.0.88";; *) echo compute_75; echo compute_80;; esac'
    script(tmp_path / "bin" / "nvcc", nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert setup_py.cuda_build() == []
    assert "at least one of 8.0 and newer wanted, got '7.5': the CUDA kernels are not built" in capsys.readouterr().err
    monkeypatch.setattr(setup_py, "CUDA", "1")
    with pytest.raises(SystemExit, match=r"^fastkd: TORCH_CUDA_ARCH_LIST: at least one of 8\.0 and newer wanted"):
        setup_py.cuda_build()
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    assert "-DCMAKE_CUDA_ARCHITECTURES=80-real" in setup_py.cuda_build()


def test_what_is_shipped_is_compiled_alike_with_and_without_the_tests():
    """`make wheel` after `make setup` compiles nothing again. The sources are read: a configuration takes seconds."""
    shipped, _ = (ROOT / "CMakeLists.txt").read_text().split("\nif(FASTKD_TESTING)\n")
    assert shipped.count("FASTKD_TESTING") == 1  # the option itself
    builds = [line for line in (ROOT / "Makefile").read_text().splitlines() if "--no-build-isolation" in line]
    assert len(builds) == 2
    assert all(line.startswith("\t") and "FASTKD_WERROR=1 " in line for line in builds)


@pytest.fixture
def unserved_gpu(monkeypatch):
    """A GPU of compute capability 9.0, and a library that was built for others alone."""
    reason = "no kernel image is available for execution on the device"
    monkeypatch.setattr(_library, "cuda_missing", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.ops.fastkd, "cuda_code", lambda: reason, raising=False)
    _backend._cuda_unserved.cache_clear()
    yield
    _backend._cuda_unserved.cache_clear()


def test_a_gpu_that_the_library_was_not_built_for_is_told_before_a_launch(unserved_gpu):
    told = dict(main.lines())["backend cuda"]
    assert "do not run on this GPU, of compute capability 9.0 (no kernel image" in told
    assert "TORCH_CUDA_ARCH_LIST=9.0" in told
    with pytest.raises(RuntimeError, match="'cuda' cannot be used: the CUDA kernels do not run"):
        _backend.check("cuda", "backend")
    assert _backend.automatic("cuda") != "cuda"


def test_the_library_asks_the_driver_for_code():
    library = _library.FOLDER / "libfastkd_cuda.so"
    if not library.exists():
        find_tool("nvcc")  # skips where there is none
        pytest.fail("there is nvcc, but setup built no libfastkd_cuda.so")
    torch.ops.load_library(library)
    assert (torch.ops.fastkd.cuda_code() == "") == torch.cuda.is_available()


def test_import_brings_no_compiler_along():
    """They take a second, and are wanted where something is compiled. Neither does a first step need them."""
    run = python(
        "import sys, torch\n"
        "heavy = {'torch._dynamo', 'torch._inductor', 'torch.distributed.tensor', 'triton', 'sympy'}\n"
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
    wanted = ("fastkd ", "torch ", "processor ", "torch's CPU capability ", "torch's BLAS ", "backend cpu ")
    for line in (*wanted, "instruction set ", "threads "):
        assert re.search(rf"^{line}", run.stdout, re.MULTILINE), run.stdout
    assert re.search(r"^cpu tensors use +cpu$", run.stdout, re.MULTILINE)
    run = python("import runpy; runpy.run_module('fastkd', run_name='__main__')", FASTKD_BACKEND="torch")
    assert "torch (FASTKD_BACKEND)" in run.stdout


def test_main_names_the_processor(monkeypatch, tmp_path):
    monkeypatch.setattr(main, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(main.platform, "processor", lambda: "")
    assert main.processor() == main.platform.machine()
    monkeypatch.setattr(main.platform, "processor", lambda: "arm")
    assert main.processor() == "arm"
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel\t\t: 1\nmodel name\t: A processor 2 GHz\n" * 2)
    assert main.processor() == "A processor 2 GHz"


MKL = "  - Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605 for Intel(R) 64 architecture\n"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (MKL + "  - Build settings: BLAS_INFO=mkl, BUILD_TYPE=Release", "MKL 2024.2-Product Build 20240605"),
        (MKL + "  - Build settings: BUILD_TYPE=Release", "MKL 2024.2-Product Build 20240605"),
        ("  - Build settings: BLAS_INFO=open, LAPACK_INFO=open", "OpenBLAS (torch does not tell its version)"),
        ("  - Build settings: BLAS_INFO=nvpl, USE_MKL=OFF", "nvpl (torch does not tell its version)"),
        ("  - Build settings: USE_EIGEN_FOR_BLAS=ON", "unknown (torch does not tell its version)"),
    ],
)
def test_main_names_the_blas(config, name):
    """From what torch prints of MKL, OpenBLAS, another, and none."""
    assert main.blas(config) == name


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
