"""The benchmark: its truth is the reference, every provider answers or says why not, and the report quotes the files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import functional

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
for tool in ("pytest_benchmark", "rich"):  # `make test` installs them; `make gpu` takes what is there
    pytest.importorskip(tool)

from bench import bench_heads, bench_teachers, measure, peers, relations_truth, report, tables  # noqa: E402


def bench(*arguments):
    """pytest-benchmark does not measure in a process that xdist has started."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, "-m", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("rkd_distance", (48, 12)),
        ("rkd_angle", (48, 12)),
        ("rkd_loss", (48, 12)),
        ("similarity_preserving", (48, 12)),
        ("gram_mse", (48, 12)),
        ("gram_mse", (3, 20, 12)),
        ("relation_kl", (48, 12)),
        ("relation_kl", (3, 20, 12)),
        ("pkt", (48, 12)),
        ("relational_triplet", (48, 12)),
    ],
)
def test_truth_in_blocks_is_the_reference(name, shape, monkeypatch):
    monkeypatch.setattr(relations_truth, "BLOCK", 2000)  # several blocks, the last one smaller
    student, teacher, labels = torch.randn(shape), torch.randn(shape), torch.arange(shape[-2]) % 4
    truth = relations_truth.Truth(name, student, teacher, labels)
    x = student.double().requires_grad_()
    with fastkd.backend("torch"):
        if name == "relational_triplet":
            loss = functional.relational_triplet(x, labels=labels)
        else:
            loss = getattr(functional, name)(x, teacher.double())
    loss.backward()
    errors = truth.errors(loss.detach(), x.grad)
    assert max(errors.values()) < 1e-13
    assert relations_truth.wrong(truth.errors(loss.detach() * 1.001, x.grad), torch.float32)


@pytest.mark.parametrize("name", [bench_heads.ONE, bench_heads.LABELLED, bench_heads.TWO_OF_JS])
def test_truth_of_heads_in_blocks_is_the_reference(monkeypatch, name):
    monkeypatch.setattr(bench_heads, "BLOCK", 200)
    hidden, weight, teacher = torch.randn(13, 5), torch.randn(40, 5), torch.randn(13, 40)
    one_head = name in bench_heads.ONE_HEAD
    if not one_head:
        teacher = torch.randn(13, 3), torch.randn(40, 3)
    ours, eager = bench_heads.LOSSES[name.split()[-1]]
    labels = bench_heads.targets(13, 40, hidden.device) if name == bench_heads.LABELLED else None
    truth = bench_heads.Truth(eager, hidden, weight, teacher, labels)
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    target = teacher.double() if one_head else teacher[0].double() @ teacher[1].double().T
    with fastkd.backend("torch"):
        loss = ours(h @ w.T, target, temperature=bench_heads.TEMPERATURE)
    loss.backward()
    assert max(truth.errors(loss.detach(), (h.grad, w.grad)).values()) < 1e-13


@pytest.mark.parametrize("what", list(bench_teachers.KINDS))
def test_truth_of_teachers_in_blocks_is_the_reference(monkeypatch, what):
    monkeypatch.setattr(bench_teachers, "ELEMENTS", 200)
    monkeypatch.setattr(bench_teachers, "K", 4)
    student, teacher = torch.randn(13, 40), torch.randn(13, 40)
    given, form, eager = bench_teachers.KINDS[what]
    of_teacher = given(teacher)
    truth = bench_teachers.Truth(form, student, *of_teacher)
    for loss, most in ((bench_teachers.own(form), 1e-6), (eager, 1e-5)):
        leaf = student.clone().requires_grad_()
        found = loss(leaf, *of_teacher)
        found.backward()
        assert max(truth.errors(found.detach(), leaf.grad).values()) < most


@pytest.mark.parametrize(
    "loss",
    [
        "kl_div",
        "js_div",
        "rkd_distance",
        "rkd_angle",
        "pkt",
        "relational_triplet",
        "attention_transfer",
        "head + kl_div",
    ],
)
def test_every_library_is_measured_or_named_with_a_reason(loss):
    settings = {"temperature": 2.0} if loss in ("kl_div", "js_div", "head + kl_div") else {}
    if loss == "relational_triplet":
        settings = {"labels": torch.arange(8) % 2, "negatives": 4}
    found, missing = peers.peers(loss, "cpu", **settings)
    assert set(found) | set(missing) == {library.NAME for library in peers.LIBRARIES}
    assert not set(found) & set(missing)
    assert all(missing.values())


def test_what_would_not_fit_is_not_begun():
    found, missing = peers.peers("rkd_angle", "cpu", held=2**40, most=2**30)
    assert "torchdistill" not in found
    if peers.versions()["torchdistill"]:
        assert missing["torchdistill"] == "would hold 1024 GiB"


