"""Lineage on made-up trees of legs."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npo_core import lineage
from npo_core.interfaces import NearFutureError
from schemas.decisions import DecisionRecord
from schemas.records import CheckpointRef, GuideManifest, GuideSpec, Head, LegKind, LegRecord, SegmentManifest

STRIDE = 5


def tokens_of(leg: LegRecord, step: int) -> int:
    """Some number that depends on the leg and the step."""
    return 100 + step + 7 * len(leg.leg_id)


@dataclass
class Tree:
    """Legs with as many segments of STRIDE steps as they are given."""

    legs: list[LegRecord] = field(default_factory=list)
    segments: dict[str, list[SegmentManifest]] = field(default_factory=dict)
    guides: list[GuideManifest] = field(default_factory=list)

    def grow(
        self,
        name: str,
        kind: LegKind,
        parent: tuple[str, int] | None,
        segments: int,
        guide: tuple[str, int] | None = None,
    ) -> str:
        """Adds a leg that starts at a parent's step, with the answers of a checkpoint as its guide."""
        start = parent[1] if parent else 0
        guide_id = self._guide(name, guide, start) if guide else None
        ref = _ref(*parent) if parent else None
        leg = LegRecord(
            leg_id=name, kind=kind, parent=ref, start=start, guide_id=guide_id, recipe_digest="r", created_at=name
        )
        self.legs.append(leg)
        bounds = range(start, start + segments * STRIDE, STRIDE)
        self.segments[name] = [
            SegmentManifest(
                files=(),
                nonce="",
                created_at="",
                leg_id=name,
                start=first,
                stop=first + STRIDE,
                checkpoint=_ref(name, first + STRIDE),
                logical_digest="",
                tokens_policy=sum(tokens_of(leg, step) for step in range(first, first + STRIDE)),
            )
            for first in bounds
        ]
        return name

    def line(self, tip: str) -> list[lineage.Stretch]:
        return lineage.main_line(self.legs, Head(leg_id=tip, epoch=0))

    def kept(self, line: list[lineage.Stretch]) -> list[SegmentManifest]:
        """The segments that begin on the line, in its order."""
        return [s for stretch in line for s in self.segments[stretch.leg.leg_id] if stretch.holds(s.start)]

    def tokens(self) -> dict[str, dict[int, int]]:
        return {
            leg.leg_id: {
                step: tokens_of(leg, step) for s in self.segments[leg.leg_id] for step in range(s.start, s.stop)
            }
            for leg in self.legs
        }

    def _guide(self, leg: str, checkpoint: tuple[str, int], start: int) -> str:
        spec = GuideSpec(
            checkpoint=_ref(*checkpoint),
            weights_digest="w",
            start=start,
            stop=start + STRIDE,
            prompt_ids=("p",),
            k=1,
            temperature=1,
            max_new_tokens=1,
            seed=0,
            tokenizer_digest="t",
            verifier="v",
        )
        guide_id = f"guide-of-{leg}"
        self.guides.append(
            GuideManifest(
                files=(), nonce="", created_at="", guide_id=guide_id, spec=spec, solved=1, tokens_guide=1000 + len(leg)
            )
        )
        return guide_id


def _ref(leg_id: str, step: int) -> CheckpointRef:
    return CheckpointRef(leg_id=leg_id, step=step, digest=f"{leg_id}@{step}")


def _probe(leg_id: str, step: int) -> DecisionRecord:
    return DecisionRecord(
        leg_id=leg_id,
        step=step,
        intervene=False,
        reason="",
        source="autonpo",
        tokens_probe=1000 + step,
        created_at="",
    )


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    """A warm leg and up to eleven others, each from any checkpoint of any earlier one, some with a guide."""
    tree = Tree()
    tree.grow("L0", "warm", None, 0)
    for index in range(1, draw(st.integers(2, 12))):
        checkpoints = [("L0", 0)] + [(s.leg_id, s.stop) for group in tree.segments.values() for s in group]
        kind = draw(st.sampled_from(("main", "replay", "scout")))
        guide = draw(st.sampled_from(checkpoints)) if kind == "replay" else None
        tree.grow(f"L{index}", kind, draw(st.sampled_from(checkpoints)), draw(st.integers(0, 4)), guide)
    return tree


