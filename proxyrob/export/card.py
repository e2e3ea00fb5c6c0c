"""The card: what a model is, what was measured, and how."""

import json
from pathlib import Path

from proxyrob.export.parity import ParityReport
from proxyrob.intervals import Measured
from proxyrob.storage import Report
from proxyrob.storage.files import write_bytes, write_json


class ModelCard(Report):
    """Everything somebody downstream has to know before relying on a model."""

    name: str
    architecture: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    threat: str
    training: str
    training_data: str
    test_data: str
    clean: Measured
    pgd: Measured
    pgd_steps: int
    autoattack: Measured
    autoattack_name: str
    autoattack_version: str
    selection: str
    seed: int
    digests: dict[str, str]

    def onnx_metadata(self) -> dict[str, str]:
        """Metadata properties of the ONNX file."""
        return {
            "labels": json.dumps(self.class_names),
            "threat_model": self.threat,
            "clean_accuracy": repr(self.clean.value),
            "pgd_accuracy": repr(self.pgd.value),
            "autoattack_accuracy": repr(self.autoattack.value),
            "digests": json.dumps(self.digests, sort_keys=True),
            "proxyrob.card": self.model_dump_json(),
        }


def write_card(folder: Path, card: ModelCard, parity: ParityReport, sha256: str) -> None:
    """Write ``card.md`` for people and ``card.json`` for programs."""
    write_bytes(folder / "card.md", render_card(card, parity, sha256).encode())
    write_json(
        folder / "card.json", {**card.model_dump(mode="json"), "parity": parity.model_dump(mode="json"), "model_sha256": sha256}
    )


def render_card(card: ModelCard, parity: ParityReport, sha256: str) -> str:
    """The card as Markdown."""
    channels, height, width = card.image_shape
    digests = "\n".join(f"| {name} | `{digest}` |" for name, digest in sorted(card.digests.items()))
    accuracies = "\n".join(
        f"| {name} | {100 * found.value:.1f} % | {100 * found.low:.1f} – {100 * found.high:.1f} % |"
        for name, found in (
            ("unperturbed", card.clean),
            (f"PGD-{card.pgd_steps}", card.pgd),
            (card.autoattack_name, card.autoattack),
        )
    )
    return f"""# {card.name}

{card.architecture}, trained to withstand perturbations with **{card.threat}** (pixel units of [0,1]).

| measured on {card.test_data} | accuracy | 95 % interval |
|---|---|---|
{accuracies}

The figure of {card.autoattack_name} is an upper bound on the true robust accuracy: {card.autoattack_version},
all four attacks, on every one of {card.autoattack.n} images. The intervals cover the choice of test images, not the seed
of the training.

## How to use it
Input `images`: float32 `[batch, {channels}, {height}, {width}]`, in [0,1], **not** normalised (normalisation is inside).
Output `logits`: `[batch, {len(card.class_names)}]`; the classes are {", ".join(card.class_names)}.

```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
logits = session.run(["logits"], {{"images": images.astype(np.float32)}})[0]
classes = logits.argmax(axis=1)
```

## How it was made
- Training: {card.training}
- Data: {card.training_data}
- Selection of the weights: {card.selection} (the test split was used for measuring alone)
- Seed: {card.seed}
- The ONNX file equals the trained network: {parity.describe()}

## Limits
Robustness was measured for {card.threat} only; other norms, larger perturbations, rotations, corruptions and inputs
unlike the test images were not measured.

| digest | |
|---|---|
| model.onnx (sha256) | `{sha256}` |
{digests}
"""
