"""A package flattened into one script reads, runs and fails like the package, or is refused with line and fix."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kernel.inputs import InputError
from kernel.manifest import MANIFEST, write_manifest
from local.bundling.flatten import SIZE_LIMIT, flatten
from tests.manifests import manifest

ROOT = Path(__file__).resolve().parents[3]
FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n +(.*)')


def package(folder: Path, **modules: str) -> Path:
    """Write a package `pkg` of the given modules; its `__init__` is empty unless given."""
    for name, source in {"__init__": "", **modules}.items():
        path = folder / "pkg" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8", newline="")
    return folder / "pkg"


def python(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, encoding="utf-8", timeout=60, **options
    )


def run_both(folder: Path) -> tuple[subprocess.CompletedProcess, subprocess.CompletedProcess]:
    """The package run with `python -m`, and its flat script, on their own."""
    script = folder.parent / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(flatten(folder), encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    as_package = python("-m", folder.name, cwd=folder.parent, env=environment)
    return as_package, python("-I", script, cwd=script.parent, env=environment)


def refusal(folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        flatten(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


CHAIN = {
    "__main__": '''"""The entry's docstring."""

import json
from pkg.a import double, note

note("entry, part 1")

# What follows is imported late, after part 1 has run.
import json
import os.path
from pkg.c import LATE


def main() -> None:
    """The story."""
    print(json.dumps([double(4), LATE, os.path.sep != ""]))


if __name__ == "__main__":
    main()
''',
    "a": '''"""What a is for.

And more of it.
"""

import json
from math import floor

from pkg.b import (
    FACTOR,
    note,
)

note("a")


def double(value: int) -> int:
    """Twice the value."""
    return floor(value * FACTOR)  # never rounded
''',
    "b": """import json
from math import floor, pi

FACTOR = floor(pi) - 1


# A comment above a function.
def note(text: str) -> None:
    print(json.dumps(text))


note("b")
""",
    "c": """from pkg.b import note

note("c")
LATE = '''from pkg.a import nothing
import json
# in a string'''
""",
}


def test_the_script_does_in_order_what_the_package_does(tmp_path: Path) -> None:
    as_package, as_script = run_both(package(tmp_path, **CHAIN))
    assert as_package.returncode == 0, as_package.stderr
    lines = as_package.stdout.splitlines()
    assert lines[:4] == ['"b"', '"a"', '"entry, part 1"', '"c"']
    assert lines[4].startswith("[8, ")
    assert (as_script.stdout, as_script.stderr, as_script.returncode) == (as_package.stdout, "", 0)


def test_imports_of_siblings_are_left_out_and_all_others_appear_once(tmp_path: Path) -> None:
    tree = ast.parse(flatten(package(tmp_path, **CHAIN)))
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert sorted(imports) == ["from math import floor, pi", "import json", "import os.path"]


def test_comments_and_docstrings_survive(tmp_path: Path) -> None:
    text = flatten(package(tmp_path, **CHAIN))
    tree = ast.parse(text)
    docstrings = {ast.get_docstring(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert docstrings == {"The story.", "Twice the value.", None}
    for line in (
        "# The entry's docstring.",
        "# What a is for.",
        "# And more of it.",
        "# What follows is imported late, after part 1 has run.",
        "    return floor(value * FACTOR)  # never rounded",
        "# A comment above a function.",
        "# in a string'''",
    ):
        assert text.splitlines().count(line) == 1, line


def test_a_comment_before_the_first_statement_or_after_the_last_survives(tmp_path: Path) -> None:
    text = flatten(package(tmp_path, __main__='"""Doc."""\n\n# the first\nVALUE = 1\nprint(VALUE)\n# the last\n'))
    assert "# the first" in text
    assert "# the last" in text


def test_every_section_names_its_module_and_the_parts_of_one_that_is_interrupted(tmp_path: Path) -> None:
    text = flatten(package(tmp_path, **CHAIN))
    assert [line[2:] for line in text.splitlines() if re.match(r"# pkg/\w+\.py", line)] == [
        "pkg/b.py",
        "pkg/a.py",
        "pkg/__main__.py, part 1 of 2",
        "pkg/c.py",
        "pkg/__main__.py, part 2 of 2",
    ]
    first, last = text.split("# pkg/c.py")
    assert "# The entry's docstring." in last.splitlines()
    assert "# The entry's docstring." not in first.splitlines()


def contents(text: str) -> list[tuple[int, str, str]]:
    """Line, section and summary of each entry in a script's table of contents."""
    lines = ast.get_docstring(ast.parse(text)).partition("Contents, by line:\n")[2].splitlines()
    entries = [re.fullmatch(r" *(\d+)  (\S+\.py(?:, part \d of \d)?)(?: +(.+))?", line) for line in lines]
    return [(int(entry[1]), entry[2], entry[3] or "") for entry in entries]


