"""What a command says of an error: one line that tells what is wrong, and what to do."""

from __future__ import annotations

import errno
import re
import traceback
from pathlib import Path

_NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
_WORKER = re.compile(r"DataLoader worker \(pid\(?s?\)?.*?\) (exited unexpectedly|is killed by signal)")
_LAST_LINE = re.compile(r"^[\w.]*(?:Error|Exception)\w*: ", re.MULTILINE)
_NETWORK = ("httpx", "httpcore", "requests", "urllib3", "huggingface_hub")
_LONGEST = 600  # letters of a line
_ROOT = Path(__file__).parent

_TRAINING = (
    "try --options.checkpoint true; or, with another --out, --options.micro_batch 8 (the same gradients), "
    "--options.eval_batch_size 16, --options.cache false or --trainer.precision bf16-mixed"
)
# What takes less memory, by command.
_LESS = {
    "train": _TRAINING,
    "ablate": _TRAINING,
    "evaluate": "try --trainer.precision bf16-mixed, --trainer.accelerator cpu, or fewer rows (--rows)",
    "bench": "try a smaller --batch_size, or --world closed",
    "gap": "try a smaller --batch_size or --limit",
    "report": "try fewer images (--images 2)",
    "predict": "try --world closed",
}


def complaint(error: BaseException, command: str = "") -> str:
    """An error in one line; of one that nobody expected also where it was raised, and how to see all of it.

    Args:
        error: Any error.
        command: The command that met it.
    """
    said = _shortened(in_one_line(error))
    if isinstance(error, ModuleNotFoundError):
        return _how_to_get(error)
    if _WORKER.search(said):
        return f"a process that loads images was killed, mostly for want of memory ({said}); {_fewer_workers(command)}"
    if is_out_of_memory(error):
        return f"expected more memory, got none ({said[:200]}); {_LESS.get(command, 'try less at once')}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{said}; make room, and give the same command again"
    if isinstance(error, (ValueError, TypeError, OSError)) or type(error).__module__.partition(".")[0] in _NETWORK:
        return said or type(error).__name__
    return f"unexpected {type(error).__name__}: {said}{_place(error)}; czsl --debug shows all of it: please report it"


def in_one_line(error: BaseException) -> str:
    """What an error says, without line breaks; of one from a process that loads images, what was raised there."""
    said = str(error)
    if "Original Traceback" in said:
        found = [*_LAST_LINE.finditer(said)]
        said = said[found[-1].end() :] if found else said
    return " ".join(said.split())


def _shortened(said: str) -> str:
    """Without the middle of what is longer than a screen: a name of thousands of letters, say."""
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST // 2]} ... {said[-_LONGEST // 2 :]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory was asked for that is not there, on whichever device."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _NO_MEMORY)
    )


def _fewer_workers(command: str) -> str:
    if command in ("train", "ablate"):
        return "try --options.workers 0, or fewer images at once (--options.batch_size, with another --out)"
    return "try again with fewer other processes"


def _place(error: BaseException) -> str:
    """The last line of ours that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(_ROOT)]
    if not ours:
        return ""
    return f" ({Path(ours[-1].filename).relative_to(_ROOT.parent)}:{ours[-1].lineno})"


def _how_to_get(error: ModuleNotFoundError) -> str:
    """Which extra brings a package that is missing."""
    said = str(error)
    if said.startswith("expected"):  # who needs it has said so
        return said
    package = (error.name or said).partition(".")[0]
    extra = package if package == "transformers" else "train"
    return f"expected the package {package}, got none: pip install 'czsl-heads[{extra}]'"
