"""What a reader relies on: quiet imports that go down only, and true contents."""

import ast
import os
import re
import subprocess
import sys

from helpers import ROOT

COMMANDS = sorted(ROOT.glob("*.py"))
SUPPORT = sorted(ROOT.glob("support/*.py"))
# The one command that each may import.
MAY_IMPORT = dict(train_gpt2="hellaswag", hellaswag="train_gpt2", fineweb=None, plot=None)
MAY_IMPORT |= dict(sample="train_gpt2", export="train_gpt2", bench="train_gpt2")
TOP_LEVEL = {"README.md", "requirements.txt", "pyproject.toml", "input.txt"}
TOP_LEVEL |= {f"{name}.py" for name in MAY_IMPORT} | {"support", "tests", "runs", "docs"}


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
    options = dict(cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    command = [sys.executable, "-B", "-c", code, *modules]
    done = subprocess.run(command, **options, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imports(path) -> set[str]:
    """What a file imports of this project."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            before = f"{'.' * node.level}{node.module}." if hasattr(node, "module") else ""
            found |= {before + alias.name for alias in node.names}
    ours = {*MAY_IMPORT, "support", ""}  # "" begins a relative import
    return {name for name in found if name.partition(".")[0] in ours}


def test_imports_go_down_only():
    for path in COMMANDS:
        modules = {name.partition(".")[0] for name in imports(path)}
        assert modules <= {"support", MAY_IMPORT[path.stem]}, path
    names = {path.stem: imports(path) for path in SUPPORT}
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


def test_the_folder_holds_what_it_should():
    git = ["git", "-C", str(ROOT), "ls-files"]
    files = subprocess.run(git, capture_output=True, text=True, check=False).stdout.splitlines()
    top = {file.partition("/")[0] for file in files if not file.startswith(".")}
    assert top in (TOP_LEVEL, set()), "set() without a repository"
