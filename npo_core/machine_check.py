"""Whether this machine has the processes, the memory and the disk that a run takes. Another one may run it: where it
has no GPU at all, nothing fails for that."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from npo_core.checks import Notes
from npo_core.estimate import (
    ITEM_BYTES,
    LearnerMemory,
    cache_bytes,
    checkpoint_bytes,
    learner_memory,
    rows_bytes,
)
from npo_core.interfaces import ConfigurationError
from npo_core.model_check import FoundModel
from npo_core.plan import Plan
from npo_core.run_checks import existing
from npo_core.store import open_store
from schemas.config import Config

GB = 1e9


@dataclass(frozen=True)
class Machine:
    """Where a run would be."""

    cores: int
    memory: int
    """Bytes of main memory."""
    gpus: int
    gpu: str | None
    """The first GPU's model."""
    gpu_memory: int
    """Its bytes."""


def this_machine() -> Machine:
    """The one that this process is on."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cores, gpus = os.cpu_count() or 1, torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        return Machine(cores, memory, 0, None, 0)
    first = torch.cuda.get_device_properties(0)
    return Machine(cores, memory, gpus, first.name, first.total_memory)


@dataclass(frozen=True)
class Memory:
    """Bytes that the run's parts hold, by arithmetic; activations, buckets and logits come on top."""

    processes: int
    """Of the learner, on all hosts together."""
    learner: LearnerMemory
    """Of each."""
    offloaded: float
    """Of these, on the CPU."""
    copy: float
    """The stage's own weights beside DeepSpeed's, on the first GPU."""
    cache: int
    """Keys and values of the rows that transformers samples at once; 0 where vLLM samples rollouts."""

    @property
    def device(self) -> float:
        """On the first GPU, vLLM's share apart."""
        return self.learner.total - self.offloaded + self.copy + self.cache


@dataclass(frozen=True)
class Storage:
    """Bytes in the store, at most but for compression."""

    start: int
    """The starting policy's weights."""
    checkpoint: int
    """One later checkpoint."""
    checkpoints: int
    """All of them, the start included, as long as `npo gc` does not run."""
    kept: int
    """Those that `npo gc` leaves at the end."""
    rows: int
    """Trajectories, metrics and telemetry."""

    @property
    def total(self) -> int:
        """Without `npo gc`."""
        return self.checkpoints + self.rows


def memory_of(config: Config, model: FoundModel, prompt: int) -> Memory | None:
    """None where the model's sizes are not known.

    Args:
        prompt: tokens of the longest prompt.
    """
    if model.shape is None or (config.model.lora is not None and model.adapters is None):
        return None
    processes = _processes(config)
    held = learner_memory(model.shape, config, processes, model.adapters)
    section, deep = config.deepspeed, config.learner.engine == "deepspeed"
    offloaded = 0.0
    if deep and section.offload_optimizer:
        offloaded += held.master + held.moments
    if deep and section.offload_param:
        offloaded += held.weights
    copy = model.shape.parameters * ITEM_BYTES[config.model.dtype] if deep else 0
    cache = 0 if "rollout" in config.vllm.samples else cache_bytes(model.shape, config, prompt)
    return Memory(processes, held, offloaded, copy, cache)


def storage_of(config: Config, model: FoundModel, plan: Plan, prompt: int) -> Storage | None:
    """None where the model's sizes are not known; see `memory_of`."""
    if model.shape is None or (config.model.lora is not None and model.adapters is None):
        return None
    # The starting weights are stored as they come.
    kind = str(getattr(model.config, "dtype", None) or "float32").removeprefix("torch.")
    start = model.shape.parameters * ITEM_BYTES.get(kind, ITEM_BYTES["float32"])
    each = checkpoint_bytes(model.shape, config, model.adapters)
    places = plan.checkpoints + plan.evaluations + sum(stage.times for stage in plan.stages if stage.kind == "guide")
    return Storage(
        start=start,
        checkpoint=each,
        checkpoints=start + (plan.checkpoints - 1) * each,
        kept=start + (plan.kept_checkpoints - 1) * each,
        rows=rows_bytes(plan.rows, prompt, config.rollout.max_new_tokens, places),
    )


