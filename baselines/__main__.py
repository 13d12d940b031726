"""``python -m baselines ablate``: a method without and with Sparse Alignment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def ablate(out: Path | None = None, **arguments: Any) -> int:
    """Train and test a method without and with Sparse Alignment, and print the table.

    Writes results.json, comparison.md and curves.png. The same command on the same folder resumes what was interrupted.

    Args:
        out: Folder for the results: new, empty, or of the same settings; default: baseline-METHOD.
        arguments: Those of :func:`baselines.options.configure`.

    Returns:
        0.
    """
    from baselines.ablate import run_ablation
    from baselines.options import configure
    from baselines.report import comparison_markdown, plot_comparison
    from czsl_heads._files import write_text
    from czsl_heads.training.trainer import is_main_process

    config = configure(**arguments)
    out = Path(f"baseline-{config.method}") if out is None else out
    results = run_ablation(out, config)
    if is_main_process():
        plot_comparison(results, out / "curves.png")
        write_text(out / "comparison.md", comparison_markdown(results))
        print((out / "comparison.md").read_text(encoding="utf-8"))
        print(f"wrote results.json, comparison.md and curves.png to {out}")
    return 0


_ADD = "vac: a condenser behind the method with Sparse Alignment; --add vac --add bank: a memory bank too"


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    from baselines.options import configure

    parser = ArgumentParser(prog="baselines", description="CLIP, CoOp, CSP and Troika, and Sparse Alignment in them.")
    commands = parser.add_subcommands(required=True)
    ablating = ArgumentParser(description="Train and test a method without and with Sparse Alignment.")
    ablating.add_function_arguments(configure, skip={"quick", "add"})
    ablating.add_argument("--quick", action="store_true", help="fewer images and epochs, to check that everything runs")
    ablating.add_argument("--add", action="append", default=[], metavar="{vac,bank}", help=_ADD)
    ablating.add_argument("--out", type=Path, help="folder: new, empty, or to resume; default: baseline-METHOD")
    ablating.add_argument("--config", action="config", help="YAML file with any of these arguments")
    commands.add_subcommand("ablate", ablating, help="a method without and with Sparse Alignment")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of input end in one line on stderr and exit status 1 (usage: 2; interrupted: 130)."""
    try:
        values = _parser().parse_args(None if arguments is None else list(arguments))["ablate"].as_dict()
        values.pop("config", None)
        return ablate(**values)
    except ModuleNotFoundError as error:
        complaint = f"expected the package {error.name}, got none: pip install 'czsl-heads[train]'"
    except (ValueError, TypeError, OSError) as error:
        complaint = str(error)
    except KeyboardInterrupt:
        print("\nbaselines ablate: interrupted; the same command resumes it", file=sys.stderr)
        return 130
    print(f"baselines ablate: {complaint}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
