"""The example on text, small: it runs, prints its table, and students with a teacher see neighbours as it does."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

TEXT = Path(__file__).parents[1] / "examples" / "distill_text.py"
# A pool of threads that waits for others on a busy machine takes minutes for what one does in seconds.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def read_sentences(hash_seed):
    program = "import json, sentences; print(json.dumps(sentences.read_sentences()))"
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=TEXT.parent,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    )
    return json.loads(run.stdout)


@pytest.mark.long  # reads the standard library twice
def test_sentences_are_prose_without_repetition_and_always_the_same():
    sentences = read_sentences("1")
    assert sentences == read_sentences("2")
    assert len(sentences) > 5000
    assert len({"".join(filter(str.isalnum, sentence)).lower() for sentence in sentences}) == len(sentences)
    for sentence in sentences:
        assert 5 <= len(sentence.split()) <= 25
        assert sentence[0].isupper()
        assert ">>>" not in sentence


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(TEXT.parent)
    return importlib.import_module("distill_text")


def embeddings(count):
    return F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(0)))


def test_measures_of_the_teacher_itself_and_of_chance(example):
    teacher = embeddings(400)
    assert example.recall(teacher, teacher) == 1
    assert example.rank_correlation(teacher, teacher) == pytest.approx(1)
    shuffled = teacher.roll(1, 0)
    assert example.recall(shuffled, teacher) == pytest.approx(10 / 399, abs=0.015)
    assert example.rank_correlation(shuffled, teacher) == pytest.approx(0, abs=0.05)


def test_no_training_sentence_is_nearly_a_held_out_one(example):
    teacher = embeddings(400)
    teacher[200:210] = F.normalize(teacher[:10] + 0.01)  # of which the first 50 are held out
    texts = example.Texts(torch.ones(400, 4, dtype=torch.long), torch.full((400,), 4), teacher)
    train, held_out = example.split(texts)
    assert torch.equal(held_out.teacher, teacher[:50])
    assert len(train.teacher) <= 340
    assert (train.teacher @ held_out.teacher.T).max() < 0.9


@pytest.mark.long
def test_distill_text(tmp_path):
    command = [sys.executable, TEXT, "--sentences", "600", "--batch-size", "32", "--epochs", "3", "--seeds", "1"]
    run = subprocess.run(
        [*command, "--output", tmp_path], capture_output=True, text=True, check=False, env=ONE_THREAD
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "distill_text.json").read_text())
    untrained, alone, *taught = numbers["students"]
    for student in numbers["students"]:
        assert student["method"] in run.stdout
        assert 0 < student["recall_mean"] < 1
    assert untrained["recall_mean"] > numbers["recall_by_chance"]
    assert untrained["step_us_median"] is None
    assert len(taught) == 8
    for student in taught:
        assert 0 < student["loss_us_median"] < student["step_us_median"]
    # which of them after so few steps depends on the sentences, and these on the version of Python
    better = [
        s
        for s in taught
        if s["rank_correlation_mean"] > max(alone["rank_correlation_mean"], untrained["rank_correlation_mean"])
    ]
    assert len(better) >= 6, [student["method"] for student in better]
    assert (tmp_path / "distill_text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags",
    [
        "--epochs 0",
        "--seeds -1",
        "--batch-size 7",
        "--batch-size 1001",
        "--batch-size 101 --sentences 200",
        "--sentences 199",
        "--sentences many",
        "--learning-rate inf",
        "--temperature nan",
        "--margin 0",
        "--device tpu",
    ],
)
def test_distill_text_refuses_a_bad_flag(flags, example, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["distill_text.py", *flags.split(), "--output", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as stopped:
        example.parse_arguments()
    assert stopped.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "nothing").exists()
