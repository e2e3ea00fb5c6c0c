"""How far an attack on many images is: images left, what is known of the accuracy by now, and how long it may still take."""

import time

from jaxtyping import Float
from torch import Tensor, nn

from proxyrob.evaluate.ensemble import Ensemble
from proxyrob.intervals import measure_share
from proxyrob.types import OnProgress

INTERVAL_S = 0.5
TOTAL = 1000


class AttackProgress:
    """Tells how far an ensemble is.

    The figures: ``upper_bound`` is the share of images that still stand, which can only fall, and ``low`` to ``high`` its 95 %
    interval; ``images_left`` have not been through the current attack; ``seconds_left`` takes for granted that every image
    that stands withstands to the end, and that this worker is alone.
    """

    def __init__(self, ensemble: Ensemble, num_images: int, on_progress: OnProgress) -> None:
        self._ensemble, self._num_images, self._on_progress = ensemble, num_images, on_progress
        self._costs = {attack: ensemble.cost(attack) for attack in ensemble.attacks}
        self._attack = ensemble.attacks[0]
        self._standing = self._given = self._left = self._unit = 0
        self._in_unit = self._spent = 0.0
        self._started = self._told = time.monotonic()

    def begin(self, attack: str, standing: int) -> None:
        """The next attack begins, on the images that stand."""
        self._attack, self._given = attack, standing
        self.unit(standing, standing, 0)

    def unit(self, standing: int, left: int, size: int) -> None:
        """This worker begins with ``size`` images, out of ``left`` that have not been through the current attack."""
        self._standing, self._left, self._unit, self._in_unit = standing, left, size, 0.0
        self._tell()

    def count(self, images: int) -> None:
        """The model was shown some images."""
        cost = images * self._costs[self._attack] / self._ensemble.readings(self._attack)
        self._spent += cost
        self._in_unit += cost
        if time.monotonic() - self._told > INTERVAL_S:
            self._tell()

    def end(self, standing: int) -> None:
        """All attacks are over."""
        self._standing, self._left, self._given, self._attack = standing, 0, 0, self._ensemble.attacks[-1]
        self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        attacks = self._ensemble.attacks
        cost, position = self._costs[self._attack], attacks.index(self._attack)
        left = max(self._left - min(self._in_unit / cost, self._unit), 0.0)
        whole = sum(self._costs.values())
        before = sum(self._costs[attack] for attack in attacks[:position])
        done = (before + cost * (1.0 - left / max(self._given, 1))) / whole
        open_cost = left * cost + self._standing * sum(self._costs[attack] for attack in attacks[position + 1 :])
        bound = measure_share(self._standing, self._num_images)
        estimate = {"seconds_left": open_cost * (self._told - self._started) / self._spent} if self._spent else {}
        self._on_progress(
            int(TOTAL * done), TOTAL, upper_bound=bound.value, images_left=left, low=bound.low, high=bound.high, **estimate
        )


class Metered(nn.Module):
    """A model that counts the images it is shown."""

    def __init__(self, model: nn.Module, progress: AttackProgress) -> None:
        super().__init__()
        self.model = model
        self._progress = progress

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        logits = self.model(images)
        self._progress.count(len(images))
        return logits
