"""The command that says which files to open with other programs: files."""

from __future__ import annotations

from typing import Annotated

import typer

from flows.cli_output import Json, emit
from flows.cli_views import Run


def files(
    run: Run,
    role: Annotated[
        str, typer.Option(help="rollouts, metrics, telemetry, trajectories (guides'), samples (evaluations'), signal.")
    ] = "rollouts",
    main_line: Annotated[bool, typer.Option("--main-line", help="Only what is on the main line.")] = False,
    json: Json = False,
) -> None:
    """Lists the committed Parquet files of a role, one URI a line, for polars, DuckDB and pandas.

    A glob over the folder may also see what killed attempts left.

    Examples:

      npo files runs/demo

      npo files runs/demo --role metrics --main-line --json
    """
    from npo_core.artifacts import open_run
    from npo_core.data_files import data_files

    opened = open_run(run)
    opened.record()  # says what runs there are if there is no such one
    found = data_files(opened, role, main_line)
    if json:
        emit(json, {"files": found}, "")
    else:
        for file in found:
            print(file["uri"])
