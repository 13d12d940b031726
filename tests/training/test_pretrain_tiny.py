"""The pretraining script of the tiny CLIP, in miniature, and what it promises of its captions."""

import json
from pathlib import Path

import pytest
import torch
from open_clip import SimpleTokenizer
from safetensors.torch import load_file, save_file

from czsl_heads import encoders, wrap
from czsl_heads.data.drawing import ATTRIBUTES, OBJECTS
from czsl_heads.data.shapes import split_pairs, unseen_pairs
from czsl_heads.encoders.open_clip import OpenClipEncoder
from czsl_heads.encoders.tiny import MERGES, RECORD, WEIGHTS, build_tiny
from czsl_heads.training import pretrain_tiny
from czsl_heads.training.pretrain_tiny import PretrainSpec, pretrain, train_merges, write_merges


def test_merges_make_every_word_one_token(tmp_path: Path) -> None:
    write_merges(tmp_path / MERGES)
    tokenizer = SimpleTokenizer(bpe_path=str(tmp_path / MERGES))
    for word in (*ATTRIBUTES, *OBJECTS, "a", "photo", "of"):
        assert len(tokenizer.encode(word)) == 1, word
    assert tokenizer.decode(tokenizer.encode("zebra crossing")).strip() == "zebra crossing"


def test_the_shipped_merges_are_those_of_the_script(tmp_path: Path) -> None:
    import czsl_heads.encoders

    write_merges(tmp_path / MERGES)
    shipped = Path(czsl_heads.encoders.__path__[0]) / "assets" / MERGES
    assert (tmp_path / MERGES).read_bytes() == shipped.read_bytes()


def test_merges_stop_when_all_words_are_whole() -> None:
    assert train_merges(["a"]) == []
    assert train_merges(["aa", "aa"]) == [("a", "a</w>")]


def test_spelled_captions_use_letters_and_leave_the_tokenizer_alone() -> None:
    model, tokenizer = build_tiny()
    encoder = OpenClipEncoder(model, tokenizer=tokenizer, frozen=False)
    stage = pretrain_tiny._Pretraining(encoder, PretrainSpec(spelled=1.0))
    before = tokenizer.encode("red circle")
    spelled = stage._encode(["red circle"])
    assert len(before) == 2
    assert tokenizer.encode("red circle") == before
    letters = [tokenizer.encoder[piece] for piece in ("r", "e", "d</w>", "c", "i", "r", "c", "l", "e</w>")]
    tokens = torch.tensor([[tokenizer.sot_token_id, *letters, tokenizer.eot_token_id]])
    expected = encoder.encode_embeddings(model.token_embedding(tokens), torch.tensor([10]))
    torch.testing.assert_close(spelled, expected)


@pytest.mark.engine
# The script trains from a bare shell, where Lightning's advice is welcome.
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")
def test_no_caption_names_an_unseen_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: set[str] = set()
    encode = pretrain_tiny._Pretraining._encode

    def recorded(self, texts):
        captions.update(texts)
        return encode(self, texts)

    monkeypatch.setattr(pretrain_tiny._Pretraining, "_encode", recorded)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(pretrain_tiny, "_draw_all", lambda tasks: _draw_here(tasks))
    spec = PretrainSpec(images=192, steps=4, batch_size=96, test_per_pair=1)
    record = pretrain(tmp_path, spec)
    pairs = {caption for caption in captions if sum(word in caption.split() for word in (*ATTRIBUTES, *OBJECTS)) == 2}
    assert len({tuple(caption.split()[-2:]) for caption in pairs}) > 60
    assert {tuple(caption.split()[-2:]) for caption in pairs} <= set(split_pairs("train"))
    assert not {f"{attribute} {obj}" for attribute, obj in unseen_pairs()} & {" ".join(c.split()[-2:]) for c in pairs}
    assert record == json.loads((tmp_path / "tiny_clip.json").read_text())
    model, _ = build_tiny(tmp_path / MERGES)
    model.load_state_dict(load_file(tmp_path / WEIGHTS))


def _draw_here(tasks):
    import numpy as np

    images = np.stack([pretrain_tiny._draw_one(task) for task in tasks])
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def test_a_tower_of_another_shape_loads_from_its_folder(tmp_path: Path) -> None:
    write_merges(tmp_path / MERGES)
    model, _ = build_tiny(tmp_path / MERGES, layers=2, patch_size=16)
    save_file(model.state_dict(), tmp_path / WEIGHTS)
    (tmp_path / RECORD).write_text(json.dumps({"spec": {"layers": 2, "patch_size": 16}}))
    encoder = wrap(f"tiny:{tmp_path}")
    assert encoder.grid == (3, 3)
    assert len(encoder.blocks("vision")) == 2
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(encoder.encode_images(images), model.eval().encode_image(images))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (RECORD, None, "expected `folder` with tiny_clip.json, as pretrain_tiny writes it, got"),
        (RECORD, b"{}", r"expected `folder` with a tiny CLIP, .*\('spec'\)"),
        (RECORD, b'{"spec": {"layers": 3}}', "expected `folder` with a tiny CLIP, .*Unexpected key"),
        (WEIGHTS, b"short", "expected `folder` with a tiny CLIP, as pretrain_tiny writes it, got"),
        (MERGES, b"no gzip", "expected `folder` with a tiny CLIP, as pretrain_tiny writes it, got"),
    ],
)
def test_a_folder_without_a_tower_is_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    assets = Path(encoders.__path__[0]) / "assets"
    for asset in (RECORD, WEIGHTS, MERGES):
        (tmp_path / asset).write_bytes((assets / asset).read_bytes())
    wrap(f"tiny:{tmp_path}")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        wrap(f"tiny:{tmp_path}")
