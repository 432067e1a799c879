"""The order of samples is a function of (seed, position), whoever reads it; batches hold what the store holds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from data import DataError
from data.batch import Normalizer, ahead_on_device
from data.channels.channels import Channels
from data.samples import SampleIndex, index_samples, positions_of_rank, step_start
from data.store.layout import Store
from data.stream import Stream
from data.variables import MODEL_INPUTS, MODEL_TARGETS, PUBLISHED
from data.wind_scan.cache import ScanCache


@given(st.integers(1, 400), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**9))
@settings(max_examples=200, deadline=None)
def test_ranks_are_disjoint_complete_and_equal(world: int, micro: int, accumulation: int, seen: int) -> None:
    shares = [positions_of_rank(seen, micro, accumulation, world, rank) for rank in range(world)]
    assert {s.shape for s in shares} == {(accumulation, micro)}
    together = np.sort(np.concatenate([s.ravel() for s in shares]))
    np.testing.assert_array_equal(together, seen + np.arange(world * micro * accumulation))


@given(st.integers(1, 50), st.integers(0, 5), st.integers(0, 2**63 - 1))
@settings(max_examples=50, deadline=None)
def test_every_epoch_visits_every_sample_once(size: int, epoch: int, seed: int) -> None:
    index = SampleIndex(np.arange(size), np.ones(size, int), seed)
    visited = index.shuffled(np.arange(epoch * size, (epoch + 1) * size))
    assert sorted(visited) == list(range(size))


def test_order_never_changes() -> None:
    """Frozen: a change would make every resumed run see other samples than the one it continues."""
    index = SampleIndex(np.arange(10), np.ones(10, int), seed=7)
    assert index.order(0).tolist() == [8, 4, 1, 6, 3, 2, 7, 5, 9, 0]
    assert index.order(1).tolist() == [3, 9, 1, 6, 2, 5, 4, 8, 0, 7]


def test_samples_stay_inside_their_split_and_skip_missing_hours(tiny: Store) -> None:
    ((first, last),) = tiny.splits["train"]
    missing = {group: share.copy() for group, share in tiny.missing.items()}
    missing["chemistry"][first + 20] = 1.0  # a wholly missing hour can be neither analysis nor truth
    index = index_samples(replace(tiny, missing=missing), "train", [6, 12], None, "none", 0)
    assert index.t.min() == first
    assert (index.t + index.lead).max() == last - 1
    assert first + 20 not in index.t
    assert first + 20 not in index.t + index.lead
    assert len(index) == 2 * (last - first) - 6 - 12 - 4


def test_split_too_short_for_a_lead_time_is_refused(tiny: Store) -> None:
    with pytest.raises(DataError, match=r"no sample with lead times \[500\] h"):
        index_samples(tiny, "validation", [6, 500], None, "none", 0)


def test_batches_hold_what_the_store_holds(tiny: Store, tiny_scan: ScanCache) -> None:
    group = zarr.open_group(tiny.path, mode="r")
    weather, chemistry = np.asarray(group["weather"]), np.asarray(group["chemistry"])
    index = index_samples(tiny, "train", [6, 12], tiny_scan, "regional", 1)
    stream = Stream(tiny, index, tiny_scan, "regional", prefetch=3, patches=128, pin=False)
    for rank in range(2):
        batches = islice(stream.training(40, 3, 2, 2, rank), 5)
        plan = np.concatenate([positions_of_rank(40 + 12 * k, 3, 2, 2, rank) for k in range(3)])
        for batch, positions in zip(batches, plan, strict=False):
            numbers = index.shuffled(positions)
            t, lead = index.t[numbers], index.lead[numbers]
            np.testing.assert_array_equal(batch.fields["weather"].numpy(), weather[t])
            np.testing.assert_array_equal(batch.fields["chemistry"].numpy(), chemistry[t])
            np.testing.assert_array_equal(batch.target.numpy(), chemistry[t + lead])
            np.testing.assert_array_equal(batch.lead_hours.numpy(), lead)
            np.testing.assert_array_equal(batch.rank.numpy(), tiny_scan.ranks("regional", t))
            assert batch.position == positions[0]


def test_prefetch_depth_changes_nothing(tiny: Store) -> None:
    index = index_samples(tiny, "train", [6], None, "none", 1)
    hours = [
        [b.hours.tolist() for b in islice(Stream(tiny, index, None, "none", depth, 128, False).training(0, 2, 1, 1, 0), 20)]
        for depth in (0, 1, 7)
    ]
    assert hours[0] == hours[1] == hours[2]


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_listed_samples_are_shared_equally_and_counted_once(tiny: Store, world: int) -> None:
    index = index_samples(tiny, "validation", [6, 12], None, "none", 1)
    numbers = index.evenly(17)
    stream = Stream(tiny, index, None, "none", 2, 128, False)
    shares = [list(stream.listed(numbers, 2, world, rank)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    counted = [
        (int(h), int(lead))
        for share in shares
        for b in share
        for h, lead, c in zip(b.hours, b.lead_hours, b.counted, strict=True)
        if c
    ]
    assert sorted(counted) == sorted(zip(index.t[numbers].tolist(), index.lead[numbers].tolist(), strict=True))


def test_normalisation_weights_and_units(tiny: Store) -> None:
    index = index_samples(tiny, "train", [12], None, "none", 1)
    batch = next(Stream(tiny, index, None, "none", 0, 128, False).training(0, 4, 1, 1, 0))
    normalizer = Normalizer(tiny, Channels(MODEL_INPUTS), list(MODEL_TARGETS), torch.device("cpu"))
    example = normalizer(batch)
    for channel, name in enumerate(MODEL_INPUTS):
        s = tiny.statistics[name]
        if name in tiny.static:
            raw = torch.from_numpy(tiny.static[name]).expand(4, -1, -1)
        else:
            source = batch.fields["chemistry" if name in MODEL_TARGETS else "weather"]
            raw = source[:, PUBLISHED.channel(name)]
        expected = ((raw.double() - s["mean"]) / s["std"]).nan_to_num(0.0)
        torch.testing.assert_close(example.inputs[:, channel].double(), expected, atol=1e-4, rtol=1e-4)
    known = torch.isfinite(batch.target)
    back = normalizer.physical(example.targets)
    torch.testing.assert_close(back[known], batch.target[known], rtol=1e-4, atol=1e-3)
    assert (example.weight[~known] == 0).all()
    area = np.cos(np.deg2rad(tiny.lat))[:, None] * tiny.static["domain_mask"]
    np.testing.assert_allclose(normalizer.area.numpy(), area / area.mean(), rtol=1e-5)


def test_constant_input_is_refused(tiny: Store) -> None:
    statistics = tiny.statistics | {"population": tiny.statistics["population"] | {"std": 0.0}}
    with pytest.raises(DataError, match="'population' is constant"):
        Normalizer(replace(tiny, statistics=statistics), Channels(["population"]), ["o3"], torch.device("cpu"))


def test_unknown_variable_is_refused_with_the_nearest(tiny: Store) -> None:
    with pytest.raises(DataError, match="unknown variable 'pm2_5'. Did you mean 'pm25'"):
        Normalizer(tiny, Channels(["pm2_5"]), ["o3"], torch.device("cpu"))


@given(st.integers(0, 60), st.integers(1, 9), st.lists(st.tuples(st.integers(0, 80), st.integers(1, 12)), max_size=4))
def test_a_step_starts_at_the_first_place_clear_of_what_is_stepped_over(seen: int, total: int, given: list) -> None:
    """Against trying one position after the other: only ends of ranges can be new starts."""
    ranges = [[first, first + length] for first, length in given]
    banned = {p for first, last in ranges for p in range(first, last)}
    starts = sorted({seen, *(last for _, last in ranges if last > seen)})
    clear = [s for s in starts if not banned & set(range(s, s + total))]
    assert step_start(seen, total, ranges) == clear[0]


def test_a_gpu_gets_the_next_batch_while_it_computes_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what is asked of a GPU, on one that only writes down: the computing stream waits for the copy, every
    tensor is recorded for it, and the next copy is started before this batch is given out."""
    done: list[str] = []

    class Recorded:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_stream(self, stream: Any) -> None:
            done.append(f"record {self.name} for {stream.name}")

    class Raw:
        def __init__(self, number: int) -> None:
            self.number = number

        def to(self, device: torch.device) -> SimpleNamespace:
            done.append(f"copy {self.number} on {streams[-1]}")
            names = ("target", "lead_hours", "rank", "counted", "paths")
            own = {name: Recorded(f"{name} {self.number}") for name in names}
            return SimpleNamespace(fields={"weather": Recorded(f"weather {self.number}")}, number=self.number, **own)

    @contextlib.contextmanager
    def current(stream: Any) -> Iterator[None]:
        streams.append(stream.name)
        yield
        streams.pop()

    streams = ["computing"]
    computing = SimpleNamespace(name="computing", wait_stream=lambda other: done.append(f"computing waits for {other.name}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(name="copying"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", current)
    batches: Any = iter([Raw(0), Raw(1)])
    given: Any = ahead_on_device(batches, torch.device("cuda"))
    for batch in given:
        done.append(f"compute {batch.number}")
    names = ("weather", "target", "lead_hours", "rank", "counted", "paths")
    recorded = [[f"record {name} {number} for computing" for name in names] for number in (0, 1)]
    wait = "computing waits for copying"
    first, second = ["copy 0 on copying", wait, *recorded[0]], [wait, *recorded[1]]
    assert done == [*first, "copy 1 on copying", "compute 0", *second, "compute 1"]
