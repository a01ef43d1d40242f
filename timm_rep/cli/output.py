"""What commands print: text that no terminal acts upon, and JSON."""
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Optional

import click

from ..core.errors import visible

if TYPE_CHECKING:
    from ..core.verify import Report

__all__ = ['print_json', 'report_content', 'say']


def say(text: Any, *, err: bool = False) -> None:
    """Print a line, or several."""
    click.echo(visible(str(text)), err=err)


def print_json(content: Any, indent: Optional[int] = 2) -> None:
    """Print plain data, dataclasses of it, and paths."""
    text = json.dumps(content, indent=indent, default=lambda part: str(part) if isinstance(part, Path) else vars(part))
    click.echo(text.replace('\x7f', '\\u007f'))  # of all that JSON spells out, this is left


def report_content(report: 'Report') -> Dict[str, Any]:
    """What a check found, as plain data."""
    parts = [dict(vars(part), relative=part.relative) for part in (report.model, *report.layers)]
    return dict(model=parts[0], layers=parts[1:], rtol=report.rtol, atol=report.atol)
