"""The network against model.md's numbers, the old code's golden values, and the obvious implementation in float64."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests import obvious
from trainer.model import elevation_bias, flash
from trainer.model.architecture import LEGACY_BIAS_FLOOR, Architecture, forward_flops, training_flops
from trainer.model.compat import legacy_orders, moved_arguments
from trainer.model.elevation_bias import chunked_attention, elevation_biased_attention
from trainer.model.embedding import embed_and_aggregate
from trainer.model.flash import Halves, Triangles
from trainer.model.topoflow import PositionsAlongWind, TopoFlow, patch_mean

TARGETS = (12, 5, 6, 7, 8, 9)
PUBLISHED = Architecture(grid=(128, 256), variables=15, target_channels=TARGETS)
SMALL = Architecture(
    grid=(12, 16), variables=15, target_channels=TARGETS, width=24, depth=3, heads=3, dropout=0.0, drop_path=0.0
)


def randomised(arch: Architecture, seed: int = 0, dtype: torch.dtype = torch.float64) -> TopoFlow:
    """A network whose every parameter matters: initial zeros and small weights replaced by noise."""
    torch.manual_seed(seed)
    model = TopoFlow(arch).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def arguments(arch: Architecture, batch: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    tokens = arch.patches[0] * arch.patches[1]
    x = torch.randn(batch, arch.variables, *arch.grid, generator=generator, dtype=dtype)
    lead = torch.tensor([12.0, 96.0, 24.0][:batch], dtype=dtype)
    elevation = torch.rand(tokens, generator=generator, dtype=dtype) * 5000
    elevation[: tokens // 3] = 0.0  # the sea: many equal elevations
    rank = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(batch)])
    return x, lead, elevation, rank


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def published_shapes(bias: bool) -> dict[str, tuple[int, ...]]:
    d, v = 768, 15
    shapes: dict[str, tuple[int, ...]] = {
        "var_embed": (1, v, d),
        "var_query": (1, 1, d),
        "pos_embed": (1, 8192, d),
        "token_embeds.proj_weights": (v, d, 1, 2, 2),
        "token_embeds.proj_biases": (v, d),
        "var_agg.in_proj_weight": (3 * d, d),
        "var_agg.in_proj_bias": (3 * d,),
        "var_agg.out_proj.weight": (d, d),
        "var_agg.out_proj.bias": (d,),
        "lead_time_embed.weight": (d, 1),
        "lead_time_embed.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for i in range(6):
        sizes = {
            "norm1": (d,),
            "norm2": (d,),
            "attn.qkv": (3 * d, d),
            "attn.proj": (d, d),
            "mlp.fc1": (4 * d, d),
            "mlp.fc2": (d, 4 * d),
        }
        for layer, size in sizes.items():
            shapes |= {f"blocks.{i}.{layer}.weight": size, f"blocks.{i}.{layer}.bias": (size[0],)}
    for i, size in ((0, (d, d)), (2, (d, d)), (4, (60, d))):
        shapes |= {f"head.{i}.weight": size, f"head.{i}.bias": (size[0],)}
    return shapes | ({"blocks.0.attn.elevation_alpha": (), "blocks.0.attn.H_scale": ()} if bias else {})


@pytest.mark.parametrize(
    ("bias", "parameters", "tensors"), [("none", 52_481_340, 91), ("descent", 52_481_341, 92), ("climb", 52_481_341, 92)]
)
def test_published_names_shapes_and_counts(bias: str, parameters: int, tensors: int) -> None:
    model = TopoFlow(Architecture(grid=(128, 256), variables=15, target_channels=TARGETS, elevation_bias=bias))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == published_shapes(bias != "none")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(list(model.parameters())) == tensors
    if bias != "none":
        assert model.state_dict()["blocks.0.attn.H_scale"] == 1000.0


def golden_model(arch: Architecture) -> TopoFlow:
    """A network with the reproducible weights of the golden files."""
    model = TopoFlow(arch).eval()
    order = [
        "var_embed",
        "var_query",
        "pos_embed",
        "token_embeds.proj_weights",
        "token_embeds.proj_biases",
        "var_agg.in_proj_weight",
        "var_agg.in_proj_bias",
        "var_agg.out_proj.weight",
        "var_agg.out_proj.bias",
        "lead_time_embed.weight",
        "lead_time_embed.bias",
    ]
    layers = [f"blocks.{i}.{n}" for i in range(2) for n in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    order += [f"{n}.{kind}" for n in [*layers, "norm", "head.0", "head.2", "head.4"] for kind in ("weight", "bias")]
    rng = np.random.Generator(np.random.PCG64(1234))
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    state = {}
    for name in order:
        values = rng.standard_normal(shapes[name]).astype(np.float32) * np.float32(0.2)
        is_norm = name.endswith(".weight") and "norm" in name.split(".")[-2]
        state[name] = torch.from_numpy(values + np.float32(1.0) if is_norm else values)
    if arch.elevation_bias != "none":
        state |= {"blocks.0.attn.elevation_alpha": torch.tensor(1.0), "blocks.0.attn.H_scale": torch.tensor(1000.0)}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("name", ["climax_baseline", "legacy_elevation_and_scan"])
def test_golden_values_of_the_old_code(name: str) -> None:
    golden = np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz", allow_pickle=False)
    legacy = name.startswith("legacy")
    arch = Architecture((64, 128), 15, TARGETS, width=32, depth=2, heads=4, elevation_bias="descent" if legacy else "none")
    x = torch.from_numpy(np.random.Generator(np.random.PCG64(77)).standard_normal((2, 15, 64, 128)).astype(np.float32))
    lead = torch.tensor([12.0, 96.0])
    given: tuple[Tensor, ...] = (x, lead, torch.zeros(2048), torch.arange(2048).expand(2, -1))
    if legacy:
        arch = replace(arch, bias_floor=LEGACY_BIAS_FLOOR)
        x[:, 13] *= 1931.4
        assert legacy_orders(x, arch.patches).tolist() == golden["perm"].tolist()
        given = moved_arguments(x, lead, patch_mean(x[:, 13], 2), 2, legacy_orders)
    model = golden_model(arch)
    encoded = []
    model.norm.register_forward_hook(lambda module, given, out: encoded.append(out))
    with torch.no_grad():
        y = model(*given)
    assert relative(encoded[0], torch.from_numpy(golden["enc"])) < 2e-4
    assert relative(y, torch.from_numpy(golden["y"])) < 2e-4


@pytest.mark.parametrize("bias", ["descent", "climb", "none"])
def test_whole_network_equals_the_obvious_one_with_all_gradients(bias: str) -> None:
    model, given = randomised(replace(SMALL, elevation_bias=bias)), arguments(SMALL)
    cotangent = torch.randn(2, 6, *SMALL.grid, dtype=torch.float64)
    (model(*given) * cotangent).sum().backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    out = model(*given).detach()
    model.zero_grad()
    expected = obvious.forward(model, *given)
    (expected * cotangent).sum().backward()
    assert relative(out, expected) < 1e-12
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert ours[name] is not None, name
        if name == "var_agg.in_proj_bias":  # the key bias has no effect; the obvious one leaves rounding noise there
            keep = torch.cat([torch.arange(SMALL.width), torch.arange(2 * SMALL.width, 3 * SMALL.width)])
            assert relative(ours[name][keep], parameter.grad[keep]) < 1e-11, name
        else:
            assert relative(ours[name], parameter.grad) < 1e-10, name


@pytest.mark.parametrize("patch", [2, 4])
def test_folded_aggregation_equals_convolution_and_attention(patch: int) -> None:
    arch = Architecture((8, 16), 5, (0, 2), patch=patch, width=16, depth=1, heads=2)
    model = randomised(arch)
    x = torch.randn(3, 5, 8, 16, dtype=torch.float64)
    scores, values, bias = model.var_agg(model.var_query, model.token_embeds(model.var_embed)[0])
    ours = embed_and_aggregate(model._pixels(x), scores, values, bias, torch.float64)
    assert relative(ours, obvious.aggregate(model, x)) < 1e-13


def test_folded_aggregation_in_bf16_loses_little_more_than_rounding_its_result() -> None:
    """Tables and softmax stay fp32; only the one large product is rounded. The obvious way rounds every step."""
    arch = Architecture((16, 16), 15, (0, 2), width=96, depth=1, heads=4)
    model = randomised(arch).bfloat16()
    x = torch.randn(2, 15, 16, 16, dtype=torch.float64).bfloat16()
    truth = obvious.aggregate(copy.deepcopy(model).double(), x.double())
    scores, values, bias = model.var_agg(model.var_query, model.token_embeds(model.var_embed)[0])
    ours = embed_and_aggregate(model._pixels(x), scores, values, bias, torch.bfloat16)
    assert ours.dtype == torch.bfloat16
    assert relative(ours, truth) < 1.25 * relative(truth.bfloat16(), truth)
    assert relative(ours, truth) < 0.75 * relative(obvious.aggregate(model, x), truth)


class HostReads(TorchDispatchMode):
    """Names of the operators at which the host would wait for a GPU: numbers read, and shapes that depend on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "repeat_interleave")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name.lstrip("_").startswith("index") and isinstance(args[1], list | tuple) else []
        masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
        if name in self.WAITING or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> HostReads:
        self.patches = contextlib.ExitStack()
        for method in ("tolist", "cpu", "numpy"):  # no operators where the tensor is on the host already
            right = getattr(Tensor, method)

            def told(tensor: Tensor, *rest: Any, _right: Any = right, _method: str = method, **options: Any) -> Any:
                self.seen.append(_method)
                return _right(tensor, *rest, **options)

            self.patches.enter_context(mock.patch.object(Tensor, method, told))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.patches.close()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.masked_fill_(x > 0, 1.0).nonzero(),
        lambda x: x.repeat_interleave(torch.arange(3)),
    ],
)
def test_a_host_that_waits_is_noticed(wait: Any) -> None:
    with HostReads() as host:
        wait(torch.tensor([1.0, -2.0, 3.0]))
    assert host.seen


