"""Would its test notice? Every guard of the fault table is broken once, in a copy, and its tests must fail.

    python -m tests.mutations            all of them, two at a time (`make test-all` does)
    python -m tests.mutations F03 F44    some

A mutation names the fault, the file, a text that stands there exactly once, and what stands there instead.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    fault: str
    file: str
    before: str
    after: str


MUTATIONS = [
    Mutation("F01", "trainer/weights/report.py", "(report.allowed_missing if allowed else report.missing)",
             "report.allowed_missing"),
    Mutation("F02", "trainer/weights/report.py", "elif state[name].shape != shape:", "elif state[name].ndim != len(shape):"),
    Mutation("F03", "trainer/model/attention.py", "torch.tensor(1000.0)", "torch.tensor(1.0)"),
    Mutation("F04", "trainer/model/flash.py", "return grad_qkv.to(qkv.dtype), None, grad_slope",
             "return grad_qkv.to(qkv.dtype), None, grad_slope * (slope > 0)"),
    Mutation("F05", "trainer/engine.py", '"weight_decay": 0.0, "peak_lr": run.optimizer.alpha_lr',
             '"weight_decay": 0.0, "peak_lr": run.optimizer.lr'),
    Mutation("F06", "trainer/model/compat.py", "key=lambda p: (found[p], -len(p))) if found else", "key=len) if not found else"),
    Mutation("F07", "trainer/checkpoint/consistency.py", "    if any(everyone):", "    if everyone[0]:"),
    Mutation("F08", "trainer/scores/expected_loss.py", "abs(val_loss - expect.val_loss) <= expect.tolerance:\n        return",
             "val_loss < 1e9:\n        return"),
    Mutation("F09", "trainer/checkpoint/same_run.py", "for name, value in present.fingerprints.items()]",
             "for name, value in ()]"),
    Mutation("F10", "trainer/dataset.py", 'torch.from_numpy(store.static["elevation"])',
             'torch.from_numpy(store.static["elevation"] / 1000.0)'),
    Mutation("F11", "trainer/model/topoflow.py", "if tuple(rank.shape) != (batch, tokens):", "if rank.ndim != 2:"),
    Mutation("F12", "trainer/dataset.py", "None if cache is None else open_cache", "None if cache is None or not cache.exists() else open_cache"),
    Mutation("F13", "trainer/preflight/job.py", '"MIOPEN_USER_DB_PATH": (r"(?!/tmp', '"MIOPEN_USER_DB_PATH": (r"(?!/home|/tmp'),
    Mutation("F14", "data/stream.py", "ThreadPoolExecutor(min(READERS, prefetch + 1)", "ThreadPoolExecutor(min(READERS, prefetch)"),
    Mutation("F15", "trainer/preflight/job.py", '"NCCL_IB_DISABLE": ("1"', '"NCCL_IB_DISABLE": ("2"'),
    Mutation("F16", "trainer/config.py", "    step: float = Field(600.0, gt=0)", '    step: float | str = 600.0'),
    Mutation("F17", "trainer/config_data.py", 'ConfigDict(extra="forbid", frozen=True)', 'ConfigDict(extra="ignore", frozen=True)'),
    Mutation("F18", "trainer/engine.py", "return peak * (step + 1) / schedule.warmup_steps",
             "return peak * step / schedule.warmup_steps"),
    Mutation("F19", "trainer/process/watchdog.py", "if waited > deadline or (", "if waited > 20 * deadline or ("),
    Mutation("F20", "trainer/process/watchdog.py", "if path.stat().st_mtime > entered_at - 1.0}", "}"),
    Mutation("F21", "data/store/reader.py", "self._open = lru_cache(maxsize=OPEN_SHARDS)(self._open_shard)",
             "self._open = self._open_shard\n        _ = [self._open_shard(s) for s in range(hours // self.shard_hours)]"),
    Mutation("F22", "trainer/process/failure.py", "level=logging.INFO if rank == 0 else logging.ERROR",
             "level=logging.INFO"),
    Mutation("F23", "trainer/model/topoflow.py", "        self._initialise()\n",
             "        self._initialise()\n        self.scale = torch.ones(3)\n"),
    Mutation("F24", "trainer/engine.py", "engine.optimizer.found_inf = (~torch.isfinite(norm)).float()",
             "engine.optimizer.found_inf = torch.zeros(())"),
    Mutation("F25", ".gitignore", "core.[0-9]*\n", ""),
    Mutation("F26", "trainer/checkpoint/same_run.py", ', ("parameters", ())):', "):"),
    Mutation("F27", "trainer/checkpoint/same_run.py", '        "run_dir", "steps", "resume",', '        "optimizer", "batch", "run_dir", "steps", "resume",'),
    Mutation("F28", "trainer/model/elevation_bias.py", 'if kernel == "flash halves" and slope == 0:', "if False:"),
    Mutation("F29", "trainer/model/compat.py", r're.compile(r"(blocks\.\d+\.mlp\.)0\.', r're.compile(r"(blocks\.[1-9]\.mlp\.)0\.'),
    Mutation("F30", "trainer/model/topoflow.py", "                nn.init.zeros_(module.bias)", "                pass"),
    Mutation("F31", "trainer/model/layers.py", "if self.drop_prob == 0.0 or not self.training:", "if True:"),
    Mutation("F32", "trainer/model/topoflow.py", "return x + self.drop_path(self.mlp(self.norm2(x)))",
             "return self.drop_path(self.mlp(self.norm2(x)))"),
    Mutation("F33", "trainer/checkpoint/store.py", "        kept.add(best)", "        pass"),
    Mutation("F34", "trainer/process/stop.py", "time.time() > self.end_time:", "time.time() > 1e12:"),
    Mutation("F35", "trainer/forecaster.py", 'if then != value and not (name == "data" and dataset.store.continues(then)):', "if False:"),
    Mutation("F36", "trainer/scores/comparison.py", "if ours.get(name) != theirs.get(name)]", "if False]"),
    Mutation("F37", "trainer/preflight/network.py", "if share == 0.0]", "if share < 0.0]"),
    Mutation("F38", "trainer/__main__.py", '    "status": Command(', '    "state": Command('),
    Mutation("F39", "trainer/config_data.py", "import re\n", 'import re\n\nSCRATCH = "/scratch/project/china.zarr"\n'),
    Mutation("F40", "data/wind_scan/cache.py", "return invert(self.regional_orders)", "return invert(order_along_wind(*self.geometry.region_patches, self.geometry))"),
    Mutation("F41", "trainer/model/topoflow.py", "tokens = tokens + PositionsAlongWind",
             "tokens = tokens.gather(1, rank[..., None].expand_as(tokens)) + PositionsAlongWind"),
    Mutation("F42", "data/wind_scan/cache.py", "sector_codes(block[:, u], block[:, v]",
             "sector_codes(block[:, u] - block[:, u].mean(), block[:, v]"),
    Mutation("F43", "data/batch.py", "inputs = torch.where(valid, self._inputs.normalised(raw), 0.0)",
             "inputs = self._inputs.normalised(raw)"),
    Mutation("F44", "trainer/checkpoint/store.py", "if newest_step in (None, m.step)), None)", "), None)"),
    Mutation("F45", "trainer/checkpoint/same_run.py", '"dump_state", "aio",', '"dump_state", "aio", "communication_data_type",'),
    Mutation("F46", "trainer/checkpoint/manifest.py",
             'STEP_NAME.fullmatch(checkpoint.name)\n    return int(named[1]) if named and f"step-{int(named[1]):08d}" == checkpoint.name else None',
             'STEP_NAME.match(checkpoint.name)\n    return int(named[1]) if named else None'),
    Mutation("F47", "trainer/process/launch.py", "    if blind:", "    if False:"),
    Mutation("F48", "trainer/weights/report.py", "    if bad:", "    if False:"),
    Mutation("F49", "data/prepare/inputs/netcdf3.py", "    if size < needed:", "    if size < needed // 2:"),
    Mutation("F50", "data/prepare/inputs/identity.py", '("st_mtime_ns", "st_ctime_ns", "st_ino")', '("st_mtime_ns",)'),
    Mutation("F51", "data/prepare/sources/times.py", "return (start.drop_vars(list(start.coords)) + lead.drop_vars(list(lead.coords)))",
             "return (start.drop_vars(list(start.coords)) + 0 * lead.drop_vars(list(lead.coords)))"),
    Mutation("F52", "data/strict.py", "            if key in lines:", "            if False:"),
    Mutation("F53", "trainer/run/start.py", "if now is not None and now != getattr(before, key):", "if False:"),
    Mutation("F54", "data/process/ranks.py", "        if self.local_rank >= visible:", "        if False:"),
    Mutation("F55", "data/process/locks.py", "    return started == owner.started", "    return True"),
    Mutation("F56", "trainer/checkpoint/saving.py",
             "    except OSError as error:  # a file system without links", "    except KeyError as error:  # a file system without links"),
    Mutation("F57", "trainer/checkpoint/manifest.py", "    except (ValueError, RecursionError) as error:  # not UTF-8",
             "    except KeyError as error:  # not UTF-8"),
    Mutation("F58", "data/given/pickles.py", '        return type(name, (Inert,), {})', '        return super().find_class(module, name)'),
    Mutation("F59", "trainer/weights/files.py", "        if first.lstrip().startswith(beginning):", "        if False:"),
    Mutation("F60", "trainer/preflight/network.py", "found, progress = start.look_back(subject.asked, present, options.allow_change, same_data)",
             'found, progress = None, Progress()'),
    Mutation("F61", "trainer/process/stop.py", "                self.reason = signal.Signals(number).name", "                self.reason = ''"),
    Mutation("F62", "trainer/process/failure.py", "if lines and not any(sign in lines[-1] for sign in BROKEN):", "if False:"),
    Mutation("F63", "trainer/checkpoint/consistency.py", "    if dist.get_rank() == 0:\n        try:", "    if True:\n        try:"),
    Mutation("F64", "trainer/checkpoint/zero.py", 'place = tensor.device if inner.defaults["fused"] else torch.device("cpu")',
             'place = torch.device("cpu")'),
    Mutation("F65", "ds_configs/zero2.json", '"communication_data_type": "fp32"', '"communication_data_type": "bf16"'),
    Mutation("F66", "trainer/checkpoint/consistency.py", 'outcome[1] = CheckpointError(f"rank 0: {error}")', "raise"),
    Mutation("F67", "trainer/run/saver.py", "        except (OSError, CheckpointError) as error:\n            log.info",
             "        except KeyError as error:\n            log.info"),
    Mutation("F68", "trainer/run/skipped_steps.py", "    remembered.roll_backs = now.roll_backs + 1", "    remembered.roll_backs = 0"),
    Mutation("F69", "data/process/ranks.py", 'int(environ.get("SLURM_STEP_NUM_TASKS", "1"))', 'int(environ.get("SLURM_NTASKS", "1"))'),
    Mutation("F70", "trainer/weights/fit.py", "if len(set(names)) == len(names) == count:", "if False:"),
    Mutation("F71", "trainer/checkpoint/loading.py", "            if not step_over:\n", "            if False:\n"),
    Mutation("F72", "trainer/weights/reading.py", "which = MEAN if means and not raw else TRAINED", "which = TRAINED"),
    Mutation("F73", "trainer/weights/directories.py", "            if value != then:\n", "            if False:\n"),
    Mutation("F74", "trainer/checkpoint/same_run.py", "    if found is None and saved is not None:\n", "    if False:\n"),
    Mutation("F75", "trainer/checkpoint/record.py", "    file.chmod(mode)\n", ""),
    Mutation("F76", "trainer/process/watchdog.py", "self._suspended += late", "pass"),
    Mutation("F77", "trainer/checkpoint/state.py", "    for key in new:\n", "    for key in () if had else new:\n"),
    Mutation("F78", "trainer/model/compat.py", 'WRAPPERS = {"_orig_mod", ', "WRAPPERS = {"),
    Mutation("F79", "trainer/process/rank.py", "    launch.require_alike(_settings(run, options), world)\n", ""),
    Mutation("F80", "data/process/ranks.py", "return any(name in environ for name in LAUNCHED_BY_MPI)", "return False"),
    Mutation("F81", "data/store/layout.py", "return fingerprint in (*self.earlier, self.fingerprint)",
             "return fingerprint == self.fingerprint"),
    Mutation("F82", "data/process/locks.py", "if not self._vital or self._is_mine() or self._closed.is_set():", "if True:"),
    Mutation("F83", "trainer/verification/summary.py", "(known >= 0.5 * known[lead == chosen].max())", "(known >= 0.0)"),
]  # fmt: skip


def broken_copy(mutation: Mutation, folder: Path) -> Path:
    """The repository with one guard broken; the environment is that of this one."""
    copy = folder / mutation.fault
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "add", "-A"], cwd=copy, check=True)
    file = copy / mutation.file
    content = file.read_text()
    assert content.count(mutation.before) == 1, (
        f"{mutation.fault}: '{mutation.before}' stands {content.count(mutation.before)} times"
    )
    file.write_text(content.replace(mutation.before, mutation.after))
    return copy


def notices(mutation: Mutation, folder: Path) -> tuple[str, float]:
    """("failed as it must" or what else happened, seconds) of the fault's tests on the broken copy."""
    began = time.monotonic()
    copy = broken_copy(mutation, folder)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", mutation.fault.lower() + "_", "-m", "not slow", "-p", "no:cacheprovider", "--timeout=120",
               "--basetemp", str(folder / f"{mutation.fault}-tmp")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONSAFEPATH": ""}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(folder / f"{mutation.fault}-tmp", ignore_errors=True)
    said = next((line for line in done.stdout.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))), "")
    seconds = time.monotonic() - began
    if done.returncode == 1 and said.startswith("FAILED"):
        return f"failed as it must: {re.sub(r' - .*', '', said.rpartition('::')[2])}", seconds
    return f"NOT NOTICED (pytest {done.returncode}) {said or done.stdout[-200:]}", seconds


def main(wanted: list[str]) -> int:
    chosen = [m for m in MUTATIONS if not wanted or m.fault in wanted]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as threads:
        outcomes = threads.map(lambda mutation: notices(mutation, Path(folder)), chosen)
        missed = 0
        for mutation, (said, seconds) in zip(chosen, outcomes, strict=True):
            print(f"{mutation.fault}  {seconds:5.1f} s  {mutation.file}: {said}", flush=True)
            missed += said.startswith("NOT")
    print(f"{len(chosen) - missed} of {len(chosen)} broken guards were noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
