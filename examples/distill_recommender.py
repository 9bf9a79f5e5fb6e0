"""A wide-and-deep recommender teaches a small factorization machine: what distillation brings to a ranking.

The data are synthetic by default: users and items with latent factors, categorical features, popularity, and
series of which no feature tells. Most users take few items: with about three times as many interactions each, no loss
helped a student. MovieLens 100K is read with --data FOLDER (its terms: examples/recommender_data.py).
A fifth of each user's interactions is held out at random. What is ranked is the whole catalogue less what
the user took in training.

Both models see the same features: user, user's side features and history; item and item's side features. In each batch
a random half of a user's training interactions is the history, and the other half is to be found among all
items that are not in it. The teacher (Cheng et al. 2016) crosses every feature of the history and the user's side
with every feature of the item, which is the wide part, and puts embeddings of both through an MLP, the deep part.
The student is a factorization machine (Rendle 2010). Students are trained

* alone, on the interactions;
* with the teacher's scores as well, a softmax over all candidates of a user: fastkd.KLDivLoss;
* with relations instead: distances between the users of a batch (fastkd.RKDDistanceLoss), or which items are near an
  item, among some items (fastkd.RelationKLLoss), shall be those of the teacher's embeddings;
* with the scores and both relations.

Within a seed all students have the same initial weights, batches and histories; the teacher is the same for all
seeds. Settings and the weights of the losses were compared on the synthetic data with --validation, which holds out
an eighth of the training interactions, scores on them, and leaves the test interactions alone.

    make distill-recommend                           # a table; figure and numbers in outputs/
    python examples/distill_recommender.py --help    # the same, where fastkd[examples] is installed
"""

import argparse
import contextlib
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from recommender_data import hold_out, make_synthetic, read_movielens
from recommender_models import FACTORS, FactorizationMachine, Features, Output, WideAndDeep
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress
from rich.table import Table

import fastkd

TOP = 10  # of the ranking that is scored
BATCH_USERS, SAMPLED_ITEMS = 128, 256  # that a batch relates
TEACHER_SEED = 10_000  # away from the students' 0, 1, 2, ...
TEACHER_LEARNING_RATE, LEARNING_RATE = 3e-3, 1e-2
WIDE_DECAY, TEACHER_DECAY, DECAY = 1e-5, 1e-4, 2e-4
NEIGHBOUR_TEMPERATURE = 0.2  # of cosines
TIMED = 5


@dataclass
class Batch:
    users: Features
    history: torch.Tensor  # bool [users, items]
    targets: torch.Tensor  # the same shape: what is to be found
    sampled: torch.Tensor  # items to relate
    teacher: Output | None = None


class Catalogue:
    """The training interactions, and batches and rankings of them."""

    def __init__(self, data, train, test):
        self.train, self.test, self.user_side = train, test, data.user_side
        self.items = Features(torch.arange(train.shape[1]), data.item_side)
        users, items = train.shape
        self.user_features = users + data.user_side.shape[1] + items
        self.item_features = items + data.item_side.shape[1]

    def users(self, ids, history):
        lengths = history.sum(1, keepdim=True).clamp(min=1)
        return Features(ids, torch.cat([self.user_side[ids], history / lengths.sqrt()], 1))

    def batches(self, generator):
        for ids in torch.randperm(len(self.train), generator=generator).split(BATCH_USERS):
            taken = self.train[ids]
            history = taken & (torch.rand(taken.shape, generator=generator) < 0.5)
            sampled = torch.randperm(taken.shape[1], generator=generator)[:SAMPLED_ITEMS]
            yield Batch(self.users(ids, history), history, taken & ~history, sampled)

    @torch.no_grad()
    def scores(self, model):
        """Of all items for all users, with all training interactions as history."""
        parts = torch.arange(len(self.train)).split(BATCH_USERS)
        return torch.cat([model(self.users(ids, self.train[ids]), self.items).scores for ids in parts])

    def metrics(self, scores):
        return rank_metrics(scores.masked_fill(self.train, -math.inf), self.test)


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


def candidates(output, batch):
    """The scores of what a user could be offered: with minus infinity, the history has no probability."""
    return output.scores.masked_fill(batch.history, -math.inf)


def interaction_loss(output, batch):
    """The softmax over a user's candidates, of which each target is one: mean over targets, then users."""
    log_p = candidates(output, batch).log_softmax(1).masked_fill(~batch.targets, 0)
    return -(log_p.sum(1) / batch.targets.sum(1).clamp(min=1)).mean()


@dataclass
class Method:
    name: str
    loss: Callable  # of the student's Output and the Batch
    color: str


