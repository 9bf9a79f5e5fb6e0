"""cut-cross-entropy: cross-entropy of a head with hard labels, without logits in memory."""

NAME, PACKAGE = "cut-cross-entropy", "cut-cross-entropy"
DEVICES, ELSEWHERE = ("cuda",), "its kernels are Triton's, and need a GPU"
HOLDS = 1.0
OTHERWISE = "has no loss of two distributions, only cross-entropy with hard labels (25.1.1)"

LOSSES = {}
