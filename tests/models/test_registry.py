"""Methods by name, those of other packages among them."""

import importlib
import sys

import pytest
import torch

from czsl_heads import load
from czsl_heads.models.condensed import Condensed
from czsl_heads.models.method import Method
from czsl_heads.models.recipe import CondenserOptions, Recipe, build, method_options, new_bank
from czsl_heads.models.registry import find_method, method_names, presets_path
from czsl_heads.models.sac import Aligned
from czsl_heads.training.options import load_options, preset_names
from tests.models.shared import METHODS, PAIRS, SEEN, TARGETS, disturb, make_images, make_space

# A method with what may go wrong: a statistic that is no parameter, something frozen, and a part named as the bank is.
STRANGER = '''
import torch
import torch.nn.functional as F
from torch import nn

from czsl_heads.models.method import PairMethod
from czsl_heads.prompts.soft import TextFeatures


class Drawn(PairMethod):
    """A learned row for each pair, drawn to a frozen one."""

    def __init__(self, encoder, space, *, align="cls", pull=0.5):
        super().__init__(encoder, space, align=align)
        self.pull = pull
        self.rows = nn.Parameter(torch.randn(len(space.attributes), len(space.objects), encoder.dim))
        self.bank = nn.Linear(encoder.dim, encoder.dim)
        self.fixed = nn.Parameter(torch.randn(encoder.dim), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def texts(self, pairs):
        self.calls += int(self.training)
        rows = self.bank(self.rows[pairs[:, 0], pairs[:, 1]]) + self.pull * self.fixed
        unit = F.normalize(rows, dim=1)
        return TextFeatures(unit, unit[:0], unit[:0])


not_a_method = "a string"


class NotAMethod(nn.Module):
    pass
'''
ENTRIES = """
[czsl_heads.methods]
drawn = stranger_heads.drawn:Drawn
lost = stranger_heads.lost:Lost
gone = stranger_gone:Gone
renamed = stranger_heads.drawn:Other
words = stranger_heads.drawn:not_a_method
module = stranger_heads.drawn:NotAMethod
failing = stranger_heads.failing:Failing
"""


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    """An installed package that brings methods, some of which are broken."""
    package, about = tmp_path / "site" / "stranger_heads", tmp_path / "site" / "stranger_heads-1.0.dist-info"
    for folder in (package, about):
        folder.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "drawn.py").write_text(STRANGER)
    (package / "failing.py").write_text("import no_such_package_anywhere\n")
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-heads\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    yield package
    for name in [name for name in sys.modules if name.startswith("stranger_heads")]:
        del sys.modules[name]


def make(**options):
    torch.manual_seed(0)
    return build(Recipe("drawn", align="max", model={"pull": 0.25}, **options), make_space())


def test_methods_of_this_package_are_found_by_name():
    assert find_method("sac") is Aligned
    assert set(method_names()) >= {"sac", "clip", "coop", "csp", "troika"}
    assert method_names() == sorted(method_names())
    for name in METHODS:
        assert issubclass(find_method(name), Method)
        assert presets_path(name).is_file()


def test_an_unknown_name_is_told_with_the_choices():
    for ask in (find_method, presets_path, method_options):
        with pytest.raises(ValueError, match=r"expected `method` to be one of .*clip, coop, csp, .*, got 'drawn'"):
            ask("drawn")


def test_a_method_of_another_package_is_found(stranger):
    kind = find_method("drawn")
    assert (kind.__name__, kind.__module__) == ("Drawn", "stranger_heads.drawn")
    assert {"drawn", *METHODS} <= set(method_names())
    assert method_options("drawn") == ["pull"]


def test_a_method_of_another_package_is_built_and_trained(stranger):
    model, images = make(), make_images()
    assert type(model) is find_method("drawn")
    assert (model.pull, model.seam.head.reduce) == (0.25, "max")
    assert set(model.learned) == {"rows", "bank.weight", "bank.bias", "calls", "fixed"}
    model.train().loss(images, SEEN, TARGETS).backward()
    assert all(model.get_parameter(name).grad.any() for name in ("rows", "bank.weight"))
    with torch.no_grad():
        assert model.eval().scores(images, PAIRS).shape == (6, 4)


@torch.no_grad()
@pytest.mark.parametrize("condenser", [None, CondenserOptions()], ids=["alone", "condensed"])
def test_a_method_of_another_package_is_saved_and_loaded(stranger, tmp_path, condenser):
    model, images = disturb(make(condenser=condenser)).eval(), make_images()
    method = getattr(model, "method", model)
    method.calls += 7
    if condenser is not None:
        model.bank = new_bank(model.space, model.encoder, model.recipe.bank)
        model.adapt(model(images, PAIRS))
    model.save_pretrained(tmp_path / "model")
    torch.manual_seed(5)
    again = load(tmp_path / "model")
    assert type(again) is type(model)
    assert isinstance(again, Condensed) == (condenser is not None)
    assert int(getattr(again, "method", again).calls) == 7
    torch.testing.assert_close(again.scores(images, PAIRS), model.scores(images, PAIRS))
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert type(find_method("drawn").from_pretrained(tmp_path / "model")) is type(model)


def test_two_packages_that_bring_one_name_are_told(stranger, tmp_path, monkeypatch):
    other = tmp_path / "other" / "other-1.0.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n", encoding="utf-8")
    (other / "entry_points.txt").write_text("[czsl_heads.methods]\ndrawn = other:Drawn\n", encoding="utf-8")
    monkeypatch.syspath_prepend(other.parent)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="one package that brings `method` drawn, got other:Drawn and stranger_heads"):
        find_method("drawn")


def test_presets_stand_beside_the_module(stranger):
    assert preset_names("drawn") == []
    options, sources = load_options("drawn", "shapes")  # of its own it has none
    assert sources["bank.slots"] == "sac"
    presets = stranger / "presets" / "drawn.yaml"
    assert presets_path("drawn") == presets
    presets.parent.mkdir()
    presets.write_text("moths:\n  paper: {epochs: 3, model: {pull: 0.125}}\n")
    options, sources = load_options("drawn", "moths")
    assert (options.epochs, options.model, sources["model.pull"]) == (3, {"pull": 0.125}, "paper")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lost", r"expected `method` lost in stranger_heads\.lost:Lost, got No module named 'stranger_heads\.lost' \("),
        ("gone", "expected `method` gone in stranger_gone:Gone, got No module named 'stranger_gone'$"),
        ("renamed", r"expected `method` renamed in stranger_heads\.drawn:Other, got .* has no attribute 'Other'"),
        ("failing", r"expected `method` failing in .*, got No module named 'no_such_package_anywhere'$"),
    ],
)
def test_a_broken_entry_is_told_by_its_name_and_place(stranger, name, message):
    for ask in (find_method, presets_path, method_options):
        with pytest.raises(ValueError, match=message):
            ask(name)
    assert name in method_names()  # the others are not kept from being found
    assert find_method("sac") is Aligned


def test_the_folder_that_hides_a_package_is_told(stranger):
    with pytest.raises(
        ValueError, match=r"\(`stranger_heads` is .*stranger_heads here; another folder of that name may"
    ):
        find_method("lost")


@pytest.mark.parametrize("name", ["words", "module"])
def test_what_is_no_method_is_told(stranger, name):
    with pytest.raises(TypeError, match=f"expected `method` {name} to be a class of Method in stranger_heads.drawn:"):
        find_method(name)


def test_a_model_whose_package_is_gone_is_told_by_its_file(stranger, tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path / "site")])
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"expected a model in .*config\.json that can be built, got .* got 'drawn'"):
        load(tmp_path / "model")
