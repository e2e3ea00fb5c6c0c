"""Grids of images and curves, as PNG files."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Int64, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from proxyrob.intervals import Measured, measure_share
from proxyrob.storage.files import written_whole

INK = "#1f2933"
COLOURS = {"real-only": "#8a94a0", "mixed": "#c2410c"}
FALLBACK_COLOUR = "#1d4ed8"


def draw_real_and_synthetic(
    path: Path,
    real: tuple[UInt8[np.ndarray, "n h w c"], Int64[np.ndarray, " n"]],
    synthetic: tuple[UInt8[np.ndarray, "m h w c"], Int64[np.ndarray, " m"]],
    class_names: tuple[str, ...],
    *,
    synthetic_name: str,
    per_class: int = 10,
) -> None:
    """Real images on the left, synthetic ones on the right, a row for each class, the first of each."""
    figure = Figure(figsize=(10.5, 0.5 * len(class_names) + 0.9))
    axes = figure.subplots(1, 2)
    for axis, (images, labels), title in zip(axes, (real, synthetic), ("real training images", synthetic_name), strict=True):
        rows = [_row(images[labels == k][:per_class], per_class, images.shape[1:]) for k in range(len(class_names))]
        _show(axis, np.concatenate(rows))
        axis.set_title(title, fontsize=11, color=INK)
        height = images.shape[1] + 1
        axis.set_yticks([height * (k + 0.5) for k in range(len(class_names))], class_names, fontsize=9, color=INK)
    _save(figure, path)


def draw_contact_sheet(
    path: Path,
    images: UInt8[np.ndarray, "n h w c"],
    labels: Int64[np.ndarray, " n"] | None,
    class_names: tuple[str, ...],
    *,
    title: str,
    columns: int = 16,
) -> None:
    """Images of a set: a row for each class, the first of each, or without labels as they come."""
    if labels is None:
        rows = [images[start : start + columns] for start in range(0, len(images), columns)]
        names = ["" for _ in rows]
    else:
        rows = [images[labels == k][:columns] for k in range(len(class_names))]
        names = list(class_names)
    figure = Figure(figsize=(10.5, 0.62 * len(rows) + 0.7))
    axis = figure.subplots()
    _show(axis, np.concatenate([_row(row, columns, images.shape[1:]) for row in rows]))
    axis.set_title(title, fontsize=11, color=INK)
    height = images.shape[1] + 1
    axis.set_yticks([height * (k + 0.5) for k in range(len(rows))], names, fontsize=9, color=INK)
    _save(figure, path)


def draw_dropped(
    path: Path,
    images: UInt8[np.ndarray, "n h w c"],
    table: pd.DataFrame,
    class_names: tuple[str, ...],
    *,
    num_images: int,
    num_dropped: int,
    most: int = 40,
) -> None:
    """Images that the filter dropped, with both labelers' votes, or a sentence where it dropped none.

    ``table`` has a row for each of ``images``; ``num_dropped`` of ``num_images`` were dropped in all.
    """
    count = min(len(images), most)
    columns, lines = 10, max(1, -(-count // 10))
    figure = Figure(figsize=(10.5, 1.35 * lines + 0.6))
    axes = figure.subplots(lines, columns, squeeze=False)
    for position, axis in enumerate(axes.flat):
        axis.axis("off")
        if position < count:
            row = {str(name): value for name, value in table.iloc[position].items()}
            _show(axis, images[position])
            axis.set_title(_why_dropped(row, class_names), fontsize=7, color=INK)
    figure.suptitle(
        f"{num_dropped} of {num_images} synthetic images dropped" + (": some of them" if num_dropped > count else ""),
        fontsize=11,
        color=INK,
    )
    _save(figure, path)


def _why_dropped(row: dict[str, Any], class_names: tuple[str, ...]) -> str:
    if row["near_test"] >= 0:
        return f"copy of\ntest image {row['near_test']}"
    votes = (f"{class_names[int(row[f'{n}_class'])]} {100 * row[f'{n}_confidence']:.0f} %" for n in ("first", "second"))
    return "\n".join(votes)


def draw_certified_curves(
    path: Path,
    tables: dict[str, pd.DataFrame],
    *,
    sigma: float,
    conditions: str,
    attacked: dict[str, list[tuple[float, float]]] | None = None,
) -> None:
    """Certified accuracy against L2 radius, one curve for each table of certificates, in its 95 % intervals for each radius.

    ``attacked`` are points (radius, accuracy that an attack leaves) of the same smoothed classifiers: the truth lies between
    them and the curve of their colour.
    """
    figure = Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    most = max(float(table.radius_l2.max()) for table in tables.values()) or sigma  # sigma: where everything abstained
    for name, table in tables.items():
        right = (table.prediction == table.label).fillna(False).to_numpy(dtype=bool)
        radii = np.linspace(0.0, most * 1.02, 400)
        radius = table.radius_l2.to_numpy()
        shares = [measure_share(int((right & (radius >= r)).sum()), len(table)) for r in radii]
        bounds = [share.low for share in shares], [share.high for share in shares]
        colour = COLOURS.get(name, FALLBACK_COLOUR)
        axis.fill_between(radii, *bounds, step="post", color=colour, alpha=0.15, linewidth=0)
        axis.step(
            radii,
            [share.value for share in shares],
            where="post",
            label=f"{name} ({len(table)} images)",
            color=colour,
            linewidth=1.8,
        )
    for name, points in (attacked or {}).items():
        most = max(most, *(radius for radius, _ in points))
        colour = COLOURS.get(name, FALLBACK_COLOUR)
        axis.plot(*zip(*points, strict=True), "v", color=colour, label=f"{name}, attacked")
    axis.set(
        xlabel="L2 radius, in pixel units of [0,1]", ylabel="certified accuracy, 95 % band", ylim=(0, 1), xlim=(0, most * 1.02)
    )
    axis.set_title(f"randomized smoothing, {conditions}", fontsize=11, color=INK)
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_accuracies(path: Path, shares: dict[str, Measured], *, title: str) -> None:
    """Accuracies as bars with their 95 % intervals, in the order in which they are given."""
    figure = Figure(figsize=(6.4, 0.45 * len(shares) + 1.3))
    axis = figure.subplots()
    values = np.array([share.value for share in shares.values()])
    reach = np.array([[share.value - share.low, share.high - share.value] for share in shares.values()]).T
    places = np.arange(len(shares))
    axis.barh(places, values, height=0.6, color=FALLBACK_COLOUR, alpha=0.75, xerr=reach, ecolor=INK, capsize=3)
    axis.set_yticks(places, list(shares), fontsize=9, color=INK)
    axis.invert_yaxis()
    n = next(iter(shares.values())).n
    axis.set(xlabel=f"accuracy on {n} images, 95 % intervals", xlim=(0, 1))
    axis.set_title(title, fontsize=10, color=INK)
    axis.grid(alpha=0.25, axis="x")
    axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_training_curves(path: Path, histories: dict[str, pd.DataFrame]) -> None:
    """Loss and accuracy on the perturbed batches of training, one curve for each model."""
    figure = Figure(figsize=(10.5, 3.6))
    axes = figure.subplots(1, 2)
    for name, history in histories.items():
        colour = COLOURS.get(name, FALLBACK_COLOUR)
        axes[0].plot(history.step, history.loss, label=name, color=colour, linewidth=1.2)
        axes[1].plot(history.step, history.accuracy, label=name, color=colour, linewidth=1.2)
    for axis, label in zip(axes, ("training loss", "accuracy on perturbed training batches"), strict=True):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    _save(figure, path)


def _row(images: UInt8[np.ndarray, "n h w c"], count: int, shape: tuple[int, ...]) -> UInt8[np.ndarray, "rows columns c"]:
    height, width, channels = shape
    row = np.full((height + 1, count * (width + 1), channels), 255, np.uint8)
    for k, image in enumerate(images):
        row[:height, k * (width + 1) : k * (width + 1) + width] = image
    return row


def _show(axis: Axes, picture: UInt8[np.ndarray, "h w c"]) -> None:
    axis.imshow(
        picture.squeeze(-1) if picture.shape[-1] == 1 else picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest"
    )
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    with written_whole(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
