"""What fastkd sets out to reach on two cores of a server's CPU: how many times as long the others take, or a share
of what the machine can do. The report holds these against what was measured."""

STEP = "forward+backward"
RATIOS = {  # case: provider, at least
    f"kl_div 32x10 float32 {STEP}": {"eager": 1.0},
    f"kl_div 2048x32000 float32 {STEP}": {"eager": 15.0, "torch.compile": 2.5},
    f"kl_div 2048x32000 bfloat16 {STEP}": {"eager": 8.0, "torch.compile": 2.5},
    **{
        f"{name} 2048x32000 float32 {STEP}": {"eager": 6.0}
        for name in (
            "symmetric_kl_div",
            "skew_kl_div",
            "skew_reverse_kl_div",
            "negative_log_acceptance",
            "alpha_beta_div",
            "bernoulli_kl_div",
            "adaptive_kl_div",
            "dist_loss",
        )
    },
    f"total_variation 2048x32000 float32 {STEP}": {"eager": 5.0},
    f"kd_loss 2048x32000 float32 {STEP}": {"eager": 12.0, "torch.compile": 3.0},
    f"dkd_loss 256x100 float32 {STEP}": {"eager": 1.0},
    "rkd_distance 256x512 float32": {"eager": 2.0},
    "rkd_distance 1024x512 float32": {"eager": 4.0},
    "rkd_distance 4096x512 float32": {"eager": 8.0},
    "rkd_distance 8192x256 float32": {"eager": 15.0},
    "rkd_angle 256x512 float32": {"eager": 60.0},
    "rkd_angle 512x512 float32": {"eager": 150.0},
    "similarity_preserving 8192x256 float32": {"eager": 30.0},
    "gram_mse 8192x256 float32": {"eager": 20.0},
    "gram_mse 8x1024x384 float32": {"eager": 3.0},
    "relation_kl 4096x256 float32": {"eager": 4.0},
    "pkt 4096x256 float32": {"eager": 8.0},
    "relational_triplet 512x256 float32": {"eager": 50.0},
    "feature_mse 1x65536x1024 float32": {"eager": 2.3, "torch.compile": 1.3},
    "feature_mse l2 1x65536x1024 float32": {"eager": 4.0},
    "feature_mse 24x8x128x768 bfloat16": {"eager": 4.0},
    "attention_transfer 1x64x256x56x56 float32": {"eager": 3.0},
}
COPY_SHARES = {  # case: provider, at least
    f"kl_div 2048x32000 float32 {STEP}": {"fastkd kernel alone": 0.8},
    "feature_mse 1x65536x1024 float32": {"fastkd kernel alone": 0.8},
}
