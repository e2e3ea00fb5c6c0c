"""A whole run, and what it leaves behind."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
from mlflow import MlflowClient

from proxyrob.config import load_config
from proxyrob.config.evaluate import CheckName
from proxyrob.config.source import DigitsSource
from proxyrob.source import prepare_digits, read_split
from proxyrob.storage import Stage
from proxyrob.types import as_images
from tests.e2e.conftest import Finished

STAGES = {
    "source",
    "proxy",
    "samples",
    "labeler-resnet",
    "labeler-cnn",
    "labels",
    "train-mixed",
    "attack-mixed",
    "sanity-mixed",
    "train-real-only",
    "attack-real-only",
    "sanity-real-only",
    "export",
    "smooth-mixed",
    "certify-mixed",
    "smooth-real-only",
    "certify-real-only",
    "pictures",
}  # fmt: skip  (a list to compare with, not code)


def test_mlflow_is_the_installed_package() -> None:
    """The folder mlflow/ at the root never shadows MLflow."""
    assert mlflow.__file__ is not None
    assert "site-packages" in mlflow.__file__
    assert not list((Path(__file__).parents[2] / "mlflow").rglob("*.py"))


def test_report_has_every_agreed_field(finished: Finished) -> None:
    """report.json holds the fields that DESIGN.md promises, with an interval and a number of images for each figure."""
    report = finished.report
    assert report["preset"] == "tiny"
    assert report["total_images"] == {"train": 60, "synthetic": 400, "test": 40}
    assert set(report["models"]) == {"real-only", "mixed"}
    for figures in report["models"].values():
        for figure in (figures["clean"], figures["pgd"], figures["autoattack"], *figures["certified"].values()):
            assert 0.0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1.0
            assert figure["n"] == 40
        assert set(figures["certified"]) == {"0", "0.25"}
        assert figures["autoattack"]["value"] <= figures["clean"]["value"]
    assert report["comparison"]["autoattack"]["verdict"] in {"PASS", "FAIL", "UNDECIDED"}
    assert report["promotion"]["verdict"] in {"PASS", "FAIL", "UNDECIDED"}
    assert report["promotion"]["reasons"]
    assert report["promotion"]["waived"] == {}
    for figures in report["models"].values():
        assert [check["name"] for check in figures["sanity"]] == list(get_args(CheckName))
        assert {check["outcome"] for check in figures["sanity"]} <= {"passed", "failed"}, "the labelers give every model a twin"
    assert report["registered"]["name"] == "digits-linf"
    assert set(report["seconds"]) == {"total", *STAGES}
    assert report["cached"] == []
    assert report["seed"] == 0
    assert report["versions"]["torch"]


def test_output_folder_is_complete(finished: Finished) -> None:
    """Pictures, model, card, configuration and tables lie in the output folder, and the configuration gives the same plan."""
    names = {str(path.relative_to(finished.output)) for path in finished.output.rglob("*") if path.is_file()}
    assert {
        "report.json", "configuration.yaml", "model.onnx", "card.md", "card.json", "real-and-synthetic.png", "dropped.png",
        "certified-accuracy.png", "training-curves.png", "mixed/verdicts.parquet", "mixed/certificates.parquet",
        "real-only/verdicts.parquet", "real-only/certificates.parquet",
    } == names  # fmt: skip
    assert "## The gate says " in (finished.output / "card.md").read_text()
    assert json.loads((finished.output / "card.json").read_text())["gate"]["verdict"] == finished.report["promotion"]["verdict"]
    stored = load_config(str(finished.output / "configuration.yaml"))
    assert stored.digest() == finished.report["digests"]["pipeline"]


def test_accuracies_are_those_of_the_verdict_table(finished: Finished) -> None:
    """Every accuracy in the report can be counted in the verdict table."""
    for variant, figures in finished.report["models"].items():
        table = pd.read_parquet(finished.output / variant / "verdicts.parquet")
        correct = table.clean_prediction == table.label
        assert correct.mean() == pytest.approx(figures["clean"]["value"])
        attacks = ["apgd-ce", "apgd-t", "fab-t", "square"]
        standing = correct & ~table[attacks].fillna(False).astype(bool).any(axis=1)
        assert standing.mean() == pytest.approx(figures["autoattack"]["value"])
        assert (table.broken_by == "clean").sum() == (~correct).sum()


def test_the_end_of_a_run_says_what_next(finished: Finished) -> None:
    """The last lines name the MLflow pages, the download and a run with one setting changed."""
    assert "proxyrob ui" in finished.printed
    assert "pull digits-linf@" in finished.printed
    assert "--set train.gamma=0.4" in finished.printed
    assert "AutoAttack " in finished.printed


def test_second_run_computes_nothing(finished: Finished) -> None:
    """The same command again takes every stage from the store, says so, and gives the same figures."""
    output = finished.program.home / "again"
    done = finished.program("run", str(finished.program.preset), "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Nothing was computed" in done.stdout
    again = finished.program.report(output)
    assert set(again["cached"]) == STAGES
    for key in ("models", "comparison", "promotion", "registered"):
        assert again[key] == finished.report[key]


def test_changed_gamma_redoes_only_what_depends_on_it(finished: Finished) -> None:
    """--set train.gamma trains, attacks, checks and exports the mixed model again, and nothing else."""
    output = finished.program.home / "gamma"
    done = finished.program("run", str(finished.program.preset), "--set", "train.gamma=0.4", "--output", str(output))
    assert done.returncode == 0, done.stdout + done.stderr
    report = finished.program.report(output)
    assert STAGES - set(report["cached"]) == {"train-mixed", "attack-mixed", "sanity-mixed", "export", "pictures"}
    assert report["models"]["real-only"] == finished.report["models"]["real-only"]
    compared = finished.program("compare", str(output), str(finished.output))
    assert compared.returncode == 0, compared.stderr
    assert "autoattack" in compared.stdout
    assert "not another seed of their training" in " ".join(compared.stdout.split())
    versus = ["vs", str(finished.output), "--their-model", "real-only"]
    assert finished.program("compare", str(output), *versus).returncode == 0
    refused = finished.program("compare", str(output), str(finished.output), *versus)
    assert refused.returncode == 2
    assert "differ in train.gamma" in refused.stderr


def test_mlflow_has_parent_and_child_runs(finished: Finished) -> None:
    """One parent run with parameters and figures; children for the proxy and both models with curves, inputs and tables."""
    uri = f"sqlite:///{finished.program.home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [run for run in runs if run.data.tags.get("proxyrob.digest") == finished.report["digests"]["pipeline"]]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["train.gamma"] == "0.5"
    children = {
        str(run.info.run_name).partition(" · ")[0]: run
        for run in runs
        if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    assert set(children) == {"proxy", "real-only", "mixed"}
    for variant in ("real-only", "mixed"):
        child, figures = children[variant], finished.report["models"][variant]
        assert child.info.status == "FINISHED"
        for name in ("clean", "pgd", "autoattack"):
            assert child.data.metrics[f"{name}_accuracy"] == figures[name]["value"]
            assert child.data.metrics[f"{name}_accuracy_low"] == figures[name]["low"]
        assert child.data.metrics["certified_accuracy_0.25"] == figures["certified"]["0.25"]["value"]
        assert len(client.get_metric_history(child.info.run_id, "train/loss")) == 12
        assert {entry.path for entry in client.list_artifacts(child.info.run_id, "tables")} == {
            "tables/verdicts.parquet",
            "tables/certificates.parquet",
        }
    assert children["mixed"].inputs is not None
    assert {entry.dataset.name for entry in children["mixed"].inputs.dataset_inputs} >= {"training images", "synthetic images"}
    assert {entry.path for entry in client.list_artifacts(parent.info.run_id, "figures")} >= {"figures/certified-accuracy.png"}
    shown = {entry.path.partition("+")[0] for entry in client.list_artifacts(parent.info.run_id, "images")}
    assert shown >= {"images/certified-accuracy", "images/real-and-synthetic"}, "pictures that MLflow shows beside other runs'"
    assert parent.data.tags["mlflow.note.content"].startswith(f"**Gate: {finished.report['promotion']['verdict']}** · ")


def test_prefect_keeps_no_results(finished: Finished) -> None:
    """A stage's record is the only file its result is read from, and Prefect's own database is below the home."""
    records = list((finished.program.home / "store").rglob("stage.json"))
    assert len(records) >= len(STAGES)
    assert not [path for path in finished.program.home.rglob("*") if b'"serializer"' in _begin(path)]
    with sqlite3.connect(finished.program.home / "prefect" / "prefect.db") as database:
        names = {row[0] for row in database.execute("select name from task_run")}
    assert names >= STAGES


def _begin(path: Path) -> bytes:
    """The first bytes of a file; Prefect's results name their serializer there."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(500)


