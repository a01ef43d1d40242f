"""What commands print with ``--json``."""
import dataclasses
import json
from typing import TYPE_CHECKING, Any, Dict

import click

if TYPE_CHECKING:
    from ..core.verify import Report

__all__ = ['print_json', 'report_content']


def print_json(content: Any) -> None:
    """Print plain data and dataclasses of it."""
    click.echo(json.dumps(content, indent=2, default=dataclasses.asdict))


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
