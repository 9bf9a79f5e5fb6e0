"""``python -m bench.report``: the benchmark page and its plots from the files of ``bench/results/``, and the part of
the README that quotes them. What stands there stands in those files; nothing is run."""

import argparse
import json
import sys
from pathlib import Path

from . import plots, targets
from .tables import (
    DISTURBED,
    MACHINE,
    between_runs,
    bytes_text,
    cases,
    columns,
    difference,
    disturbed,
    error_text,
    key,
    limit_of,
    lines,
    markdown_table,
    pairs,
    peak_text,
    ratio_text,
    time_text,
    within,
)

ROOT = Path(__file__).parents[1]
RESULTS, PAGE, PLOTS = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks.md", ROOT / "docs" / "benchmarks"
README, BEGIN, END = ROOT / "README.md", "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
STEP = "forward+backward"
HEADLINES = {
    "cpu": (
        f"kl_div 2048x32000 float32 {STEP}", f"kl_div 2048x32000 bfloat16 {STEP}", f"kl_div 512x128256 float32 {STEP}",
        f"js_div 2048x32000 float32 {STEP}", "feature_mse l2 1x65536x1024 float32",
        "feature_cosine 1x65536x1024 bfloat16", "attention_transfer 1x64x256x56x56 float32",
        "rkd_distance 8192x256 float32", "rkd_angle 512x512 float32",
        "similarity_preserving 8192x256 float32", "gram_mse 8192x256 float32", "relation_kl 4096x256 float32",
        "pkt 4096x256 float32", "relational_triplet 512x256 float32",
    ),
    "cuda": (
        f"kl_div 8192x128256 bfloat16 {STEP}", f"js_div 8192x128256 bfloat16 {STEP}",
        "head + kl_div 8192x4096x128256 bfloat16",
        "feature_mse 48x8x128x768 bfloat16", "rkd_distance 16384x512 bfloat16", "rkd_angle 1024x512 float32",
        "relation_kl 16384x512 bfloat16", "relational_triplet 512x256 float32",
    ),
}  # fmt: skip
FAMILIES = {
    "rows": "Logits", "heads": "A head and its logits", "features": "Features", "relations": "Relations",
}  # fmt: skip
README_PLOT = {"cpu": "kl_div over V", "cuda": "kl_div over V"}
PLAIN = ("eager", "eager log_target", "torch.compile")  # PyTorch itself; copy and mm are the machine