def test_show_prints_the_table_again(finished: Finished) -> None:
    """`show` gives the same table from report.json alone."""
    shown = finished.program("show", str(finished.output))
    assert shown.returncode == 0
    assert "AutoAttack " in shown.stdout
    assert "Gate:" in shown.stdout


@pytest.mark.slow
def test_evaluate_another_threat(finished: Finished) -> None:
    """`evaluate --threat` attacks again; no perturbation at all can hurt less than the run's own."""
    done = finished.program("evaluate", str(finished.output), "--threat", "linf:0.001", "--model", "real-only")
    assert done.returncode == 0, done.stdout + done.stderr
    clean = finished.report["models"]["real-only"]["clean"]["value"]
    assert f"{100 * clean:.1f} %" in done.stdout
    again = finished.program("evaluate", str(finished.output), "--model", "no-such")
    assert again.returncode == 2
    assert "it has real-only, mixed" in again.stderr


def test_certify_again(finished: Finished, tmp_path: Path) -> None:
    """`certify` with other settings: fewer images, until the answer is known, joined with an attack, into files.

    More images than the test split has are refused before any work.
    """
    table, picture = tmp_path / "table.tsv", tmp_path / "picture.png"
    asked = ["--images", "5", "--n", "200", "--method", "sequential", "--radius", "0", "--radius", "0.1", "--linf", "1/255"]
    files = ["--tsv", str(table), "--picture", str(picture)]
    done = finished.program("certify", str(finished.output), *asked, "--attack", "l2:0.1", *files)
    assert done.returncode == 0, done.stdout + done.stderr
    for text in ("5 test images", "n ≤ 200", "L2 radius 0.1", "L∞ 1/255", "attacked, so at most", "0 contradictions"):
        assert text in done.stdout
    assert table.read_text().splitlines()[0] == "idx\tlabel\tpredict\tradius\tcorrect\ttime"
    assert len(table.read_text().splitlines()) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused = finished.program("certify", str(finished.output), "--images", "41")
    assert refused.returncode == 2
    assert "expected at most 40, the number of test images, got 41" in refused.stderr


