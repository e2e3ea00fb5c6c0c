"""AutoAttack in units, killed and resumed, against one plain call of pyautoattack."""

import zlib
from typing import Literal

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

from proxyrob.evaluate import STANDARD_ATTACKS, run_autoattack
from proxyrob.source import read_split
from proxyrob.storage import Stage
from proxyrob.threat import parse_threat
from tests.conftest import MakeStage
from tests.toys import Killer, StopHereError

BATCH_SIZE, SEED, NUM_IMAGES = 10, 12345, 24


class _Head(nn.Module):
    """A linear model fitted to the digits, small enough that 5,000 queries take a moment. It remembers what it was asked."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        super().__init__()
        self.asked: set[tuple[int, int]] = set()
        self.linear = nn.Linear(64, 10)
        torch.nn.init.zeros_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        for _ in range(200):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(self(images), labels).backward()
            optimizer.step()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.asked.add((len(images), zlib.crc32(images.detach().numpy().tobytes())))
        return self.linear(images.flatten(1))


@pytest.mark.parametrize(("text", "norm", "batches_to_the_end"), [("linf:0.11", "Linf", 2), ("l2:0.8", "L2", 1)])
def test_units_find_what_one_call_finds(
    text: str, norm: Literal["Linf", "L2"], batches_to_the_end: int, digits: Stage, make_stage: MakeStage
) -> None:
    """Killed after two attacks and resumed, ours asks the model every question that ``AutoAttack(version="standard")`` asks
    in one call, down to the last bit, and so finds the same verdict for each image.
    """
    threat, train, split = parse_threat(text), read_split(digits, "train"), read_split(digits, "test").first(NUM_IMAGES)
    model = _Head(train.images, train.targets).eval().requires_grad_(False)
    images, labels = split.images, split.targets
    peer = AutoAttack(model, device="cpu", eps=float(threat.epsilon), norm=norm, seed=SEED, version="standard")
    assert peer.attacks_to_run == list(STANDARD_ATTACKS)
    model.asked = set()
    attacked, _ = peer.run_standard_evaluation(images, labels, batch_size=BATCH_SIZE)
    asked, model.asked = model.asked, set()
    theirs = (model(attacked).argmax(1) == labels).numpy()

    stage = make_stage("evaluate")
    clean = (model(images).argmax(1) == labels).numpy()
    given = {"batch_size": BATCH_SIZE, "seed": SEED, "stage": stage}
    with pytest.raises(StopHereError):
        run_autoattack(model, images, labels, threat, **given, on_progress=Killer(lambda done: done >= 200))
    broken = run_autoattack(model, images, labels, threat, **given)
    ours = clean & ~np.logical_or.reduce(list(broken.values()))

    assert len(asked) > 5_000
    assert asked - model.asked == set()
    assert ours.tolist() == theirs.tolist()
    assert clean.sum() - broken["apgd-ce"].sum() >= ours.sum() > 0
    assert -(-int(ours.sum()) // BATCH_SIZE) == batches_to_the_end, "the toy shows less than it should"
    assert clean.sum() - ours.sum() > 4, "several images have to break"
