"""A run whose updates are skipped again and again ends, saved, with the names of the records."""

import json
import math

import pytest
from stopped_runs import lines_of, on_devices, stop_after

from mmgem_jax import train
from mmgem_jax.errors import RunEnded

# The first update that is taken makes numbers so large that no loss after it is finite.
CHANGES = {
    "steps": 30,
    "optimizer.warmup_steps": 0,
    "optimizer.clip_norm": 0.0,
    "optimizer.groups.rest.learning_rate": 1e30,
    "log.every": 1,
    "log.conflict_every": 0,
    "checkpoint.every": 0,
    "eval.splits": (),
    "eval.final_splits": (),
    "eval.sample_split": "",
    "faults.stop_after": 4,
}


def ended(config, workdir, stop=None):
    with pytest.MonkeyPatch.context() as patch:
        on_devices(patch, 1)
        if stop:
            stop_after(patch, stop)
        with pytest.raises(RunEnded) as error:
            train.train(config, workdir)
    return error.value


def test_it_ends_after_so_many_and_a_restart_between_them_is_not_seen(emoji_config, tmp_path):
    config = emoji_config(CHANGES)
    whole = ended(config, tmp_path / "whole")
    assert whole.status == 1
    assert "4 updates in a row were skipped" in str(whole) and "faults" in str(whole)
    lines = lines_of(tmp_path / "whole")
    skipped = [line["train/updates_skipped_in_a_row"] for line in lines]
    assert skipped[0] == 0 and skipped[-2:] in ([3, 4], [4, 5])
    assert lines[-1]["train/loss"] is None or math.isfinite(lines[-1]["train/loss"])
    (step,) = [path.name for path in (tmp_path / "whole" / "checkpoints").iterdir()]
    assert f"step {step} is saved" in str(whole)
    of_whole = json.loads((tmp_path / "whole" / "faults" / f"{step}.json").read_text())
    assert len(of_whole) == 4
    for found in of_whole.values():
        assert len(found["records"]) == 16
        assert all(name.startswith("emoji/fixture train record ") for name in found["records"])

    parts = ended(config, tmp_path / "parts", stop=min(map(int, of_whole)))
    assert parts.status == 143
    assert str(ended(config, tmp_path / "parts")).partition(";")[0] == str(whole).partition(";")[0]
    (path,) = (tmp_path / "parts" / "faults").iterdir()
    of_parts = json.loads(path.read_text())
    shared = of_whole.keys() & of_parts.keys()
    assert len(shared) >= 3 and min(of_whole) in of_whole
    assert all(of_parts[step] == of_whole[step] for step in shared)
