"""Recording twice, and the gate: who may become champion."""

import dataclasses
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from flows.measure.measurements import describe_evaluation, track_measurement, write_outcome
from flows.measure.subject import Subject, find_subject
from flows.plan import Plan
from flows.records.registry import register_model
from flows.records.released import pull_model
from flows.release import compare_variants
from flows.settings import Settings
from proxyrob.evaluate import STANDARD, EvaluationReport, SanityReport, read_verdicts
from proxyrob.evaluate.verdicts import VERDICTS, summarise
from proxyrob.export import CARD, CARD_JSON, MODEL, ExportReport
from proxyrob.storage import Stage
from proxyrob.storage.files import write_table
from tests.e2e.conftest import NAME, Finished, Record


def succeed(plan: Plan, folder: Path, verdicts: pd.DataFrame, **conditions: str) -> Plan:
    """A plan whose released model has other verdicts, and an export of its own."""
    stages = plan.variants[plan.released]
    _, header = read_verdicts(stages.evaluate)
    evaluate = Stage("evaluate", "e" * 64, folder / "evaluate", {})
    write_table(evaluate.folder / VERDICTS, verdicts, header.model_copy(update=conditions).model_dump(mode="json"))
    evaluate.finish(summarise(verdicts, "pgd-5", STANDARD), [VERDICTS], 0.0)
    export = Stage("export", "f" * 64, folder / "export", {})
    shutil.copytree(plan.export.folder, export.folder)
    exported = plan.export.finished(ExportReport)
    assert exported is not None
    export.finish(exported, [MODEL, CARD, CARD_JSON], 0.0)
    assert evaluate.finished(EvaluationReport) is not None
    variants = {**plan.variants, plan.released: dataclasses.replace(stages, evaluate=evaluate)}
    return dataclasses.replace(plan, variants=variants, export=export)


def break_all(plan: Plan) -> pd.DataFrame:
    table, _ = read_verdicts(plan.variants[plan.released].evaluate)
    standing = table.broken_by.isna()
    table.loc[standing, "apgd-ce"] = True
    table.loc[standing, "broken_by"] = "apgd-ce"
    return table


def test_registering_again_changes_nothing(record: Record) -> None:
    """A repeated release finds the version and its decision; no second version appears."""
    before = record.tracker.client.search_model_versions(f"name = '{NAME}'")
    first = register_model(record.plan, record.tracker, record.run_id)
    again = register_model(record.plan, record.tracker, record.run_id)
    assert again == first
    assert len(record.tracker.client.search_model_versions(f"name = '{NAME}'")) == len(before)


def test_recording_again_adds_no_point(record: Record) -> None:
    """A run that is recorded again after an interruption has every metric once."""
    client = record.tracker.client
    child = client.get_run(record.run_id)
    before = {name: len(client.get_metric_history(record.run_id, name)) for name in child.data.metrics}
    client.update_run(record.run_id, status="RUNNING")
    record.tracker.record_variant(record.plan, record.plan.released, child.data.tags["mlflow.parentRunId"])
    after = {name: len(client.get_metric_history(record.run_id, name)) for name in client.get_run(record.run_id).data.metrics}
    assert after == before
    assert before["train/loss"] == 12
    assert {"validation_accuracy_low", "validation_accuracy_high", "autoattack_accuracy_low"} <= before.keys()


def test_closing_again_adds_no_picture(record: Record, finished: Finished) -> None:
    """A pipeline that is closed again after an interruption shows every picture once, and its views are as they were."""
    client, report = record.tracker.client, finished.report
    parent = client.get_run(record.run_id).data.tags["mlflow.parentRunId"]
    before = [entry.path for entry in client.list_artifacts(parent, "images")]
    client.update_run(parent, status="RUNNING")
    record.tracker.close_pipeline(record.plan, parent, report, "the note")
    assert [entry.path for entry in client.list_artifacts(parent, "images")] == before != []
    assert client.get_run(parent).data.tags["mlflow.note.content"].startswith("the note")


