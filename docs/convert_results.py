"""Bring a ``results.json`` of schema 1 to schema 2: ``python docs/convert_results.py FILE [FILE ...]``.

Schema 1 was two: one of SAC's ablation, one of the comparisons of the baselines. Numbers are copied; only differences
that SAC's file did not hold are computed from its runs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from czsl_heads._files import write_json
from czsl_heads.models.saved import SCHEMA
from czsl_heads.training.ablate import compared
from czsl_heads.training.options import nest
from czsl_heads.training.rows import TABLES

OPTIONS = {
    **{f"lora_{name}": f"lora.{name}" for name in ("rank", "alpha", "dropout", "matrices", "layers")},
    **{f"bank_{name}": f"bank.{name}" for name in ("temperature", "empty", "normalize", "labels")},
    **{name: f"head.{name}" for name in ("topk", "temperature", "include_cls", "cls_weight")},
    "depth": "condenser.depth",
    "condenser_dropout": "condenser.dropout",
    "slots": "bank.slots",
    "context": "model.context",
    "prompt_dropout": "model.dropout",
    "fusion": "model.fusion",
}
FOLDERS = {"vac": "vac-labels", "vac-kl": "vac"}  # of SAC's ablation


def converted(old: dict[str, Any]) -> dict[str, Any]:
    """The same results in the new schema."""
    config, of_baseline = dict(old["config"]), "sources" in old
    table = "alignment" if of_baseline else "steps"
    options = {OPTIONS.get(name, name): value for name, value in config["options"].items()}
    of_model = config["options"].get("model", {})
    sources = {
        f"model.{name}" if name in of_model else OPTIONS.get(name, name): source
        for name, source in old.get("sources", {}).items()
    }
    rows = [_row(row) for row in old["rows"]]
    keys = {row["key"] for row in rows}
    added = [name for name in ("vac", "bank") if of_baseline and name in keys]
    studies = {name: _study(study) for name, study in old.get("studies", {}).items()}
    config |= {"method": config.get("method", "sac"), "options": nest(options), "table": table, "add": added}
    return {
        "schema": SCHEMA,
        "config": config | {"studies": list(studies)},
        "sources": sources,
        "environment": old["environment"],
        "data": old["data"],
        "shown": next(key for key in TABLES[table].shown if key in keys),
        "baseline": TABLES[table].baseline,
        "rows": rows,
        "comparisons": compared(TABLES[table], rows),
        "studies": studies,
    }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    key = row.get("number", row.get("row"))
    summary = row["summary"] if "closed" in row["summary"] else {"closed": row["summary"]}
    known = {each.key: each for table in TABLES.values() for each in table.rows}[key]
    plan = known.readout.bank
    folder = row.get("folder")
    return {
        "key": key,
        "title": row.get("name", row.get("title")),
        "transductive": known.transductive,
        "model": known.model.folder if folder is None else FOLDERS.get(folder, folder),
        "budget": known.budget,
        "readout": {"name": key, "bank": None if plan is None else plan._asdict(), "probabilities": key == "probs"},
        "trainable_parameters": row["trainable_parameters"],
        "summary": summary,
        "gap": row.get("gap", {}),
        **({"feasibility": row["feasibility"]} if "feasibility" in row else {}),
        "by_seed": [_run(run) for run in row["runs"]],
    }


def _run(run: dict[str, Any]) -> dict[str, Any]:
    selected = run["validation_auc"] if "validation_auc" in run else run.get("selected")
    kept = {name: run[name] for name in ("feasibility",) if name in run}
    return {
        "seed": run["seed"],
        "best_epoch": run.get("best_epoch"),
        "selected": selected,
        "test": run["test"],
        "gap": run.get("gap", {}),
        "rejected": run.get("rejected", 0),
        **kept,
    }


def _study(study: dict[str, Any]) -> dict[str, Any]:
    points = [
        {
            "value": point["value"],
            "series": point["series"],
            "model": FOLDERS.get(point["folder"], point["folder"]),
            "summary": point["summary"],
            "gap": point["gap"],
            "by_seed": point["runs"],
        }
        for point in study["points"]
    ]
    return {"title": study["title"], "axis": study["axis"], "points": points}


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.get("schema") != SCHEMA:
            write_json(path, converted(content))
            print(f"converted {path}")
