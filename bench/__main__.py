"""``python -m bench``: runs the benchmarks, writes the JSON, prints the table."""

import argparse
import datetime
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
LIMITS = {"copy_share": "of copy bandwidth", "product_share": "of matrix products"}


def time_text(seconds):
    for factor, unit in ((1e6, "µs"), (1e3, "ms")):
        if seconds * factor < 999.5:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def bytes_text(n):
    return "?" if n is None else f"{n / 2**20:.1f}"


def peak_text(info, result):
    """Small buffers come from memory that the process holds already, which the measure cannot see."""
    largest = max(info["gradient_bytes"], info.get("pairs_bytes", 0))
    return bytes_text(result["peak_extra_bytes"]) if largest >= 64 << 20 else "-"


def error_text(result):
    """Relative errors of loss and gradient against float64; files from before they were measured have none."""
    found = (result.get("loss_error"), result.get("gradient_error"))
    return " ".join("-" if error is None else f"{error:.0e}" for error in found)


def tables(data):
    """One table a case: every provider's time, ratio to fastkd, memory and share of the machine's limit."""
    for benchmark in data["benchmarks"]:
        info = benchmark["extra_info"]
        first, own = next(iter(info["providers"].items()))
        title = f"{info['case']}  (one gradient: {bytes_text(info['gradient_bytes'])} MiB)"
        missing = "\n".join(f"{name}: {reason}" for name, reason in info.get("missing", {}).items())
        table = Table(title=title, title_justify="left", caption=missing or None, caption_justify="left")
        table.add_column("provider", no_wrap=True)
        share, limit = next((key, text) for key, text in LIMITS.items() if key in own)
        columns = ("median", "quartiles", f"x {first}", "peak extra MiB", limit, "errors: loss, gradient")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for name, result in info["providers"].items():
            low, high = result["quartiles_s"]
            table.add_row(
                name,
                time_text(result["median_s"]),
                f"{time_text(low)} - {time_text(high)}",
                f"{result['median_s'] / own['median_s']:.2f}",
                peak_text(info, result),
                f"{result[share]:.0%}",
                error_text(result),
            )
        yield table


def row(cells):
    return f"| {' | '.join(cells)} |"


def shape_text(info):
    return f"{'x'.join(map(str, info['shape']))} {info['dtype']}"


def markdown(data):
    """The README's tables: training steps, forward and backward, of logits and of relations."""
    write = markdown_gpu if data["fastkd"].get("device") == "cuda" else markdown_cpu
    steps = [benchmark["extra_info"] for benchmark in data["benchmarks"]]
    steps = [info for info in steps if info["mode"] == "forward+backward"]
    families = {markdown_relations: [], markdown_features: [], write: []}
    for info in steps:
        family = markdown_relations if "pairs_bytes" in info else markdown_features if "layers" in info else write
        families[family].append(info)
    found = [(family, families[family]) for family in (write, markdown_relations, markdown_features)]
    for number, (family, infos) in enumerate((family, infos) for family, infos in found if infos):
        yield from ([""] if number else [])
        yield from family(infos)


def markdown_features(steps):
    columns = (
        "loss", "features", "fastkd", "eager", "`torch.compile`", "peak extra MiB: fastkd, eager, compile",
        "of copy bandwidth: fastkd, kernel alone", "gradient's error: fastkd, eager",
    )  # fmt: skip
    yield row(columns)
    yield "|---" * len(columns) + "|"
    for info in steps:
        found = info["providers"]
        own, *others = next(iter(found.values())), found["eager"], found["torch.compile"]
        alone = next((result for name, result in found.items() if name.endswith("kernel alone")), None)
        layers, *shape = info["shape"]
        features = shape_text({**info, "shape": shape}) + (f", {layers} layers" if layers > 1 else "")
        yield row(
            (
                f"`{info['loss']}`",
                features,
                time_text(own["median_s"]),
                *(f"{other['median_s'] / own['median_s']:.1f}x" for other in others),
                ", ".join(peak_text(info, result) for result in (own, *others)),
                ", ".join("-" if result is None else f"{result['copy_share']:.0%}" for result in (own, alone)),
                ", ".join(f"{result['gradient_error']:.0e}" for result in (own, others[0])),
            )
        )