def _logits(model: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], {"images": images})[0])


def _predict(model: Path, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return _logits(model, images).argmax(axis=1)


def test_exported_model_reproduces_the_card(finished: Finished, tmp_path: Path) -> None:
    """`export --model real-only` gives a model whose clean accuracy on the test split is that on its card."""
    done = finished.program("export", str(finished.output), "--model", "real-only", "--to", str(tmp_path / "exported"))
    assert done.returncode == 0, done.stdout + done.stderr
    card = json.loads((tmp_path / "exported" / "card.json").read_text())
    stage = Stage("source", "0" * 64, tmp_path / "source", {})
    prepare_digits(DigitsSource(num_train=60, num_validation=30, num_test=40), seed=0, stage=stage)
    split = read_split(stage, "test")
    predicted = _predict(tmp_path / "exported" / "model.onnx", as_images(split.stored).numpy())
    assert (predicted == split.labels).mean() == pytest.approx(card["clean"]["value"])
    assert card["clean"] == finished.report["models"]["real-only"]["clean"]


def test_registered_model_works_without_us(finished: Finished, tmp_path: Path) -> None:
    """In a fresh environment with mlflow and onnxruntime alone, the registered model loads by alias and predicts."""
    uv = Path(sys.executable).with_name("uv")
    if not uv.is_file():
        pytest.skip("uv is not beside this Python; the Makefile puts it there")
    lock = Path(__file__).parents[2] / "requirements.lock"
    pins = [line.split()[0] for line in lock.read_text().splitlines() if line.startswith(("mlflow==", "onnxruntime=="))]
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run(
        [uv, "pip", "install", "--quiet", "--python", python, "--no-config", *pins], capture_output=True, text=True, check=False
    )
    if installed.returncode != 0 and "dns" in installed.stderr.lower():
        pytest.skip(f"no package index can be reached: {installed.stderr[-200:]}")
    assert installed.returncode == 0, installed.stderr
    alias = "champion" if "champion" in finished.report["registered"]["aliases"] else "challenger"
    script = f"""
import importlib.util, numpy as np, mlflow
assert not any(importlib.util.find_spec(name) for name in ("torch", "proxyrob", "prefect"))
mlflow.set_tracking_uri("sqlite:///{finished.program.home}/mlflow/mlflow.db")
model = mlflow.pyfunc.load_model("models:/digits-linf@{alias}")
images = np.random.default_rng(0).random((7, 1, 8, 8), dtype=np.float32)
logits = model.predict(images)["logits"]
assert logits.shape == (7, 10), logits.shape
np.save("logits.npy", logits)
"""
    environment = finished.program.environment  # not this process's: other tests name other registries in it
    done = subprocess.run(
        [python, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    images = np.random.default_rng(0).random((7, 1, 8, 8), dtype=np.float32)
    pulled = finished.program("pull", f"digits-linf@{alias}", "--to", str(tmp_path / "pulled"))
    assert pulled.returncode == 0, pulled.stderr
    expected = _logits(tmp_path / "pulled" / "model.onnx", images)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-4)


def test_registered_models_lie_below_the_home(finished: Finished) -> None:
    """Where a model is stored does not depend on the directory that a run was started from."""
    uri = f"sqlite:///{finished.program.home / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    versions = client.search_model_versions("name = 'digits-linf'")
    assert versions
    for version in versions:
        location = client.get_model_version_download_uri(version.name, version.version)
        assert location.startswith((finished.program.home / "mlflow" / "artifacts").as_uri())


def test_pulled_model_reproduces_the_card(finished: Finished, tmp_path: Path) -> None:
    """After `pull`, onnxruntime and numpy alone reproduce the clean accuracy on the card, with labels from its metadata."""
    alias = finished.report["registered"]["aliases"][0]
    done = finished.program("pull", f"digits-linf@{alias}", "--to", str(tmp_path))
    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path / "card.json").read_text())
    stage = Stage("source", "0" * 64, tmp_path / "source", {})
    prepare_digits(DigitsSource(num_train=60, num_validation=30, num_test=40), seed=0, stage=stage)
    split = read_split(stage, "test")
    np.savez(tmp_path / "test.npz", images=as_images(split.stored).numpy(), labels=split.labels)
    script = """
import json, sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
data = np.load("test.npz")
logits = session.run(["logits"], {"images": data["images"]})[0]
accuracy = (logits.argmax(axis=1) == data["labels"]).mean()
metadata = session.get_modelmeta().custom_metadata_map
assert abs(accuracy - float(metadata["clean_accuracy"])) < 1e-12
assert json.loads(metadata["labels"]) == list("0123456789")
assert not any(name in sys.modules for name in ("torch", "mlflow", "prefect", "proxyrob"))
print(accuracy)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) == pytest.approx(card["clean"]["value"])
    refused = finished.program("pull", "no-such-model", "--to", str(tmp_path))
    assert refused.returncode == 1
    assert "digits-linf" in refused.stderr