def test_the_table_of_contents_gives_the_line_of_every_section(tmp_path: Path) -> None:
    text = flatten(package(tmp_path, **CHAIN), introduction='What it "is":\n\n  C:\\new """quoted"""')
    assert ast.get_docstring(ast.parse(text)).startswith('What it "is":\n\n  C:\\new """quoted"""\n\nContents')
    found = contents(text)
    assert [(section, summary) for _, section, summary in found] == [
        ("pkg/b.py", ""),
        ("pkg/a.py", "What a is for"),
        ("pkg/__main__.py, part 1 of 2", "The entry's docstring"),
        ("pkg/c.py", ""),
        ("pkg/__main__.py, part 2 of 2", "The entry's docstring"),
    ]
    lines = text.split("\n")
    assert [lines[line - 1] for line, _, _ in found] == [f"# {section}" for _, section, _ in found]


def test_a_traceback_points_at_the_same_source_at_its_real_line_in_the_script(tmp_path: Path) -> None:
    folder = package(
        tmp_path,
        __main__='"""Doc."""\n\nfrom pkg.a import outer\n\n\ndef main():\n    outer(0)\n\n\nmain()\n',
        a='"""Two\n\nparagraphs."""\nimport math\n\nfrom pkg.b import inner\n\n\ndef outer(x):\n    return inner(x)\n',
        b='import math\n\nTEXT = """\n\n"""\n\n\ndef inner(x):\n    # why\n    return math.pi / x\n',
    )
    as_package, as_script = run_both(folder)
    expected = [(name, line) for path, _, name, line in FRAME.findall(as_package.stderr) if Path(path).parent == folder]
    script = tmp_path / "elsewhere" / "script.py"
    frames = [frame for frame in FRAME.findall(as_script.stderr) if frame[0] == str(script)]
    assert [name for name, _ in expected] == ["<module>", "main", "outer", "inner"]
    assert [(name, line) for _, _, name, line in frames] == expected
    lines = script.read_text(encoding="utf-8").split("\n")
    assert [lines[int(number) - 1].strip() for _, number, _, _ in frames] == [line for _, line in expected]
    assert as_script.stderr.splitlines()[-1] == as_package.stderr.splitlines()[-1]


