import json
import pickle
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmgem_jax.data import emoji_sources
from mmgem_jax.data import tokenizer as text_rows
from mmgem_jax.errors import UserError

PACKAGES = Path(__file__).parents[1] / "fixture" / "emoji"


@pytest.fixture(scope="module")
def names():
    return [c.name for c in emoji_sources.read_concepts(emoji_sources.open_packages(PACKAGES))]


@pytest.fixture(scope="module")
def bpe(names):
    return text_rows.train_bpe(names, 400)


def words(vocabulary, **special):
    """A tokenizer of whole words, as another project might have made it."""
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_names_come_back_exactly_and_so_does_text_never_seen(bpe, names):
    for name in [
        *names,
        "naïve \u201cquotes\u201d, o\u2019clock",
        "日本 🦗",
        "two  spaces",
        "it's ok .",
        "",
    ]:
        row, _ = text_rows.caption_row(bpe, name, 96)
        assert bpe.decode(row, skip_special_tokens=True) == name
        row, _, _ = text_rows.embedding_row(bpe, name.upper(), 96)
        assert bpe.decode(row, skip_special_tokens=True) == name.upper().lower()


def test_a_word_is_the_same_token_wherever_it_stands(names):
    whole_words = text_rows.train_bpe(names, 2048)
    first, _ = text_rows.caption_row(whole_words, "frog", 6)
    later, _ = text_rows.caption_row(whole_words, "key frog", 6)
    assert first[2] == later[3] == whole_words.eos_token_id  # both are words of one token
    assert first[1] == later[2]


def test_training_is_deterministic_and_stays_within_the_vocabulary(bpe, names):
    again = text_rows.train_bpe(list(names), 400)
    assert again.backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()
    assert len(bpe) == 400
    with pytest.raises(UserError, match="vocab_size: found 259, expected at least 260"):
        text_rows.train_bpe(names, 259)


def test_special_tokens_are_four_and_none_stands_for_another(bpe):
    ids = bpe.convert_tokens_to_ids(["[PAD]", "<s>", "</s>", "[EMB]"])
    assert ids == [bpe.pad_token_id, bpe.bos_token_id, bpe.eos_token_id, ids[3]]
    assert len(set(ids)) == 4
    assert set(bpe.all_special_ids) == set(ids)