def test_a_version_says_what_matters_in_its_first_line(record: Record, finished: Finished) -> None:
    """Lists of versions show no more of a description: the gate's verdict, the figure with its interval, the threat model."""
    version = record.tracker.client.get_model_version(NAME, "1")
    found = finished.report["models"][record.plan.released]["autoattack"]
    first, *_, last = (version.description or "").splitlines()
    assert first.startswith(f"Gate {finished.report['promotion']['verdict']} · ")
    assert f"**{100 * found['value']:.1f} %** [{100 * found['low']:.1f}, {100 * found['high']:.1f}]" in first
    assert f"{record.plan.config.threat} · {found['n']} test images" in first
    assert last
    assert float(version.tags["autoattack_accuracy"]) == pytest.approx(found["value"], abs=1e-4)


def test_the_page_of_a_registered_model_has_all_its_versions(record: Record, tmp_path: Path) -> None:
    """A row for each version with its alias, its figures and what the gate said; and how to use the champion."""
    register_model(succeed(record.plan, tmp_path / "worse", break_all(record.plan)), record.tracker, record.run_id)
    page = record.tracker.client.get_registered_model(NAME).description or ""
    rows = [line for line in page.splitlines() if line.startswith("| [")]
    assert [row.split(" | ")[1] for row in rows] == ["**challenger**", "**champion**"]
    assert rows[0].endswith("| FAIL |")
    assert f"[1](#/models/{NAME}/versions/1)" in rows[1]
    assert f'mlflow.pyfunc.load_model("models:/{NAME}@champion")' in page


def test_a_worse_challenger_is_not_promoted(record: Record, tmp_path: Path) -> None:
    """A model that every attack breaks becomes challenger, FAILs the gate with its evidence, and the champion stays."""
    worse = succeed(record.plan, tmp_path / "worse", break_all(record.plan))
    found = register_model(worse, record.tracker, record.run_id)
    assert found.decision.verdict == "FAIL"
    assert found.decision.reference == "champion (version 1)"
    assert found.decision.comparison is not None
    assert found.decision.comparison.high < 0
    assert record.aliases() == {"champion": "1", "challenger": str(found.version)}
    tags = record.tracker.client.get_model_version(NAME, str(found.version)).tags
    assert tags["gate.verdict"] == "FAIL"


def test_an_equal_challenger_is_promoted_within_the_margin(record: Record, tmp_path: Path) -> None:
    """A model with the champion's own verdicts passes when the interval lies inside the margin, and becomes champion."""
    table, _ = read_verdicts(record.plan.variants[record.plan.released].evaluate)
    equal = succeed(record.plan, tmp_path / "equal", table)
    equal = dataclasses.replace(equal, config=equal.config.replace(gate={"margin": 0.2}))
    found = register_model(equal, record.tracker, record.run_id)
    assert found.decision.verdict == "PASS"
    assert record.aliases() == {"champion": str(found.version), "challenger": str(found.version)}


def test_results_under_another_threat_are_not_compared(record: Record, tmp_path: Path) -> None:
    """Verdicts under another epsilon decide nothing: UNDECIDED, with the reason."""
    table, _ = read_verdicts(record.plan.variants[record.plan.released].evaluate)
    other = succeed(record.plan, tmp_path / "other", table, epsilon="1/20")
    found = register_model(other, record.tracker, record.run_id)
    assert found.decision.verdict == "UNDECIDED"
    assert "epsilon is 1/20 and 1/10" in found.decision.reasons[-1]
    assert record.aliases()["champion"] == "1"


