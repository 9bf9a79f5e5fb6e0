"""How examples/distill_recommender.py scores rankings, and what it prints and draws of them."""

import math
import statistics

import torch
from matplotlib.figure import Figure
from rich.table import Table

TOP = 10  # of the ranking that is scored


def rank_metrics(scores, relevant):
    """NDCG and recall of the first TOP items, and the mean reciprocal rank of the first relevant one.

    Recall is the share of min(TOP, number of relevant items) that is found, so that a perfect ranking has 1 in all.
    Users without a relevant item do not count.
    """
    rows = relevant.any(1)
    order = scores[rows].argsort(1, descending=True)
    found = relevant[rows].gather(1, order).float()
    top = min(TOP, found.shape[1])
    possible = relevant[rows].sum(1).clamp(max=top)
    discounts = 1 / torch.log2(torch.arange(top) + 2.0)
    ndcg = found[:, :top] @ discounts / discounts.cumsum(0)[possible - 1]
    recall = found[:, :top].sum(1) / possible
    first = found.argmax(1) + 1.0
    return {"ndcg": ndcg.mean().item(), "recall": recall.mean().item(), "mrr": (1 / first).mean().item()}


def show(value):
    return f"{value['mean']:.4f}" if value["sd"] is None else f"{value['mean']:.4f} ± {value['sd']:.4f}"


def compare(result, alone):
    """How a method's NDCG differs from the student's that learns alone, and whether the seeds agree on it."""
    pairs = zip(result["ndcg_per_seed_and_epoch"], alone["ndcg_per_seed_and_epoch"], strict=True)
    differences = [theirs[-1] - own[-1] for theirs, own in pairs]
    better, seeds = sum(d > 0 for d in differences), len(differences)
    verdict = {seeds: "it helps", 0: "it does not help"}.get(better, "the seeds do not agree that it helps")
    if seeds == 1:
        verdict = "one seed proves nothing"
    return f"{statistics.mean(differences):+.4f} (better in {better} of {seeds} seeds: {verdict})"


def print_results(console, popularity, results, teacher, args):
    """The table, and what it says about where the gain comes from."""
    part = "validation" if args.validation else "test"
    table = Table(
        title=f"Whole catalogue, {part} interactions, students after {args.epochs} epochs, {args.seeds} seeds"
    )
    table.add_column("model")
    for column in (f"NDCG@{TOP}", f"recall@{TOP}", "MRR"):
        table.add_column(column + ("\nmean ± sd" if args.seeds > 1 else ""), justify="right", no_wrap=True)
    for result in (popularity, *results, teacher):
        table.add_row(result["method"], *(show(result[metric]) for metric in ("ndcg", "recall", "mrr")))
    console.print(table)
    alone, *taught = results
    sentences = [f"{result['method'][2:]}: {compare(result, alone)}" for result in taught]
    ahead = teacher["ndcg"]["mean"] - alone["ndcg"]["mean"]
    best = max(taught, key=lambda result: result["ndcg"]["mean"])
    gain = best["ndcg"]["mean"] - alone["ndcg"]["mean"]
    gap = f"The teacher's NDCG@{TOP} is {ahead:+.4f} beside that of the student alone"
    if ahead > 0 and gain > 0:
        gap += f", and the best taught student ({best['method'][2:]}) makes up {100 * gain / ahead:.0f} % of that"
    console.print(
        f"NDCG@{TOP} beside the student alone, of the teacher's "
        + "; ".join(sentences)
        + f". {gap}. Users' distances and items' neighbours are those of the embeddings of the deep part: what the "
        "wide part knows is only in the scores.",
        highlight=False,
    )


def draw(path, popularity, results, teacher, methods, args):
    """NDCG over the epochs, and at the end."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    epochs = range(1, args.epochs + 1)
    for row, (method, result) in enumerate(zip(methods, results, strict=True)):
        seeds = torch.tensor(result["ndcg_per_seed_and_epoch"])
        mean, sd = seeds.mean(0), seeds.std(0, correction=min(1, args.seeds - 1))
        curves.plot(epochs, mean, color=method.color, label=method.name, linewidth=2)
        curves.fill_between(epochs, mean - sd, mean + sd, color=method.color, alpha=0.15, linewidth=0)
        bars.barh(row, mean[-1], xerr=sd[-1], color=method.color, alpha=0.5, capsize=4)
        label = bars.text(0.02, row, show(result["ndcg"]), transform=bars.get_yaxis_transform(), va="center")
        label.set_bbox({"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 2})
    lines = ((teacher, "#cc79a7", "-"), (popularity, "black", ":"))
    everything = [result["ndcg"] for result in (popularity, *results, teacher)]
    low = math.floor(100 * min(value["mean"] for value in everything)) / 100
    high = max(value["mean"] + (value["sd"] or 0) for value in everything)
    for result, color, line in lines:
        value = result["ndcg"]["mean"]
        curves.axhline(value, color=color, linestyle=line, linewidth=2, label=f"{result['method']}, {value:.4f}")
        bars.axvline(value, color=color, linestyle=line, linewidth=2)
    curves.set(title="Over the epochs", xlabel="epoch", ylabel=f"NDCG@{TOP}, mean ± sd of {args.seeds} seeds")
    curves.set(xlim=(1, max(2, args.epochs)))
    curves.xaxis.get_major_locator().set_params(integer=True)
    curves.autoscale(axis="y")  # the horizontal lines are inside too
    curves.legend(loc="lower right")
    curves.grid(alpha=0.3)
    bars.set(
        title=f"After epoch {args.epochs}",
        xlabel=f"NDCG@{TOP}, axis from {low:g}",
        xlim=(low, low + 1.1 * (high - low)),
    )
    bars.set_yticks(range(len(methods)), [method.name for method in methods])
    bars.invert_yaxis()
    name = "MovieLens 100K" if args.data else "synthetic interactions"
    figure.suptitle(f"Distillation of a recommender, {name}: a wide-and-deep teacher, factorization machines")
    figure.savefig(path, dpi=130)
