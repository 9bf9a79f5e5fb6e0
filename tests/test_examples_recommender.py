"""The example of recommendation, small: its metrics and models are what they say, it runs and writes."""

import importlib
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def recommend(*arguments):
    command = [sys.executable, EXAMPLES / "distill_recommender.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("distill_recommender")


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("recommender_data")


@pytest.fixture
def refusal(example, monkeypatch, capsys, tmp_path):
    """What the last line of the error says; nothing is made."""

    def refuse(*arguments):
        folder = tmp_path / "nothing"
        monkeypatch.setattr(sys, "argv", ["distill_recommender.py", *arguments, "--output", str(folder)])
        with pytest.raises(SystemExit) as stopped:
            example.parse_arguments()
        assert stopped.value.code == 2
        assert not folder.exists()
        return capsys.readouterr().err.strip().splitlines()[-1]

    return refuse


def test_metrics_of_a_ranking_by_hand(example):
    scores = torch.arange(20, 0, -1).float().expand(2, 20)  # the first item first
    relevant = torch.zeros(2, 20, dtype=torch.bool)
    relevant[0, [1, 3, 15]] = True  # places 2, 4 and 16; the other user has nothing to find
    found = example.rank_metrics(scores, relevant)
    # (1 / log2(3) + 1 / log2(5)) / (1 + 1 / log2(3) + 1 / log2(4))
    assert found["ndcg"] == pytest.approx((0.6309298 + 0.4306766) / (1 + 0.6309298 + 0.5), abs=1e-6)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["mrr"] == pytest.approx(1 / 2)


def test_metrics_of_a_perfect_and_of_a_random_ranking(example):
    torch.manual_seed(0)
    relevant = torch.rand(4000, 200) < 0.02
    perfect = example.rank_metrics(relevant + 0.1 * torch.rand(4000, 200), relevant)
    assert all(value == pytest.approx(1, abs=1e-6) for value in perfect.values())
    one = torch.zeros(4000, 200, dtype=torch.bool)
    one[:, 7] = True
    random = example.rank_metrics(torch.rand(4000, 200), one)
    assert random["recall"] == pytest.approx(10 / 200, rel=0.2)  # 200 hits expected, of deviation 14


def test_what_was_taken_in_training_is_not_ranked(example, data):
    interactions = data.make_synthetic(100, 100)
    train, test = data.hold_out(interactions.taken, 0.2, seed=0)
    catalogue = example.Catalogue(interactions, train, test)
    wish = 2.0 * train + test  # training items would come first
    assert catalogue.metrics(wish)["ndcg"] == pytest.approx(1)


def test_the_student_is_a_factorization_machine(example):
    torch.manual_seed(0)
    users, items, user_side, item_side = 3, 4, torch.rand(3, 2), torch.rand(4, 5)
    machine = example.FactorizationMachine(users + 2, items + 5).double()
    torch.nn.init.normal_(machine.item_weights)
    rows = [example.Features(torch.arange(len(side)), side.double()) for side in (user_side, item_side)]
    scores = machine(*rows).scores
    factors = torch.cat([machine.user_factors, machine.item_factors])
    weights = torch.cat([torch.randn(users + 2).double(), machine.item_weights[:, 0]])
    naive = torch.zeros(users, items).double()
    for u in range(users):
        for i in range(items):
            ids = torch.eye(users)[u], user_side[u], torch.eye(items)[i], item_side[i]
            x = torch.cat(ids).double()
            pairs = combinations(range(len(x)), 2)
            naive[u, i] = weights @ x + sum(factors[a] @ factors[b] * x[a] * x[b] for a, b in pairs)
    # What has no item in it is the same for all items of a user.
    torch.testing.assert_close(scores - scores[:, :1], naive - naive[:, :1])


def test_the_teacher_crosses_features_and_has_an_mlp(example):
    torch.manual_seed(0)
    users, items, user_side, item_side = 3, 4, torch.rand(3, 2), torch.rand(4, 5)
    teacher = example.WideAndDeep(users + 2, items + 5, users).double().eval()
    torch.nn.init.normal_(teacher.crossed)
    rows = [example.Features(torch.arange(len(side)), side.double()) for side in (user_side, item_side)]
    output = teacher(*rows)
    for u in range(users):
        for i in range(items):
            item = torch.cat([torch.eye(items)[i], item_side[i]]).double()
            wide = user_side[u].double() @ teacher.crossed @ item
            hidden = teacher.from_user(output.users[u]) + teacher.from_item(output.items[i])
            torch.testing.assert_close(output.scores[u, i], wide + teacher.deep(hidden)[0])


def test_interactions_are_split_by_user_and_drawn_by_seed(data):
    first, second = data.make_synthetic(100, 120), data.make_synthetic(100, 120)
    assert torch.equal(first.taken, second.taken)
    assert not torch.equal(first.taken, data.make_synthetic(100, 120, seed=1).taken)
    train, test = data.hold_out(first.taken, 0.2, seed=0)
    assert torch.equal(train | test, first.taken)
    assert not (train & test).any()
    assert torch.equal(test.sum(1), (0.2 * first.taken.sum(1)).round().long())
    popular = first.taken.sum(0).sort(descending=True).values.float()
    assert popular[:12].sum() > 0.2 * popular.sum()  # a tenth of the items, and more than twice its share


def write_movielens(folder):
    """A folder in GroupLens's format, of made-up users, films and ratings."""
    generator = torch.Generator().manual_seed(0)
    taken = torch.rand(40, 60, generator=generator) < 0.3
    rows = [f"{u + 1}\t{i + 1}\t{1 + (u + i) % 5}\t88125{u:04d}\n" for u, i in taken.nonzero().tolist()]
    (folder / "u.data").write_text("".join(rows))
    users = [f"{u + 1}|{17 + u}|{'MF'[u % 2]}|{('writer', 'other')[u % 2]}|12345\n" for u in range(40)]
    (folder / "u.user").write_text("".join(users))
    films = [f"{i + 1}|Caf\xe9 {i}|01-Jan-{1960 + i % 40}||" + "|0" * 18 + "|1\n" for i in range(59)]
    films.append("60|unknown|||" + "|1" + "|0" * 18 + "\n")
    (folder / "u.item").write_text("".join(films), encoding="latin-1")
    return taken


def test_distill_recommender(tmp_path):
    flags = ("--users", "150", "--items", "120", "--epochs", "4", "--teacher-epochs", "3", "--seeds", "2")
    run = recommend(*flags, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "synthetic" in run.stdout
    numbers = json.loads((tmp_path / "distill_recommender.json").read_text())
    models = [numbers["popularity"], *numbers["students"], numbers["teacher"]]
    assert len(models) == 7
    for model in models:
        assert model["method"] in run.stdout
        assert all(0 < model[metric]["mean"] < 1 for metric in ("ndcg", "recall", "mrr"))
    for student in numbers["students"]:
        assert [len(epochs) for epochs in student["ndcg_per_seed_and_epoch"]] == [4, 4]
    by_name = {student["method"]: student["ndcg_per_seed_and_epoch"] for student in numbers["students"]}
    assert by_name["+ scores"] != by_name["student alone"]
    assert (tmp_path / "distill_recommender.png").read_bytes().startswith(b"\x89PNG")


def test_a_student_that_is_given_no_weight_of_a_loss_learns_alone(tmp_path):
    flags = ("--users", "100", "--items", "100", "--epochs", "2", "--teacher-epochs", "1", "--seeds", "1")
    weights = ("--hard-weight", "1", "--soft-weight", "0", "--user-weight", "0", "--item-weight", "0")
    assert recommend(*flags, *weights, "--output", tmp_path).returncode == 0
    students = json.loads((tmp_path / "distill_recommender.json").read_text())["students"]
    alone = students[0]["ndcg_per_seed_and_epoch"][0]
    for student in students[1:]:  # the same initial weights, batches and histories
        assert student["ndcg_per_seed_and_epoch"][0] == pytest.approx(alone, abs=1e-6)


def test_movielens_is_read(data, tmp_path):
    taken = write_movielens(tmp_path)
    read = data.read_movielens(tmp_path)
    assert torch.equal(read.taken, taken)
    assert read.user_side.sum(1).tolist() == [3] * 40  # age group, gender, occupation
    assert read.item_side.sum(1).tolist() == [2] * 60  # shares of genres, year


def test_distill_recommender_of_movielens(tmp_path):
    write_movielens(tmp_path)
    flags = ("--epochs", "1", "--teacher-epochs", "1", "--seeds", "1", "--validation")
    run = recommend("--data", tmp_path, *flags, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "MovieLens 100K" in run.stdout
    assert "synthetic" not in run.stdout


@pytest.mark.parametrize(
    ("name", "text"),
    [("u.user", None), ("u.item", "1|no genres\n"), ("u.data", "1\t9999\t5\t0\n"), ("u.user", "1|old|M|other|0\n")],
)
def test_a_folder_that_is_not_movielens_is_refused(name, text, refusal, tmp_path):
    write_movielens(tmp_path)
    (tmp_path / name).unlink() if text is None else (tmp_path / name).write_text(text)
    message = refusal("--data", str(tmp_path))
    assert "--data" in message
    assert name in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--users", "0"),
        ("--items", "99"),
        ("--epochs", "0"),
        ("--teacher-epochs", "many"),
        ("--seeds", "-1"),
        ("--temperature", "nan"),
        ("--hard-weight", "-0.1"),
        ("--soft-weight", "inf"),
        ("--user-weight", "nan"),
        ("--item-weight", "-1"),
    ],
)
def test_distill_recommender_refuses_a_bad_flag(flag, value, refusal):
    assert flag in refusal(flag, value)


def test_distill_recommender_refuses_sizes_of_synthetic_data_beside_data(tmp_path, refusal):
    message = refusal("--data", str(tmp_path), "--items", "200")
    assert "--items" in message
    assert "--data" in message
