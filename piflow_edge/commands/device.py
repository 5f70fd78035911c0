"""Commands about this machine: `doctor`."""

from pathlib import Path

import click

from .options import JSON, emit, engine_options, engine_settings, show


@click.command()
@click.option("--bundle", type=click.Path(path_type=Path), help="Also check that this bundle runs here.")
@engine_options
@JSON
def doctor(bundle, as_json, **engine):
    """What this machine has, what is missing, and the command that mends it. Exit status 1 on a problem.

    \b
    Example:
      piflow-edge doctor --bundle demo/bundles/digits-nfe1
    """
    from piflow_edge.doctor import PROBLEM, diagnose

    findings = diagnose(bundle, **engine_settings(**engine))
    healthy = all(finding.status != PROBLEM for finding in findings)
    if as_json:
        emit({"healthy": healthy, "findings": [vars(finding) for finding in findings]})
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table("", "", "found", "to mend it")
        for finding in findings:
            # As text: a path or a message may hold brackets, which rich would read as markup.
            cells = (finding.status, finding.subject, finding.detail, finding.fix or "")
            table.add_row(*map(Text, cells))
        show(table)
    if not healthy:
        raise click.exceptions.Exit(1)
