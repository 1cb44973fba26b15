"""Scores of generated captions against several references each, by pycocoevalcap.

BLEU (Papineni et al., 2002), ROUGE-L (Lin, 2004), METEOR (Denkowski and Lavie, 2014), CIDEr
(Vedantam et al., 2015, arXiv 1411.5726; what COCO calls CIDEr is its CIDEr-D) and SPICE (Anderson
et al., 2016, arXiv 1607.08822) are counted by pycocoevalcap 1.2, an optional extra, whatever the
machine. Java is another matter: with it on the PATH pycocoevalcap's own tokenizer and METEOR run;
without it captions are tokenised by `mmgem_jax.evaluation.ptb`, which gives the same words, and
METEOR is not run. What ran is told beside the scores.
"""

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from mmgem_jax.errors import UserError
from mmgem_jax.evaluation import ptb

NO_JAVA = "not run: no java"


def score_captions(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    keys: Sequence,
    *,
    spice: bool = False,
) -> tuple[dict[str, float], dict[str, str]]:
    """Scores of one prediction an image against its references, and how they came about.

    The scores are `bleu_1` to `bleu_4`, `rouge_l`, `cider`, `meteor` and `spice` as fractions, of
    which papers print the hundredfold; one that did not run is left out. `how` names the
    `tokenizer` ("jar", pycocoevalcap's, or "ours"), the `scorer` and its version, whether `meteor`
    and `spice` ran and why not, and what `cider` took its document frequencies from: these very
    references, so that a part of a data set has other scores, and one image alone scores 0.
    SPICE runs only where asked for: it downloads models, and wants 8 GB for Java.

    An empty prediction scores 0. A reference of punctuation alone is scored as pycocoevalcap does
    (an empty prediction matches it) and counted in `how`. Raises UserError where pycocoevalcap is
    not installed, where lengths differ, a key comes twice, an image has no reference or a blank
    one, no reference has a word, or a Java program fails.
    """
    _check(predictions, references, keys)
    scorers = _load_scorers()
    has_java = _java_runs()
    tokenize = tokenize_with_jar if has_java else ptb.tokenize
    said = {row: [" ".join(tokens)] for row, tokens in enumerate(tokenize(predictions))}
    written = iter(tokenize([text for texts in references for text in texts]))
    truth = {row: [" ".join(next(written)) for _ in texts] for row, texts in enumerate(references)}
    how = {"scorer": f"pycocoevalcap {version('pycocoevalcap')}"}
    how |= {"tokenizer": "jar" if has_java else "ours"} | _about(truth)

    metrics = {}
    for number, score in enumerate(scorers["bleu"](4).compute_score(truth, said, verbose=0)[0]):
        metrics[f"bleu_{number + 1}"] = float(score)
    metrics["rouge_l"] = float(scorers["rouge_l"]().compute_score(truth, said)[0])
    metrics["cider"] = float(scorers["cider"]().compute_score(truth, said)[0])
    how["meteor"] = "run" if has_java else NO_JAVA
    if has_java:
        try:
            metrics["meteor"] = _meteor(scorers["meteor"], truth, said)
        except UserError as error:  # the other scores are worth having
            how["meteor"] = f"not run: {error}"
    how["spice"] = ("run" if has_java else NO_JAVA) if spice else "not run: not asked for"
    if spice and has_java:
        try:
            metrics["spice"] = _spice(truth, said)
        except UserError as error:
            how["spice"] = f"not run: {error}"
    return metrics, how


def write_coco_results(path: str | Path, keys: Sequence, predictions: Sequence[str]) -> None:
    """Writes captions in COCO's results format, `[{"image_id": ..., "caption": ...}, ...]`.

    COCO's own keys are integers. Raises UserError where lengths differ or a key comes twice.
    """
    _check_keys(predictions, keys)
    rows = zip(keys, predictions, strict=True)
    lines = [json.dumps({"image_id": key, "caption": caption}) for key, caption in rows]
    Path(path).write_text("[\n" + ",\n".join(lines) + "\n]\n")


