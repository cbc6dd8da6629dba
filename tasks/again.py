"""Does a stage's committed work again, beside it, and says whether it came out the same."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prefect import task
from prefect.artifacts import create_table_artifact

from npo_core.interfaces import NearFutureError
from tasks.artifacts import key
from tasks.options import OPTIONS
from tasks.workspaces import standing_in, workspace

if TYPE_CHECKING:
    from npo_core.redo import Comparison, Made

logger = logging.getLogger("npo")


def do_again(run: str, made: Made, stage: Callable[[], object]) -> None:
    """Runs a stage on the run as it was before the stage made this, and compares. Nothing in the store changes.

    Raises:
        NearFutureError: something came out otherwise; names it, and how far apart weights are.
    """
    from npo_core.redo import beside, compare

    committed = workspace(run).run
    with tempfile.TemporaryDirectory(dir=workspace(run).scratch) as scratch:
        again = beside(committed, made, Path(scratch))
        with standing_in(run, again):
            stage()
        found = compare(committed, again, made)
    tell(run, found)


@task(name="compare", **OPTIONS)
def tell(run: str, found: Sequence[Comparison]) -> None:
    """Shows what was compared; fails if anything differs."""
    rows = [{"artifact": one.artifact, "again": "; ".join(one.differences) or "the same"} for one in found]
    run_id = workspace(run).run.run_id
    create_table_artifact(rows, key=key("again", run_id), description=f"{run_id}: committed work, done again")
    different = [row for row, one in zip(rows, found, strict=True) if one.differences]
    if not different:
        logger.info("computed again and equal: %s", ", ".join(one.artifact for one in found))
        return
    told = "; ".join(f"{row['artifact']} ({row['again']})" for row in different)
    raise NearFutureError(
        f"{len(different)} of {len(found)} artifacts of {run} came out otherwise than committed: {told}. What is "
        "committed stays. Bits are equal on one machine, with the same versions and threads: compare the manifests' "
        "`environment`, and run `npo verify`"
    )
