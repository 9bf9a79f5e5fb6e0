"""A teacher teaches small students on real images: what distillation brings, and what its loss costs.

scikit-learn's digits (1797 images of 8x8 pixels, nothing is downloaded) are split once into
training and test images. The teacher, an ensemble of small ConvNets, learns from every training
label. The students, tiny MLPs, are given the labels of a few images per class and are trained

* on these labels alone;
* with fastkd's loss as well, on the same labelled images only: what soft targets add;
* with fastkd's loss on all training images: a teacher can also say what unlabelled images show;
* the same with the loss in plain PyTorch: equal accuracy is expected, time and memory differ;
* with relational distillation as well: distances and angles between the images of a batch, in the
  features before the last layer (16 of the student's, 320 of the teacher's), shall be alike;
* with a contrastive relation as well: an image's features shall be nearer to those of the images that
  are its neighbours for the teacher than to all others in the batch, by a margin;
* with a hint as well: these features, projected by a layer that learns with the student, shall be
  the teacher's;
* on every label, without a teacher: what the labels that the teacher saw are worth by themselves.

Within a seed all students have the same initial weights, batches and labelled images. Settings
were compared on images held out of the training split, and accuracy is that of the last epoch.

    make distill                                # a table; figure and numbers in outputs/
    python examples/distill_digits.py --help    # the same, where fastkd[examples] is installed
"""

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from command_line import (
    POSITIVE,
    WEIGHT,
    WHOLE,
    choose_device,
    make_folder,
    print_settings,
    show_progress,
    write_numbers,
)
from digits_report import draw, print_results
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fastkd

CLASSES = 10
TRAIN_IMAGES = 797
BATCHES = 10  # per epoch; no more than CLASSES, so that one label per class reaches every batch
TEACHERS = 5
TEACHER_SEED = 10_000  # away from the students' 0, 1, 2, ...
TEACHER_UNITS, STUDENT_UNITS = 64, 16  # features before the last layer
LEARNING_RATE = 1e-2
WARM_UP_STEPS = 20  # whose times do not count
UNLABELLED = -100  # F.cross_entropy ignores it


@dataclass
class Data:
    """Images with labels, and for training images what the teacher says of them."""

    images: torch.Tensor
    labels: torch.Tensor
    known_labels: torch.Tensor | None = None  # those that the students are given, else UNLABELLED
    labelled: torch.Tensor | None = None  # where they are
    teacher: torch.Tensor | None = None  # logits
    teacher_features: torch.Tensor | None = None  # before the last layer, those of all members side by side

    def __getitem__(self, rows):
        return Data(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass
class Method:
    name: str
    loss: Callable  # of a batch: the student's logits, its features before the last layer, the Data, the projector
    color: str
    line: str = "-"
    make_projector: Callable = nn.Identity  # what learns with the student


def make_methods(args):
    """The students' losses, in the order of the table."""
    T = args.temperature
    fast_kl, relations = fastkd.KLDivLoss(temperature=T), fastkd.RKDLoss()
    contrast = fastkd.RelationalTripletLoss(positives=5)

    def plain_kl(student, teacher):
        log_p, log_q = F.log_softmax(student / T, -1), F.log_softmax(teacher / T, -1)
        return F.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * T * T

    def hard(logits, _, batch, __):
        return F.cross_entropy(logits, batch.known_labels)

    def with_hard(soft):
        return lambda s, f, b, p: args.soft_weight * soft(s, b) + args.hard_weight * hard(s, f, b, p)

    soft_targets = with_hard(lambda s, b: fast_kl(s, b.teacher))

    def with_relations(logits, features, batch, projector):
        relational = relations(features, batch.teacher_features)
        return soft_targets(logits, features, batch, projector) + args.relation_weight * relational

    def with_contrast(logits, features, batch, projector):
        contrastive = contrast(features, batch.teacher_features)
        return soft_targets(logits, features, batch, projector) + args.contrast_weight * contrastive

    def make_hint():
        return fastkd.LinearFeatureMSELoss(STUDENT_UNITS, TEACHERS * TEACHER_UNITS)

    def with_hint(logits, features, batch, hint):
        hinted = hint(features, batch.teacher_features)
        return soft_targets(logits, features, batch, hint) + args.hint_weight * hinted

    return [
        Method("few labels, no teacher", hard, "#767676"),
        Method(
            "+ teacher, same images: fastkd", with_hard(lambda s, b: fast_kl(s, b.teacher, mask=b.labelled)), "#0072b2"
        ),
        Method("+ teacher, all images: fastkd", soft_targets, "#d55e00"),
        Method("+ teacher, all images: PyTorch", with_hard(lambda s, b: plain_kl(s, b.teacher)), "black", ":"),
        Method("+ relations, all images: fastkd", with_relations, "#e69f00"),
        Method("+ contrast, all images: fastkd", with_contrast, "#8c510a"),
        Method("+ hint, all images: fastkd", with_hint, "#56b4e9", make_projector=make_hint),
        Method("every label, no teacher", lambda s, _, b, __: F.cross_entropy(s, b.labels), "#009e73", "--"),
    ]


def make_convnet():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(64 * 4 * 4, TEACHER_UNITS), nn.ReLU(), nn.Linear(TEACHER_UNITS, CLASSES),
    )  # fmt: skip


