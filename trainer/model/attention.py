"""Self-attention with an optional elevation bias that is never held as an (N x N) tensor.

bias_ij = -slope * relu(z_j - z_i): looking at a higher patch j from a lower patch i costs slope per unit of climb.
Sort the tokens by elevation. Keys at or below the query form a causal triangle without bias; keys above form the
other one, where -slope * z_j is one more key dimension and +slope * z_i is constant along a row. Both are flash
attentions, merged by their log-sum-exp; the backward pass runs both kernels with the merged output and log-sum-exp,
as ring attention does (Liu et al. 2023, https://arxiv.org/abs/2310.01889).
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

QUERY_CHUNK = 512
FLASH_WIDTH_MULTIPLE = 8  # of the head's width: GPUs need it, CPUs are faster with it
QKV = tuple[Tensor, Tensor, Tensor]  # (B, H, N, d) each
log = logging.getLogger("trainer")


class Attention(nn.Module):
    """Multi-head self-attention; with `elevation_bias`, one learned scalar `elevation_alpha` per kilometre of climb.

    State dict: qkv, proj, and with the bias `elevation_alpha` () and the buffer `H_scale` () in metres.
    """

    H_scale: Tensor

    def __init__(
        self, width: int, heads: int, elevation_bias: bool, alpha_init: float = 0.01, bias_floor: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.bias_floor = heads, bias_floor
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.elevation_alpha: nn.Parameter | None = None
        if elevation_bias:
            self.elevation_alpha = nn.Parameter(torch.tensor([alpha_init]))
            self.register_buffer("H_scale", torch.tensor(1000.0))
            self.register_state_dict_post_hook(_store_alpha_as_scalar)
            self.register_load_state_dict_pre_hook(_load_alpha_from_scalar)

    def forward(self, x: Tensor, elevation: Tensor) -> Tensor:
        """(B, N, D) tokens and their (B, N) elevations in metres -> (B, N, D)."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        if self.elevation_alpha is None:
            q, k, v = qkv.transpose(1, 3).unbind(2)
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        else:
            precise = torch.promote_types(self.elevation_alpha.dtype, torch.float32)
            slope = self.elevation_alpha.to(precise) / self.H_scale.to(precise)
            out = elevation_biased_attention(qkv, elevation, slope[0], self.bias_floor)
        return self.proj(out.reshape(batch, tokens, width))


# DeepSpeed broadcasts parameters as bytes and cannot view a 0-dimensional one; files keep the published shape ().
def _store_alpha_as_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    alpha = state[f"{prefix}elevation_alpha"]
    if alpha.numel():  # empty where ZeRO 3 has partitioned it
        state[f"{prefix}elevation_alpha"] = alpha.view(())