def check_devices(config: Config, machine: Machine, notes: Notes) -> None:
    """GPUs and cores."""
    gpus = machine.gpus
    if not gpus or config.learner.device == "cpu":
        notes.ok(f"computes on the CPU, {machine.cores} cores" + (f", beside {gpus} GPUs" if gpus else ""))
    else:
        notes.ok(f"computes on {machine.gpu}, {gpus} of them")
    for field, value, count in _wanted(config):
        notes.at(field, value)
        if gpus and count > gpus:
            notes.fail(f"{field} {value} wants {count} GPUs, and this machine has {gpus}; lower it")
        elif not gpus and (count > 1 or field == "learner.device"):
            notes.warn(f"{field} {value} wants {count} GPU{'s' * (count > 1)}, and this machine has none")


def _wanted(config: Config) -> Iterator[tuple[str, object, int]]:
    """(field, value, GPUs on this machine) of what computes on GPUs where there are some."""
    if config.learner.device.startswith("cuda"):
        yield "learner.device", config.learner.device, int(config.learner.device.partition(":")[2] or 0) + 1
    if config.learner.engine == "deepspeed" and config.learner.device != "cpu":
        yield "deepspeed.ranks", config.deepspeed.ranks, config.deepspeed.ranks
    if config.vllm.samples and config.vllm.url is None:
        yield "vllm.tensor_parallel_size", config.vllm.tensor_parallel_size, config.vllm.tensor_parallel_size


def check_memory(config: Config, memory: Memory | None, machine: Machine, notes: Notes) -> None:
    """The learner, its copy and its cache against a GPU's memory, or the machine's."""
    if memory is None:
        notes.unchecked("the model's sizes are not known")
        return
    if not machine.gpus or config.learner.device == "cpu":
        there = machine.memory
        count = config.deepspeed.ranks if config.learner.engine == "deepspeed" else 1
        own = memory.copy + memory.cache
        said = (
            f"{count} learner process{'es' * (count > 1)} of {memory.learner.total / GB:.2f} GB and {own / GB:.2f} GB "
            f"of the stage's own, activations and logits apart; this machine has {there / GB:.1f} GB"
        )
        (notes.warn if count * memory.learner.total + own > there else notes.ok)(said)
        return
    there = machine.gpu_memory
    vllm = config.vllm.gpu_memory_utilization if config.vllm.samples and config.vllm.url is None else 0.0
    said = (
        f"the first GPU takes {memory.device / GB:.2f} GB, activations and logits apart, beside vLLM's {vllm:.0%} of "
        f"its {there / GB:.1f} GB"
    )
    if memory.device > there * (1 - vllm):
        notes.fail(
            f"{said}; raise deepspeed.ranks or zero_stage, offload, set model.lora, or lower rollout.max_rows or "
            "vllm.gpu_memory_utilization"
        )
    else:
        notes.ok(said)


def check_disk(config: Config, storage: Storage | None, notes: Notes) -> None:
    """Free space, where the store is a folder."""
    if storage is None:
        notes.unchecked("the model's sizes are not known")
        return
    store = open_store(config.run.store)
    if not store.root.startswith("file:"):
        notes.unchecked(f"{store.root} does not say how much it may hold")
        return
    folder = existing(Path(store.path))
    free = shutil.disk_usage(folder).free
    said = f"the run stores {storage.total / GB:.2f} GB at most"
    if free < storage.total:
        notes.warn(
            f"{said}, or {(storage.kept + storage.rows) / GB:.2f} GB when `npo gc` runs beside it; {folder} has "
            f"{free / GB:.2f} GB free: make room, or choose another run.store"
        )
    else:
        notes.ok(f"{said}; {folder} has {free / GB:.2f} GB free")


def _processes(config: Config) -> int:
    """Of the learner on all hosts; a hostfile that is wrong counts as this machine alone."""
    if config.learner.engine != "deepspeed":
        return 1
    machines = 1
    if config.deepspeed.hostfile is not None:
        from npo_core.launch import hosts

        try:
            machines = len(hosts(config.deepspeed))
        except ConfigurationError:
            machines = 1  # told by the check of packages
    return config.deepspeed.ranks * machines
