"""The curves are drawn, whole, also where there is little or nothing to draw."""

from pathlib import Path

from PIL import Image

from czsl_heads.report.curves import plot_curves


def colors_of(path: Path) -> int:
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(maxcolors=1 << 20))


def test_the_curves_are_drawn(results: dict, tmp_path: Path) -> None:
    plot_curves(results, tmp_path / "curves.png")
    whole = colors_of(tmp_path / "curves.png")
    for row in results["rows"]:
        for run in row["by_seed"]:
            for world in run["test"].values():
                for protocol in world.values():
                    protocol["curve"] = [[0.0, 0.0]]
    plot_curves(results, tmp_path / "empty.png")
    assert whole > 1.3 * colors_of(tmp_path / "empty.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "empty.png"]


def test_what_does_not_exist_is_left_out(results: dict, tmp_path: Path) -> None:
    for row in results["rows"]:
        for run in row["by_seed"]:
            run["test"]["open"]["exact"]["curve"] = [[0.5, None]]
            run["test"]["open"]["standard"]["curve"] = [[0.5, None]]
    plot_curves(results, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
