"""Rows of token sequences whose batches are padded to different lengths, brought to one length to be remembered."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.errors import DataError


class Padding:
    """Pads sequences on the right to `length` when rows are kept, and cuts what no row needs when they are used again.

    Parameters
    ----------
    length
        Tokens that the longest row has at most.
    token
        The padding token; everything else a token has is padded with 0, above all `attention_mask`.
    """

    def __init__(self, length: int, token: int) -> None:
        self.length = length
        self.token = token

    def pad(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Inputs with `input_ids` [rows, tokens] and all that has as many tokens, as [rows, length, ...]."""
        tokens = x["input_ids"].shape[1]
        if tokens > self.length:
            raise DataError(f"a row has {tokens} tokens, but length is {self.length}; truncate rows or raise length")
        mask = x.get("attention_mask")
        x = {**x, "attention_mask": x["input_ids"].new_ones(x["input_ids"].shape) if mask is None else mask}
        return {name: self._padded(name, part, tokens) for name, part in x.items()}

    def _padded(self, name: str, part: Tensor, tokens: int) -> Tensor:
        if part.dim() < 2 or part.shape[1] != tokens:
            return part
        sides = (0, 0) * (part.dim() - 2) + (0, self.length - tokens)
        return F.pad(part, sides, value=self.token if name == "input_ids" else 0)

    def cut(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same without the tokens behind the last one that any row attends to."""
        mask = x.get("attention_mask")
        if mask is None or mask.shape[1] != self.length:
            return x
        places = torch.arange(1, self.length + 1, device=mask.device)
        longest = max(1, int((places * (mask != 0).any(0)).max()))
        if longest == self.length:
            return x
        return {
            name: part[:, :longest] if part.dim() > 1 and part.shape[1] == self.length else part
            for name, part in x.items()
        }
