"""Which checkpoints stay, and why: the rules one by one, and that nothing is lost that a run can still need."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from npo_core import lineage
from npo_core.controller import distances
from npo_core.inventory import Inventory
from npo_core.retention import Retention, retain
from schemas.config import Config
from schemas.decisions import DecisionRecord, MonitorState
from schemas.records import (
    CheckpointManifest,
    CheckpointRef,
    EvalManifest,
    GuideManifest,
    GuideSpec,
    Head,
    LegKind,
    LegRecord,
    RunRecord,
    SegmentManifest,
    Tombstone,
)

ORIGIN: dict[str, Any] = {"files": (), "nonce": "n", "created_at": "2026-01-01T00:00:00+00:00"}


def ref(leg_id: str, step: int) -> CheckpointRef:
    return CheckpointRef(leg_id=leg_id, step=step, digest=f"{leg_id}@{step}")


class Story:
    """A run's records, told leg by leg; segments of ten steps. Only `keep_last: 1` keeps what nothing else does."""

    def __init__(self, **sections: Any) -> None:
        values: dict[str, Any] = {
            "run": {"name": "demo", "total_steps": 400},
            "evaluation": {"every": 0},
            "retention": {"keep_last": 1},
        }
        self.config = Config.model_validate(values | sections)
        digest = "0" * 64
        self.record = RunRecord(
            run_id="demo",
            recipe={},
            model_digest=digest,
            tokenizer_digest=digest,
            prompts_digest=digest,
            verifier="v/1",
            recipe_digest=digest,
            created_at=ORIGIN["created_at"],
        )
        self.legs: list[LegRecord] = []
        self.segments: dict[str, list[SegmentManifest]] = {}
        self.checkpoints: list[CheckpointManifest] = []
        self.guides: list[GuideManifest] = []
        self.evaluations: list[EvalManifest] = []
        self.decisions: list[DecisionRecord] = []
        self.tombstones: list[Tombstone] = []
        self.head: Head | None = None
        self.leg("warm", None)
        self.saved("warm", 0)

    def leg(
        self, leg_id: str, parent: CheckpointRef | None, stop: int = 0, kind: LegKind = "main", guide: str | None = None
    ) -> None:
        """A leg that is trained to `stop`; the main line goes on in it unless it is a scout."""
        start = parent.step if parent else 0
        kind = kind if parent else "warm"
        self.legs.append(
            LegRecord(
                leg_id=leg_id,
                kind=kind,
                parent=parent,
                start=start,
                guide_id=guide,
                recipe_digest="0" * 64,
                created_at=ORIGIN["created_at"],
            )
        )
        self.segments[leg_id] = []
        self.train(leg_id, start, stop)
        if kind != "scout":
            self.head = Head(leg_id=leg_id, epoch=len(self.legs))

    def train(self, leg_id: str, start: int, stop: int) -> None:
        for first in range(start, stop, 10):
            self.saved(leg_id, first + 10)
            self.segments[leg_id].append(
                SegmentManifest(
                    leg_id=leg_id,
                    start=first,
                    stop=first + 10,
                    checkpoint=ref(leg_id, first + 10),
                    logical_digest="d",
                    tokens_policy=1,
                    **ORIGIN,
                )
            )

    def saved(self, leg_id: str, step: int) -> None:
        digest = ref(leg_id, step).digest
        self.checkpoints.append(
            CheckpointManifest(leg_id=leg_id, step=step, digest=digest, weights_digest=digest, **ORIGIN)
        )

    def guide(self, name: str, policy: CheckpointRef, start: int, stop: int) -> None:
        spec = GuideSpec(
            checkpoint=policy,
            weights_digest=policy.digest,
            start=start,
            stop=stop,
            prompt_ids=(),
            k=1,
            temperature=1.0,
            max_new_tokens=1,
            seed=0,
            tokenizer_digest="t",
            verifier="v/1",
        )
        self.guides.append(GuideManifest(guide_id=name, spec=spec, solved=0, tokens_guide=0, **ORIGIN))

    def evaluated(self, policy: CheckpointRef, accuracy: float) -> None:
        samples = self.config.evaluation.samples
        self.evaluations.append(
            EvalManifest(
                eval_id=lineage.eval_id(policy, samples, self.record),
                checkpoint=policy,
                samples_per_prompt=samples,
                accuracy=accuracy,
                tasks={},
                entropy=0.0,
                tokens=0,
                **ORIGIN,
            )
        )

    def decided(self, guide: CheckpointRef, parent: CheckpointRef | None) -> None:
        self.decisions.append(
            DecisionRecord(
                leg_id=guide.leg_id,
                step=guide.step,
                intervene=parent is not None,
                reason="r",
                source="autonpo",
                parent=parent,
                guide=guide if parent else None,
                created_at=ORIGIN["created_at"],
            )
        )

    def removed(self, *refs: CheckpointRef) -> None:
        self.tombstones.append(
            Tombstone(checkpoints=refs, files=(), reason="r", created_at=ORIGIN["created_at"], nonce="n")
        )

    def inventory(self) -> Inventory:
        return Inventory(
            record=self.record,
            head=self.head,
            legs=self.legs,
            segments=self.segments,
            checkpoints=self.checkpoints,
            guides=self.guides,
            evaluations=self.evaluations,
            decisions=self.decisions,
            signals=[],
            model=None,
            tombstones=self.tombstones,
        )

    def retained(self) -> Retention:
        return retain(self.inventory(), self.config)

    def kept(self) -> dict[tuple[str, int], str]:
        return {(kept.leg_id, kept.step): kept.why for kept in self.retained().kept}


