"""The guides of one run, and their shards while they are made."""

from __future__ import annotations

import pyarrow as pa

from npo_core import lineage, parquet
from npo_core.faults import fault_point
from npo_core.interfaces import NearFutureError
from npo_core.run_files import Environment, RunFiles, origin
from schemas import layout
from schemas.records import GuideManifest, GuideSpec, ShardManifest


class GuideFiles(RunFiles):
    """Guides and shards by their identifiers; see `RunFiles`."""

    def guide(self, guide_id: str) -> GuideManifest | None:
        """One guide."""
        return self.store.read(layout.manifest(layout.guide(guide_id)), GuideManifest)

    def require_guide(self, guide_id: str) -> GuideManifest:
        """One guide.

        Raises:
            NearFutureError: there is none; names those that there are.
        """
        found = self.guide(guide_id)
        if found is None:
            present = ", ".join(guide.guide_id for guide in self.guides()) or "none"
            raise NearFutureError(
                f"{self.uri} has no guide {guide_id} (it has: {present}); choose one that is there, or run the guide "
                "stage"
            )
        return found

    def guides(self) -> list[GuideManifest]:
        """All guides, by creation."""
        return self.manifests(layout.GUIDES, GuideManifest)

    def guide_spec(self, guide: GuideManifest) -> GuideSpec:
        """What a guide was made of, the prompts of its window included."""
        if guide.window is None:
            return guide.spec
        window = self.table(guide, "window")["prompt_id"].to_pylist()
        return guide.spec.model_copy(update={"prompt_ids": tuple(window)})

    def commit_guide(
        self, spec: GuideSpec, trajectories: pa.Table, tokens_guide: int, environment: Environment
    ) -> GuideManifest:
        """Commits the trajectories of a guide, at most `spec.answers` a prompt."""
        guide_id = lineage.guide_id(spec)
        folder = layout.guide(guide_id)
        window = pa.table({"prompt_id": pa.array(spec.prompt_ids, pa.string())}, parquet.SCHEMAS["window"])
        manifest = GuideManifest(
            files=(self.put_table(folder, "trajectories", trajectories), self.put_table(folder, "window", window)),
            guide_id=guide_id,
            spec=spec.model_copy(update={"prompt_ids": ()}),
            solved=len(trajectories["prompt_id"].unique()),
            tokens_guide=tokens_guide,
            **origin(environment),
        )
        fault_point("guide-data")
        return self.store.commit(folder, manifest)

    def shard(self, guide_id: str, shard_id: str) -> ShardManifest | None:
        """One shard of a guide."""
        return self.store.read(layout.manifest(layout.shard(guide_id, shard_id)), ShardManifest)

    def shards(self) -> list[ShardManifest]:
        """The shards of all guides, committed ones or not."""
        names = self.store.list(layout.GUIDES)
        return [shard for name in names for shard in self.manifests(layout.shards(name), ShardManifest)]

    def commit_shard(
        self, guide_id: str, spec: GuideSpec, trajectories: pa.Table, tokens_guide: int, environment: Environment
    ) -> ShardManifest:
        """Commits the trajectories of a shard; `spec` is the guide's, with the shard's prompts."""
        shard_id = lineage.shard_id(guide_id, spec.prompt_ids)
        folder = layout.shard(guide_id, shard_id)
        manifest = ShardManifest(
            files=(self.put_table(folder, "trajectories", trajectories),),
            guide_id=guide_id,
            shard_id=shard_id,
            asked=len(spec.prompt_ids),
            solved=len(trajectories["prompt_id"].unique()),
            tokens_guide=tokens_guide,
            **origin(environment),
        )
        return self.store.commit(folder, manifest)
