"""The numbers of the network: shapes, parameters, floating-point operations; a multiply-add counts as two."""

from __future__ import annotations

from dataclasses import dataclass

LEGACY_BIAS_FLOOR = -10.0  # the old code clamped the elevation bias
RELATIVE_BUCKETS = 32  # of distances along columns, and along rows


@dataclass(frozen=True)
class Architecture:
    """Every number that determines parameter names and shapes, and the regularisation."""

    grid: tuple[int, int]  # pixels
    variables: int
    target_channels: tuple[int, ...]  # indices of the targets among the variables
    patch: int = 2
    width: int = 768
    depth: int = 6
    heads: int = 8
    mlp_ratio: float = 4.0
    drop_path: float = 0.1
    dropout: float = 0.1
    elevation_bias: str = "descent"  # of the first block: none | descent | climb
    alpha_init: float = 0.01
    init_std: float = 0.02  # of linear weights and patch projections
    bias_floor: float | None = None  # networks of old code only
    relative_position: bool = False  # a learned bias by distance in the first block, as in the release of 2026
    first_block_dropout: float = 0.0  # of attention, projection and MLP there
    embedding_norm: bool = False  # a LayerNorm of every variable's token
    leads: tuple[int, ...] = ()  # where the analysis is added to the output, with a weight for each target and lead time
    scan_added: bool = False  # positions along the wind have a table of their own, beside that of the patches' places
    sources: tuple[str, ...] = ()  # factors of the sources along the paths of the air
    recompute: str = "none"  # none | attention | blocks: what is computed again in the backward pass instead of kept

    @property
    def patches(self) -> tuple[int, int]:
        return self.grid[0] // self.patch, self.grid[1] // self.patch


def forward_flops(arch: Architecture) -> dict[str, int]:
    """Matrix-product operations of one forward pass, by component.

    "fold" is paid once a micro-batch (the tables of the embedding do not depend on the sample), the rest once a sample.
    Element-wise work and the extra dimensions of the elevation bias are left out, as is usual for MFU.
    """
    (rows, cols), variables, width, heads = arch.patches, arch.variables, arch.width, arch.heads
    tokens, area = rows * cols, arch.patch**2
    hidden = int(width * arch.mlp_ratio)
    outputs = len(arch.target_channels) * area
    terms = variables * (area + 1)
    return {
        # query, its probe into the keys, value bias; scores, values and their output projection as tables
        "fold": 2 * (3 * width * width + heads * width * terms + 2 * width * width * terms),
        "embedding": 2 * tokens * (variables * area * heads * variables + heads * terms * width) + 2 * width,
        "linear": arch.depth * 2 * tokens * (4 * width * width + 2 * width * hidden),
        "attention": arch.depth * 4 * tokens * tokens * width,
        "head": 2 * tokens * (2 * width * width + width * outputs),
    }


def training_flops(arch: Architecture, micro: int) -> int:
    """Operations of forward and backward over a micro-batch; what is recomputed is not counted (it is no progress)."""
    parts = forward_flops(arch)
    return 3 * (parts.pop("fold") + micro * sum(parts.values()))


def parameter_count(arch: Architecture) -> int:
    """Numbers that are trained."""
    (rows, cols), variables, width, area = arch.patches, arch.variables, arch.width, arch.patch**2
    hidden = int(width * arch.mlp_ratio)
    embedding = variables * width * (area + 2) + width + rows * cols * width  # projections, variables, query, positions
    embedding += 2 * width * int(arch.embedding_norm)
    aggregation = 4 * (width * width + width)
    lead_time = 2 * width
    block = 4 * width + 4 * (width * width + width) + 2 * width * hidden + hidden + width
    head = 2 * (width * width + width) + (width + 1) * variables * area
    added = len(arch.leads) * len(arch.target_channels)
    biases = int(arch.elevation_bias != "none") + RELATIVE_BUCKETS**2 * arch.heads * int(arch.relative_position)
    added += rows * cols * width * int(arch.scan_added)
    if arch.sources:
        added += len(arch.target_channels) * (1 + len(arch.sources) * arch.grid[0] * arch.grid[1])
    return embedding + aggregation + lead_time + arch.depth * block + biases + 2 * width + head + added
