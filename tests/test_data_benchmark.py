"""tools/data_benchmark.py: what is timed side by side gives the same pictures and texts."""

import json
import sys
import tarfile

import data_benchmark
import numpy as np
import photo_like
import pytest
import webdataset_pipeline as theirs

from mmgem_jax import run
from mmgem_jax.data import images
from mmgem_jax.data.pipeline import training_batches

PICTURES, OF_A_TAR, BATCH, SIDE, SIZE = 16, 6, 4, 64, 32
# webdataset leaves it to Python to close the tars.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
KINDS = ("tars", "JSON lines", "array_record", "TFDS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The pictures in every form."""
    path = tmp_path_factory.mktemp("photos") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data_benchmark, "PICTURES", PICTURES)
        patch.setattr(data_benchmark, "OF_A_TAR", OF_A_TAR)
        data_benchmark.write_data(path, SIDE)
    return path


@pytest.fixture(scope="module")
def captions(folder):
    lines = (folder / "train.jsonl").read_text().splitlines()
    return [json.loads(line)["caption"] for line in lines]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return run.load_run_tokenizer(data_benchmark.configs_of(folder)["tars"])


@pytest.fixture(scope="module")
def their_pictures(folder, tokenizer):
    """What their pipeline gives of the middle squares: pixels by the tokens of the caption."""
    found, tars = {}, sorted((folder / "tars").glob("*.tar"))
    batches = theirs.training_pipeline(tars, tokenizer, SIZE, BATCH, 77, area=(1.0, 1.0))
    mean, std = np.float32(theirs.MEAN), np.float32(theirs.STD)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "RATIO", (1.0, 1.0))  # no such part lies within: the middle is taken
        batches = list(batches)
    for pictures, texts in batches:
        for image, ids in zip(pictures.numpy(), texts.tolist(), strict=True):
            pixels = (image.transpose(1, 2, 0) * std + mean) * 255
            assert np.abs(pixels - pixels.round()).max() < 1e-3
            found[tuple(i for i in ids if i != tokenizer.pad_token_id)] = pixels.round()
    return found


def test_tars_are_as_img2dataset_writes_them(folder, captions):
    names = {}
    for path in sorted((folder / "tars").iterdir()):
        with tarfile.open(path) as archive:
            names[path.name] = archive.getnames()
            first = archive.extractfile(names[path.name][1]).read()
            text = archive.extractfile(names[path.name][2]).read().decode()
            assert json.loads(first)["caption"] == text
            assert text == captions[OF_A_TAR * (len(names) - 1)]
    assert list(names) == ["00000.tar", "00001.tar", "00002.tar"]
    assert names["00001.tar"][:4] == [
        "000010000.jpg",
        "000010000.json",
        "000010000.txt",
        "000010001.jpg",
    ]
    assert sum(map(len, names.values())) == 3 * PICTURES


def test_their_pipeline_gives_every_caption_once(their_pictures, tokenizer, captions):
    assert sorted(map(tokenizer.decode, their_pictures)) == sorted(captions)


@pytest.mark.parametrize("kind", KINDS)
def test_every_source_gives_the_pixels_and_texts_of_theirs(folder, kind, their_pictures):
    config = data_benchmark.configs_of(folder)[kind]
    config.batch_size, config.model.vision.image_size = BATCH, SIZE
    config.data.augment.min_area, config.data.augment.max_ratio = 1 - 1e-9, 1.0  # as theirs
    # A tokenizer of its own: their calls have left padding and truncation in the other one.
    batches, found = training_batches(config, run.load_run_tokenizer(config)), {}
    for _ in range(PICTURES // BATCH):
        batch = next(batches)
        for place, image in enumerate(batch["image"]):
            end = batch["embed_index"][place, 0]
            text = batch["text_tokens"][place, 0, 1:end].tolist()
            assert batch["caption_tokens"][place, 0, 1:end].tolist() == text
            found[tuple(text)] = image
    batches.close()
    assert found.keys() == their_pictures.keys()
    for key, image in found.items():
        np.testing.assert_array_equal(image, their_pictures[key])


def test_a_crop_is_of_the_asked_share_and_within_the_image():
    for sides in ((64, 48), (48, 64), (100, 90), (300, 40), (40, 300)):
        for _ in range(50):
            left, top, width, height = theirs.random_part(*sides, (0.5, 0.7))
            assert min(left, top) >= 0 and left + width <= sides[0] and top + height <= sides[1]
            # Sides are rounded: the bounds hold for some part within half a pixel.
            least, most = np.subtract((width, height), 0.5), np.add((width, height), 0.5)
            assert least[0] / most[1] <= 4 / 3 and most[0] / least[1] >= 3 / 4
            if max(sides) / min(sides) < 2:  # a longer one has no such part
                assert least.prod() <= 0.7 * np.prod(sides) and most.prod() >= 0.5 * np.prod(sides)


def test_pictures_cost_what_photos_do_and_are_not_alike(tmp_path):
    for name in ("a", "b"):
        photo_like.write_pairs(tmp_path / name, 3, 256)
    first, second = (sorted((tmp_path / name / "images").iterdir()) for name in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    pictures = [images.decode(path.read_bytes()) for path in first]
    assert [min(picture.size) for picture in pictures] == [256] * 3
    assert np.abs(np.subtract(*(np.asarray(p)[:256, :256] * 1.0 for p in pictures[:2]))).mean() > 9
    assert 0.1 < data_benchmark.bytes_a_pixel(tmp_path / "a") < 0.4


# ---- rows ----------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """Makes the benchmark small."""
    small = {"ROUNDS": 1, "WARM_UP": 0, "PICTURES": PICTURES, "BATCH": BATCH}
    for name, value in small.items():
        monkeypatch.setattr(data_benchmark, name, value)
    monkeypatch.setattr(data_benchmark, "write_data", lambda *_: None)


@pytest.mark.parametrize("installed", [True, False])
def test_every_source_has_a_row_beside_theirs(folder, tiny, monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "webdataset_pipeline", None)
    size, indexed, *rows = data_benchmark.rows_of_size(folder, SIDE)
    assert (size["unit"], size["ratio"]) == ("B", None)
    assert indexed["name"] == "64 px: members indexed, a core" and indexed["ours"] > 0
    kinds = ("tars", "tars, draft", *KINDS[1:])
    assert [row["name"].partition(": images")[0] for row in rows] == [f"64 px, {k}" for k in kinds]
    for row in rows:
        assert row["ours"] > 0 and (row["ratio"] is not None) is installed
        assert installed or row["whose"].startswith("open_clip's: absent")
        assert installed or row["whose"].endswith("pip install -e '.[test]'")


def test_of_a_config_it_times_its_batches_and_its_runs_wait(tiny, emoji_config, monkeypatch):
    asked = []

    def train(config, workdir):
        asked.append(config)
        lines = [{"step": 1}, *({"step": n, "perf/data_wait_share": 0.1 * n} for n in (2, 3, 9))]
        with open(f"{workdir}/metrics.jsonl", "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)

    monkeypatch.setattr(data_benchmark, "train", train)
    config = emoji_config({"data.workers": 2})
    batch, images, wait = data_benchmark.benchmark_data(config)
    assert images["ours"] == pytest.approx(16 / batch["ours"], rel=0.01)
    assert wait["ours"] == pytest.approx(0.3)
    (of_run,) = asked
    assert of_run.steps == data_benchmark.STEPS and not of_run.eval.final_splits
    assert (of_run.data.workers, config.data.workers, config.steps) == (2, 2, 10)
