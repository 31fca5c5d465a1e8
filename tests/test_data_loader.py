"""From captions files to batches, and the sharing out of one file into splits."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import CAPTIONS

from data_loader import (
    BucketSampler,
    CaptionData,
    CaptionDataset,
    DataError,
    get_loader,
    karpathy_splits,
    random_splits,
)
from model import eval_transform
from vocabulary import Vocabulary

TEXTS = [caption for captions in CAPTIONS for caption in captions]
transform = eval_transform(32)


@pytest.fixture(scope="module")
def data(shared_dataset):
    return CaptionData(shared_dataset / "images", shared_dataset / "captions.json")


@pytest.fixture(scope="module")
def vocab():
    return Vocabulary.build(TEXTS, threshold=1)


def epoch_of(loader, vocab, epoch):
    """The captions of every batch of an epoch, as words."""
    loader.batch_sampler.set_epoch(epoch)
    return [[vocab.decode(row) for row in captions] for _, captions, _ in loader]


# ---------------------------------------------------------------------------- what is on disk


def test_captions_of_every_image(data, shared_dataset):
    """Images come in the order of their ids, each with its file and all its captions."""
    assert data.image_ids == list(range(100, 112))
    assert data.paths == sorted((shared_dataset / "images").iterdir())
    assert data.captions == CAPTIONS
    assert data.rows == list(range(12))


def test_images_without_captions(dataset):
    """An image without a caption is left out and named; the others keep theirs."""
    path = dataset / "captions.json"
    content = json.loads(path.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in (103, 108)]
    path.write_text(json.dumps(content))
    data = CaptionData(dataset / "images", path)
    assert data.uncaptioned == ["03.jpg", "08.jpg"]
    assert data.captions == [c for number, c in enumerate(CAPTIONS) if number not in (3, 8)]
    assert len(data) == len(data.paths) == len(data.image_ids) == len(data.rows) == 10


def test_without(data):
    """Leaving images out keeps the rows of the others, where their features lie."""
    smaller = data.without({0: "unreadable", 5: "unreadable"}).without([11])
    assert smaller.rows == [1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert smaller.captions == [CAPTIONS[row] for row in smaller.rows]
    assert len(data) == 12


def test_annotations_without_ids(dataset):
    """One's own captions file needs no ids for its annotations."""
    path = dataset / "captions.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        del annotation["id"]
    path.write_text(json.dumps(content))
    assert CaptionData(dataset / "images", path).captions == CAPTIONS


def test_categories_do_not_matter(dataset):
    """A captions file that also has COCO's list of categories, as exports often do, is read."""
    path = dataset / "captions.json"
    content = json.loads(path.read_text()) | {"categories": [{"id": 1, "name": "dog"}]}
    path.write_text(json.dumps(content))
    assert CaptionData(dataset / "images", path).captions == CAPTIONS


def test_images_in_subfolders(dataset):
    """A file_name may lead into a folder below the images folder."""
    (dataset / "images" / "part").mkdir()
    (dataset / "images" / "00.jpg").rename(dataset / "images" / "part" / "00.jpg")
    path = dataset / "captions.json"
    path.write_text(path.read_text().replace('"00.jpg"', '"part/00.jpg"'))
    data = CaptionData(dataset / "images", path)
    assert data.paths[0] == dataset / "images" / "part" / "00.jpg"


def test_reading_is_quiet(shared_dataset, data, vocab, capsys):
    """Neither reading captions nor going through batches prints anything."""
    CaptionData(shared_dataset / "images", shared_dataset / "captions.json")
    for mode in ("train", "val", "test"):
        for _ in get_loader(data, vocab, transform, mode=mode):
            pass
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------------------- batches


