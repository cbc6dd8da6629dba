"""The pictures of a run's prompts: each file once, under its content's hash, however many rows refer to it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc

from npo_core.run_files import RunFiles
from npo_core.store import READERS, StoreError
from schemas import layout
from schemas.digest import digest_bytes


class PictureFiles(RunFiles):
    """The pictures of one run."""

    def put_pictures(self, pictures: Mapping[str, bytes]) -> None:
        """Stores pictures that are not there yet.

        Args:
            pictures: files by their SHA-256.

        Raises:
            StoreError: the store holds other bytes under a picture's name.
        """
        if not pictures:
            return
        present = set(self.store.list(layout.PICTURES))

        def put(ref: str) -> None:
            if self.store.create_bytes(layout.picture(ref), pictures[ref]) != pictures[ref]:
                raise _altered(self.uri, ref)

        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(put, sorted(pictures.keys() - present)))

    def picture(self, ref: str) -> bytes:
        """A picture's file, its hash checked.

        Raises:
            StoreError: it is missing or altered; names it.
        """
        data = self.store.read_bytes(layout.picture(ref))
        if data is None:
            raise StoreError(f"{self.uri}/{layout.picture(ref)} is missing; restore it from a copy")
        if digest_bytes(data) != ref:
            raise _altered(self.uri, ref)
        return data


def picture_refs(table: pa.Table) -> list[str]:
    """The pictures that rows of a table with `image_refs` refer to, each once, sorted."""
    return sorted(pc.list_flatten(table["image_refs"]).unique().to_pylist())


def _altered(uri: str, ref: str) -> StoreError:
    return StoreError(f"{uri}/{layout.picture(ref)} is not the picture that its name says; restore it from a copy")
