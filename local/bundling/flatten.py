"""Flatten a package into one script that reads, runs and fails like the package.

The modules follow one another in the order in which Python would run them, each under a header. Imports among them
go; all other lines stay as they were written, so a traceback points at real, readable lines. What cannot be flattened
without changing what it means is refused, with its place and the mend.
"""

import ast
import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from types import MappingProxyType

from kernel.inputs import InputError

SIZE_LIMIT = 1_000_000  # bytes; Kaggle refuses larger scripts


@dataclass
class Script:
    """The script while it is put together.

    Attributes:
        package: the folder, whose name is the package's.
        chosen: see `flatten`.
        lines: what is written so far.
        begun: modules whose header is written; True once they are complete.
        bound: top-level name -> (what it is, where it was bound).
        imported: the imports, in words, that are written already.
        names: module -> the top-level names that it has, its own and imported ones.
    """

    package: Path
    chosen: Mapping[str, str]
    lines: list[str] = field(default_factory=list)
    begun: dict[str, bool] = field(default_factory=dict)
    bound: dict[str, tuple[str, str]] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)
    names: dict[str, set[str]] = field(default_factory=dict)


def flatten(package: Path, entry: str = "__main__", chosen: Mapping[str, str] = MappingProxyType({})) -> str:
    """One script from a package.

    Args:
        package: the package's folder.
        entry: the module that `python -m` would run; it alone may ask for `__name__`.
        chosen: subpackage -> one of its modules. Where the package has all of them to choose from, the script has this
            one: `from PACKAGE.SUBPACKAGE import NAME` takes NAME from it, and the subpackage's __init__.py is left out.

    Raises:
        InputError: something in the package cannot be flattened.
    """
    script = Script(package, chosen)
    initial = package / "__init__.py"
    for node in ast.parse(initial.read_text(encoding="utf-8")).body if initial.is_file() else []:
        if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise _refusal(initial, node, "a script runs no __init__.py", "move it into a module")
    _add_module(script, entry, is_entry=True)
    text = "\n".join(script.lines).strip("\n") + "\n"
    if len(text.encode()) > SIZE_LIMIT:
        raise InputError(f"{package} makes a script of {len(text.encode())} bytes, over {SIZE_LIMIT}: shorten it")
    return text


def _add_module(script: Script, name: str, is_entry: bool = False) -> None:
    path = _path_of(script, name)
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno or 1}: {error.msg}: mend the syntax") from error
    _refuse_what_cannot_be_flattened(script, path, tree, is_entry)
    script.begun[name] = False
    docstring = ast.get_docstring(tree)
    body = tree.body[1:] if docstring is not None else tree.body
    # Not splitlines: it also splits at form feeds and at separators within strings, where Python counts no line.
    lines, at = source.split("\n"), tree.body[0].end_lineno if docstring is not None else 0
    while at < len(lines) and not lines[at].strip():
        at += 1
    names = script.names.setdefault(name, set())
    header = _header(script.package, path, docstring)
    for is_import, nodes in groupby(body, lambda node: isinstance(node, ast.Import | ast.ImportFrom)):
        nodes = list(nodes)
        end = nodes[-1].end_lineno
        if is_import:
            # Siblings first: what they import, this module need not import again.
            if _add_siblings(script, path, nodes):
                header = header or _header(script.package, path, None)
            comments = [line for line in lines[at:end] if line.startswith("#")]
            names.update(_imported_names(nodes))
            block = comments + [line for node in nodes for line in _new_imports(script, path, node)]
            script.lines += [*header, *block]
        else:
            for node in nodes:
                for bound in _bound_names(node):
                    names.add(bound)
                    _bind(script, path, node, bound, f"{name}:{bound}")
            script.lines += [*header, *lines[at:end]]
        header, at = [], end
    script.lines += [*header, *lines[at:]]
    script.begun[name] = True


def _add_siblings(script: Script, path: Path, nodes: Sequence[ast.stmt]) -> bool:
    """Add the modules that a block of imports names, where they are new. Returns whether any was."""
    added = False
    for node in nodes:
        sibling = _sibling(script, node)
        if sibling is None:
            continue
        if script.begun.get(sibling) is False:
            raise _refusal(path, node, f"{sibling} imports this module too", "move what both need into a third")
        if sibling not in script.begun:
            _add_module(script, sibling)
            added = True
        for alias in node.names:
            if alias.name not in script.names[sibling]:
                raise _refusal(path, node, f"{node.module} has no {alias.name}", "import what it defines")
    return added


def _header(package: Path, path: Path, docstring: str | None) -> list[str]:
    """The lines that open a module: its name, and its docstring as a comment."""
    title = path.relative_to(package.parent).as_posix()
    rule = "# " + "=" * 117
    text = [f"# {line}".rstrip() for line in (docstring or "").splitlines()]
    return [
        "",
        "",
        rule,
        f"# {title}" + ("" if docstring else ", continued"),
        *(["#", *text] if text else []),
        rule,
        "",
    ]


