"""Our loss, gradient and metrics equal those of TRL's own code, on the same tensors and the same tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from npo_core.logprobs import linear_logprobs
from npo_core.losses import LossInputs, LossSums, token_losses, token_weights
from schemas.algorithm import AlgorithmSection

VOCAB, ROWS, PROMPT, COMPLETION, MAX_NEW_TOKENS = 23, 8, 4, 7, 9
TEMPERATURE = 0.8
AGGREGATIONS = {"grpo": "seq-mean-token-mean", "dapo": "token-mean", "dr_grpo": "seq-sum-norm"}


def trainer(tmp_path: Path, loss_type: str, beta: float) -> Any:
    """TRL's trainer as its users make it, about a random Qwen3 in float64 on the CPU."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    vocab = {f"t{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="t0")), eos_token="t1", pad_token="t0"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCAB, tie_word_embeddings=True, **sizes, **heads)).double()
    if beta > 0:  # TRL loads its reference policy from the place that the model came from.
        model.save_pretrained(tmp_path / "model")
        model = Qwen3ForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    with torch.no_grad():  # Logits of a fresh model are flat; peaks make ratios that clip.
        model.get_input_embeddings().weight.mul_(30)
    args = GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        per_device_train_batch_size=ROWS,
        num_generations=4,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        loss_type=loss_type,
        beta=beta,
        use_bias_correction_kl=False,  # TRL's default is DeepSeek-V3.2's variant; ours is GRPO's own k3.
        epsilon=0.2,
        epsilon_high=0.28,
    )
    prompts = Dataset.from_dict({"prompt": ["t2 t3"] * ROWS})

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [0.0] * len(completions)

    made = GRPOTrainer(model, reward, args, prompts, processing_class=tokenizer)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


def make_batch(model: Qwen3ForCausalLM) -> dict[str, Tensor]:
    """What TRL's `_compute_loss` reads: two groups of four rows of unequal lengths, float64; the old policy is far
    enough away for both bounds to clip."""
    generator = torch.Generator().manual_seed(1)
    lengths_B = torch.tensor([7, 1, 5, 3, 2, 7, 6, 4])
    mask_BT = torch.arange(COMPLETION) < lengths_B[:, None]
    completion_BT = torch.randint(2, VOCAB, (ROWS, COMPLETION), generator=generator) * mask_BT
    prompt_BL = torch.randint(2, VOCAB, (ROWS, PROMPT), generator=generator)
    with torch.no_grad():
        logps_BT = policy_logps(model, prompt_BL, completion_BT)
    noise = 0.5 * torch.randn(2, ROWS, COMPLETION, generator=generator, dtype=torch.float64)
    return {
        "prompt_ids": prompt_BL,
        "prompt_mask": torch.ones_like(prompt_BL),
        "completion_ids": completion_BT,
        "completion_mask": mask_BT.long(),
        "advantages": torch.tensor([1.5, -0.5, -0.5, -0.5, 0.9, 0.8, -0.8, -0.9], dtype=torch.float64),
        "old_per_token_logps": logps_BT + noise[0],
        "ref_per_token_logps": logps_BT + noise[1],
        "num_items_in_batch": mask_BT.sum(),
    }


def policy_logps(model: Qwen3ForCausalLM, prompt_BL: Tensor, completion_BT: Tensor) -> Tensor:
    """Log-probabilities of the completions through our chunked head."""
    hidden_BLH = model.base_model(torch.cat([prompt_BL, completion_BT], dim=1), use_cache=False).last_hidden_state
    hidden_NH = hidden_BLH[:, PROMPT - 1 : -1].reshape(-1, hidden_BLH.shape[-1])
    logps_N, _ = linear_logprobs(hidden_NH, model.lm_head.weight, completion_BT.reshape(-1), TEMPERATURE, 10, 9)
    return logps_N.view(completion_BT.shape)


def backward_by_ours(
    batch: dict[str, Tensor], loss_type: str, beta: float, logps: Callable[[slice], Tensor]
) -> tuple[float, dict[str, float]]:
    """Loss and metrics by our code, in two micro-batches."""
    algorithm = AlgorithmSection(aggregation=AGGREGATIONS[loss_type], clip_low=0.2, clip_high=0.28, kl_beta=beta)
    mask_BT = batch["completion_mask"].bool()
    weight_B = token_weights(mask_BT.sum(1), algorithm.aggregation, MAX_NEW_TOKENS)
    total, sums = 0.0, LossSums()
    for rows in (slice(0, 3), slice(3, ROWS)):
        logps_BT = logps(rows)
        losses = token_losses(
            LossInputs(
                step=0,
                logps_BT=logps_BT,
                old_logps_BT=batch["old_per_token_logps"][rows],
                mask_BT=mask_BT[rows],
                advantages_B=batch["advantages"][rows],
                guide_B=torch.zeros(len(logps_BT), dtype=torch.bool),
                guide_logps_BT=torch.zeros_like(logps_BT),
                ref_logps_BT=batch["ref_per_token_logps"][rows],
            ),
            algorithm,
        )
        loss = losses.weighted_sum(weight_B[rows])
        loss.backward()
        total, sums = total + loss.item(), sums + losses.sums
    return total, sums.metrics(beta)


def assert_metrics_equal(metrics: dict[str, float], theirs: Any, beta: float) -> None:
    assert metrics["clip_ratio/low_mean"] > 0.05, "the batch must clip low"
    assert metrics["clip_ratio/high_mean"] > 0.05, "the batch must clip high"
    assert ("kl" in metrics) == (beta > 0)
    for name, value in metrics.items():
        assert value == pytest.approx(theirs._metrics["train"][name][0], rel=1e-5), name


@pytest.mark.parametrize("beta", [0.0, 0.05])
@pytest.mark.parametrize("loss_type", list(AGGREGATIONS))
def test_loss_of_given_logprobs_equals_trl_in_float64(tmp_path: Path, loss_type: str, beta: float) -> None:
    theirs = trainer(tmp_path, loss_type, beta)
    batch = make_batch(theirs.model)
    logps_BT = policy_logps(theirs.model, batch["prompt_ids"], batch["completion_ids"]).detach().requires_grad_()
    # Only the forward pass is replaced (TRL's head computes in float32); the loss code is TRL's.
    theirs._get_per_token_logps_and_entropies = lambda *_, **__: (logps_BT, torch.zeros_like(logps_BT), None)

    loss = theirs._compute_loss(theirs.model, batch)
    (expected_BT,) = torch.autograd.grad(loss, logps_BT)
    total, metrics = backward_by_ours(batch, loss_type, beta, lambda rows: logps_BT[rows])

    assert total == pytest.approx(loss.item(), rel=1e-12)
    torch.testing.assert_close(logps_BT.grad, expected_BT, rtol=1e-12, atol=1e-15)
    assert_metrics_equal(metrics, theirs, beta)


@pytest.mark.parametrize("loss_type", list(AGGREGATIONS))
def test_parameter_gradients_of_a_model_equal_trl(tmp_path: Path, loss_type: str) -> None:
    theirs, beta = trainer(tmp_path, loss_type, 0.05), 0.05
    model = theirs.model
    batch = make_batch(model)

    loss = theirs._compute_loss(model, batch)
    loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    total, metrics = backward_by_ours(
        batch,
        loss_type,
        beta,
        lambda rows: policy_logps(model, batch["prompt_ids"][rows], batch["completion_ids"][rows]),
    )

    # TRL's head computes in float32 whatever the model's type.
    assert total == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        scale = expected[name].abs().max().item()
        assert scale > 0, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-5 * scale)
    assert_metrics_equal(metrics, theirs, beta)
