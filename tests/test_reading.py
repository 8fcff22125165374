"""What a reader relies on: quiet imports, a true table of contents, no hidden globals."""

import ast
import re
import subprocess
import sys

import pytest
from helpers import ROOT

FILES = sorted([*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")])
SOURCES = [path for path in FILES if path.parent == ROOT]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_importing_executes_nothing(path, tmp_path):
    """Promise 8: no output, no file, no random number drawn, and no library that takes seconds."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.dont_write_bytecode = True\n"
        f"import random; before = random.getstate()\n"
        f"import {path.stem}\n"
        "slow = {'datasets', 'matplotlib', 'transformers', 'tiktoken'} & set(sys.modules)\n"
        "assert not slow, slow\n"
        "assert random.getstate() == before\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_table_of_contents_matches_the_banners():
    """The docstring's numbers and titles are the banners', in order, with chapters (or 'ours')."""
    source = (ROOT / "train_gpt2.py").read_text()
    contents = ast.get_docstring(ast.parse(source)).partition("Contents: ")[2].partition("\n\n")[0]
    listed = re.findall(r"(\d+)\. (.+?)[,.](?: |$)", contents.replace("\n", " "))
    banner = r"^# -{20,}\n# (\d+)\. ([^(:]+).*?[ (](\d:\d\d:\d\d|ours)\b"
    banners = re.findall(banner, source, re.MULTILINE)
    assert listed and listed == [(number, title.strip().lower()) for number, title, _ in banners]
    assert [int(number) for number, _ in listed] == list(range(1, len(listed) + 1))


def names_in(node, context=ast.Store) -> set[str]:
    names = (n for n in ast.walk(node) if isinstance(n, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, context)}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_function_reads_a_lower_case_global(path):
    """What a function needs it is given: of the module's variables it reads UPPER_CASE ones."""
    tree = ast.parse(path.read_text())
    variables = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Import | ast.ImportFrom):
            continue
        inner = (names_in(n) for n in ast.walk(node) if isinstance(n, ast.comprehension))
        variables |= names_in(node) - set().union(*inner)
    variables = {name for name in variables if name == name.lower()}
    functions = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
    for function in (node for node in ast.walk(tree) if isinstance(node, functions)):
        own = {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        read = names_in(function, ast.Load) - names_in(function, ast.Store) - own
        assert not read & variables, getattr(function, "name", "lambda")
        assert not any(isinstance(node, ast.Global) for node in ast.walk(function))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_line_is_above_100_columns(path):
    lines = path.read_text().splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 100]
