"""The pages, those of the root and those of docs/: what they show runs, what they point at is there, and they build
without a warning."""

import os
import re
import shlex
import subprocess
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import pytest

import fastkd

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DIRECTIVES = {"{toctree}", "{eval-rst}", "{literalinclude}", "{include}"}  # their content is Sphinx's to check
OURS = {".ci", "bench", "csrc", "docs", "examples", "fastkd", "tests"}
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # a reader has none


class Block(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page):
    text = page.read_text()
    for fence in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, fence.start()) + 1, fence[1].partition(" ")[0], fence[2])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON, SHELL = ([block for block in BLOCKS if block.language == language] for language in ("python", "sh"))


def run(*command, **options):
    return subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, check=False, **options
    )


def test_every_block_is_of_a_kind_that_is_checked():
    kinds = {str(block): block.language for block in BLOCKS if block.language not in {"python", "sh", *DIRECTIVES}}
    assert not kinds
    assert PYTHON
    assert SHELL
    opened = {page: len(re.findall(r"^```\S", page.read_text(), re.MULTILINE)) for page in PAGES}
    assert opened == {page: sum(block.page == page for block in BLOCKS) for page in PAGES}


def long_where_it_is_a_recipe(block):
    """They start processes, train and compile."""
    return (
        pytest.param(block, marks=pytest.mark.long) if block.page.name in ("recipes.md", "recipes-ranks.md") else block
    )


# A process that has imported what blocks import, and that runs each as a script in a child of itself: to import torch,
# or transformers, takes longer than most blocks do. It is told folders, and tells the child's exit status.
READER = """
import atexit, gc, importlib.util, os, runpy, sys, traceback
import torch.distributed.tensor, fastkd  # torch.testing imports the first
if importlib.util.find_spec("transformers"):
    import transformers.modeling_utils

def read(folder):
    os.chdir(folder)
    told = os.open("told", os.O_WRONLY | os.O_CREAT)
    os.dup2(told, 1), os.dup2(told, 2)
    sys.argv = [folder + "/block.py"]
    try:
        runpy.run_path(folder + "/block.py", run_name="__main__")  # as processes that it starts find it
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
    return 0

gc.freeze()
for folder in map(str.strip, sys.stdin):
    child = os.fork()
    if not child:
        os._exit(read(folder))  # without taking down, object by object, what has been imported
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def reader():
    """Runs the script of a folder; returns its exit status and what it printed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", READER], env=ENVIRONMENT, **pipes) as process:

        def read(folder):
            print(folder, file=process.stdin, flush=True)
            status = process.stdout.readline()
            return int(status), (folder / "told").read_text()

        yield read


@pytest.mark.parametrize("block", [long_where_it_is_a_recipe(block) for block in PYTHON], ids=str)
def test_python_runs_without_a_warning(block, reader, tmp_path):
    """As a script of its own: processes that it starts import it."""
    (tmp_path / "block.py").write_text(block.text)
    status, told = reader(tmp_path)
    assert status == 0, told
    assert not re.search("warning|deprecated", told, re.IGNORECASE), told


def commands(block):
    """Each line's words, without its comment and what it sets in the environment."""
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            words.pop(0)
        if words:
            yield words


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_exist(block):
    """make's targets are there, fastkd's own command runs, and the files that are named exist. What pip installs is
    left to .ci/run, which sets up an environment by the same lines."""
    for words in commands(block):
        if words[0] == "make":
            done = run("make", "-n", *words[1:], cwd=ROOT)
            assert done.returncode == 0, done.stdout
        elif words[:3] == ["python", "-m", "fastkd"]:
            done = run(sys.executable, *words[1:])
            assert done.returncode == 0, done.stdout
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file() or (words[1] == "-m" and (ROOT / words[2] / "__main__.py").is_file())
        else:
            assert words[:2] == ["pip", "install"], words


def prose(page):
    return FENCE.sub("", page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    targets = re.findall(r"\]\(([^)\s#]+)", prose(page)) + re.findall(r'(?:src|href)="([^"#]+)"', prose(page))
    linked = [page.parent / target for target in targets if "://" not in target]
    quoted = re.findall(r"`([\w.-]+(?:/[\w.*-]+)+)`", prose(page))
    named = [ROOT / path for path in quoted if path.partition("/")[0] in OURS]
    missing = [str(path) for path in linked + named if not any(path.parent.glob(path.name))]
    assert not missing


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The pages; a warning, as of a reference that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("docs")
    done = run(sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", folder, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    return folder


def test_everything_public_is_in_the_reference(built):
    inventory = (built / "objects.inv").read_bytes().split(b"\n", 4)[4]  # behind four lines that describe it
    documented = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines() if " py:" in line}
    functions = fastkd.functional.__all__
    public = {f"fastkd.{name}" for name in fastkd.__all__ if name not in ("functional", "metrics")}
    public |= {f"fastkd.functional.{name}" for name in functions}
    public |= {f"fastkd.metrics.{name}" for name in fastkd.metrics.__all__}
    losses = [name for name in functions if name.islower()]
    # each has a module; beside them there are what stands in place of logits, backend, functional and metrics
    assert len(losses) == len(fastkd.__all__) - 6
    assert not public - documented


def test_pages_need_no_other_host(built):
    pages = list(built.rglob("*.html"))
    assert built / "index.html" in pages
    foreign = {
        page.name: re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//[^"]*', page.read_text()) for page in pages
    }
    assert not any(foreign.values()), foreign
