"""Measuring anybody's model at the command line: what is left behind, and what is refused before any work."""

import json
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

from flows.cli import app
from proxyrob.certify import CertificateHeader
from proxyrob.evaluate import STANDARD_ATTACKS, VerdictHeader, robust_rows
from proxyrob.storage.files import read_header
from tests.somebody import write_onnx_file
from tests.toys import files_below, random_linear

GOOD = "tests.somebody:good"
NOISY = ("--source", "digits", "--sigma", "0.25")
ON_DIGITS = ("--source", "digits", "--images", "40", "--threat", "linf:0.3")

Run = Callable[..., Result]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty home; environment and signals are as before afterwards."""
    before, handlers = dict(os.environ), {name: signal.getsignal(name) for name in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setenv("PROXYROB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PROXYROB_DEVICE", "cpu")
    yield tmp_path / "home"
    os.environ.clear()
    os.environ.update(before)
    for name, handler in handlers.items():
        signal.signal(name, handler)


@pytest.fixture
def run(home: Path) -> Run:
    """``proxyrob`` in this process."""

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


def _text(result: Result) -> str:
    return " ".join(result.output.split())


def test_a_function_is_evaluated(run: Run, tmp_path: Path) -> None:
    """Table, figure and card say model, images, attacks and checks; the same again is found, another measurement refused."""
    output = tmp_path / "out"
    command = ("evaluate", GOOD, *ON_DIGITS, "--subset-seed", "2", "--output", str(output))
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert f"{GOOD} · L∞ ≤ 3/10 · attack seed 0 · 40 test images of digits (seed-2-40)" in _text(done)
    assert "AutoAttack standard" in done.output
    assert "4 not run (more-steps, transfer, near-duplicates, selection)" in _text(done)
    assert str(output) in done.output
    assert files_below(output) == {"verdicts.parquet", "accuracies.png", "card.md", "measurement.json"}
    header = read_header(output / "verdicts.parquet", VerdictHeader)
    assert (header.subset, header.epsilon) == ("seed-2-40", "3/10")
    found = json.loads((output / "measurement.json").read_text())
    table = pd.read_parquet(output / "verdicts.parquet")
    assert found["shares"]["AutoAttack standard"]["value"] == robust_rows(table, STANDARD_ATTACKS).mean()
    card = (output / "card.md").read_text()
    assert "| measured on 40 test images of digits (seed-2-40) | | 95 % interval | images |" in card
    assert "| selection | not run | how the model was trained is not known | not by test images |" in card
    before = {name: (output / name).read_bytes() for name in files_below(output)}
    assert run(*command).exit_code == 0
    other = run("evaluate", "tests.somebody:guessing", *ON_DIGITS, "--output", str(output))
    assert (other.exit_code, "holds the results of another measurement" in _text(other)) == (2, True)
    assert {name: (output / name).read_bytes() for name in files_below(output)} == before
    alone = run("replay", str(output))
    assert (alone.exit_code, f"found for {GOOD} are to be shown: --on MODEL" in _text(alone)) == (2, True)
    replayed = run("replay", str(output), "--on", GOOD)
    assert "of the adversarial images misclassified 100.0 %" in _text(replayed), replayed.output


def test_an_onnx_file_is_attacked_without_gradients(run: Run, tmp_path: Path) -> None:
    """It says so at the terminal and on the card, and nothing is called AutoAttack that was run."""
    output, file = tmp_path / "out", write_onnx_file(tmp_path / "theirs.onnx")
    done = run("evaluate", str(file), *ON_DIGITS, "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "no gradients are known of an ONNX file: black-box attacks and replay are all that can be done" in _text(done)
    assert "AutoAttack" not in done.output
    shares = json.loads((output / "measurement.json").read_text())["shares"]
    assert list(shares) == ["clean", "black-box search (Square)"]
    refused = run("certify", str(file), "--source", "digits", "--sigma", "0.25")
    assert (refused.exit_code, "Certify the network that the file was exported from" in _text(refused)) == (2, True)
    refused = run("evaluate", str(file), *ON_DIGITS, "--mode", "gate")
    assert (refused.exit_code, "Leave out --mode and --target" in _text(refused)) == (2, True)


def test_a_function_is_certified(run: Run, tmp_path: Path) -> None:
    """The classifier that the noise makes of it, with table, curve and card."""
    output = tmp_path / "out"
    asked = ("--source", "digits", "--images", "6", "--sigma", "0.25", "--n", "200", "--radius", "0.25")
    done = run("certify", GOOD, *asked, "--output", str(output))
    assert done.exit_code == 0, done.output
    assert "certified at L2 radius 0.25" in done.output
    assert files_below(output) == {"certificates.parquet", "certified-accuracy.png", "card.md", "measurement.json"}
    assert read_header(output / "certificates.parquet", CertificateHeader).subset == "first-6"
    assert "σ = 0.25, n = 200" in (output / "card.md").read_text()


WRONG = {
    "epsilon without norm": (["--threat", "8/255"], "expected a threat model such as 'linf:8/255' or 'l2:128/255', got"),
    "epsilon alone": (["--threat", "0.03"], "expected a threat model such as 'linf:8/255'"),
    "epsilon in levels": (["--threat", "linf:8"], "did you mean 'linf:8/255'?"),
    "no threat": (["--source", "digits"], "does not say against what to measure it; say it, e.g. --threat linf:8/255"),
    "unknown mode": (["--mode", "quick"], "--mode: expected standard or gate, got 'quick'"),
    "target without gate": (["--threat", "linf:0.1", "--target", "0.5"], "expected mode gate, or no target"),
    "target beyond one": (["--threat", "l2:1", "--mode", "gate", "--target", "2"], "target: Input should be less than"),
    "no images": (["--threat", "linf:0.1"], "say it, e.g. --source cifar10, or --source cifar10 --path FILE"),
    "unknown source": (["--threat", "linf:0.1", "--source", "cifar"], "--source: expected digits, cifar10"),
    "path without source": (["--threat", "linf:0.1", "--path", "x"], "--path x has no effect without --source"),
    "path of nothing": (["--threat", "linf:0.1", "--source", "npz", "--path", "no.npz"], "there is nothing at"),
    "seed without number": ([*ON_DIGITS[:2], *ON_DIGITS[4:], "--subset-seed", "1"], "say how many: --images N"),
    "too many images": ([*ON_DIGITS, "--images", "900"], "expected 1 to 797 images, the number of test images, got 900"),
    "a model of a run": ([*ON_DIGITS, "--model", "mixed"], "--model mixed chooses a model of a run"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_refused(case: str, run: Run, home: Path) -> None:
    """One line with the cause and the remedy, and nothing is attacked."""
    arguments, message = WRONG[case]
    done = run("evaluate", GOOD, *arguments)
    assert done.exit_code == (1 if case == "path of nothing" else 2), done.output
    assert message in _text(done)
    assert "Traceback" not in done.output
    assert not (home / "store" / "evaluate").exists()
    assert not (home / "measurements").exists()


MODELS = {
    "no such file": (["nowhere.onnx"], "there is no file nowhere.onnx"),
    "no such run": (["nowhere"], "there is no run 'nowhere'; runs: none yet"),
    "no such function": (["tests.somebody:missing"], "has no attribute 'missing'"),
    "no module": (["tests.somebody:nothing"], "returned str; expected a torch.nn.Module"),
    "no network": (["weights.pt"], "say of which published network, e.g. --as Sehwag2021Proxy_R18"),
    "unknown network": (["weights.pt", "--as", "Sehwag2021Proxy_R19"], "did you mean 'Sehwag2021Proxy_R18'?"),
    "another network": (["weights.pt", "--as", "Sehwag2021Proxy_R18"], "does not hold a standard-resnet"),
    "a pickle": (["whole.pt", "--as", "Sehwag2021Proxy_R18"], "a pickled model is never loaded"),
}


@pytest.mark.parametrize("case", MODELS)
def test_what_is_no_model_is_refused(case: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """One line with the cause and the remedy, before any image is read."""
    arguments, message = MODELS[case]
    monkeypatch.chdir(tmp_path)
    torch.save(random_linear().state_dict(), "weights.pt")
    Path("whole.pt").write_bytes(pickle.dumps(np.float64))
    done = run("evaluate", *arguments, *ON_DIGITS)
    assert done.exit_code == 2, done.output
    assert message in _text(done)
    assert not (home / "store" / "source").exists()


def test_a_model_that_does_not_fit_is_not_attacked(run: Run, home: Path) -> None:
    """What it answers to unperturbed images is looked at first."""
    done = run("evaluate", "tests.somebody:of_levels", *ON_DIGITS)
    assert done.exit_code == 1
    assert "would be right if pixels had 255 levels (make a factor of 255 the model's first layer)" in _text(done)
    assert not (home / "store" / "evaluate").exists()


CERTIFY = {
    "unknown method": (["--method", "fast"], "--method: expected fixed or sequential, got 'fast'"),
    "unknown precision": (["--precision", "float16"], "--precision: expected float32 or bfloat16, got 'float16'"),
    "no sigma": (["--source", "digits"], "say it, e.g. --sigma 0.25"),
    "negative sigma": (["--source", "digits", "--sigma", "-1"], "--sigma: expected a positive number"),
    "radius beyond the cap": ([*NOISY, "--radius", "3"], "no radius above 0.800 can be certified"),
    "negative radius": ([*NOISY, "--radius", "-1"], "radii: expected ascending radii of at least 0"),
    "threshold": ([*NOISY, "--linf", "many"], "linf.0: expected a threat model such as 'linf:8/255'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CERTIFY)
def test_wrong_options_of_certify_are_refused(case: str, run: Run, home: Path) -> None:
    """One line, in the words of the option."""
    arguments, message = CERTIFY[case]
    done = run("certify", GOOD, *arguments)
    assert done.exit_code == 2, done.output
    assert message in _text(done)
    assert "pydantic" not in done.output
    assert not (home / "store" / "certify").exists()
