"""The Hugging Face hub, asked only where there is a network."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlparse
from urllib.request import getproxies


@contextmanager
def asked_once() -> Iterator[None]:
    """Within this, what is not in the cache is told at once where there is no network, and nothing is logged.

    ``huggingface_hub`` itself would try six times for each file, for half a minute, and log each time.
    """
    from huggingface_hub import constants

    logger = logging.getLogger("huggingface_hub")
    level, offline = logger.level, constants.HF_HUB_OFFLINE
    logger.setLevel(logging.ERROR)
    constants.HF_HUB_OFFLINE = offline or not has_network(constants.ENDPOINT)
    try:
        yield
    finally:
        logger.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def has_network(address: str) -> bool:
    """False if the host of an address has no number here, and no proxy is there to know it."""
    if getproxies():
        return True
    try:
        socket.getaddrinfo(urlparse(address).hostname, 443)
    except OSError:
        return False
    return True
