"""A checkpoint of the release of 2026: comes in whole, trains on, resumes to the bit, goes out under its own names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from data.wind_scan.cache import ScanCache
from tests import release
from tests.launching import losses, module, tiny_config, train_several
from tests.unit.test_release import ARCH
from trainer.config_file import load

MODEL: dict[str, Any] = {
    "grid": [16, 32],
    "width": 24,
    "depth": 2,
    "heads": 3,
    "dropout": 0.1,
    "drop_path": 0.1,
    "elevation_bias": "descent",
    "alpha_init": 2.0,
    "bias_floor": -10.0,
    "elevation_as_given": True,
    "relative_position": True,
    "first_block_dropout": 0.1,
    "embedding_norm": True,
}
OURS = "blocks.0.attn."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path, tiny_scan: ScanCache) -> Path:
    """A checkpoint in the release's dialect; four steps from it under ZeRO 3, two and two, and four under ZeRO 1."""
    folder = tmp_path_factory.mktemp("release")
    state = release.checkpoint(replace(ARCH, grid=(16, 32)))
    torch.save({"state_dict": state | {"china_mask": torch.ones(16, 32)}}, folder / "release.ckpt")
    config = tiny_config(folder, tiny_path, model=MODEL, wind_scan={"mode": "release"}, checkpoint={"every": 2})
    jobs: list[dict[str, Any]] = []
    for name, zero, ends in (("whole", "3", [4]), ("parts", "3", [2, 4]), ("other", "1", [4])):
        own = [f"run_dir={folder}/{name}", f"init_from.path={folder}/release.ckpt"]
        jobs += [{"zero": zero, "overrides": [*own, f"steps={end}"]} for end in ends]
    train_several(config, jobs)
    return folder


def test_it_comes_in_whole(folder: Path) -> None:
    said = json.loads((folder / "whole/import.json").read_text())
    assert (said["share_loaded"], said["complete"], said["missing"], said["unexpected"]) == (1.0, True, [], [])
    assert said["remapped"]["model.patch_embed.norm.weight"] == "token_embeds.norm_weight"


def test_it_trains_and_resumes_to_the_bit(folder: Path) -> None:
    last = {}
    for kind in ("weights", "optimizer"):
        whole, parts = (
            load_file(folder / f"{name}/checkpoints/step-00000004/{kind}.safetensors") for name in ("whole", "parts")
        )
        assert whole.keys() == parts.keys()
        assert not [name for name, tensor in whole.items() if not torch.equal(tensor, parts[name])]
        last[kind] = whole
    foreign = release.checkpoint(replace(ARCH, grid=(16, 32)))
    for ours, theirs in (("relative_position", "rel_pos_bias.bias_table"), ("elevation_alpha", "alpha")):
        assert not torch.equal(last["weights"][OURS + ours].flatten(), foreign[f"model.{OURS}{theirs}"].flatten())


def test_partitioned_parameters_are_there_where_attention_is_computed_again(folder: Path) -> None:
    """ZeRO 3 gives them away after the forward pass; the chunks of queries need them once more in the backward pass."""
    whole, other = (load_file(folder / f"{name}/checkpoints/step-00000004/weights.safetensors") for name in ("whole", "other"))
    for name, tensor in whole.items():  # the bias of the keys has no gradient but for rounding, which AdamW makes large
        assert float((tensor - other[name]).norm()) <= 1e-4 * float(other[name].norm()), name
    assert losses(folder / "whole") == pytest.approx(losses(folder / "other"), rel=1e-5)


def test_it_goes_out_under_its_own_names(folder: Path) -> None:
    done = module("trainer", "checkpoint", "export", f"{folder}/whole/checkpoints/latest", "--to", f"{folder}/back.ckpt")
    assert done.returncode == 0, done.stderr
    back = torch.load(folder / "back.ckpt", weights_only=True)["state_dict"]
    foreign = release.checkpoint(replace(ARCH, grid=(16, 32)))
    assert {name: tensor.shape for name, tensor in back.items()} == {name: tensor.shape for name, tensor in foreign.items()}
    ours = load_file(folder / "whole/checkpoints/step-00000004/weights.safetensors")
    assert torch.equal(back["model.blocks.0.attn.rel_pos_bias.bias_table"], ours[f"{OURS}relative_position"])
    assert torch.equal(back["model.blocks.0.attn.alpha"], ours[f"{OURS}elevation_alpha"].view(1))


def test_a_network_without_its_parts_says_which_settings_it_lacks(folder: Path) -> None:
    plain = {key: MODEL[key] for key in ("grid", "width", "depth", "heads")} | {"elevation_bias": "none"}
    config = folder / "plain.yaml"
    config.write_text(json.dumps(load(folder / "config.yaml").model_dump(mode="json") | {"model": plain}))
    done = module("trainer", "import", "--from", f"{folder}/release.ckpt", "--to", f"{folder}/out", "--config", str(config))
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    for setting in ("model.elevation_bias=descent", "model.relative_position=true", "release_128x256.yaml"):
        assert setting in said
