"""The commands that start a learner's ranks, on this machine or on several."""

from __future__ import annotations

import sys
from pathlib import Path

from npo_core.deepspeed_rank import LAUNCHER
from npo_core.interfaces import ConfigurationError
from schemas.deepspeed import DeepSpeedSection

RANK = "npo_core.deepspeed_rank"


def launch_command(section: DeepSpeedSection, session: Path) -> list[str]:
    """torchrun on this machine; with a hostfile DeepSpeed's launcher, which starts every host's ranks over ssh.

    Args:
        section: ranks and hostfile.
        session: what a rank is given.

    Raises:
        ConfigurationError: the hostfile is missing or wrong.
    """
    if section.hostfile is None:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # The shell becomes torchrun and keeps its process id, by which a rank knows whether torchrun is still there.
        shell = ["/bin/sh", "-c", f'export {LAUNCHER}=$$; exec "$@"', "sh"]
        return [*shell, *torchrun, f"--nproc_per_node={section.ranks}", "--module", RANK, str(session)]
    first = hosts(section)[0]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", f"--hostfile={_path(section)}"]
    options = [f"--num_gpus={section.ranks}", f"--master_addr={first}", "--no_local_rank", "--module"]
    return [*launcher, *options, RANK, str(session)]


def hosts(section: DeepSpeedSection) -> list[str]:
    """The hosts of the hostfile, this machine first.

    Raises:
        ConfigurationError: it cannot be read, a line is wrong, or a host is named twice or has fewer slots than
            `deepspeed.ranks`.
    """
    path, named = _path(section), f"deepspeed.hostfile {section.hostfile}"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigurationError(
            f"{named} cannot be read: {error.strerror}: {path}; write lines `HOST slots=N` there"
        ) from error
    found = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not words[1].removeprefix("slots=").isdigit() or not words[1].startswith("slots="):
            raise ConfigurationError(f"{named}, line {number}: {line!r} is not `HOST slots=N`")
        if int(words[1].removeprefix("slots=")) < section.ranks:
            raise ConfigurationError(
                f"{named}, line {number}: {words[0]} has {words[1]}, fewer than deepspeed.ranks "
                f"{section.ranks}; lower deepspeed.ranks"
            )
        if words[0] in found:
            raise ConfigurationError(
                f"{named}, line {number}: {words[0]} is named twice; give each host one line, with all its slots"
            )
        found.append(words[0])
    if not found:
        raise ConfigurationError(f"{named} names no host; write lines `HOST slots=N`")
    return found


def _path(section: DeepSpeedSection) -> Path:
    """Of the hostfile. DeepSpeed's launcher would train on this machine alone if it did not find it, `~` and all."""
    return Path(section.hostfile or "").expanduser().absolute()
