"""AutoAttack on any number of images, by any number of workers, in pieces that survive a kill."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from proxyrob.device import eval_mode
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate.adversarial import ENCODING, AdversarialImages, read_unit, tabulate_unit
from proxyrob.evaluate.binding import describe_inputs
from proxyrob.evaluate.ensemble import STANDARD_ATTACKS, Ensemble, Mode
from proxyrob.evaluate.progress import AttackProgress, Metered
from proxyrob.models import FoldedCopy, in_pieces
from proxyrob.storage import DataPlace
from proxyrob.storage.shared import SharedTables
from proxyrob.threat import Threat
from proxyrob.types import OnProgress, no_progress


@dataclass(frozen=True)
class AttackRun:
    """What an ensemble found: for each attack on which images it was run and which of them it broke.

    ``target_reached`` is ``None`` without a target. The adversarial images lie in ``units`` of ``work``.
    """

    ensemble: Ensemble
    attacked: dict[str, Bool[np.ndarray, " n"]]
    broken: dict[str, Bool[np.ndarray, " n"]]
    target_reached: bool | None
    image_shape: tuple[int, ...]
    work: SharedTables
    units: tuple[tuple[str, str], ...]

    def adversarial_images(self, labels: Int64[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]) -> Iterator[AdversarialImages]:
        """Every adversarial image, unit by unit, with its row in the whole split; ``rows`` are those of the images."""
        for attack, unit in self.units:
            part = read_unit(self.work.read(unit), attack, labels, self.image_shape)
            yield AdversarialImages(part.attack, rows[part.indices], part.labels, part.images)


def run_autoattack(
    model: nn.Module,
    images: Float[Tensor, "n c h w"],
    labels: Int64[Tensor, " n"],
    threat: Threat,
    *,
    batch_size: int,
    seed: int,
    units: DataPlace,
    mode: Mode = "standard",
    target: float | None = None,
    device: str = "cpu",
    has_ended: Callable[[], bool] = lambda: False,
    on_progress: OnProgress = no_progress,
) -> AttackRun:
    """Run each attack in order on the images that the ones before it did not break.

    The verdicts are those of one call of pyautoattack's ``AutoAttack(version="standard").run_standard_evaluation`` with the
    same seed and batch size: the same random numbers and the same steps, less the work that changes no verdict. Attacks read
    a folded copy of the model; an image is broken when the model itself, in eval mode, misclassifies the stored adversarial
    image. One that the copy alone misclassifies goes on being attacked.

    Work is cut into (attack, batch) units in the place ``units``, which any number of workers may share. With fewer than ten
    classes, or in another mode, the ensemble is another one and named so: see ``Ensemble``. Mode ``black-box`` takes any module
    that gives logits, and reads it as it is. With a ``target`` it ends after
    the first unit by which the robust accuracy is sure to be at least the target, or sure to be below it.

    Raises ``CheckpointMismatch`` when ``units`` holds other work, ``DataIntegrityError`` when an attack leaves its threat
    model or the units do not cover the images, and ``EndedElsewhere`` when ``has_ended`` says so.
    """
    read = in_pieces(model)
    with torch.inference_mode(), eval_mode(model):
        logits = torch.cat([read(batch.to(device)).cpu() for batch in images.split(batch_size)])
    ensemble = Ensemble(logits.shape[1], mode)
    standing = (logits.argmax(1) == labels).numpy()
    required = None if target is None else math.ceil(target * len(labels) - 1e-9)
    about = {
        "ensemble": ensemble.name,
        "batch size": batch_size,
        "target": target,
        **describe_inputs(model, images, labels, threat, seed),
    }
    work = SharedTables(units, about, has_ended, ENCODING)
    progress = AttackProgress(ensemble, len(labels), on_progress)
    reader = model if mode == "black-box" else FoldedCopy(model, ensemble.precision, example=images[:2].to(device))
    search = Metered(in_pieces(reader), progress)

    def confirm(found: Float[Tensor, "m c h w"], own: Int64[Tensor, " m"]) -> Bool[Tensor, " m"]:
        with torch.inference_mode(), eval_mode(model):
            return read(found).argmax(1) != own

    def attack_unit(part: _Round, name: str) -> pa.Table:
        rows = part.units[name]
        progress.unit(part.num_standing, part.num_left, len(rows))
        x, y = images[torch.from_numpy(rows)], labels[torch.from_numpy(rows)]
        attacked = ensemble.attack(part.attack, search, x.to(device), y.to(device), threat, seed=seed, confirm=confirm)
        return tabulate_unit(model, rows, x, y, attacked, threat, part.attack)

    rounds: list[_Round] = []
    for attack in ensemble.attacks:
        part = _Round(work, attack, np.flatnonzero(standing), batch_size, required)
        progress.begin(attack, part.num_standing)
        work.tabulate(list(part.units), lambda name, part=part: attack_unit(part, name), part.look)
        part.close()
        standing[part.broken] = False
        rounds.append(part)
        if part.target_reached is not None:
            break
    progress.end(int(standing.sum()))
    attacked, broken = ({attack: np.zeros(len(labels), dtype=bool) for attack in ensemble.attacks} for _ in range(2))
    for part in rounds:
        attacked[part.attack][part.attacked] = True
        broken[part.attack][part.broken] = True
    return AttackRun(
        ensemble=ensemble,
        attacked=attacked,
        broken=broken,
        target_reached=rounds[-1].target_reached,
        image_shape=tuple(images.shape[1:]),
        work=work,
        units=tuple((part.attack, name) for part in rounds for name in part.units),
    )


class _Round:
    """One attack on the images that stood before it: its units, and what is known of them by now.

    ``required`` is the number of images that have to withstand all attacks, if there is a target.
    """

    def __init__(
        self, work: SharedTables, attack: str, rows: Int64[np.ndarray, " m"], batch_size: int, required: int | None
    ) -> None:
        self.attack = attack
        self.units = {
            f"{attack}-{k:04d}": rows[start : start + batch_size] for k, start in enumerate(range(0, len(rows), batch_size))
        }
        self.target_reached: bool | None = None
        self._work, self._required = work, required
        self._num_given = len(rows)
        self._found: dict[str, Int64[np.ndarray, " k"]] = {}

    def look(self, done: set[str]) -> bool:
        """Read the verdicts of units that are there; whether they decide on the target.

        Raises ``DataIntegrityError`` unless a unit has a verdict on each of its images, exactly once.
        """
        for name in sorted(done - self._found.keys()):
            table = self._work.read(name, ["index", "broken"])
            rows = table["index"].to_numpy()
            if not np.array_equal(rows, self.units[name]):
                raise DataIntegrityError(
                    f"unit {name} has verdicts on {len(rows)} images, not on the {len(self.units[name])} that stood before "
                    f"{self.attack}; delete the units and run again"
                )
            self._found[name] = rows[table["broken"].to_numpy()]
        return self._decide() is not None

    def close(self) -> None:
        """Take the units in their order, up to the first that decides on the target: others may have gone further."""
        decided = self._decide()
        if decided is not None:
            self.target_reached, count = decided
            self.units = dict(list(self.units.items())[:count])
            self._found = {name: self._found[name] for name in self.units}

    def _decide(self) -> tuple[bool, int] | None:
        """Whether the target is reached, and after how many units that is sure."""
        if self._required is None:
            return None
        standing, withstood = self._num_given, 0
        is_last = self.attack == STANDARD_ATTACKS[-1]  # of every ensemble
        for count, name in enumerate([None, *self.units]):
            if name is not None:
                if name not in self._found:
                    return None
                standing -= len(self._found[name])
                withstood += len(self.units[name]) - len(self._found[name])
            if standing < self._required or (is_last and withstood >= self._required):
                return standing >= self._required, count
        return None

    @property
    def attacked(self) -> Int64[np.ndarray, " m"]:
        return _joined(list(self.units.values()))

    @property
    def broken(self) -> Int64[np.ndarray, " k"]:
        return _joined(list(self._found.values()))

    @property
    def num_standing(self) -> int:
        return self._num_given - len(self.broken)

    @property
    def num_left(self) -> int:
        return self._num_given - sum(len(self.units[name]) for name in self._found)


def _joined(parts: list[Int64[np.ndarray, " _"]]) -> Int64[np.ndarray, " m"]:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts])
