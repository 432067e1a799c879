"""Attention with the elevation bias out of parts that flash kernels compute."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DIAGONAL = 1024  # largest square that the forward pass computes with an explicit bias
DIAGONAL_BACKWARD = 256  # smaller: alpha's gradient needs the scores of the square, too
FLASH_WIDTH_MULTIPLE = 8  # of the head's width: GPUs need it, to CPUs it makes no difference
FLASH_WIDTH_LIMIT = 256
QKV = tuple[Tensor, ...]  # q, k and v, (B, n, H, d) each


def climb(z_query: Tensor, z_key: Tensor) -> Tensor:
    """(B, n), (B, m) -> (B, n, m) how far up each key is."""
    return (z_key[:, None, :] - z_query[:, :, None]).clamp_min(0)


def inverse(permutation: Tensor) -> Tensor:
    """(B, N) permutations of 0 .. N-1 -> the inverse of each."""
    places = torch.arange(permutation.shape[1], device=permutation.device).expand_as(permutation)
    return torch.empty_like(permutation).scatter_(1, permutation, places)


class Halves(torch.autograd.Function):
    """The lower half of the sorted tokens looks up at the upper half, with a bias that the keys carry, and the upper half looks
    down without one; then the same inside either half, until squares are left that are small enough for the formula."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        z = (z - z.mean(dim=1, keepdim=True)).to(slope.dtype)  # only differences matter; smaller numbers round less
        squares, halves = _cut(qkv.shape[1], DIAGONAL)
        parts = [_flash(qkv[:, s].unbind(2), bias=(-slope * climb(z[:, s], z[:, s]))[:, None]) for s in squares]
        out, lse = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        out = out.to(slope.dtype)
        for low, high in halves:
            (q_low, k_low, v_low), (q_high, k_high, v_high) = qkv[:, low].unbind(2), qkv[:, high].unbind(2)
            _merge(out[:, high], lse[:, high], *_flash((q_high, k_low, v_low)))
            up, up_lse = _flash((q_low, k_high, v_high), bias=-slope * z[:, None, None, high])
            _merge(out[:, low], lse[:, low], up, up_lse + slope * z[:, low, None])
        out = out.to(qkv.dtype)
        ctx.save_for_backward(qkv, z, slope, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        qkv, z, slope, out, lse = ctx.saved_tensors
        grad, width, scale = grads[0].contiguous(), qkv.shape[-1], qkv.shape[-1] ** -0.5
        squares, halves = _cut(qkv.shape[1], DIAGONAL_BACKWARD)
        grad_qkv, grad_slope = torch.empty_like(qkv, dtype=slope.dtype), torch.zeros_like(slope)
        for s in squares:
            square = _square_backward(grad[:, s], qkv[:, s], z[:, s], slope, out[:, s], lse[:, s])
            grad_qkv[:, s], grad_slope = square[0], grad_slope + square[1]
        # Two more dimensions, each zero on the other side: their gradients are the sums of dS over keys and over queries.
        pad = (0, 2 + -(width + 2) % FLASH_WIDTH_MULTIPLE)
        wide, wide_grad, wide_out = F.pad(qkv, pad), F.pad(grad, pad), F.pad(out, pad)
        wide[:, :, 0, :, width], wide[:, :, 1, :, width + 1] = 1, 1
        for low, high in halves:
            looking_down = qkv[:, high, 0], qkv[:, low, 1], qkv[:, low, 2]
            down = _flash_backward(grad[:, high], looking_down, out[:, high], lse[:, high], scale)
            looking_up = wide[:, low, 0], wide[:, high, 1], wide[:, high, 2]
            shifted, bias = lse[:, low] - slope * z[:, low, None], -slope * z[:, None, None, high]
            up = _flash_backward(wide_grad[:, low], looking_up, wide_out[:, low], shifted, scale, bias=bias)
            grad_qkv[:, high, 0] += down[0]
            grad_qkv[:, low, 1] += down[1]
            grad_qkv[:, low, 2] += down[2]
            grad_qkv[:, low, 0] += up[0][..., :width]
            grad_qkv[:, high, 1] += up[1][..., :width]
            grad_qkv[:, high, 2] += up[2][..., :width]
            over_keys = up[0][..., width + 1].sum(-1, dtype=slope.dtype) / scale
            over_queries = up[1][..., width].sum(-1, dtype=slope.dtype) / scale
            grad_slope = grad_slope + (over_keys * z[:, low]).sum() - (over_queries * z[:, high]).sum()
        return grad_qkv.to(qkv.dtype), None, grad_slope


def _cut(tokens: int, square: int) -> tuple[list[slice], list[tuple[slice, slice]]]:
    """Tokens -> (squares on the diagonal, pairs of neighbouring halves), together every pair of tokens once."""
    squares = [slice(start, min(start + square, tokens)) for start in range(0, tokens, square)]
    halves = []
    runs = [squares]
    while runs:
        run = runs.pop()
        if len(run) > 1:
            low, high = run[: len(run) // 2], run[len(run) // 2 :]
            halves.append((slice(low[0].start, low[-1].stop), slice(high[0].start, high[-1].stop)))
            runs += [low, high]
    return squares, halves


def _square_backward(grad: Tensor, qkv: Tensor, z: Tensor, slope: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a square for qkv (B, n, 3, H, d) and for the slope, from the formula itself."""
    scale, up = qkv.shape[-1] ** -0.5, climb(z, z)
    q, k, v = (part.transpose(1, 2).to(slope.dtype) for part in qkv.unbind(2))
    grad, out = grad.transpose(1, 2).to(slope.dtype), out.transpose(1, 2).to(slope.dtype)
    shift = (slope * up)[:, None] + lse.transpose(1, 2)[..., None]
    weights = (q @ k.transpose(-1, -2)).mul_(scale).sub_(shift).exp_()
    grad_scores = (grad @ v.transpose(-1, -2)).sub_((grad * out).sum(-1, keepdim=True)).mul_(weights)
    grad_slope = -(grad_scores.sum(1) * up).sum()
    grad_q, grad_k = (grad_scores @ k) * scale, (grad_scores.transpose(-1, -2) @ q) * scale
    return torch.stack([grad_q, grad_k, weights.transpose(-1, -2) @ grad], dim=2).permute(0, 3, 2, 1, 4), grad_slope


class Triangles(torch.autograd.Function):
    """Of sorted tokens, keys at or before the query are a causal attention; those after it are one with all reversed."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        z = (z - z.mean(dim=1, keepdim=True)).to(slope.dtype)
        width = qkv.shape[-1]
        out, lse = _flash(qkv.unbind(2), causal=True)
        up, up_lse = _flash(_reversed(qkv, z, slope), causal=True, scale=width**-0.5)
        out = out.to(slope.dtype)
        _merge(out[:, :-1], lse[:, :-1], up.flip(1)[..., :width], up_lse.flip(1) + slope * z[:, :-1, None])
        out = out.to(qkv.dtype)
        ctx.save_for_backward(qkv, z, slope, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        qkv, z, slope, out, lse = ctx.saved_tensors
        width, scale = qkv.shape[-1], qkv.shape[-1] ** -0.5
        down = _flash_backward(grads[0], qkv.unbind(2), out, lse, scale, causal=True)
        high = _reversed(qkv, z, slope)
        pad = (0, high[0].shape[-1] - width)
        wide_grad, wide_out = (F.pad(x.flip(1)[:, 1:], pad) for x in (grads[0], out))
        shifted = (lse - slope * z[..., None]).flip(1)[:, 1:]
        up = [x.flip(1) for x in _flash_backward(wide_grad, high, wide_out, shifted, scale, causal=True)]
        grad_qkv = torch.stack(down, dim=2)
        grad_qkv[:, :-1, 0] += up[0][..., :width]
        grad_qkv[:, 1:, 1] += up[1][..., :width]
        grad_qkv[:, 1:, 2] += up[2][..., :width]
        # Sums of dS: over queries in the first extra dimension of the keys, over keys in the probe of the queries.
        over_queries = up[1][..., width].sum(-1, dtype=slope.dtype) / scale
        over_keys = up[0][..., width + _bias_terms(qkv.dtype)].sum(-1, dtype=slope.dtype) / scale
        grad_slope = (over_keys * z[:, :-1]).sum() - (over_queries * z[:, 1:]).sum()
        return grad_qkv, None, grad_slope


def _reversed(qkv: Tensor, z: Tensor, slope: Tensor) -> QKV:
    """q, k and v of the upper triangle, reversed; without its first query and last key, causal means strictly above.

    They have extra dimensions: the key bias as one number (three in reduced precision) against ones, and a probe of
    zeros against ones.
    """
    q, k, v = qkv.unbind(2)
    bias = -slope * z * qkv.shape[-1] ** 0.5
    terms = []
    for _ in range(_bias_terms(qkv.dtype)):
        terms.append(bias.to(qkv.dtype))
        bias = bias - terms[-1].to(bias.dtype)
    unused = -(q.shape[-1] + len(terms) + 1) % FLASH_WIDTH_MULTIPLE
    extra = len(terms) + 1 + unused
    ones, zeros = torch.ones_like(terms[0]), torch.zeros_like(terms[0])
    columns = torch.stack([*terms, ones, *[zeros] * unused], dim=-1)[:, :, None].expand(-1, -1, q.shape[2], -1)
    probe = F.pad(torch.ones(len(terms), dtype=q.dtype, device=q.device), (0, 1 + unused))
    high_q = torch.cat([q.flip(1)[:, 1:], probe.expand(q.shape[0], q.shape[1] - 1, q.shape[2], extra)], dim=-1)
    high_k = torch.cat([k, columns], dim=-1).flip(1)[:, :-1]
    high_v = F.pad(v.flip(1)[:, :-1], (0, extra))
    return high_q, high_k, high_v


def _bias_terms(dtype: torch.dtype) -> int:
    """How many numbers of `dtype` hold the key bias precisely enough."""
    return 1 if dtype in (torch.float32, torch.float64) else 3


def _flash(
    parts: QKV, *, causal: bool = False, scale: float | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(output (B, n, H, d), log-sum-exp (B, n, H)) of the device's flash attention; only CPUs take a bias."""
    q, k, v = (x.transpose(1, 2) for x in parts)
    if q.device.type == "cpu":
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = flash(q, k, v, 0.0, causal, attn_mask=bias, scale=scale)
    else:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def _flash_backward(
    grad: Tensor, parts: QKV, out: Tensor, lse: Tensor, scale: float, *, causal: bool = False, bias: Tensor | None = None
) -> QKV:
    """Gradients of a part for its q, k and v, given the merged output and log-sum-exp."""
    grad, q, k, v, out, lse = (x.transpose(1, 2) for x in (grad, *parts, out, lse))
    if q.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale)
    else:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # the dropout's random state
        backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
        grads = backward(
            grad,
            q,
            k,
            v,
            out,
            lse.contiguous(),
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            unused,
            unused[:0],
            scale=scale,
        )
    return tuple(x.transpose(1, 2) for x in grads)


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Add the keys behind `more` (B, n, H, d) and its log-sum-exp (B, n, H) to `out` and `lse`, in place."""
    out.lerp_(more.to(out.dtype), torch.sigmoid(more_lse - lse)[..., None])
    lse.copy_(torch.logaddexp(lse, more_lse))