def _load_alpha_from_scalar(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    name = f"{prefix}elevation_alpha"
    if name in state and state[name].ndim == 0:
        state[name] = state[name].view(1)


@cache
def kernel_name(device_type: str, dtype: torch.dtype) -> str:
    """Which implementation of the elevation bias is used: "flash triangles" or "query chunks"; chosen once, and logged.

    On a GPU the triangles are taken only after they have agreed with the plain formula there, gradients included: the
    operators under them are not torch's public interface.
    """
    if device_type == "cpu":
        return "flash triangles"
    if dtype not in (torch.bfloat16, torch.float16):
        return "query chunks"  # flash kernels of GPUs take 16 bits only
    try:
        error = _triangles_error(torch.device(device_type), dtype)
    except (RuntimeError, AttributeError, TypeError) as problem:  # an operator that is absent or has another signature
        log.warning("WARNING: no flash triangles on %s (%s): the elevation bias uses slower query chunks", device_type, problem)
        return "query chunks"
    if not error < 0.05:
        log.warning("WARNING: flash triangles on %s are off by %.3g: the elevation bias uses slower query chunks",
                    device_type, error)  # fmt: skip
        return "query chunks"
    return "flash triangles"


def _triangles_error(device: torch.device, dtype: torch.dtype) -> float:
    """Largest relative difference of output and gradients between both implementations, on 256 random tokens."""
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(1, 256, 3, 2, 96, generator=generator, device=device, dtype=dtype)
    z = torch.rand(1, 256, generator=generator, device=device) * 4000.0
    results = []
    for attend in (_TwoTriangles.apply, _query_chunks):
        with torch.enable_grad():  # a forecast asks for the kernel, too
            given = qkv.detach().requires_grad_()
            slope = torch.tensor(1e-3, device=device, requires_grad=True)
            out = attend(given, z, slope)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (given, slope))))
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(*results, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def elevation_biased_attention(qkv: Tensor, z: Tensor, slope: Tensor, floor: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) - slope * relu(z_j - z_i)) v, memory linear in N.

    Args:
        qkv: (B, N, 3, H, d) queries, keys and values.
        z: (B, N) elevations.
        slope: () bias per unit of z; any sign, and differentiable, also at 0.
        floor: the bias is clamped to floor .. 0, as the old code did; None for new runs. Not separable, so chunked.

    Returns:
        (B, N, H, d).
    """
    if floor is None and kernel_name(qkv.device.type, qkv.dtype) == "flash triangles":
        return _TwoTriangles.apply(qkv, z, slope)
    return _query_chunks(qkv, z, slope, floor)


def _query_chunks(qkv: Tensor, z: Tensor, slope: Tensor, floor: float | None = None) -> Tensor:
    """The plain formula on QUERY_CHUNK queries at a time, recomputed in the backward pass."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))

    def attend(q_chunk: Tensor, z_chunk: Tensor, k: Tensor, v: Tensor, slope: Tensor) -> Tensor:
        climb = (z[:, None, :] - z_chunk[:, :, None]).clamp_min(0)
        bias = -slope * climb if floor is None else (-slope * climb).clamp(floor, 0.0)
        scores = q_chunk @ k.transpose(-1, -2) * q_chunk.shape[-1] ** -0.5 + bias.to(q_chunk.dtype)[:, None]
        return scores.softmax(-1) @ v

    chunks = zip(q.split(QUERY_CHUNK, 2), z.split(QUERY_CHUNK, 1), strict=True)
    parts = [checkpoint(attend, qc, zc, k, v, slope, use_reentrant=False) for qc, zc in chunks]
    return torch.cat(parts, dim=2).transpose(1, 2)