def tokenize_with_jar(captions: Sequence[str]) -> list[list[str]]:
    """The tokens of each caption by pycocoevalcap's PTBTokenizer, which needs Java.

    It loses empty captions at the end, and shifts all that follow a line break other than `\\n`:
    so a caption is put at the end, and such line breaks become spaces. Raises UserError where it
    cannot run.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    lines = [caption.translate(ptb.LINE_BREAKS) for caption in captions]
    rows = {row: [{"caption": line}] for row, line in enumerate([*lines, "."])}
    try:
        tokenised = PTBTokenizer().tokenize(rows)
    except OSError as error:  # it writes into its own folder
        raise UserError(f"pycocoevalcap: its tokenizer did not run: {error}") from error
    if len(tokenised) != len(rows):
        raise UserError(f"java: the tokenizer gave {len(tokenised)} captions, expected {len(rows)}")
    return [tokenised[row][0].split(" ") if tokenised[row][0] else [] for row in range(len(lines))]


def _check(predictions: Sequence[str], references: Sequence[Sequence[str]], keys: Sequence) -> None:
    _check_keys(predictions, keys)
    if not predictions or len(references) != len(predictions):
        raise UserError(
            f"references: found those of {len(references)} images for {len(predictions)}"
            " predictions, expected as many of both, one or more"
        )
    for key, texts in zip(keys, references, strict=True):
        if isinstance(texts, str) or not len(texts):
            found = "one text" if texts else "none"
            raise UserError(f"references: found {found} for image {key!r}, expected a list")
        if not all(text.strip() for text in texts):
            raise UserError(f"references: one of image {key!r} is blank, expected words")


def _check_keys(predictions: Sequence[str], keys: Sequence) -> None:
    if len(keys) != len(predictions):
        raise UserError(
            f"keys: found {len(keys)} for {len(predictions)} predictions, expected as many of both"
        )
    seen = set()
    for key in keys:
        if key in seen:
            raise UserError(f"keys: found {key!r} twice, expected one prediction an image")
        seen.add(key)


def installed() -> bool:
    """Whether pycocoevalcap is there."""
    return importlib.util.find_spec("pycocoevalcap") is not None


def _load_scorers() -> dict[str, Callable]:
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise UserError(
            "pycocoevalcap: not installed, expected it for caption scores:"
            " pip install -e '.[caption]'"
        ) from error
    return {"bleu": Bleu, "cider": Cider, "meteor": Meteor, "rouge_l": Rouge}


def _java_runs() -> bool:
    # On some machines `java` is a stub that only asks for Java to be installed.
    java = shutil.which("java")
    return bool(java) and not subprocess.run([java, "-version"], capture_output=True).returncode


def _about(truth: dict[int, list[str]]) -> dict[str, str]:
    references = [text for texts in truth.values() for text in texts]
    empty = references.count("")
    if empty == len(references):
        raise UserError(f"references: none of {empty} has a word, expected words")
    cider = f"document frequencies of {len(truth)} keys' {len(references)} references"
    how = {"cider": cider if len(truth) > 1 else f"{cider}: 0 by definition"}
    if empty:
        how["references"] = f"{empty} of {len(references)} hold punctuation alone"
    return how


def _meteor(Meteor: Callable, truth: dict[int, list[str]], said: dict[int, list[str]]) -> float:
    meteor = Meteor()
    try:
        score = float(meteor.compute_score(truth, said)[0])
    except (OSError, ValueError) as error:
        meteor.lock.release()  # or its destructor would wait for it for ever
        reason = meteor.meteor_p.communicate()[1].decode(errors="replace").strip()
        raise UserError(f"java: METEOR failed: {reason.partition(chr(10))[0] or error}") from error
    meteor.meteor_p.communicate()  # its destructor leaves pipes open
    return score


def _spice(truth: dict[int, list[str]], said: dict[int, list[str]]) -> float:
    from pycocoevalcap.spice.spice import Spice

    try:
        return float(Spice().compute_score(truth, said)[0])
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"SPICE: did not run: {error}; expected its models and Java 8") from error