@settings(deadline=None)  # the machine may be busy
@given(trees(), st.data())
def test_every_step_of_the_main_line_is_on_it_exactly_once(tree: Tree, data: st.DataObject) -> None:
    tip = data.draw(st.sampled_from([leg.leg_id for leg in tree.legs]))
    line = tree.line(tip)
    kept = [(s.start, s.stop) for s in tree.kept(line)]
    stop = lineage.line_stop(line, tree.segments)
    assert [step for bounds in kept for step in range(*bounds)] == list(range(stop))
    assert line[0].leg.leg_id == "L0"
    assert line[-1].leg.leg_id == tip


def closure(tree: Tree, leg_id: str, stop: int) -> set[tuple[str, int]]:
    """Steps, and guides as (guide, -1), that the checkpoint (leg, stop) depended on; straight from the definition."""
    leg = next(leg for leg in tree.legs if leg.leg_id == leg_id)
    found = {(leg_id, step) for step in range(leg.start, stop)}
    if leg.parent:
        found |= closure(tree, leg.parent.leg_id, leg.parent.step)
    for guide in tree.guides:
        if guide.guide_id == leg.guide_id:
            found |= {(guide.guide_id, -1)} | closure(tree, guide.spec.checkpoint.leg_id, guide.spec.checkpoint.step)
    return found


@settings(deadline=None)  # the machine may be busy
@given(trees(), st.data())
def test_a_step_costs_what_it_depended_on_and_nothing_twice(tree: Tree, data: st.DataObject) -> None:
    line = tree.line(data.draw(st.sampled_from([leg.leg_id for leg in tree.legs])))
    tokens = tree.tokens()
    paid = {(guide.guide_id, -1): guide.tokens_guide for guide in tree.guides}
    paid |= {(leg_id, step): count for leg_id, own in tokens.items() for step, count in own.items()}
    # A probe at the end of every segment, paid with the segment's last step.
    probes = [_probe(s.leg_id, s.stop) for group in tree.segments.values() for s in group]
    for probe in probes:
        paid[probe.leg_id, probe.step - 1] += probe.tokens_probe
    costs = lineage.line_costs(line, tree.legs, tree.guides, tokens, probes)
    assert [cost.step for cost in costs] == list(range(lineage.line_stop(line, tree.segments)))
    for cost in costs:
        behind = closure(tree, cost.leg_id, cost.step + 1)
        on_line = {(stretch.leg.leg_id, stretch.leg.guide_id) for stretch in line}
        assert cost.leg_id in {leg_id for leg_id, _ in on_line}
        assert cost.total_steps == sum(step >= 0 for _, step in behind)
        assert cost.total_tokens == sum(paid[key] for key in behind)


@settings(deadline=None)  # the machine may be busy
@given(trees(), st.data())
def test_every_token_is_counted_once(tree: Tree, data: st.DataObject) -> None:
    line = tree.line(data.draw(st.sampled_from([leg.leg_id for leg in tree.legs])))
    probes = [_probe(leg.leg_id, leg.start) for leg in tree.legs]
    counted = lineage.count_tokens(line, tree.segments, tree.guides, probes)
    everything = sum(s.tokens_policy for group in tree.segments.values() for s in group)
    assert counted.policy + counted.discarded == everything
    assert counted.policy == sum(s.tokens_policy for s in tree.kept(line))
    asked = sum(guide.tokens_guide for guide in tree.guides) + sum(probe.tokens_probe for probe in probes)
    assert counted.guide == asked