@pytest.mark.parametrize(("kernel", "reads"), [("flash triangles", []), ("query chunks", []), ("flash halves", None)])
def test_nothing_in_forward_and_backward_waits_for_a_gpu(kernel: str, reads: list[str] | None) -> None:
    """The halves of a CPU do look at a number: that the test would see it."""
    arch = replace(SMALL, dropout=0.3, drop_path=0.3)
    if kernel == "query chunks":
        arch = replace(arch, relative_position=True, first_block_dropout=0.3, bias_floor=-10.0, embedding_norm=True)
    model = randomised(arch, dtype=torch.float32).train()
    given = arguments(arch, dtype=torch.float32)
    with mock.patch.object(elevation_bias, "kernel_name", return_value=kernel), HostReads() as host:
        model(*given).square().mean().backward()
    assert host.seen == reads or (reads is None and "_local_scalar_dense" in host.seen)


@pytest.mark.parametrize("kernel", [Halves.apply, Triangles.apply, chunked_attention], ids=["halves", "triangles", "chunks"])
@pytest.mark.parametrize("slope", [0.0, 1.3e-3, -0.7e-3, 0.05])
@pytest.mark.parametrize("shape", [(2, 48, 2, 8), (1, 700, 3, 24), (3, 101, 1, 16)])
def test_elevation_bias_equals_the_materialised_one(
    kernel: Any, slope: float, shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut into many small squares, into one, and into a number that is no power of two with an uneven last one."""
    monkeypatch.setattr(flash, "DIAGONAL", 64)
    monkeypatch.setattr(flash, "DIAGONAL_BACKWARD", 16)
    torch.manual_seed(0)
    batch, tokens, heads, width = shape
    qkv = torch.randn(batch, tokens, 3, heads, width, dtype=torch.float64, requires_grad=True)
    z = torch.rand(batch, tokens, dtype=torch.float64) * 5000
    z[:, ::3] = 120.0
    z = z.sort(1).values
    s = torch.tensor(slope, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(batch, tokens, heads, width, dtype=torch.float64)
    out = kernel(qkv, z, s)
    gradients = torch.autograd.grad((out * cotangent).sum(), (qkv, s))
    expected = obvious.attend(qkv, z, s)
    truth = torch.autograd.grad((expected * cotangent).sum(), (qkv, s))
    assert relative(out, expected) < 1e-13
    assert relative(gradients[0], truth[0]) < 1e-12
    assert relative(gradients[1], truth[1]) < 1e-10


@pytest.mark.parametrize(("tokens", "square"), [(1, 4), (4, 4), (5, 4), (64, 4), (101, 8)])
def test_cuts_cover_every_pair_of_tokens_once(tokens: int, square: int) -> None:
    seen = torch.zeros(tokens, tokens, dtype=torch.int64)
    squares, halves = flash._cut(tokens, square)
    for s in squares:
        seen[s, s] += 1
    for low, high in halves:
        assert low.stop == high.start
        seen[low, high] += 1
        seen[high, low] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("kernel", ["flash halves", "flash triangles"])
@pytest.mark.parametrize("slope", [0.0, 1.3e-3])
@pytest.mark.parametrize("climb", [False, True])
def test_tokens_come_in_any_order_and_stay_in_it(
    kernel: str, slope: float, climb: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In either direction: a climb is a descent of terrain turned upside down."""
    monkeypatch.setattr(elevation_bias, "kernel_name", lambda *_: kernel)
    torch.manual_seed(0)
    qkv = torch.randn(3, 40, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    z = torch.rand(3, 40, dtype=torch.float64) * 5000
    z[:, ::4] = 0.0
    s = torch.tensor(slope, dtype=torch.float64, requires_grad=True)
    results = []
    ours = partial(elevation_biased_attention, qkv, -z if climb else z, s)
    for attend in (ours, partial(obvious.attend, qkv, z, s, climb)):
        out = attend()
        results.append((out, *torch.autograd.grad(out.square().sum(), (qkv, s))))
    for ours, truth in zip(*results, strict=True):
        assert relative(ours, truth) < 1e-11


@pytest.mark.parametrize("kernel", [Halves.apply, Triangles.apply], ids=["halves", "triangles"])
def test_elevation_bias_in_bf16_is_as_good_as_plain_bf16_attention(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradient of qkv: to 1.5 of what plain attention loses to bf16. The slope's gradient, a sum that cancels:
    to 1.5 of what the plain formula's loses, over several draws."""
    monkeypatch.setattr(flash, "DIAGONAL", 128)
    monkeypatch.setattr(flash, "DIAGONAL_BACKWARD", 64)
    slope_errors: dict[str, list[float]] = {"ours": [], "formula": []}
    for seed in range(6):
        torch.manual_seed(seed)
        qkv = torch.randn(1, 512, 3, 2, 32).bfloat16()
        z, cotangent = (torch.rand(1, 512) * 5000).sort(1).values, torch.randn(1, 512, 2, 32).bfloat16()

        slope, given = torch.tensor(1e-3), (qkv, cotangent)
        truth = with_gradients(obvious.attend, *given, torch.float64, z.double(), slope.double())
        ours, formula = (with_gradients(attend, *given, torch.bfloat16, z, slope) for attend in (kernel, chunked_attention))
        precise, rounded = (with_gradients(plain_attention, *given, dtype) for dtype in (torch.float64, torch.bfloat16))
        lost = [relative(a, b) for a, b in zip(rounded, precise, strict=True)]
        assert relative(ours[0], truth[0]) < 1.5 * lost[0]
        assert relative(ours[1], truth[1]) < 1.5 * lost[1]
        slope_errors["ours"].append(float((ours[2] - truth[2]) ** 2))
        slope_errors["formula"].append(float((formula[2] - truth[2]) ** 2))
    assert sum(slope_errors["ours"]) < 1.5**2 * sum(slope_errors["formula"])


def with_gradients(attend: Any, qkv: Tensor, cotangent: Tensor, dtype: torch.dtype, *bias: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients for qkv and, where `bias` is (z, slope), for the slope."""
    given = [qkv.to(dtype).requires_grad_(), *(slope.clone().requires_grad_() for slope in bias[1:])]
    out = attend(given[0], *bias[:1], *given[1:])
    return out, *torch.autograd.grad((out * cotangent.to(dtype)).sum(), given)


def plain_attention(qkv: Tensor) -> Tensor:
    q, k, v = (p.transpose(1, 2) for p in qkv.unbind(2))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class FlashContract(TorchDispatchMode):
    """What a GPU's flash operators take for granted, some of it without a check: asserted on tensors without values."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_scaled_dot_product_flash_attention":
            self._same_and_dense(args[:3])
            self.calls.append("forward")
        if name == "_scaled_dot_product_flash_attention_backward":
            grad, q, k, v, out, lse = args[:6]
            self._same_and_dense((grad, q, k, v, out))
            assert lse.dtype == torch.float32
            assert lse.is_contiguous()
            assert lse.shape == q.shape[:3]
            assert args[8:10] == (q.shape[2], k.shape[2])
            self.calls.append("backward")
        return func(*args, **(kwargs or {}))

    def _same_and_dense(self, tensors: tuple[Tensor, ...]) -> None:
        for x in tensors:
            assert (x.dtype, x.shape[:2], x.shape[3]) == (tensors[0].dtype, tensors[0].shape[:2], tensors[0].shape[3])
            assert x.stride(-1) == 1
            assert x.shape[-1] % 8 == 0


@pytest.mark.parametrize("width", [64, 96, 128])
def test_triangles_keep_the_contract_of_a_gpus_operators(width: int) -> None:
    qkv = torch.empty(2, 130, 3, 2, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    z, slope = torch.empty(2, 130, device="meta"), torch.empty((), device="meta", requires_grad=True)
    with FlashContract() as contract:
        out = Triangles.apply(qkv, z, slope)
        gradients = torch.autograd.grad(out, (qkv, slope), torch.empty_like(out))
    assert contract.calls == ["forward"] * 2 + ["backward"] * 2
    assert (out.shape, out.dtype) == ((2, 130, 2, width), torch.bfloat16)
    assert [(g.shape, g.dtype) for g in gradients] == [(qkv.shape, torch.bfloat16), (slope.shape, torch.float32)]


def test_positions_gather_backward_is_the_scatter() -> None:
    pos = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    rank = torch.stack([torch.randperm(10) for _ in range(3)])
    assert torch.autograd.gradcheck(PositionsAlongWind.apply, (pos, rank))


def test_positions_along_the_wind_may_be_added_to_those_of_the_places() -> None:
    """For one sample that is a network whose position table is the sum; at the start it is the network without a scan."""
    added = randomised(replace(SMALL, scan_added=True)).eval()
    assert added.scan_embed is not None
    x, lead, elevation, rank = arguments(SMALL, batch=1)
    plain = TopoFlow(SMALL).double().eval()
    plain.load_state_dict({name: value for name, value in added.state_dict().items() if name != "scan_embed"})
    raster = torch.arange(rank.shape[1])[None]
    with torch.no_grad():
        plain.pos_embed += added.scan_embed[:, rank[0]]
        torch.testing.assert_close(added(x, lead, elevation, rank), plain(x, lead, elevation, raster))
        plain.pos_embed.copy_(added.pos_embed)
        added.scan_embed.zero_()
        torch.testing.assert_close(added(x, lead, elevation, rank), plain(x, lead, elevation, raster))
    assert not TopoFlow(replace(SMALL, scan_added=True)).scan_embed.any()  # type: ignore[union-attr]


def test_patch_mean() -> None:
    fields = torch.arange(48.0).view(2, 4, 6)
    assert patch_mean(fields, 2).tolist() == [[3.5, 5.5, 7.5, 15.5, 17.5, 19.5], [27.5, 29.5, 31.5, 39.5, 41.5, 43.5]]


@pytest.mark.parametrize("change", [{"grid": (32, 64)}, {"depth": 1, "width": 96}, {"heads": 1}, {"mlp_ratio": 1.0}])
def test_flops_are_those_that_torch_counts(change: dict) -> None:
    """Each change makes another component the large one. Attention is made of counted products here; the network's own
    kernels are opaque to the counter."""
    arch = replace(SMALL, **change)
    model = randomised(arch, dtype=torch.float32).eval()
    given = arguments(arch, dtype=torch.float32)
    with (
        mock.patch.object(elevation_bias, "kernel_name", return_value="query chunks"),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
        torch.no_grad(),
    ):
        model(*given)
    parts = forward_flops(arch)
    batch = len(given[0])
    expected = parts.pop("fold") + batch * sum(parts.values())
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    assert training_flops(arch, batch) == 3 * expected


@pytest.mark.parametrize("recompute", ["attention", "blocks"])
def test_recomputation_changes_no_gradient(recompute: str) -> None:
    """Dropout and stochastic depth on: what is computed again draws the same masks."""
    gradients = []
    for choice in ("none", recompute):
        arch = replace(SMALL, recompute=choice, dropout=0.3, drop_path=0.3)
        model = randomised(arch).train()
        torch.manual_seed(3)
        model(*arguments(arch)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-12, atol=1e-14)


def test_a_gpu_gets_the_triangles_only_if_they_agree_there(caplog: pytest.LogCaptureFixture) -> None:
    """The check that a GPU's operators must pass, on operators that are right and on ones that are subtly wrong."""
    cpu = torch.device("cpu")
    assert elevation_bias._triangles_error(cpu, torch.float32, 96) < 1e-5
    assert elevation_bias._triangles_error(cpu, torch.bfloat16, 64) < 0.05
    right = flash._flash_backward

    def wrong(*arguments: Any, **options: Any) -> Any:
        q, k, v = right(*arguments, **options)
        return q, k * 1.2, v

    with mock.patch.object(flash, "_flash_backward", wrong):
        assert elevation_bias._triangles_error(cpu, torch.float32, 96) > 0.05
    choose = elevation_bias.kernel_name.__wrapped__
    for outcome, expected in ((0.01, "flash triangles"), (0.3, "query chunks"), (float("nan"), "query chunks")):
        with mock.patch.object(elevation_bias, "_triangles_error", return_value=outcome):
            assert choose("cuda", torch.bfloat16, 96) == expected
    with mock.patch.object(elevation_bias, "_triangles_error", side_effect=AttributeError("no such operator")):
        assert choose("cuda", torch.bfloat16, 96) == "query chunks"
    assert caplog.text.count("slower query chunks") == 3
    assert choose("cuda", torch.float32, 96) == "query chunks"
    for width in (12, 256):  # no kernel of a GPU takes these
        assert choose("cuda", torch.bfloat16, width) == "query chunks"
        assert f"heads of width {width}" in caplog.text


def test_unused_dimensions_that_a_gpu_kernel_needs_change_nothing() -> None:
    """Head widths of GPUs are multiples of 8: what is filled up is not mistaken for the probe."""
    torch.manual_seed(0)
    qkv = torch.randn(2, 40, 3, 2, 12, dtype=torch.float64, requires_grad=True)
    z = torch.rand(2, 40, dtype=torch.float64).sort(1).values
    slope = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    results = []
    for multiple in (1, 8):
        with mock.patch.object(flash, "FLASH_WIDTH_MULTIPLE", multiple):
            out = Triangles.apply(qkv, z, slope)
            results.append((out, *torch.autograd.grad(out.square().sum(), (qkv, slope))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [256, 101])
def test_the_operators_of_a_gpu_take_what_they_are_given(tokens: int) -> None:
    """On tensors without values, torch checks the operators' arguments and says the shapes of what they return."""
    qkv = torch.empty(2, tokens, 3, 2, 96, device="meta", dtype=torch.bfloat16, requires_grad=True)
    z, slope = torch.empty(2, tokens, device="meta"), torch.empty((), device="meta", requires_grad=True)
    out = Triangles.apply(qkv, z, slope)
    gradients = torch.autograd.grad(out, (qkv, slope), torch.empty_like(out))
    assert (out.shape, out.dtype) == ((2, tokens, 2, 96), torch.bfloat16)
    assert [(g.shape, g.dtype) for g in gradients] == [(qkv.shape, torch.bfloat16), ((), torch.float32)]
