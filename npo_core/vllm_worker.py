"""The process around vLLM's engine, in vLLM's own environment: it takes model directories and prompts from a socket,
and gives token ids and log-probabilities back.

Run as a script by vLLM's interpreter, which has none of our packages and dependencies: of ours it loads `frames` alone,
by its path.
"""

from __future__ import annotations

import gc
import importlib.util
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]


def _sibling(name: str) -> Any:
    """The module in the file of this name beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


frames = _sibling("frames")


class Worker:
    """Answers requests with one engine at a time."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.adapter: Any = None
        self._adapters = 0

    def load(self, header: dict[str, Any], _: Arrays) -> tuple[dict[str, Any], Arrays]:
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
        return {}, {}

    def reload(self, header: dict[str, Any], _: Arrays) -> tuple[dict[str, Any], Arrays]:
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

    def sample(self, header: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """One completion a seed, prompt-major; a stop token belongs to the completion."""
        from vllm import SamplingParams

        rows = frames.rows_of("prompts", arrays)
        per_prompt = len(header["seeds"]) // len(rows)
        prompts = [{"prompt_token_ids": row.tolist()} for row in rows for _ in range(per_prompt)]
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
        generated = self.llm.generate(prompts, params, use_tqdm=False, lora_request=self.adapter)
        outputs = [output.outputs[0] for output in generated]
        ids = [np.array(output.token_ids, np.int32) for output in outputs]
        logprobs = [
            np.array(
                [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)], np.float32
            )
            for output in outputs
        ]
        return {}, frames.ragged("completion_ids", ids, np.int32) | frames.ragged("logprobs", logprobs, np.float32)


def main() -> None:
    """Answers requests on the inherited socket whose descriptor is the argument, until it closes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker()
    requests = {"load": worker.load, "reload": worker.reload, "sample": worker.sample}
    while True:
        try:
            header, arrays = frames.unpack(frames.receive(sock))
        except frames.DisconnectedError:
            return
        try:
            reply, given = requests[header["request"]](header, arrays)
        except Exception as error:  # the engine's own, of any kind: the other side reports it
            traceback.print_exc()
            reply, given = {"error": f"{type(error).__name__}: {error}"}, {}
        frames.send(sock, frames.pack(reply, given))


if __name__ == "__main__":
    main()
