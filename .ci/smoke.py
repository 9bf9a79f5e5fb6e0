"""A loss of the installed package, away from its sources: the CPU's kernels, and which library is there for CUDA."""

import warnings
from pathlib import Path

import torch

import fastkd

SOURCES = Path(__file__).resolve().parents[1] / "fastkd"

package = Path(fastkd.__file__).resolve().parent
if package == SOURCES:
    raise SystemExit(f"the sources were imported: {package}")
warnings.simplefilter("error")
student = torch.randn(8, 100, requires_grad=True)
with fastkd.backend("cpu"):
    loss = fastkd.KLDivLoss(temperature=2.0)(student, torch.randn(8, 100))
loss.backward()
if not (loss > 0 and student.grad.abs().sum() > 0):
    raise SystemExit(f"no loss or no gradient: {loss}, {student.grad}")
libraries = ", ".join(sorted(path.name for path in (package / "lib").glob("*.so")))
print(f"computes: {loss.item():.4f} in {package} with torch {torch.__version__}; {libraries}")
