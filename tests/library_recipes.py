"""The recipes of docs/libraries.md, to run them as they stand there."""
import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / 'docs' / 'libraries.md'


def recipes(heading):
    """The blocks of Python in a section of the page."""
    section, = re.findall(rf'^## {re.escape(heading)}\n(.*?)(?=^## |\Z)', PAGE.read_text(), re.M | re.S)
    return re.findall(r'```python\n(.*?)```', section, re.S)


def run(heading, index=0, **names):
    """Run one block with these names given; returns the names that it leaves."""
    exec(compile(recipes(heading)[index], f'{PAGE.name}: {heading}', 'exec'), names)
    return names
