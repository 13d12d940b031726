"""Write the tables of the pages of results from the committed results: ``python docs/fill_tables.py``.

A table, or one number in a line, stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

import json
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from czsl_heads._files import write_text
from czsl_heads._numbers import fraction, interval, markdown_table, percent

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))  # for the families of tests/encoders, wherever this is run from
BENCHMARKS = DOCS.parent / "benchmarks" / "results"
RUNS = {
    "imbalance 0": "imbalance-0.0",
    "0.5": "imbalance-0.5",
    "1": "imbalance-1.0",
    "0.5, short tower": "short-tower",
}
METHODS, IMBALANCES, ADDED_TO = ("clip", "coop", "csp", "troika"), ("0.5", "1.0"), ("csp", "troika")
DIFFERENCES = [("2", "1"), ("2+", "1+"), ("3", "2+"), ("4", "3"), ("5", "4"), ("6", "5"), ("5", "1+"), ("6", "1+")]


def load(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((DOCS / "results" / RUNS[name] / "results.json").read_text())
    return results


def benchmark(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((BENCHMARKS / f"{name}.json").read_text())
    return results


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown_table(headings, rows))


def rows_table(world: str) -> str:
    runs = [load(name) for name in RUNS]
    cells = [
        [
            row["key"],
            row["title"],
            *(percent(run["rows"][index]["summary"][world]["standard"]["auc"]) for run in runs),
        ]
        for index, row in enumerate(runs[0]["rows"])
    ]
    return markdown(["row", "", *RUNS], cells)


def differences_table() -> str:
    runs = [load(name) for name in RUNS]
    cells = []
    for row, other in DIFFERENCES:
        found = [next(c for c in run["comparisons"] if (c["row"], c["against"]) == (row, other)) for run in runs]
        aucs = [item["differences"]["closed"]["standard"]["auc"] for item in found]
        cells.append([f"{row} - {other}", *map(interval, aucs)])
    return markdown(["rows", *RUNS], cells)


def gap_table() -> str:
    cells = []
    for name in RUNS:
        by_number = {row["key"]: row for row in load(name)["rows"]}
        for number in ("1", "2", "3", "4"):
            row = by_number[number]
            gaps = (fraction(row["gap"].get(vector)) for vector in ("cls", "pred", "true", "vac"))
            cells.append([name, number, *gaps, percent(row["summary"]["closed"]["standard"]["auc"])])
    return markdown(["run", "row", "cls", "pred", "true", "vac", "AUC"], cells)


def patches_table() -> str:
    cells = []
    for name in RUNS:
        by_number = {row["key"]: row for row in load(name)["rows"]}
        shares = []
        for number in ("1", "2"):
            runs = by_number[number]["by_seed"]
            shares += [
                f"{100 * sum(run['gap']['winners_that_are_patches'][kind] for run in runs) / len(runs):.1f}"
                for kind in ("true", "pred")
            ]
        cells.append([name, *shares])
    return markdown(["run", "row 1, labelled", "row 1, predicted", "row 2, labelled", "row 2, predicted"], cells)


def reasons_table() -> str:
    study = benchmark("sparse_alignment")
    cells = [
        [
            row["name"],
            percent(row["numbers"]["closed"]["auc"]),
            percent(row["numbers"]["open"]["auc"]),
            percent(row["winners_that_are_patches"]),
            *(fraction(row["gap"][kind]) for kind in ("cls", "pred", "true")),
        ]
        for row in study["rows"]
    ]
    return markdown(["", "AUC closed", "AUC open", "patches win", "RMG cls", "pred", "true"], cells)


def comparison(method: str, imbalance: str) -> dict[str, Any]:
    path = DOCS / "baseline_results" / f"{method}-{imbalance}" / "results.json"
    results: dict[str, Any] = json.loads(path.read_text())
    return results


def closed_differences(results: dict[str, Any]) -> dict[tuple[str, str], Any]:
    """Paired differences of the closed world, by the two rows."""
    return {(c["row"], c["against"]): c["differences"]["closed"]["standard"] for c in results["comparisons"]}


def alignment_table() -> str:
    cells = []
    for method in METHODS:
        for imbalance in IMBALANCES:
            results = comparison(method, imbalance)
            rows = {row["key"]: row["summary"]["closed"]["standard"] for row in results["rows"]}
            compared = closed_differences(results)
            by_seed = len(results["config"]["seeds"]) > 1
            cells.append(
                [
                    method,
                    imbalance,
                    *(percent(rows[name]["auc"]) for name in ("cls", "max", "topk")),
                    *(
                        interval(compared[name, "cls"]["auc"])
                        if by_seed
                        else f"{100 * (rows[name]['auc']['mean'] - rows['cls']['auc']['mean']):+.1f}"
                        for name in ("max", "topk")
                    ),
                ]
            )
    return markdown(["", "imbalance", "cls", "max", "topk", "max - cls", "topk - cls"], cells)


def published_table() -> str:
    cells = []
    for method in METHODS:
        for imbalance in IMBALANCES:
            rows = {row["key"]: row["summary"]["closed"]["standard"] for row in comparison(method, imbalance)["rows"]}
            for name in ("cls", "max"):
                numbers = ("seen", "unseen", "harmonic_mean", "attr_accuracy", "obj_accuracy")
                cells.append([method, imbalance, name, *(percent(rows[name][number]) for number in numbers)])
    return markdown(["", "imbalance", "row", "S", "U", "HM", "attribute", "object"], cells)


def additions_table() -> str:
    cells = []
    for row, base in (("probs", "max"), ("vac", "probs"), ("bank", "vac"), ("adapted", "bank")):
        line = [row]
        for method in ADDED_TO:
            results = comparison(method, "0.5")
            summary = next(item["summary"] for item in results["rows"] if item["key"] == row)
            compared = closed_differences(results)
            line += [percent(summary["closed"]["standard"]["auc"]), interval(compared[row, base]["auc"])]
        cells.append(line)
    headings = [name for method in ADDED_TO for name in (f"{method}: AUC", "less the row before")]
    return markdown(["row", *headings], cells)


def seam_table() -> str:
    cells = [
        [
            row["name"],
            percent(row["validation_auc"]),
            percent(row["test_auc"]),
            *(interval(row["difference"][key]) if row["against"] else "" for key in ("validation_auc", "test_auc")),
        ]
        for row in benchmark("baseline_choices")["parts"]["seam"]["rows"]
    ]
    return markdown(["one option changed", "validation AUC", "test AUC", "difference, validation", "test"], cells)


def quirk_effect(method: str, name: str) -> Callable[[], str]:
    """The difference that a quirk makes to the AUC on test images, as text for a cell of the table of quirks."""

    def effect() -> str:
        rows = benchmark("baseline_choices")["parts"]["quirks"]["rows"]
        row = next(row for row in rows if (row["method"], row["name"]) == (method, name))
        return interval(row["difference"]["test_auc"])

    return effect


def zero_shot_effect(name: str, against: str) -> Callable[[], str]:
    """The same of CLIP without training."""

    def effect() -> str:
        found = {row["name"]: row["test_auc"] for row in benchmark("baseline_choices")["parts"]["zero-shot"]["rows"]}
        return f"{100 * (found[name] - found[against]):+.1f}"

    return effect


def troika_memory_table() -> str:
    cells = [
        [
            row["disentangle"],
            "yes" if row["checkpoint"] else "no",
            f"{row['weights_gb']:.1f}",
            f"{row['peak_gb']:.1f}",
        ]
        for row in benchmark("troika_memory-cpu")["rows"]
    ]
    return markdown(["disentangle", "checkpoint", "weights, GB", "peak of a step beyond them, GB"], cells)


def maxsim_forward_table() -> str:
    cells = []
    for row in benchmark("maxsim-cpu")["rows"]:
        times = row["products"]["forward"]
        ways = ("ours", "plain", "plain, torch.compile", "ours, with index", "ours, bf16 selection")
        memory = row["memory_mb"]["forward"]
        cells.append(
            [
                _shape(row),
                *(f"{times[way]:.2f}" if way in times else "not run" for way in ways),
                f"{memory['ours']}",
                f"{memory['plain']}",
            ]
        )
    headings = ["", "ours", "plain", "compiled", "ours, winners kept", "ours, bf16", "MB, ours", "MB, plain"]
    return markdown(headings, cells)


def maxsim_step_table() -> str:
    cells = []
    for row in benchmark("maxsim-cpu")["rows"]:
        if "step" in row["products"]:
            times, memory = row["products"]["step"], row["memory_mb"]["step"]
            ways = ("plain", "plain, torch.compile", "ours, bf16 selection")
            ratios = [f"{times[way] / times['ours']:.2f}" for way in ways]
            cells.append([_shape(row), f"{times['ours']:.2f}", *ratios, f"{memory['ours']}", f"{memory['plain']}"])
    headings = [
        "",
        "ours, in products",
        "plain / ours",
        "compiled / ours",
        "ours with bf16 / ours",
        "MB, ours",
        "MB, plain",
    ]
    return markdown(headings, cells)


def _shape(row: dict[str, Any]) -> str:
    return f"{row['shape']}: {row['images']} x {row['texts']:,}"


def selection_table() -> str:
    cells = []
    for case in benchmark("maxsim-cpu")["selection"]:
        for way in ("bf16 product alone", "bf16 selection"):
            share = case["other_winner"][way] / case["decisions"]
            cls = (case["cls_wins"][way] - case["cls_wins"]["float32"]) / case["decisions"]
            worst = case["worst_difference_in_logits"][way]
            cells.append([case["vectors"], way, f"{100 * share:.2f} %", f"{100 * cls:+.2f} %", f"{worst:.3f}"])
    return markdown(["", "by", "another token wins", "[CLS] wins more", "worst logit"], cells)


def evaluator_table() -> str:
    cells = [
        [
            f"{row['data_set']}: {_sizes(row)}",
            *(f"{row['literal_over_ours'][way]:.3g}" for way in ("whole", "batches")),
            f"{row['seconds']['whole'] / row['seconds']['bare_amax']:.0f}",
            f"{row['megabytes_of_scores']:.0f}",
            *(f"{row['megabytes_beyond_scores'][way]:.0f}" for way in ("literal", "whole", "batches")),
        ]
        for row in benchmark("evaluator")["closed_world"]
    ]
    headings = [
        "",
        "literal / ours",
        "in batches of 64",
        "ours / bare maximum",
        "MB of scores",
        "MB beyond, literal",
        "ours",
        "in batches",
    ]
    return markdown(headings, cells)


def streamed_table() -> str:
    row = benchmark("evaluator")["open_world_streamed"]
    times = row["seconds"]
    ratios = [times["generator_and_ours"] / times[way] for way in ("generator", "generator_and_amax")]
    sizes = [f"{row['megabytes']:.0f}", f"{row['megabytes_of_scores_if_held']:,.0f}"]
    headings = ["", "ours / generator alone", "ours / generator and bare maximum", "MB, ours", "MB of scores, if held"]
    return markdown(headings, [[f"{row['data_set']}: {_sizes(row)}", *(f"{ratio:.2f}" for ratio in ratios), *sizes]])


def search_table() -> str:
    cells = [
        [
            f"{row['data_set']}: {_sizes(row)}, {row['scores']}",
            *(f"{row['search_over_evaluation'][masking]:.2f}" for masking in ("clean", "official")),
            f"{row['literal_over_ours']:.0f}" if "literal_over_ours" in row else "not run",
            *(f"{row['megabytes'][way]:.0f}" for way in ("evaluation", "clean")),
        ]
        for row in benchmark("open_world_search")["rows"]
    ]
    headings = ["", "clean / one evaluation", "official / one", "literal / clean", "MB, evaluation", "MB, search"]
    return markdown(headings, cells)


def prompts_table() -> str:
    found = benchmark("prompts-cpu")
    names = {
        "prefix, checkpointed": "shared prefix, checkpointed",
        "plain": "every prompt by itself, 7 or 6 positions",
        "8 positions": "8 positions, as CSP and Troika",
        "77 positions": "77 positions, as open_clip; in ten parts",
    }
    cells = [
        ["shared prefix", f"{found['positions']['prefix']:,}", "1.00", f"{found['megabytes']['prefix']:,}", "1.00"]
    ]
    for way, name in names.items():
        positions = found["positions"].get(way, found["positions"]["prefix"])
        times, memory = found["times_faster"][way], found["times_smaller"][way]
        cells.append([name, f"{positions:,}", f"{times:.2f}", f"{found['megabytes'][way]:,}", f"{memory:.2f}"])
    return markdown(["", "positions", "time", "MB", "memory"], cells)


def bank_table() -> str:
    cells = [
        [
            row["fill"],
            row["empty"],
            f"{row['entries']:,}",
            *(f"{value:.2f}" for value in row["times_the_product"].values()),
        ]
        for row in benchmark("memory_bank-cpu")["open_world"]["rows"]
    ]
    return markdown(["images", "free slots", "stored", "read", "update", "both"], cells)


def bank_facts_table() -> str:
    found = benchmark("memory_bank-cpu")
    faster = found["dense"]["times_faster"]
    cells = [
        [
            "peak of taking in 32,000 images, 64 at once, and a read, beyond the texts",
            f"{found['open_world']['megabytes_beyond_texts']} MB",
        ],
        ["MIT-States, closed world: dense bank / ours, read", f"{faster['read']}"],
        ["update of 64 images", f"{faster['update']}"],
    ]
    return markdown(["", "measured"], cells)


def steps_table() -> str:
    cells = []
    for row in benchmark("whole_steps-cpu")["rows"]:
        step, inference = row["training"], row["inference"]
        memory = step["megabytes"]
        times = [
            f"{part['times_faster']['usual']:.2f}" if "usual" in memory else "not run" for part in (step, inference)
        ]
        ways = ("ours", "usual", "ours, checkpointed", "ours, in two parts")
        sizes = [f"{memory[way]:,}" if way in memory else "not run" for way in ways]
        cells.append([_step_name(row), *times, f"{step['times_faster']['ours, checkpointed']:.2f}", *sizes])
    headings = [
        "",
        "training, usual / ours",
        "inference",
        "checkpointed / ours",
        "MB, ours",
        "usual",
        "checkpointed",
        "in two parts",
    ]
    return markdown(headings, cells)


def step_parts_table() -> str:
    return _parts_table("training")


def inference_parts_table() -> str:
    return _parts_table("inference")


def _parts_table(kind: str) -> str:
    """Shares of the time of a pass, in per cent."""
    rows = benchmark("whole_steps-cpu")["rows"]
    parts = [*rows[0][kind]["breakdown"]["ours"]]
    cells = []
    for row in rows:
        for way, seconds in row[kind]["breakdown"].items():
            total = sum(seconds.values())
            shares = [f"{100 * seconds[part] / total:.1f}" for part in parts]
            cells.append([f"{_step_name(row)}, {way}", f"{total:.1f}", *shares])
    return markdown(["", "s", *parts], cells)


def _step_name(row: dict[str, Any]) -> str:
    part = "" if row["scale"] == 1 else f", {row['scale']:.2g} of its numbers"
    return f"{row['data']}{part}"


def _sizes(row: dict[str, Any]) -> str:
    samples, pairs = row["shape"]
    return f"{samples:,} x {pairs:,}"


POOLED = {  # by transformers, whose configurations do not say it
    "SiglipModel": "attention",
    "Siglip2Model": "attention",
}


def families_table() -> str:
    """What works on each family, by trying it on a small random model of the real class."""
    from tests.encoders.families import FAMILIES
    from tests.encoders.hugging_face import KINDS

    cells = []
    for name, make in FAMILIES.items():
        arguments = make.args  # type: ignore[attr-defined]
        feature = POOLED.get(name, "class token") if name in KINDS else _pool_of(name)
        title = f"`{name}` of transformers" if name in KINDS else f"{name} (`{arguments[0]}`)"
        cells.append([title, feature, *_abilities(name)])
    headings = [
        "",
        "image feature from",
        "before the patches",
        "LoRA, both towers",
        "shared prefix",
        "dense recipes",
        "other sizes",
        "patch dropout",
        "Troika's adapters",
        "logit bias",
    ]
    return markdown(headings, cells)


def _pool_of(name: str) -> str:
    from czsl_heads.encoders.timm_towers import POOLS
    from tests.encoders.families import build

    vision = build(name).vision.visual
    if hasattr(vision, "trunk"):
        return POOLS[vision.trunk.global_pool].removeprefix("the ")
    return "class token" if vision.pool_type == "tok" else "mean of patches"


def _abilities(name: str) -> list[str]:
    """Tokens before the patches, and whether each part can be used."""
    from czsl_heads import add_lora
    from czsl_heads.adapters.bottleneck import add_bottlenecks
    from czsl_heads.adapters.patch_drop import drop_patches
    from czsl_heads.prompts.prefix import obstacle
    from czsl_heads.report.maps import dense_recipes
    from tests.encoders.families import build

    matrices = ("q", "k", "v", "o", "fc", "proj")
    encoder = build(name)
    rows, columns = encoder.grid
    height, width = encoder.vision.image_size
    larger = (height // rows * (rows + 1), width // columns * (columns + 1))
    tried = {
        "lora": lambda: [add_lora(build(name), matrices=matrices, tower=tower) for tower in ("vision", "text")],
        "size": lambda: build(name).vision.resize(larger),
        "patch dropout": lambda: drop_patches(build(name), 0.5),
        "bottlenecks": lambda: add_bottlenecks(build(name)),
    }
    found = {ability: _works(attempt) for ability, attempt in tried.items()}
    prefix = "yes" if obstacle(encoder) is None else "not causal"
    dense = f"all {len(dense_recipes(encoder))}"
    bias = "no" if encoder.logit_bias is None else "yes"
    return [
        str(encoder.num_prefix),
        found["lora"],
        prefix,
        dense,
        found["size"],
        found["patch dropout"],
        found["bottlenecks"],
        bias,
    ]


def _works(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (TypeError, ValueError):
        return "no"
    return "yes"


def configurations_table() -> str:
    """How many of open_clip's configurations are taken, and why the others are not."""
    from czsl_heads.encoders.configurations import read_configurations

    groups: dict[tuple[str, str], list[str]] = {}
    for each in read_configurations():
        key = ("", each.reason) if each.reason else (each.family, "")
        groups.setdefault(key, []).append(each.name)
    cells = []
    for (family, reason), names in sorted(groups.items(), key=lambda item: (item[0][1] != "", -len(item[1]))):
        cells.append([family or f"none: {reason}", str(len(names)), f"`{names[0]}`"])
    return markdown(["", "configurations", "such as"], cells)


