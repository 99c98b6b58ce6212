"""What the code imports is what requirements.txt installs, in versions that were tested."""

import ast
import re
import sys
from importlib.metadata import packages_distributions

from tests.conftest import ROOT

OWN = {"bundle", "kernel", "local", "tests"}
OPTIONAL = {"bioclip", "faiss"}  # measured by local/benchmark.py where it is there


def name_of(requirement: str) -> str:
    """A package's name as the index normalises it."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


def lines_of(name: str) -> list[str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))


def imported() -> set[str]:
    """The top-level modules that the code imports, its own and Python's left out."""
    found = set()
    for path in [ROOT / "bundle.py", *(path for part in OWN - {"bundle"} for path in (ROOT / part).rglob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found - OWN - OPTIONAL - set(sys.stdlib_module_names)


def test_every_package_that_is_imported_is_declared():
    declared, packages = {name_of(line) for line in lines_of("requirements.txt")}, packages_distributions()
    assert {"torch", "slugify", "markupsafe"} <= imported()
    for module in imported():
        names = {name_of(package) for package in packages.get(module, ())}
        assert declared & names, f"{module} is not in requirements.txt"


def test_every_requirement_has_a_tested_version_inside_its_bounds():
    pins = dict(line.split("==") for line in lines_of("constraints.txt"))
    pins = {name_of(name): numbers(version) for name, version in pins.items()}
    for line in lines_of("requirements.txt"):
        pin, upper = pins[name_of(line)], re.search(r"<([\d.]+)", line)
        lower = re.search(r">=([\d.]+)", line)
        assert upper, f"{line} has no upper bound"
        assert pin < numbers(upper.group(1)), line
        assert not lower or pin >= numbers(lower.group(1)), line