def make_methods(args):
    """The students' losses, in the order of the table."""
    soft = fastkd.KLDivLoss(temperature=args.temperature)
    distances = fastkd.RKDDistanceLoss()
    neighbours = fastkd.RelationKLLoss(temperature=NEIGHBOUR_TEMPERATURE, normalize=True)

    def of_scores(output, batch):
        divergence = soft(candidates(output, batch), candidates(batch.teacher, batch))
        return args.hard_weight * interaction_loss(output, batch) + args.soft_weight * divergence

    def of_users(output, batch):
        return args.user_weight * distances(output.users, batch.teacher.users)

    def of_items(output, batch):
        return args.item_weight * neighbours(output.items[batch.sampled], batch.teacher.items[batch.sampled])

    return [
        Method("student alone", interaction_loss, "#767676"),
        Method("+ scores", of_scores, "#d55e00"),
        Method("+ users' distances", lambda o, b: interaction_loss(o, b) + of_users(o, b), "#0072b2"),
        Method("+ items' neighbours", lambda o, b: interaction_loss(o, b) + of_items(o, b), "#009e73"),
        Method("+ scores and both", lambda o, b: of_scores(o, b) + of_users(o, b) + of_items(o, b), "#e69f00"),
    ]


def make_teacher(catalogue):
    return WideAndDeep(catalogue.user_features, catalogue.item_features, len(catalogue.train))


def train_teacher(catalogue, epochs, advance):
    torch.manual_seed(TEACHER_SEED)
    generator = torch.Generator().manual_seed(TEACHER_SEED)
    teacher = make_teacher(catalogue)
    others = [p for name, p in teacher.named_parameters() if name != "crossed"]
    groups = [
        {"params": [teacher.crossed], "weight_decay": WIDE_DECAY},
        {"params": others, "weight_decay": TEACHER_DECAY},
    ]
    optimizer = torch.optim.Adam(groups, lr=TEACHER_LEARNING_RATE)
    for _ in range(epochs):
        for batch in catalogue.batches(generator):
            optimizer.zero_grad()
            interaction_loss(teacher(batch.users, catalogue.items), batch).backward()
            optimizer.step()
        advance()
    return teacher.eval().requires_grad_(False)


class Run:
    """One student that learns by one method."""

    def __init__(self, method, student):
        self.method = method
        self.student = copy.deepcopy(student)
        self.optimizer = torch.optim.Adam(self.student.parameters(), lr=LEARNING_RATE, weight_decay=DECAY)
        self.metrics = []  # after each epoch

    def step(self, batch, items):
        self.optimizer.zero_grad()
        self.method.loss(self.student(batch.users, items), batch).backward()
        self.optimizer.step()


def train_students(seed, methods, catalogue, teacher, epochs, advance):
    """One student per method; all take the same steps in turn. Returns their runs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    student = FactorizationMachine(catalogue.user_features, catalogue.item_features)
    runs = [Run(method, student) for method in methods]
    for _ in range(epochs):
        for batch in catalogue.batches(generator):
            batch.teacher = teacher(batch.users, catalogue.items)
            for run in runs:
                run.step(batch, catalogue.items)
        for run in runs:
            run.metrics.append(catalogue.metrics(catalogue.scores(run.student)))
        advance()
    return runs


def summarize(runs):
    """What the table, the figure and the JSON file say of one method; one run per seed."""
    result = {"method": runs[0].method.name, "ndcg_per_seed_and_epoch": [[m["ndcg"] for m in r.metrics] for r in runs]}
    for metric in runs[0].metrics[-1]:
        final = [run.metrics[-1][metric] for run in runs]
        result[metric] = {"mean": statistics.mean(final), "sd": statistics.stdev(final) if len(final) > 1 else None}
    return result


def once(name, metrics):
    """The same of what is there once: it has no seeds."""
    return {"method": name} | {metric: {"mean": value, "sd": None} for metric, value in metrics.items()}


def milliseconds(catalogue, model):
    """To score the catalogue for all users of a batch; the median of some."""
    ids = torch.arange(min(BATCH_USERS, len(catalogue.train)))
    users, times = catalogue.users(ids, catalogue.train[ids]), []
    with torch.no_grad():
        for _ in range(TIMED):
            start = time.perf_counter()
            model(users, catalogue.items)
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def describe_model(catalogue, model, what):
    parameters = sum(p.numel() for p in model.parameters())
    users = min(BATCH_USERS, len(catalogue.train))
    return (
        f"{what}, {parameters} parameters, {parameters * 4 / 1024:.0f} KiB of float32, "
        f"{milliseconds(catalogue, model):.1f} ms to score all items for {users} users"
    )


def describe(args, data, catalogue):
    """What was chosen, for the reader of the table."""
    users, items = catalogue.train.shape
    torch.manual_seed(TEACHER_SEED)
    student = FactorizationMachine(catalogue.user_features, catalogue.item_features)
    wide_and_deep = f"wide and deep, {args.teacher_epochs} epochs"
    machine = f"factorization machine, {FACTORS} factors, {args.epochs} epochs, {args.seeds} seeds"
    return {
        "data": f"{data.name}: {users} users, {items} items, {catalogue.train.sum()} training interactions, "
        f"{catalogue.test.sum()} {'validation' if args.validation else 'test'} interactions",
        "teacher": describe_model(catalogue, make_teacher(catalogue).eval(), wide_and_deep),
        "student": describe_model(catalogue, student, machine),
        "loss": f"scores: {args.hard_weight:g} x softmax of interactions + {args.soft_weight:g} x KL divergence at "
        f"temperature {args.temperature:g}; users: + {args.user_weight:g} x RKD distances; "
        f"items: + {args.item_weight:g} x KL divergence of similarities",
        "device": "cpu, one thread",
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
    }


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


def number(kind, accepts, wanted):
    """An argparse type that says in a sentence what it wants."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if accepts(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{wanted} wanted, got {text!r}")

    return parse


