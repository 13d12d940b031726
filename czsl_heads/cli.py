"""The ``czsl`` command: draw a data set, check one, reproduce an ablation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser


def make_shapes(**arguments: Any) -> int:
    """Write a shapes data set; the arguments are those of :func:`czsl_heads.data.make_shapes`."""
    from czsl_heads.data.shapes import make_shapes as make_dataset

    print(f"wrote {make_dataset(**arguments)}")
    return 0


def check(root: Path) -> int:
    """Read a data set in the field's layout, decode every image, and print what is there.

    Args:
        root: Folder of the data set.

    Returns:
        0, or 1 if an image is broken.
    """
    from czsl_heads.data.integrity import check as check_dataset

    report = check_dataset(root)
    print(report)
    return 0 if report.ok else 1


def ablate(out: Path, **arguments: Any) -> int:
    """Train and test the rows of the SAC paper's ablation, print the table and write it to a folder.

    Writes results.json, ablation.md and curves.png. The same command on the same folder resumes what was interrupted.

    Args:
        out: Folder for the results: new, empty, or of an ablation with the same settings.
        arguments: Those of :func:`czsl_heads.training.config.configure`.

    Returns:
        0.
    """
    from czsl_heads._files import write_text
    from czsl_heads.report.curves import plot_curves
    from czsl_heads.report.table import ablation_markdown, print_ablation
    from czsl_heads.training.ablate import run_ablation
    from czsl_heads.training.config import configure
    from czsl_heads.training.run import is_main_process

    results = run_ablation(out, configure(**arguments))
    if is_main_process():
        plot_curves(results, out / "curves.png")
        write_text(out / "ablation.md", ablation_markdown(results))
        print_ablation(results)
        print(f"wrote results.json, ablation.md and curves.png to {out}")
    return 0


_COMMANDS: dict[str, Callable[..., int]] = {"make-shapes": make_shapes, "check": check, "ablate": ablate}


def _parser() -> ArgumentParser:
    from jsonargparse import ArgumentParser

    from czsl_heads import __version__
    from czsl_heads.data.shapes import make_shapes as make_dataset
    from czsl_heads.training.config import configure

    parser = ArgumentParser(
        prog="czsl", description="Compositional zero-shot learning on any CLIP.", version=__version__
    )
    commands = parser.add_subcommands(required=True)
    shapes = ArgumentParser(description="Write a shapes data set to disk, in the field's own layout.")
    shapes.add_function_arguments(make_dataset)
    commands.add_subcommand("make-shapes", shapes, help="draw a data set")
    checking = ArgumentParser(description="Read a data set, decode every image, and print what is there.")
    checking.add_function_arguments(check, as_positional=True)
    commands.add_subcommand("check", checking, help="check a data set on disk")
    ablating = ArgumentParser(description="Train and test the rows of the SAC paper's ablation.")
    ablating.add_argument("--out", type=Path, required=True, help="folder for the results: new, empty, or to resume")
    ablating.add_function_arguments(configure, skip={"quick"})
    ablating.add_argument("--quick", action="store_true", help="fewer images and epochs, to check that everything runs")
    ablating.add_argument("--config", action="config", help="YAML file with any of these arguments")
    commands.add_subcommand("ablate", ablating, help="reproduce the ablation table")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; errors of input end in one line on stderr and exit status 1 (usage: 2; interrupted: 130)."""
    command = ""
    try:
        parsed = _parser().parse_args(None if arguments is None else list(arguments))
        command = parsed.subcommand
        values = parsed[command].as_dict()
        values.pop("config", None)
        return _COMMANDS[command](**values)
    except ModuleNotFoundError as error:
        complaint = f"expected the package {error.name}, got none: pip install 'czsl-heads[train]'"
    except (ValueError, TypeError, OSError) as error:
        complaint = str(error)
    except KeyboardInterrupt:
        hint = "; the same command resumes it" if command == "ablate" else ""
        print(f"\n{f'czsl {command}'.strip()}: interrupted{hint}", file=sys.stderr)
        return 130
    print(f"{f'czsl {command}'.strip()}: {complaint}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
