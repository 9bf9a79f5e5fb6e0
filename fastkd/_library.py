"""The ops: their schemas, and the compiled libraries that implement them; says why where there are none."""

import warnings
from pathlib import Path

import torch

from . import _divergences, _schemas

_libraries = []  # a definition lasts as long as its library


def define(namespace):
    """Defines the ops once more, for another implementation. Here and not in C++: Triton's need no
    compiled library."""
    library = torch.library.Library(namespace, "DEF")
    for schema in _schemas.EVERYWHERE:
        library.define(schema)
    _libraries.append(library)
    return library


fastkd = define("fastkd")
for _schema in (*_schemas.ONCE, *_schemas.IN_PYTHON):
    fastkd.define(_schema)

FOLDER = Path(__file__).parent / "lib"


def _load(name):
    """Loads a library of ops. Returns "" or the reason why it cannot be used."""
    path = FOLDER / name
    if not path.exists():
        return f"fastkd was installed without its compiled {'CUDA ' * ('cuda' in name)}kernels"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"{path.name} does not load in torch {torch.__version__}: {error}"
    calls = torch.ops.fastkd.cuda_calls if "cuda" in name else torch.ops.fastkd.cpu_calls
    try:
        built = calls()
    except NotImplementedError:  # it is older than this question
        built = ""
    if built != f"{_schemas.digest()},{_divergences.digest()}":
        return f"{path.name} was built from other sources than fastkd's Python"
    return ""


def _load_cuda():
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return _load("libfastkd_cuda.so")


cpu_missing = _load("libfastkd_cpu.so")
cuda_missing = _load_cuda()
if cpu_missing:
    warnings.warn(
        f"{cpu_missing}; losses are computed by plain PyTorch, which is right but slow. "
        "Reinstalling with a C++ compiler at hand (pip install --no-build-isolation . in its sources) builds them.",
        RuntimeWarning,
        stacklevel=3,
    )
