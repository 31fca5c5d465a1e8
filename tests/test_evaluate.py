"""The command evaluate.py."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import calibrated_weights, flag, tiny_config
from pycocotools.coco import COCO

from captioning.base.checkpoints import save
from captioning.data.coco import CocoCaptions
from captioning.data.extraction import extract_features
from captioning.data.features import Views
from captioning.decoding.ensemble import Ensemble
from captioning.scoring.chair import chair
from captioning.scoring.evaluation import evaluate_split
from evaluate import main
from model import CaptionModel
from train import build_run


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """A run whose captions differ from image to image, and its checkpoint best.pt."""
    run = build_run(tiny_config(shared_dataset))
    for weight in run.model.decoder.parameters():
        torch.nn.init.normal_(weight)
    save(run.model.checkpoint(), f"{run.config.out}/best.pt")
    yield run
    run.lock.close()


@pytest.fixture(scope="module")
def best(trained):
    return f"{trained.config.out}/best.pt"


@pytest.fixture
def model(best):
    return CaptionModel.from_checkpoint(best)


@pytest.fixture
def evaluate(best, shared_dataset, tmp_path, capsys):
    """Runs the command; returns (the printed metrics, the captions in the results file)."""

    def run(*options):
        results = tmp_path / "results.json"
        files = ["--captions", shared_dataset / "captions.json", "--results", results]
        arguments = [best, shared_dataset / "images", *files, "--cache-dir", tmp_path, *options]
        capsys.readouterr()  # what was printed before
        assert main([*map(str, arguments)]) == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        found = json.loads(results.read_text())
        return json.loads(printed.out), [result["caption"] for result in found]

    return run


def test_metrics(evaluate, trained, model):
    """The printed metrics are those of `evaluate_split`."""
    expected, _ = evaluate_split(model, trained.val_loader, trained.val_images, beam_size=2)
    expected["perplexity"] = pytest.approx(expected["perplexity"])
    assert evaluate("--beam-size", "2")[0] == {"models": 1} | expected


def test_results_file(evaluate, trained, model, shared_dataset, tmp_path):
    """The results file is exactly COCO's, a list of image ids and captions, which its API reads."""
    evaluate()
    results = tmp_path / "results.json"
    captions = model.caption(trained.val_images.data.paths)
    expected = [{"image_id": 100 + i, "caption": caption} for i, caption in enumerate(captions)]
    assert json.loads(results.read_text()) == expected
    truth = COCO(str(shared_dataset / "captions.json"))
    assert sorted(truth.loadRes(str(results)).getImgIds()) == list(range(100, 112))


@pytest.mark.parametrize(
    "options", [{"beam_size": 4, "length_penalty": 1.0, "max_len": 4}, {"beam_size": 1}], ids=str
)
def test_decoding_options(evaluate, model, trained, options):
    """The flags are the options of `CaptionModel.caption`, and they are among the metrics."""
    metrics, captions = evaluate(*(x for option in options.items() for x in flag(*option)))
    paths = trained.val_images.data.paths
    assert captions == model.caption(paths, **options) != model.caption(paths)
    assert options.items() <= metrics.items()


def test_temperature(evaluate, trained, model):
    """With --temperature, words are sampled; close to 0 they are those of a greedy search."""
    paths = trained.val_images.data.paths
    metrics, captions = evaluate("--temperature", "1e-9")
    assert captions == model.caption(paths, beam_size=1) and metrics["beam_size"] is None
    assert evaluate("--temperature", "2")[1] != evaluate("--temperature", "2")[1]


def test_ensemble(evaluate, model, trained, tmp_path):
    """The models of --ensemble may have other decoders and image sizes, each its own features."""
    torch.manual_seed(1)
    config = replace(model.config, inject="attend", image_size=96)
    other = CaptionModel(model.vocab, config, calibrated_weights()).eval()
    for weight in other.decoder.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    save(other.checkpoint(), tmp_path / "other.pt")
    metrics, captions = evaluate("--ensemble", tmp_path / "other.pt")
    assert metrics["models"] == 2
    data, models = trained.val_images.data, [model, other]
    assert captions == Ensemble(models).caption(data.paths)
    assert captions != model.caption(data.paths) and captions != other.caption(data.paths)
    expected = ensemble_perplexity(models, data, tmp_path)
    assert metrics["perplexity"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def ensemble_perplexity(models, data, cache_dir):
    """With the mean log-probability of the models, normalized again; caption by caption."""
    nll, vocab, features = [], models[0].vocab, []
    for model in models:
        cnn, transform = model.encoder.cnn, model.transform
        array = extract_features(cnn, data.paths, transform, cache_dir, "float32")
        features.append(model.encoder.project(Views([array])[range(len(data))]))
    for i, captions in enumerate(data.captions):
        for caption in captions:
            ids = torch.tensor([vocab.encode(caption)])
            pairs = zip(models, features, strict=True)
            mean = sum(m.decoder(x[[i]], ids)[0].log_softmax(1) for m, x in pairs) / len(models)
            nll += [-mean[t].log_softmax(0)[word] for t, word in enumerate(ids[0, 1:])]
    return math.exp(sum(nll) / len(nll))


ERRORS = {
    "best.pt nowhere captions.json": "no image folder nowhere",
    "best.pt images nowhere.json": "nowhere.json cannot be read",
    "best.pt broken captions.json": "broken/03.jpg",
    "best.pt images captions.json --precision float64": "'float64'",
    "best.pt images captions.json --beam-size 2 --temperature 1": "cannot be combined",
    "best.pt images captions.json --n-best 2": "leave --n-best out",
    "nowhere.pt images captions.json": "no file nowhere.pt",
    "best.pt images captions.json --ensemble nowhere.pt": "no file nowhere.pt",
    "best.pt images captions.json --results nowhere/out.json": "cannot write nowhere/out.json",
    "best.pt images captions.json --results images": "it is a folder",
    "best.pt images captions.json --retrieval -1": "must be a number of images",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors(best, dataset, capsys, monkeypatch, arguments):
    """What is wrong is named in one sentence, and the exit status is 1."""
    monkeypatch.chdir(dataset)
    shutil.copytree("images", "broken")
    Path("broken/03.jpg").write_bytes(b"")
    checkpoint, images, captions, *flags = arguments.replace("best.pt", best).split()
    assert main([checkpoint, images, "--captions", captions, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and ERRORS[arguments] in error
    assert len(error) < 500 and "Traceback" not in error


def test_instances(evaluate, shared_dataset, tmp_path):
    """--instances adds CHAIR, of the generated captions and the annotated objects."""
    images = COCO(str(shared_dataset / "captions.json")).dataset["images"]
    content = {"images": images, "categories": [], "annotations": []}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps(content))
    metrics, captions = evaluate("--instances", file)
    references = CocoCaptions(shared_dataset / "images", shared_dataset / "captions.json").captions
    expected = chair(captions, references, [set()] * len(captions))
    assert {name: metrics[name] for name in expected} == expected


def test_retrieval(evaluate, shared_dataset):
    """--retrieval adds the recalls among the first images."""
    metrics, _ = evaluate("--retrieval", 3)
    assert metrics["retrieval images"] == 3 and metrics["text-to-image recall@5"] == 1
    assert metrics["image-to-text recall@1"] in (0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
