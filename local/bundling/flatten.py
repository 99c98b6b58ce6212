"""Flatten a package into one script that reads, runs and fails like the package.

The script opens with an introduction and a table of contents. The modules follow in the order in which Python would run
them, a section each. Imports among them are left out, and every other import is written once, at the head of the first
section that needs it. All other lines stay as they are, so a traceback points at real, readable lines. Code that would
have another meaning in one file is refused, with its line and the fix.
"""

import ast
import builtins
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from types import MappingProxyType

from kernel.inputs import InputError

SIZE_LIMIT = 1_000_000  # bytes; Kaggle refuses larger scripts


@dataclass
class Section:
    """A module, or the part of it up to an import of a sibling that must come first.

    Attributes:
        title: the module's path, such as `kernel/bank.py`.
        docstring: of the module.
        lines: of the module, without its docstring and without what is imported already.
    """

    title: str
    docstring: str
    lines: list[str] = field(default_factory=list)


@dataclass
class Script:
    """The script while it is put together.

    Attributes:
        package: the folder, whose name is the package's.
        chosen: see `flatten`.
        sections: those written so far.
        begun: modules of which a part is written; True once they are complete.
        bound: top-level name -> (what it is, where it is bound).
        imported: the imports that are written already, in words.
        names: module -> the top-level names that it has, its own and imported ones.
    """

    package: Path
    chosen: Mapping[str, str]
    sections: list[Section] = field(default_factory=list)
    begun: dict[str, bool] = field(default_factory=dict)
    bound: dict[str, tuple[str, str]] = field(default_factory=dict)
    imported: set[str] = field(default_factory=set)
    names: dict[str, set[str]] = field(default_factory=dict)


def flatten(
    package: Path, entry: str = "__main__", introduction: str = "", chosen: Mapping[str, str] = MappingProxyType({})
) -> str:
    """One script from a package.

    Args:
        package: the package's folder.
        entry: the module that `python -m` would run; it alone may use `__name__`.
        introduction: text for the script's docstring, before the table of contents.
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
    text = _render(introduction, script.sections)
    if len(text.encode()) > SIZE_LIMIT:
        raise InputError(f"{package} makes a script of {len(text.encode())} bytes, over {SIZE_LIMIT}: shorten it")
    return text


def _add_module(script: Script, name: str, is_entry: bool = False) -> None:
    path = _path_of(script, name)
    source = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(source, str(path))
    except SyntaxError as error:
        raise InputError(f"{path}:{error.lineno or 1}: {error.msg}: fix the syntax") from error
    _refuse_what_cannot_be_flattened(script, path, tree, is_entry)
    script.begun[name] = False
    docstring = ast.get_docstring(tree)
    section = Section(path.relative_to(script.package.parent).as_posix(), docstring or "")
    body = tree.body[1:] if docstring is not None else tree.body
    # Not splitlines: it also splits at form feeds and at separators within strings, where Python counts no line.
    lines, at = source.split("\n"), tree.body[0].end_lineno if docstring is not None else 0
    while at < len(lines) and not lines[at].strip():
        at += 1
    names = script.names.setdefault(name, set())
    for is_import, nodes in groupby(body, lambda node: isinstance(node, ast.Import | ast.ImportFrom)):
        nodes = list(nodes)
        end = nodes[-1].end_lineno
        if is_import:
            # Siblings first: what they import, this module need not import again.
            _add_siblings(script, path, nodes)
            comments = [line for line in lines[at:end] if line.startswith("#")]
            names.update(_imported_names(nodes))
            block = comments + [line for node in nodes for line in _new_imports(script, path, node)]
            _write(script, section, block)
        else:
            for node in nodes:
                for bound in _bound_names(node):
                    names.add(bound)
                    _bind(script, path, node, bound, f"{name}:{bound}")
            _write(script, section, lines[at:end])
        at = end
    _write(script, section, lines[at:])
    script.begun[name] = True


def _write(script: Script, section: Section, lines: Sequence[str]) -> None:
    """Append lines to a module's section; to a further part of it, where other modules have been written since."""
    if script.sections and script.sections[-1].title == section.title:
        script.sections[-1].lines += lines
    elif any(line.strip() for line in lines):
        script.sections.append(Section(section.title, section.docstring, list(lines)))


