"""The example on text, small: it runs, prints its table, and students with a teacher see neighbours as it does."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

TEXT = Path(__file__).parents[1] / "examples" / "distill_text.py"
# A pool of threads that waits for others on a busy machine takes minutes for what one does in seconds.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def text(*arguments):
    return subprocess.run(
        [sys.executable, TEXT, *arguments], capture_output=True, text=True, check=False, env=ONE_THREAD
    )


@pytest.fixture(scope="module")
def sentences():
    program = "import json, sentences; print(json.dumps(sentences.read_sentences()))"
    options = {"capture_output": True, "text": True, "check": True, "cwd": TEXT.parent}
    first, second = (
        subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, **options).stdout
        for seed in ("1", "2")
    )
    assert first == second  # the same ones in the same order, run after run
    return json.loads(first)


def test_sentences(sentences):
    assert len(sentences) > 5000
    assert all(5 <= len(sentence.split()) <= 25 for sentence in sentences)
    assert not any(">>>" in sentence or "\n" in sentence for sentence in sentences)
    words = sorted("".join(filter(str.isalpha, sentence)).lower() for sentence in sentences)
    assert all(one != next_one for one, next_one in pairwise(words))


def test_distill_text(tmp_path):
    run = text("--sentences", "800", "--batch-size", "32", "--epochs", "3", "--seeds", "1", "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "distill_text.json").read_text())
    untrained, alone, *taught = numbers["students"]
    for student in numbers["students"]:
        assert student["method"].split()[0] in run.stdout
        assert 0 < student["recall_mean"] < 100
    assert untrained["recall_mean"] > numbers["recall_by_chance"]
    assert untrained["step_us_median"] is None
    assert len(taught) == 8
    for student in taught:
        assert 0 < student["loss_us_median"] < student["step_us_median"]
        assert student["rank_correlation_mean"] > alone["rank_correlation_mean"], student["method"]
        assert student["rank_correlation_mean"] > untrained["rank_correlation_mean"], student["method"]
    assert (tmp_path / "distill_text.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"),
        ("--seeds", "-1"),
        ("--batch-size", "7"),
        ("--batch-size", "many"),
        ("--sentences", "100"),
        ("--sentences", "200"),  # of which 128 make no batch
        ("--learning-rate", "inf"),
        ("--temperature", "nan"),
        ("--margin", "0"),
        ("--device", "tpu"),
    ],
)
def test_distill_text_refuses_a_bad_flag(flag, value, tmp_path):
    run = text(flag, value, "--output", tmp_path / "nothing")
    assert run.returncode == 2
    assert flag in run.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "nothing").exists()
