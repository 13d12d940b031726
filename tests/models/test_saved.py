"""Models on disk and on the Hub: what comes back is what was saved, and what does not fit is told by its file."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file

from baselines.clip import CLIP
from baselines.csp import CSP
from baselines.troika import Troika
from czsl_heads import CompositionSpace, DynamicMemoryBank, load, wrap
from czsl_heads._sealed import write_sealed
from czsl_heads.models import hub, recipe
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import BankOptions, CondenserOptions, LoRAOptions, Recipe, build, new_bank
from czsl_heads.models.registry import find_method
from czsl_heads.models.sac import Aligned
from czsl_heads.models.saved import space_as_dict, space_from_dict
from tests.models.shared import METHODS, PAIRS, SEEN, TARGETS, disturb, make_images, make_space

SMALL = {"troika": {"layers": 1, "adapter_dim": 4}}
FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture(scope="module")
def images():
    return make_images()


def trained(name, images=None, parts=(), **options):
    """A model in eval mode whose trained tensors are not as they were made; with a filled bank where it is a part."""
    condenser = CondenserOptions() if "condenser" in parts else None
    bank = BankOptions(slots=3, temperature=0.2)
    torch.manual_seed(0)
    made = Recipe(name, align="topk", model=SMALL.get(name, {}), condenser=condenser, bank=bank, **options)
    model = disturb(build(made, make_space()))
    if name == "troika" and images is not None:
        with torch.no_grad():
            model.method.train() if condenser else model.train()
            model.loss(images, SEEN, TARGETS)  # batch norm, too, has something to save
    model.eval()
    if "bank" in parts:
        model.bank = new_bank(model.space, model.encoder, bank)
        with torch.no_grad():
            model.adapt(model(images, PAIRS))
        model.bank.load_state_dict(model.bank.state_dict())  # a loaded bank is sorted, and adds in that order
    return model


@pytest.fixture
def folder(tmp_path):
    """A saved CSP behind a condenser with a bank, which a test may spoil."""
    model = trained("csp", make_images(), ("condenser", "bank"))
    model.save_pretrained(tmp_path / "csp")
    return tmp_path / "csp"


def change(folder, **values):
    """Put other values into the configuration."""
    content = json.loads((folder / "config.json").read_text())
    write_sealed(folder / "config.json", {**content, **values})


def change_tensors(folder, **values):
    """Put other tensors into the weights; None takes one away."""
    tensors = load_file(folder / "model.safetensors") | values
    left = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(left, folder / "model.safetensors")


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", [(), ("condenser",), ("condenser", "bank")], ids=["alone", "condensed", "bank"])
def test_what_comes_back_scores_bit_for_bit_alike(name, parts, images, tmp_path):
    model = trained(name, images, parts, lora=LoRAOptions(rank=1))
    model.record = {"seed": 3, "data": "moths"}
    model.save_pretrained(tmp_path / "model")
    assert {path.name for path in (tmp_path / "model").iterdir()} == FILES
    torch.manual_seed(9)  # what is drawn in a constructor must not matter
    state = model.state_dict()
    for again in (load(tmp_path / "model"), find_method(name).from_pretrained(tmp_path / "model")):
        assert type(again) is type(model)
        assert not any(module.training for module in again.modules())
        assert (again.recipe, again.record) == (model.recipe, model.record)
        assert (again.space, again.encoder_digest) == (model.space, model.encoder_digest)
        assert again.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
        with torch.no_grad():
            assert torch.equal(again.scores(images, PAIRS), model.scores(images, PAIRS))
    with torch.no_grad():
        untrained = build(model.recipe, make_space()).eval()
        assert not torch.equal(untrained.scores(images, PAIRS), model.scores(images, PAIRS))


@pytest.mark.parametrize("parts", [(), ("condenser",)], ids=["alone", "condensed"])
def test_the_statistics_of_troikas_norms_are_kept(parts, images, tmp_path):
    model = trained("troika", images, parts)
    method = getattr(model, "method", model)
    model.save_pretrained(tmp_path / "troika")
    again = load(tmp_path / "troika")
    for view in ("attribute_disentangler", "object_disentangler"):
        norm = getattr(method, view).norm
        same = getattr(getattr(again, "method", again), view).norm
        assert int(same.num_batches_tracked) == int(norm.num_batches_tracked) > 0
        assert same.running_mean.any()
        assert torch.equal(same.running_mean, norm.running_mean)
        assert torch.equal(same.running_var, norm.running_var)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("parts", [(), ("condenser", "bank")], ids=["alone", "bank"])
def test_files_hold_what_was_trained_and_nothing_of_clip(name, parts, images, tmp_path):
    model = trained(name, images, parts, lora=LoRAOptions(rank=1))
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    of_bank = {f"bank.{key}" for key in model.bank.state_dict()} if parts else set()
    assert set(tensors) == set(model.learned) | of_bank
    assert len(tensors) >= 8  # adapters of four blocks

    frozen = wrap("tiny").state_dict()
    names = {f"{prefix}encoder.{key}" for key in frozen for prefix in ("", "method.")}
    assert not names & set(tensors)
    bits = {tensor.numpy().tobytes() for tensor in frozen.values() if tensor.numel() > 1}
    assert not any(tensor.numpy().tobytes() in bits for tensor in tensors.values() if tensor.numel() > 1)


def test_a_method_that_learned_nothing_is_saved_too(images, tmp_path):
    model = build(Recipe("clip"), make_space()).eval()
    model.save_pretrained(tmp_path / "clip")
    assert load_file(tmp_path / "clip" / "model.safetensors") == {}
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "clip").scores(images, PAIRS), model.scores(images, PAIRS))


def test_saving_changes_nothing_of_the_model(images, tmp_path):
    model = trained("troika", images).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "troika")
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not load(tmp_path / "troika").training


@pytest.mark.parametrize(
    "space",
    [
        CompositionSpace(["rouge", "brûlé"], ["œuf", "7"], seen=[(0, 1), (1, 0)], unseen=[(0, 0)]),
        CompositionSpace(["a", "b"], ["c"], seen=[(1, 0)]).open_world(),
        CompositionSpace(["a", "b"], ["c", "d"], seen=[(1, 0), (0, 0)], unseen=[(1, 1)]).subset(
            [("b", "d"), ("a", "c"), ("b", "c")]
        ),
        CompositionSpace(["a"], ["c", "d"], seen=[("a", "d")]),
        CompositionSpace(["a", "b.c"], ["c", "d"], seen=[("a", "d")], words={"b.c": "brûlé", "d": "dog"}).open_world(),
    ],
    ids=["names", "open", "order", "seen", "words"],
)
def test_a_label_space_comes_back_in_its_order(space):
    again = space_from_dict(json.loads(json.dumps(space_as_dict(space))))
    assert (again.attributes, again.objects, again.pair_names) == (space.attributes, space.objects, space.pair_names)
    assert torch.equal(again.pairs, space.pairs)
    assert torch.equal(again.seen_mask, space.seen_mask)
    assert again == space


def test_words_are_written_only_where_there_are_some():
    space = make_space()
    assert "words" not in space_as_dict(space)
    assert space_as_dict(space.with_words({"red": "crimson"}))["words"] == {"red": "crimson"}


@pytest.mark.parametrize("name", ["clip", "csp"])
def test_a_model_keeps_the_words_of_its_prompts(name, images, tmp_path):
    worded = make_space().with_words({"Dark.Blue": "navy", "circle": "round thing"})
    model, plain = (build(Recipe(name), space).eval() for space in (worded, make_space()))
    model.save_pretrained(tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.space == worded
    assert again.space.words == worded.words
    with torch.no_grad():
        assert torch.equal(again.scores(images, PAIRS), model.scores(images, PAIRS))
        assert not torch.equal(again.scores(images, PAIRS), plain.scores(images, PAIRS))


def test_the_class_that_is_asked_must_be_that_of_the_model(images, folder, tmp_path):
    for kind in (CSP, Condensed, Method):  # the method's own, that around it, and that of all
        assert type(kind.from_pretrained(folder)) is Condensed
    trained("csp").save_pretrained(tmp_path / "alone")
    assert type(CSP.from_pretrained(tmp_path / "alone")) is CSP
    with pytest.raises(TypeError, match=r"expected .*alone to hold a Troika, got a CSP"):
        Troika.from_pretrained(str(tmp_path / "alone"))
    with pytest.raises(TypeError, match=r"expected .*alone to hold a Condensed, got a CSP"):
        Condensed.from_pretrained(tmp_path / "alone")
    with pytest.raises(TypeError, match=r"expected .*csp to hold a CLIP, got a CSP"):
        CLIP.from_pretrained(folder)


def test_a_second_save_takes_the_place_of_the_first(images, folder):
    second = trained("coop")
    second.record = {"data": "moths"}
    (folder / "notes.txt").write_text("somebody's own")
    second.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == FILES | {"notes.txt"}
    assert "# coop on moths" in (folder / "README.md").read_text()
    assert set(load_file(folder / "model.safetensors")) == set(second.learned)
    with torch.no_grad():
        assert torch.equal(load(folder).scores(images, PAIRS), second.scores(images, PAIRS))


def test_a_model_made_by_hand_is_not_saved_and_replaces_nothing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    encoder = wrap("tiny")
    for model in (Aligned(encoder, make_space()), Condensed(CSP(encoder, make_space()))):
        with pytest.raises(ValueError, match=r"expected a model of a Recipe .*build\), got one made by hand"):
            model.save_pretrained(folder)
        with pytest.raises(ValueError, match="got one made by hand"):
            model.generate_model_card()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(ValueError, match="got one made by hand"):
        Aligned(encoder, make_space()).save_pretrained(folder.parent / "new")
    assert not (folder.parent / "new").exists()


def test_what_the_recipe_would_not_bring_back_is_not_saved(images, tmp_path):
    model = trained("csp", images, ("condenser", "bank"))
    for name, value in (("alpha", 0.25), ("beta", 0.25), ("gamma", 0.25), ("direction", "forward"), ("joint", True)):
        kept = getattr(model, name)
        setattr(model, name, value)
        with pytest.raises(ValueError, match=f"expected `{name}` to be {kept}, as in the model's recipe, got {value}"):
            model.save_pretrained(tmp_path / "csp")
        setattr(model, name, kept)
    model.bank = DynamicMemoryBank(len(PAIRS), 96, slots=5)
    with pytest.raises(ValueError, match=r"expected `bank\.slots` to be 3, as in the model's recipe, got 5"):
        model.save_pretrained(tmp_path / "csp")
    assert not (tmp_path / "csp").exists()
    model.bank = None
    model.save_pretrained(tmp_path / "csp")
    assert load(tmp_path / "csp").bank is None


def test_a_clip_of_other_weights_is_told(folder, monkeypatch):
    def other(name):
        encoder = wrap(name)
        with torch.no_grad():
            encoder.model.logit_scale += 1e-6
        return encoder

    monkeypatch.setattr(recipe, "wrap", other)
    for read in (load, Condensed.from_pretrained):
        with pytest.raises(ValueError, match=r"the encoder 'tiny' that .*csp was trained on, got one of other"):
            read(folder)


def test_a_clip_of_another_activation_is_told(folder, monkeypatch):
    def other(name):
        encoder = wrap(name)
        for block in (*encoder.blocks("vision"), *encoder.blocks("text")):
            block.mlp.gelu = QuickGELU()
        return encoder

    content = json.loads((folder / "config.json").read_text())
    assert (content["encoder_container"], content["encoder_activation"]) == ("open_clip", "GELU")
    monkeypatch.setattr(recipe, "wrap", other)
    message = (
        r"got one of other weights or kind \(open_clip, GELU, weights (\w+) there, open_clip, QuickGELU, weights \1"
    )
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_folder_of_an_earlier_version_is_read(folder, images):
    expected = load(folder).scores(images, PAIRS)
    content = json.loads((folder / "config.json").read_text())
    del content["encoder_container"], content["encoder_activation"], content["recipe"]["dense"]
    del content["sha256"], content["files"]
    (folder / "config.json").write_text(json.dumps(content))
    assert torch.equal(load(folder).scores(images, PAIRS), expected)


def test_a_path_of_a_clip_is_kept_from_the_root(images, tmp_path, monkeypatch):
    shutil.copytree(files("czsl_heads.encoders") / "assets", tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    model = build(Recipe("csp", "tiny:clip"), make_space()).eval()
    model.save_pretrained("saved")
    monkeypatch.chdir("/")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "saved").scores(images, PAIRS), model.scores(images, PAIRS))


def test_another_size_of_images_is_kept_and_nothing_else_is_saved_in_silence(tmp_path):
    small = build(Recipe("clip", image_size=64), make_space()).eval()
    small.save_pretrained(tmp_path / "clip")
    again = load(tmp_path / "clip")
    assert (again.encoder.image_size, again.encoder.grid) == (64, (8, 8))
    larger = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.scores(larger, PAIRS), small.scores(larger, PAIRS))

    message = r"expected `encoder` with image_size=None, as the recipe says, got \(64, 64\)"
    with pytest.raises(ValueError, match=message):
        build(Recipe("clip"), make_space(), encoder=wrap("tiny", image_size=64))
    model = build(Recipe("clip"), make_space())
    model.encoder.dense = "clearclip"
    with pytest.raises(ValueError, match="expected `encoder` with dense='none', as the recipe says, got 'clearclip'"):
        model.save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_the_recipe_of_dense_patches_is_kept(images, tmp_path):
    model = build(Recipe("clip", dense="clearclip"), make_space()).eval()
    model.save_pretrained(tmp_path / "clip")
    again = load(tmp_path / "clip")
    assert again.encoder.dense == "clearclip"
    with torch.no_grad():
        scores = model.scores(images, PAIRS)
        assert torch.equal(again.scores(images, PAIRS), scores)
        plain = build(Recipe("clip"), make_space()).eval()
        assert not torch.allclose(plain.scores(images, PAIRS), scores, atol=1e-2)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "expected `folder` of a trained model, got .*csp"),
        (lambda folder: (folder / "config.json").unlink(), r"got .*csp \(.*No such file.*config\.json"),
        (
            lambda folder: (folder / "config.json").write_text('{"recipe": '),
            r"got .*csp \(expected JSON in .*Expecting value.*\); take another copy",
        ),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), r"got .*csp \(.*codec can't decode"),
        (
            lambda folder: (folder / "config.json").write_text("[1, 2]"),
            r"config\.json to hold an object of JSON, got a list",
        ),
        (lambda folder: (folder / "config.json").write_text("3"), r"config\.json to hold an object of JSON, got a int"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "clip"}'), "config.json holds no model"),
        (lambda folder: change(folder, recipe={"method": "csp", "colour": 1}), r"csp/config\.json .*got 'colour'"),
        (lambda folder: change(folder, recipe={"method": "duplex"}), r"csp/config\.json that can be .*got 'duplex'"),
        (lambda folder: change(folder, recipe={}), r"csp/config\.json that can be built, got .*'method'"),
        (lambda folder: change(folder, recipe={"method": "csp", "encoder": "huge"}), r"csp/config\.json .*'huge'"),
        (lambda folder: change(folder, label_space={}), r"csp/config\.json that can be built, got 'pairs'"),
    ],
)
def test_a_configuration_that_cannot_be_right_is_told_by_its_file(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)
    if folder.exists():
        with pytest.raises(ValueError, match=message):
            Condensed.from_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: path.unlink(), "expected tensors of a model in .*csp/model.safetensors, got no such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), "in .*csp/model.safetensors, got a damaged file"),
        (lambda path: path.write_bytes(b"PK and so on"), "in .*csp/model.safetensors, got a damaged file"),
        (
            lambda path: save_file({"weight": torch.zeros(2)}, path),
            "expected weights of this model in .*csp/model.safetensors, got other names or shapes: condenser.*, weight",
        ),
        (
            lambda path: change_tensors(path.parent, **{"method.prompts.primitives": torch.zeros(4, 96)}),
            r"in .*model\.safetensors, got other names or shapes: method\.prompts\.primitives$",
        ),
        (
            lambda path: change_tensors(path.parent, **{"method.prompts.primitives": None}),
            r"in .*model\.safetensors, got other names or shapes: method\.prompts\.primitives$",
        ),
        (
            lambda path: change_tensors(path.parent, **{"bank.sizes": torch.tensor([5, 96, 3])}),
            r"expected the memory bank of this model in .*csp/model\.safetensors, got another \(",
        ),
        (
            lambda path: change_tensors(path.parent, **{"bank.entropy": None}),
            r"expected the memory bank of this model in .*csp/model\.safetensors, got another \(",
        ),
    ],
    ids=["missing", "cut", "foreign", "another", "shape", "lacking", "bank", "half a bank"],
)
def test_weights_that_cannot_be_right_are_told_by_their_file(folder, spoil, message):
    change(folder, files={})  # as of an earlier version, which wrote no digests
    spoil(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("name", ["method.prompts.primitives", "bank.entropy"])
def test_whole_files_of_other_tensors_are_told_by_their_digest(folder, name):
    tensors = load_file(folder / "model.safetensors")
    changed = tensors[name] + 1e-3
    change_tensors(folder, **{name: changed})
    with pytest.raises(ValueError, match=r"model\.safetensors as it was written, got other bytes: .*take another copy"):
        load(folder)
    change_tensors(folder, **{name: tensors[name]})
    load(folder)


def test_a_model_that_lost_its_bank_is_told(folder):
    tensors = load_file(folder / "model.safetensors")
    change_tensors(folder, **{name: None for name in tensors if name.startswith("bank.")})
    with pytest.raises(ValueError, match="got other bytes"):
        load(folder)


def test_a_number_that_was_changed_in_a_configuration_is_told(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"seed": ', '"seed": 1', 1).replace('"depth": ', '"depth": 1', 1))
    with pytest.raises(ValueError, match=r"config\.json as it was written, got other content: its digest does not fit"):
        load(folder)


def test_a_bank_without_a_condenser_is_told(images, folder, tmp_path):
    trained("csp").save_pretrained(tmp_path / "alone")
    of_bank = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "bank." in name}
    change(tmp_path / "alone", files={})
    change_tensors(tmp_path / "alone", **of_bank)
    with pytest.raises(ValueError, match=r"expected weights of this model in .*alone.*: bank\.count, bank\."):
        load(tmp_path / "alone")


def test_rows_and_seeds_are_of_folders_with_several_models(folder):
    for choice in ({"row": "max"}, {"seed": 0}):
        with pytest.raises(ValueError, match=r"expected `row` and `seed` with a folder of several models, got .*csp"):
            load(folder, **choice)


def test_the_card_says_what_is_known(folder):
    model = load(folder)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: czsl-heads\n")
    assert "# csp on data of your own" in card
    assert "one of 4 pairs of 3 attributes and 2 objects. It was trained on 3 of the pairs." in card
    assert f"- encoder: `tiny`; SHA-256 of its weights `{model.encoder_digest}`" in card
    assert f"- recipe: `{model.recipe.as_dict()}`" in card
    assert "It was not tested." in card

    numbers = {"seen": 0.5, "unseen": 0.25, "harmonic_mean": 1 / 3, "auc": 0.125}
    model.record = {"seed": 3, "data": "moths", "epoch": 2, "test": {"open": {"standard": numbers}}}
    card = str(model.generate_model_card())
    assert "# csp on moths" in card
    assert "| open world, standard | 50.0 | 25.0 | 33.3 | 12.5 |" in card
    assert "Test images had no part in training or in the bank." in card
    assert "- seed: `3`" in card
    assert "digest of the split" not in card
    model.record["adapted"] = True
    assert "Images were added to the memory bank after that." in str(model.generate_model_card())


def hub_in(shelf, calls):
    """In place of the Hub's interface: what is uploaded lies in a folder, and every call is written down."""

    class Hub:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, repo_id, folder_path, **options):
            calls.append(("upload", repo_id, options["commit_message"]))
            shutil.copytree(folder_path, shelf / repo_id)
            return f"https://hub/{repo_id}/commit/1"

    return Hub


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder instead of the Hub, and what was asked of it."""
    calls = []

    def download(repo_id, **options):
        calls.append(("download", repo_id, options["revision"]))
        return str(tmp_path / "hub" / repo_id)

    def download_one(repo_id, filename, **options):
        return str(Path(download(repo_id, **options)) / filename)

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", hub_in(tmp_path / "hub", calls))
    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", download_one)
    monkeypatch.setattr(hub, "snapshot_download", download)
    return tmp_path / "hub", calls


def test_a_model_is_pushed_to_the_hub_and_fetched_from_there(images, shelf):
    place, calls = shelf
    model = trained("csp", images, ("condenser", "bank"))
    link = model.push_to_hub("somebody/moths", token="secret", commit_message="First", private=True)
    assert link == "https://hub/somebody/moths/commit/1"
    wanted = {"private": True, "exist_ok": True}
    assert calls == [("token", "secret"), ("create", "somebody/moths", wanted), ("upload", "somebody/moths", "First")]
    assert {path.name for path in (place / "somebody" / "moths").iterdir()} == FILES
    assert "secret" not in "".join(path.read_text("latin-1") for path in (place / "somebody" / "moths").iterdir())

    calls.clear()
    again = Condensed.from_pretrained("somebody/moths", revision="v1")
    assert set(calls) == {("download", "somebody/moths", "v1")}
    with torch.no_grad():
        assert torch.equal(again.scores(images, PAIRS), model.scores(images, PAIRS))
    with pytest.raises(TypeError, match="expected somebody/moths to hold a CLIP, got a CSP"):
        CLIP.from_pretrained("somebody/moths")


def test_a_model_may_be_saved_and_pushed_at_once(shelf, tmp_path):
    place, calls = shelf
    trained("csp").save_pretrained(tmp_path / "moths", push_to_hub=True, repo_id="somebody/moths")
    assert [call[0] for call in calls] == ["token", "create", "upload"]
    for name in FILES:
        assert (tmp_path / "moths" / name).read_bytes() == (place / "somebody" / "moths" / name).read_bytes()


def test_a_model_made_by_hand_is_not_pushed(shelf):
    place, calls = shelf
    with pytest.raises(ValueError, match="got one made by hand"):
        Aligned(wrap("tiny"), make_space()).push_to_hub("somebody/moths")
    assert not calls  # nor is there an empty place for it
    assert not place.exists()
