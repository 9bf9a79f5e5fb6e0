"""How time and memory grow: over rows and classes of logits, over samples whose pairs and triplets are compared.

Each series goes from small to large. What took longer than PATIENCE is not asked for the next size, and the
file says so.
"""

from dataclasses import dataclass

from . import bench_relations, bench_rows

PATIENCE = 1.0  # seconds


@dataclass
class Series:
    """Sizes of one axis, the others fixed; ``{}`` stands for it."""

    loss: str
    axis: str
    shape: tuple
    sizes: tuple

    @property
    def name(self):
        return f"{self.loss} over {self.axis}"


SERIES = {
    "cpu": [
        Series("kl_div", "N", ("N", 1000), (16, 64, 256, 1024, 4096, 16384, 65536)),
        Series("kl_div", "V", (256, "V"), (1024, 4096, 16384, 65536, 262144)),
        Series("rkd_distance", "N", ("N", 128), (256, 512, 1024, 4096, 8192, 16384, 32768)),
        Series("similarity_preserving", "N", ("N", 128), (256, 512, 1024, 4096, 8192, 16384, 32768)),
        Series("rkd_angle", "N", ("N", 128), (64, 128, 256, 512, 1024)),
        Series("relational_triplet", "N", ("N", 128), (128, 256, 512, 1024, 4096)),
    ],
    "cuda": [
        Series("kl_div", "N", ("N", 128256), (16, 64, 256, 1024, 4096, 16384)),
        Series("kl_div", "V", (4096, "V"), (1024, 4096, 16384, 65536, 262144)),
        Series("rkd_distance", "N", ("N", 512), (1024, 2048, 4096, 8192, 16384, 32768)),
        Series("similarity_preserving", "N", ("N", 512), (1024, 4096, 8192, 16384, 32768)),
        Series("rkd_angle", "N", ("N", 512), (64, 128, 256, 512, 1024)),
        Series("relational_triplet", "N", ("N", 512), (128, 256, 512, 1024, 4096)),
    ],
}
CASES = {
    device: [("scaling", series.loss, series.axis, str(size)) for series in found for size in series.sizes]
    for device, found in SERIES.items()
}
SLOW = {}  # by loss and axis: providers that took long, and why they are left out from there


def test_scaling(benchmark, case, rounds, device):
    _, loss, axis, size = case
    series = next(s for s in SERIES[device] if (s.loss, s.axis) == (loss, axis))
    shape = [int(size) if x == axis else x for x in series.shape]
    slow = SLOW.setdefault((loss, axis), {})
    about = {"left_out": dict(slow), "series": {"name": series.name, "axis": axis, "value": int(size)}}
    try:
        if loss in bench_rows.EAGER:
            bench_rows.measure(benchmark, loss, shape, "float32", bench_rows.STEP, rounds, device, **about)
        else:
            bench_relations.measure(benchmark, loss, shape, "float32", rounds, device, **about)
    finally:
        for name, result in benchmark.extra_info.get("providers", {}).items():
            if result["median_s"] > PATIENCE and not name.startswith("fastkd"):
                slow[name] = f"{result['median_s']:.2g} s at {axis} = {size}"
