"""The numbers of a call as the ops take them."""

import math

import torch

# The arguments of ops that are such tensors. They stay on the CPU, wherever the others are.
NAMES = ("delta", "numbers", "form_numbers", "target_numbers", "eps", "margin", "layer_weights", "beta", "p")


def as_tensor(*numbers: float) -> torch.Tensor:
    """Numbers in float64 on the CPU, where the host reads them and waits for nothing.

    A tensor, as a graph of torch.compile has its numbers built in: one that changes would be compiled anew each time.
    """
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=torch.float64, device="cpu")
        return torch.stack([one * number for number in numbers])
    if len(numbers) == 1:  # in half the time
        return torch.full((1,), numbers[0], dtype=torch.float64, device="cpu")
    return torch.tensor(numbers, dtype=torch.float64, device="cpu")


def read(name: str, number: torch.Tensor, least: float | None = None) -> float:
    """Of a tensor of one number. It was not checked where torch.compile had made it a symbol."""
    x = number.item()
    if not (x > 0 if least is None else x >= least) or not math.isfinite(x):
        wanted = "a positive finite number" if least is None else f"a finite number of at least {least:g}"
        raise RuntimeError(f"{name}: {wanted} wanted, got {x}")
    return x
