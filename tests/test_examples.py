"""The examples, small: they run, print their table and write what they say they write."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DIGITS = Path(__file__).parents[1] / "examples" / "distill_digits.py"


def digits(*arguments):
    command = [sys.executable, DIGITS, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_distill_digits(tmp_path):
    run = digits("--epochs", "2", "--teacher-epochs", "1", "--seeds", "2", "--device", "cpu", "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    numbers = json.loads((tmp_path / "distill_digits.json").read_text())
    for student in numbers["students"]:
        assert student["method"] in run.stdout
        assert len(student["accuracy_per_seed_and_epoch"]) == 2
        assert student["loss_peak_kib"] > 0
    by_name = {student["method"]: student["accuracy_per_seed_and_epoch"] for student in numbers["students"]}
    ours, plain = by_name["+ teacher, all images: fastkd"], by_name["+ teacher, all images: PyTorch"]
    np.testing.assert_allclose(ours, plain, atol=1.0)  # the same loss: the same students, to a few images
    assert {f"+ {name}, all images: fastkd" for name in ("relations", "contrast", "hint")} <= set(by_name)
    assert (tmp_path / "distill_digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--epochs", "0"),
        ("--teacher-epochs", "many"),
        ("--seeds", "-1"),
        ("--temperature", "0"),
        ("--temperature", "nan"),
        ("--labels-per-class", "1000"),
        ("--hard-weight", "-0.1"),
        ("--relation-weight", "inf"),
        ("--contrast-weight", "nan"),
        ("--hint-weight", "-1"),
        ("--device", "tpu"),
    ],
)
def test_distill_digits_refuses_a_bad_flag(flag, value, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(DIGITS.parent)
    example = importlib.import_module(DIGITS.stem)
    monkeypatch.setattr(sys, "argv", [DIGITS.name, flag, value, "--output", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit) as refused:
        example.main()
    assert refused.value.code == 2
    assert flag in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "nothing").exists()