def results():
    """The files of results by name, those of reruns apart."""
    found = {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    first = {name: data for name, data in found.items() if not name.endswith(".rerun.json")}
    return first, {name: found.get(name.replace(".json", ".rerun.json")) for name in first}


def providers(info):
    return {name: result for name, result in info["providers"].items() if name not in MACHINE}


def others(info):
    """Other libraries, by name."""
    return {n: r for n, r in providers(info).items() if n not in PLAIN and not n.startswith("fastkd")}


def same(result):
    """Whether a library's answer is that of the formula, to what its precision allows."""
    worst = max(result.get("loss_error") or 0, result.get("gradient_error") or 0)
    return worst < 0.05  # torchdistill's bfloat16 is off by 0.04


def ratio(result):
    return "{median:.1f}x".format(**result["ratio"])


def fastest_other(info):
    """Of the libraries that compute the same."""
    found = {name: result for name, result in others(info).items() if same(result)}
    if not found:
        return "-"
    name = min(found, key=lambda n: found[n]["median_s"])
    return f"{ratio(found[name])} ({name})"


def headline_table(data):
    by_name = {info["case"]: info for info in cases(data) if "series" not in info}
    chosen = [by_name[name] for name in HEADLINES[data["fastkd"]["device"]] if name in by_name]
    head = (
        "loss and inputs", "fastkd", "eager", "`torch.compile`", "fastest other library",
        "peak extra MiB: fastkd, eager", "of the machine's limit", "gradient's error: fastkd, eager",
    )  # fmt: skip

    def row(info):
        found = providers(info)
        own, eager = next(iter(found.values())), found.get("eager")
        both = (own, eager) if eager else (own,)
        compiled = found.get("torch.compile")
        return (
            f"`{info['loss']}` {info['case'].removeprefix(info['loss']).removesuffix(STEP).strip()}",
            time_text(own["median_s"]),
            ratio(eager) if eager else "-",
            ratio(compiled) if compiled else "-",
            fastest_other(info),
            ", ".join(peak_text(info, result) for result in both),
            f"{own[limit_of(info)[0]]:.0%}",
            ", ".join(error_text(result.get("gradient_error")) for result in both),
        )

    yield from markdown_table(head, map(row, chosen))


def about(name, data):
    machine = data["fastkd"]
    skip = {"peers", "device"}
    yield f"`{name}`, of commit `{(machine['commit'] or '?')[:12]}`:"
    yield ""
    yield from markdown_table(
        ("what", "which"), [(key.replace("_", " "), str(value)) for key, value in machine.items() if key not in skip]
    )


def libraries(data):
    """Each library: its version, what of it was measured, and why the rest was not."""
    infos = [info for info in cases(data) if "series" not in info]

    def row(name, version):
        measured = sorted({info["loss"] for info in infos if name in info["providers"]})
        reasons = {}
        for info in infos:
            if name in info["missing"]:
                reasons.setdefault(info["missing"][name], []).append(info["loss"])
        told = "; ".join(f"{reason} ({', '.join(sorted(set(losses)))})" for reason, losses in reasons.items())
        return name, version or "-", ", ".join(measured) or "-", told or "-"

    yield from markdown_table(
        ("library", "version", "measured", "not measured, and why"),
        [row(name, version) for name, version in data["fastkd"]["peers"].items()],
    )


def growth(stem, data):
    for name, infos in plots.series(data).items():
        yield f"![{name}](benchmarks/{plot_name(stem, name)})"
        yield ""
        left = {}  # the first reason of each
        for info in infos:
            for provider, reason in info["missing"].items():
                if any(provider in other["providers"] for other in infos):
                    left.setdefault(
                        provider, f"{provider}, {info['series']['axis']} = {info['series']['value']}: {reason}"
                    )
        if left:
            yield "Left out from there on: " + "; ".join(left.values()) + "."
            yield ""


def plot_name(stem, name):
    return f"{stem}-{name.replace(' ', '-')}.png"


def held_against(data):
    """What was set out to be reached, and whether it was."""
    by_name = {info["case"]: info["providers"] for info in cases(data) if "series" not in info}

    def row(case, provider, wanted, reached, measured):
        result = by_name.get(case, {}).get(provider)
        if result is None:
            return case, wanted, "not measured", "-"
        return case, wanted, measured(result), "yes" if reached(result) else "**no**"

    for case, wanted in targets.RATIOS.items():
        for provider, least in wanted.items():
            yield row(
                case, provider, f"{provider} takes {least:g}x", lambda r, x=least: r["ratio"]["median"] >= x,
                lambda r: ratio_text(r["ratio"]),
            )  # fmt: skip
    for case, wanted in targets.COPY_SHARES.items():
        for provider, least in wanted.items():
            yield row(
                case, provider, f"{provider}: {least:.0%} of copy bandwidth", lambda r, x=least: r["copy_share"] >= x,
                lambda r: f"{r['copy_share']:.1%}",
            )  # fmt: skip


def slower_than_others(data):
    """Where something else is faster than fastkd."""
    for info in cases(data):
        for name, result in providers(info).items():
            if not name.startswith("fastkd") and result["ratio"]["median"] < 1:
                another = name not in PLAIN and not same(result)
                yield case_text(info), name, ratio_text(result["ratio"]) + (", another loss: see its errors" * another)


def reruns(data, rerun):
    found = pairs(data, rerun) if rerun else []
    if not found:
        yield "There is no second run of this file: how far ratios differ between runs is not known."
        return
    again = {key(info) for info in cases(rerun)}
    half, most = between_runs(found)
    yield (
        f"Of {len(cases(data))} cases {len(again)} were run again on this machine, of commit "
        f"`{(rerun['fastkd']['commit'] or '?')[:12]}`. **Half of the {len(found)} ratios differ by at most {half:.0%} "
        f"between both runs, nine in ten by at most {most:.0%}**: so far a figure of this page is to be trusted. The "
        f"ranges of rounds, which are of one run, are narrower: {sum(map(within, found))} medians of the second run "
        "lie in the range of the first. Those that differ by more:"
    )
    yield ""
    yield from markdown_table(
        ("case", "provider", "first run", "second run"),
        [
            (case, name, ratio_text(first), ratio_text(second))
            for case, name, first, second in (pair for pair in found if difference(pair) > most)
        ],
    )
    yield ""
    left = [case_text(info) for info in cases(data) if key(info) not in again]
    yield f"Not run again: {'; '.join(left)}." if left else "All were run again."


def case_text(info):
    return info["case"] + (" (growth)" if "series" in info else "")


def slower(data, rerun):
    yield (
        "Beside cases of relations, and of a head and its logits, `torch.mm` multiplies the same matrices. In these it "
        f"took over {DISTURBED:g} times as long as in the median case of its dtype: something slowed the machine, and "
        "all times of the case are too long. Other cases, and a run that is slow throughout, are not seen so."
    )
    yield ""
    runs = (("first", data), ("second", rerun or {"benchmarks": []}))
    found = [(name, case, f"{longer:.1f}x") for name, run in runs for case, longer in disturbed(run)]
    yield from markdown_table(("run", "case", "torch.mm"), found) if found else ["None."]


def families(data):
    for family, title in FAMILIES.items():
        infos = [info for info in cases(data) if info["family"] == family and "series" not in info]
        if not infos:
            continue
        yield f"### {title}"
        yield ""
        for info in infos:
            rounds = next(iter(info["providers"].values()))["rounds"]
            yield f"**{info['case']}**, one gradient {bytes_text(info['gradient_bytes'])} MiB, {rounds} rounds"
            yield ""
            yield from markdown_table(columns(info), lines(info))
            yield ""


def section(name, data, rerun):
    device = data["fastkd"]["device"]
    yield f"## {data['fastkd'].get('gpu', data['fastkd']['cpu'])}"
    yield ""
    yield from about(name, data)
    yield ""
    yield from headline_table(data)
    yield ""
    yield "### Who is measured"
    yield ""
    yield from libraries(data)
    yield ""
    yield "### Growth"
    yield ""
    yield from growth(Path(name).stem, data)
    if device == "cpu":
        yield "### What was set out, and what was reached"
        yield ""
        yield "Ratios to fastkd, and shares of the machine's rate; memory and errors stand in the tables of the cases."
        yield ""
        yield from markdown_table(("case", "wanted", "measured", "reached"), held_against(data))
        yield ""
    yield "### Where something else is faster"
    yield ""
    faster = list(slower_than_others(data))
    yield from markdown_table(("case", "provider", "its time over fastkd's"), faster) if faster else ["Nowhere."]
    yield ""
    yield "### A second run"
    yield ""
    yield from reruns(data, rerun)
    yield ""
    yield "### Where the machine was slower"
    yield ""
    yield from slower(data, rerun)
    yield ""
    yield from families(data)


INTRODUCTION = """\
# Benchmarks

This page is made by `make report` from the files in `bench/results/`; `make bench` writes such a file for the machine
it runs on, and `python -m bench --rerun-of FILE` runs again and says how far both agree. Nothing here is written
by hand.

What the columns say:

* **Time**: from the inputs that all providers get to the student's gradient (or to the loss, where a case says
  "forward"), median and quartiles of rounds in which all providers take their turn. What a loss needs done first, such
  as a log-softmax, is in its time.
* **x fastkd**: how many times as long as fastkd in the same round: the median over rounds, and the range in which nine
  in ten rounds lie; of three or five rounds that is nearly from the least to the greatest. Runs differ by more: see "A
  second run".
* **Peak extra MiB**: how far memory rises above what was there before, at most, during one call.
* **of copy bandwidth**, **of matrix products**: the least bytes (inputs read once, the gradient written once) or the
  least floating-point operations over the time, as a share of the rate that `copy_` or `torch.mm` reaches in the same
  rounds.
* **Errors**: of the loss relative to the formula's in float64, of the gradient in norm, both on the inputs that are
  timed (of logits the gradients of the first rows, 8 Mi elements). A library whose errors are near 1 computes something
  else.

A share may be above 100 %: "kernel alone" writes the gradient over the student, whose lines are in the caches then,
while `copy_` fetches the lines it writes to first. In bfloat16 `torch.mm` has AMX's rate on processors that have it,
which fastkd's products on the CPU do not use.

Whoever allocates a gradient pays for the first touch of its memory; on a virtual machine that can take longer than the
loss when the host had taken the memory back, for every provider alike, and the spread shows it. Of triplets within a
rounding of the hinge float32 counts some that float64 does not: their gradient has the error that it has in plain
PyTorch.
"""
WITHOUT_GPU = """\
## GPUs

There are no figures of a GPU yet. `make gpu` writes them where there is one.
"""


def page():
    found, again = results()
    yield INTRODUCTION
    for name, data in found.items():
        yield from section(name, data, again[name])
    if not any(data["fastkd"]["device"] == "cuda" for data in found.values()):
        yield WITHOUT_GPU


def quoted():
    """For the README: of each file the headline table and a plot."""
    found, _ = results()
    for name, data in found.items():
        machine = data["fastkd"]
        where = f"{machine.get('gpu', machine['cpu'])}, {machine['threads']} threads, torch {machine['torch']}"
        yield f"{where} (`bench/results/{name}`):"
        yield ""
        yield from headline_table(data)
        yield ""
        stem, plot = Path(name).stem, README_PLOT[machine["device"]]
        if plot in plots.series(data):
            yield f"![{plot}](docs/benchmarks/{plot_name(stem, plot)})"
            yield ""


def text(parts):
    return "\n".join(parts).rstrip() + "\n"


def with_quotation(readme):
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text(quoted())}{END}{after}"


def main():
    argparse.ArgumentParser(prog="python -m bench.report", description=__doc__).parse_args()
    found, _ = results()
    if not found:
        sys.exit(f"{RESULTS.relative_to(ROOT)} has no results: `make bench` writes them")
    PLOTS.mkdir(parents=True, exist_ok=True)
    for old in PLOTS.glob("*.png"):
        old.unlink()
    for name, data in found.items():
        for series, infos in plots.series(data).items():
            plots.draw(PLOTS / plot_name(Path(name).stem, series), series, infos)
    PAGE.write_text(text(page()))
    README.write_text(with_quotation(README.read_text()))
    print(f"{PAGE.relative_to(ROOT)}, {len(list(PLOTS.glob('*.png')))} plots in {PLOTS.relative_to(ROOT)}, README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