def throughput_table() -> str:
    cells = []
    for name, found in benchmark("encoders-cpu")["encoders"].items():
        low, high = found["quartiles"]
        cells.append(
            [
                name,
                found["pool"],
                str(found["patches"]),
                f"{100 * found['extra_flops']:.2f} %",
                f"{found['time_ratio']:.3f}",
                f"{low:.3f} to {high:.3f}",
            ]
        )
    headings = ["", "pools", "patches", "extra operations", "time, all tokens / own feature", "quartiles"]
    return markdown(headings, cells)


def dense_table() -> str:
    found = benchmark("dense_tokens")
    cells = []
    for recipe, row in found["recipes"].items():
        pointing = [percent({"mean": part["share"], "std": part["error"]}) for part in row["pointing"].values()]
        parts = row["patches"], row["all"]
        aucs = [f"{100 * part['auc']:.1f}" for part in parts]
        words = [f"{100 * row['patches'][name]:.1f}" for name in ("attr_accuracy", "obj_accuracy")]
        cells.append([f'`"{recipe}"`', *pointing, *aucs, *words])
    feature = found["image_feature"]
    of_feature = (feature["auc"], feature["attr_accuracy"], feature["obj_accuracy"])
    auc, *accuracies = (f"{100 * number:.1f}" for number in of_feature)
    cells.append(["image feature alone", "-", "-", "-", auc, *accuracies])
    chance = [f"{100 * share:.1f}" for share in found["chance"].values()]
    cells.append(["a patch drawn at random", *chance, "-", "-", "-", "-"])
    headings = [
        "",
        "points, centre of patch (%)",
        "points, any pixel (%)",
        "AUC, patches",
        "AUC, all tokens",
        "attribute",
        "object",
    ]
    return markdown(headings, cells)


