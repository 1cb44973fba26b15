"""Writes a trained run as a folder that PyTorch and transformers load.

    python tools/export_torch.py --checkpoint workdirs/emoji --out workdirs/emoji_torch
    python tools/export_torch.py --checkpoint workdirs/emoji --out llama --what decoder \
        --dtype bfloat16

The folder is there whole, and equal to the run in outputs and captions, or not at all. --verify
needs torch, and memory for up to two copies of the parameters in fp32 beside the run's own: one of
JAX, as they were written, and one of PyTorch. Writing alone (--no-verify) takes about one file's
(--max_shard_size) beside the run's own.
"""

import argparse
import importlib.util
import re

from absl import logging
from transformers.utils.logging import disable_progress_bar

from mmgem_jax import run, trained_run
from mmgem_jax.command_line import fail
from mmgem_jax.convert import export, verify_samples
from mmgem_jax.convert.model_card import model_card
from mmgem_jax.errors import UserError
from mmgem_jax.evaluation.results import parameters_fingerprint
from mmgem_jax.new_folder import new_folder

WRITERS = {
    "model": export.write_model,
    "decoder": export.write_decoder,
    "vision": export.write_vision,
}
NEEDED = {"model": ("images", "texts"), "decoder": ("texts",), "vision": ("images",)}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail  # one line, without the usage
    add = parser.add_argument
    add("--checkpoint", required=True, help="folder of a run, or of a step of it")
    add("--out", required=True, help="new or empty folder")
    add("--what", default="model", choices=WRITERS, help="the whole model, or one tower of it")
    add("--dtype", default="float32", choices=export.DTYPES, help="of the tensors")
    add("--max_shard_size", default="5GB", help="of a file: bytes, or a number of KB, MB or GB")
    add("--mesh", default="", help="AXIS=SIZE with commas; the run's own by default")
    add = parser.add_argument_group("verification, in fp32 against the run").add_argument
    add("--verify", action=argparse.BooleanOptionalAction, default=True)
    add("--images", nargs="+", default=[], metavar="FILE", help="the run's own data by default")
    add("--texts", nargs="+", default=[], metavar="TEXT")
    return parser.parse_args()


def bytes_of(text):
    """Bytes that a size such as 5GB means."""
    match = re.fullmatch(r"([0-9]+)\s*([KMGT]B|)", text.upper())
    if not match or not int(match[1]):
        raise UserError(f"--max_shard_size: found {text!r}; expected a size such as 500MB or 5GB")
    return int(match[1]) * UNITS[match[2]]


def verifier(args):
    """`mmgem_jax.convert.verify`, which needs torch, where it is asked for."""
    if not args.verify:
        if args.images or args.texts:
            raise UserError("--no-verify: found --images or --texts; expected neither")
        return None
    if args.images or args.texts:
        for what in NEEDED[args.what]:
            verify_samples.need(what, getattr(args, what))
    if not importlib.util.find_spec("torch"):
        raise UserError("--verify: torch is not installed; expected it, or --no-verify")
    from mmgem_jax.convert import verify

    return verify


def export_run(args):
    """Writes the folder, compares it with the run, and says what came out."""
    limit, verify = bytes_of(args.max_shard_size), verifier(args)
    mesh = trained_run.mesh_overrides(args.mesh)
    given = verify and (args.images or args.texts)
    with new_folder(args.out) as folder:
        samples = verify_samples.given_samples(args.images, args.texts) if given else None
        trained = trained_run.load(args.checkpoint, mesh)
        run.keep_programs(trained.config)
        samples = samples or (verify_samples.run_samples(trained.config) if verify else None)
        WRITERS[args.what](trained, folder, args.dtype, limit)
        parity = None
        if verify:
            compare = getattr(verify, f"verify_{args.what}")
            parity = compare(trained, folder, args.dtype, samples)
            export.write_json(folder / "parity.json", parity)
        fingerprint = parameters_fingerprint(trained.params)
        card = model_card(trained, args.what, args.dtype, fingerprint, parity)
        (folder / "README.md").write_text(card)
    verdict = "not compared with the run"
    if parity:
        largest = max(parity["largest_difference"].values())
        verdict = f"largest difference {largest:.1e}, {len(parity['greedy_texts'])} texts equal"
    print(f"{args.out}: step {trained.step}, {args.what}, {args.dtype}; {verdict}")


def main():
    """Exports."""
    args = parse_arguments()
    logging.set_verbosity(logging.ERROR)  # orbax warns of what it is not asked for
    disable_progress_bar()
    try:
        export_run(args)
    except UserError as error:
        fail(error)


if __name__ == "__main__":
    main()
