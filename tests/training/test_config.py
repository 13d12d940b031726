"""What the commands' arguments mean, and which of them are refused at once."""

import os
from pathlib import Path

import pytest

from czsl_heads.training.config import configure, configure_model
from czsl_heads.training.rows import TABLES


def test_each_method_has_a_table_of_its_own_and_the_other() -> None:
    keys = {
        name: [row.key for row in configure(**arguments).rows]
        for name, arguments in {
            "sac": {},
            "csp": {"method": "csp"},
            "csp + vac": {"method": "csp", "add": ["vac"]},
            "sac, alignment": {"table": "alignment", "add": ["vac", "bank"]},
            "csp, steps": {"method": "csp", "table": "steps"},
        }.items()
    }
    steps = [row.key for row in TABLES["steps"].rows]
    assert keys["sac"] == keys["csp, steps"] == steps == ["1", "1+", "2", "2+", "3", "4", "5", "6"]
    assert keys["csp"] == ["cls", "max", "topk"]
    assert keys["csp + vac"] == ["cls", "max", "topk", "probs", "vac"]
    assert keys["sac, alignment"] == ["cls", "max", "topk", "probs", "vac", "bank", "adapted"]


def test_one_model_is_the_method_as_published_but_for_sac_which_is_whole() -> None:
    for method, align, add in (("csp", "cls", ()), ("sac", "max", ("vac", "bank"))):
        config = configure_model(method)
        assert (config.table, config.align, config.add, config.seeds) == ("one", align, add, [0])
        assert [row.key for row in config.rows] == ["model"]
    config = configure_model("csp", align="topk", add=["vac"], seed=3, options={"head.topk": 2})
    assert (config.align, config.add, config.seeds, config.options.head.topk) == ("topk", ("vac",), [3], 2)
    assert config.rows[0].model.base.align == "topk"
    assert configure_model("sac", add=[]).rows[0].model.stage == "align"


def test_presets_follow_the_encoder_and_quick_means_fewer_epochs() -> None:
    for method in ("sac", "troika"):
        assert configure(method).preset == "shapes"
        assert configure(method, encoder="ViT-L-14:openai", data="x").preset == "mit-states"
    config, quick = configure("troika"), configure("troika", quick=True)
    assert quick.shapes.train_per_pair < config.shapes.train_per_pair
    assert quick.options.epochs <= config.options.epochs
    assert quick.options.extra_epochs < config.options.extra_epochs
    assert configure(quick=True, options={"epochs": 9}).options.epochs == 9
    assert configure("clip", quick=True).options.epochs == 0


def test_one_seed_is_enough_where_nothing_is_trained() -> None:
    assert configure("clip", seeds=5, first_seed=3).seeds == [3]
    assert configure("csp", seeds=2, first_seed=3).seeds == [3, 4]
    for arguments in ({"add": ["vac"]}, {"table": "steps"}, {"sweep": "beta"}):
        assert configure("clip", seeds=2, **arguments).seeds == [0, 1]


def test_paths_are_written_down_as_absolute_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tower", "words.txt"):
        (tmp_path / name).touch()
    for by in (configure, configure_model):
        config = by(data="some", encoder="tiny:tower", world="open", feasibility="words.txt")
        assert config.encoder == f"tiny:{tmp_path / 'tower'}"
        assert config.data == str(tmp_path / "some")
        assert config.feasibility == str(tmp_path / "words.txt")
    assert all(os.path.isabs(path) for path in (config.data, config.feasibility))
    assert configure(encoder="ViT-L-14:openai", data="x").encoder == "ViT-L-14:openai"  # no file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "duplex"}, "expected `method` to be one of clip, coop, csp, eva, sac, troika, got 'duplex'"),
        ({"data": "here", "imbalance": 0.5}, 'expected `imbalance` with data="shapes" only'),
        ({"imbalance": 2.0}, "expected `imbalance` to be in"),
        ({"preset": "nothing"}, "expected `preset` to be one of"),
        ({"options": {"lr": 1}}, "expected `options` to be one of"),
        ({"options": {"dropout": 0.1}}, r"expected `options` with model\.dropout, which is of sac itself, got dropout"),
        ({"options": {"epochs": "many"}}, "expected `epochs`"),
        ({"options": {"epochs": None}}, "expected `epochs`"),
        ({"options": {"bank.slots": 0}}, "expected `bank.slots` to be"),
        ({"trainer": {"max_epochs": 2}}, "expected `trainer` without max_epochs, .*got max_epochs"),
        ({"trainer": {"check_val_every_n_epoch": 2}}, "expected `trainer` without .*got check_val_every_n_epoch"),
        ({"trainer": {"fast_dev_run": True}}, "expected `trainer` without .*got fast_dev_run"),
        ({"trainer": {"accumulate_grad_batches": 1}}, "see `options.accumulate`"),
        ({"add": "vac"}, "expected `add` to be a list of vac and bank, got 'vac'"),
        ({"table": "alignment", "add": ["bank"]}, "expected `add` with vac where there is a bank"),
        ({"world": "half"}, "expected `world` to be one of closed, open, got 'half'"),
        ({"world": "open", "masking": "dirty"}, "expected `masking` to be one of"),
        ({"world": "open", "feasibility": "nowhere.txt"}, 'expected `feasibility` to be "encoder" or a file, got'),
        ({"feasibility": "nowhere.txt"}, 'expected `feasibility` with world="open" only, got'),
        ({"masking": "official"}, "expected `masking` with world=\"open\" only, got 'official' without"),
    ],
)
def test_wrong_arguments_raise(arguments: dict, message: str) -> None:
    for by in (configure, configure_model):
        known = {name: value for name, value in arguments.items() if name != "table" or by is configure}
        with pytest.raises((ValueError, TypeError), match=message):
            by(**known)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "expected `seeds` to be at least 1, got 0"),
        ({"first_seed": -1}, r"expected `first_seed` to be in \[0, 4294967295\], got -1"),
        ({"first_seed": 2**33}, "expected `first_seed` to be in"),
        ({"table": "one"}, "expected `table` to be one of steps, alignment, own, got 'one'"),
        ({"add": ["vac"]}, 'expected `add` with table="alignment" only, got it with "steps", whose rows are its own'),
        ({"sweep": "beta,delta"}, "expected `sweep` to be one of alpha, beta, gamma, depth, slots, got 'delta'"),
        ({"pilot": True, "options": {"patch_drop": 0.3}}, r"expected `options.patch_drop` to be 0 in the study pilot"),
        *(
            ({study: True, "options": {"head": {"cls_weight": 0.3}}}, r"`options.head.cls_weight` to be 0 in the study")
            for study in ("blend", "reductions")
        ),
    ],
)
def test_wrong_arguments_of_a_table_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**arguments)