def make_student():  # with GELU: many of so few ReLUs die
    return nn.Sequential(nn.Flatten(), nn.Linear(64, STUDENT_UNITS), nn.GELU(), nn.Linear(STUDENT_UNITS, CLASSES))


def load_data(device):
    """Training and test images; the split is always the same."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32, device=device)[:, None] / 16
    labels = torch.tensor(digits.target, device=device)
    parts = train_test_split(range(len(labels)), train_size=TRAIN_IMAGES, stratify=digits.target, random_state=0)
    return [Data(images[rows], labels[rows]) for rows in parts]


def accuracy(logits, labels):
    """In percent."""
    return 100 * (logits.argmax(-1) == labels).float().mean().item()


def batches(order):
    """Deals the rows out, so that the labelled ones, which come first, are spread evenly."""
    return [order[first::BATCHES] for first in range(BATCHES)]


def train_teacher(train, epochs, advance):
    """An ensemble trained on every label, as a function from images to its mean logits and all its features."""
    members = []
    for member in range(TEACHERS):
        torch.manual_seed(TEACHER_SEED + member)
        model = make_convnet().to(train.images.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE / 10)
        for _ in range(epochs):
            for rows in batches(torch.randperm(TRAIN_IMAGES)):
                optimizer.zero_grad()
                F.cross_entropy(model(train.images[rows]), train.labels[rows]).backward()
                optimizer.step()
            advance()
        members.append(model.eval())

    @torch.no_grad()
    def ensemble(images):
        features = [member[:-1](images) for member in members]
        logits = [member[-1](own) for member, own in zip(members, features, strict=True)]
        return torch.stack(logits).mean(0), torch.cat(features, 1)

    return ensemble


class Run:
    """One student that learns by one method."""

    def __init__(self, method, student, device):
        self.method = method
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.student = copy.deepcopy(student)
        self.projector = method.make_projector().to(device)
        self.optimizer = torch.optim.Adam([*self.student.parameters(), *self.projector.parameters()], lr=LEARNING_RATE)
        self.accuracies = []  # test accuracy after each epoch
        self.times = []  # of the loss and its gradient, in microseconds

    def gradients(self, outputs):
        """Of the loss, to logits, features and the projector; zeros where it does not look at them."""
        loss = self.method.loss(*outputs, self.batch, self.projector)
        return torch.autograd.grad(loss, (*outputs, *self.projector.parameters()), materialize_grads=True)

    def step(self, batch):
        self.batch = batch
        features = self.student[:-1](batch.images)
        outputs = self.student[-1](features), features
        leaves = [output.detach().requires_grad_() for output in outputs]  # without the network's time
        self.wait()
        start = time.perf_counter()
        gradients = self.gradients(leaves)
        self.wait()
        self.times.append(1e6 * (time.perf_counter() - start))
        self.optimizer.zero_grad()
        torch.autograd.backward(outputs, gradients[: len(outputs)])
        for parameter, gradient in zip(self.projector.parameters(), gradients[len(outputs) :], strict=True):
            parameter.grad = gradient
        self.optimizer.step()


def choose_labelled(labels, per_class, generator):
    """Rows to be labelled, the same number of each class, and the others."""
    shuffled = torch.randperm(len(labels), generator=generator)
    seen = F.one_hot(labels[shuffled]).cumsum(0)  # of each class, up to each row
    chosen = seen.gather(1, labels[shuffled, None]).flatten() <= per_class
    return shuffled[chosen], shuffled[~chosen]


def train_students(seed, methods, train, test, args, advance):
    """One student per method; all take the same steps in turn. Returns their runs."""
    generator = torch.Generator().manual_seed(seed)
    labelled, unlabelled = choose_labelled(train.labels.cpu(), args.labels_per_class, generator)
    known_labels = torch.full_like(train.labels, UNLABELLED)
    known_labels[labelled] = train.labels[labelled]
    train = replace(train, known_labels=known_labels, labelled=known_labels != UNLABELLED)
    torch.manual_seed(seed)
    student = make_student().to(args.device)
    runs = [Run(method, student, args.device) for method in methods]
    for _ in range(args.epochs):
        shuffled = [rows[torch.randperm(len(rows), generator=generator)] for rows in (labelled, unlabelled)]
        for rows in batches(torch.cat(shuffled)):
            batch = train[rows]
            for run in runs:
                run.step(batch)
        for run in runs:
            with torch.no_grad():
                run.accuracies.append(accuracy(run.student(test.images), test.labels))
        advance()
    return runs


@contextlib.contextmanager
def quiet_stderr():
    """The profiler of some torch versions writes to it when it starts and stops, from C++."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_memory(run):
    """KiB that the loss of a batch and its gradients hold at most, beside what it is given."""
    logits = torch.randn_like(run.batch.teacher).requires_grad_()
    features = torch.randn(len(logits), STUDENT_UNITS, device=logits.device, requires_grad=True)
    outputs = logits, features
    if logits.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run.gradients(outputs)
        return (torch.cuda.max_memory_allocated() - before) / 1024
    with quiet_stderr(), torch.profiler.profile(profile_memory=True) as profile:
        run.gradients(outputs)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = itertools.accumulate(e["args"]["Bytes"] for e in sorted(events, key=lambda e: e["ts"]))
    return max(held, default=0) / 1024


