"""Whatever a command meets ends in one line that says what is wrong and what to do; --debug shows all of it."""

import errno
import os

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset

from czsl_heads import cli
from czsl_heads._complaints import complaint, in_one_line, is_out_of_memory
from czsl_heads.data.layout import DataError

NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18 GB)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried 4 bytes."),
]


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: str(error)[:30])
def test_a_want_of_memory_is_told_with_what_takes_less(error):
    assert is_out_of_memory(error)
    said = complaint(error, "train")
    assert said.startswith("expected more memory, got none (")
    for option in ("--options.checkpoint", "--options.micro_batch", "--options.eval_batch_size", "--options.cache"):
        assert option in said
    assert "--batch_size" in complaint(error, "bench")
    assert "\n" not in said


def test_what_torch_and_numpy_really_raise_is_a_want_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(10**15)
    assert is_out_of_memory(raised.value)
    with pytest.raises(MemoryError) as raised:
        np.empty(10**15)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("shape '[2]' is invalid for input of size 3"))
    assert not is_out_of_memory(ValueError("expected a file on a disk that is out of memory cards"))


class Missing(Dataset):
    """Raises what a split raises whose picture is gone."""

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise self.error


@pytest.mark.parametrize(
    "error",
    [DataError("data/images/1.png: expected an image file, got none"), FileNotFoundError(2, "No such file", "a.png")],
    ids=["data", "file"],
)
def test_an_error_of_a_worker_is_the_line_that_it_would_be_without(error):
    with pytest.raises(type(error)) as raised:
        next(iter(DataLoader(Missing(error), num_workers=1)))
    assert "Original Traceback" in str(raised.value)
    assert complaint(raised.value, "train") == str(error)


class Dying(Missing):
    def __getitem__(self, index):
        os._exit(9)


def test_a_worker_that_was_killed_is_told_with_what_to_try():
    with pytest.raises(RuntimeError) as raised:
        next(iter(DataLoader(Dying(None), num_workers=1)))
    said = complaint(raised.value, "ablate")
    assert said.startswith("a process that loads images was killed, mostly for want of memory (DataLoader worker")
    assert "--options.workers 0" in said


def test_errors_of_the_network_and_of_files_are_said_as_they_are():
    network = type("ConnectError", (Exception,), {"__module__": "httpx"})  # which is no OSError
    assert complaint(network("no route to huggingface.co")) == "no route to huggingface.co"
    assert complaint(network("")) == "ConnectError"
    full = OSError(errno.ENOSPC, "No space left on device", "out/results.json")
    said = "[Errno 28] No space left on device: 'out/results.json'; make room, and give the same command again"
    assert complaint(full) == said


def test_an_error_that_nobody_expected_says_where_it_was_raised_and_how_to_see_more():
    with pytest.raises(KeyError) as raised:
        complaint(None, command={}["train"])
    assert complaint(raised.value) == "unexpected KeyError: 'train'; czsl --debug shows all of it: please report it"
    with pytest.raises(AttributeError) as raised:
        cli._map_paths([7], None)
    said = complaint(raised.value)
    assert said.startswith("unexpected AttributeError: ")
    assert " (czsl_heads/cli.py:" in said


def test_a_line_is_no_longer_than_a_screen():
    said = complaint(ValueError(f"expected a name, got {'a' * 9999}, which is long"))
    assert len(said) < 620
    assert said.startswith("expected a name, got aaa")
    assert said.endswith("aaa, which is long")
    assert in_one_line(ValueError("one\n  two\tthree")) == "one two three"


def test_debug_shows_the_traceback_too(monkeypatch, capsys, tmp_path):
    assert cli.main(["check", str(tmp_path / "nothing")]) == 1
    plain = capsys.readouterr().err
    assert plain.count("\n") == 1
    for arguments in (["--debug", "check"], ["check", "--debug"]):
        assert cli.main([*arguments, str(tmp_path / "nothing")]) == 1
        shown = capsys.readouterr().err
        assert shown.startswith("Traceback (most recent call last)")
        assert shown.endswith(plain)


@pytest.mark.parametrize(
    "error", [SafetensorError("header too large"), RecursionError("too deep"), EOFError(), NO_MEMORY[1]], ids=type
)
def test_no_traceback_reaches_a_user(monkeypatch, capsys, error):
    def fail(**_):
        raise error

    monkeypatch.setitem(cli._COMMANDS, "encoders", fail)
    assert cli.main(["encoders"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("czsl encoders: ")


def test_output_that_nobody_reads_any_more_ends_quietly(monkeypatch, capfd):
    def fail(**_):
        raise BrokenPipeError

    monkeypatch.setitem(cli._COMMANDS, "encoders", fail)
    monkeypatch.setattr(cli, "_leave_pipe", lambda: None)
    assert cli.main(["encoders"]) == 1
    assert capfd.readouterr().err == ""
