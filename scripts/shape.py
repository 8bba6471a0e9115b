"""Prints the shape of a package by its syntax trees: how long, how wide and how branched its functions are.

python scripts/shape.py [FOLDER]     by default fipa_jax
"""

import ast
import statistics
import sys
from pathlib import Path

BRANCHES = ast.If | ast.For | ast.While | ast.IfExp | ast.ExceptHandler


def functions(folder: Path):
    """(where, node) of every function in a folder's files."""
    for file in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{file.relative_to(folder)}:{node.lineno} {node.name}", node


def code_lines(node: ast.FunctionDef) -> int:
    """A function's lines without its docstring."""
    text = node.body[0] if ast.get_docstring(node) else None
    return node.end_lineno - node.lineno + 1 - (text.end_lineno - text.lineno + 1 if text else 0)


def branches(node: ast.FunctionDef) -> int:
    """Its ifs, loops, conditional expressions and handlers, those of functions inside it included."""
    return sum(isinstance(inner, BRANCHES) for inner in ast.walk(node))


def parameters(node: ast.FunctionDef) -> int:
    """Its named parameters."""
    return len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)


def lambdas(folder: Path) -> float:
    """Lambdas in 1000 lines."""
    texts = [file.read_text() for file in folder.rglob("*.py")]
    number = sum(isinstance(node, ast.Lambda) for text in texts for node in ast.walk(ast.parse(text)))
    return 1000 * number / sum(len(text.splitlines()) for text in texts)


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "fipa_jax")
    nodes = [node for _, node in functions(folder)]
    files = [file for file in folder.rglob("*.py") if file.name != "__init__.py"]
    print(f"{folder}: {len(files)} modules beside the packages' __init__, {len(nodes)} functions")
    for name, measure in (("lines", code_lines), ("parameters", parameters), ("branches", branches)):
        values = sorted(map(measure, nodes))
        of_hundred = [f"{share} % {values[share * len(values) // 100]}" for share in (90, 95)]
        print(f"{name:10} median {statistics.median(values):g}, {', '.join(of_hundred)}, most {values[-1]}")
    print(f"lambdas in 1000 lines: {lambdas(folder):.1f}")


if __name__ == "__main__":
    main()