def summarize(runs):
    """What the table, the figure and the JSON file say of one method; one run per seed."""
    final = [run.accuracies[-1] for run in runs]
    return {
        "method": runs[0].method.name,
        "accuracy_mean": statistics.mean(final),
        "accuracy_sd": statistics.stdev(final) if len(final) > 1 else None,
        "accuracy_per_seed_and_epoch": [run.accuracies for run in runs],
        "loss_us_median": statistics.median(t for run in runs for t in run.times[WARM_UP_STEPS:] or run.times),
        "loss_peak_kib": peak_memory(runs[0]),
    }


def describe(args, train, test):
    """What was chosen, for the reader of the table."""
    teacher, student = (sum(p.numel() for p in model.parameters()) for model in (make_convnet(), make_student()))
    return {
        "data": f"{len(train.labels)} training and {len(test.labels)} test images of 8x8 pixels, {CLASSES} classes",
        "teacher": f"{TEACHERS} ConvNets, {TEACHERS * teacher} parameters in all, "
        f"{args.teacher_epochs} epochs on every training label",
        "student": f"MLP, {student} parameters, {args.epochs} epochs, {args.seeds} seeds",
        "labels": f"{args.labels_per_class} per class for the students, {args.labels_per_class * CLASSES} in all",
        "loss": f"{args.hard_weight:g} x cross-entropy + {args.soft_weight:g} x KL divergence at "
        f"temperature {args.temperature:g}; "
        f"relations: + {args.relation_weight:g} x RKD; contrast: + {args.contrast_weight:g} x triplets; "
        f"hint: + {args.hint_weight:g} x squared differences",
        "device": f"{args.device}, one CPU thread",
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
    }


def parse_arguments():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--temperature", type=POSITIVE, default=4.0, help="softens student and teacher")
    parser.add_argument("--epochs", type=WHOLE, default=100, help="of each student")
    parser.add_argument("--teacher-epochs", type=WHOLE, default=30, help="of each member of the teacher")
    parser.add_argument("--seeds", type=WHOLE, default=5, help="how many times the students are trained")
    parser.add_argument("--labels-per-class", type=WHOLE, default=5, help="labels that the students are given")
    parser.add_argument("--hard-weight", type=WEIGHT, default=0.1, help="of the cross-entropy on labels")
    parser.add_argument("--soft-weight", type=WEIGHT, default=0.9, help="of the divergence from the teacher")
    parser.add_argument("--relation-weight", type=WEIGHT, default=0.01, help="of RKD, 25 x distances + 50 x angles")
    parser.add_argument("--contrast-weight", type=WEIGHT, default=0.1, help="of the relational triplet loss")
    parser.add_argument("--hint-weight", type=WEIGHT, default=0.03, help="of the squared differences of features")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder of the figure and the numbers")
    args = parser.parse_args()
    if args.hard_weight == args.soft_weight == 0:
        parser.error("--hard-weight and --soft-weight: one of them must be above 0")
    choose_device(parser, args)
    available = load_data("cpu")[0].labels.bincount().min().item()
    if args.labels_per_class > available:
        parser.error(f"--labels-per-class: a class has {available} training images, got {args.labels_per_class}")
    make_folder(parser, args)
    return args


def main():
    args = parse_arguments()
    torch.set_num_threads(1)  # networks this small are slower on more
    torch.backends.cudnn.deterministic = True
    train, test = load_data(args.device)
    methods = make_methods(args)
    settings = describe(args, train, test)
    console = Console()
    print_settings(console, settings)
    with show_progress(console) as progress:
        task = progress.add_task("teacher epochs", total=TEACHERS * args.teacher_epochs)
        teacher = train_teacher(train, args.teacher_epochs, functools.partial(progress.advance, task))
        train.teacher, train.teacher_features = teacher(train.images)
        task = progress.add_task("student epochs", total=args.seeds * args.epochs)
        advance = functools.partial(progress.advance, task)
        seeds = [train_students(seed, methods, train, test, args, advance) for seed in range(args.seeds)]
    teacher_accuracy = accuracy(teacher(test.images)[0], test.labels)
    console.print(f"Teacher: {teacher_accuracy:.2f} % of the test images")
    results = [summarize(runs) for runs in zip(*seeds, strict=True)]
    print_results(console, results, args)
    draw(args.output / "distill_digits.png", results, methods, teacher_accuracy, args)
    numbers = {"arguments": vars(args) | {"output": str(args.output)}, "settings": settings}
    numbers |= {"teacher_accuracy": teacher_accuracy, "students": results}
    write_numbers(console, args.output, "distill_digits", numbers)


if __name__ == "__main__":
    main()
