"""What the examples share: arguments of a command line, what is shown while they run, and the file of numbers."""

import argparse
import contextlib
import json
import math

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.table import Table


def number(kind, accepts, wanted):
    """An argparse type that says in a sentence what it wants."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{wanted} wanted, got {text!r}")

    return parse


WHOLE = number(int, lambda x: x > 0, "a whole number above 0")
POSITIVE = number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
WEIGHT = number(float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def choose_device(parser, args):
    """What --device auto stands for; an error where there is no device of that kind."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"


def make_folder(parser, args):
    """The folder of --output."""
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {args.output} cannot be made a folder: {error.strerror}")


def print_settings(console, settings):
    grid = Table.grid(padding=(0, 2))
    for setting in settings.items():
        grid.add_row(*setting)
    console.print(grid)


def show_progress(console):
    return Progress("{task.description}", BarColumn(), MofNCompleteColumn(), console=console)


def write_numbers(console, folder, name, numbers):
    """Beside the figure of the same name."""
    (folder / f"{name}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"Figure and numbers: {folder}/{name}.png and .json", soft_wrap=True)