def markdown_relations(steps):
    """Of fastkd's backends the one that the table names first. What holds a gradient has not been seen if it
    appears to hold less."""
    columns = (
        "loss", "embeddings", "fastkd", "eager", "`torch.compile`", "peak extra MiB: fastkd, eager",
        "of matrix products", "gradient's error: fastkd, eager",
    )  # fmt: skip
    yield row(columns)
    yield "|---" * len(columns) + "|"
    for info in steps:
        found = info["providers"]
        own, others = next(iter(found.values())), [found.get(name) for name in ("eager", "torch.compile")]
        ratios = [f"{other['median_s'] / own['median_s']:.1f}x" if other else "-" for other in others]
        both = own, others[0]
        seen = [result and (result["peak_extra_bytes"] or 0) >= info["gradient_bytes"] for result in both]
        peaks = [peak_text(info, result) if known else "-" for result, known in zip(both, seen, strict=True)]
        errors = [
            f"{result['gradient_error']:.0e}" if result and "gradient_error" in result else "-" for result in both
        ]
        yield row(
            (
                f"`{info['loss']}`", shape_text(info), time_text(own["median_s"]), *ratios, ", ".join(peaks),
                f"{own['product_share']:.0%}", ", ".join(errors),
            )
        )  # fmt: skip


def markdown_cpu(steps):
    columns = (
        "logits", "fastkd", "eager", "eager, log_target", "`torch.compile`", "fastkd `inplace`",
        "peak extra MiB: fastkd, `inplace`, eager, compile", "kernel alone, of copy bandwidth",
    )  # fmt: skip
    yield row(columns)
    yield "|---" * len(columns) + "|"
    for info in steps:
        if info.get("loss", "kl_div") != "kl_div":
            continue
        found = info["providers"]
        own = found["fastkd"]["median_s"]
        ratios = [f"{found[name]['median_s'] / own:.1f}x" for name in ("eager", "eager log_target", "torch.compile")]
        peaks = [peak_text(info, found[name]) for name in ("fastkd", "fastkd inplace", "eager", "torch.compile")]
        yield row(
            (
                shape_text(info),
                time_text(own),
                *ratios,
                time_text(found["fastkd inplace"]["median_s"]),
                ", ".join(peaks),
                f"{found['fastkd kernel alone']['copy_share']:.0%}",
            )
        )


def markdown_gpu(steps):
    """Times, and in brackets the share of the copy bandwidth; a dash for what did not run."""
    own = ("fastkd cuda", "fastkd cuda inplace", "fastkd triton")
    others = ("eager", "eager log_target", "torch.compile", "Liger")
    peaks = ("fastkd cuda", "fastkd cuda inplace", "eager", "torch.compile", "Liger")
    columns = ("loss", "logits", *own, *others, f"peak extra MiB: {', '.join(peaks)}")
    yield row(columns)
    yield "|---" * len(columns) + "|"
    for info in steps:
        found = info["providers"]

        def cell(name, found=found):
            result = found.get(name)
            return f"{time_text(result['median_s'])} ({result['copy_share']:.0%})" if result else "-"

        memory = ", ".join(peak_text(info, found[name]) if name in found else "-" for name in peaks)
        yield row((info["loss"], shape_text(info), *map(cell, (*own, *others)), memory))


def default_output(device):
    """On a GPU a file of its own, to be committed."""
    if device == "cpu":
        return HERE / "results" / "latest.json"
    gpu = torch.cuda.get_device_name(0).lower().replace(" ", "-")
    return HERE / "results" / f"{gpu}-{datetime.date.today().isoformat()}.json"


def show(data, as_markdown=False):
    if as_markdown:
        print("\n".join(markdown(data)))
        return
    console = Console(width=max(160, Console().width))
    console.print(data["fastkd"])
    for table in tables(data):
        console.print(table)
    if data["fastkd"].get("device") == "cuda":
        print("\n".join(markdown(data)))


def main():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", default="", help="only the cases whose name has this, such as llama-2 or float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default cpu)")
    parser.add_argument("--rounds", type=int, help="how often each provider is timed (default: cpu 7, cuda 20)")
    parser.add_argument(
        "--output", type=Path, help="the JSON (default: latest.json, on a GPU its name and the date, in bench/results)"
    )
    parser.add_argument("--show", type=Path, help="print the tables of a JSON that is there already, run nothing")
    parser.add_argument("--markdown", action="store_true", help="with --show: the README's table instead")
    arguments = parser.parse_args()
    if arguments.markdown and not arguments.show:
        parser.error("--markdown: needs --show")
    if arguments.show and not arguments.show.exists():
        parser.error(f"--show: no file {arguments.show}")
    rounds = {"cpu": 7, "cuda": 20}[arguments.device] if arguments.rounds is None else arguments.rounds
    if rounds < 1:
        parser.error("--rounds: at least 1 wanted")
    if arguments.show:
        show(json.loads(arguments.show.read_text()), arguments.markdown)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    output = arguments.output or default_output(arguments.device)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)  # what is shown at the end is of this run
    options = [f"--bench-device={arguments.device}", f"--rounds={rounds}", f"--benchmark-json={output}"]
    files = [str(path) for path in sorted(HERE.glob("bench_*.py"))]
    code = pytest.main(["-v", "-p", "no:cacheprovider", "--benchmark-quiet", *options, "-k", arguments.k, *files])
    if output.exists() and output.stat().st_size:  # a case that failed does not hide the others
        show(json.loads(output.read_text()))
        print(output)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
