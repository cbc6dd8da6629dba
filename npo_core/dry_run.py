"""Everything about a run that can be checked and computed before it begins. Nothing is written, no weights are read."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from npo_core.checks import Check, Notes
from npo_core.config_file import Draft
from npo_core.machine_check import (
    Machine,
    Memory,
    Storage,
    check_devices,
    check_disk,
    check_memory,
    memory_of,
    storage_of,
)
from npo_core.model_check import check_model
from npo_core.plan import Plan, Sizes, make_plan
from npo_core.run_checks import check_context, check_data, check_packages, check_pictures, check_store, check_verifier


@dataclass(frozen=True)
class DryRun:
    """What a dry run finds."""

    run: str | None
    """STORE/NAME; None: the section run is wrong."""
    checks: tuple[Check, ...]
    plan: Plan | None
    """None: the configuration is wrong, or there are no prompts."""
    memory: Memory | None
    storage: Storage | None

    @property
    def faults(self) -> list[Check]:
        """What has to be mended."""
        return [check for check in self.checks if check.status == "failed"]

    def as_json(self) -> dict[str, Any]:
        """For scripts; sizes are in bytes."""
        plan, memory, storage = self.plan, self.memory, self.storage
        return {
            "run": self.run,
            "dry_run": True,
            "ok": not self.faults,
            "checks": [asdict(check) for check in self.checks],
            "plan": plan
            and {
                **asdict(plan),
                "checkpoints": plan.checkpoints,
                "trained_steps": plan.trained_steps,
                "rows": plan.rows,
            },
            "tokens": plan and plan.tokens,
            "storage": storage and {**asdict(storage), "total": storage.total},
            "memory": memory and {**asdict(memory), "device": memory.device},
        }


def dry_run(draft: Draft, machine: Machine) -> DryRun:
    """Makes every check whose sections are right, and plans the run if the whole configuration is.

    Args:
        machine: whose GPUs and memory count.
    """
    config, notes = draft.config, Notes(draft.wrong)
    with notes.about("configuration", None, None):
        for field, said in draft.faults:
            notes.at(field, None)
            notes.fail(said)
        if not draft.faults:
            notes.ok("every field is known, and the sections agree")
    model = data = verifier = longest = None
    if notes.readable("model", "model"):
        with notes.about("model", "model.path", config.model.path):
            model = check_model(config, notes)
    if notes.readable("data", "data", "rollout", "chat"):
        with notes.about("data", "data.source", config.data.source):
            data = check_data(config, model, notes)
    if data is not None and data.pictured and notes.readable("pictures", "model", "data", "vllm", "learner"):
        with notes.about("pictures", "data.source", config.data.source):
            check_pictures(config, model, data, notes)
    if notes.readable("context", "model", "data", "chat", "rollout", "vllm"):
        with notes.about("context", "rollout.max_new_tokens", config.rollout.max_new_tokens):
            longest = check_context(config, model, data, notes)
    if notes.readable("verifier", "verifier", "data"):
        with notes.about("verifier", "verifier.kind", config.verifier.kind):
            verifier = check_verifier(config, data, notes)
    if notes.readable("packages", "learner", "deepspeed", "vllm", "sharding", "model", "run"):
        with notes.about("packages", "learner.engine", config.learner.engine):
            check_packages(config, notes)
    if notes.readable("store", "run"):
        with notes.about("store", "run.store", config.run.store):
            check_store(config, verifier, not draft.wrong, notes)
    if notes.readable("devices", "learner", "deepspeed", "vllm"):
        with notes.about("devices", "learner.device", config.learner.device):
            check_devices(config, machine, notes)
    plan = memory = storage = None
    if not draft.faults and data is not None:
        plan = make_plan(config, Sizes(len(data.train), len(data.held_out)))
    if plan is not None:
        # Without a tokenizer a prompt counts as nothing.
        memory = None if model is None else memory_of(config, model, longest or 0)
        storage = None if model is None else storage_of(config, model, plan, longest or 0)
        with notes.about("memory", "model.path", config.model.path):
            check_memory(config, memory, machine, notes)
        with notes.about("disk", "run.store", config.run.store):
            check_disk(config, storage, notes)
    run = None if "run" in draft.wrong else f"{config.run.store.rstrip('/')}/{config.run.name}"
    return DryRun(run, tuple(notes.checks), plan, memory, storage)
