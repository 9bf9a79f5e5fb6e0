"""How examples/distill_text.py measures students beside their teacher, and what it prints and draws of them."""

import math

import torch
from matplotlib.figure import Figure
from rich.table import Table
from scipy.stats import spearmanr

NEIGHBOURS = 10


def neighbours(embeddings):
    return (embeddings @ embeddings.T).fill_diagonal_(-math.inf).topk(NEIGHBOURS).indices


def recall(embeddings, teacher):
    """The share of the teacher's nearest neighbours that are the student's too."""
    found = neighbours(embeddings)[:, :, None] == neighbours(teacher)[:, None]
    return found.any(1).float().mean().item()


def rank_correlation(embeddings, teacher):
    """Spearman's, of the cosine similarities of all pairs."""
    first, second = torch.triu_indices(len(teacher), len(teacher), 1)
    student, teacher = ((x @ x.T)[first, second].cpu() for x in (embeddings, teacher))
    return spearmanr(student, teacher).statistic.item()


def percent(result, measure):
    mean, sd = result[f"{measure}_mean"], result[f"{measure}_sd"]
    return f"{100 * mean:.1f}" if sd is None else f"{100 * mean:.1f} ± {100 * sd:.1f}"


def chance(texts):
    """The recall of neighbours that are drawn."""
    return NEIGHBOURS / (len(texts.lengths) - 1)


def print_results(console, results, args):
    """The table, and what it says about what the losses bring."""
    table = Table(title=f"Students after {args.epochs} epochs, {args.seeds} seeds")
    table.add_column("student", no_wrap=True)
    for column in ("width", f"recall@{NEIGHBOURS}\n%", "rank corr.\n%", "loss µs\n/ step", "all ms\n/ step"):
        table.add_column(column, justify="right", no_wrap=True)
    for result, following in zip(results, [*results[1:], results[-1]], strict=True):
        times = "-", "-"
        if result["step_us_median"]:
            times = f"{result['loss_us_median']:.0f}", f"{result['step_us_median'] / 1000:.1f}"
        measures = percent(result, "recall"), percent(result, "rank_correlation")
        table.add_row(
            result["method"], str(result["width"]), *measures, *times, end_section=result["by"] != following["by"]
        )
    console.print(table)
    untrained, alone, *taught = results

    def best(measure, by):
        result = max((r for r in taught if r["by"] == by), key=lambda r: r[f"{measure}_mean"])
        return f"{percent(result, measure)} % by {by} ({result['method']})"

    measures = {
        "recall": f"Of the {NEIGHBOURS} nearest neighbours that a sentence has for the teacher, found again: ",
        "rank_correlation": "The rank correlation of all similarities: ",
    }
    for measure, opening in measures.items():
        alone_gain = alone[f"{measure}_mean"] - untrained[f"{measure}_mean"]
        better = sum(r[f"{measure}_mean"] > max(x[f"{measure}_mean"] for x in (untrained, alone)) for r in taught)
        console.print(
            f"{opening}{percent(untrained, measure)} % by the untrained student, {100 * alone_gain:+.1f} points by "
            f"learning alone; at best {best(measure, 'features')} and "
            f"{best(measure, 'relations')}. {better} of {len(taught)} losses do better than no teacher.",
            highlight=False,
        )
    shares = [100 * r["loss_us_median"] / r["step_us_median"] for r in taught]
    console.print(
        "Loss: the loss with its gradient to the embeddings and to the layer behind them, median; all: with the "
        f"student and the optimizer. The losses take {min(shares):.1f} to {max(shares):.1f} % of a step.",
        highlight=False,
    )


def draw(path, results, methods, chance, args):
    """Both measures, a bar for each student."""
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    measures = {
        "recall": f"recall@{NEIGHBOURS} (%); dotted: by chance",
        "rank_correlation": "rank correlation of all similarities (%)",
    }
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (measure, label) in zip(panels, measures.items(), strict=True):
        for row, (method, result) in enumerate(zip(methods, results, strict=True)):
            mean, sd = 100 * result[f"{measure}_mean"], 100 * (result[f"{measure}_sd"] or 0)
            axes.barh(row, mean, xerr=sd, color=method.color, alpha=0.5, capsize=4)
            axes.text(0.02, row, percent(result, measure), transform=axes.get_yaxis_transform(), va="center")
        axes.set_xlabel(label)
    panels[0].axvline(100 * chance, color="black", linestyle=":")
    panels[0].set_yticks(range(len(methods)), [method.name for method in methods])
    panels[0].invert_yaxis()
    figure.suptitle(
        "Students beside their teacher, all-MiniLM-L6-v2, on held-out sentences: "
        f"mean ± sd of {args.seeds} seeds, {args.epochs} epochs"
    )
    figure.savefig(path, dpi=130)