def plain(stop: int = 100, **sections: Any) -> Story:
    """One main leg."""
    story = Story(**sections)
    story.leg("main", ref("warm", 0), stop)
    return story


def autonpo(stop: int, interventions: int = 3, lookback: int = 30) -> Story:
    settings = {"max_interventions": interventions, "lookback": lookback}
    return plain(stop, algorithm={"method": "autonpo"}, autonpo=settings)


# ---- the rules


def test_the_starting_policy_and_the_tip_stay_and_what_lies_between_can_go() -> None:
    story = plain()
    assert story.kept() == {("warm", 0): "the starting policy", ("main", 100): "the tip of the main line"}
    assert [c.step for c in story.retained().removable] == list(range(10, 100, 10))


def test_the_last_ones_of_every_leg_stay_abandoned_ones_and_scouts_too() -> None:
    story = plain(60, retention={"keep_last": 3})
    story.leg("scout", ref("main", 20), 70, kind="scout")
    story.leg("other", ref("main", 40), 50)
    assert {at for at in story.kept() if at[0] == "scout"} == {("scout", 50), ("scout", 60), ("scout", 70)}
    assert {at for at in story.kept() if at[0] == "main"} == {("main", step) for step in (20, 40, 50, 60)}


def test_a_checkpoint_without_its_segment_stays_and_does_not_count_as_the_last() -> None:
    story = plain(60)
    story.leg("scout", ref("main", 20), 40, kind="scout")
    story.saved("scout", 50)
    assert story.kept()["scout", 50] == "its segment is not committed"
    assert story.kept()["scout", 40] == "the last of its leg"  # where the scout is trained on from


def test_what_legs_start_from_stays() -> None:
    story = plain(60)
    story.leg("other", ref("main", 30), 80)
    assert story.kept()["main", 30] == "leg other starts from it"


def test_what_guides_come_from_stays_and_where_they_wait_to_be_replayed() -> None:
    story = plain(60)
    story.leg("scout", ref("main", 60), 100, kind="scout")
    story.guide("g", ref("scout", 80), 40, 70)
    assert story.kept()["scout", 80] == "guide g comes from it"
    assert story.kept()["main", 40] == "guide g is not replayed from it yet"
    story.leg("replay", ref("main", 40), 50, kind="replay", guide="g")
    assert story.kept()["main", 40] == "leg replay starts from it"


def test_where_an_intervention_of_the_configuration_starts_stays() -> None:
    future = {"interventions": [{"start": 20, "lookahead": 40}]}
    story = plain(60, algorithm={"method": "npo"}, future=future)
    assert story.kept()["main", 20] == "an intervention of the configuration starts from it"


def test_the_best_of_the_main_line_stays_and_what_is_off_it_is_not_asked() -> None:
    story = plain(60)
    story.leg("other", ref("main", 40), 80)
    for policy, accuracy in ((ref("main", 20), 0.5), (ref("main", 30), 0.5), (ref("main", 50), 0.9)):
        story.evaluated(policy, accuracy)
    assert story.kept()["main", 30] == "the main line's best, accuracy 0.500"
    assert ("main", 50) not in story.kept()


def test_what_is_to_be_evaluated_stays_until_it_is() -> None:
    story = plain(60, evaluation={"every": 20})
    assert {step for (_, step), why in story.kept().items() if why == "its evaluation is due"} == {20, 40}
    story.evaluated(ref("main", 20), 0.1)
    story.evaluated(ref("main", 60), 0.3)
    assert story.kept().get(("main", 40)) == "its evaluation is due"
    assert ("main", 20) not in story.kept()


