"""Plots of how time and memory grow, from the series of a file of results."""

from .tables import SEEN, cases

COLORS = {
    "fastkd": "#d55e00", "fastkd inplace": "#e69f00", "fastkd cuda": "#d55e00", "fastkd cuda inplace": "#e69f00",
    "fastkd triton": "#cc79a7", "fastkd triton inplace": "#f0c4dc", "eager": "#0072b2", "eager log_target": "#56b4e9",
    "torch.compile": "#009e73", "torchdistill": "#767676", "pytorch-metric-learning": "#8c510a", "KeOps": "#6a3d9a",
    "Liger": "#b2182b",
}  # fmt: skip


def series(data):
    """Name of each series: its cases, from small to large."""
    found = {}
    for info in cases(data):
        if "series" in info:
            found.setdefault(info["series"]["name"], []).append(info)
    return {name: sorted(infos, key=lambda info: info["series"]["value"]) for name, infos in found.items()}


def limit_seconds(info):
    """What the machine cannot go below: least bytes at the rate of a copy, or least operations at that of products."""
    if "copy_bytes_per_s" in info:
        return 3 * info["gradient_bytes"] / info["copy_bytes_per_s"]
    return info["flops"] / info["product_flops_per_s"]


def draw(path, name, infos):
    """Time and peak extra memory over the axis of a series, a line for each provider, the limit dashed."""
    from matplotlib.figure import Figure  # tables need none

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    times, memory = figure.subplots(1, 2)
    axis, at = infos[0]["series"]["axis"], [info["series"]["value"] for info in infos]
    for provider, color in COLORS.items():
        found = [(n, info["providers"][provider]) for n, info in zip(at, infos, strict=True)
                 if provider in info["providers"]]  # fmt: skip
        if not found:
            continue
        style = {"color": color, "marker": "o", "markersize": 4, "label": provider}
        n, medians = [n for n, _ in found], [result["median_s"] for _, result in found]
        low, high = zip(*(result["quartiles_s"] for _, result in found), strict=True)
        times.plot(n, medians, **style)
        times.fill_between(n, low, high, color=color, alpha=0.15, linewidth=0)
        held = [
            (n, result["peak_extra_bytes"] / 2**20) for n, result in found if (result["peak_extra_bytes"] or 0) >= SEEN
        ]
        if held:
            memory.plot(*zip(*held, strict=True), **style)
    limit = "copy bandwidth" if "copy_bytes_per_s" in infos[0] else "matrix products"
    times.plot(at, list(map(limit_seconds, infos)), "k--", label=f"limit: {limit}")
    gradients = [(n, info["gradient_bytes"] / 2**20) for n, info in zip(at, infos, strict=True)]
    memory.plot(*zip(*gradients, strict=True), "k--", label="one gradient")
    times.set(title="forward and backward", ylabel="seconds, median and quartiles")
    memory.set(title="peak extra memory (above 1 MiB)", ylabel="MiB")
    shape = " x ".join(map(str, shape_of(infos)))
    for panel in (times, memory):
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.set_xticks(at, map(str, at))  # what was measured
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3, which="both")
        panel.legend(fontsize=8)
    figure.suptitle(f"{infos[0]['loss']}, {shape} {infos[0]['dtype']}")
    figure.savefig(path, dpi=110)


def shape_of(infos):
    """The shape with the axis's name where the cases differ."""
    first, last = infos[0]["shape"], infos[-1]["shape"]
    axis = infos[0]["series"]["axis"]
    return [a if a == b else axis for a, b in zip(first, last, strict=True)]