@pytest.mark.parametrize("mode", ["train", "val"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_every_caption_once(data, vocab, mode, batch_size):
    """An epoch shows every caption exactly once, beside its own image."""
    loader = get_loader(data, vocab, transform, mode=mode, batch_size=batch_size)
    images = [transform(path) for path in data.paths]
    seen = Counter()
    for batch, captions, _ in loader:
        for image, caption in zip(batch, captions, strict=True):
            (number,) = [n for n, other in enumerate(images) if torch.equal(image, other)]
            seen[number, vocab.decode(caption)] += 1
    assert seen == Counter((n, c) for n, texts in enumerate(CAPTIONS) for c in texts)


def test_epochs_are_shuffled(data, vocab):
    """Epochs differ in the order of their batches and in which captions share one."""
    loader = get_loader(data, vocab, transform, batch_size=4)
    first, second = (epoch_of(loader, vocab, epoch) for epoch in (0, 1))
    assert first != second
    assert set(map(frozenset, first)) != set(map(frozenset, second))


def test_epochs_depend_on_seed_and_number_alone(data, vocab):
    """(seed, epoch) fixes the order: not what came before, nor any other source of chance."""
    loader = get_loader(data, vocab, transform, batch_size=4, seed=3)
    expected = epoch_of(loader, vocab, 5)
    np.random.seed(1)
    torch.manual_seed(1)
    other = get_loader(data, vocab, transform, batch_size=4, seed=3)
    epoch_of(other, vocab, 2)
    assert epoch_of(other, vocab, 5) == expected
    assert epoch_of(get_loader(data, vocab, transform, batch_size=4), vocab, 5) != expected


def test_validation_has_a_fixed_order(data, vocab):
    """Validation batches are the same every time."""
    loader = get_loader(data, vocab, transform, mode="val", batch_size=4)
    first, second = ([captions.tolist() for _, captions, _ in loader] for _ in range(2))
    assert first == second


def test_little_padding():
    """With lengths as COCO's, less than a twentieth of a batch is padding."""
    lengths = np.random.default_rng(0).normal(12.5, 2.4, 5000).round().clip(7, 40).astype(int)
    cells = sum(len(batch) * lengths[batch].max() for batch in BucketSampler(lengths, 64))
    assert lengths.sum() / cells > 0.95


@pytest.mark.parametrize("captions, batch_size, world", [(9, 8, 8), (65, 64, 64), (3, 8, 4)])
def test_a_share_for_every_process(captions, batch_size, world):
    """Batches too small for all processes are refused: one with nothing to do would fail."""
    with pytest.raises(ValueError, match="fewer processes"):
        BucketSampler(np.full(captions, 5), batch_size, world=world)
    sampler = BucketSampler(np.full(captions, 5), batch_size, rank=1, world=2)
    assert min(map(len, sampler)) > 0


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_every_batch(world):
    """Processes split each batch among them: together they see what one alone would."""
    lengths = np.arange(50) % 9
    alone = list(BucketSampler(lengths, batch_size=8))
    shares = [list(BucketSampler(lengths, 8, rank=rank, world=world)) for rank in range(world)]
    assert [sorted(np.concatenate(parts)) for parts in zip(*shares, strict=True)] == [
        sorted(batch) for batch in alone
    ]


def test_start_in_the_middle_of_an_epoch():
    """`start` skips so many batches of the epoch, and changes none of the rest."""
    sampler = BucketSampler(np.arange(50) % 9, batch_size=8)
    sampler.set_epoch(3)
    whole = [batch.tolist() for batch in sampler]
    sampler.set_epoch(3, start=4)
    assert [batch.tolist() for batch in sampler] == whole[4:]
    assert len(whole) == len(sampler) == 7


def test_collation(data, vocab):
    """A batch holds its captions as numbers, each filled up with `<pad>`, and their lengths."""
    dataset = CaptionDataset(data, vocab, transform)
    places = [5, 0, 17, 5]
    images, captions, lengths = dataset.__getitems__(places)
    encoded = [vocab.encode(TEXTS[place]) for place in places]
    longest = max(map(len, encoded))
    assert captions.tolist() == [ids + [0] * (longest - len(ids)) for ids in encoded]
    assert lengths.tolist() == [len(ids) for ids in encoded]
    assert (captions.dtype, images.dtype) == (torch.int64, torch.float32)
    assert images.shape == (4, 3, 32, 32)


def test_every_image_once_for_captioning(data):
    """Mode "test" gives every image once, in order, with its place among the references."""
    batches = list(get_loader(data, transform=transform, mode="test", batch_size=5))
    places = torch.cat([places for _, places in batches]).tolist()
    assert places == list(range(12))
    images = torch.cat([images for images, _ in batches])
    assert torch.equal(images, torch.stack([transform(path) for path in data.paths]))
    assert [data.captions[place] for place in places] == CAPTIONS


@pytest.mark.parametrize("mode", ["train", "val", "test"])
def test_features_in_place_of_images(data, vocab, mode):
    """Given features, batches hold an image's row of them, also once images were left out."""
    smaller = data.without([0, 7])
    features = np.arange(12, dtype=np.float16)[:, None] * [[1, 10]]
    with_features = get_loader(smaller, vocab, features=features, mode=mode, batch_size=4)
    with_images = get_loader(smaller, vocab, transform, mode=mode, batch_size=4)
    images = {tuple(transform(path).flatten().tolist()): row for row, path in enumerate(data.paths)}
    for (rows, *rest), (batch, *same_rest) in zip(with_features, with_images, strict=True):
        expected = [images[tuple(image.flatten().tolist())] for image in batch]
        assert rows.tolist() == [[row, 10 * row] for row in expected]
        assert rows.dtype == torch.float32
        assert all(torch.equal(one, other) for one, other in zip(rest, same_rest, strict=True))


def test_unknown_mode(data, vocab):
    """An unknown mode is an error that names the choices."""
    with pytest.raises(ValueError, match="'valid'.*train, val, test"):
        get_loader(data, vocab, transform, mode="valid")


# ---------------------------------------------------------------------------- splits

SHARES = {"train": 0.5, "val": 0.25, "test": 0.25}


def read(files):
    return {name: json.loads(path.read_text()) for name, path in files.items()}


def test_random_splits_are_complete(shared_dataset, tmp_path):
    """Every image lands in one split, with all its captions, and the shares are kept."""
    splits = read(random_splits(shared_dataset / "captions.json", tmp_path, SHARES))
    ids = {name: [image["id"] for image in split["images"]] for name, split in splits.items()}
    assert {name: len(of_split) for name, of_split in ids.items()} == {
        "train": 6, "val": 3, "test": 3
    }  # fmt: skip
    assert sorted(sum(ids.values(), [])) == list(range(100, 112))
    for name, split in splits.items():
        captions = [(a["image_id"], a["caption"]) for a in split["annotations"]]
        assert sorted(captions) == sorted((i, c) for i in ids[name] for c in CAPTIONS[i - 100])


def test_a_photo_listed_twice_is_in_one_split(dataset, tmp_path):
    """Even a photo that is listed once per caption is never in training and test at once."""
    path = dataset / "captions.json"
    content = json.loads(path.read_text())
    copies = [image | {"id": image["id"] + 50} for image in content["images"]]
    path.write_text(json.dumps(content | {"images": content["images"] + copies}))
    splits = read(random_splits(path, tmp_path, SHARES))
    files = [{image["file_name"] for image in split["images"]} for split in splits.values()]
    assert sum(map(len, files)) == len(set.union(*files)) == 12
    assert sum(len(split["images"]) for split in splits.values()) == 24


def test_random_splits_are_the_same_every_time(dataset, tmp_path):
    """The draw depends on the seed, not on the order in which the file lists its images."""
    path = dataset / "captions.json"
    first = read(random_splits(path, tmp_path / "a", SHARES))
    content = json.loads(path.read_text())
    content["images"].reverse()
    path.write_text(json.dumps(content))
    again = read(random_splits(path, tmp_path / "b", SHARES))
    other = read(random_splits(path, tmp_path / "c", SHARES, seed=1))
    first, again, other = (
        {image["id"] for image in splits["train"]["images"]} for splits in (first, again, other)
    )
    assert first == again != other


def test_too_few_images_to_split(shared_dataset, tmp_path):
    """A split that would be empty is an error."""
    with pytest.raises(DataError, match="too few images"):
        random_splits(shared_dataset / "captions.json", tmp_path, {"train": 0.99, "val": 0.01})


def karpathy_image(number, split, **more):
    sentences = [
        {"sentid": 10 * number + place, "raw": f" Caption {place} of {number}.\n"}
        for place in range(2)
    ]
    return {
        "filename": f"{number}.jpg", "imgid": number, "split": split, "sentences": sentences, **more
    }  # fmt: skip


def test_karpathy_splits(tmp_path):
    """Karpathy's splits become captions files; "restval" joins training, folders join names."""
    images = [
        karpathy_image(0, "train", cocoid=500, filepath="train2014"),
        karpathy_image(1, "restval", cocoid=501, filepath="val2014"),
        karpathy_image(2, "val", cocoid=502, filepath="val2014"),
        karpathy_image(3, "test"),  # as in his Flickr8k file: no folder, no COCO id
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    splits = read(karpathy_splits(path, tmp_path / "splits"))
    assert {
        name: [(image["id"], image["file_name"]) for image in split["images"]]
        for name, split in splits.items()
    } == {
        "train": [(500, "train2014/0.jpg"), (501, "val2014/1.jpg")],
        "val": [(502, "val2014/2.jpg")],
        "test": [(3, "3.jpg")],
    }
    assert [a["caption"] for a in splits["train"]["annotations"]] == [
        "Caption 0 of 0.", "Caption 1 of 0.", "Caption 0 of 1.", "Caption 1 of 1."
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["", "[]", '{"images": [{"filename": "a.jpg"}]}'])
def test_not_a_karpathy_file(tmp_path, content):
    """Another file in the place of Karpathy's is an error that names it."""
    (tmp_path / "k.json").write_text(content)
    with pytest.raises(DataError, match="k.json is not a Karpathy split file"):
        karpathy_splits(tmp_path / "k.json", tmp_path / "splits")
