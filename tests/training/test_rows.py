"""Rows as data: every row names a model that can be built and a readout that can be scored."""

from typing import get_args

import pytest

from czsl_heads.heads.sparse_align import Reduce
from czsl_heads.models.recipe import LoRAOptions
from czsl_heads.training.config import SWEEPS
from czsl_heads.training.options import Options, change
from czsl_heads.training.rows import (
    STUDIES,
    TABLES,
    BankPlan,
    Readout,
    Row,
    Table,
    Trained,
    check_added,
    one_model,
)

OPTIONS = Options(alpha=0.3, beta=0.6, gamma=0.7, lora=LoRAOptions(rank=2))
ADDED = ((), ("vac",), ("vac", "bank"))
ONES = {f"one {align} {added}": one_model(align, added) for align in get_args(Reduce) for added in ADDED}
EVERY_TABLE = {**TABLES, **ONES}


def points(studies=STUDIES) -> list[Row]:
    return [point for name in studies for point in STUDIES[name](OPTIONS).points]


@pytest.mark.parametrize("table", EVERY_TABLE.values(), ids=EVERY_TABLE)
def test_a_table_speaks_of_rows_that_it_has(table: Table) -> None:
    keys = [row.key for row in table.rows]
    assert len(set(keys)) == len(keys)
    for row, other in table.comparisons:
        assert keys.index(row) > keys.index(other)
    assert {*table.shown, table.baseline} <= {*keys}
    assert {row.key for row in table.asked(())} & {*table.shown}


@pytest.mark.parametrize("row", [*(row for table in EVERY_TABLE.values() for row in table.rows), *points()], ids=repr)
def test_a_row_names_a_model_and_a_readout_of_it(row: Row) -> None:
    options = change(OPTIONS, row.model.changes)
    behind = row.model.stage == "condense"
    recipe = options.recipe("sac", "tiny", row.model.align, condenser=behind)
    assert (recipe.condenser is not None) == behind == (row.model.base is not None)
    if behind:
        assert (row.model.base.stage, row.model.base.align) == ("align", row.model.align)
    readout = row.readout.resolved(options)
    assert behind or readout.alone
    assert isinstance(readout.beta, float)
    assert isinstance(readout.gamma, float)
    assert readout.bank is None or isinstance(readout.bank.slots, int)
    assert readout.bank is not None or not readout.gamma
    assert row.budget == "best" or row.model.longer
    assert row.transductive == (readout.bank is not None and readout.bank.updates)


@pytest.mark.parametrize("name", EVERY_TABLE)
def test_a_folder_stands_for_one_model_and_a_key_for_one_readout(name: str) -> None:
    rows = [*EVERY_TABLE[name].rows, *points(() if name.startswith("one") else STUDIES)]
    models: dict[str, tuple] = {}
    readouts: dict[tuple[str, str], Readout] = {}
    for row in rows:
        trained, readout = row.model, row.readout.resolved(change(OPTIONS, row.model.changes))
        what = trained.align, trained.stage, trained.base and trained.base.folder, trained.changes
        assert models.setdefault(trained.folder, what) == what
        assert readouts.setdefault((trained.folder, readout.key), readout) == readout
    assert len({*map(repr, models.values())}) == len(models)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_has_points_in_order_along_its_axis(name: str) -> None:
    found = STUDIES[name](OPTIONS).points
    assert len({(point.title, point.value) for point in found}) == len(found) > 2
    for title in {point.title for point in found}:
        values = [point.value for point in found if point.title == title]
        assert name in ("reductions", "gap") or values == sorted(values)
    assert {*SWEEPS, "reductions", "pilot", "blend", "gap"} == STUDIES.keys()


def test_one_model_is_the_whole_that_was_asked_for() -> None:
    (row,) = one_model("topk", ("vac", "bank")).rows
    assert row.model == Trained("vac", "topk", "condense", Trained("topk", "topk"))
    assert row.readout.resolved(OPTIONS) == Readout(0.6, 0.7, BankPlan(16))
    (row,) = one_model("topk", ("vac",)).rows
    assert row.readout.resolved(OPTIONS) == Readout(0.6)
    (row,) = one_model("mean", ()).rows
    assert (row.model, row.readout) == (Trained("mean", "mean"), Readout())


@pytest.mark.parametrize(
    ("added", "error", "message"),
    [
        ("vac", TypeError, "expected `add` to be a list of vac and bank, got 'vac'"),
        (["eva"], ValueError, "expected `add` to be one of vac, bank, got 'eva'"),
        (["bank"], ValueError, "expected `add` with vac where there is a bank, .*, got bank alone"),
    ],
)
def test_wrong_additions_are_told(added, error: type, message: str) -> None:
    assert check_added(["vac", "bank"]) == ("vac", "bank")
    with pytest.raises(error, match=message):
        check_added(added)