def _with_failed_check(plan: Plan, folder: Path) -> Plan:
    """A plan whose released model failed one sanity check, and no other."""
    stages = plan.variants[plan.released]
    report = stages.sanity.finished(SanityReport)
    assert report is not None
    checks = [{**check.model_dump(), "outcome": "failed" if check.name == "black-box" else "passed"} for check in report.checks]
    sanity = Stage("sanity", "5" * 64, folder / "sanity", {})
    sanity.finish(SanityReport.model_validate({"checks": checks}), [], 0.0)
    return dataclasses.replace(plan, variants={**plan.variants, plan.released: dataclasses.replace(stages, sanity=sanity)})


def test_a_failed_check_blocks_promotion_until_it_is_waived(record: Record, tmp_path: Path) -> None:
    """FAIL without a waiver; with one PASS, and the reason stands on tags, description and card; FAIL when it is withdrawn."""
    table, _ = read_verdicts(record.plan.variants[record.plan.released].evaluate)
    plan = _with_failed_check(succeed(record.plan, tmp_path / "equal", table), tmp_path)

    def decide(**waivers: str) -> tuple[str, dict[str, str], str]:
        configured = dataclasses.replace(plan, config=plan.config.replace(gate={"margin": 0.2, "waivers": waivers}))
        found = register_model(configured, record.tracker, record.run_id)
        version = record.tracker.client.get_model_version(NAME, str(found.version))
        again = register_model(configured, record.tracker, record.run_id)
        assert again.model_dump() == {**found.model_dump(), "change": None}
        return found.decision.verdict, version.tags, version.description or ""

    verdict, tags, description = decide()
    assert (verdict, tags["gate.verdict"], record.aliases()["champion"]) == ("FAIL", "FAIL", "1")
    assert "sanity check failed: black-box" in description
    verdict, tags, description = decide(**{"black-box": "counted by hand"})
    assert (verdict, tags["gate.verdict"], tags["gate.waived.black-box"]) == ("PASS", "PASS", "counted by hand")
    assert record.aliases()["champion"] == record.aliases()["challenger"] != "1"
    assert "\n# digits-linf\n" in description
    assert ", waived: counted by hand" in description
    pull_model(record.tracker.uri, f"{NAME}@champion", tmp_path / "pulled")
    assert ", waived: counted by hand" in (tmp_path / "pulled" / CARD).read_text()
    card = json.loads((tmp_path / "pulled" / CARD_JSON).read_text())
    assert card["gate"]["waivers"] == {"black-box": "counted by hand"}
    verdict, tags, description = decide()
    assert (verdict, "gate.waived.black-box" in tags, "waived" in description) == ("FAIL", False, False)
    assert "champion" not in record.aliases(), "what the gate says FAIL of is champion no longer"
    assert "sanity check failed: black-box" in tags["champion.withdrawn"]
    verdict, tags, _ = decide(**{"black-box": "counted by hand"})
    assert (verdict, "champion" in record.aliases(), "champion.withdrawn" in tags) == ("PASS", True, False)


def test_a_gate_whose_attacks_ended_early_is_undecided(record: Record, tmp_path: Path) -> None:
    """Images that nobody attacked to the end promote nobody, against the champion or the model of real images alone."""
    table, _ = read_verdicts(record.plan.variants[record.plan.released].evaluate)
    table.loc[table.broken_by.isna(), "square"] = None
    early = succeed(record.plan, tmp_path / "early", table)
    found = register_model(early, record.tracker, record.run_id)
    assert (found.decision.verdict, found.decision.reference) == ("UNDECIDED", "champion (version 1)")
    record.tracker.client.delete_registered_model_alias(NAME, "champion")
    record.tracker.client.delete_model_version_tag(NAME, str(found.version), "gate")
    alone = register_model(early, record.tracker, record.run_id)
    assert (alone.decision.verdict, alone.decision.reference) == ("UNDECIDED", "the same training on real images alone")
    assert "were not attacked to the end" in alone.decision.reasons[-1]
    assert compare_variants(early)["autoattack"].verdict == "UNDECIDED"
    assert record.aliases() == {"challenger": str(found.version)}


