"""What a reader relies on: quiet imports that go down only, true contents, no hidden globals."""

import ast
import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

COMMANDS = sorted(ROOT.glob("*.py"))
SUPPORT = sorted(ROOT.glob("support/*.py"))
# The one command that each may import.
MAY_IMPORT = dict(train_gpt2="hellaswag", hellaswag="train_gpt2", fineweb=None, plot=None)
MAY_IMPORT |= dict(sample="train_gpt2", export="train_gpt2", bench="train_gpt2")
TOP_LEVEL = {"README.md", "requirements.txt", "pyproject.toml", "input.txt"}
TOP_LEVEL |= {f"{name}.py" for name in MAY_IMPORT} | {"support", "tests", "runs", "docs"}


def python(folder, *arguments):
    """Run python in `folder`, with the project's modules -> subprocess.CompletedProcess."""
    options = dict(cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    return subprocess.run([sys.executable, *arguments], **options, text=True, check=False)


def test_importing_executes_nothing(tmp_path):
    """No output, no file, no random number drawn, and no library that takes seconds to import."""
    code = """if True:
        import importlib, os, random, sys, numpy, torch
        def states():
            return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()
        before = states()
        for name in sys.argv[1:]:
            importlib.import_module(name)
            slow = {"datasets", "matplotlib", "transformers", "tiktoken"} & set(sys.modules)
            assert not slow and not os.listdir(), (name, slow)
            assert states() == before, name
    """
    modules = [path.stem for path in COMMANDS] + [f"support.{path.stem}" for path in SUPPORT]
    done = python(tmp_path, "-B", "-c", code, *modules)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imports(path) -> set[tuple[str, str]]:
    """What is imported of this project, and in which function or class ("" if outside of all)."""
    found = set()
    for part in ast.parse(path.read_text()).body:
        for node in ast.walk(part):
            if isinstance(node, ast.Import | ast.ImportFrom):
                before = f"{'.' * node.level}{node.module}." if hasattr(node, "module") else ""
                found |= {(before + alias.name, getattr(part, "name", "")) for alias in node.names}
    ours = {*MAY_IMPORT, "support", ""}  # "" begins a relative import
    return {(name, where) for name, where in found if name.partition(".")[0] in ours}


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_commands_import_only_what_they_may(path):
    for name, where in imports(path):
        module = name.partition(".")[0]
        assert module in ("support", MAY_IMPORT[path.stem]), name
        assert module == "support" or path.stem != "hellaswag" or where == "main", where


def test_support_imports_only_support():
    names = {path.stem: {name for name, _ in imports(path)} for path in SUPPORT}
    assert all(name.startswith("support.") for name in set().union(*names.values())), names
    assert names["checkpoint"] and not any("machine" in name for name in names["checkpoint"])


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


@pytest.mark.parametrize("path", COMMANDS + SUPPORT, ids=lambda path: path.name)
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


def test_the_tutorial_is_short_and_its_folder_holds_what_it_should():
    source = (ROOT / "train_gpt2.py").read_text()
    (main,) = [node for node in ast.parse(source).body if getattr(node, "name", "") == "main"]
    assert len(source.splitlines()) <= 760 and main.end_lineno - main.lineno < 75
    git = ["git", "-C", str(ROOT), "ls-files"]
    files = subprocess.run(git, capture_output=True, text=True, check=False).stdout.splitlines()
    top = {file.partition("/")[0] for file in files if not file.startswith(".")}
    assert top in (TOP_LEVEL, set()), "set() without a repository"
