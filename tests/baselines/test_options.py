"""Presets and their provenance, and the configuration that the command line makes."""

import inspect

import pytest

from baselines import BASELINES
from baselines.options import ADDED, PRESETS, SOURCES, Options, configure, load_options, preset_names
from czsl_heads.training import options as sac_options

# What the released code sets, by method and data set: Troika's YAML files, the commands of CSP's README.
TROIKA = {
    "accumulate": 1,
    "weight_decay": 1e-5,
    "decay_every": 5,
    "decay_factor": 0.5,
    "init_weight": 0.1,
    "adapter_dim": 64,
    "adapter_dropout": 0.1,
    "inference_weights": [1, 1, 1],
}
CSP = {"epochs": 20, "batch_size": 64, "accumulate": 2, "weight_decay": 1e-5, "decay_every": None, "selection": "last"}
RELEASED = {
    ("troika", "ut-zappos"): {
        **TROIKA,
        "epochs": 15,
        "batch_size": 128,
        "learning_rate": 5e-4,
        "dropout": 0.3,
        "layers": 2,
        "traction_dropout": 0,
        "loss_weights": [1, 1, 1],
        "eval_batch_size": 64,
        "selection": "auc",
    },
    ("troika", "mit-states"): {
        **TROIKA,
        "epochs": 10,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "dropout": 0.3,
        "layers": 3,
        "traction_dropout": 0.1,
        "loss_weights": [1, 1, 1],
        "eval_batch_size": 32,
    },
    ("troika", "cgqa"): {
        **TROIKA,
        "epochs": 15,
        "batch_size": 16,
        "learning_rate": 3.125e-6,
        "dropout": 0,
        "layers": 2,
        "traction_dropout": 0,
        "loss_weights": [1, 0.1, 0.1],
        "eval_batch_size": 4,
        "selection": "auc",
    },
    ("csp", "mit-states"): {**CSP, "learning_rate": 5e-5, "dropout": 0.3, "eval_batch_size": 16},
    ("csp", "ut-zappos"): {**CSP, "learning_rate": 5e-4, "dropout": 0.2},
    ("csp", "cgqa"): {"epochs": 20, "decay_every": None, "selection": "last"},
    **{("coop", data): {"decay_every": None, "selection": "last"} for data in ("mit-states", "ut-zappos", "cgqa")},
    **{("clip", data): {"epochs": 0} for data in ("mit-states", "ut-zappos", "cgqa", "shapes")},
}
EVERY = [(method, preset) for method in BASELINES for preset in preset_names(method)]


def value(options, name):
    return options.model[name] if name in options.model else getattr(options, name)


@pytest.mark.parametrize(("method", "preset"), EVERY)
def test_what_a_preset_calls_released_is_what_was_released(method, preset):
    options, sources = load_options(method, preset)
    claimed = {name for name, source in sources.items() if source == "released"}
    released = RELEASED.get((method, preset), {})
    assert claimed == released.keys()
    assert {name: value(options, name) for name in claimed} == released


def test_what_authors_said_in_issues_is_marked_so():
    options, sources = load_options("troika", "mit-states")
    assert (options.selection, sources["selection"]) == ("loss", "issue")
    for method in ("csp", "coop"):
        for preset in ("ut-zappos", "mit-states", "cgqa"):
            options, _ = load_options(method, preset)
            assert options.batch_size * options.accumulate == 128
    assert load_options("csp", "cgqa")[1]["accumulate"] == load_options("coop", "cgqa")[1]["batch_size"] == "guess"
    assert load_options("coop", "mit-states")[0].learning_rate == load_options("csp", "mit-states")[0].learning_rate


def test_every_method_has_a_preset_for_every_data_set_and_no_preset_is_left_over():
    assert {path.stem for path in PRESETS.iterdir()} == BASELINES.keys()
    for method in BASELINES:
        assert preset_names(method) == ["cgqa", "mit-states", "shapes", "ut-zappos"]


@pytest.mark.parametrize(("method", "preset"), EVERY)
def test_every_value_of_a_preset_has_one_source(method, preset):
    options, sources = load_options(method, preset)
    assert set(sources.values()) <= set(SOURCES)
    parameters = inspect.signature(BASELINES[method]).parameters
    assert options.model.keys() <= parameters.keys()
    assert options.model.keys() | set(vars(options)) >= sources.keys()


