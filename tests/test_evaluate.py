"""Evaluation: the loss and captions of a split, and the command."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import calibrated_weights, tiny_config
from pycocotools.coco import COCO

from captioning.data.features import extract_features
from captioning.decoding.constraints import build_constraint
from captioning.decoding.ensemble import EnsembleDecoder
from captioning.decoding.search import beam_search
from captioning.learning.checkpoint import save
from captioning.learning.run import build_run
from data_loader import image_loader, val_loader
from evaluate import (
    caption_dataset,
    caption_images,
    decoding_options,
    evaluate_captions,
    evaluate_loss,
    main,
    parse_args,
)
from model import CaptionModel


@pytest.fixture(scope="module")
def trained(shared_dataset):
    """A run whose captions differ, and its checkpoint best.pt."""
    run = build_run(tiny_config(shared_dataset))
    for weight in run.model.decoder.parameters():
        torch.nn.init.normal_(weight)
    Path(run.config.out).mkdir()
    save(run.model.checkpoint(), f"{run.config.out}/best.pt")
    return run


@pytest.fixture
def data(trained):
    return trained.val_loader.dataset.data


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_loss(trained, data, batch_size):
    """The loss of a split is the sum over its captions, for any batch size."""
    model, features = trained.model, trained.val_loader.dataset.features
    loader = val_loader(data, model.vocab, features=features, batch_size=batch_size)
    nll, tokens = evaluate_loss(model, loader)
    expected, count = 0.0, 0
    with torch.no_grad():
        for index, captions in enumerate(data.captions):
            embedded = model.eval().encoder.project(torch.tensor(features[[index]]).float()[:, 0])
            for caption in captions:
                ids = torch.tensor([model.vocab.encode(caption)])
                log_probs = model.decoder(embedded, ids)[0].log_softmax(-1)
                expected -= log_probs[range(len(log_probs)), ids[0, 1:]].sum().item()
                count += len(log_probs)
    assert tokens == count
    assert nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_loss_keeps_the_mode(trained, training):
    """The loss is computed without dropout, and the model keeps its mode."""
    trained.model.train(training)
    first, second = (evaluate_loss(trained.model, trained.val_loader) for _ in range(2))
    assert first == second and trained.model.training == training


def test_captioning_changes_no_state(dataset):
    """Captioning with a model in training mode changes neither BatchNorm nor the mode."""
    run = build_run(tiny_config(dataset, fine_tune="all"))
    model, data = run.model.train(), run.val_loader.dataset.data
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert len(caption_images(model, image_loader(data, transform=model.transform))) == 12
    assert model.training and model.encoder.backbone.training
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_captions_of_a_split(trained, data):
    """A split's captions are, image by image, those of `CaptionModel.caption`."""
    model = trained.model
    loader = image_loader(data, transform=model.transform, batch_size=5)
    captions = caption_images(model, loader, beam_size=2, max_len=9)
    assert captions == model.caption(data.paths, beam_size=2, max_len=9)
    assert captions == caption_dataset(
        model, data, transform=model.transform, beam_size=2, max_len=9
    )
    assert len(set(captions)) >= 3


# ---------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def best(trained):
    return f"{trained.config.out}/best.pt"


@pytest.fixture
def model(best):
    return CaptionModel.from_checkpoint(best)


def test_metrics(trained, best, model, shared_dataset, tmp_path, capsys):
    """The printed metrics are those of `evaluate_captions`."""
    words = ["--captions", f"{shared_dataset}/captions.json", "--cache-dir", str(tmp_path)]
    assert main([best, f"{shared_dataset}/images", *words, "--beam-size", "2"]) == 0
    printed = capsys.readouterr()
    expected = evaluate_captions(model, trained.val_loader, beam_size=2)
    expected["perplexity"] = pytest.approx(expected["perplexity"])
    found = json.loads(printed.out)
    assert found == found | expected and printed.err == ""


