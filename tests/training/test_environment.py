from pathlib import Path

import pytest
import torch

from czsl_heads.training import environment as module
from czsl_heads.training.environment import environment, processor

INFO = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\nmodel name\t: Other\n"


@pytest.mark.parametrize(("flags", "more"), [("amx_tile amx_int8", ", AMX"), ("not_amx_tile", "")])
def test_a_processor_is_told_by_name_and_instructions(tmp_path: Path, monkeypatch, flags: str, more: str) -> None:
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(INFO.format(flags), encoding="utf-8")
    assert processor() == f"Some CPU @ 2 GHz, {torch.backends.cpu.get_cpu_capability()}{more}"


def test_a_system_without_such_a_file_has_a_processor_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CPU_INFO", tmp_path / "none")
    monkeypatch.setattr("platform.processor", lambda: "")
    assert processor() == f"unknown, {torch.backends.cpu.get_cpu_capability()}"


def test_what_numbers_were_found_on_is_written_down() -> None:
    found = environment()
    assert found["hardware"]["processor"] == processor()
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] in torch.__version__
