"""``python -m bench``: runs the benchmarks, writes the JSON, prints the tables."""

import argparse
import datetime
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from .measure import machine
from .tables import between_runs, difference, disturbed, pairs, ratio_text, rich_tables, within

HERE = Path(__file__).parent


def default_output(device, only):
    """A file of the machine and the day, to be committed; of some cases only one beside what is built."""
    if only:
        return HERE.parent / "build" / "bench.json"
    about = machine(device)
    name = (
        about["gpu"] if device == "cuda" else f"cpu {about.get('instruction_set', 'torch')} {about['threads']} threads"
    )
    return HERE / "results" / f"{name.lower().replace(' ', '-')}-{datetime.date.today().isoformat()}.json"


def show(data):
    console = Console(width=max(160, Console().width))
    console.print(data["fastkd"])
    for table in rich_tables(data):
        console.print(table)
    for case, longer in disturbed(data):
        console.print(
            f"the machine was slower beside {case}: torch.mm took {longer:.1f} times as long as in the median case"
        )


def show_agreement(data, rerun):
    found = pairs(data, rerun)
    if not found:
        print("no case of the first run was run again")
        return
    half, most = between_runs(found)
    print(
        f"{sum(map(within, found))} of {len(found)} ratios lie within the spread of the first run's rounds; half "
        f"differ by at most {half:.0%}, nine in ten by at most {most:.0%}, others are:"
    )
    for pair in found:
        if difference(pair) > most:
            case, name, first, second = pair
            print(f"  {case}, {name}: {ratio_text(first)}, then {ratio_text(second)}")


def parse_arguments():
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("-k", default="", help="only the cases whose name has this, such as llama-2 or 'not scaling'")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where (default cpu)")
    parser.add_argument("--rounds", type=int, help="how often each provider is timed (default: cpu 7, cuda 20)")
    parser.add_argument(
        "--output",
        type=Path,
        help="the JSON (default: the machine and the date, in bench/results; with -k build/bench.json)",
    )
    parser.add_argument("--show", type=Path, help="print the tables of a JSON that is there already, run nothing")
    parser.add_argument(
        "--rerun-of", type=Path, help="a JSON: run again, write beside it what is found, and say how far both agree"
    )
    arguments = parser.parse_args()
    for name in ("show", "rerun_of"):
        path = getattr(arguments, name)
        if path and not path.is_file():
            parser.error(f"--{name.replace('_', '-')}: no file {path}")
    if arguments.rerun_of:
        arguments.device = json.loads(arguments.rerun_of.read_text())["fastkd"]["device"]
    if arguments.rounds is None:
        arguments.rounds = {"cpu": 7, "cuda": 20}[arguments.device]
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1 wanted")
    if arguments.device == "cuda" and not arguments.show and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    return arguments


def main():
    arguments = parse_arguments()
    if arguments.show:
        show(json.loads(arguments.show.read_text()))
        return 0
    output = arguments.output or default_output(arguments.device, arguments.k)
    if arguments.rerun_of and not arguments.output:
        output = arguments.rerun_of.with_suffix(".rerun.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.unlink(missing_ok=True)  # what is shown at the end is of this run
    options = [f"--bench-device={arguments.device}", f"--rounds={arguments.rounds}", f"--benchmark-json={output}"]
    files = [str(path) for path in sorted(HERE.glob("bench_*.py"))]
    code = pytest.main(["-v", "-p", "no:cacheprovider", "--benchmark-quiet", *options, "-k", arguments.k, *files])
    if output.exists() and output.stat().st_size:  # a case that failed does not hide the others
        data = json.loads(output.read_text())
        show(data)
        if arguments.rerun_of:
            show_agreement(json.loads(arguments.rerun_of.read_text()), data)
        print(output)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