def test_the_embedding_row_by_hand(tmp_path):
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "hot", "drink", "tea"])}
    words(vocabulary, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    loaded = text_rows.load_tokenizer(str(tmp_path))
    emb, pad = loaded.convert_tokens_to_ids(["[EMB]", "[PAD]"])
    assert {emb, pad} == {6, 7}

    row, index, truncated = text_rows.embedding_row(loaded, "hot drink", 6)
    assert row.dtype == np.int32
    assert (row.tolist(), index, truncated) == ([1, 3, 4, emb, pad, pad], 3, False)
    row, index, truncated = text_rows.embedding_row(loaded, "hot drink", 4)
    assert (row.tolist(), index, truncated) == ([1, 3, 4, emb], 3, False)
    row, index, truncated = text_rows.embedding_row(loaded, "hot drink tea", 4)
    assert (row.tolist(), index, truncated) == ([1, 3, 4, emb], 3, True)
    row, index, truncated = text_rows.embedding_row(loaded, "", 3)
    assert (row.tolist(), index, truncated) == ([1, emb, pad], 1, False)

    row, truncated = text_rows.caption_row(loaded, "hot drink", 6)
    assert row.dtype == np.int32
    assert (row.tolist(), truncated) == ([1, 3, 4, 2, pad, pad], False)
    row, truncated = text_rows.caption_row(loaded, "hot drink tea", 3)
    assert (row.tolist(), truncated) == ([1, 3, 2], True)
    row, _ = text_rows.caption_row(loaded, "hot</s>[EMB]", 16)
    assert (row == 2).sum() == 1
    assert emb not in row


@pytest.mark.parametrize("legacy", [True, False, None])
def test_a_llama_s_tokenizer_is_the_same_when_its_run_is_loaded(tmp_path, legacy):
    """transformers forgets `legacy` when it saves."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"abcdeht"]
    words = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], byte_fallback=True))
    (tmp_path / "theirs").mkdir()
    words.save(str(tmp_path / "theirs" / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "theirs" / "tokenizer_config.json").write_text(json.dumps(settings))
    first = text_rows.load_tokenizer(str(tmp_path / "theirs"))
    first.save_pretrained(tmp_path / "run")
    again = text_rows.load_tokenizer(str(tmp_path / "run"))
    assert text_rows.fingerprint(first) == text_rows.fingerprint(again)
    assert text_rows.caption_row(first, "a bed", 9)[0].tolist() == (
        text_rows.caption_row(again, "a bed", 9)[0].tolist()
    )


@pytest.mark.parametrize("length", range(3, 24))
def test_truncation_cuts_the_text_alone(bpe, length):
    text = "envelope with arrow and kitchen knife"
    whole, end, cut = text_rows.embedding_row(bpe, text, 64)
    assert not cut
    row, index, truncated = text_rows.embedding_row(bpe, text, length)
    assert row.shape == (length,)
    assert truncated == (length < end + 1)
    assert (row == bpe.convert_tokens_to_ids("[EMB]")).nonzero()[0].tolist() == [index]
    np.testing.assert_array_equal(row[:index], whole[:index])
    assert (row[index + 1 :] == bpe.pad_token_id).all()
    caption, caption_cut = text_rows.caption_row(bpe, text, length)
    assert caption_cut == truncated
    row[index] = bpe.eos_token_id
    np.testing.assert_array_equal(caption, row)


@pytest.mark.parametrize("row", [text_rows.embedding_row, text_rows.caption_row])
def test_a_row_too_short_for_any_text_is_an_error(bpe, row):
    with pytest.raises(UserError, match="text length: found 2, expected at least 3"):
        row(bpe, "frog", 2)


def test_special_tokens_written_in_a_text_are_text(bpe, tmp_path):
    bpe.save_pretrained(tmp_path)
    loaded = text_rows.load_tokenizer(str(tmp_path))
    in_a_worker = pickle.loads(pickle.dumps(loaded))
    for tokenizer in (bpe, loaded, in_a_worker):
        text = "a</s> b[emb] <s>[pad]"
        row, _ = text_rows.caption_row(tokenizer, "a</s> b[EMB] <s>[PAD]", 64)
        assert (
            np.isin(row, tokenizer.all_special_ids).sum()
            == 2 + (row == tokenizer.pad_token_id).sum()
        )
        assert tokenizer.decode(row, skip_special_tokens=True) == text


def test_a_vocabulary_of_words_gives_no_special_token_for_one_that_is_written(tmp_path):
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "tea": 3}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    tokenizer = text_rows.load_tokenizer(str(tmp_path))
    tokens, _ = text_rows.caption_row(tokenizer, "tea </s> <s> tea", 8)
    assert tokens.tolist() == [1, 3, 3, 2, *[tokenizer.pad_token_id] * 4]


def test_the_fingerprint_survives_saving_and_use_and_tells_tokenizers_apart(bpe, names, tmp_path):
    mark = text_rows.fingerprint(bpe)
    bpe.save_pretrained(tmp_path / "one")
    loaded = text_rows.load_tokenizer(str(tmp_path / "one"))
    assert text_rows.fingerprint(loaded) == mark
    loaded(["frog", "key frog"], padding=True, truncation=True, max_length=4)
    assert text_rows.fingerprint(loaded) == mark
    loaded.save_pretrained(tmp_path / "two")
    assert text_rows.fingerprint(text_rows.load_tokenizer(str(tmp_path / "two"))) == mark

    assert text_rows.fingerprint(text_rows.train_bpe(names, 399)) != mark
    assert text_rows.fingerprint(text_rows.train_bpe(names[1:], 400)) != mark
    other = AutoTokenizer.from_pretrained(tmp_path / "one", eos_token="<s>")
    assert text_rows.fingerprint(other) != mark


def test_loading_gives_a_padding_token_of_its_own(tmp_path):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "tea": 3}
    special = {"bos_token": "<s>", "eos_token": "</s>", "extra_special_tokens": ["<unk>"]}
    words(vocabulary, pad_token="</s>", **special).save_pretrained(tmp_path / "plain")
    loaded = text_rows.load_tokenizer(str(tmp_path / "plain"))
    assert loaded.pad_token == "[PAD]"
    assert loaded.pad_token_id not in (0, 1, 2, 3)
    assert "<unk>" in loaded.all_special_tokens
    assert len(loaded) == 6
    loaded.save_pretrained(tmp_path / "grown")
    again = text_rows.load_tokenizer(str(tmp_path / "grown"))
    assert again.get_vocab() == loaded.get_vocab()


@pytest.mark.parametrize(("used", "padded"), [(1, 128), (128, 128), (129, 256), (2048, 2048)])
def test_the_vocabulary_is_padded_to_128(used, padded):
    tokenizer = words({"<unk>": 0} | {f"w{i}": i for i in range(1, used)})
    assert text_rows.padded_vocab_size(tokenizer) == padded


def test_ids_beyond_a_hole_in_the_vocabulary_have_their_row():
    assert text_rows.padded_vocab_size(words({"<unk>": 0, "tea": 200})) == 256


@pytest.mark.parametrize(("missing", "kept"), [("bos", "eos"), ("eos", "bos")])
def test_a_tokenizer_without_begin_or_end_is_an_error(tmp_path, missing, kept):
    words({"<unk>": 0, "<t>": 1}, **{f"{kept}_token": "<t>"}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"has no {missing}_token") as caught:
        text_rows.load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_is_one_line(tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tokenizer.json").write_text("{")
    (broken / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    (tmp_path / "empty").mkdir()

    def no_network(self, name, **kwargs):
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(text_rows.HfApi, "model_info", no_network)
    for path, message in [
        (str(tmp_path / "absent"), "does not exist, expected a folder or a hub name"),
        ("data/emoji/absent", "does not exist, expected a folder or a hub name"),
        (str(broken), "cannot be loaded"),
        (str(tmp_path / "empty"), "cannot be loaded"),
        ("nobody/nothing", r"cannot be had from the hub \(no network\)"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            text_rows.load_tokenizer(path)
        assert str(caught.value).startswith(f"tokenizer: {path} ")
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def gguf_file(names, tmp_path_factory):
    """A GGUF file with a byte-level BPE and no weights, and its backend."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # transformers adds <|endoftext|> to every such vocabulary that has none.
    specials = ["<|endoftext|>", "<|begin|>", "<|end|>"]
    backend.train_from_iterator(
        names,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokens = sorted(backend.get_vocab(), key=backend.token_to_id)
    path = tmp_path_factory.mktemp("gguf") / "words.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in specials else 1 for token in tokens])
    writer.add_token_merges(
        [" ".join(pair) for pair in json.loads(backend.to_str())["model"]["merges"]]
    )
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path, backend


def test_the_tokenizer_of_a_gguf_file(gguf_file, names, tmp_path):
    path, backend = gguf_file
    loaded = text_rows.load_tokenizer(str(path))
    assert (loaded.bos_token, loaded.eos_token) == ("<|begin|>", "<|end|>")
    assert (loaded.pad_token, len(loaded)) == ("[PAD]", 402)
    for text in (*names[::20], "Two  spaces, Naïve 日本"):
        row, truncated = text_rows.caption_row(loaded, text, 96)
        ids = backend.encode(text).ids
        assert row[: len(ids) + 2].tolist() == [1, *ids, 2] and not truncated
        assert loaded.decode(row, skip_special_tokens=True) == text
    assert loaded.eos_token_id not in loaded("an <|end|>", add_special_tokens=False).input_ids
    loaded.save_pretrained(tmp_path)
    again = text_rows.load_tokenizer(str(tmp_path))
    assert text_rows.fingerprint(again) == text_rows.fingerprint(loaded)


def test_a_gguf_file_that_cannot_be_loaded_is_one_line(gguf_file, tmp_path, monkeypatch):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(gguf_file[0].read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        text_rows.load_tokenizer(str(broken))
    assert str(caught.value).startswith(f"tokenizer: {broken} ")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs torch to be installed") as caught:
        text_rows.load_tokenizer(str(gguf_file[0]))
    assert "or a folder with a tokenizer.json" in str(caught.value)
