"""What commands print with ``--json``."""
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict

import click

if TYPE_CHECKING:
    from ..core.verify import Report

__all__ = ['print_json', 'report_content']


def print_json(content: Any) -> None:
    """Print plain data, dataclasses of it, and paths."""
    click.echo(json.dumps(content, indent=2, default=lambda part: str(part) if isinstance(part, Path) else vars(part)))


def report_content(report: 'Report') -> Dict[str, Any]:
    """What a check found, as plain data."""
    parts = [dict(vars(part), relative=part.relative) for part in (report.model, *report.layers)]
    return dict(model=parts[0], layers=parts[1:], rtol=report.rtol, atol=report.atol)
