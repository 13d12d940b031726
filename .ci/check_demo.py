"""Are the files of `czsl ablate` there, and are they sane?"""

import json
import sys
from pathlib import Path

from PIL import Image

out = Path(sys.argv[1])
results = json.loads((out / "results.json").read_text(encoding="utf-8"))
assert [row["key"] for row in results["rows"]] == ["1", "1+", "2", "2+", "3", "4", "5", "6"], "rows"
for row in results["rows"]:
    assert row["trainable_parameters"] > 0, row["title"]
    for world in ("closed", "open"):
        for protocol, numbers in row["summary"][world].items():
            for name, spread in numbers.items():
                value = spread["mean"]
                assert 0 <= value <= 1, (row["title"], world, protocol, name, value)
        # Guessing among the 96 seen pairs is right one time in 96; a trained model must be far from that.
        assert row["summary"][world]["standard"]["seen"]["mean"] > 0.1, (row["title"], world)
page = (out / "ablation.md").read_text(encoding="utf-8")
assert all(row["title"] in page for row in results["rows"]), "ablation.md"
with Image.open(out / "curves.png") as picture:
    assert picture.size > (800, 300), "curves.png"
report = (out / "report.html").read_text(encoding="utf-8")
assert all("data:image/png;base64" in report and row["key"] in report for row in results["rows"]), "report.html"
assert "http" not in report.replace("http://www.w3.org", ""), "report.html must not need a network"
for row in results["rows"]:
    assert all(0 < spread["mean"] < 1 for spread in row["gap"].values()), (row["title"], "modality gap")
print("the quick demo is sane")
