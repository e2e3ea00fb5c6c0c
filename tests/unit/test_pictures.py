"""Pictures of a run: there, of a plausible size, and showing what they are given."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image as images_of_files
from matplotlib import pyplot as plt

from proxyrob.figures import CERTIFIED, CURVES, DROPPED, REAL_AND_SYNTHETIC, PicturesReport, draw_run
from proxyrob.figures.pictures import draw_certified_curves, draw_dropped, draw_real_and_synthetic, draw_training_curves
from proxyrob.label import apply_rule
from proxyrob.mix import SyntheticSet
from proxyrob.storage import Stage
from tests.conftest import MakeStage
from tests.toys import files_below, tiny_split

CLASSES = tuple("0123456789")


def _png_size(path: Path) -> tuple[int, int]:
    """Width and height from the header of a PNG file, its first checksum verified."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content[12:16] == b"IHDR"
    assert zlib.crc32(content[12:29]) == struct.unpack(">I", content[29:33])[0]
    assert content.endswith(b"IEND\xaeB`\x82")
    return struct.unpack(">II", content[16:24])


def _is_a_picture(path: Path) -> bool:
    """A PNG of at least 700×300 pixels that is not of one colour."""
    width, height = _png_size(path)
    pixels = images_of_files.imread(path)
    return width >= 700 and height >= 300 and float(np.std(pixels[..., :3])) > 0.01


def _synthetic() -> tuple[np.ndarray, np.ndarray]:
    other = tiny_split(20, seed=5)
    return other.stored, other.labels


@pytest.mark.parametrize("channels", [1, 3])
def test_real_and_synthetic_images_are_drawn_side_by_side(tmp_path: Path, channels: int) -> None:
    """Grey and coloured images alike; classes without an image leave their row white."""
    real = tiny_split(30, shape=(4, 4, channels))
    made = tiny_split(5, shape=(4, 4, channels))
    draw_real_and_synthetic(
        tmp_path / "a.png", (real.stored, real.labels), (made.stored, made.labels), CLASSES, synthetic_name="diffusion"
    )
    assert _is_a_picture(tmp_path / "a.png")
    assert files_below(tmp_path) == {"a.png"}


def test_the_images_given_decide_the_picture(tmp_path: Path) -> None:
    """Other synthetic images give another picture; the same ones the same bytes."""
    real, (stored, labels) = tiny_split(30), _synthetic()
    for name, images in (("a.png", stored), ("b.png", stored), ("c.png", 255 - stored)):
        draw_real_and_synthetic(
            tmp_path / name, (real.stored, real.labels), (images, labels), CLASSES, synthetic_name="diffusion"
        )
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == again != other


@pytest.mark.parametrize("count", [0, 3, 60])
def test_dropped_images_are_drawn(tmp_path: Path, count: int) -> None:
    """None gives a sentence, few a row, many the first forty."""
    images = tiny_split(max(count, 1)).stored[:count]
    votes = np.full((count, 10), 0.1), np.full((count, 10), 0.1)
    table = apply_rule(np.arange(count), *votes, 0.9).assign(near_test=-1)
    draw_dropped(tmp_path / "a.png", images, table, CLASSES, num_images=100, num_dropped=count)
    width, height = _png_size(tmp_path / "a.png")
    assert width > 1000
    assert height == pytest.approx({0: 254, 3: 254, 60: 780}[count], abs=5)


def test_certified_curves_are_drawn(tmp_path: Path) -> None:
    """One curve for each table; a table in which everything abstained is drawn too."""
    table = pd.DataFrame(
        {"label": [0, 1, 2], "prediction": pd.array([0, 9, None], dtype="Int64"), "radius_l2": [0.5, 0.2, 0.0]}
    )
    draw_certified_curves(tmp_path / "a.png", {"real-only": table, "mixed": table}, sigma=0.25, conditions="n = 100")
    assert _is_a_picture(tmp_path / "a.png")


