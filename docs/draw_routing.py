"""Draw which words go to which expert: ``python docs/draw_routing.py RUN`` of ``czsl ablate --method eva``.

Writes ``docs/eva_results/routing.png``, of the row that the run shows, its first seed and its first 64 test images.
"""

import sys
from pathlib import Path

import torch

from czsl_heads import load
from czsl_heads.data import read_dataset
from czsl_heads.report.routing import plot_routing, routing_of

PICTURE = Path(__file__).parent / "eva_results" / "routing.png"
IMAGES = 64

if __name__ == "__main__":
    run = Path(sys.argv[1])
    model = load(run)
    images = read_dataset(run / "shapes").images("test", model.encoder.transform())
    routing = routing_of(model, torch.stack([images[number][0] for number in range(IMAGES)]))
    if routing is None:
        raise SystemExit(f"expected a run whose shown row has experts, got {run}")
    plot_routing(routing, PICTURE)
    print(f"wrote {PICTURE}")
