"""What the losses share that are matrix products with something between them."""

import torch

from .._check import DTYPES


def check_embeddings(student: torch.Tensor, teacher: torch.Tensor, dims: tuple[int, ...] = (2,)) -> None:
    """What the functions have checked already; an op may be called past them."""
    if student.dim() not in dims or student.shape[:-1] != teacher.shape[:-1]:
        shapes = f"{list(student.shape)} and {list(teacher.shape)}"
        wanted = " or ".join(("[N, D]", "[B, N, D]")[: len(dims)])
        raise RuntimeError(f"student and teacher: embeddings {wanted} of as many rows wanted, got {shapes}")
    for name, x in (("student", student), ("teacher", teacher)):
        if x.dtype not in DTYPES:
            raise RuntimeError(f"{name}: float16, bfloat16, float32 or float64 wanted, got {x.dtype}")


def row_factors(mask: torch.Tensor | None, weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """Of rows [*, N] of x: what each one's terms of a mean over N^2 pairs are multiplied by, weight / N^2; N is how
    many of them count. In float64, and 0 where it does not, or is the only one: then there is no pair."""
    rows = x.new_ones(x.shape[:-1], dtype=torch.float64) if mask is None else mask.to(torch.float64)
    count = rows.sum(-1, keepdim=True)
    factors = torch.where(count < 2, 0.0, rows / (count * count))
    return factors if weight is None else torch.where(rows > 0, factors * weight, 0.0)


def blocks_of(block: dict[str, int], N: int, width: int, device: torch.device) -> list[slice]:
    """Of N rows of that width, as slices: as many at a time as block, by device, has elements for."""
    rows = max(1, block.get(device.type, block["cuda"]) // max(1, width))
    return [slice(i, min(i + rows, N)) for i in range(0, N, rows)]


def unit(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows to length 1; one of zeros stays, of one below 1e-12 that is the length. With what their gradient is
    multiplied by, and which have the length of their own: all, where that is None. Nothing leaves the range: a row is
    divided by its largest element first, unless the host can see that none would."""
    if x.device.type == "cpu" and x.dtype is torch.float32 and x.numel():
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        if length.min() > 1e-12 and length.max() < 1e18:  # false of NaN
            return x / length, 1 / length, None
    scaled = torch.abs(x)
    largest = scaled.amax(-1, keepdim=True)
    one_or_largest = torch.where(largest == 0, 1.0, largest)
    torch.div(x, one_or_largest, out=scaled)
    length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
    short = largest * length < 1e-12
    factor = torch.where(short, largest * 1e12, torch.where(length == 0, 0.0, 1 / length))
    return scaled.mul_(factor), factor / one_or_largest, ~short


def unit_backward(grad: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """dL/dX from that of the rows of length 1, in its memory."""
    along = torch.linalg.vecdot(grad, x)[..., None]
    grad.addcmul_(x, along if own is None else torch.where(own, along, 0.0), value=-1)
    grad *= factor
