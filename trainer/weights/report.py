"""What an import would load, and whether that is complete: by name and shape, values looked at."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import IO, Any

import torch
from torch import Tensor

from trainer.checkpoint.manifest import CheckpointError

WEIGHT_TYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ZERO_RUN = 256  # so many zeros in a row of a trained matrix are a hole in its file
GATE = 0.9999  # share of parameters that must load, the allow-list aside


@dataclass
class ImportReport:
    """What an import would load, by parameter count."""

    source: str
    expected: dict[str, int]  # name -> parameters
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: dict[str, int] = field(default_factory=dict)
    misshapen: dict[str, str] = field(default_factory=dict)  # name -> the shape there, and here
    remapped: dict[str, str] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)
    allowed_missing: list[str] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)  # name -> why its values cannot be weights
    fresh: list[str] = field(default_factory=list)  # channels that the file's network did not have
    left_out: list[str] = field(default_factory=list)  # channels that only the file's network has
    taken: str = ""  # which of the file's state dicts
    also: list[str] = field(default_factory=list)  # others that were not taken
    advice: list[str] = field(default_factory=list)  # settings that only the file's network has
    changed: dict[str, str] = field(default_factory=dict)  # key -> how they were made otherwise
    accepted: list[str] = field(default_factory=list)  # such differences that were allowed
    notes: list[str] = field(default_factory=list)  # what nobody has recorded

    def parameters(self, names: Iterable[str]) -> int:
        return sum(self.expected[name] for name in names)

    @property
    def share(self) -> float:
        """Share of the network's parameters that load, those that may be missing left out."""
        needed = sum(self.expected.values()) - self.parameters(self.allowed_missing)
        return self.parameters(self.loaded) / needed if needed else 0.0

    @property
    def wrong(self) -> list[str]:
        """What keeps the import from being complete, a line each."""
        lines = [f"{key}: {how}" for key, how in self.changed.items()]
        lines += [f"{name} {why}" for name, why in self.unfit.items()]
        lines += [f"missing {name}" for name in self.missing]
        lines += [f"misshapen {name}: {shapes}" for name, shapes in self.misshapen.items()]
        return lines + [f"unexpected {name}" for name in sorted(self.unexpected)]

    @property
    def complete(self) -> bool:
        return not self.wrong and self.share >= GATE

    @property
    def same_function(self) -> bool:
        """Whether the network computes what it did where the weights come from."""
        others = self.fresh or self.left_out or self.accepted or self.allowed_missing
        return self.complete and not others

    def to_json(self) -> dict[str, Any]:
        """Everything, with counts in place of long lists of what is as it should be."""
        about = asdict(self) | {"loaded": len(self.loaded), "unexpected": sorted(self.unexpected)}
        about["parameters"] = sum(about.pop("expected").values())
        return about | {"share_loaded": self.share, "complete": self.complete}

    def show(self, file: IO[str]) -> None:
        """Print counts and shares, and every key that is not simply loaded."""
        from rich.console import Console
        from rich.table import Table

        console = Console(file=file, width=max(110, Console().width))
        total = sum(self.expected.values())
        table = Table("", "tensors", "parameters", "share", title=f"import of {self.source}")
        rows = {
            "loaded": self.loaded,
            "missing, allowed": self.allowed_missing,
            "missing": self.missing,
            "misshapen": self.misshapen.keys() & self.expected.keys(),
            "not weights": self.unfit.keys() & self.expected.keys(),
        }
        counts = {label: (len(names), self.parameters(names)) for label, names in rows.items()}
        counts["unexpected in the file"] = len(self.unexpected), sum(self.unexpected.values())
        for label, (tensors, count) in counts.items():
            table.add_row(label, str(tensors), f"{count:,}", f"{100 * count / total:.4f} %")
        console.print(table)
        if self.also:
            others = ", ".join(map(repr, self.also))
            console.print(f"  weights taken: {self.taken!r}; not taken: {others}")
        listed: dict[str, Iterable[str]] = {
            "wrong": self.wrong,
            "channel that starts fresh": self.fresh,
            "channel that is left out": self.left_out,
            "ignored": self.ignored,
            "note": self.notes,
            "accepted": self.accepted,
            "[dim]remapped": [f"{old} -> {new}" for old, new in self.remapped.items()],
        }
        for label, lines in listed.items():
            for line in lines:
                console.print(f"  {label}: {line}")

    def refuse_unless_complete(self) -> None:
        """Raises CheckpointError naming what keeps the import from being complete."""
        if self.complete:
            return
        wrong = self.wrong
        told = f"{self.source} loads {100 * self.share:.4f} % of the parameters, all are needed"
        if len(wrong) == len(self.changed):
            told = f"{self.source} has weights of every shape needed, made for something else"
        listed = "\n".join(f"  {line}" for line in wrong[:12])
        more = f"\n  and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        advice = f" ({', '.join(self.advice)})" if self.advice else ""
        raise CheckpointError(
            f"{told}:\n{listed}{more}\nMake the configuration equal to theirs{advice}. Only what "
            "--allow-missing names may be absent, and what --allow-change names may differ "
            "(allow_missing and allow_change of init_from)."
        )


