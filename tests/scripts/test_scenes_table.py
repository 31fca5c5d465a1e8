"""The command of the table of synthetic scenes."""

import json

import torch
from scenes_table import attention_shares

from captioning.data.coco import CocoCaptions
from captioning.data.features import Views
from captioning.scenes.generation import generate_scenes
from model import CaptionModel, ModelConfig
from vocabulary import Vocabulary


def test_attention_shares(tmp_path):
    """With the same features everywhere, attention is uniform: its share within the box of an
    object is the share of the image that the box covers.
    """
    images, annotations = [], []
    for split, number, _, captions in generate_scenes():
        if split == "test" and len(images) < 4:
            images.append({"id": number, "file_name": f"{number}.jpg"})
            annotations += [{"id": len(annotations), "image_id": number, "caption": captions[0]}]
            (tmp_path / f"{number}.jpg").touch()
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"images": images, "annotations": annotations}))
    data = CocoCaptions(tmp_path, file)
    config = ModelConfig(
        backbone="mobilenet_v3_small", inject="attend", image_size=64, embed_size=8, hidden_size=8
    )
    model = CaptionModel(Vocabulary.build(data.all_captions, 1), config, weights=None)
    features = Views([torch.ones(4, 1, 64, 576).numpy()])
    attention, image = attention_shares(model, data, features)
    torch.testing.assert_close(attention, image, rtol=1e-2, atol=0)
    assert 0.01 < image < 0.3
