"""The tables of a file of results, on a terminal and as Markdown."""

import statistics

from rich.table import Table

LIMITS = {"copy_share": "of copy bandwidth", "product_share": "of matrix products"}
MACHINE = ("copy", "mm")  # providers that are its limits
DISTURBED = 1.5  # times as long as in the median case
SEEN = 1 << 20  # bytes; of less, what is held is lost in what a process takes and gives back anyway


def time_text(seconds):
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def bytes_text(n):
    return "?" if n is None else f"{n / 2**20:.1f}"


def peak_text(info, result):
    """A dash where what is held is too little to be seen."""
    peak = result["peak_extra_bytes"]
    return bytes_text(peak) if peak is None or max(info["gradient_bytes"], peak) >= SEEN else "-"


def error_text(error):
    return "-" if error is None else f"{error:.0e}"


def ratio_text(ratio):
    return "{median:.2f} ({low:.2f} - {high:.2f})".format(**ratio)


def cases(data):
    return [benchmark["extra_info"] for benchmark in data["benchmarks"] if benchmark["extra_info"]]


def limit_of(info):
    """What the machine's limit is for a case: the key in its results, and its name."""
    own = next(iter(info["providers"].values()))
    return next((key, text) for key, text in LIMITS.items() if key in own)


def lines(info):
    """A case's providers: name, median, quartiles, ratio to the first, memory, share of the limit, errors."""
    share, _ = limit_of(info)
    for name, result in info["providers"].items():
        low, high = result["quartiles_s"]
        yield (
            name,
            time_text(result["median_s"]),
            f"{time_text(low)} - {time_text(high)}",
            ratio_text(result["ratio"]),
            peak_text(info, result),
            f"{result[share]:.0%}",
            error_text(result.get("loss_error")),
            error_text(result.get("gradient_error")),
        )


def columns(info):
    first, (_, limit) = next(iter(info["providers"])), limit_of(info)
    return (
        "provider",
        "median",
        "quartiles",
        f"x {first}",
        "peak extra MiB",
        limit,
        "loss's error",
        "gradient's error",
    )


def missing_text(info):
    return [f"{name}: {reason}" for name, reason in info["missing"].items()]


def rich_tables(data):
    """One table a case: every provider, and under it who is missing, and why."""
    for info in cases(data):
        title = f"{info['case']}  (one gradient: {bytes_text(info['gradient_bytes'])} MiB)"
        caption = "\n".join(missing_text(info)) or None
        table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
        for number, column in enumerate(columns(info)):
            table.add_column(column, justify="right" if number else "left", no_wrap=True)
        for line in lines(info):
            table.add_row(*line)
        yield table


def markdown_row(cells):
    return f"| {' | '.join(cells)} |"


def markdown_table(head, rows):
    """The first column to the left, the others to the right."""
    yield markdown_row(head)
    yield "|" + "|".join([":--", *["--:"] * (len(head) - 1)]) + "|"
    yield from map(markdown_row, rows)


def key(info):
    """What a case is known by: one may stand in a table, and in a series."""
    return info["case"], info.get("series", {}).get("name")


def pairs(data, rerun):
    """Of two runs, (case, provider, first ratio to fastkd, second) where both have one; the machine's limits apart."""
    again = {key(info): info["providers"] for info in cases(rerun)}
    found = []
    for info in cases(data):
        first = next(iter(info["providers"]))
        for name, result in info["providers"].items():
            other = again.get(key(info), {}).get(name)
            if name not in (first, *MACHINE) and other is not None:
                found.append((info["case"], name, result["ratio"], other["ratio"]))
    return found


def within(pair):
    """Whether the second run's median lies between what nine in ten rounds of the first do."""
    _, _, first, second = pair
    return first["low"] <= second["median"] <= first["high"]


def difference(pair):
    """By what share the larger median is above the smaller one."""
    medians = [ratio["median"] for ratio in pair[2:]]
    return max(medians) / min(medians) - 1


def between_runs(found):
    """The differences of pairs that half of them, and nine in ten, do not exceed."""
    differences = [difference(pair) for pair in found]
    twentieths = statistics.quantiles(differences, n=20, method="inclusive") if len(found) > 1 else differences * 19
    return twentieths[9], twentieths[17]


def disturbed(data):
    """Cases beside which torch.mm, which multiplies the same matrices in each that has it, took much longer than in the
    median case of its dtype, and how many times as long. Others, and a run that is slow throughout, are not seen."""
    rates = {}
    for info in cases(data):
        if "product_flops_per_s" in info:
            rates.setdefault(info["dtype"], []).append(info["product_flops_per_s"])
    medians = {dtype: statistics.median(found) for dtype, found in rates.items()}
    for info in cases(data):
        if "product_flops_per_s" in info:
            longer = medians[info["dtype"]] / info["product_flops_per_s"]
            if longer > DISTURBED:
                yield info["case"], longer
