"""``python -m bench``: runs the benchmarks, writes the JSON, prints the table."""

import argparse
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


def time_text(seconds):
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def bytes_text(n):
    return "?" if n is None else f"{n / 2**20:.1f}"


def peak_text(info, result):
    """Small buffers come from memory that the process holds already, which the measure cannot see."""
    return bytes_text(result["peak_extra_bytes"]) if info["gradient_bytes"] >= 64 << 20 else "-"


def tables(data):
    """One table a case: every provider's time, ratio to fastkd, memory and share of the copy bandwidth."""
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        own = info["providers"]["fastkd"]["median_s"]
        title = f"{info['case']}  (one gradient: {bytes_text(info['gradient_bytes'])} MiB)"
        table = Table(title=title, title_justify="left")
        table.add_column("provider", no_wrap=True)
        for column in ("median", "quartiles", "x fastkd", "peak extra MiB", "of copy bandwidth"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, result in info["providers"].items():
            low, high = result["quartiles_s"]
            table.add_row(
                name,
                time_text(result["median_s"]),
                f"{time_text(low)} - {time_text(high)}",
                f"{result['median_s'] / own:.2f}",
                peak_text(info, result),
                f"{result['copy_share']:.0%}",
            )
        yield table


def markdown(data):
    """The README's table: training steps, forward and backward."""
    columns = (
        "logits", "fastkd", "eager", "eager, log_target", "`torch.compile`", "fastkd `inplace`",
        "peak extra MiB: fastkd, `inplace`, eager, compile", "kernel alone, of copy bandwidth",
    )  # fmt: skip
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        if info["mode"] != "forward+backward":
            continue
        found = info["providers"]
        own = found["fastkd"]["median_s"]
        ratios = [f"{found[name]['median_s'] / own:.1f}x" for name in ("eager", "eager log_target", "torch.compile")]
        peaks = [peak_text(info, found[name]) for name in ("fastkd", "fastkd inplace", "eager", "torch.compile")]
        cells = [
            f"{info['shape'][0]}x{info['shape'][1]} {info['dtype']}",
            time_text(own),
            *ratios,
            time_text(found["fastkd inplace"]["median_s"]),
            ", ".join(peaks),
            f"{found['fastkd kernel alone']['copy_share']:.0%}",
        ]
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", default="", help="only the cases whose name has this, such as llama-2 or float32")
    parser.add_argument("--rounds", type=int, default=7, help="how often each provider is timed (default 7)")
    parser.add_argument(
        "--output", type=Path, default=HERE / "results" / "latest.json", help="the JSON (default %(default)s)"
    )
    parser.add_argument("--show", type=Path, help="print the tables of a JSON that is there already, run nothing")
    parser.add_argument("--markdown", action="store_true", help="with --show: the README's table instead")
    arguments = parser.parse_args()
    if arguments.markdown and not arguments.show:
        parser.error("--markdown: needs --show")
    if arguments.show and not arguments.show.exists():
        parser.error(f"--show: no file {arguments.show}")
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1 wanted")
    code = 0
    if not arguments.show:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        options = [f"--rounds={arguments.rounds}", f"--benchmark-json={arguments.output}", "--benchmark-quiet"]
        files = [str(path) for path in sorted(HERE.glob("bench_*.py"))]
        code = pytest.main(["-v", "-p", "no:cacheprovider", *options, "-k", arguments.k, *files])
    if code:
        return int(code)
    data = json.loads((arguments.show or arguments.output).read_text())
    if arguments.markdown:
        print("\n".join(markdown(data)))
        return 0
    console = Console(width=max(110, Console().width))
    console.print(data["fastkd"])
    for table in tables(data):
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