def match(
    source: str,
    state: dict[str, Tensor],
    expected: dict[str, torch.Size],
    allow_missing: list[str],
    may_be_constant: tuple[str, ...] | None = (),
) -> tuple[dict[str, Tensor], ImportReport]:
    """Match translated tensors with the network's, by name and shape.

    Args:
        allow_missing: last parts of names that need not be in the file, as "elevation_alpha".
        may_be_constant: last parts of names of matrices that start at zero; None where the values
            were compared with recorded hashes, so that all may.

    Returns:
        The tensors to load, in fp32, and the report.
    """
    report = ImportReport(source, {name: shape.numel() for name, shape in expected.items()})
    tensors = {}
    for name, shape in expected.items():
        if name not in state:
            allowed = name.rsplit(".", 1)[-1] in allow_missing
            (report.allowed_missing if allowed else report.missing).append(name)
        elif state[name].shape != shape:
            report.misshapen[name] = f"{tuple(state[name].shape)} in the file, {tuple(shape)} here"
        else:
            leaf = name.rsplit(".", 1)[-1]
            varies = may_be_constant is not None and len(shape) > 1 and leaf not in may_be_constant
            # Half of a row of sines and cosines is zero, never a whole one.
            run = max(ZERO_RUN, shape[-1]) if leaf.endswith("_embed") else ZERO_RUN
            why = unfit(state[name], varies, run)
            if why:
                report.unfit[name] = why
                continue
            tensors[name] = state[name].detach().float()
            report.loaded.append(name)
    unexpected = state.keys() - expected.keys()
    report.unexpected = {name: state[name].numel() for name in unexpected}
    return tensors, report


def unfit(tensor: Tensor, must_vary: bool, zero_run: int = ZERO_RUN) -> str:
    """Why a tensor's values cannot be weights; empty if they can."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantised" if tensor.is_quantized else "sparse"
        return f"is {kind}, without plain values"
    if tensor.dtype not in WEIGHT_TYPES:
        return f"is {str(tensor.dtype).removeprefix('torch.')}, not floating-point weights"
    values = tensor.detach().float()
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        overflow = " (fp16 overflows at 65504)" if tensor.dtype == torch.float16 else ""
        return f"has {bad} values that are not finite{overflow}"
    if must_vary and values.numel() > 1:
        flat = values.flatten()
        if bool((flat == flat[0]).all()):
            return f"is {float(flat[0]):g} everywhere"
        whole = flat[: flat.numel() // zero_run * zero_run].view(-1, zero_run)
        holes = int((whole == 0.0).all(1).sum())
        if holes:
            return f"has {holes * zero_run} zeros in a row: the file was not copied whole"
    return ""
