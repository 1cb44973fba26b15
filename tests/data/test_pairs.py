"""One's own pairs: built from a JSON-lines file, read back by the pipeline, refused when wrong."""

import io

import base
import numpy as np
import pytest
from PIL import Image
from plain_reader import read_split

from mmgem_jax import run
from mmgem_jax.data import pairs, pipeline
from mmgem_jax.errors import UserError

CAPTIONS = ["a red square", "a green square", "a blue square", "a grey square"]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)]


@pytest.fixture
def lines(tmp_path):
    """A folder with four images and a JSON-lines file that names them."""
    text = []
    for i, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        Image.new("RGB", (40 + i, 32), colour).save(tmp_path / f"{i}.png")
        text.append(f'{{"image": "{i}.png", "caption": "{caption}"}}\n')
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:-500])
    path = tmp_path / "train.jsonl"
    path.write_text("".join(text))
    return path


def tiny_config(data_dir):
    """A config that reads the built pairs."""
    config = base.get_config()
    config.batch_size, config.model.vision.image_size = 4, 16
    config.data.name, config.data.dir, config.data.workers = "pairs", str(data_dir), 0
    config.data.text_length = config.data.caption_length = 12
    return config


def test_pairs_come_back_as_batches(lines, tmp_path):
    folder = pairs.build(tmp_path / "data", {"train": lines}, vocab_size=300)
    config = tiny_config(tmp_path / "data")
    tokenizer = run.load_run_tokenizer(config)
    assert (folder / "tokenizer").is_dir()

    batch = next(pipeline.training_batches(config, tokenizer))
    decoded = [tokenizer.decode(row[0], skip_special_tokens=True) for row in batch["text_tokens"]]
    assert sorted(decoded) == sorted(CAPTIONS)
    for image, caption in zip(batch["image"], decoded, strict=True):
        colour = COLOURS[CAPTIONS.index(caption)]
        assert np.abs(image.astype(int) - np.array(colour)).max() <= 1

    images, records = read_split(config.data, "train", 16)
    assert images.shape == (4, 16, 16, 3)
    assert {record["caption"] for record in records} == set(CAPTIONS)


def test_a_second_build_does_not_overwrite(lines, tmp_path):
    pairs.build(tmp_path / "data", {"train": lines})
    with pytest.raises(UserError, match="exists"):
        pairs.build(tmp_path / "data", {"train": lines})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"line 5: 'not json'; expected"),
        ('{"image": "0.png"}', "line 5"),
        ('["0.png", "a"]', "line 5"),
        ('{"image": "0.png", "caption": "  "}', "line 5: caption"),
        ('{"image": "absent.png", "caption": "a"}', "line 5: image absent.png"),
        ('{"image": "train.jsonl", "caption": "a"}', "line 5: image train.jsonl"),
        ('{"image": "cut.jpg", "caption": "a"}', "line 5: image cut.jpg"),
        ('{"image": 7, "caption": "a"}', "line 5: .*expected"),
    ],
)
def test_a_wrong_line_is_named_and_nothing_is_left(lines, tmp_path, line, message):
    lines.write_text(lines.read_text() + line + "\n")
    with pytest.raises(UserError, match=message):
        pairs.build(tmp_path / "data", {"train": lines})
    lines.write_text("\n".join(lines.read_text().splitlines()[:4]) + "\n")
    pairs.build(tmp_path / "data", {"train": lines})


def test_missing_files_and_splits(lines, tmp_path):
    with pytest.raises(UserError, match="no file"):
        pairs.build(tmp_path / "data", {"train": tmp_path / "absent.jsonl"})
    with pytest.raises(UserError, match="expected train"):
        pairs.build(tmp_path / "data", {"validation": lines})


def test_line_separators_within_a_caption_do_not_split_it(lines, tmp_path):
    text = "one\u2028two"
    lines.write_text(f'{{"image": "0.png", "caption": "{text}"}}\n\n', encoding="utf-8")
    assert [record["caption"] for _, record in pairs.read_pairs(lines)] == [text]


def test_a_tokenizer_that_cannot_be_leaves_nothing(lines, tmp_path):
    with pytest.raises(UserError, match="vocab_size"):
        pairs.build(tmp_path / "data", {"train": lines}, vocab_size=10)
    pairs.build(tmp_path / "data", {"train": lines})
