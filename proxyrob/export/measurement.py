"""The card of one measurement of one model: what was measured, on what, under which conditions, and what it does not say."""

from pathlib import Path

from pydantic import ValidationError

from proxyrob.errors import DataIntegrityError
from proxyrob.evaluate import SanityReport
from proxyrob.intervals import Measured
from proxyrob.storage import Report
from proxyrob.storage.bounded import first_fault, read_small
from proxyrob.storage.files import write_bytes, write_json

MEASUREMENT, MEASUREMENT_CARD = "measurement.json", "card.md"


class Measurement(Report):
    """What somebody has to know of figures that stand alone.

    ``shares`` are accuracies and other shares of the images, ``radius`` is a mean L2 radius. ``conditions`` and ``limits`` are
    sentences. ``sanity`` is ``None`` where no attack was run.
    """

    model: str
    note: str
    images: str
    shares: dict[str, Measured]
    radius: Measured | None
    conditions: tuple[str, ...]
    limits: tuple[str, ...]
    sanity: SanityReport | None
    digests: dict[str, str]


def write_measurement(folder: Path, measurement: Measurement) -> None:
    """Write ``card.md`` for people and ``measurement.json`` for programs."""
    write_bytes(folder / MEASUREMENT_CARD, render_measurement(measurement).encode())
    write_json(folder / MEASUREMENT, measurement.model_dump(mode="json"))


def read_measurement(path: Path) -> Measurement:
    """The card for programs.

    Raises ``DataIntegrityError`` when the file is none, or does not say which measurement it is of.
    """
    try:
        measurement = Measurement.model_validate_json(read_small(path))
    except ValidationError as error:
        raise DataIntegrityError(f"{path} describes no measurement ({first_fault(error)}); measure again") from error
    if "measurement" not in measurement.digests:
        raise DataIntegrityError(f"{path} does not say which measurement it is of; measure again")
    return measurement


def require_own_folder(folder: Path, digest: str) -> None:
    """Raise ``ValueError`` when a folder holds anything but earlier results of the same measurement."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    path = folder / MEASUREMENT
    if not path.is_file():
        raise ValueError(f"{folder} holds other files; give an empty folder, or one that is not there yet")
    there = read_measurement(path)
    if there.digests["measurement"] != digest:
        raise ValueError(
            f"{folder} holds the results of another measurement ({there.model}, {there.images}); nothing was overwritten: give "
            "another folder"
        )


def render_measurement(measurement: Measurement) -> str:
    """The card as Markdown."""
    figures = "\n".join(
        f"| {name} | {100 * found.value:.1f} % | {100 * found.low:.1f} – {100 * found.high:.1f} % | {found.n} |"
        for name, found in measurement.shares.items()
    )
    if (radius := measurement.radius) is not None:
        figures += f"\n| average certified L2 radius | {radius.value:.3f} | {radius.low:.3f} – {radius.high:.3f} | {radius.n} |"
    digests = "\n".join(f"| {name} | `{digest}` |" for name, digest in sorted(measurement.digests.items()))
    return f"""# {measurement.model}

{measurement.note}

| measured on {measurement.images} | | 95 % interval | images |
|---|---|---|---|
{figures}

## How
{_listed(measurement.conditions)}

## Limits
{_listed(measurement.limits)}
{_render_sanity(measurement.sanity)}
| digest | |
|---|---|
{digests}
"""


def _listed(sentences: tuple[str, ...]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _render_sanity(sanity: SanityReport | None) -> str:
    if sanity is None:
        return ""
    rows = "\n".join(f"| {check.name} | {check.outcome} | {check.finding} | {check.threshold} |" for check in sanity.checks)
    return f"\n## Sanity checks\n| check | | found | allowed |\n|---|---|---|---|\n{rows}\n"
