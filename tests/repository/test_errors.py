"""Every message of a UserError is a sentence: it ends with a full stop or a question mark."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VALUE = "{}"  # where a sentence ends with a value, whose own end is not known


def endings(node: ast.expr, assigned: dict[str, list[ast.expr]]) -> Iterator[str]:
    """The text that the expression may end with; nothing where that is an argument or a call."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr(values=[*_, ast.Constant(value=str(text))]):
            yield text
        case ast.JoinedStr():
            yield VALUE
        case ast.BinOp(right=right):
            yield from endings(right, assigned)
        case ast.IfExp(body=body, orelse=orelse):
            yield from endings(body, assigned)
            yield from endings(orelse, assigned)
        case ast.Name(id=name):
            for value in assigned.get(name, []):
                yield from endings(value, {})


def assignments(function: ast.AST) -> dict[str, list[ast.expr]]:
    values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=False))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        values.setdefault(name.id, []).append(value)
    return values


def unfinished(source: str) -> list[str]:
    """Line and end of each part of a UserError that ends otherwise."""
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    problems = dict[str, None]()
    for scope in (tree, *functions):
        assigned = assignments(scope) if scope is not tree else {}
        for call in ast.walk(scope):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "UserError":
                for argument in (*call.args, *(keyword.value for keyword in call.keywords)):
                    for text in endings(argument, assigned):
                        if not text.endswith((".", "?")):
                            problems[f"{argument.lineno}: ...{text[-40:]}"] = None
    return list(problems)


def test_errors_end_with_a_full_stop() -> None:
    problems = {
        str(path.relative_to(ROOT)): lines
        for path in sorted((ROOT / "fastssl").rglob("*.py"))
        if (lines := unfinished(path.read_text(encoding="utf-8")))
    }
    assert not problems


def test_an_unfinished_error_is_seen() -> None:
    source = (
        "def f(x):\n"
        "    fix = 'Set it.' if x else 'Set it'\n"
        "    raise UserError(f'There is no {x}', fix)\n"
        "    raise UserError('It is ' + f'{x}', fix='Why?')\n"
    )
    assert unfinished(source) == ["3: ...{}", "4: ...{}", "3: ...Set it"]