def _add_siblings(script: Script, path: Path, nodes: Sequence[ast.stmt]) -> None:
    """Add the modules that a block of imports names, where they are new."""
    for node in nodes:
        sibling = _sibling(script, node)
        if sibling is None:
            continue
        if script.begun.get(sibling) is False:
            raise _refusal(path, node, f"{sibling} imports this module too", "move what both need into a third module")
        if sibling not in script.begun:
            _add_module(script, sibling)
        for alias in node.names:
            if alias.name not in script.names[sibling]:
                raise _refusal(path, node, f"{node.module} has no {alias.name}", "import what it defines")


def _render(introduction: str, sections: Sequence[Section]) -> str:
    """The whole script: a docstring of introduction and table of contents, then every section under its header."""
    titles = [section.title for section in sections]
    headers, contents = [], []
    for index, section in enumerate(sections):
        parts, part = titles.count(section.title), titles[: index + 1].count(section.title)
        name = section.title if parts == 1 else f"{section.title}, part {part} of {parts}"
        docstring = section.docstring if part == parts else ""  # the docstring is about the last part
        headers.append(_header(name, docstring))
        contents.append((name, re.split(r"[:\n]|\.(?:\s|$)", section.docstring, maxsplit=1)[0]))
    bodies = [_without_blank_ends(section.lines) for section in sections]
    opening = [*introduction.splitlines(), *([""] if introduction else []), "Contents, by line:"]
    width = max((len(name) for name, _ in contents), default=0)
    line = len(opening) + len(contents) + 2  # the first after the docstring, whose closing quotes have a line
    for (name, summary), header, lines in zip(contents, headers, bodies, strict=True):
        opening.append(f"{line + header.index(f'# {name}'):6}  {name:{width}}  {summary}".rstrip())
        line += len(header) + len(lines)
    text = "\n".join(opening).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    body = [line for header, lines in zip(headers, bodies, strict=True) for line in (*header, *lines)]
    return "\n".join([f'"""{text}', '"""', *body, ""])


def _without_blank_ends(lines: Sequence[str]) -> Sequence[str]:
    filled = [at for at, line in enumerate(lines) if line.strip()]
    return lines[filled[0] : filled[-1] + 1] if filled else []


def _header(name: str, docstring: str) -> list[str]:
    """The lines that open a section: its name, and the module's docstring as a comment."""
    rule = "# " + "=" * 117
    text = [f"# {line}".rstrip() for line in docstring.splitlines()]
    return ["", "", rule, f"# {name}", *(["#", *text] if text else []), rule, ""]


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
    """Remember a top-level name, and refuse a second meaning of it."""
    location = f"{path}:{node.lineno}"
    if name in vars(builtins):
        raise _refusal(path, node, f"{name} hides a builtin from every other module of the script", "rename it")
    earlier, where = script.bound.setdefault(name, (what, location))
    if earlier != what:
        raise _refusal(path, node, f"{name} is also a top-level name at {where}", "rename one of the two")


def _imported_names(nodes: Sequence[ast.Import | ast.ImportFrom]) -> list[str]:
    return [alias.asname or alias.name.partition(".")[0] for node in nodes for alias in node.names]


def _bound_names(node: ast.AST) -> list[str]:
    """The names that a top-level statement binds, without those inside functions and classes."""
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
            raise _refusal(path, other, "two statements on one line cannot be separated", "give each its own")
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if "*" in imported:
            raise _refusal(path, node, "a star import hides which names it binds", "name them")
        if isinstance(node, ast.ImportFrom) and node.level:
            raise _refusal(path, node, "a relative import has no package in a script", f"write from {package}.… import")
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            raise _refusal(path, node, "a future import must be a script's first statement", "remove it")
        if (isinstance(node, ast.Import) and any(name.partition(".")[0] == package for name in imported)) or (
            isinstance(node, ast.ImportFrom) and node.module == package
        ):
            raise _refusal(path, node, "a script has no modules", f"write from {package}.MODULE import NAME")
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
            raise _refusal(path, node, f"{node.id}: on Kaggle no file is beside the script", "ship it in the weights")
        if isinstance(node, ast.Global):
            raise _refusal(path, node, "global would rebind the name in every module", "keep what changes in an object")
        if isinstance(node, ast.Name) and node.id == "__doc__":
            raise _refusal(path, node, "__doc__ would be the script's", "write the text where it is used")
        if isinstance(node, ast.Name) and node.id == "__name__" and not is_entry:
            raise _refusal(path, node, "__name__ would be '__main__' in the script", "move what runs into __main__.py")


def _refusal(path: Path, node: ast.AST, problem: str, fix: str) -> InputError:
    return InputError(f"{path}:{node.lineno}: {problem}: {fix}")