def test_results_file(trained, best, model, data, dataset, tmp_path):
    """The results file is exactly COCO's, a list of image ids and captions, which its API reads."""
    results, captions_file = str(tmp_path / "results.json"), f"{dataset}/captions.json"
    words = ["--captions", captions_file, "--results", results, "--cache-dir", str(tmp_path)]
    assert main([best, f"{dataset}/images", *words]) == 0
    captions = caption_dataset(model, data, features=trained.val_loader.dataset.features)
    expected = [{"image_id": 100 + i, "caption": caption} for i, caption in enumerate(captions)]
    assert json.loads(Path(results).read_text()) == expected
    assert sorted(COCO(captions_file).loadRes(results).getImgIds()) == list(range(100, 112))


def test_images_without_captions(best, model, dataset, monkeypatch, capsys):
    """Without captions, all images of a folder are captioned, with ids from their file names."""
    monkeypatch.chdir(dataset / "images")
    for path in list(Path().iterdir())[3:]:
        path.unlink()
    names = ["07.jpg", "COCO_val2014_000000000042.jpg", "part/x1.JPG"]
    Path("part").mkdir()
    for path, name in zip(list(Path().glob("*.jpg")), names, strict=True):
        path.rename(name)
    Path("notes.txt").write_text("no image")
    assert main([best, ".", "--results", "results.json"]) == 0
    captions = model.caption(names)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{name}: {text}" for name, text in zip(names, captions, strict=True)]
    results = json.loads(Path("results.json").read_text())
    assert [list(result.items()) for result in results] == [
        [("image_id", image_id), ("caption", caption)]
        for image_id, caption in zip((7, 42, "x1.JPG"), captions, strict=True)
    ]


def test_n_best(best, model, data, shared_dataset, capsys):
    """With --n-best, each caption is printed with its score, best first."""
    assert main([best, f"{shared_dataset}/images", "--beam-size", "4", "--n-best", "3"]) == 0
    decoded = model.generate(model.preprocess(data.paths), beam_size=4, n_best=3)
    expected = [
        f"{path}: {score:.3f} {caption}"
        for path, *row in zip(
            data.paths, decoded.scores.tolist(), model.decode(decoded), strict=True
        )
        for score, caption in zip(*row, strict=True)
    ]
    assert capsys.readouterr().out.splitlines() == expected


