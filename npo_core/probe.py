"""AutoNPO's probe: which prompts of the mistake pool the policy is asked, so that every distance has its share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from npo_core.monitor import recent_mistakes
from npo_core.signal import Band
from npo_core.streams import philox
from schemas.decisions import Mistake


def plan_probe(
    pool: Iterable[Mistake], step: int, lookaheads: Sequence[int], count: int, seed: int
) -> tuple[list[str], list[Band]]:
    """Draws at most `count` distinct prompts, as evenly from the bands between the distances as their sizes allow.

    A prompt is in the band of the nearest distance whose B_Δ holds it, so that B_Δ is the union of the bands up to Δ.
    Drawn from the whole pool at once, the near distances would have one or two prompts.

    Args:
        step: t.
        lookaheads: the candidate distances, nearest first.
        seed: the run's; with `step` it decides the draw.

    Returns:
        The prompts, and a band for each distance, whose rows index them.
    """
    mistakes = list(pool)
    rng = philox("probe", seed, step)
    taken: set[str] = set()
    bands: list[list[str]] = []
    for lookahead in lookaheads:
        new = [m.prompt_id for m in recent_mistakes(mistakes, step, lookahead) if m.prompt_id not in taken]
        taken.update(new)
        bands.append([new[i] for i in rng.permutation(len(new))])
    shares = _shares([len(band) for band in bands], count)
    prompts = [prompt_id for band, share in zip(bands, shares, strict=True) for prompt_id in band[:share]]
    starts = [sum(shares[:n]) for n in range(len(shares))]
    return prompts, [
        Band(len(band), tuple(range(start, start + share)))
        for band, start, share in zip(bands, starts, shares, strict=True)
    ]


def _shares(sizes: Sequence[int], count: int) -> list[int]:
    """Even shares of `count`, none larger than its band; what small bands leave goes round, nearest first."""
    shares = [0] * len(sizes)
    left = min(count, sum(sizes))
    while left:
        for n, size in enumerate(sizes):
            if left and shares[n] < size:
                shares[n] += 1
                left -= 1
    return shares
