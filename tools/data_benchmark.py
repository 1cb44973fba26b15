"""What data costs a core: our pipeline on every kind of source beside open_clip's on tars.

Images per second of processor time, of one process that makes batches and has no workers: what a
worker of a real run does. All go over the same pictures (photo_like.py), in turns.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from measure import WARM_UP, row
from photo_like import write_pairs, write_tars
from PIL import Image

from mmgem_jax import run
from mmgem_jax.command_line import load_config_file
from mmgem_jax.data import pairs
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.data.tar_members import scan
from mmgem_jax.train import train

BASE = Path(__file__).parents[1] / "configs" / "base.py"
ROUNDS = 5
SHORT_SIDES = (256, 512)  # pixels of the pictures
PICTURES, OF_A_TAR, BATCH = 256, 64, 64
VOCABULARY = 4096
AREA = 0.9  # smallest share of an image that a crop keeps, open_clip's default
STEPS, LOGGED = 60, 10  # of the run whose wait for data is measured
INSTALL = "pip install -e '.[test]'"
REFERENCE = "open_clip's: fp32, normalised, one text; ours uint8, text and caption"


def benchmark_data(config=None):
    """Rows on a config's own data, or without one on photo-like pictures beside open_clip's."""
    return config_rows(config) if config else photo_rows()


# ---- a config's own data -------------------------------------------------------------------------


def config_rows(config):
    """What a batch of the config costs a core, and how long its steps wait for data."""
    own = config.copy_and_resolve_references()
    own.data.workers = 0
    batches = training_batches(own, run.load_run_tokenizer(own))
    next(batches)
    used = statistics.median(processor_seconds({"": lambda: next(batches)}, 3 * ROUNDS)[""])
    return [
        row("a batch, on one core", used, "s"),
        row("images a second and core", config.batch_size / used, "1/s"),
        row("a step's time that waits for data", wait_share(config), "share"),
    ]


def wait_share(config):
    """The median share of a step's time that the config's run waits for data, of some steps."""
    config = config.copy_and_resolve_references()
    config.steps, config.log.every, config.log.conflict_every = STEPS, LOGGED, 0
    config.eval.splits = config.eval.final_splits = ()
    config.eval.sample_split = ""
    config.checkpoint.every = STEPS
    with tempfile.TemporaryDirectory() as workdir:
        with contextlib.redirect_stdout(sys.stderr):  # our rows alone go to stdout
            train(config, workdir)
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines]
    name = "perf/data_wait_share"
    return statistics.median(line[name] for line in logged if name in line)


# ---- photo-like pictures -------------------------------------------------------------------------


def photo_rows():
    """Rows for each kind of source and size of the pictures."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for short_side in SHORT_SIDES:
            rows += rows_of_size(Path(folder) / str(short_side), short_side)
    return rows


def rows_of_size(folder, short_side):
    """The rows of pictures of one size, which are written to the folder first."""
    write_data(folder, short_side)
    functions = {kind: pass_of(config) for kind, config in configs_of(folder).items()}
    theirs, whose = their_pass(folder)
    if theirs:
        functions["theirs"] = theirs
    seconds = processor_seconds(functions, ROUNDS)
    speed = {kind: PICTURES / statistics.median(found) for kind, found in seconds.items()}
    reference = speed.pop("theirs", None)
    named = f"{short_side} px, {{}}: images a second and core"
    rows = [
        row(f"{short_side} px: bytes a pixel", bytes_a_pixel(folder), "B"),
        row(f"{short_side} px: members indexed, a core", indexing_rate(folder), "1/s"),
    ]
    for kind, found in speed.items():
        rows.append(row(named.format(kind), found, "1/s", reference, whose))
    return rows


def write_data(folder, short_side):
    """Pairs as JSON lines with files, as tars, and as a TFDS data set with its tokenizer."""
    lines = write_pairs(folder, PICTURES, short_side)
    write_tars(lines, folder / "tars", OF_A_TAR)
    pairs.build(str(folder / "tfds"), {"train": lines}, VOCABULARY)


def configs_of(folder):
    """For each kind of source the config that reads it: configs/base.py, one pair a picture."""
    tfds = folder / "tfds"
    tars = {"data.files": (f"{folder}/tars/*.tar",), "data.text_templates": ("{txt}",)}
    kinds = {
        "tars": tars,
        "tars, draft": tars | {"data.augment.draft": True},
        "JSON lines": {"data.files": (f"{folder}/train.jsonl",)},
        "array_record": {"data.files": (f"{tfds}/pairs/*/*.array_record*",)},
        "TFDS": {"data.name": "pairs", "data.dir": str(tfds)},
    }
    shared = {
        "batch_size": BATCH,
        "data.workers": 0,
        "data.augment.min_area": AREA,
        "data.tokenizer": str(next(tfds.glob("pairs/*/tokenizer"))),
        "data.index_dir": str(folder / "index"),
    }
    configs = {}
    for kind, fields in kinds.items():
        config = load_config_file(str(BASE))
        config.update_from_flattened_dict(shared | fields)
        config.data.caption_template = config.data.text_templates[0]
        configs[kind] = config
    return configs


def pass_of(config):
    """A function that takes as many batches of a config as go once over the pictures."""
    batches = training_batches(config, run.load_run_tokenizer(config))

    def one_pass():
        for _ in range(PICTURES // BATCH):
            next(batches)

    return one_pass


def their_pass(folder):
    """The same of open_clip's pipeline, or None, and what to call it or why it is absent."""
    try:
        import torch
        from webdataset_pipeline import training_pipeline
    except ImportError as error:
        return None, f"open_clip's: absent, {error}; {INSTALL}"
    torch.set_num_threads(1)  # as in a worker of its DataLoader
    config = configs_of(folder)["TFDS"]
    tokenizer = run.load_run_tokenizer(config)
    tars = sorted((folder / "tars").glob("*.tar"))
    size, length = config.model.vision.image_size, config.data.text_length

    def one_pass():
        for _ in training_pipeline(tars, tokenizer, size, BATCH, length):
            pass

    return one_pass, REFERENCE


def processor_seconds(functions, rounds):
    """Seconds of all this process's threads that calls of each function take, in turns.

    Args:
      functions: mapping from a name to a function without arguments.
      rounds: of calls that count, after those that do not.

    Returns:
      dict from a name to a list of seconds.
    """
    seconds = {name: [] for name in functions}
    for _ in range(WARM_UP + rounds):
        for name, function in functions.items():
            began = time.process_time()
            function()
            seconds[name].append(time.process_time() - began)
    return {name: found[WARM_UP:] for name, found in seconds.items()}


def indexing_rate(folder):
    """Members of the tars that are found a second of processor time; three make a sample."""
    tars = [str(path) for path in (folder / "tars").glob("*.tar")]
    seconds = processor_seconds({"": lambda: [scan(path) for path in tars]}, ROUNDS)[""]
    return 3 * PICTURES / statistics.median(seconds)


def bytes_a_pixel(folder):
    """Of the pictures' files."""
    size = pixels = 0
    for path in (folder / "images").iterdir():
        size += path.stat().st_size
        with Image.open(path) as picture:
            pixels += picture.width * picture.height
    return size / pixels
