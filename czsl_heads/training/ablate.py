"""The rows of a table, trained and tested over all seeds, and the studies beside it: one record of results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from czsl_heads._files import plain
from czsl_heads._sealed import DamagedError, read_sealed, write_sealed
from czsl_heads.data.digest import labels_digest
from czsl_heads.data.layout import CompositionDataset
from czsl_heads.models.saved import RECORD, RESULTS, SCHEMA, read_results
from czsl_heads.training.chance import at_chance, chance_of
from czsl_heads.training.config import Config
from czsl_heads.training.environment import environment
from czsl_heads.training.folder import open_folder
from czsl_heads.training.holder import Holder
from czsl_heads.training.open_world import OpenWorld, kept_open_world
from czsl_heads.training.rehearsal import wanted_rows
from czsl_heads.training.rows import STUDIES, Readout, Row, Table, Trained
from czsl_heads.training.summary import differences_of, numbers_of, spread, summary_of
from czsl_heads.training.train import train_model
from czsl_heads.training.trainer import is_main_process, main_first, say


def run_ablation(out: Path, config: Config, holder: Holder | None = None) -> dict[str, Any]:
    """Train and test all rows over all seeds, then the studies, and write ``results.json``.

    Rows that share a trained model are scored in one pass over the images. Finished models in ``out`` are kept, an
    interrupted one is resumed: calling again with the same settings completes the folder, and with more seeds, studies
    or additions extends it.

    Args:
        out: The folder.
        config: What the command asks for.
        holder: Holds the folder until its block ends; None: it is held within this call only.

    Returns:
        The content of ``results.json``.

    Raises:
        ValueError, OSError: As :func:`czsl_heads.training.folder.open_folder`, before anything is written.
        KeyboardInterrupt: Interrupted; calling again resumes.
    """
    if holder is None:
        with Holder(out) as own:
            return run_ablation(out, config, own)
    dataset = main_first(config.trainer, lambda: open_folder(out, config, holder))
    return _completed(out, config, dataset)


def _completed(out: Path, config: Config, dataset: CompositionDataset) -> dict[str, Any]:
    """Everything that a command asks for in a folder that it holds."""
    config = _extended(out, config)
    work = _Work(out, dataset, config)
    records = [work.done(seed) for seed in config.seeds]
    chance = chance_of(dataset, "test")
    rows = [row_results(row, config, records) for row in config.rows]
    rows = [row | {"at_chance": at_chance(row, chance)} for row in rows]
    results: dict[str, Any] = {
        "schema": SCHEMA,
        "config": plain(config.as_dict()),
        "sources": config.sources,
        "environment": environment(),
        "data": describe(dataset),
        "chance": chance,
        "shown": _shown(config.whole_table, rows),
        "baseline": config.whole_table.baseline,
        "rows": rows,
        "comparisons": compared(config.whole_table, rows),
        "studies": {name: _study_results(name, config, records) for name in config.studies},
    }
    if is_main_process():
        results = write_sealed(out / RESULTS, results)
    return results


def _extended(out: Path, config: Config) -> Config:
    """With the seeds, studies and additions that were asked for before, too."""
    if not (out / RESULTS).exists():
        return config
    try:
        results = read_results(out)
        before = results["config"] | {"studies": [*results["studies"]]}
    except DamagedError as error:
        say(f"{error}: from the records of its models")
        before = _recorded(out, config)
    studies = list(dict.fromkeys([*before["studies"], *config.studies]))
    added = dict.fromkeys([*before["add"], *config.add])
    seeds = sorted({*before["seeds"], *config.seeds})
    return replace(config, seeds=seeds, studies=studies, add=tuple(name for name in ("vac", "bank") if name in added))


def _recorded(out: Path, config: Config) -> dict[str, Any]:
    """The seeds, studies and additions whose models are all trained and scored, by their records."""
    found = [path.name.removeprefix("seed") for path in out.glob("seed*")]
    seeds = sorted(int(number) for number in found if number.isdecimal())
    ways = {(seed, path.parent.name): _ways(path) for seed in seeds for path in out.glob(f"seed{seed}/*/{RECORD}")}

    def has(rows: list[Row], seeds: list[int]) -> bool:
        wanted = [((seed, row.model.folder), (row.budget, config.readout(row).key)) for seed in seeds for row in rows]
        return all(way in ways.get(model, ()) for model, way in wanted)

    kept = [seed for seed in seeds if has(config.rows, [seed])]
    studies = [name for name in STUDIES if kept and has([*config.study(name).points], kept)]
    larger = config.whole_table.asked(("vac", "bank")) if config.table == "alignment" else []
    added = ("vac", "bank") if kept and larger and has(larger, kept) else config.add
    return {"seeds": kept, "studies": studies, "add": added}


def _ways(path: Path) -> set[tuple[str, str]]:
    """The budgets and readouts that a record has results of."""
    try:
        budgets = read_sealed(path, ("budgets",))["budgets"]
    except DamagedError:
        return set()
    return {(budget, readout) for budget, found in budgets.items() for readout in found["test"]}


class _Work:
    """The models that a command trains for each seed, and the ways in which each is scored."""

    def __init__(self, out: Path, dataset: CompositionDataset, config: Config) -> None:
        self.out, self.dataset, self.config = out, dataset, config
        self.open_world: OpenWorld | None = kept_open_world(out, config)
        self.models: dict[str, Trained] = {}
        self.readouts: dict[str, dict[str, Readout]] = {}
        self.rows: dict[str, list[str]] = {}
        for row in wanted_rows(config):
            model = self.models.setdefault(row.model.folder, row.model)
            readout = config.readout(row)
            self.readouts.setdefault(model.folder, {})[readout.key] = readout
            if row.value is None:  # and no point of a study
                self.rows.setdefault(model.folder, []).append(row.key)
        about = {"data": "the shapes world" if config.shapes else Path(config.data).name}
        self.about = about | {"data_digest": labels_digest(dataset.root), "preset": config.preset}

    def done(self, seed: int) -> dict[str, dict[str, Any]]:
        """The records of all models of a seed, trained or read, by folder."""
        return {name: self._model(model, seed) for name, model in self.models.items()}

    def _model(self, model: Trained, seed: int) -> dict[str, Any]:
        config, base = self.config, None
        options = config.options_of(model)
        if model.base is not None and not options.joint:
            if model.base.folder not in self.models:
                self._base(model.base, seed)
            base = self.out / f"seed{seed}" / model.base.folder
        names = ", ".join(self.rows.get(model.folder, ["of studies"]))
        say(f"seed {seed}, {config.method}, model {model.folder} (rows {names})")
        return self._train(model, base, seed, self.readouts[model.folder])

    def _base(self, model: Trained, seed: int) -> None:
        """A model that only others build on, which nobody asks to be tested."""
        say(f"seed {seed}, {self.config.method}, model {model.folder}, which others build on")
        self._train(model, None, seed, {})

    def _train(self, model: Trained, base: Path | None, seed: int, readouts: dict[str, Readout]) -> dict[str, Any]:
        config, options = self.config, self.config.options_of(model)
        behind = model.stage == "condense"
        return train_model(
            self.out / f"seed{seed}" / model.folder,
            self.dataset,
            options.recipe(config.method, config.encoder, model.align, condenser=behind),
            options,
            readouts,
            base=base,
            extra_epochs=options.extra_epochs if model.longer else 0,
            seed=seed,
            trainer=config.trainer,
            open_world=self.open_world,
            about=self.about,
        )


def describe(dataset: CompositionDataset) -> dict[str, Any]:
    """How much a data set holds, for a results file."""
    return {
        "attributes": len(dataset.space.attributes),
        "objects": len(dataset.space.objects),
        "pairs": {name: len(pairs) for name, pairs in dataset.split_pairs.items()},
        "images": {name: len(samples) for name, samples in dataset.samples.items()},
    }


def _shown(table: Table, rows: list[dict[str, Any]]) -> str:
    keys = {row["key"] for row in rows}
    return next(key for key in table.shown if key in keys)


def row_results(row: Row, config: Config, records: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """What a table says of a row, from the records of all seeds."""
    readout = config.readout(row)
    own = [record[row.model.folder] for record in records]
    by_seed = [_seed_results(record, readout.key, row.budget) for record in own]
    return {
        "key": row.key,
        "title": row.title.format(topk=config.options.head.topk),
        "transductive": row.transductive,
        "model": row.model.folder,
        "budget": row.budget,
        "readout": {
            "name": readout.key,
            "bank": None if readout.bank is None else readout.bank._asdict(),
            "probabilities": readout.alone and readout.probabilities and row.model.stage == "align",
        },
        "trainable_parameters": own[0]["trainable_parameters"],
        **_row_summary(by_seed),
        "by_seed": by_seed,
    }


def _row_summary(by_seed: list[dict[str, Any]]) -> dict[str, Any]:
    """Means and deviations over seeds of what a row scored, of its gap, and of its search for a threshold."""
    gaps = [of_seed["gap"]["relative_modality_gap"] for of_seed in by_seed if of_seed["gap"]]
    searches = [of_seed["feasibility"] for of_seed in by_seed if "feasibility" in of_seed]
    summary = {
        "summary": summary_of([of_seed["test"] for of_seed in by_seed]),
        "gap": {name: spread([gap[name] for gap in gaps]) for name in gaps[0]} if gaps else {},
    }
    return summary | ({"feasibility": _search_summary(searches)} if searches else {})


def _seed_results(record: dict[str, Any], readout: str, budget: str) -> dict[str, Any]:
    found = record["budgets"][budget]
    feasibility = {"feasibility": found["feasibility"][readout]} if "feasibility" in found else {}
    return {
        "seed": record["seed"],
        "best_epoch": found["best_epoch"],
        "selected": found["selected"],
        "test": found["test"][readout],
        "gap": found["gap"],
        "rejected": found["rejected"],
        **feasibility,
    }


def _search_summary(searches: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the searches on validation: threshold, unseen pairs kept, and the AUC with and without."""
    values = {name: [search[name] for search in searches] for name in ("threshold", "kept_pairs", "auc_unmasked")}
    best = [max(auc for auc in search["auc"] if auc is not None) for search in searches]
    return {name: spread(numbers) for name, numbers in {**values, "auc": best}.items()}


def compared(table: Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Differences of rows, seed by seed, of every number; nothing for one seed."""
    tests = {row["key"]: [of_seed["test"] for of_seed in row["by_seed"]] for row in rows}
    return [
        {"row": row, "against": other, "differences": differences_of(tests[row], tests[other])}
        for row, other in table.comparisons
        if row in tests and other in tests
    ]


def _study_results(name: str, config: Config, records: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    study = config.study(name)
    points = []
    for row in study.points:
        found = row_results(row, config, records)
        by_seed = [
            {"seed": of_seed["seed"], "test": numbers_of(of_seed["test"]), "gap": of_seed["gap"]}
            for of_seed in found["by_seed"]
        ]
        points.append(
            {
                "value": row.value,
                "series": row.title,
                "model": row.model.folder,
                "summary": found["summary"],
                "gap": found["gap"],
                "by_seed": by_seed,
            }
        )
    return {"title": study.title, "axis": study.axis, "points": points}
