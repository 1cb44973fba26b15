"""Text -> token rows: the two rows of the text path, and the tokenizer that makes them.

Embedding row `<s> text [EMB]`, caption row `<s> text </s>` (design after the paper's text path,
arXiv 2405.19333). [EMB] and [PAD] are tokens of their own; padding is never the end of a text.
"""

import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from huggingface_hub import HfApi
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mmgem_jax.errors import UserError, first_line

BOS, EOS, EMB, PAD = "<s>", "</s>", "[EMB]", "[PAD]"


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE of at most `vocab_size` tokens, the special ones included.

    Every byte is a token, so no text is unknown. A space is put before the first word, so that a
    word is the same token wherever it stands; decoding takes it off again.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = [PAD, BOS, EOS, EMB]
    if vocab_size < len(alphabet) + len(specials):
        raise UserError(
            f"vocab_size: found {vocab_size}, expected at least {len(alphabet) + len(specials)} "
            "(every byte and the special tokens)"
        )
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[EMB],
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a folder, a *.gguf file or a hub name, with [EMB] and [PAD] in it.

    UserError where it cannot be loaded, or has no token that begins or ends a text.
    """
    # Some settings, such as a Llama's `legacy`, do not outlive saving. What is saved with a run is
    # what the run uses from the start.
    with tempfile.TemporaryDirectory() as folder:
        _with_our_tokens(_from_pretrained(path), path).save_pretrained(folder)
        return _with_our_tokens(_from_pretrained(folder), path)


def _with_our_tokens(tokenizer, path: str):
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"tokenizer: {path} gives a {type(tokenizer).__name__}, expected one with a "
            "tokenizer.json"
        )
    for role in ("bos_token", "eos_token"):
        if getattr(tokenizer, role) is None:
            raise UserError(f"tokenizer: {path} has no {role}, expected one")
    tokenizer.add_special_tokens(
        {"pad_token": PAD, "extra_special_tokens": [EMB]}, replace_extra_special_tokens=False
    )
    return tokenizer


def _from_pretrained(path: str):
    if Path(path).suffix == ".gguf" and Path(path).is_file():
        return _from_gguf(Path(path))
    is_folder = Path(path).is_dir()
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", path)
    if not is_folder and not is_hub_name:
        raise UserError(f"tokenizer: {path} does not exist, expected a folder or a hub name")
    # Here, for it imports torch where there is one, and data workers import this module.
    from transformers import AutoTokenizer

    # Special tokens written out in a caption are plain text, they must not end or pad the row.
    options = {"split_special_tokens": True}
    # The hub's client has no base class of its own for errors, hence the broad excepts. Without a
    # network it tries again for a minute, so the cache comes first and one request without retry
    # second.
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, **options)
    except Exception as error:
        if is_folder:
            raise UserError(
                f"tokenizer: {path} cannot be loaded ({first_line(error)}), expected a folder "
                "with a tokenizer.json and its tokenizer_config.json"
            ) from error
    try:
        HfApi().model_info(path, timeout=10)
        return AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:
        raise UserError(
            f"tokenizer: {path} is no local folder and cannot be had from the hub "
            f"({first_line(error)})"
        ) from error


def _from_gguf(path: Path):
    missing = [name for name in ("gguf", "torch") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"tokenizer: {path} needs {' and '.join(missing)} to be installed "
            "(pip install 'mmgem_jax[gguf]'), expected that or a folder with a tokenizer.json"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            path.parent, gguf_file=path.name, split_special_tokens=True, local_files_only=True
        )
    except Exception as error:  # transformers' own reader of the file: errors of any kind
        raise UserError(
            f"tokenizer: {path} cannot be loaded ({first_line(error)}), expected a whole GGUF "
            "file of a Llama"
        ) from error


def padded_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """Rows of the embedding table: the ids in use, up to a multiple of 128 for the matrix units."""
    return -(-used_vocab_size(tokenizer) // 128) * 128


def used_vocab_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """One more than the largest id: not `len(tokenizer)` where the vocabulary has holes."""
    return max(tokenizer.get_vocab().values()) + 1


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of all that decides which ids a text gets; the same after saving and loading."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Truncation and padding are left out: they are the state of the last call, not the tokenizer's.
    parts = {key: backend[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
    parts["roles"] = [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def embedding_row(
    tokenizer: PreTrainedTokenizerFast, text: str, length: int
) -> tuple[np.ndarray, int, bool]:
    """`<s> text [EMB] [PAD]...` as ids int32 [length], the index of [EMB]; was the text cut?"""
    return _row(tokenizer, text, length, EMB)


def caption_row(
    tokenizer: PreTrainedTokenizerFast, text: str, length: int
) -> tuple[np.ndarray, bool]:
    """`<s> text </s> [PAD]...` as ids int32 [length]; was the text cut?"""
    row, _, truncated = _row(tokenizer, text, length, tokenizer.eos_token)
    return row, truncated


def _row(tokenizer, text: str, length: int, end: str) -> tuple[np.ndarray, int, bool]:
    if length < 3:
        raise UserError(f"text length: found {length}, expected at least 3 (<s>, a token, the end)")
    # The Rust tokenizer itself: transformers' call round it costs three times as much, and this
    # runs for every text of every batch.
    backend = tokenizer.backend_tokenizer
    # "</s>" written in a text is text. The backend forgets this when it is sent to a worker.
    backend.encode_special_tokens = True
    ids = backend.encode(text, add_special_tokens=False).ids
    # In a vocabulary of words or pieces it may be one of them all the same.
    ours = {backend.token_to_id(t) for t in (PAD, EMB, tokenizer.bos_token, tokenizer.eos_token)}
    ids = [token for token in ids if token not in ours]
    kept = ids[: length - 2]
    last = len(kept) + 1
    row = np.full(length, backend.token_to_id(PAD), np.int32)
    row[0] = backend.token_to_id(tokenizer.bos_token)
    row[1:last] = kept
    row[last] = backend.token_to_id(end)
    return row, last, len(kept) < len(ids)
