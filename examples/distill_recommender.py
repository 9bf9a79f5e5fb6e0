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
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import POSITIVE, WEIGHT, WHOLE, make_folder, number, print_settings, show_progress, write_numbers
from recommender_data import hold_out, make_synthetic, read_movielens
from recommender_models import FACTORS, FactorizationMachine, Features, Output, WideAndDeep
from recommender_report import draw, print_results, rank_metrics
from rich.console import Console

import fastkd

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


def parse_arguments():
    """The arguments, and the data they choose."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    some = number(int, lambda x: x >= 100, "a whole number of at least 100")
    parser.add_argument(
        "--data", type=Path, default=argparse.SUPPRESS, help="a folder of MovieLens 100K: u.data, u.user, u.item"
    )
    parser.add_argument("--users", type=some, default=argparse.SUPPRESS, help="of the synthetic data (default: 2000)")
    parser.add_argument("--items", type=some, default=argparse.SUPPRESS, help="of the synthetic data (default: 1000)")
    parser.add_argument("--epochs", type=WHOLE, default=20, help="of each student")
    parser.add_argument("--teacher-epochs", type=WHOLE, default=20, help="of the teacher")
    parser.add_argument("--seeds", type=WHOLE, default=5, help="how many times the students are trained")
    parser.add_argument("--temperature", type=POSITIVE, default=1.0, help="softens student and teacher")
    parser.add_argument("--hard-weight", type=WEIGHT, default=0.3, help="of the interactions, beside the scores")
    parser.add_argument("--soft-weight", type=WEIGHT, default=0.7, help="of the divergence from the teacher's scores")
    parser.add_argument("--user-weight", type=WEIGHT, default=0.03, help="of the distances between users")
    parser.add_argument("--item-weight", type=WEIGHT, default=0.1, help="of the divergence of items' similarities")
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
    make_folder(parser, args)
    return args, data


def main():
    args, data = parse_arguments()
    torch.set_num_threads(1)  # networks this small are slower on more
    train, test = hold_out(data.taken, 0.2, seed=0)
    if args.validation:
        train, test = hold_out(train, 0.125, seed=1)
    catalogue, methods = Catalogue(data, train, test), make_methods(args)
    settings = describe(args, data, catalogue)
    console = Console()
    print_settings(console, settings)
    with show_progress(console) as progress:
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
    write_numbers(console, args.output, "distill_recommender", numbers)


if __name__ == "__main__":
    main()
