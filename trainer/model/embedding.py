"""Variable patch embedding and variable aggregation, folded into one small matrix product per patch.

A patch's tokens depend on its own pixels only, and one learned query serves all positions. So the attention over
variables is a softmax over scores that are linear in the pixels, and its output is linear in (weight x pixel):
nothing of shape (variables, patches, width) ever exists. Parameters keep the names, shapes and meaning of ClimaX
(Nguyen et al. 2023, https://arxiv.org/abs/2301.10343), section 3; the folding is differentiated through.

A LayerNorm of every variable's token, as the release of 2026 has it, folds as well: with the projection's rows centred over
the width, what is left of it is a division of the pixels (and a 1) by the root of a quadratic form in them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer.model.layers import trunc_normal_


def _precise(x: Tensor) -> Tensor:
    """Tables are folded in fp32 at least, whatever the weights are held in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VariablePatchEmbedding(nn.Module):
    """One p x p patch projection a variable; `forward` gives them as tables instead of applying them."""

    def __init__(self, variables: int, patch: int, width: int, init_std: float, norm: bool) -> None:
        super().__init__()
        self.proj_weights = nn.Parameter(torch.empty(variables, width, 1, patch, patch))
        self.proj_biases = nn.Parameter(torch.zeros(variables, width))
        trunc_normal_(self.proj_weights, std=init_std)
        self.norm_weight = nn.Parameter(torch.ones(width)) if norm else None
        self.norm_bias = nn.Parameter(torch.zeros(width)) if norm else None

    def forward(self, var_embed: Tensor) -> tuple[Tensor, Tensor | None]:
        """(1, V, D) variable embedding -> the table of tokens, fp32.

        Returns:
            (V, D, p*p + 1): projection, then bias + embedding as last column; and None. With the LayerNorm (V, D, p*p + 2):
            what multiplies the normalised pixels and their 1, then the embedding; and (V, p*p + 1, p*p + 1), the form that
            gives the variance of a token.
        """
        variables, width = self.proj_biases.shape
        projection = _precise(self.proj_weights).reshape(variables, width, -1)
        bias, embed = (_precise(x)[..., None] for x in (self.proj_biases, var_embed[0]))
        if self.norm_weight is None or self.norm_bias is None:
            return torch.cat([projection, bias + embed], dim=-1), None
        whole = torch.cat([projection, bias], dim=-1)
        centred = whole - whole.mean(1, keepdim=True)
        scaled = centred * _precise(self.norm_weight)[:, None]
        return torch.cat([scaled, embed + _precise(self.norm_bias)[:, None]], dim=-1), centred.transpose(1, 2) @ centred / width


class VariableAggregation(nn.Module):
    """Multi-head attention of one query over the variables, as tables over pixels.

    State-dict names are those of `nn.MultiheadAttention`.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, query: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Fold the query (1, 1, D) and the embedding table (V, D, T) into fp32 tables.

        Returns:
            scores (H, V, T), values (H, V, T, D) and bias (D,). The key bias shifts all scores of a
            position alike and drops out of the softmax.
        """
        width, heads = query.shape[-1], self.heads
        query_weight, key_weight, value_weight = _precise(self.in_proj_weight).chunk(3)
        query_bias, _, value_bias = _precise(self.in_proj_bias).chunk(3)
        head_width = width // heads
        q = (query_weight @ _precise(query).flatten() + query_bias) * head_width**-0.5
        probe = torch.einsum("hd,hdw->hw", q.view(heads, -1), key_weight.view(heads, head_width, width))
        scores = torch.einsum("hw,vwp->hvp", probe, table)
        values = torch.einsum("hdw,vwp->hvpd", value_weight.view(heads, head_width, width), table)
        out_weight = _precise(self.out_proj.weight)
        folded = torch.einsum("hvpd,ohd->hvpo", values, out_weight.view(width, heads, head_width))
        return scores, folded, _precise(self.out_proj.bias) + out_weight @ value_bias


def normalised(pixels: Tensor, form: Tensor, eps: float = 1e-5) -> Tensor:
    """Pixels and a 1, divided by the deviation of their token over its width.

    Args:
        pixels: (B, N, V, p*p).
        form: (V, p*p + 1, p*p + 1) of `VariablePatchEmbedding`.

    Returns:
        (B, N, V, p*p + 1).
    """
    whole = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1)
    variance = (torch.einsum("bnvp,vpq->bnvq", whole, form) * whole).sum(-1, keepdim=True)
    return whole * (variance + eps).rsqrt()


def embed_and_aggregate(pixels: Tensor, scores: Tensor, values: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Patches of pixels -> one token a patch.

    Args:
        pixels: (B, N, V, T - 1) fp32; the last column of the tables belongs to none.
        scores, values, bias: the tables of `VariableAggregation`.
        dtype: of the one large product and of the result; scores and softmax stay fp32.

    Returns:
        (B, N, D) tokens.
    """
    batch, patches, variables, area = pixels.shape
    heads = scores.shape[0]
    eye = torch.eye(variables, device=pixels.device, dtype=pixels.dtype)
    per_pixel = torch.einsum("hvp,vw->vphw", scores[..., :area], eye).reshape(variables * area, heads * variables)
    logits = torch.addmm(scores[..., area].flatten(), pixels.reshape(-1, variables * area), per_pixel)
    weights = logits.view(batch * patches, heads, variables, 1).softmax(dim=2)
    terms = torch.cat([pixels, torch.ones_like(pixels[..., :1])], dim=-1).view(batch * patches, 1, variables, area + 1)
    features = (weights * terms).view(batch * patches, -1).to(dtype)
    tokens = torch.addmm(bias.to(dtype), features, values.flatten(0, 2).to(dtype))
    return tokens.view(batch, patches, -1)
