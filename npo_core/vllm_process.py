"""vLLM's engine in a process of its own: started under a supervisor, asked over a socket, stopped by us."""

from __future__ import annotations

import contextvars
import json
import logging
import os
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npo_core import frames
from npo_core.interfaces import ADAPTER, ConfigurationError, NearFutureError, SamplingParams
from npo_core.pictures import PROCESSOR_FILES, pictures_of
from npo_core.supervised import GRACE_S, Supervised
from schemas.vllm import VllmSection

logger = logging.getLogger("npo")

WORKER = Path(__file__).with_name("vllm_worker.py")
ENVIRONMENT = {
    # The engine in the worker itself: nothing is left when it ends.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Its warnings are about its own configuration, a hundred lines an engine.
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    # Ours would hide vLLM's own packages.
    "PYTHONPATH": "",
}
VISIBLE = "CUDA_VISIBLE_DEVICES"
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""
LAST_LINES = 20
"""Lines of its output that are told when it dies."""


class VllmProcess:
    """Starts with the first engine that is asked for.

    Args:
        settings: the section `vllm`.
        dtype: type of the weights.
        device: the trainer's, as torch has it: `cpu`, `cuda` or `cuda:N`; vLLM takes the same.
        tokenizer: directory of the tokenizer, which only texts that end a completion need, and models that see, with
            their processor's files.
    """

    sees = True

    def __init__(self, settings: VllmSection, dtype: str, device: str, tokenizer: Path | None = None) -> None:
        self.settings, self.dtype, self.device, self.tokenizer = settings, dtype, device, tokenizer
        self._process: Supervised | None = None
        self._socket: socket.socket | None = None
        self._loaded = False
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._forwarding: threading.Thread | None = None

    @property
    def started(self) -> bool:
        """Whether there is an engine."""
        return self._loaded

    def fresh(self, model_dir: Path) -> None:
        """A fresh engine with the weights of a model directory."""
        if self._socket is None:
            self._start()
        self._loaded = False
        with tempfile.TemporaryDirectory(prefix="near-future-") as scratch:
            self._ask(
                {
                    "request": "load",
                    "model": str(self._complete(model_dir, Path(scratch)) if _sees(model_dir) else model_dir),
                    "options": self._options(model_dir),
                    **self._adapter(model_dir),
                }
            )
        self._loaded = True

    def reload(self, model_dir: Path) -> None:
        """Gives the engine other weights in place; whether it took them has to be checked."""
        self._ask({"request": "reload", "model": str(model_dir), **self._adapter(model_dir)})

    def sample(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, seeds: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(completion ids, log-probabilities) of one completion a seed, prompt-major."""
        pictures = {picture.ref: picture for prompt in prompts for picture in pictures_of(prompt)}
        for ref, picture in pictures.items():
            # One by one: all of a batch, cut, may take gigabytes.
            self._ask({"request": "show", "ref": ref, "grid": picture.grid}, {"patches": picture.patches()})
        request = {
            "request": "sample",
            "temperature": params.temperature,
            "max_new_tokens": params.max_new_tokens,
            "stop_ids": list(params.stop_ids),
            "stop": [] if params.stops is None else list(params.stops.texts),
            "seeds": list(seeds),
            "shown": [[picture.ref for picture in pictures_of(prompt)] for prompt in prompts],
        }
        _, arrays = self._ask(request, frames.ragged("prompts", prompts, np.int32))
        return frames.rows_of("completion_ids", arrays), frames.rows_of("logprobs", arrays)

    def close(self) -> None:
        """Ends the process with all its children."""
        if self._socket:
            self._socket.close()
        if self._process:
            self._process.close()
        self._socket = self._process = None
        self._loaded = False

    def _complete(self, model_dir: Path, folder: Path) -> Path:
        """Links a model's files, and those of its processor and tokenizer, which vLLM looks for beside them, into a
        folder.

        Raises:
            NearFutureError: we were not told where these are.
        """
        if self.tokenizer is None:
            raise NearFutureError("vLLM needs the tokenizer and the image processor of a model that sees pictures")
        names = {*PROCESSOR_FILES, "chat_template.jinja"}
        others = [path for path in self.tokenizer.iterdir() if path.name in names or path.name.startswith("tokenizer")]
        for path in {path.name: path for path in (*others, *model_dir.iterdir())}.values():
            (folder / path.name).symlink_to(path.absolute())
        return folder

    @staticmethod
    def _adapter(model_dir: Path) -> dict[str, str]:
        """Where the adapter lies that a model directory may hold."""
        folder = model_dir / ADAPTER
        return {"adapter": str(folder)} if folder.exists() else {}

    def _options(self, model_dir: Path) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "dtype": self.dtype,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            "tensor_parallel_size": settings.tensor_parallel_size,
            "enforce_eager": settings.enforce_eager,
        }
        if (adapter := model_dir / ADAPTER / "adapter_config.json").exists():
            rank = json.loads(adapter.read_text())["r"]
            # vLLM allocates for one of a few ranks.
            options |= {"enable_lora": True, "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank)}
        if self.tokenizer is not None:
            options["tokenizer"] = str(self.tokenizer)
        if _sees(model_dir):
            # Pictures come cut, once each, and their values are those that the tower reads.
            options |= {"mm_processor_cache_gb": 0, "mm_device_do_normalize": False}
            options["limit_mm_per_prompt"] = {"video": 0}
        if settings.max_model_len is not None:
            options["max_model_len"] = settings.max_model_len
        if settings.tensor_parallel_size == 1:
            options["distributed_executor_backend"] = "uni"
        return options

    def _start(self) -> None:
        python = interpreter(self.settings)
        gpus = visible_devices(self.device, self.settings.tensor_parallel_size, os.environ)
        ours, theirs = socket.socketpair()
        with theirs:
            # -P: the directory of the script is no place to import from.
            self._process = Supervised(
                [str(python), "-P", str(WORKER), str(theirs.fileno())],
                ENVIRONMENT | gpus,
                pass_fds=[theirs.fileno()],
            )
        self._socket = ours
        # In this context, so that Prefect knows whose lines they are.
        context = contextvars.copy_context()
        self._said.clear()
        self._forwarding = threading.Thread(target=context.run, args=(self._forward, self._process), daemon=True)
        self._forwarding.start()

    def _forward(self, process: Supervised) -> None:
        for line in process.output:
            text = line.decode(errors="replace").rstrip()
            if text:
                self._said.append(text)
                logger.info("vllm: %s", text)

    def _ask(
        self, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        assert self._socket is not None
        try:
            frames.send(self._socket, frames.pack(header, arrays))
            reply, given = frames.unpack(frames.receive(self._socket))
        except frames.DisconnectedError as error:
            self.close()
            if self._forwarding:
                # Its last words may still be in the pipe.
                self._forwarding.join(GRACE_S)
            said = "\n".join(self._said)
            raise NearFutureError(
                f"vLLM's process ended while it was asked to {header['request']} ({error}); run again, and if memory "
                f"is short lower vllm.gpu_memory_utilization or vllm.max_model_len. It said last:\n{said}"
            ) from error
        if "error" in reply:
            raise NearFutureError(
                f"vLLM could not {header['request']}: {reply['error']}; its lines above say more, the section vllm "
                "holds its options"
            )
        return reply, given


def _sees(model_dir: Path) -> bool:
    """Whether a model directory holds a model that sees pictures."""
    config = model_dir / "config.json"
    return config.exists() and json.loads(config.read_text()).get("vision_config") is not None


def visible_devices(device: str, count: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What makes a child take this device and those after it: a program that knows of no choice takes the first that
    it sees.

    Args:
        device: `cpu`, which changes nothing; `cuda`, the first that we see; `cuda:N`.
        count: how many.
        environment: ours, which may hide devices or name them in another order.

    Raises:
        ConfigurationError: our environment shows fewer.
    """
    if not device.startswith("cuda"):
        return {}
    first = int(device.partition(":")[2] or 0)
    wanted = range(first, first + count)
    if VISIBLE not in environment:
        return {VISIBLE: ",".join(map(str, wanted))}
    seen = environment[VISIBLE].split(",")
    if wanted.stop > len(seen):
        raise ConfigurationError(
            f"vLLM takes vllm.tensor_parallel_size {count} GPUs, from learner.device {device} on, but {VISIBLE} "
            f"{environment[VISIBLE]} shows {len(seen)}; show more, or choose another device or fewer"
        )
    return {VISIBLE: ",".join(seen[first : wanted.stop])}


def interpreter(settings: VllmSection) -> Path:
    """Of vLLM's environment.

    Raises:
        ConfigurationError: it is not there.
    """
    # Not resolved: a virtual environment's interpreter is a link, and knows by it where its packages are.
    python = Path(settings.python).expanduser().absolute()
    if not python.exists():
        raise ConfigurationError(
            f"vllm.python {python} is not there; `make setup-vllm` makes .venv-vllm, or name the interpreter of an "
            "environment that has vLLM"
        )
    return python