def _sibling(script: Script, node: ast.AST) -> str | None:
    """The module of the package that an import statement names, or that is chosen for what it names; if any."""
    if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(f"{script.package.name}."):
        name = node.module.removeprefix(f"{script.package.name}.")
        return f"{name}.{script.chosen[name]}" if name in script.chosen else name
    return None


def _path_of(script: Script, name: str) -> Path:
    """The file of a module of the package."""
    return script.package / f"{name.replace('.', '/')}.py"


def _new_imports(script: Script, path: Path, node: ast.Import | ast.ImportFrom) -> list[str]:
    """The part of an import statement that no earlier section has imported already; nothing for a sibling."""
    if _sibling(script, node):
        return []
    is_from, fresh = isinstance(node, ast.ImportFrom), []
    for alias in node.names:
        name = alias.asname or (alias.name if is_from else alias.name.partition(".")[0])
        origin = f"{node.module}.{alias.name}" if is_from else alias.name if alias.asname else name
        # `import a.b` and `import a.c` bind the same a, and both must stay.
        statement = f"import {alias.name} from {getattr(node, 'module', '')} as {name}"
        _bind(script, path, node, name, f"import of {origin}")
        if statement not in script.imported:
            script.imported.add(statement)
            fresh.append(alias)
    if not fresh:
        return []
    return [ast.unparse(ast.ImportFrom(node.module, fresh, 0) if is_from else ast.Import(fresh))]


def _bind(script: Script, path: Path, node: ast.AST, name: str, what: str) -> None:
    """Note a top-level name, and refuse a second meaning of it."""
    place = f"{path}:{node.lineno}"
    if name in vars(builtins):
        raise _refusal(path, node, f"{name} hides a builtin from every other module of the script", "rename it")
    earlier, where = script.bound.setdefault(name, (what, place))
    if earlier != what:
        raise _refusal(path, node, f"{name} is also a top-level name at {where}", "rename one of the two")


def _imported_names(nodes: Sequence[ast.Import | ast.ImportFrom]) -> list[str]:
    return [alias.asname or alias.name.partition(".")[0] for node in nodes for alias in node.names]


def _bound_names(node: ast.AST) -> list[str]:
    """The names that a top-level statement binds, not looking into functions and classes."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
        return []
    names = [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) else []
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        names.append(node.name)
    if isinstance(node, ast.Import | ast.ImportFrom):
        names += _imported_names([node])
    return names + [name for child in ast.iter_child_nodes(node) for name in _bound_names(child)]


def _refuse_what_cannot_be_flattened(script: Script, path: Path, tree: ast.Module, is_entry: bool) -> None:
    package = script.package.name
    for one, other in pairwise(tree.body):
        if one.end_lineno == other.lineno:
            raise _refusal(path, other, "two statements on one line cannot be taken apart", "give each its own")
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if "*" in imported:
            raise _refusal(path, node, "a star import hides which names it binds", "name them")
        if isinstance(node, ast.ImportFrom) and node.level:
            raise _refusal(path, node, "a relative import has no package in a script", f"write from {package}.… import")
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise _refusal(path, node, "a future import must be a script's first statement", "do without it")
        if (isinstance(node, ast.Import) and any(name.partition(".")[0] == package for name in imported)) or (
            isinstance(node, ast.ImportFrom) and node.module == package
        ):
            raise _refusal(path, node, "a module is no object in a script", f"write from {package}.MODULE import NAME")
        if _sibling(script, node):
            if node not in tree.body:
                raise _refusal(path, node, "a lazy import of a sibling finds no package", "import it at the top")
            if any(alias.asname for alias in node.names):
                raise _refusal(path, node, "a sibling's name cannot be changed in a script", "import it as it is")
            if not _path_of(script, _sibling(script, node)).is_file():
                if (script.package / _sibling(script, node).replace(".", "/")).is_dir():
                    raise _refusal(path, node, "a script runs no __init__.py", f"import from a module of {node.module}")
                raise _refusal(path, node, f"there is no module {node.module}", "import one that exists")
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("import_module", "__import__"):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            named = [value.value for value in given if isinstance(value, ast.Constant)]
            if any(isinstance(name, str) and name.partition(".")[0] in ("", package) for name in named):
                raise _refusal(path, node, "a lazy import of a sibling finds no package", "import it at the top")
        if isinstance(node, ast.Name) and node.id in ("__file__", "__path__", "__spec__", "__package__"):
            raise _refusal(path, node, f"{node.id}: nothing lies beside a script on Kaggle", "ship it in the weights")
        if isinstance(node, ast.Global):
            raise _refusal(path, node, "global would rebind the name in every module", "keep what changes in an object")
        if isinstance(node, ast.Name) and node.id == "__doc__":
            raise _refusal(path, node, "__doc__ would be the script's", "write the text where it is used")
        if isinstance(node, ast.Name) and node.id == "__name__" and not is_entry:
            raise _refusal(path, node, "__name__ would be '__main__' in the script", "move what runs into __main__.py")


def _refusal(path: Path, node: ast.AST, problem: str, mend: str) -> InputError:
    return InputError(f"{path}:{node.lineno}: {problem}: {mend}")
