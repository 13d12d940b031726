"""What other libraries raise and log, in one line of ours."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from czsl_heads.encoders.hub import asked_once

_LONGEST = 160  # of what another library said
_OF_NETWORK = {  # by the names of the errors of huggingface_hub and of Python
    "GatedRepoError": "its owner has to grant access first",
    "RepositoryNotFoundError": "no such repository",
    "LocalEntryNotFoundError": "not there, and no network",
    "OfflineModeIsEnabled": "not there, and no network",
    "EntryNotFoundError": "no such file in the repository",
    "URLError": "not there, and no network",
}


@contextmanager
def told(expected: str, remedy: str) -> Iterator[None]:
    """Whatever another library raises, in one line: what was looked for, where, and how to get it."""
    try:
        with quiet(), asked_once():
            yield
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "transformers":
            raise
        raise missing_transformers(expected) from error
    except Exception as error:  # what they raise is not written down
        raise ValueError(f"expected {expected}, got none that can be read ({reason(error)}); {remedy}") from error


def missing_transformers(what: str) -> ModuleNotFoundError:
    """Who needs transformers, and the extra that brings it."""
    message = f"expected the package transformers for {what}, got none: pip install 'czsl-heads[transformers]'"
    return ModuleNotFoundError(message, name="transformers")


def reason(error: BaseException) -> str:
    """What went wrong, in a few words; most errors of other libraries are told in several lines."""
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it holds objects other than tensors"
    link: BaseException | None = error
    while link is not None:
        kinds = [kind.__name__ for kind in type(link).__mro__]
        for kind in kinds:
            if kind in _OF_NETWORK:
                return _OF_NETWORK[kind]
        link = link.__cause__ or link.__context__
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."


@contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs at the root what it then raises, and that random weights are random."""

    def ours(record: logging.LogRecord) -> bool:
        return f"{os.sep}open_clip{os.sep}" not in record.pathname

    logging.root.addFilter(ours)
    try:
        yield
    finally:
        logging.root.removeFilter(ours)
