"""Which module imports which, by the sources: imports inside functions and under TYPE_CHECKING count like others."""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def read_sources(root: Path, packages: tuple[str, ...]) -> dict[str, str]:
    """Dotted name of every module of the packages -> its source; a package's own name is that of its `__init__`."""
    sources = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_init = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_init else parts)
            sources[name] = path.read_text()
    return sources


def import_graph(sources: Mapping[str, str]) -> Graph:
    """Module -> the modules among `sources` that it imports."""
    packages = {module.rpartition(".")[0] for module in sources}
    graph: Graph = {}
    for module, source in sources.items():
        package = module if module in packages else module.rpartition(".")[0]
        names = set(_imported_names(ast.parse(source), package))
        graph[module] = set()
        for name in names:
            # `from package import thing`: thing is a module of the package, or something in the package's __init__.
            target = name if name in sources else name.rpartition(".")[0]
            if target in sources and target != module:
                graph[module].add(target)
    return graph


def _imported_names(tree: ast.Module, package: str) -> Iterator[str]:
    """Full dotted names, of modules or of what is taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, package)
            for alias in node.names:
                yield f"{base}.{alias.name}"


def _absolute(node: ast.ImportFrom, package: str) -> str:
    """The module that `from ... import` names, without leading dots."""
    if not node.level:
        return node.module or ""
    parts = package.split(".")
    kept = parts[: len(parts) - node.level + 1]
    return ".".join([*kept, node.module] if node.module else kept)


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The groups of modules each of which imports, over others, every other one of its group (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for target in graph[module]:
            if target not in index:
                visit(target)
                lowest[module] = min(lowest[module], lowest[target])
            elif target in stack:
                lowest[module] = min(lowest[module], index[target])
        if lowest[module] == index[module]:
            group = set(stack[stack.index(module) :])
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(group)

    for module in graph:
        if module not in index:
            visit(module)
    return found