def test_attacked_accuracies_are_drawn_beside_the_curve(tmp_path: Path) -> None:
    """Points above the curve, also beyond the largest certified radius."""
    table = pd.DataFrame({"label": [0, 1], "prediction": pd.array([0, 1], dtype="Int64"), "radius_l2": [0.5, 0.2]})
    for name, attacked in (("a.png", None), ("b.png", {"mixed": [(0.25, 0.9), (1.0, 0.1)]})):
        draw_certified_curves(tmp_path / name, {"mixed": table}, sigma=0.25, conditions="n ≤ 100", attacked=attacked)
        assert _is_a_picture(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_certified_curves_without_any_certificate_are_drawn(tmp_path: Path) -> None:
    """A smoothed classifier that abstains on every image gives an empty picture and no warning."""
    table = pd.DataFrame({"label": [0, 1], "prediction": pd.array([None, None], dtype="Int64"), "radius_l2": [0.0, 0.0]})
    draw_certified_curves(tmp_path / "a.png", {"mixed": table}, sigma=0.25, conditions="n = 100")
    assert _is_a_picture(tmp_path / "a.png")


def test_training_curves_are_drawn(tmp_path: Path) -> None:
    """A training of one report has a curve of one point, and that is no error."""
    long = pd.DataFrame({"step": [10, 20], "loss": [2.0, 1.0], "accuracy": [0.1, 0.5]})
    draw_training_curves(tmp_path / "a.png", {"real-only": long, "mixed": long.iloc[:1]})
    assert _is_a_picture(tmp_path / "a.png")


def test_all_pictures_of_a_run_are_drawn(
    digits: Stage, synthetic: SyntheticSet, toy_classifier: Stage, certified: Stage, make_stage: MakeStage
) -> None:
    """Every file the report names is a picture, no figure is left open, and a second call draws nothing."""
    stage = make_stage("pictures")

    def draw() -> PicturesReport:
        return draw_run(
            "jitter",
            source=digits,
            synthetic=synthetic,
            trainings={"real-only": toy_classifier, "mixed": toy_classifier},
            certifications={"real-only": certified, "mixed": certified},
            stage=stage,
        )

    report = draw()
    assert set(report.names) == {CERTIFIED, CURVES, REAL_AND_SYNTHETIC, DROPPED}
    assert files_below(stage.folder) == {*report.names, "stage.json"}
    assert all(_png_size(stage.folder / name)[0] > 700 for name in report.names)
    assert plt.get_fignums() == []
    before = stage.record_path.stat().st_mtime_ns
    assert draw() == report
    assert stage.record_path.stat().st_mtime_ns == before


def test_a_run_without_proxy_has_no_pictures_of_it(
    digits: Stage, toy_classifier: Stage, certified: Stage, make_stage: MakeStage
) -> None:
    """Where nothing was sampled there is nothing synthetic to show."""
    report = draw_run(
        "none",
        source=digits,
        synthetic=None,
        trainings={"real-only": toy_classifier},
        certifications={"real-only": certified},
        stage=make_stage("pictures"),
    )
    assert set(report.names) == {CERTIFIED, CURVES}


@pytest.mark.parametrize("near_test", [[-1, 4, -1], [0, 1, 2]])
def test_dropped_copies_say_of_what(tmp_path: Path, near_test: list[int]) -> None:
    """A copy of a test image is drawn with the image it is of, also in a table without votes, as given labels have."""
    images = tiny_split(3).stored
    votes = np.full((3, 10), 0.1), np.full((3, 10), 0.1)
    table = apply_rule(np.arange(3), *votes, 0.9).assign(near_test=near_test)
    if min(near_test) >= 0:
        table = table[["id", "label", "kept", "reason", "near_test"]]
    draw_dropped(tmp_path / "a.png", images, pd.DataFrame(table), CLASSES, num_images=100, num_dropped=50)
    assert _png_size(tmp_path / "a.png")[0] > 1000
