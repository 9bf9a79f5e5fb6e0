"""What examples/distill_digits.py prints and draws: students beside each other, and over the epochs."""

import math

import torch
from matplotlib.figure import Figure
from rich.table import Table


def percent(result):
    mean, sd = result["accuracy_mean"], result["accuracy_sd"]
    return f"{mean:.2f}" if sd is None else f"{mean:.2f} ± {sd:.2f}"


def print_results(console, results, args):
    """The table, and what it says about where the gain comes from."""
    table = Table(title=f"Students after {args.epochs} epochs, {args.seeds} seeds")
    table.add_column("student")
    for column in ("test accuracy\n% ± sd", "loss time\nµs / step", "loss peak\nKiB"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        time_us, peak_kib = f"{result['loss_us_median']:.0f}", f"{result['loss_peak_kib']:.1f}"
        table.add_row(result["method"], percent(result), time_us, peak_kib)
    console.print(table)
    alone, same, everything, plain, relational, contrastive, hinted, supervised = (
        result["accuracy_mean"] for result in results
    )
    console.print(
        f"From the teacher: {everything - alone:+.2f} points of accuracy, of which {same - alone:+.2f} by soft "
        f"targets on the labelled images and {everything - same:+.2f} by the images that only the teacher labels. "
        f"Beside every label without a teacher: {everything - supervised:+.2f}. "
        f"fastkd beside plain PyTorch: {everything - plain:+.2f}. Relations on top of soft targets: "
        f"{relational - everything:+.2f}; contrast: {contrastive - everything:+.2f}; "
        f"a hint: {hinted - everything:+.2f}.\n"
        "Loss time: loss and its gradients to logits and features, cross-entropy included, median. Loss peak: memory "
        "that these hold at most in a step, beside what the loss is given. With ten classes the time is mostly that "
        "of calling operators; make bench measures large vocabularies and batches.",
        highlight=False,
    )


def draw(path, results, methods, teacher_accuracy, args):
    """Accuracy over the epochs, and at the end."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    epochs = range(1, args.epochs + 1)
    for row, (method, result) in enumerate(zip(methods, results, strict=True)):
        seeds = torch.tensor(result["accuracy_per_seed_and_epoch"])
        mean, sd = seeds.mean(0), seeds.std(0, correction=min(1, args.seeds - 1))
        curves.plot(epochs, mean, color=method.color, linestyle=method.line, label=method.name, linewidth=2)
        curves.fill_between(epochs, mean - sd, mean + sd, color=method.color, alpha=0.15, linewidth=0)
        bars.barh(row, mean[-1], xerr=sd[-1], color=method.color, alpha=0.5, capsize=4)
        bars.text(0.02, row, percent(result), transform=bars.get_yaxis_transform(), va="center")
    low = max(0, 10 * math.floor(min(result["accuracy_mean"] for result in results) / 10) - 10)
    curves.axhline(teacher_accuracy, color="#cc79a7", linewidth=2, label=f"teacher, {teacher_accuracy:.1f} %")
    bars.axvline(teacher_accuracy, color="#cc79a7", linewidth=2)
    curves.set(title="Over the epochs", xlabel="epoch", ylabel=f"test accuracy (%), mean ± sd of {args.seeds} seeds")
    curves.set(xlim=(1, max(2, args.epochs)), ylim=(low, 100))
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    bars.set(title=f"After epoch {args.epochs}", xlabel=f"test accuracy (%), axis from {low}", xlim=(low, 100))
    bars.set_yticks(range(len(methods)), [method.name.replace(": ", ":\n").replace(", ", ",\n") for method in methods])
    bars.invert_yaxis()
    figure.suptitle(f"Distillation on digits, {args.labels_per_class} labels per class for the students")
    figure.savefig(path, dpi=130)
