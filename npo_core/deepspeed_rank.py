"""How a rank of the DeepSpeed learner begins: `torchrun … -m npo_core.deepspeed_rank SESSION`.

It watches its launcher before anything large is imported. That takes seconds, and a launcher that is killed meanwhile
takes nobody along: torchrun's ranks are not in its process group.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

LAUNCHER = "NPO_LAUNCHER"
"""Environment variable with the launcher's process id, where it is known: the rank's parent may be another already."""
INTERVAL_S = 0.5


def end_with(launcher: int) -> None:
    """Ends this process when its parent is not the launcher, or no longer, however that ended.

    Args:
        launcher: its process id.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(INTERVAL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    end_with(int(os.environ.get(LAUNCHER, os.getppid())))
    from npo_core.deepspeed_worker import main

    main(Path(sys.argv[1]))
