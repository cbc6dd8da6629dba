"""The command `npo`."""

from __future__ import annotations

import atexit
import logging
import os
import sys
from typing import Annotated

import typer

from flows import cli_stages, cli_store, cli_views
from flows.cli_dry_run import show_dry_run
from flows.cli_output import Json, emit
from flows.local_server import prefect_api
from npo_core.interfaces import ConfigurationError, NearFutureError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""
UNPRINTED = 120
"""Exit code if the output could not be written, as Python has it."""

app = typer.Typer(
    name="npo",
    help="Near-Future Policy Optimization: train ahead, roll back, learn from your own future.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a value, say -s learner.learning_rate=3e-4. Repeatable."),
]


@app.command()
def run(
    config: Annotated[str, typer.Argument(help="Configuration file (YAML).")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check everything, print stages, tokens, storage and memory, and begin nothing."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Runs a whole pipeline in this process. Again: resumes. With more steps: extends.

    Examples:

      npo run deploy/configs/testbed-npo.yaml

      npo run deploy/configs/testbed-npo.yaml -s run.name=mine -s run.total_steps=200 --json

      npo run deploy/configs/qwen3-8b.yaml --dry-run
    """
    if dry_run:
        show_dry_run(config, overrides or [], json)
        return
    from npo_core.config_file import load_config

    loaded = load_config(config, overrides or [])
    with prefect_api():
        from flows.pipeline import autonpo, grpo, npo

        summary = {"grpo": grpo, "npo": npo, "autonpo": autonpo}[loaded.algorithm.method](loaded)
    before, after = summary.before, summary.after
    scores = {} if after is None else after.tasks
    tasks = {task: {"before": before.tasks[task].accuracy, "after": score.accuracy} for task, score in scores.items()}
    if after is None:
        shown = (
            f"{summary.run}: AutoNPO warned at step {summary.head_step}, and the run waits for "
            f"{loaded.autonpo.executes} to act (autonpo.executes); the same command then goes on"
        )
    else:
        shown = (
            f"{summary.run}: {summary.head_step} steps, "
            f"held-out accuracy {before.accuracy:.3f} → {after.accuracy:.3f}\nreport: {summary.report}"
        )
    emit(
        json,
        {
            "run": summary.run,
            "status": summary.status,
            "head_step": summary.head_step,
            "eval": {"before": before.accuracy, "after": after and after.accuracy, "tasks": tasks},
            "report": summary.report,
        },
        shown,
    )


app.add_typer(cli_stages.app, name="stage")
cli_views.register(app)
cli_store.register(app)


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 the work failed, 2 bad usage or configuration. A user's error is one line."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("npo").setLevel(logging.INFO)
    code = [1]  # of an error that nobody foresaw
    atexit.register(_leave, code)
    code[0] = _run()
    sys.exit(code[0])


def _run() -> int:
    """Runs the command to its exit code."""
    try:
        app()  # ends in SystemExit; bad usage is told by typer, with exit code 2
    except SystemExit as end:
        if end.code == INTERRUPTED:
            return fail("interrupted; the same command resumes it", INTERRUPTED)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        return fail("interrupted; the same command resumes it", INTERRUPTED)
    except ConfigurationError as error:
        return fail(error, 2)
    except (NearFutureError, FloatingPointError) as error:
        return fail(error, 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        remedy = "lower rollout.max_rows, learner.micro_batch_tokens or learner.chunk_tokens and run again"
        return fail(f"the GPU's memory is full: {remedy}; nothing that was committed is lost", 1)
    except OSError as error:
        return fail(f"{error}; mend this and run again, nothing that was committed is lost", 1)
    return 0


def _leave(code: list[int]) -> None:
    """Ends the process after all other exit handlers, for it was registered before them, and before the destructors of
    native libraries: now and then one of theirs aborts, and a command that has done its work would end with SIGABRT."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code[0] = UNPRINTED
    os._exit(code[0])


def fail(error: object, code: int) -> int:
    """Says what went wrong on stderr."""
    print(f"npo: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