def test_the_same_modules_give_the_same_bytes_in_any_folder_and_process(tmp_path: Path) -> None:
    one, other = package(tmp_path / "one", **CHAIN), package(tmp_path / "other", **CHAIN)
    code = "import sys, pathlib, local.bundling.flatten as f; sys.stdout.write(f.flatten(pathlib.Path(sys.argv[1])))"
    texts = [
        python("-c", code, folder, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
        for folder, seed in ((one, "1"), (other, "2"))
    ]
    assert texts == [flatten(one)] * 2


FAITHFUL = {
    "a decorator on the first statement": {"__main__": "@lambda f: f.__name__\ndef name(): ...\nprint(name)\n"},
    "a line separator in a string": {
        "__main__": 'TEXT = "one\u2028two"\nfrom pkg.a import OTHER\nprint(ascii(TEXT), OTHER)\n',
        "a": "OTHER = 2\n",
    },
    "a form feed between functions": {
        "__main__": "VALUE = 1\n\x0c\nfrom pkg.a import OTHER\nprint(VALUE, OTHER)\n",
        "a": "OTHER = 2\n",
    },
    "carriage returns at the ends of lines": {
        "__main__": "import os\r\n\r\nfrom pkg.a import OTHER\r\nprint(OTHER, os.sep)\r\n",
        "a": "OTHER = 2\r\n",
    },
}


@pytest.mark.parametrize("modules", FAITHFUL.values(), ids=FAITHFUL.keys())
def test_a_script_does_what_its_package_does(tmp_path: Path, modules: dict) -> None:
    as_package, as_script = run_both(package(tmp_path, **modules))
    assert (as_script.stdout, as_script.returncode) == (as_package.stdout, 0), as_script.stderr


X = "X = 1\n"  # a module that another one imports
IMPORTS_X = "from pkg.a import X\n"
REFUSED = {
    "two statements on a line": ({"__main__": "import os; VALUE = 1\n"}, "__main__.py:1", "give each its own"),
    "code in __init__": ({"__init__": 'print("init")\n', "__main__": ""}, "__init__.py:1", "move it into a module"),
    "the docstring as a value": ({"__main__": '"""Usage."""\nprint(__doc__)\n'}, "__main__.py:2", "where it is used"),
    "a global": (
        {"__main__": IMPORTS_X, "a": X + "def step():\n    global X\n    X += 1\n"},
        "a.py:3",
        "keep what changes in an object",
    ),
    "a star import": ({"__main__": "import os\nfrom math import *\n"}, "__main__.py:2", "name them"),
    "a relative import": ({"__main__": "from .a import X\n", "a": X}, "__main__.py:1", "write from pkg."),
    "a sibling imported in a function": (
        {"__main__": "def f():\n    from pkg.a import X\n", "a": X},
        "__main__.py:2",
        "import it at the top",
    ),
    "a sibling imported in a try": (
        {"__main__": "try:\n    from pkg.a import X\nexcept ImportError:\n    X = 0\n", "a": X},
        "__main__.py:2",
        "import it at the top",
    ),
    "import_module of a sibling by keyword": (
        {"__main__": 'import importlib\n\nA = importlib.import_module(name="pkg.a")\n', "a": ""},
        "__main__.py:3",
        "import it at the top",
    ),
    "import_module of a sibling by its relative name": (
        {"__main__": 'import importlib\n\nA = importlib.import_module(".a", "pkg")\n', "a": ""},
        "__main__.py:3",
        "import it at the top",
    ),
    "__import__ of a sibling": ({"__main__": 'A = __import__("pkg.a")\n', "a": ""}, "__main__.py:1", "at the top"),
    "a module under a name": ({"__main__": "import pkg.a as b\n", "a": ""}, "__main__.py:1", "write from pkg.MODULE"),
    "a module from the package": ({"__main__": "from pkg import a\n", "a": ""}, "__main__.py:1", "from pkg.MODULE"),
    "a sibling's name under another": (
        {"__main__": "from pkg.a import X as Y\n", "a": X},
        "__main__.py:1",
        "import it as it is",
    ),
    "a name that the module lacks": (
        {"__main__": "from pkg.a import X, Y\n", "a": X},
        "__main__.py:1",
        "import what it defines",
    ),
    "a module that is not there": ({"__main__": IMPORTS_X}, "__main__.py:1", "import one that exists"),
    "a cycle": (
        {"__main__": IMPORTS_X, "a": "from pkg.b import Y\n\nX = 1\n", "b": IMPORTS_X + "Y = 2\n"},
        "b.py:1",
        "move what both need into a third",
    ),
    "two equal names": ({"__main__": IMPORTS_X + "LIMIT = 2\n", "a": X + "LIMIT = 1\n"}, "__main__.py:2", "rename one"),
    "a function and a class of one name": (
        {"__main__": IMPORTS_X + "class made: ...\n", "a": X + "def made(): ...\n"},
        "__main__.py:2",
        "rename one of the two",
    ),
    "a name bound deep in a loop": (
        {"__main__": IMPORTS_X + "if X:\n    for i in [1]:\n        pass\n", "a": "X, (i, j) = 1, (2, 3)\n"},
        "__main__.py:2",
        "rename one of the two",
    ),
    "a name of a caught error": (
        {"__main__": IMPORTS_X + "try:\n    pass\nexcept ValueError as j:\n    pass\n", "a": X + "j = 2\n"},
        "__main__.py:2",
        "rename one of the two",
    ),
    "an import that binds a sibling's name": (
        {"__main__": "from pkg.a import json\nimport json\n", "a": "json = 1\n"},
        "__main__.py:2",
        "rename one of the two",
    ),
    "two imports of one name": (
        {"__main__": "import time\n" + IMPORTS_X, "a": "from time import time\n\nX = time()\n"},
        "__main__.py:1",
        "rename one of the two",
    ),
    "a builtin hidden": ({"__main__": IMPORTS_X, "a": X + "def open(): ...\n"}, "a.py:2", "rename it"),
    "the file's own path": ({"__main__": "print(__file__)\n"}, "__main__.py:1", "ship it in the weights"),
    "a module's name": (
        {"__main__": IMPORTS_X, "a": X + "if __name__ == '__main__':\n    print(X)\n"},
        "a.py:2",
        "move what runs into __main__.py",
    ),
    "a future import": ({"__main__": "from __future__ import annotations\n"}, "__main__.py:1", "remove it"),
    "a syntax error": ({"__main__": IMPORTS_X, "a": X + "if X\n    print(X)\n"}, "a.py:2", "fix the syntax"),
}


@pytest.mark.parametrize(("modules", "location", "fix"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_flattened_is_refused_with_its_line_and_the_fix(
    tmp_path: Path, modules: dict, location: str, fix: str
) -> None:
    folder = package(tmp_path, **modules)
    message = refusal(folder)
    assert message.startswith(f"{folder}/{location}: ")
    assert fix in message


def test_an_equal_name_is_refused_with_both_lines(tmp_path: Path) -> None:
    folder = package(tmp_path, __main__="from pkg.a import X\nLIMIT = 2\n", a="X = 1\nLIMIT = 1\n")
    assert f"LIMIT is also a top-level name at {folder}/a.py:2" in refusal(folder)


def test_a_name_of_a_function_a_comprehension_or_a_class_body_may_come_twice(tmp_path: Path) -> None:
    body = "\n\nclass {}:\n    limit = 1\n\n    def read(self): ...\n\n\ndef {}(total):\n    i = total\n    return i\n"
    folder = package(
        tmp_path,
        __main__="from pkg.a import first\n" + body.format("Two", "second") + "\n\nprint([i for i in [second(3)]])\n",
        a=body.format("One", "first") + "\n\nLIST = [i for i in [1]]\n",
    )
    as_package, as_script = run_both(folder)
    assert as_script.stdout == as_package.stdout == "[3]\n"


def test_of_a_registry_the_chosen_module_alone_is_in_the_script(tmp_path: Path) -> None:
    folder = package(
        tmp_path,
        **{
            "__main__": "from pkg.animals import ALL\n\nprint(ALL)\n",
            "animals/__init__": "from pkg.animals import cats, dogs\n\nALL = cats.ALL + dogs.ALL\n",
            "animals/animal": "LEGS = 4\n",
            "animals/cats": "from pkg.animals.animal import LEGS\n\nALL = [f'a cat has {LEGS} legs']\n",
            "animals/dogs": "ALL = ['a dog barks']\n",
        },
    )
    text = flatten(folder, chosen={"animals": "cats"})
    assert "# pkg/animals/cats.py" in text
    assert "dog" not in text
    script = tmp_path / "script.py"
    script.write_text(text, encoding="utf-8")
    assert python("-I", script).stdout == "['a cat has 4 legs']\n"
    assert "import from a module of pkg.animals" in refusal(folder)
    with pytest.raises(InputError, match=r"pkg\.animals has no ALL: import what it defines"):
        flatten(folder, chosen={"animals": "animal"})


def test_an_import_in_a_function_stays_there(tmp_path: Path) -> None:
    text = flatten(package(tmp_path, __main__="def f():\n    import json\n    return json\n\n\nf()\n"))
    assert "\n    import json\n" in text


def test_a_script_of_a_million_bytes_passes_and_of_one_more_is_refused(tmp_path: Path) -> None:
    start = len(flatten(package(tmp_path / "empty", __main__='X = ""\n')).encode())
    room = SIZE_LIMIT - start
    text = "é" * (room // 2) + "e" * (room % 2)  # bytes count, not characters
    assert len(flatten(package(tmp_path / "full", __main__=f'X = "{text}"\n')).encode()) == 1_000_000
    message = refusal(package(tmp_path / "over", __main__=f'X = "{text}e"\n'))
    assert str(tmp_path / "over" / "pkg") in message
    assert "1000001 bytes" in message
    assert "shorten it" in message


@pytest.fixture(scope="module")
def kernel_script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "kernel.py"
    path.write_text(flatten(ROOT / "kernel", chosen={"competitions": "class_folders"}), encoding="utf-8")
    return path


def test_the_kernel_flattens_into_a_script_that_compiles_and_has_no_undefined_or_unused_name(
    kernel_script: Path,
) -> None:
    compile(kernel_script.read_text(encoding="utf-8"), str(kernel_script), "exec")
    done = python("-m", "ruff", "check", "--isolated", "--no-cache", "--select", "F", kernel_script)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_kernels_table_of_contents_gives_the_line_of_every_section_and_says_what_it_is(kernel_script: Path) -> None:
    text = kernel_script.read_text(encoding="utf-8")
    lines, found = text.split("\n"), contents(text)
    assert [lines[line - 1] for line, _, _ in found] == [f"# {section}" for _, section, _ in found]
    assert len(found) == sum(line.startswith("# kernel/") for line in lines) > 10
    assert all(summary for _, _, summary in found)


@pytest.mark.parametrize(("rerun", "code"), [({}, 1), ({"KAGGLE_IS_COMPETITION_RERUN": "1"}, 0)])
def test_where_torch_cannot_be_imported_the_fallback_is_on_disk(
    kernel_script: Path, tmp_path: Path, rerun: dict, code: int
) -> None:
    photos, weights = tmp_path / "input" / "competition" / "test", tmp_path / "input" / "weights"
    for folder in (photos, weights):
        folder.mkdir(parents=True)
    (photos / "one.jpg").touch()
    write_manifest(manifest(fallback_classes=("oak", "elm")), weights / MANIFEST)
    working = tmp_path / "working"
    # -S leaves site-packages out, and with it everything but the standard library.
    done = python("-I", "-S", kernel_script, "--input", tmp_path / "input", "--working", working, env=rerun)
    assert "ModuleNotFoundError" in done.stderr
    assert done.returncode == code
    assert (working / "submission.csv").read_text(encoding="utf-8") == "image_name,pred_label\none,oak\n"
