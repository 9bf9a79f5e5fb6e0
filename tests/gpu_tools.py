"""What the tests on a GPU look at it with."""

import torch

from fastkd import _backend

BACKENDS = [name for name in ("cuda", "triton") if not _backend.unavailable(name)]


def without_waiting(step):
    """Runs it twice; the first time may compile."""
    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replayed(step, student, change):
    """Loss and gradient of step(), captured in a graph and replayed after change()."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
        grad = student.grad
    with torch.no_grad():
        change()
    graph.replay()
    return loss.clone(), grad.clone()


def peak_extra_bytes(step, student):
    """Of the second call."""
    step()
    student.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before
