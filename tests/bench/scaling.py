"""The tables of deploy/SCALING.md: python -m tests.bench.scaling. Arithmetic alone; nothing is measured."""

from __future__ import annotations

from npo_core.durations import Hardware, files_s, sampling_s, scoring_s, update_s
from npo_core.estimate import ITEM_BYTES, checkpoint_bytes, learner_memory, tokens_a_step
from npo_core.known_models import known_model
from npo_core.model_shape import ModelShape, model_shape
from schemas.config import Config
from tests.bench.output import markdown

GB = 1e9
GPUS = 8
PROMPTS = 128
"""A step's prompts; the number is ours."""
PROMPT_TOKENS = COMPLETION_TOKENS = 4096
VLLM_SHARE = 0.4
SEGMENT_STEPS = 10
HELD_OUT = 192


def qwen3_vl_8b() -> ModelShape:
    """Qwen3-VL-8B's sizes."""
    return model_shape(known_model("Qwen/Qwen3-VL-8B-Instruct").to_dict())


def config(engine: str, stage: int) -> Config:
    """The paper's rollouts under one learner."""
    return Config.model_validate(
        {
            "run": {"name": "scaling"},
            "model": {"dtype": "bfloat16"},
            "rollout": {"group_size": 8, "prompts_per_step": PROMPTS, "max_new_tokens": COMPLETION_TOKENS},
            "learner": {"engine": engine},
            "deepspeed": {"ranks": GPUS, "zero_stage": stage},
        }
    )


def learners(shape: ModelShape) -> str:
    """One row a learner."""
    rows = []
    for engine, stage in (("torch", 2), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)):
        settings = config(engine, stage)
        held = learner_memory(shape, settings, 1 if engine == "torch" else GPUS)
        parts = (held.weights, held.gradients, held.master, held.moments, held.total, checkpoint_bytes(shape, settings))
        name = "torch, one GPU" if engine == "torch" else f"DeepSpeed, ZeRO {stage}, {GPUS} GPUs"
        rows.append((name, *(f"{part / GB:.1f}" for part in parts)))
    return markdown(
        ("learner, GB a GPU", "weights", "gradients", "master", "moments", "together", "a checkpoint in the store"),
        rows,
    )


def sizes(shape: ModelShape) -> str:
    """Of the model, its cache and a step."""
    token = shape.kv_bytes_a_token(ITEM_BYTES["bfloat16"])
    row = token * (PROMPT_TOKENS + COMPLETION_TOKENS)
    batch = PROMPTS * 8
    return markdown(
        ("quantity", "value"),
        [
            ("parameters", f"{shape.parameters:,}"),
            ("of these the vision tower", f"{shape.vision_parameters:,}"),
            ("KV cache of a token", f"{token / 1024:.0f} KiB"),
            ("KV cache of a row of 4096 + 4096 tokens", f"{row / GB:.2f} GB"),
            (f"KV cache of a step's {batch} rows at once", f"{batch * row / GB:,.0f} GB"),
            (f"generated tokens of a step of {PROMPTS} prompts × 8, at most", f"{tokens_a_step(config('torch', 2)):,}"),
        ],
    )


def durations(shape: ModelShape) -> str:
    """Of a step's parts, and of the stages that are made of them, on 8 × H200."""
    h200 = Hardware()
    batch = PROMPTS * 8
    length = PROMPT_TOKENS + COMPLETION_TOKENS
    weights = shape.parameters * ITEM_BYTES["bfloat16"]
    sampling = sampling_s(shape, h200, batch, PROMPT_TOKENS, COMPLETION_TOKENS, VLLM_SHARE)
    scoring = scoring_s(shape, h200, batch * length)
    update = update_s(shape, h200, batch * length)
    handing = files_s(h200, weights, passes=4)
    checkpoint = files_s(h200, checkpoint_bytes(shape, config("deepspeed", 3)), passes=2)
    step = sampling + scoring + update + handing + checkpoint / SEGMENT_STEPS
    evaluation = HELD_OUT * 4 / batch * (sampling + scoring)
    seconds = [
        (f"sampling {batch} rows (vLLM, all GPUs)", sampling),
        ("their entropies (the segment's own forward, one GPU)", scoring),
        ("the update (DeepSpeed, all GPUs)", update),
        ("new weights through files: DeepSpeed to the segment, the segment to vLLM", handing),
        (f"a checkpoint, each {SEGMENT_STEPS} steps: to disk and to the store", checkpoint),
    ]
    hours = [
        ("a step", step),
        ("future leg of Δ = 20 steps", 20 * step),
        ("its guide: 8 answers to each prompt of 20 steps", 20 * (sampling + scoring)),
        ("replay of 20 steps", 20 * step),
        (f"an evaluation: 4 answers to each of {HELD_OUT} prompts", evaluation),
        ("a main line of 200 steps", 200 * step),
    ]
    parts = markdown(("part of a step", "seconds at most"), [(name, f"{s:,.0f}") for name, s in seconds])
    stages = markdown(("stage", "hours at most"), [(name, f"{s / 3600:,.2f}") for name, s in hours])
    return f"{parts}\n\n{stages}"


def tables() -> str:
    """All of the page's."""
    shape = qwen3_vl_8b()
    return f"{sizes(shape)}\n\n{learners(shape)}\n\n{durations(shape)}"


if __name__ == "__main__":
    print(tables())
