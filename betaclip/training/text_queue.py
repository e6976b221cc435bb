"""Texts of earlier updates, kept as further negatives: the cross-batch memory of arXiv 1912.06798."""

from typing import Any

import torch
from torch import Tensor

from betaclip.kernels.precision import unit_rows
from betaclip.process_group import ProcessGroup


class TextQueue:
    """The last ``size`` texts over all ranks, newest first; each rank holds its share of them.

    Embeddings are constants, as the model was when it encoded them. A batch's padded texts, and texts that are not
    finite, are not kept. Nothing here waits for the device: the tensors always have their full size.

    texts: (share, D) unit rows. valid: (share,) bool, False where there is no text yet. ids: (share,) int64, equal for
    equal texts.
    """

    def __init__(self, size: int, group: ProcessGroup) -> None:
        self.size, self.group, self._share = size, group, len(group.shard_range(size))
        self.texts = self.valid = self.ids = torch.empty(0)

    def given(self, like: Tensor, with_ids: bool = False) -> dict[str, Tensor]:
        """The arguments of a loss whose text embeddings are ``like`` (..., D)."""
        if self.texts.dim() == 1:
            none = torch.empty(0, dtype=torch.int64, device=like.device)
            self._set(like.new_empty(0, like.shape[-1]), none.bool(), none)
        arguments = {"extra_texts": self.texts, "extra_mask": self.valid}
        return arguments | {"extra_text_ids": self.ids} if with_ids else arguments

    def add(self, texts: Tensor, mask: Tensor, ids: Tensor) -> None:
        """Put texts (B, K, D) with their ids (B, K), where mask (B, K) is True, before the others; the oldest leave."""
        rows = unit_rows(texts.detach().flatten(0, 1)).to(self.texts.dtype)
        valid = mask.flatten() & rows.isfinite().all(1)
        new, old = (rows, valid, ids.flatten()), (self.texts, self.valid, self.ids)
        self._set(*map(torch.cat, zip(new, old, strict=True)))

    def state(self) -> dict[str, Any]:
        """The texts of all ranks, for a checkpoint; a collective."""
        return {name: self.group.gather_rows(getattr(self, name)) for name in ("texts", "valid", "ids")}

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """This rank's share of the texts of a :meth:`state`, whatever the sizes were and the number of ranks."""
        if state["texts"].dim() == 1:  # saved before the first update
            return
        own = self.group.shard_range(len(state["texts"]))
        self._set(*(state[name][own.start : own.stop].to(device) for name in ("texts", "valid", "ids")))

    def _set(self, texts: Tensor, valid: Tensor, ids: Tensor) -> None:
        """Keep the first valid texts, up to this rank's share, and fill that up."""
        order = torch.argsort(~valid, stable=True)[: self._share]
        missing = self._share - len(order)
        self.texts = torch.cat((texts[order], texts.new_zeros(missing, texts.shape[1])))
        self.valid = torch.cat((valid[order], valid.new_zeros(missing)))
        self.ids = torch.cat((ids[order], ids.new_full((missing,), -1)))