def test_an_older_decision_is_made_again(record: Record) -> None:
    """A decision in words that this program does not know is no reason to stop: the gate decides anew."""
    version = register_model(record.plan, record.tracker, record.run_id)
    record.tracker.client.set_model_version_tag(NAME, str(version.version), "gate", '{"verdict": "PASS"}')
    again = register_model(record.plan, record.tracker, record.run_id)
    assert again.decision.reasons == version.decision.reasons


def test_a_registered_version_can_be_measured(record: Record, finished: Finished, tmp_path: Path) -> None:
    """Where its weights are on this machine that is the torch model with its own images; elsewhere the ONNX file, and it says
    that there are no gradients."""
    shutil.copytree(finished.program.home / "store" / "export", tmp_path / "store" / "export")
    settings = Settings(home=tmp_path)
    for reference in (f"{NAME}@champion", f"models:/{NAME}@champion", f"models:/{NAME}/1", f"{NAME}/1"):
        found = find_subject(reference, settings)
        assert not found.has_gradients
        assert found.title == f"{NAME} version 1"
        assert found.threat == record.plan.config.threat
        assert "black-box attacks and replay are all that can be done" in found.note
    for kind in ("train", "source"):
        shutil.copytree(finished.program.home / "store" / kind, tmp_path / "store" / kind)
    found = find_subject(f"{NAME}@champion", settings)
    assert found.has_gradients
    assert found.model.digest == record.plan.variants[record.plan.released].train.digest
    assert found.source is not None
    assert found.source.digest == record.plan.source.digest
    assert "measured is the torch model" in found.note
    with pytest.raises(ValueError, match="no registered model 'other' with alias 'champion'; registered models: digits"):
        find_subject("other@champion", settings)


def test_a_training_can_be_measured(record: Record, finished: Finished) -> None:
    """Its folder or its file of weights says on which images, against what, and for which noise it was trained."""
    stages, settings = record.plan.variants[record.plan.released], Settings(home=finished.program.home)
    for reference in (stages.train.folder, stages.train.folder / "model.safetensors"):
        found = find_subject(str(reference), settings)
        assert found.model == stages.train
        assert (found.threat, found.sigma) == (record.plan.config.threat, None)
        assert found.source is not None
        assert found.source.digest == record.plan.source.digest
    smoothed = find_subject(str(stages.smooth.folder), settings)
    assert (smoothed.threat, smoothed.sigma) == (None, record.plan.config.smooth.objective.sigma)
    with pytest.raises(ValueError, match="holds a stage 'evaluate', expected 'train'"):
        find_subject(str(stages.evaluate.folder), settings)


def test_a_measurement_is_recorded_once(record: Record, tmp_path: Path) -> None:
    """One run with figures and intervals, table, card and figure; a second call adds nothing."""
    stages = record.plan.variants[record.plan.released]
    report, sanity = stages.evaluate.finished(EvaluationReport), stages.sanity.finished(SanityReport)
    assert report is not None
    assert sanity is not None
    subject = Subject(title="theirs", note="From elsewhere.", model=stages.train)
    measurement = describe_evaluation(subject, record.plan.source, stages.evaluate, record.plan.config.threat, report, sanity)
    files = write_outcome(tmp_path, stages.evaluate, measurement)
    settings, config = Settings(home=tmp_path), record.plan.config.evaluate
    runs = {track_measurement(settings, stages.evaluate, measurement, report, config, files) for _ in range(2)}
    assert len(runs) == 1
    run = record.tracker.client.get_run(runs.pop())
    assert run.data.metrics["autoattack_accuracy_low"] == report.autoattack.low
    assert run.data.metrics["pgd_accuracy"] == report.pgd.value
    assert run.data.params["evaluate.pgd_steps"] == "5"
    assert run.data.tags["proxyrob.sanity"] == ("passed" if sanity.passed else "failed")
    assert run.info.status == "FINISHED"
    (table,) = record.tracker.client.list_artifacts(run.info.run_id, "tables")
    assert table.path == "tables/verdicts.parquet"
