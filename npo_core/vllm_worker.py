"""The process around vLLM's engine, in vLLM's own environment: it takes model directories and prompts from a socket,
and gives token ids and log-probabilities back.

Run as a script by vLLM's interpreter, which has none of our dependencies: nothing of ours may be imported here. Our
side imports the frames.

A frame is the length of a JSON header (8 bytes, big-endian), the header, and the raw bytes of the columns that the
header's `columns` describe: ragged ones, of one array a row.
"""

from __future__ import annotations

import gc
import json
import socket
import struct
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Columns = Mapping[str, Sequence[np.ndarray]]
_LENGTH = struct.Struct(">Q")


def send(sock: socket.socket, header: Mapping[str, Any], columns: Columns | None = None) -> None:
    """Writes a frame. The rows of a column have one type."""
    described, body = {}, bytearray()
    for name, rows in (columns or {}).items():
        flat = np.concatenate(rows) if rows else np.empty(0, np.int32)
        described[name] = [flat.dtype.str, [len(row) for row in rows]]
        body += flat.tobytes()
    head = json.dumps({**header, "columns": described}).encode()
    sock.sendall(_LENGTH.pack(len(head)) + head + body)


def receive(sock: socket.socket) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Reads a frame: header and columns.

    Raises:
        EOFError: the other side has closed.
    """
    (length,) = _LENGTH.unpack(_exactly(sock, _LENGTH.size))
    header = json.loads(_exactly(sock, length))
    columns = {}
    for name, (dtype, lengths) in header.pop("columns").items():
        kind = np.dtype(dtype)
        flat = np.frombuffer(_exactly(sock, sum(lengths) * kind.itemsize), kind)
        columns[name] = np.split(flat, np.cumsum(lengths)[:-1]) if lengths else []
    return header, columns


def _exactly(sock: socket.socket, count: int) -> bytes:
    body = bytearray()
    while len(body) < count:
        part = sock.recv(min(count - len(body), 1 << 20))
        if not part:
            raise EOFError("the other side has closed the socket")
        body += part
    return bytes(body)


class Worker:
    """Answers requests with one engine at a time."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.adapter: Any = None
        self._adapters = 0

    def load(self, header: dict[str, Any], _: Columns) -> tuple[dict[str, Any], Columns]:
        """A fresh engine with the weights of `model`, built by `options`."""
        import vllm
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self.llm is not None:
            self.llm = None
            gc.collect()
            cleanup_dist_env_and_memory()
        self.llm = vllm.LLM(
            model=header["model"],
            skip_tokenizer_init=True,
            # Of the model's own defaults for sampling, none may apply.
            generation_config="vllm",
            # Log-probabilities of what was sampled from: after the temperature.
            logprobs_mode="processed_logprobs",
            **header["options"],
        )
        self._take_adapter(header)
        return {"vllm": vllm.__version__}, {}

    def reload(self, header: dict[str, Any], _: Columns) -> tuple[dict[str, Any], Columns]:
        """The weights of `model` into the engine that there is. It may fail to take them without saying so: whoever
        asks has to check."""
        if "adapter" in header and self.adapter is not None:
            # Its weights are those that the engine has.
            self._take_adapter(header)
            return {}, {}
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": header["model"]})
        # What was computed under the old weights.
        self.llm.reset_prefix_cache()
        return {}, {}

    def _take_adapter(self, header: dict[str, Any]) -> None:
        """The adapter of `adapter` beside the weights, if there is one, under an identifier that none had before."""
        self.adapter = None
        if "adapter" in header:
            from vllm.lora.request import LoRARequest

            self._adapters += 1
            self.adapter = LoRARequest(f"adapter-{self._adapters}", self._adapters, header["adapter"])

    def sample(self, header: dict[str, Any], columns: Columns) -> tuple[dict[str, Any], Columns]:
        """One completion a seed, prompt-major; a stop token belongs to the completion."""
        from vllm import SamplingParams

        per_prompt = len(header["seeds"]) // len(columns["prompts"])
        prompts = [{"prompt_token_ids": row.tolist()} for row in columns["prompts"] for _ in range(per_prompt)]
        params = [
            SamplingParams(
                temperature=header["temperature"],
                max_tokens=header["max_new_tokens"],
                stop_token_ids=header["stop_ids"],
                # The stop tokens are the caller's alone.
                ignore_eos=True,
                seed=seed,
                logprobs=0,
                detokenize=False,
            )
            for seed in header["seeds"]
        ]
        outputs = [
            output.outputs[0]
            for output in self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.adapter)
        ]
        return {}, {
            "completion_ids": [np.array(output.token_ids, np.int32) for output in outputs],
            "logprobs": [
                np.array(
                    [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)],
                    np.float32,
                )
                for output in outputs
            ],
        }


def main() -> None:
    """Answers requests on the inherited socket whose descriptor is the argument, until it closes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker()
    requests = {"load": worker.load, "reload": worker.reload, "sample": worker.sample}
    while True:
        try:
            header, columns = receive(sock)
        except EOFError:
            return
        try:
            reply, rows = requests[header["request"]](header, columns)
        except Exception as error:  # the engine's own, of any kind: the other side reports it
            traceback.print_exc()
            reply, rows = {"error": f"{type(error).__name__}: {error}"}, {}
        send(sock, reply, rows)


if __name__ == "__main__":
    main()
