"""The hub is asked where there is a network, and nothing of it is left changed."""

import logging
import socket

import pytest
from huggingface_hub import constants

from czsl_heads.encoders import hub
from czsl_heads.encoders.hub import asked_once, has_network


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch):
    monkeypatch.setattr(hub, "getproxies", dict)


def nobody(*arguments, **options):
    raise socket.gaierror("Name or service not known")


def test_a_host_without_a_number_is_no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    assert not has_network("https://huggingface.co")
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert has_network("https://huggingface.co")  # the proxy may know it


def test_the_host_that_is_set_is_the_one_that_is_looked_up(monkeypatch):
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port: asked.append((host, port)))
    assert has_network("https://mirror.example/hub")
    assert asked == [("mirror.example", 443)]


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("network", [False, True])
def test_within_it_the_hub_is_off_line_if_there_is_no_network(monkeypatch, before, network):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before)
    monkeypatch.setattr(hub, "has_network", lambda address: network)
    logger = logging.getLogger("huggingface_hub")
    level = logger.level

    def ask():
        with asked_once():
            found.append((constants.HF_HUB_OFFLINE, logger.isEnabledFor(logging.WARNING)))
            raise KeyError

    found = []
    with pytest.raises(KeyError):
        ask()
    assert found == [(before or not network, False)]
    assert constants.HF_HUB_OFFLINE is before
    assert logger.level == level
