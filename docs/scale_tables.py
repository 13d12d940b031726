"""The tables of processes, threads, loaders, towers and regions; ``fill_tables.py`` puts them into their pages."""

import json
from pathlib import Path
from typing import Any

from czsl_heads._numbers import markdown_table

BENCHMARKS = Path(__file__).parent.parent / "benchmarks" / "results"
PEAK = 989e12  # FLOP/s in bfloat16 that NVIDIA publishes for the H100 SXM, dense
WORKERS = (1, 8, 16)
PRODUCTS = {"evaluation": 1, "training": 3}  # in encodings: backward to a matrix and to its inputs, at most
WAYS = {"own": "as the container has it", "sequence_first": "sequence first"}


def benchmark(name: str) -> dict[str, Any]:
    results: dict[str, Any] = json.loads((BENCHMARKS / f"{name}.json").read_text())
    return results


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join(markdown_table(headings, rows))


def shared_time_table() -> str:
    found = benchmark("shared_evaluation")["time"]
    seconds = found["seconds"]
    ratios = [f"{found[name]:.2f}" for name in ("times_faster", "machine_allows")]
    cells = [[f"{found['images']}", f"{seconds['1']:.1f}", f"{seconds['2']:.1f}", *ratios]]
    return markdown(["images", "one process, s", "two, s", "times faster", "as much as two cores allow"], cells)


def shared_memory_table() -> str:
    found = benchmark("shared_evaluation")["memory"]
    cells = []
    for count in (1, 2, 3):
        megabytes = ", ".join(f"{each:,}" for each in found[f"megabytes_of_{count}"])
        cells.append([str(count), megabytes, f"{found['megabytes_of_features'] / count:,.0f}"])
    return markdown(["processes", "MB of each", "of it features, by shapes"], cells)


def loader_table() -> str:
    found = benchmark("loader-cpu")
    rows = [row for row in found["rows"] if row["encoder"] == found["rows"][0]["encoder"]]
    others = {row["encoder"]: {} for row in found["rows"]}
    for row in found["rows"]:
        others[row["encoder"]][row["use"]] = row["encoder_images_per_second"]
    cells = []
    for row in rows:
        takes = [str(each[row["use"]]) for each in others.values()]
        cells.append([row["use"], row["pictures"], str(row["workers"]), str(row["loader_images_per_second"]), *takes])
    names = [f"{name.removesuffix('-quickgelu')} takes" for name in others]
    return markdown(["use", "pictures", "workers", "loader, images per second", *names], cells)


def loader_h100_table() -> str:
    """What so many workers would give if each gave what one gives here, beside half of what the card can at most."""
    flops = benchmark("encoders-cpu")["encoders"]["ViT-L-14-quickgelu (open_clip)"]["gigaflops_of_own"] * 1e9
    rows = [row for row in benchmark("loader-cpu")["rows"] if row["workers"] == 1]
    of_one = {(row["use"], row["pictures"]): row["loader_images_per_second"] for row in rows}
    cells = []
    for (use, pictures), rate in of_one.items():
        most = PEAK / flops / PRODUCTS[use]
        given = [f"{rate * workers:,}" for workers in WORKERS]
        cells.append([use, pictures, *given, f"{most / 2:,.0f}", f"{most:,.0f}"])
    headings = [f"{workers} workers" if workers > 1 else "1 worker, measured" for workers in WORKERS]
    return markdown(["use", "pictures", *headings, "H100 at half its peak", "at its peak"], cells)


def frozen_towers_table() -> str:
    cells = []
    for name, towers in benchmark("frozen_towers-cpu")["towers"].items():
        line = [name]
        for tower in ("vision", "text"):
            for way in WAYS:
                found = towers[tower].get(way)
                line.append("-" if found is None else f"{found['times_ours']:.2f}")
        cells.append(line)
    headings = [f"{tower}: {words}" for tower in ("vision", "text") for words in WAYS.values()]
    return markdown(["times ours", *headings], cells)


def threads_table() -> str:
    cells = []
    for row in benchmark("threads")["rows"]:
        times = {number: f"{ratio:.2f}" for number, ratio in row["times_one_thread"].items()}
        cells.append([str(row["busy_cores"]), *times.values(), str(row["chosen"])])
    numbers = benchmark("threads")["rows"][0]["times_one_thread"]
    return markdown(["busy cores", *(f"threads: {number}" for number in numbers), "chosen"], cells)


def head_room_table() -> str:
    cells = []
    for row in benchmark("head_room")["rows"]:
        oracles = {name: value for name, value in row.items() if name.startswith("oracle_")}
        line = [f"{row['imbalance']:g}", f"{100 * row['image_feature']:.1f}"]
        line += [f"{100 * value:.1f}" for value in oracles.values()]
        best = max(oracles.values()) - row["image_feature"]
        cells.append([*line, f"{100 * best:+.1f}"])
    headings = [f"told in the last {number}" for number in range(1, len(oracles) + 1)]
    return markdown(["imbalance", "[CLS]", *headings, "head-room, the best of these"], cells)


def maxsim_threads_table() -> str:
    """Forward and backward on one thread and on two."""
    cells = []
    one, two = (benchmark(f"maxsim{name}-cpu")["rows"] for name in ("-1-thread", ""))
    for row, same in zip(one, two):
        if "step" not in row["products"]:
            continue
        line = [f"{row['shape']}: {row['images']} x {row['texts']:,}"]
        for measured in (row, same):
            times = measured["products"]["step"]
            line += [f"{times['ours']:.2f}", f"{times['plain'] / times['ours']:.2f}"]
        cells.append(line)
    headings = [f"{name}, {words}" for name in ("1 thread", "2 threads") for words in ("in products", "plain / ours")]
    return markdown(["", *headings], cells)
