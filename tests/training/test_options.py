"""Options, the presets of every method with where each value is from, and what may be changed in them."""

from importlib.metadata import EntryPoint

import pytest
import yaml

from czsl_heads._files import flatten
from czsl_heads.models import registry
from czsl_heads.models.recipe import BankOptions, HeadOptions, method_options
from czsl_heads.models.registry import METHODS, method_names
from czsl_heads.training.options import SOURCES, Options, change, load_options, nest, preset_names

DATA = ("ut-zappos", "mit-states", "cgqa")
# What the released code sets, by method and data set: Troika's YAML files, the commands of CSP's README.
RELEASED = yaml.safe_load("""
troika:
  ut-zappos:
    {epochs: 15, batch_size: 128, accumulate: 1, learning_rate: 5.0e-4, eval_batch_size: 64, selection: auc,
     weight_decay: 1.0e-5, decay_every: 5, decay_factor: 0.5,
     model: {dropout: 0.3, layers: 2, init_weight: 0.1, adapter_dim: 64, adapter_dropout: 0.1, traction_dropout: 0,
             loss_weights: [1, 1, 1], inference_weights: [1, 1, 1]}}
  mit-states:
    {epochs: 10, batch_size: 64, accumulate: 1, learning_rate: 1.0e-4, eval_batch_size: 32,
     weight_decay: 1.0e-5, decay_every: 5, decay_factor: 0.5,
     model: {dropout: 0.3, layers: 3, init_weight: 0.1, adapter_dim: 64, adapter_dropout: 0.1, traction_dropout: 0.1,
             loss_weights: [1, 1, 1], inference_weights: [1, 1, 1]}}
  cgqa:
    {epochs: 15, batch_size: 16, accumulate: 1, learning_rate: 3.125e-6, eval_batch_size: 4, selection: auc,
     weight_decay: 1.0e-5, decay_every: 5, decay_factor: 0.5,
     model: {dropout: 0, layers: 2, init_weight: 0.1, adapter_dim: 64, adapter_dropout: 0.1, traction_dropout: 0,
             loss_weights: [1, 0.1, 0.1], inference_weights: [1, 1, 1]}}
csp:
  mit-states:
    {epochs: 20, batch_size: 64, accumulate: 2, learning_rate: 5.0e-5, weight_decay: 1.0e-5, decay_every: null,
     selection: last, eval_batch_size: 16, model: {dropout: 0.3}}
  ut-zappos:
    {epochs: 20, batch_size: 64, accumulate: 2, learning_rate: 5.0e-4, weight_decay: 1.0e-5, decay_every: null,
     selection: last, model: {dropout: 0.2}}
  cgqa: {epochs: 20, decay_every: null, selection: last}
coop: {ut-zappos: &loop {decay_every: null, selection: last}, mit-states: *loop, cgqa: *loop}
clip: {ut-zappos: &nothing {epochs: 0}, mit-states: *nothing, cgqa: *nothing, shapes: *nothing}
""")
# What the paper of SAC gives.
PAPER = yaml.safe_load("""
ut-zappos: {epochs: 15, batch_size: 64, learning_rate: 2.0e-4, condenser: {depth: 3}, alpha: 0.5, beta: 0.3, gamma: 0.5,
            bank: {slots: 16}}
mit-states: {epochs: 10, batch_size: 64, learning_rate: 5.0e-5, condenser: {depth: 3}, alpha: 0.9, beta: 0.7,
             gamma: 0.4, bank: {slots: 24}}
cgqa: {epochs: 15, batch_size: 16, learning_rate: 5.0e-4, condenser: {depth: 1}, alpha: 0.5, beta: 0.7, gamma: 0.1,
       bank: {slots: 16}}
""")
EVERY = [(method, preset) for method in method_names() for preset in preset_names(method)]
BASELINES = [(method, preset) for method, preset in EVERY if method != "sac"]


def from_source(method: str, preset: str, source: str) -> dict:
    """The values of a preset that are from one source, names with dots."""
    options, sources = load_options(method, preset)
    values = flatten(options.as_dict())
    return {name: values[name] for name, found in sources.items() if found == source}


def test_every_method_has_a_preset_for_every_data_set() -> None:
    assert {"clip", "coop", "csp", "eva", "sac", "troika"} <= set(method_names())
    for method in ("clip", "coop", "csp", "eva", "sac", "troika"):
        assert preset_names(method) == ["cgqa", "mit-states", "shapes", "ut-zappos"]


@pytest.mark.parametrize(("method", "preset"), EVERY)
def test_every_value_of_a_preset_has_one_source_and_what_is_released_was_released(method: str, preset: str) -> None:
    options, sources = load_options(method, preset)
    assert set(sources.values()) <= set(SOURCES)
    assert sources.keys() <= flatten(options.as_dict()).keys()
    assert options.model.keys() <= set(method_options(method))
    assert from_source(method, preset, "released") == flatten(RELEASED.get(method, {}).get(preset, {}))


@pytest.mark.parametrize("preset", PAPER)
def test_sacs_presets_hold_what_the_paper_gives(preset: str) -> None:
    assert from_source("sac", preset, "paper") == flatten(PAPER[preset])


def test_what_authors_said_in_issues_is_marked_so() -> None:
    options, sources = load_options("troika", "mit-states")
    assert (options.selection, sources["selection"]) == ("loss", "issue")
    for method in ("csp", "coop"):
        for preset in DATA:
            options, _ = load_options(method, preset)
            assert options.batch_size * options.accumulate == 128
    assert load_options("csp", "cgqa")[1]["accumulate"] == load_options("coop", "cgqa")[1]["batch_size"] == "guess"
    assert load_options("coop", "mit-states")[0].learning_rate == load_options("csp", "mit-states")[0].learning_rate