def npo_tree() -> Tree:
    """An early intervention, and then a rollback whose guide is the main line's own future."""
    tree = Tree()
    tree.grow("warm", "warm", None, 0)
    tree.grow("scout", "scout", ("warm", 0), 2)
    tree.grow("replay", "replay", ("warm", 0), 2, ("scout", 10))
    tree.grow("main", "main", ("replay", 10), 4)
    tree.grow("late", "replay", ("main", 20), 1, ("main", 30))
    tree.grow("lost", "main", ("replay", 5), 1)
    return tree


def test_a_leg_says_what_became_of_it() -> None:
    tree = npo_tree()
    line = tree.line("late")
    found = {leg.leg_id: lineage.status(leg, line, tree.segments[leg.leg_id]) for leg in tree.legs}
    assert found == {
        "warm": "main-line",
        "scout": "scout",
        "replay": "main-line",
        "main": "cut",
        "late": "head",
        "lost": "abandoned",
    }
    assert [(s.leg.leg_id, s.start, s.stop) for s in line] == [
        ("warm", 0, 0),
        ("replay", 0, 10),
        ("main", 10, 20),
        ("late", 20, None),
    ]


def test_a_guide_from_the_lines_own_future_charges_the_steps_that_were_cut_off() -> None:
    tree = npo_tree()
    steps = {
        cost.step: cost.total_steps
        for cost in lineage.line_costs(tree.line("late"), tree.legs, tree.guides, tree.tokens(), [])
    }
    assert steps[0] == 11  # the scout's ten and its own
    assert steps[19] == 30
    assert steps[20] == 41  # main's steps 20 to 29, from which the guide came


def test_no_head_is_no_line() -> None:
    tree = npo_tree()
    assert lineage.main_line(tree.legs, None) == []
    assert lineage.line_stop([], tree.segments) == 0


def test_a_broken_line_is_named() -> None:
    legs = [leg for leg in npo_tree().legs if leg.leg_id != "replay"]
    with pytest.raises(NearFutureError, match="leg replay of the main line is missing"):
        lineage.main_line(legs, Head(leg_id="main", epoch=0))
    loop = Tree()
    loop.grow("a", "main", ("b", 5), 1)
    loop.grow("b", "main", ("a", 5), 1)
    with pytest.raises(NearFutureError, match="leg a of the main line is its own ancestor"):
        loop.line("a")


def test_identities_depend_on_every_input_and_on_nothing_else() -> None:
    ids = {
        lineage.leg_id("r", _ref("a", 1), "main", 1, None),
        lineage.leg_id("s", _ref("a", 1), "main", 1, None),
        lineage.leg_id("r", _ref("a", 2), "main", 1, None),
        lineage.leg_id("r", _ref("b", 1), "main", 1, None),
        lineage.leg_id("r", None, "main", 1, None),
        lineage.leg_id("r", _ref("a", 1), "scout", 1, None),
        lineage.leg_id("r", _ref("a", 1), "main", 2, None),
        lineage.leg_id("r", _ref("a", 1), "main", 1, "g"),
    }
    assert len(ids) == 8
    assert lineage.leg_id("r", _ref("a", 1), "main", 1, None) in ids
    spec = npo_tree().guides[0].spec
    assert lineage.guide_id(spec) == lineage.guide_id(spec.model_copy())
    assert lineage.guide_id(spec) != lineage.guide_id(spec.model_copy(update={"k": 2}))


def test_a_guides_identity_is_what_it_was_before_its_younger_fields() -> None:
    spec = GuideSpec(
        checkpoint=CheckpointRef(leg_id="scout", step=10, digest="d"),
        weights_digest="w",
        start=0,
        stop=10,
        prompt_ids=("p1", "p2"),
        k=8,
        temperature=1.0,
        max_new_tokens=14,
        seed=3,
        tokenizer_digest="t",
        verifier="v/1",
    )
    assert lineage.guide_id(spec) == "925a2f7521ae", "as version 0.1.0 named it"
    others = [spec.model_copy(update=changed) for changed in ({"source": "leg"}, {"source": "both"}, {"answers": 2})]
    assert len({lineage.guide_id(other) for other in (spec, *others)}) == 4
