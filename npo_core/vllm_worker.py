"""The process around vLLM's engine, in vLLM's own environment: it takes model directories and prompts from a socket,
and gives token ids and log-probabilities back.

Pictures come cut into patches, and prompts with a placeholder for every token of theirs: vLLM's own processor would cut
them again, and perhaps otherwise. Hence its engine is asked, and not its front end.

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
        # Those that were shown for the next sample, by their references.
        self._pictures: dict[str, Any] = {}

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
            # Only texts that end a completion need one, and models that see.
            skip_tokenizer_init="tokenizer" not in header["options"],
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
        # What was computed under the old weights, of tokens and of pictures.
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_encoder_cache()
        return {}, {}

    def show(self, header: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """A picture of the next sample's prompts: its `ref`, its `grid`, and its patches."""
        import torch
        from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems

        made = {"pixel_values": torch.from_numpy(arrays["patches"]), "image_grid_thw": torch.tensor([header["grid"]])}
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor([len(arrays["patches"])])),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        (self._pictures[header["ref"]],) = MultiModalKwargsItems.from_hf_inputs(made, fields)["image"]
        return {}, {}

    def _take_adapter(self, header: dict[str, Any]) -> None:
        """The adapter of `adapter` beside the weights, if there is one, under an identifier that none had before."""
        self.adapter = None
        if "adapter" in header:
            from vllm.lora.request import LoRARequest

            self._adapters += 1
            self.adapter = LoRARequest(f"adapter-{self._adapters}", self._adapters, header["adapter"])

    def sample(self, header: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
        """One completion a seed, prompt-major; a stop token, or the tokens of a stop text, belong to the
        completion.

        Each prompt shows the pictures that `shown` names; all must have been shown before, and are forgotten after.
        """
        from vllm import SamplingParams

        rows = frames.rows_of("prompts", arrays)
        per_prompt = len(header["seeds"]) // len(rows)
        try:
            inputs = [self._input(row.tolist(), refs) for row, refs in zip(rows, header["shown"], strict=True)]
        finally:
            self._pictures = {}
        # A request changes what it is given.
        prompts = [dict(one) for one in inputs for _ in range(per_prompt)]
        params = [
            SamplingParams(
                temperature=header["temperature"],
                max_tokens=header["max_new_tokens"],
                stop_token_ids=header["stop_ids"],
                # The stop tokens are the caller's alone.
                ignore_eos=True,
                seed=seed,
                logprobs=0,
                stop=header["stop"],
                detokenize=bool(header["stop"]),
                skip_special_tokens=False,
            )
            for seed in header["seeds"]
        ]
        outputs = self._complete(prompts, params)
        ids = [np.array(output.token_ids, np.int32) for output in outputs]
        logprobs = [
            np.array(
                [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)], np.float32
            )
            for output in outputs
        ]
        return {}, frames.ragged("completion_ids", ids, np.int32) | frames.ragged("logprobs", logprobs, np.float32)

    def _input(self, ids: list[int], refs: list[str]) -> Any:
        """What the engine takes for a prompt that shows these pictures."""
        from vllm.inputs.engine import mm_input, tokens_input

        if not refs:
            return tokens_input(ids)
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        config = self.llm.model_config.hf_config
        items = [self._pictures[ref] for ref in refs]
        merged = config.vision_config.spatial_merge_size**2
        lengths = [len(item["pixel_values"].data) // merged for item in items]
        ranges = [PlaceholderRange(*place) for place in places(ids, config.image_token_id, lengths)]
        shown = MultiModalKwargsItems({"image": items})
        return mm_input(ids, shown, {"image": refs}, {"image": ranges})

    def _complete(self, prompts: list[Any], params: list[Any]) -> list[Any]:
        """The engine's completions of its inputs, in their order."""
        from vllm.sampling_params import RequestOutputKind

        engine, asked = self.llm.llm_engine, []
        finished: dict[str, Any] = {}
        try:
            for number, (prompt, its) in enumerate(zip(prompts, params, strict=True)):
                its.output_kind = RequestOutputKind.FINAL_ONLY
                asked.append(engine.add_request(str(number), prompt, its, lora_request=self.adapter))
            while engine.has_unfinished_requests():
                finished |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
        except Exception:
            # None may be left to the next sample.
            engine.abort_request(asked, internal=True)
            raise
        return [finished[str(number)] for number in range(len(prompts))]


def places(ids: list[int], token: int, lengths: list[int]) -> list[tuple[int, int]]:
    """(first token, tokens) of each picture in a prompt.

    Args:
        ids: of the prompt.
        token: the placeholder.
        lengths: tokens of its pictures, in their order.

    Raises:
        ValueError: the placeholders are not as many, or a picture's do not follow each other.
    """
    found = [place for place, at in enumerate(ids) if at == token]
    if len(found) != sum(lengths):
        raise ValueError(f"a prompt has {len(found)} placeholders for pictures of {sum(lengths)} tokens")
    ranges, taken = [], 0
    for length in lengths:
        first, last = found[taken], found[taken + length - 1]
        if last - first + 1 != length:
            raise ValueError(f"the {length} placeholders of a picture do not follow each other")
        ranges.append((first, length))
        taken += length
    return ranges


def main() -> None:
    """Answers requests on the inherited socket whose descriptor is the argument, until it closes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    worker = Worker()
    requests = {"load": worker.load, "reload": worker.reload, "show": worker.show, "sample": worker.sample}
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
