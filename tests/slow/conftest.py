"""What a run of the slow tests found, kept as JSON: outcome and seconds of each, hardware and versions."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results.json"
_found = {}


def pytest_runtest_logreport(report):
    if "/slow/" in report.nodeid and (report.when == "call" or report.outcome != "passed"):
        name = report.nodeid.rpartition("::")[2]
        _found[name] = {"outcome": report.outcome, "seconds": round(report.duration, 1)}


def pytest_sessionfinish(session):
    """Written by a whole run only: one test by itself would leave the others out."""
    if not _found or session.config.option.keyword or any("::" in argument for argument in session.config.args):
        return
    from czsl_heads._files import write_json
    from czsl_heads.training.environment import environment

    write_json(RESULTS, {"command": "make slow", "environment": environment(), "tests": _found})
