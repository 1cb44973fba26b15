"""tools/run_clip_benchmark.py: an exported model behind the interface of CLIP_benchmark."""

import importlib.util
import io
import json
import pickle
import sys
import tarfile
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from mmgem_jax import trained_run
from mmgem_jax.convert import export, verify
from mmgem_jax.data.tfds_records import open_split

TOOL = Path(__file__).parents[1] / "tools" / "run_clip_benchmark.py"


@pytest.fixture(scope="module")
def run(trained):
    return trained_run.load(trained[0])


@pytest.fixture(scope="module")
def folder(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    export.write_model(run, path)
    return path


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_clip_benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[spec.name] = module  # where pickle looks for its functions
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def loaded(tool, folder):
    """Model, transform and tokenizer, by the keywords that CLIP_benchmark gives."""
    arguments = {"model_name": "tiny", "pretrained": str(folder), "cache_dir": None}
    with verify.own_module_cache():
        yield tool.load_mmgem(**arguments, device="cpu")


@pytest.fixture(scope="module")
def records(run):
    source = open_split(run.config.data, "test")
    return [source[i] for i in range(6)]


def benchmark():
    """What the tool uses of CLIP_benchmark, whose command line gives back the flags."""
    models = types.SimpleNamespace(TYPE2FUNC={}, MODEL_TYPES=[])
    cli = types.SimpleNamespace(main=lambda: sys.argv[1:])
    return types.SimpleNamespace(models=models, cli=cli)


def test_a_model_and_a_dataset_may_be_named_captioning(tool, monkeypatch):
    made = benchmark()
    monkeypatch.setitem(sys.modules, "clip_benchmark", made)
    flags = ["eval", "--model", "captioning", "--task", "linear_probe", "--dataset=captioning"]
    monkeypatch.setattr(sys, "argv", ["run_clip_benchmark.py", *flags])
    assert tool.main() == flags
    assert made.models.TYPE2FUNC["mmgem"] is tool.load_mmgem
    assert made.models.MODEL_TYPES == ["mmgem"]


def test_the_transform_does_not_carry_the_model(loaded, records):
    """Every worker of a DataLoader gets a copy."""
    model, transform, _ = loaded
    pickled = pickle.dumps(transform)
    assert len(pickled) < 10_000
    image = Image.open(io.BytesIO(records[0]["image"]))
    assert torch.equal(pickle.loads(pickled)(image), model.preprocess(image)[0])


@pytest.mark.parametrize("amp", [False, True])
def test_retrieval_as_the_benchmark_calls_it(loaded, records, amp):
    model, transform, tokenizer = loaded
    model.eval()
    images = torch.stack([transform(Image.open(io.BytesIO(r["image"]))) for r in records])
    texts = tokenizer([record["name"].decode() for record in records]).to("cpu")
    assert images.dtype == torch.float32 and texts.dtype == torch.int64
    with torch.no_grad(), torch.autocast("cpu", enabled=amp):
        image_embeddings = normalize(model.encode_image(images), dim=-1)
        text_embeddings = normalize(model.encode_text(texts), dim=-1)
    scores = text_embeddings.float() @ image_embeddings.float().T
    with torch.no_grad():
        pictures = [Image.open(io.BytesIO(record["image"])) for record in records]
        expected = model.encode_text([r["name"].decode() for r in records])
        expected = expected @ model.encode_image(pictures).T
    assert expected.std() > 0.01
    # bfloat16 has 8 bits of a number.
    torch.testing.assert_close(scores, expected, rtol=0, atol=0.05 if amp else 1e-5)


def test_classification_as_the_benchmark_calls_it(loaded, records):
    model, transform, tokenizer = loaded
    weights = []
    with torch.no_grad(), torch.autocast("cpu", enabled=True):
        for name in ("hat", "key", "dog"):
            texts = tokenizer([f"a {name}", f"a drawing of a {name}, seen from afar"]).to("cpu")
            weights.append(normalize(model.encode_text(texts), dim=-1).mean(dim=0))
        images = torch.stack([transform(Image.open(io.BytesIO(r["image"]))) for r in records])
        features = normalize(model.encode_image(images), dim=-1)
        logits = 100.0 * features @ torch.stack(weights, dim=1)
    assert logits.shape == (6, 3) and logits.float().isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "--task", "captioning"], "expected another task, or tools/evaluate.py --task"),
        (["eval", "--task=captioning"], "expected another task, or tools/evaluate.py --task"),
        (["eval"], "expected it: pip install clip-benchmark"),
    ],
)
def test_what_cannot_be_is_one_line(tool, monkeypatch, capsys, arguments, message):
    is_there = benchmark() if len(arguments) > 1 else None
    monkeypatch.setitem(sys.modules, "clip_benchmark", is_there)
    monkeypatch.setattr(sys, "argv", ["run_clip_benchmark.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        tool.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err


@pytest.mark.filterwarnings("ignore")  # those of webdataset
def test_the_benchmark_itself(tool, folder, records, tmp_path, monkeypatch):
    pytest.importorskip("clip_benchmark")
    (tmp_path / "test").mkdir()
    with tarfile.open(tmp_path / "test" / "0.tar", "w") as tar:
        for number, record in enumerate(records):
            for ending, content in (("png", record["image"]), ("txt", record["name"])):
                entry = tarfile.TarInfo(f"{number}.{ending}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    (tmp_path / "test" / "nshards.txt").write_text("1")
    (tmp_path / "dataset_type.txt").write_text("retrieval")
    arguments = "eval --model_type mmgem --model tiny --task zeroshot_retrieval --num_workers 0"
    paths = f"--pretrained {folder} --dataset wds/tiny --dataset_root {tmp_path}"
    out = tmp_path / "result.json"
    command = f"run_clip_benchmark.py {arguments} {paths} --recall_k 6 --output {out}"
    monkeypatch.setattr(sys, "argv", command.split())
    with verify.own_module_cache():
        tool.main()
    assert json.loads(out.read_text())["metrics"]["image_retrieval_recall@6"] == 1
