"""The optimizer and the shape of an update."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from schemas.section import Section


class LearnerSection(Section):
    """The optimizer and the shape of an update."""

    engine: Literal["torch", "deepspeed"] = "torch"
    """`torch`: in the segment's process. `deepspeed`: in processes of its own, as the section `deepspeed` says."""
    learning_rate: float = Field(1e-4, gt=0, le=1)
    """AdamW's peak learning rate."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment."""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; the learning rate is constant after them."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Largest global L2 norm of the gradient; it is scaled down to this."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimizer updates on each step's batch (PPO epochs). With 1, the ratios of own rollouts are exactly 1."""
    micro_batch_tokens: int = Field(16384, ge=1)
    """Most padded tokens of one forward and backward pass. Does not change the result beyond rounding."""
    chunk_tokens: int = Field(1024, ge=1)
    """Tokens whose logits exist at one time."""
    chunk_vocab: int = Field(4096, ge=1)
    """Vocabulary entries whose logits exist at one time."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    threads: int = Field(1, ge=1)
    """CPU threads of torch. Bit-identity after a resume holds for one number of threads."""
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """`auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`."""