class _TwoTriangles(torch.autograd.Function):
    """Tokens are sorted by elevation inside; `low` has keys at or below the query, `high` those above, reversed."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, z: Tensor, slope: Tensor) -> Tensor:
        z = z - z.mean(dim=1, keepdim=True)  # only differences matter; smaller numbers round less
        order = torch.argsort(z, dim=1, stable=True)
        z = z.gather(1, order).to(slope.dtype)
        rows = _row_numbers(order)
        sorted_qkv = _take_rows(qkv, rows)
        low, high = _triangles(sorted_qkv, z, slope)
        scale = qkv.shape[-1] ** -0.5
        if qkv.device.type == "cpu" and slope == 0:
            # Looking at a number is free on the CPU, and an inert bias must equal the plain block to the last bit.
            out, lse = _flash(*_heads_first(qkv), causal=False, scale=scale)
            saved_out = _heads_first_one(_take_rows(out.transpose(1, 2), rows))
            saved_lse = lse.transpose(1, 2).flatten(0, 1).index_select(0, rows).view_as(lse.transpose(1, 2)).transpose(1, 2)
            result = out.transpose(1, 2)
        else:
            low_out, low_lse = _flash(*low, causal=True, scale=scale)
            high_out, high_lse = _flash(*high, causal=True, scale=scale)
            saved_out, saved_lse = _merge(low_out, low_lse, high_out, high_lse, (slope * z)[:, None])
            result = _put_rows(saved_out.transpose(1, 2), rows)
        ctx.save_for_backward(sorted_qkv, z, slope, rows, saved_out, saved_lse)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor]:
        sorted_qkv, z, slope, rows, out, lse = ctx.saved_tensors
        width = sorted_qkv.shape[-1]
        scale = width**-0.5
        low, high = _triangles(sorted_qkv, z, slope)
        grad = _heads_first_one(_take_rows(grads[0], rows))
        low_grads = _flash_backward(grad, *low, out, lse, scale)
        extra = high[0].shape[-1] - width

        def reverse(x: Tensor, pad: int) -> Tensor:
            return F.pad(x.flip(2)[:, :, 1:], (0, pad))

        shifted = (lse - (slope * z)[:, None]).flip(2)[:, :, 1:].contiguous()
        high_grads = _flash_backward(reverse(grad, extra), *high, reverse(out, extra), shifted, scale)
        grad_qkv = torch.stack([g.transpose(1, 2) for g in low_grads], dim=2)
        grad_high = [g.flip(2).transpose(1, 2) for g in high_grads]
        grad_qkv[:, :-1, 0] += grad_high[0][..., :width]
        grad_qkv[:, 1:, 1] += grad_high[1][..., :width]
        grad_qkv[:, 1:, 2] += grad_high[2][..., :width]
        # dS summed over queries is the first extra key dimension's gradient, over keys the probe dimension's.
        over_queries = grad_high[1][..., width].sum(-1).to(slope.dtype) / scale
        over_keys = grad_high[0][..., width + _bias_terms(sorted_qkv.dtype)].sum(-1).to(slope.dtype) / scale
        grad_slope = (over_keys * z[:, :-1]).sum() - (over_queries * z[:, 1:]).sum()
        return _put_rows(grad_qkv, rows), None, grad_slope


def _triangles(qkv: Tensor, z: Tensor, slope: Tensor) -> tuple[QKV, QKV]:
    """Sorted (B, N, 3, H, d) -> (q, k, v) of both triangles, heads first.

    The upper one is reversed, without its first query and last key (causal then means strictly above), and has extra
    dimensions: the key bias as one number (three in reduced precision) against ones, and a probe of zeros against ones.
    """
    q, k, v = _heads_first(qkv)
    bias = -slope * z * qkv.shape[-1] ** 0.5
    terms = []
    for _ in range(_bias_terms(qkv.dtype)):
        terms.append(bias.to(qkv.dtype))
        bias = bias - terms[-1].to(bias.dtype)
    unused = -(q.shape[-1] + len(terms) + 1) % FLASH_WIDTH_MULTIPLE
    extra = len(terms) + 1 + unused
    ones, zeros = torch.ones_like(terms[0]), torch.zeros_like(terms[0])
    columns = torch.stack([*terms, ones, *[zeros] * unused], dim=-1)[:, None].expand(-1, q.shape[1], -1, -1)
    probe = F.pad(torch.ones(len(terms), dtype=q.dtype, device=q.device), (0, 1 + unused))
    high_q = torch.cat([q.flip(2)[:, :, 1:], probe.expand(*q.shape[:2], q.shape[2] - 1, extra)], dim=-1)
    high_k = torch.cat([k, columns], dim=-1).flip(2)[:, :, :-1]
    high_v = F.pad(v.flip(2)[:, :, :-1], (0, extra))
    return (q, k, v), (high_q, high_k, high_v)


def _bias_terms(dtype: torch.dtype) -> int:
    """How many numbers of `dtype` hold the key bias precisely enough."""
    return 1 if dtype in (torch.float32, torch.float64) else 3


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """(output, log-sum-exp) of the device's flash attention."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float) -> QKV:
    """Gradients of a causal triangle for q, k and v, given the merged output and log-sum-exp."""
    if q.device.type == "cpu":
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return backward(grad, q, k, v, out, lse, 0.0, True, scale=scale)
    no_dropout = torch.empty(2, dtype=torch.uint64, device=q.device)
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, True, no_dropout, no_dropout[:0], scale=scale
    )  # fmt: skip


def _merge(low_out: Tensor, low_lse: Tensor, high_out: Tensor, high_lse: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Combine both triangles' outputs (B, H, N, d) by their log-sum-exp (B, H, N)."""
    width = low_out.shape[-1]
    above = F.pad((high_lse.flip(2) + shift[:, :, :-1]), (0, 1), value=float("-inf"))
    lse = torch.logaddexp(low_lse, above)
    out = low_out * (low_lse - lse).exp()[..., None]
    out[:, :, :-1] += high_out.flip(2)[..., :width] * (above - lse)[:, :, :-1].exp()[..., None]
    return out.to(low_out.dtype), lse


def _row_numbers(order: Tensor) -> Tensor:
    batch, tokens = order.shape
    return (order + torch.arange(batch, device=order.device)[:, None] * tokens).flatten()


def _take_rows(x: Tensor, rows: Tensor) -> Tensor:
    return x.flatten(0, 1).index_select(0, rows).view_as(x)


def _put_rows(x: Tensor, rows: Tensor) -> Tensor:
    return torch.empty_like(x.flatten(0, 1)).index_copy_(0, rows, x.flatten(0, 1)).view(x.shape)


def _heads_first(qkv: Tensor) -> QKV:
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
    return q, k, v


def _heads_first_one(x: Tensor) -> Tensor:
    return x.transpose(1, 2)