def parse_arguments():
    """The arguments, and the data they choose."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    whole = number(int, lambda x: x > 0, "a whole number above 0")
    some = number(int, lambda x: x >= 100, "a whole number of at least 100")
    positive = number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
    weight = number(float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")
    parser.add_argument(
        "--data", type=Path, default=argparse.SUPPRESS, help="a folder of MovieLens 100K: u.data, u.user, u.item"
    )
    parser.add_argument("--users", type=some, default=argparse.SUPPRESS, help="of the synthetic data (default: 2000)")
    parser.add_argument("--items", type=some, default=argparse.SUPPRESS, help="of the synthetic data (default: 1000)")
    parser.add_argument("--epochs", type=whole, default=20, help="of each student")
    parser.add_argument("--teacher-epochs", type=whole, default=20, help="of the teacher")
    parser.add_argument("--seeds", type=whole, default=5, help="how many times the students are trained")
    parser.add_argument("--temperature", type=positive, default=1.0, help="softens student and teacher")
    parser.add_argument("--hard-weight", type=weight, default=0.3, help="of the interactions, beside the scores")
    parser.add_argument("--soft-weight", type=weight, default=0.7, help="of the divergence from the teacher's scores")
    parser.add_argument("--user-weight", type=weight, default=0.03, help="of the distances between users")
    parser.add_argument("--item-weight", type=weight, default=0.1, help="of the divergence of items' similarities")
    parser.add_argument("--validation", action="store_true", help="score on a part of the training interactions")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder of the figure and the numbers")
    args = parser.parse_args()
    if args.hard_weight == args.soft_weight == 0:
        parser.error("--hard-weight and --soft-weight: one of them must be above 0")
    args.data, sized = getattr(args, "data", None), {"users", "items"} & set(vars(args))
    if args.data and sized:
        parser.error(f"--{' and --'.join(sorted(sized))}: of the synthetic data, and --data names others")
    if not args.data:
        args.users, args.items = getattr(args, "users", 2000), getattr(args, "items", 1000)
    try:
        data = read_movielens(args.data) if args.data else make_synthetic(args.users, args.items)
    except (OSError, ValueError) as error:
        parser.error(f"--data: {error}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output: {args.output} cannot be made a folder: {error.strerror}")
    return args, data


def main():
    args, data = parse_arguments()
    torch.set_num_threads(1)  # networks this small are slower on more
    train, test = hold_out(data.taken, 0.2, seed=0)
    if args.validation:
        train, test = hold_out(train, 0.125, seed=1)
    catalogue, methods = Catalogue(data, train, test), make_methods(args)
    settings = describe(args, data, catalogue)
    grid = Table.grid(padding=(0, 2))
    for setting in settings.items():
        grid.add_row(*setting)
    console = Console()
    console.print(grid)
    with Progress("{task.description}", BarColumn(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("teacher epochs", total=args.teacher_epochs)
        teacher = train_teacher(catalogue, args.teacher_epochs, functools.partial(progress.advance, task))
        task = progress.add_task("student epochs", total=args.seeds * args.epochs)
        advance = functools.partial(progress.advance, task)
        seeds = [train_students(seed, methods, catalogue, teacher, args.epochs, advance) for seed in range(args.seeds)]
    popularity = once("popularity", catalogue.metrics(train.sum(0).float().expand(train.shape)))
    taught_by = once("teacher", catalogue.metrics(catalogue.scores(teacher)))
    results = [summarize(runs) for runs in zip(*seeds, strict=True)]
    print_results(console, popularity, results, taught_by, args)
    draw(args.output / "distill_recommender.png", popularity, results, taught_by, methods, args)
    numbers = {"arguments": vars(args) | {"output": str(args.output), "data": args.data and str(args.data)}}
    numbers |= {"settings": settings, "popularity": popularity, "students": results, "teacher": taught_by}
    (args.output / "distill_recommender.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"Figure and numbers: {args.output}/distill_recommender.png and .json", soft_wrap=True)


if __name__ == "__main__":
    main()
