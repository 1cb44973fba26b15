"""The folder of a run: what claims it, whose it is, and what may change between its parts."""

import dataclasses
import json
import time
from pathlib import Path

import jax

from mmgem_jax import processes
from mmgem_jax.data.tokenizer import fingerprint
from mmgem_jax.errors import UserError
from mmgem_jax.models.rotary import RopeScaling

# What may change between the parts of a run; the rest of the config makes the run. The tokenizer
# is compared by its fingerprint; what the run began from is not looked at again.
FREE = {"eval", "log", "checkpoint", "mesh", "compile_cache", "init_from"}
FREE |= {"accumulation_steps", "compiled_step", "tpu_options"}
FREE |= {"model.vision.remat", "model.decoder.remat"}
FREE |= {"model.vision.attention", "model.decoder.attention"}
FREE |= {"data.dir", "data.tokenizer", "data.index_dir", "data.workers", "data.prefetch"}
FREE |= {"data.ahead", "data.max_broken_share", "faults.stop_after"}

# Fields that configs did not have from the start, and what they were before.
LATER_FIELDS = {
    "": {"accumulation_steps": 1},
    "mesh": {"slice": 1},
    "faults": {"stop_after": 10, "spike": 0.0, "window": 100},
    "checkpoint": {"keep_every": 0, "best": "", "keep_best": 1},
    "model.vision": {"attention": "plain"},
    "model.decoder": {"rope_scaling": dataclasses.asdict(RopeScaling()), "attention": "plain"},
    "loss": {"mask_overlap": 0.5},
    "data": {
        "regions_field": "",
        "whole_image": True,
        "max_regions": 16,
        "min_visible": 0.5,
        "mixture": {},
        "weight": 1.0,
        "files": [],
        "window": 16_384,
        "index_dir": ".data_index",
        "max_broken_share": 0.05,
        "max_pixels": 100_000_000,
        "max_aspect": 50.0,
        "ahead": 1,
        "packing": {
            "images": 0,
            "rows": 0,
            "row_length": 0,
            "targets": 0,
            "text_rows": 0,
            "waiting": 8,
        },
    },
    "data.augment": {"min_area": 1.0, "max_ratio": 4 / 3, "flip": 0.0, "draft": False},
}


def find_run(folder):
    """The workdir of a run, and the step that `folder` names or None.

    Raises:
      UserError: there is no run.
    """
    folder, step = Path(folder), None
    workdir, inner = folder.absolute(), folder.absolute().parent
    if folder.name.isdecimal() and inner.name == "checkpoints":
        workdir, step = inner.parent, int(folder.name)
    if (workdir / "config.json").is_file() and (workdir / "checkpoints").is_dir():
        return workdir, step
    raise UserError(
        f"checkpoint {folder}: no config.json and checkpoints/ there; expected a workdir of "
        "training, or a step of it (WORKDIR/checkpoints/STEP)"
    )


def has_begun(workdir):
    """Whether there is a run in the folder, with or without a checkpoint."""
    return (Path(workdir) / "config.json").exists()


def claim_workdir(workdir, config, tokenizer):
    """Makes the run's folder, or checks that it holds a run of this config; saves both there.

    Of several processes the first does it for all.

    Returns:
      What is saved: the config, and the fingerprint of the tokenizer, as JSON.

    Raises:
      UserError: the folder cannot be written, holds another config's run, or is not the same folder
        in every process; or the config is not the same.
    """
    ours = json.loads(json.dumps(config.to_dict())) | {"tokenizer": fingerprint(tokenizer)}
    processes.check_same("config", ours)
    processes.on_first(lambda: write_config(workdir, ours, tokenizer))
    check_shared(workdir, ours)
    return ours


def check_shared(workdir, config, seconds=60):
    """Raises UserError where this process does not see the config that the first has written.

    File systems of a network may take so many seconds to show a new file.
    """
    path, end = Path(workdir) / "config.json", time.monotonic() + seconds
    while not (path.is_file() and json.loads(path.read_text()) == config):
        if time.monotonic() > end:
            raise UserError(
                f"workdir {workdir}: process {jax.process_index()} finds no config.json of this "
                "run there; expected a folder that all hosts share"
            )
        time.sleep(1)


def write_config(workdir, ours, tokenizer):
    """Writes what `claim_workdir` saves, after it has looked for another run; see there."""
    path = Path(workdir) / "config.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        changed = differences(with_later_fields(path.read_text()), ours) if path.exists() else []
        if changed:
            raise UserError(
                f"workdir {workdir} holds another config's run: {'; '.join(changed[:5])}; "
                "expected the same config or an empty folder"
            )
        # Written whole and then named: a run that is killed here can still be resumed.
        written = path.with_suffix(".json.new")
        written.write_text(json.dumps(ours, indent=2) + "\n")
        written.replace(path)
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"workdir {workdir}: config.json is no run's; expected one") from None
    except OSError as error:
        raise UserError(f"workdir {workdir}: {error.strerror}; expected a folder") from None
    tokenizer.save_pretrained(path.parent / "tokenizer")


def with_later_fields(text):
    """What a run's config.json says, and what it meant before the fields that came later.

    Raises:
      ValueError: the text is not JSON.
    """
    fields = json.loads(text)
    for name, later in LATER_FIELDS.items():
        section = fields
        for part in filter(None, name.split(".")):
            section = section.get(part, {})
        section |= later | section
    return fields


def differences(theirs, ours, prefix=""):
    """Fields that differ, outside FREE, as `field: theirs there, ours here`."""
    found = []
    for key in sorted(set(theirs) | set(ours)):
        if prefix + key in FREE:
            continue
        a, b = theirs.get(key), ours.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return found
