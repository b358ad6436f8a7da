"""The QAT twin of MultiheadAttention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hqod_ops.quant.nn.layers import QATLayer, as_leaf

PROJECTIONS = ("q", "k", "v")


class Projection(nn.Module):
    """The projection of queries, keys or values, which ``nn.MultiheadAttention`` does itself.

    Args:
        attention (nn.MultiheadAttention): keeps the weight and the bias; its names stay.
        part (str): ``"q"``, ``"k"`` or ``"v"``.
    """

    owner: nn.MultiheadAttention

    def __init__(self, attention: nn.MultiheadAttention, part: str) -> None:
        super().__init__()
        self.__dict__["owner"] = attention  # not as a part of this module
        self.part = part

    @property
    def stored(self) -> str:
        """The name of the owner's parameter that has the weight in it."""
        return "in_proj_weight" if self.owner._qkv_same_embed_dim else f"{self.part}_proj_weight"

    @property
    def weight(self) -> Tensor:
        """The rows of the weight that are this projection's."""
        weight: Tensor = getattr(self.owner, self.stored)
        return self._rows(weight) if self.owner._qkv_same_embed_dim else weight

    @property
    def bias(self) -> Tensor | None:
        """Those of the bias."""
        bias: Tensor | None = self.owner.in_proj_bias
        return None if bias is None else self._rows(bias)

    def _rows(self, value: Tensor) -> Tensor:
        count = self.owner.embed_dim
        return value.narrow(0, PROJECTIONS.index(self.part) * count, count)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class QATProjection(QATLayer, Projection):
    """A projection of fake-quantized input and weight."""

    float_type = Projection
    weight_ch_axis = 0

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.quantized_input(x), self.quantized_weight()
        with self.saving(x, weight):
            return F.linear(x, weight, self.bias)


class QATMultiheadAttention(nn.MultiheadAttention):
    """Attention of projections that quantize their input and weight, each with scales of its own.

    Scores and the weighted sum of the values are computed in float. The projections are
    ``in_proj_q``, ``in_proj_k``, ``in_proj_v`` and ``out_proj``; parameters keep their names.
    """

    in_proj_q: Projection
    in_proj_k: Projection
    in_proj_v: Projection

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(query, fx.Proxy):
            options: dict[str, Any] = {
                "key_padding_mask": key_padding_mask,
                "need_weights": need_weights,
                "attn_mask": attn_mask,
                "average_attn_weights": average_attn_weights,
                "is_causal": is_causal,
            }
            both: tuple[Tensor, Tensor | None] = as_leaf(self, query, key, value, **options)
            return both
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask: expected the causal mask that is_causal hints at")
        projected = self.in_proj_q(query), self.in_proj_k(key), self.in_proj_v(value)
        batched = query.dim() == 3
        if not batched:
            projected = tuple(x.unsqueeze(0) for x in projected)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            projected = tuple(x.transpose(0, 1) for x in projected)
        output, weights = self._attend(projected, key_padding_mask, attn_mask, need_weights)
        output = self.out_proj(output)
        if not batched:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return output, weights

    def _attend(
        self,
        projected: tuple[Tensor, ...],
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Values [N, L, E] that queries [N, L, E] find, and, if needed, weights [N, H, L, S]."""
        query, key, value = projected
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(len(key), -1, -1)], dim=1)
            value = torch.cat([value, self.bias_v.expand(len(value), -1, -1)], dim=1)
            more += 1
        query, key, value = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x in (query, key, value)
        )
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
            more += 1
        mask = None
        if attn_mask is not None:
            mask = F.pad(_additive(attn_mask, query), (0, more))
            if mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = F.pad(_additive(key_padding_mask, query), (0, more))[:, None, None]
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (query * math.sqrt(1 / self.head_dim)) @ key.transpose(-2, -1)
            weights = (scores if mask is None else scores + mask).softmax(dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            output = weights @ value
        else:
            output = F.scaled_dot_product_attention(query, key, value, mask, dropout)
        return output.transpose(1, 2).flatten(2), weights


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask that is added to the scores; of a bool one, True is left out."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.to(like.dtype)
