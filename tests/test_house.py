"""The house is kept: small files, small functions, and no module that needs its neighbour's privates."""
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ('timm_rep', 'train_scripts', 'examples')
FILES = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in sorted((ROOT / folder).rglob('*.py'))]
MAX_LINES_OF_FILE = 450
MAX_LINES_OF_BODY = 60


def has_docstring(node):
    first = node.body[0]
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def long_functions(source):
    """Name and lines of the functions whose body, without the docstring, is too long."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if has_docstring(node) else node.body
            lines = node.end_lineno - body[0].lineno + 1 if body else 0
            if lines > MAX_LINES_OF_BODY:
                yield node.name, lines


def private_imports(source):
    """What a module imports of another one of ours that begins with an underscore."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or '').startswith('timm_rep')):
            yield from (alias.name for alias in node.names if alias.name[0] == '_' and alias.name[:2] != '__')


def problems(file):
    source = (ROOT / file).read_text()
    lines = len(source.splitlines())
    if lines > MAX_LINES_OF_FILE:
        yield f'{lines} lines'
    yield from (f'{name}() has {lines} lines' for name, lines in long_functions(source))
    yield from (f'imports {name}' for name in private_imports(source))


def test_files_and_functions_are_small_and_need_no_privates_of_others():
    found = {file: list(problems(file)) for file in FILES}
    assert not {file: said for file, said in found.items() if said}


def test_checks_find_what_they_look_for():
    body = '    x = 1\n' * (MAX_LINES_OF_BODY + 1)
    assert dict(long_functions(f'def f():\n    """Say."""\n{body}')) == dict(f=MAX_LINES_OF_BODY + 1)
    assert not dict(long_functions(f'def f():\n    """Say."""\n{body[10:]}'))
    assert list(private_imports('from .other import _helper, helper, __version__\nfrom torch import _C')) == ['_helper']
    assert {'timm_rep/__init__.py', 'timm_rep/core/layers/dbb.py', 'examples/own_loop.py'} <= set(FILES)
