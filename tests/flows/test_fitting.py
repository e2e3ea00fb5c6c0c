"""Memory that runs out, for real: a child whose addresses the kernel has bounded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from flows.records.tracking import held_at_once_tags
from flows.running.fitting import USUAL, largest_batch, run_fitting
from proxyrob.config import CnnModel, PgdObjective, RobustTrainConfig
from proxyrob.config.evaluate import EvaluateConfig
from proxyrob.errors import OutOfMemory
from proxyrob.memory import at_most
from proxyrob.models import load_classifier
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from proxyrob.train import read_history, train_classifier
from tests.conftest import MakeStage
from tests.rooms import call_in_room
from tests.toys import tiny_split, write_source

ROOM = 100 << 20


def _refuse(most: int, attempts: str, on_progress: Any) -> int:
    """Has room for so many images."""
    with Path(attempts).open("a") as file:
        print(at_most(8), file=file)
    if at_most(8) > most:
        torch.empty(1 << 60, dtype=torch.uint8)
    return at_most(8)


@pytest.mark.parametrize(("most", "tried"), [(8, [8]), (5, [8, 4]), (1, [8, 4, 2, 1])])
def test_half_as_many_until_they_fit(tmp_path: Path, most: int, tried: list[int]) -> None:
    """The work is given again with fewer images, and it is said each time."""
    notes: list[str] = []
    attempts = tmp_path / "attempts"
    given: dict[str, Any] = {"threads": 1, "on_progress": lambda *_, **__: None}
    found = run_fitting(_refuse, largest=8, note=notes.append, most=most, attempts=str(attempts), **given)
    assert found == tried[-1]
    assert [int(line) for line in attempts.read_text().split()] == tried
    assert [note.rpartition(": ")[2] for note in notes] == [f"goes on with at most {n} of 8 images at once" for n in tried[1:]]


def test_no_room_for_one_image_is_an_error(tmp_path: Path) -> None:
    given: dict[str, Any] = {"threads": 1, "on_progress": lambda *_, **__: None, "attempts": str(tmp_path / "attempts")}
    with pytest.raises(OutOfMemory, match=r"can't allocate memory.*no room for one image") as caught:
        run_fitting(_refuse, largest=8, note=lambda _: None, most=0, **given)
    cause = caught.value.__cause__
    assert cause is not None
    assert "_refuse" in cause.__notes__[0]  # where, in the child
    assert len((tmp_path / "attempts").read_text().split()) == 4


def test_a_stage_says_how_many_images_it_has_at_once() -> None:
    assert largest_batch({"config": EvaluateConfig(batch_size=77)}) == 77
    assert largest_batch({"config": RobustTrainConfig(batch_size=96)}) == 96
    assert largest_batch({"config": RobustTrainConfig(batch_size=96, micro_batch=24)}) == 24
    assert largest_batch({"threshold": 0.5}) == USUAL


def test_training_goes_on_with_fewer_images_at_once(make_stage: MakeStage) -> None:
    """The kernel gives no more memory than a quarter of a batch needs: the same weights come out, and the record says how."""
    images = make_stage("source", k=1)
    write_source(images, tiny_split(4096, shape=(8, 8, 1)), test=tiny_split(8, shape=(8, 8, 1), seed=1))
    config = RobustTrainConfig(
        steps=2, batch_size=4096, synthetic_fraction=0.0, gamma=1.0, objective=PgdObjective(attack_steps=1), validate_every=None
    )
    arguments: dict[str, Any] = {
        "model": CnnModel(widths=(32, 32)),
        "config": config,
        "source": images,
        "synthetic": (),
        "threat": parse_threat("linf:0.1"),
        "seed": 0,
    }
    roomy, cramped = make_stage("train", k=1), make_stage("train", k=2)
    train_classifier(**arguments, stage=roomy)
    notes: list[str] = []
    run_fitting(
        call_in_room,
        largest=config.batch_size,
        note=notes.append,
        threads=1,
        on_progress=lambda *_, **__: None,
        function=train_classifier,
        room=ROOM,
        arguments=arguments | {"stage": cramped},
    )
    assert "goes on with at most 2048 of 4096 images at once" in notes[0]
    assert _held(cramped) == 4096 >> len(notes)
    assert _held(roomy) is None
    assert held_at_once_tags(cramped, make_stage("attack", k=1)) == {"proxyrob.held_at_once.train": str(_held(cramped))}
    assert held_at_once_tags(roomy) == {}
    assert read_history(cramped).drop(columns="time_s").loss.tolist() == pytest.approx(
        read_history(roomy).loss.tolist(), rel=1e-5
    )
    weights = load_classifier(roomy).state_dict()
    for name, tensor in load_classifier(cramped).state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-4, msg=name)


def _held(stage: Stage) -> int | None:
    record = stage.record()
    assert record is not None
    return record.held_at_once