def test_a_wrong_answer_of_ours_is_an_error_and_of_others_a_reason():
    def answer():
        raise ZeroDivisionError("no")

    theirs, ours = (measure.Provider(name, None, None, answer) for name in ("eager", "fastkd"))
    one = torch.ones(1, 1)
    truth = bench_heads.Truth(bench_heads.eager_log_target, one, one, one)
    found, missing = [theirs], {}
    assert peers.judge(found, missing, truth) == {}
    assert (found, missing) == ([], {"eager": "ZeroDivisionError: no"})
    with pytest.raises(ZeroDivisionError):
        peers.judge([ours], missing, truth)


def test_ratios_are_of_the_same_round():
    """Rounds that are slow for all leave them as they are."""
    first, other = (measure.Provider(name, None, None) for name in "ab")
    first.seconds, other.seconds = [1.0, 10.0, 1.0], [2.0, 20.0, 2.0]
    summary = other.summary(first)
    assert summary["ratio"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert summary["median_s"] == 2.0


def test_two_runs_are_compared_by_their_ratios():
    def data(*medians):
        results = {
            name: {"ratio": {"median": m, "low": m - 0.25, "high": m + 0.25}}
            for name, m in zip(("fastkd", "eager", "torch.compile", "KeOps", "mm"), medians, strict=True)
        }
        return {"benchmarks": [{"extra_info": {"case": "x", "providers": results}}]}

    found = tables.pairs(data(1.0, 3.0, 2.0, 4.0, 1.0), data(1.0, 3.15, 2.5, 3.2, 9.0))
    assert [(case, name) for case, name, *_ in found] == [("x", "eager"), ("x", "torch.compile"), ("x", "KeOps")]
    assert list(map(tables.within, found)) == [True, False, False]
    assert list(map(tables.difference, found)) == pytest.approx([0.05, 0.25, 0.25])
    assert tables.between_runs(found) == pytest.approx((0.25, 0.25))


def test_a_case_beside_which_the_machine_was_slower_is_named():
    def case(name, dtype, rate):
        return {"extra_info": {"case": name, "dtype": dtype, "product_flops_per_s": rate}}

    usual = [case(f"usual {rate}", "float32", float(rate)) for rate in (90, 100, 110)]
    apart = [case("slow", "float32", 50.0), case("of another dtype", "bfloat16", 1000.0)]
    of_copies = {"extra_info": {"case": "a copy", "dtype": "float32", "copy_bytes_per_s": 1.0}}
    assert list(tables.disturbed({"benchmarks": [*usual, *apart, of_copies]})) == [("slow", 1.9)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("case", "providers"),
    [
        ("digits and float32 and backward", ("fastkd", "eager", "torch.compile", "copy", "fastkd inplace")),
        ("rkd_distance and 256x512", ("fastkd", "eager", "torch.compile", "mm")),
        ("scaling and triplet and 128", ("fastkd", "eager", "torch.compile", "mm")),
    ],
)
def test_benchmarks_run(case, providers, tmp_path):
    """The harness, on its smallest cases: every provider has a time and errors, in the JSON and in the table."""
    run = bench("-k", case, "--rounds", "2", "--output", tmp_path / "b.json")
    assert run.returncode == 0, run.stdout + run.stderr
    for provider in providers:
        assert re.search(rf"│ {re.escape(provider)} +│ +[\d.]+ [mµ]?s ", run.stdout), run.stdout
    for name in ("KeOps", "Liger", "orda-kernel", "cut-cross-entropy"):
        assert re.search(rf"^(│ )?{name}[: ]", run.stdout, re.MULTILINE), run.stdout
    (info,) = tables.cases(json.loads((tmp_path / "b.json").read_text()))
    for name, result in info["providers"].items():
        assert name in tables.MACHINE or result["gradient_error"] < 1e-3


@pytest.mark.long  # three processes
def test_a_bad_flag_is_one_sentence(tmp_path):
    for arguments, message in (
        (("--rounds", "0"), "--rounds: at least 1 wanted"),
        (("--show", tmp_path / "none.json"), "--show: no file"),
        (("--rerun-of", tmp_path / "none.json"), "--rerun-of: no file"),
    ):
        run = bench(*arguments)
        assert run.returncode == 2
        assert message in run.stderr


def test_the_page_and_the_readme_quote_the_measured_files():
    """They are what `make report` makes of the files in bench/results/, and the plots are there."""
    assert report.PAGE.read_text() == report.text(report.page())
    readme = report.README.read_text()
    assert readme == report.with_quotation(readme)
    plots = set(re.findall(r"\]\(benchmarks/([^)]+\.png)\)", report.PAGE.read_text()))
    assert plots == {path.name for path in report.PLOTS.glob("*.png")}
    assert plots


def test_results_are_of_a_clean_commit():
    found, again = report.results()
    second = {f"{name}, second run": data for name, data in again.items() if data}
    for name, data in (found | second).items():
        assert data["fastkd"]["clean"] is not False, name  # None where git does not tell
        for info in tables.cases(data):
            for provider, result in info["providers"].items():
                assert provider in tables.MACHINE or "loss_error" in result, (info["case"], provider)