def of_gap(name: str) -> Callable[[], str]:
    """A table of ``gap_tables.py``."""
    return _of("gap_tables", name)


def of_scale(name: str) -> Callable[[], str]:
    """A table of ``scale_tables.py``."""
    return _of("scale_tables", name)


def _of(module: str, name: str) -> Callable[[], str]:
    def table() -> str:
        made: str = getattr(import_module(f"docs.{module}"), name)()
        return made

    return table


def reading_facts() -> str:
    found = benchmark("reading")
    peak = found["peak_megabytes"]
    return (
        f"{found['times_bare']:.2f} times that; memory at its peak is {peak['read_dataset']} MB; loading alone takes "
        f"{peak['bare']} MB"
    )


def caches_table() -> str:
    rows = [
        [
            "training" if row["train"] else "evaluation",
            str(row["workers"]),
            *(f"{row['times_image_folder'][way]:.2f}" for way in ("ours", "ours, packed")),
        ]
        for row in benchmark("caches")["passes"]
    ]
    return markdown(["transform", "workers", "ours / ImageFolder", "ours, packed / ImageFolder"], rows)


def caches_epoch() -> str:
    return f"{benchmark('caches')['epochs']['share_of_time']:.2f}"


def whole_files_facts() -> str:
    found = benchmark("whole_files")
    times, looks = found["checkpoints"], found["looks"]
    return (
        f"A checkpoint of {found['megabytes']} MB takes {times['write']:.2f} times as long to write as Lightning's, "
        f"and {times['read']:.2f} times as long to read. To look again at {looks['pictures']:,} pictures of "
        f"{looks['kilobytes']} kB takes {100 * looks['again_over_all']:.0f} % of the time to read them all from memory"
    )


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "encoders.md": {
        "families": families_table,
        "configurations": configurations_table,
        "throughput": throughput_table,
        "dense": dense_table,
    },
    "shapes_results.md": {
        "closed": lambda: rows_table("closed"),
        "open": lambda: rows_table("open"),
        "differences": differences_table,
        "gap": gap_table,
        "patches": patches_table,
        "reasons": reasons_table,
        "head-room": of_scale("head_room_table"),
    },
    "baseline_results.md": {
        "alignment": alignment_table,
        "published": published_table,
        "additions": additions_table,
        "seam": seam_table,
    },
    "modality_gap.md": {
        "correlations": of_gap("correlations_table"),
        "changes": of_gap("changes_table"),
        "pretraining": of_gap("pretraining_table"),
    },
    "baselines.md": {
        "eva": of_gap("eva_table"),
        "share": of_gap("experts_share"),
        "memory": troika_memory_table,
        "patch_norm": quirk_effect("troika", "patch_norm: cumulative"),
        "fusion": quirk_effect("troika", "fusion: logits"),
        "text_chunk": quirk_effect("troika", "text_chunk: 64"),
        "fused_validation_loss": quirk_effect("troika", "fused_validation_loss: True, epoch by loss"),
        "stays_in_eval": quirk_effect("troika", "stays_in_eval: True"),
        "official": quirk_effect("troika", "official: True"),
        "half_logits": quirk_effect("csp", "half_logits: True"),
        "half_logits of CLIP": zero_shot_effect("half_logits: True", "default"),
        "dropout_at_evaluation": quirk_effect("csp", "dropout_at_evaluation: True"),
        "masking": zero_shot_effect("masking: official, threshold 0", "masking: clean, threshold 0"),
    },
    "performance.md": {
        "maxsim-step": maxsim_step_table,
        "maxsim-forward": maxsim_forward_table,
        "selection": selection_table,
        "evaluator": evaluator_table,
        "streamed": streamed_table,
        "search": search_table,
        "prompts": prompts_table,
        "bank": bank_table,
        "bank-facts": bank_facts_table,
        "steps": steps_table,
        "step-parts": step_parts_table,
        "inference-parts": inference_parts_table,
        "reading": reading_facts,
        "caches": caches_table,
        "caches-epoch": caches_epoch,
        "whole-files": whole_files_facts,
        "experts": of_gap("experts_table"),
        "experts-share": of_gap("experts_share"),
        "maxsim-threads": of_scale("maxsim_threads_table"),
        "threads": of_scale("threads_table"),
        "frozen-towers": of_scale("frozen_towers_table"),
    },
    "scale.md": {
        "shared-time": of_scale("shared_time_table"),
        "shared-memory": of_scale("shared_memory_table"),
        "loader": of_scale("loader_table"),
        "loader-h100": of_scale("loader_h100_table"),
    },
}


def filled(page: str, text: str) -> str:
    """The text of a page with every table made anew."""
    for name, table in PAGES[page].items():
        text, count = re.subn(
            rf"(<!-- {name} -->(\n?)).*?<!-- end -->",
            lambda match, table=table: f"{match[1]}{table()}{match[2]}<!-- end -->",
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise ValueError(f"expected one table {name} in {page}, got {count}")
    return text


if __name__ == "__main__":
    for page in PAGES:
        write_text(DOCS / page, filled(page, (DOCS / page).read_text()))
