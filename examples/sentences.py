"""Sentences that every Python has: of its language reference and of its standard library's docstrings."""

import ast
import re
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

# Not the library's own prose, or not there in every distribution of Python.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "pydoc_data"}
WORDS = range(5, 26)  # of a sentence
PROSE = 0.85  # least share of letters and spaces: less is code, or a table


def docstrings():
    """Those of modules, classes and functions; files are parsed, none is imported."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(path.relative_to(library).parts):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield ast.get_docstring(node) or ""


def paragraphs(text):
    """Of prose, one line each: without examples, grammar, underlined titles and the marks of reStructuredText."""
    for paragraph in re.split(r"\n\s*\n", text):
        if not re.search(r"^\s*(>>>|\.\.\.)|::=|^\s*[-=]{3,}", paragraph, re.MULTILINE):
            yield " ".join(re.sub(r"[*_`]{2,}|[`*]", "", paragraph).split())


def is_sentence(text):
    prose = sum(letter.isalpha() or letter == " " for letter in text)
    return len(text.split()) in WORDS and re.fullmatch(r"[A-Z].*[.!?]", text) and prose >= PROSE * len(text)


def letters(sentence):
    """What is left of it to tell whether two are the same: no digits, signs, spaces or capitals."""
    return "".join(filter(str.isalpha, sentence)).lower()


def read_sentences():
    """Every sentence once, always in the same order with the same Python."""
    found = {}  # by their letters
    for text in (*(topics[name] for name in sorted(topics)), *docstrings()):
        for paragraph in paragraphs(text):
            for sentence in re.split(r"(?<=[a-z\d)\"'][.!?]) (?=[A-Z])", paragraph):
                if is_sentence(sentence):
                    found.setdefault(letters(sentence), sentence)
    return list(found.values())
