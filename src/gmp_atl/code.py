"""Which code a stage runs, as a hash: a stage is rerun when, and only when, its own code has changed."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parent


@cache
def code_hash(stage: str) -> str:
    """Twelve hexadecimal digits over every module that `gmp_atl.stages.<stage>` imports, directly or not.

    Comments, docstrings and formatting do not count: the hash is taken over the syntax tree.
    """
    modules, frontier = set(), {_PACKAGE / "stages" / f"{stage}.py"}
    while frontier:
        modules |= frontier
        frontier = {imported for module in frontier for imported in _imports(module)} - modules
    digest = hashlib.sha256()
    for module in sorted(modules):
        digest.update(f"{module.relative_to(_PACKAGE)}\n{_dump(module)}\n".encode())
    return digest.hexdigest()[:12]


class _WithoutText(ast.NodeTransformer):
    """Takes out strings that stand by themselves: docstrings, of attributes too."""

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        is_text = isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        return None if is_text else node


@cache
def _tree(module: Path) -> ast.Module:
    tree: ast.Module = _WithoutText().visit(ast.parse(module.read_text(encoding="utf-8")))
    return tree


@cache
def _dump(module: Path) -> str:
    return ast.dump(_tree(module))


@cache
def _imports(module: Path) -> frozenset[Path]:
    """Files of this package that a module imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gmp_atl":
            # A module, or what one holds; of what a package's __init__ holds, such as the version, others know nothing.
            names = [(f"{node.module}.{alias.name}", node.module or "") for alias in node.names]
            found |= {path for name, holder in names if (path := _file(name) or _file(holder))}
        elif isinstance(node, ast.Import):
            found |= {path for alias in node.names if (path := _file(alias.name))}
    return frozenset(found)


@cache
def _file(name: str) -> Path | None:
    parts = name.split(".")
    if parts[0] != "gmp_atl":
        return None
    path = _PACKAGE.joinpath(*parts[1:])
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((candidate for candidate in candidates if candidate.is_file()), None)
