"""How a vision-language model of the Qwen-VL family reads prompts that show pictures, in rows padded on either side.

The parts are the model's own: its tower, its embeddings, its 3-D positions, its language model. They are put together
here, and not by its `forward`, for two reasons. A row's pictures belong to its prompt: a policy may well sample the
placeholder token, which `forward` would take for a picture that is missing. And a picture that several rows of a batch
show, as those of a group do, goes through the tower once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npo_core.interfaces import ConfigurationError
from npo_core.pictures import Picture, PicturedPrompt, pictures_of

PARTS = ("get_rope_index", "get_image_features", "language_model")


@dataclass(frozen=True)
class Places:
    """Where the tokens of padded rows are."""

    positions_3BL: Tensor
    """int64, counted over real tokens: frame, row and column. Pads get 0."""
    shown_BL: Tensor
    """bool: tokens that stand for a part of a picture."""
    next_B: Tensor
    """int64: the position that follows each row's prompt. A picture takes fewer positions than tokens."""


class Vision:
    """The reading half of a vision-language model.

    Args:
        model: a transformers model of the Qwen-VL family, say `Qwen3VLForConditionalGeneration`.

    Raises:
        ConfigurationError: it is of another kind.
    """

    def __init__(self, model: Any) -> None:
        self.base = model.base_model
        lacking = [part for part in PARTS if not hasattr(self.base, part)]
        if lacking:
            raise ConfigurationError(
                f"model.path: {type(model).__name__} sees pictures in another way than the Qwen-VL family (it has no "
                f"{', '.join(lacking)}), which is not supported; use Qwen3-VL, or a language model"
            )
        self.token = model.config.image_token_id
        self._tower = model.config.vision_config

    def blank(self) -> PicturedPrompt:
        """A prompt that shows the smallest picture there is, all zeros, for which the tower runs as for any other."""
        side = self._tower.spatial_merge_size
        values = self._tower.in_channels * self._tower.temporal_patch_size * self._tower.patch_size**2
        patches = np.zeros((side * side, values), np.float32)
        return PicturedPrompt.of(np.array([self.token]), [Picture("blank", (1, side, side), lambda: patches)])

    def hidden_states(
        self,
        prompts: Sequence[np.ndarray],
        ids_BL: Tensor,
        mask_BL: Tensor,
        places: Places,
        cache: Any = None,
    ) -> Tensor:
        """Last hidden states of padded rows, [B, L, H], differentiable.

        Args:
            prompts: the beginning of each row; what follows in it is plain text.
            ids_BL: token ids, padded on either side.
            mask_BL: 1 at real tokens.
            places: `place(prompts, mask_BL)`.
            cache: a KV cache to fill.
        """
        embeddings_BLH = self.base.get_input_embeddings()(ids_BL)
        seen: dict[str, Any] = {}
        if bool(places.shown_BL.any()):
            image_NH, deeper = self._see([picture for prompt in prompts for picture in pictures_of(prompt)], ids_BL)
            embeddings_BLH = embeddings_BLH.masked_scatter(places.shown_BL[..., None], image_NH.to(embeddings_BLH))
            if deeper:
                seen = {"visual_pos_masks": places.shown_BL, "deepstack_visual_embeds": deeper}
        # Right-padded rows need no mask under causal attention: pads come after every real token.
        attention_BL = None if cache is None else mask_BL
        return self.base.language_model(
            inputs_embeds=embeddings_BLH,
            attention_mask=attention_BL,
            position_ids=places.positions_3BL,
            past_key_values=cache,
            use_cache=cache is not None,
            **seen,
        ).last_hidden_state

    def place(self, prompts: Sequence[np.ndarray], mask_BL: Tensor) -> Places:
        """Places of rows that begin with these prompts."""
        mask = mask_BL.cpu().numpy().astype(bool)
        positions = np.zeros((3, *mask.shape), np.int64)
        shown, following = np.zeros_like(mask), np.zeros(len(prompts), np.int64)
        for i, prompt in enumerate(prompts):
            first, length = int(mask[i].argmax()), int(mask[i].sum())
            own = self._positions(prompt)
            following[i] = own.max() + 1
            answer = following[i] + np.arange(length - len(prompt))
            positions[:, i, first : first + length] = np.concatenate([own, np.tile(answer, (3, 1))], axis=1)
            if pictures_of(prompt):
                shown[i, first : first + len(prompt)] = np.asarray(prompt) == self.token
        tensors = (torch.from_numpy(values).to(mask_BL.device) for values in (positions, shown, following))
        return Places(*tensors)

    def _positions(self, prompt: np.ndarray) -> np.ndarray:
        """A prompt's own positions, int64 [3, L], by the model's rule: unpadded, so that no padding can shift them."""
        pictures = pictures_of(prompt)
        if not pictures:
            return np.tile(np.arange(len(prompt)), (3, 1))
        ids_1L = torch.from_numpy(np.asarray(prompt, np.int64))[None]
        positions_31L, _ = self.base.get_rope_index(
            input_ids=ids_1L,
            mm_token_type_ids=(ids_1L == self.token).int(),
            image_grid_thw=torch.tensor([picture.grid for picture in pictures]),
        )
        return positions_31L[:, 0].numpy()

    def _see(self, pictures: Sequence[Picture], like: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the tower makes of pictures, token by token: embeddings [N, H], and those for deeper layers."""
        distinct = {picture.ref: picture for picture in pictures}
        order = {ref: i for i, ref in enumerate(distinct)}
        patches = np.concatenate([picture.patches() for picture in distinct.values()])
        grids = torch.tensor([picture.grid for picture in distinct.values()], device=like.device)
        made = self.base.get_image_features(torch.from_numpy(patches).to(like.device), grids, return_dict=True)
        deeper = getattr(made, "deepstack_features", None) or []

        def by_token(features: Sequence[Tensor]) -> Tensor:
            return torch.cat([features[order[picture.ref]] for picture in pictures])

        return by_token(made.pooler_output), [by_token(features) for features in deeper]