@pytest.mark.parametrize(("method", "preset"), BASELINES)
def test_condenser_and_bank_have_the_values_of_sac(method: str, preset: str) -> None:
    options, _ = load_options(method, preset)
    sac, _ = load_options("sac", preset)
    for name in ("alpha", "beta", "gamma", "condenser", "extra_epochs"):
        assert getattr(options, name) == getattr(sac, name), name
    assert options.bank.slots == sac.bank.slots
    assert options.condense_learning_rate == (sac.condense_learning_rate or sac.learning_rate)
    taken = from_source(method, preset, "sac")
    assert {"condense_epochs", "condense_learning_rate", "alpha", "beta", "gamma", "bank.slots"} <= taken.keys()


def test_a_method_without_presets_has_the_default_options(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**registry._found(), "mine": EntryPoint("mine", "baselines.csp:CSP", METHODS)}
    monkeypatch.setattr(registry, "_found", lambda: known)
    options, sources = load_options("mine", "cgqa", {"model.dropout": 0.25})
    sac, _ = load_options("sac", "cgqa")
    given = {"condense_epochs": 15, "condense_learning_rate": 5e-4, "beta": 0.7, "gamma": 0.1, "model.dropout": 0.25}
    assert options == change(Options(condenser=sac.condenser), {**given, "bank.slots": 16})
    assert set(sources.values()) == {"sac", "given"}
    with pytest.raises(ValueError, match=r"expected `preset` to be one of cgqa, .*, got 'imagenet'"):
        load_options("mine", "imagenet")


def test_an_override_takes_the_place_of_a_value_and_of_its_source() -> None:
    given = {"epochs": 3, "model": {"context": "a"}, "head.topk": 2, "lora.matrices": ["fc"]}
    options, sources = load_options("csp", "mit-states", given)
    assert (options.epochs, options.head.topk, options.lora.matrices) == (3, 2, ("fc",))
    assert options.model == {"context": "a", "dropout": 0.3}
    assert {name for name, source in sources.items() if source == "given"} == {*flatten(given)}
    assert sources["learning_rate"] == "released"
    assert load_options("csp", "mit-states", {"model": {}})[0] == load_options("csp", "mit-states")[0]


def test_names_with_dots_stand_for_nested_ones() -> None:
    flat = {"epochs": 2, "bank.slots": 3, "bank.labels": True, "model.dropout": 0.1}
    nested = {"epochs": 2, "bank": {"slots": 3, "labels": True}, "model": {"dropout": 0.1}}
    assert nest(flat) == nest(nested) == nested
    assert flatten(nested) == flatten(flat) == flat
    assert nest({"bank": {"slots": 3}, "bank.labels": True, "epochs": 2, "model": nested["model"]}) == nested
    assert nested["bank"] == {"slots": 3, "labels": True}  # is left as it was
    assert flatten({"model": {}}) == {}


def test_changed_options_differ_in_what_was_changed() -> None:
    before = Options(epochs=4, bank=BankOptions(slots=2, labels=True), model={"context": "a", "dropout": 0.1})
    after = change(before, {"alpha": 0.0, "bank.slots": 3, "head": {"topk": 9}, "model.dropout": 0.2})
    assert after == Options(
        epochs=4,
        alpha=0.0,
        head=HeadOptions(topk=9),
        bank=BankOptions(slots=3, labels=True),
        model={"context": "a", "dropout": 0.2},
    )
    assert before.model["dropout"] == 0.1
    assert change(before, {}) == before


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("sac", {"epoch": 2}, "expected `options` to be one of epochs, batch_size, .*, model, got 'epoch'"),
        ("csp", {"align": "max"}, "expected `options` to be one of epochs, .*, got 'align'"),
        ("csp", {"dropout": 0.1}, "expected `options` with model.dropout, which is of csp itself, got dropout"),
        ("csp", {"model.layers": 1}, "expected `options.model` to be one of context, dropout, .*, got 'layers'"),
        (
            "troika",
            {"model": {"align": "cls"}},
            "expected `options.model` to be one of align_branches, .*, got 'align'",
        ),
        ("sac", {"bank.slot": 1}, "expected `options.bank` to be one of slots, .*, got 'slot'"),
        ("duplex", {}, "expected `method` to be one of clip, coop, csp, eva, sac, troika, got 'duplex'"),
    ],
)
def test_unknown_names_are_told_with_the_choices(method: str, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_options(method, "shapes", given)


@pytest.mark.parametrize(
    ("name", "message"),
    [("bank", "expected `options.bank` to hold slots, .*, got 5"), ("model", "expected `model` to be a dict, got int")],
)
def test_a_part_is_a_mapping(name: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        load_options("csp", "shapes", {name: 5})


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (-1, ["epochs", "workers", "selection_digits", "weight_decay", "gamma", "condense_learning_rate"]),
        (0, ["batch_size", "accumulate", "eval_batch_size", "micro_batch", "decay_every", "condense_epochs"]),
        (0.0, ["learning_rate", "decay_factor"]),
        (7.0, ["alpha", "beta", "patch_drop"]),
        ("hm", ["selection", "incomplete_group", "direction"]),
    ],
)
def test_options_out_of_range_are_named(wrong, names: list[str]) -> None:
    for name in names:
        with pytest.raises(ValueError, match=f"expected `{name}` to be .*, got"):
            Options(**{name: wrong})


def test_options_of_another_kind_are_named() -> None:
    switches = dict.fromkeys(("joint", "cache", "condense_augment", "checkpoint"), "yes")
    for name, wrong in {**switches, "bank": {"slots": 2}, "model": None, "epochs": "many"}.items():
        with pytest.raises(TypeError, match=f"expected `{name}` to be"):
            Options(**{name: wrong})