def test_temperature(best, data, shared_dataset, capsys):
    """With --temperature, words are sampled, without a beam."""
    torch.manual_seed(0)
    model = CaptionModel.from_checkpoint(best)
    captions = model.caption(data.paths, temperature=2.0)
    torch.manual_seed(0)
    assert main([best, f"{shared_dataset}/images", "--temperature", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{path}: {text}" for path, text in zip(data.paths, captions, strict=True)]
    assert captions != model.caption(data.paths, temperature=2.0)


def test_decoding_options(best, model, data, shared_dataset, capsys):
    """The command's options are those of `CaptionModel.caption`."""
    words = "--beam-size 4 --groups 2 --diversity 2 --length-penalty 1 --ban-bad-endings"
    words = [*words.split(), "--ban-repeated-phrases"]
    assert main([best, f"{shared_dataset}/images", *words]) == 0
    constraint = build_constraint(model.vocab, ban_bad_endings=True, ban_repeated_phrases=True)
    captions = model.caption(
        data.paths, 4, groups=2, diversity=2.0, length_penalty=1.0, constraint=constraint
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{path}: {text}" for path, text in zip(data.paths, captions, strict=True)]
    assert captions != model.caption(data.paths, 4)


@pytest.mark.parametrize(
    "flags, banned",
    [
        (["--ban-bad-endings"], ["<end>"]),
        (["--ban-repeated-phrases"], ["cup"]),
        (["--ban-bad-endings", "--ban-repeated-phrases"], ["<end>", "cup"]),
    ],
    ids=str,
)
def test_bans(model, flags, banned):
    """Each flag turns on its own constraint, here after "a cup of a"; without one there is none."""
    constraint = decoding_options(parse_args(["x.pt", "images", *flags]), model.vocab)["constraint"]
    tokens = torch.tensor([[model.vocab(word) for word in ["a", "cup", "of", "a"]]])
    found = constraint(tokens)[0].nonzero().flatten().tolist()
    assert {model.vocab.words[index] for index in found} == set(banned)
    assert decoding_options(parse_args(["x.pt", "images"]), model.vocab)["constraint"] is None


def test_ensemble(best, model, data, shared_dataset, tmp_path, capsys):
    """The models of --ensemble may have other decoders and image sizes, each its own features."""
    torch.manual_seed(1)
    other = CaptionModel(
        model.vocab.words,
        replace(model.config, inject="attend", image_size=96),
        calibrated_weights(),
    ).eval()
    for weight in other.decoder.parameters():
        torch.nn.init.normal_(weight)
    save(other.checkpoint(), tmp_path / "other.pt")
    words = [
        "--captions",
        f"{shared_dataset}/captions.json",
        "--cache-dir",
        str(tmp_path),
        "--ensemble",
        f"{tmp_path}/other.pt",
        "--results",
        f"{tmp_path}/results.json",
    ]
    assert main([best, f"{shared_dataset}/images", *words]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["models"] == 2
    memory = []
    for member in (model, other):
        features = extract_features(member.encoder, data.paths, member.transform, tmp_path).features
        ((batch, _),) = image_loader(data, features=features)
        memory.append(member.encode(batch.float(), precomputed=True))
    decoder = EnsembleDecoder([model.decoder, other.decoder])
    captions = model.decode(beam_search(decoder, tuple(memory), 3))
    results = json.loads((tmp_path / "results.json").read_text())
    assert [result["caption"] for result in results] == captions
    assert captions != model.caption(data.paths) and captions != other.caption(data.paths)
    expected = ensemble_perplexity([model, other], memory, data)
    assert metrics["perplexity"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def ensemble_perplexity(models, memory, data):
    """With the mean log-probability of the models, normalized again; caption by caption."""
    nll, vocab = [], models[0].vocab
    for i, captions in enumerate(data.captions):
        for caption in captions:
            ids = torch.tensor([vocab.encode(caption)])
            logits = [m.decoder(x[i : i + 1], ids)[0] for m, x in zip(models, memory, strict=True)]
            mean = sum(x.log_softmax(1) for x in logits) / len(models)
            nll += [-mean[t].log_softmax(0)[word] for t, word in enumerate(ids[0, 1:])]
    return math.exp(sum(nll) / len(nll))


ERRORS = {
    "damaged.pt images": "damaged.pt is damaged",
    "nowhere.pt images": "no file nowhere.pt",
    "best.pt empty": "no image in empty",
    "best.pt nowhere": "no image in nowhere",
    "best.pt images --captions nowhere.json": "no captions file nowhere.json",
    "best.pt broken": "broken/03.jpg",
    "best.pt broken --captions captions.json": "broken/03.jpg",
    "best.pt images --device quantum": "'quantum'",
    "best.pt images --precision float64": "'float64'",
    "best.pt images --beam-size 0": "beam_size",
    "best.pt images --groups 2": "groups must divide",
    "best.pt images --beam-size 2 --temperature 1": "cannot be combined",
    "best.pt images --n-best 1 --temperature 1": "cannot be combined",
    "best.pt images --n-best 2 --captions captions.json": "--n-best prints captions",
    "best.pt images --ensemble nowhere.pt": "no file nowhere.pt",
    "best.pt images --results nowhere/results.json": "cannot write nowhere/results.json",
}


@pytest.mark.parametrize("arguments", ERRORS)
def test_errors(best, dataset, capsys, monkeypatch, arguments):
    """What is wrong is named in one sentence, and the exit status is 1."""
    monkeypatch.chdir(dataset)
    (dataset / "empty").mkdir()
    shutil.copytree("images", "broken")
    for source, damaged in ((best, "damaged.pt"), ("images/03.jpg", "broken/03.jpg")):
        content = Path(source).read_bytes()
        Path(damaged).write_bytes(content[: len(content) // 2])
    assert main(arguments.replace("best.pt", best).split()) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and ERRORS[arguments] in error
    assert len(error) < 500 and "Traceback" not in error