def test_multiples_of_keep_every_stay_on_the_main_line() -> None:
    story = plain(60, retention={"keep_last": 1, "keep_every": 20})
    story.leg("other", ref("main", 30), 80)
    kept = {at for at, why in story.kept().items() if why.startswith("a multiple of 20 steps")}
    assert kept == {("main", 20), ("other", 40), ("other", 60)}


def test_autonpo_keeps_as_far_back_as_it_may_roll_back() -> None:
    story = autonpo(100, interventions=2, lookback=30)
    assert {step for leg, step in story.kept() if leg == "main"} == {70, 80, 90, 100}
    story.decided(ref("main", 90), None)  # a probe in vain costs nothing
    story.decided(ref("main", 100), ref("main", 80))
    assert {step for leg, step in story.kept() if leg == "main"} == {70, 80, 90, 100}


def test_with_its_budget_spent_autonpo_keeps_nothing_to_roll_back_to() -> None:
    story = autonpo(100, interventions=0)
    assert {step for leg, step in story.kept() if leg == "main"} == {100}


def test_a_rollback_that_is_decided_and_not_begun_keeps_both_its_ends() -> None:
    story = autonpo(100, interventions=1)
    story.decided(ref("main", 100), ref("main", 70))
    assert story.kept()["main", 70] == "the decision at step 100 rolls back to it"
    assert ("main", 80) not in story.kept()


def test_what_was_removed_is_neither_kept_nor_removed_again() -> None:
    story = plain(60)
    story.evaluated(ref("main", 20), 0.9)
    story.evaluated(ref("main", 30), 0.8)
    story.removed(ref("main", 20))
    assert ("main", 30) in story.kept()  # the best of those that are there
    seen = set(story.kept()) | {(c.leg_id, c.step) for c in story.retained().removable}
    assert ("main", 20) not in seen


def test_a_run_without_a_main_line_loses_nothing() -> None:
    story = Story()
    story.head = None
    assert story.retained().removable == ()


# ---- all rules at once


@given(
    moves=st.lists(st.tuples(st.booleans(), st.integers(1, 6)), max_size=12),
    interventions=st.integers(0, 3),
    lookback=st.integers(10, 60),
)
def test_autonpo_finds_the_same_distances_whenever_gc_was_run(
    moves: list[tuple[bool, int]], interventions: int, lookback: int
) -> None:
    # Moves: train on by so many segments; or roll back by so many, if the budget and the lookback allow it.
    story = autonpo(10, interventions, lookback)
    tip, spent = ref("main", 10), 0
    for n, (rolls_back, far) in enumerate(moves):
        inventory = story.inventory()
        saved = {step: manifest.ref for step, manifest in inventory.line.items()}
        there = {step: manifest.ref for step, manifest in inventory.line.items() if manifest in inventory.present}
        if spent < interventions:
            wanted = distances(MonitorState(), tip.step, saved, story.config.autonpo)
            assert distances(MonitorState(), tip.step, there, story.config.autonpo) == wanted
        back = tip.step - 10 * far
        if rolls_back and spent < interventions and back in saved and 10 * far <= lookback:
            spent += 1
            story.decided(tip, saved[back])
            story.removed(*(c.ref for c in story.retained().removable))
            story.guide(f"g{n}", tip, back, tip.step)
            story.leg(f"replay{n}", saved[back], tip.step, kind="replay", guide=f"g{n}")
            tip = ref(f"replay{n}", tip.step)
        else:
            story.train(tip.leg_id, tip.step, tip.step + 10 * far)
            tip = ref(tip.leg_id, tip.step + 10 * far)
        story.removed(*(c.ref for c in story.retained().removable))
        assert tip in {c.ref for c in story.inventory().present}


@given(keep_last=st.integers(1, 5), keep_every=st.sampled_from([0, 10, 20, 30]), stop=st.integers(1, 12))
def test_every_checkpoint_is_kept_or_removable_and_a_second_look_finds_nothing(
    keep_last: int, keep_every: int, stop: int
) -> None:
    story = plain(10 * stop, retention={"keep_last": keep_last, "keep_every": keep_every})
    retention = story.retained()
    assert len(retention.kept) + len(retention.removable) == len(story.checkpoints)
    assert len([kept for kept in retention.kept if kept.leg_id == "main"]) >= min(keep_last, stop)
    story.removed(*(c.ref for c in retention.removable))
    assert story.retained() == Retention(retention.kept, ())
