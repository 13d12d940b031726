"""What the tests of data share."""

import pytest

from tests.data.animals import write_animals


@pytest.fixture
def root(tmp_path):
    """A data set of five images, which a test may spoil."""
    return write_animals(tmp_path / "animals")
