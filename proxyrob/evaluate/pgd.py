"""PGD on a whole split, in units that any number of workers share."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from proxyrob.attacks import Attacked, attack_pgd
from proxyrob.config.evaluate import EvaluateConfig
from proxyrob.device import eval_mode
from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate.adversarial import ENCODING, AdversarialImages, read_unit, tabulate_unit
from proxyrob.evaluate.binding import describe_inputs
from proxyrob.models import in_pieces
from proxyrob.rng import Streams
from proxyrob.source import Split
from proxyrob.storage import DataPlace, Stage
from proxyrob.storage.shared import SharedTables
from proxyrob.threat import Threat


class PgdRun:
    """PGD on every image, in units of one batch; ``broken`` are those that are classified correctly when unperturbed."""

    def __init__(
        self,
        config: EvaluateConfig,
        model: nn.Module,
        split: Split,
        correct: Bool[np.ndarray, " n"],
        threat: Threat,
        streams: Streams,
        stage: Stage,
        device: str,
    ) -> None:
        steps, size = config.pgd_steps, config.pgd_relative_step
        self.name = f"pgd-{steps}"
        self.description = f"proxyrob PGD, {steps} steps of {size} epsilon, one uniform start"
        self._split = split
        images, labels = split.images, split.targets
        about = {
            "steps": steps,
            "relative step": size,
            "batch size": config.batch_size,
            **describe_inputs(model, images, labels, threat, streams.entropy("evaluate/pgd")),
        }
        self._work = SharedTables(DataPlace.of(stage.scratch / "pgd"), about, stage.is_whole, ENCODING)
        starts = range(0, len(labels), config.batch_size)
        self._units = {
            f"batch-{k:04d}": np.arange(start, min(start + config.batch_size, len(labels))) for k, start in enumerate(starts)
        }

        read = in_pieces(model)

        def attack_unit(name: str) -> pa.Table:
            rows = self._units[name]
            chosen = torch.from_numpy(rows)
            x, y = images[chosen].to(device), labels[chosen].to(device)
            attacked: Float[Tensor, "b c h w"] = attack_pgd(
                read,
                x,
                lambda logits: F.cross_entropy(logits, y, reduction="sum"),
                threat,
                steps=steps,
                relative_step=size,
                generator=streams.torch("evaluate/pgd", device, batch=int(rows[0])),
            )
            with torch.inference_mode(), eval_mode(model):
                fooled = (read(attacked).argmax(1) != y) & torch.from_numpy(correct[rows]).to(device)
            return tabulate_unit(model, rows, images[chosen], labels[chosen], Attacked(attacked, fooled), threat, self.name)

        self._work.tabulate(list(self._units), attack_unit)
        self.broken = np.concatenate([self._read_broken(name) for name in self._units])

    def _read_broken(self, name: str) -> Bool[np.ndarray, " b"]:
        """Raises ``DataIntegrityError`` unless a unit has a verdict on each of its images."""
        table = self._work.read(name, ["index", "broken"])
        if not np.array_equal(table["index"].to_numpy(), self._units[name]):
            raise DataIntegrityError(f"unit {name} of {self.name} has verdicts on other images; delete the units and run again")
        return table["broken"].to_numpy()

    def adversarial_images(self) -> Iterator[AdversarialImages]:
        """Every adversarial image, unit by unit."""
        for name in self._units:
            yield read_unit(self._work.read(name), self.name, self._split.labels, tuple(self._split.images.shape[1:]))
