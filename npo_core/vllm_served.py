"""A `vllm serve` of the user's: it holds one checkpoint, and samples from it by HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from npo_core.interfaces import NearFutureError, SamplingParams
from npo_core.pictures import pictures_of

REQUESTS_AT_ONCE = 64
TIMEOUT_S = 600.0
T = TypeVar("T")


class VllmServed:
    """Asks for one completion a request: a row's seed is its own.

    Args:
        url: the server's address, without `/v1`.
    """

    sees = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._model: str | None = None

    @property
    def started(self) -> bool:
        """Whether it has answered."""
        return self._model is not None

    def fresh(self, model_dir: Path) -> None:
        """Finds out what it serves; it cannot be given these weights, and the probe tells whether it has them."""
        self._model = self._ask("/v1/models", lambda reply: str(reply["data"][0]["id"]))

    def reload(self, model_dir: Path) -> None:
        """As `fresh`."""
        self.fresh(model_dir)

    def sample(
        self, prompts: Sequence[np.ndarray], params: SamplingParams, seeds: Sequence[int]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """(completion ids, log-probabilities) of one completion a seed, prompt-major.

        Raises:
            NearFutureError: a prompt shows pictures; the server answers otherwise than it should, or not.
        """
        if any(pictures_of(prompt) for prompt in prompts):
            raise NearFutureError(
                f"vllm.url {self.url} is given token ids alone, and a prompt shows pictures; leave vllm.url out, so "
                "that vLLM runs in a process of ours"
            )
        per_prompt = len(seeds) // len(prompts)
        rows = [prompt.tolist() for prompt in prompts for _ in range(per_prompt)]
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            completed = list(pool.map(lambda row, seed: self._complete(row, seed, params), rows, seeds))
        return [ids for ids, _ in completed], [logprobs for _, logprobs in completed]

    def close(self) -> None:
        """Nothing of it is ours."""
        self._model = None

    def _complete(self, prompt: list[int], seed: int, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
        request = {
            "model": self._model,
            "prompt": prompt,
            "temperature": params.temperature,
            "max_tokens": params.max_new_tokens,
            "stop_token_ids": list(params.stop_ids),
            "stop": [] if params.stops is None else list(params.stops.texts),
            "skip_special_tokens": False,
            "seed": seed,
            "logprobs": 0,
            "return_token_ids": True,
            # Spares the server the text.
            "return_tokens_as_token_ids": True,
            # The stop tokens are ours alone, and the server's defaults none of our sampling.
            "ignore_eos": True,
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
        }
        return self._ask("/v1/completions", _completion, request)

    def _ask(self, path: str, read: Callable[[Any], T], body: dict[str, Any] | None = None) -> T:
        """What `read` finds in the reply."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                reply = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            raise self._refused(path, f"answers {error.code}: {said}") from error
        except urllib.error.URLError as error:
            raise self._refused(path, f"does not answer ({error.reason})") from error
        except (OSError, HTTPException, ValueError) as error:
            raise self._refused(path, f"does not answer ({str(error) or type(error).__name__})") from error
        try:
            return read(json.loads(reply))
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            shown = reply[:200].decode(errors="replace")
            raise self._refused(
                path, f"answers what vLLM would not ({type(error).__name__}: {error}): {shown}"
            ) from error

    def _refused(self, path: str, reason: str) -> NearFutureError:
        return NearFutureError(f"vllm.url {self.url}{path} {reason}; start `vllm serve` there, or leave vllm.url out")


def _completion(reply: Any) -> tuple[np.ndarray, np.ndarray]:
    """(ids, log-probabilities) of the one completion of a reply."""
    choice = reply["choices"][0]
    ids = np.array(choice["token_ids"], np.int32)
    logprobs = np.array(choice["logprobs"]["token_logprobs"], np.float32)
    if ids.ndim != 1 or ids.shape != logprobs.shape or not len(ids):
        raise ValueError(f"{ids.shape} token ids and {logprobs.shape} log-probabilities")
    return ids, logprobs