def test_an_override_takes_the_place_of_a_value_and_of_its_source():
    options, sources = load_options("csp", "mit-states", {"epochs": 3, "context": "a", "topk": 2})
    assert (options.epochs, options.model["context"], options.topk) == (3, "a", 2)
    assert (sources["epochs"], sources["context"], sources["learning_rate"]) == ("given", "given", "released")


def test_a_method_that_learns_nothing_has_one_seed():
    assert configure("clip", seeds=5, first_seed=3).seeds == [3]
    assert configure("csp", seeds=2, first_seed=3).seeds == [3, 4]
    assert configure("csp", seeds=2, quick=True).baseline.epochs == 2
    assert configure("clip", quick=True).baseline.epochs == 0
    assert configure("clip", seeds=2, add=["vac"]).seeds == [0, 1]
    assert configure("clip", quick=True, add=["vac"]).baseline.condense_epochs == 2


@pytest.mark.parametrize(("method", "preset"), EVERY)
def test_condenser_and_bank_have_the_values_of_the_sac_pipeline(method, preset):
    options, sources = load_options(method, preset)
    sac = sac_options.load_options(preset)
    assert {sources[name] for name in ADDED} == {"sac"}
    for name in ("alpha", "beta", "gamma", "depth", "slots", "bank_temperature"):
        assert getattr(options, name) == getattr(sac, name)
    stage = options.condensing
    assert (stage.epochs, stage.learning_rate) == (sac.extra_epochs, sac.condense_learning_rate or sac.learning_rate)
    assert stage.weight_decay == options.weight_decay


def test_the_preset_follows_the_encoder():
    assert configure("troika").preset == "shapes"
    assert configure("troika", encoder="ViT-L-14:openai").preset == "mit-states"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "eva"}, "`method` to be one of clip, coop, csp, troika, got 'eva'"),
        ({"method": "csp", "preset": "vaw"}, "`preset` to be one of cgqa, mit-states, shapes, ut-zappos, got 'vaw'"),
        ({"method": "csp", "options": {"layers": 1}}, "`options` to be one of epochs, .*, got 'layers'"),
        ({"method": "csp", "options": {"align": "max"}}, "`options` to be one of .*, got 'align'"),
        ({"method": "csp", "options": {"model": {}}}, "`options` to be one of .*, got 'model'"),
        ({"method": "csp", "imbalance": 0.3, "data": "."}, "`imbalance` with data="),
        ({"method": "csp", "imbalance": 3}, r"`imbalance` to be in \[0, 1\]"),
        ({"method": "csp", "seeds": 0}, "`seeds`"),
        ({"method": "csp", "trainer": {"max_epochs": 1}}, "`trainer` without"),
        ({"method": "csp", "trainer": {"accumulate_grad_batches": 1}}, "`options.accumulate`"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        configure(**arguments)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *(("epochs", -1), ("batch_size", 0), ("accumulate", 0), ("learning_rate", 0.0), ("weight_decay", -1.0)),
        *(("decay_every", 0), ("decay_factor", 0.0), ("selection", "hm"), ("topk", 0), ("eval_batch_size", 0)),
        *(("workers", -1), ("selection_digits", -1), ("incomplete_group", "sum"), ("alpha", 7.0)),
    ],
)
def test_options_out_of_range_are_named(name, wrong):
    with pytest.raises(ValueError, match=f"`{name}`"):
        Options(**{name: wrong})
    with pytest.raises(TypeError, match="`include_cls` to be a bool"):
        Options(include_cls=1)


def test_additions_come_from_the_command_line_and_from_a_file(tmp_path):
    from baselines.__main__ import _parser

    (tmp_path / "settings.yaml").write_text("method: csp\nadd: [vac, bank]\n")
    commands = (f"--config={tmp_path / 'settings.yaml'}",), ("--method=csp", "--add=vac", "--add", "bank")
    for command in commands:
        assert _parser().parse_args(["ablate", *command])["ablate"]["add"] == ["vac", "bank"]
    assert _parser().parse_args(["ablate", "--method=csp"])["ablate"]["add"] == []
    with pytest.raises(TypeError, match="`add` to be a list of vac and bank, got 'vac'"):
        configure("csp", add="vac")
