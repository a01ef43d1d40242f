"""What commands print with ``--json``."""
import dataclasses
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
    def difference(found: Any) -> Dict[str, Any]:
        return dict(dataclasses.asdict(found), relative=found.relative)

    return dict(
        model=difference(report.model),
        layers=[difference(layer) for layer in report.layers],
        rtol=report.rtol,
        atol=report.atol,
    )
