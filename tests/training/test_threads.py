"""The number of threads is chosen by a clock, where there is a choice, and an interrupted training keeps it."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from czsl_heads.training import threads as module
from czsl_heads.training.ablate import run_ablation
from czsl_heads.training.threads import fastest, fitting_threads, is_settled, take_up

pytestmark = pytest.mark.engine
IMAGES = torch.zeros(2, 3, 4, 4)


@pytest.fixture(autouse=True)
def _own_threads(monkeypatch: pytest.MonkeyPatch):
    """Four threads, which nobody has settled; behind the test as many as before."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def encoder_that_likes(best: int, seconds: float = 0.01):
    """Takes the longer, the further the number of threads is from the best one."""

    def encode(images):
        time.sleep(seconds * (1 + abs(torch.get_num_threads() - best)))

    return encode


@pytest.mark.parametrize("best", [1, 2, 4])
def test_the_fastest_number_is_taken(best: int) -> None:
    assert fastest(encoder_that_likes(best), IMAGES, 4) == best


def test_what_takes_long_is_not_tried_on_fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALL", 0.02)
    encoded = []

    def encode(images):
        encoded.append(len(images))
        time.sleep(0.015 * len(images))

    assert fastest(encode, IMAGES, 4) == 4
    assert encoded == [1, 2]  # one image is quick, two are not
    encoded.clear()
    monkeypatch.setattr(module, "SMALL", 0.001)
    assert fastest(encode, IMAGES, 4) == 4
    assert encoded == [1]


def trainer_on(device: str, processes: int = 1):
    return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(device)), world_size=processes)


def encoder(best: int = 1, image_size=4):
    return SimpleNamespace(encode_tokens=encoder_that_likes(best), image_size=image_size)


@pytest.mark.parametrize("image_size", [4, (4, 6)])
def test_within_the_block_alone(image_size) -> None:
    def fail() -> None:
        assert torch.get_num_threads() == 2
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), fitting_threads(encoder(2, image_size), trainer_on("cpu")):
        fail()
    assert torch.get_num_threads() == 4


def test_random_numbers_are_not_used_up() -> None:
    drawing = SimpleNamespace(encode_tokens=lambda images: torch.rand(3), image_size=4)
    before = torch.get_rng_state()
    with fitting_threads(drawing, trainer_on("cpu")):
        assert torch.equal(torch.get_rng_state(), before)


def test_nothing_is_tried_where_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = SimpleNamespace(encode_tokens=None, image_size=4)
    for trainer in (trainer_on("meta"), trainer_on("cpu", processes=2)):
        with fitting_threads(silent, trainer):
            assert torch.get_num_threads() == 4
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert is_settled()
    with fitting_threads(silent, trainer_on("cpu")):
        assert torch.get_num_threads() == 4
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    assert is_settled()
    with fitting_threads(silent, trainer_on("cpu")):
        assert torch.get_num_threads() == 1


def test_an_interrupted_training_goes_on_with_its_number(configured, tmp_path: Path, monkeypatch) -> None:
    from czsl_heads.training.stage import Stage

    seen = []
    monkeypatch.setattr(module, "fastest", lambda encode, images, most: 2)
    monkeypatch.setattr(Stage, "on_train_epoch_end", lambda self: seen.append(torch.get_num_threads()), raising=False)
    stop = KeyboardInterrupt("after the first epoch")

    def interrupted(self):
        seen.append(torch.get_num_threads())
        if self.current_epoch == 1:
            raise stop

    monkeypatch.setattr(Stage, "on_train_epoch_start", interrupted, raising=False)
    config = configured("csp", options={"epochs": 2})
    with pytest.raises(KeyboardInterrupt):
        run_ablation(tmp_path / "run", config)
    assert set(seen) == {2}

    monkeypatch.setattr(Stage, "on_train_epoch_start", lambda self: None, raising=False)
    monkeypatch.setattr(module, "fastest", lambda encode, images, most: 1)  # by now another core is busy
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    run_ablation(tmp_path / "run", config)
    assert seen[3] == 2  # the second epoch of the interrupted training
    assert torch.get_num_threads() == 4


def test_more_threads_than_there_are_cores_are_not_taken_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 3)
    take_up(8)
    assert torch.get_num_threads() == 4
    take_up(3)
    assert torch.get_num_threads() == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    take_up(1)
    assert torch.get_num_threads() == 3
