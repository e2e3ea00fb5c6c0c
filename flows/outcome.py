"""What a pipeline leaves behind: its MLflow runs and its output folder."""

import base64
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact

from flows.plan import Plan, Variant
from flows.records.curves import LiveCurve, close_all
from flows.records.registry import Registration
from flows.records.released import add_decision
from flows.records.report import build_report, render_markdown, write_report
from flows.records.tracking import Tracker
from flows.running.stages import CACHED, current_session
from flows.settings import CONFIGURATION
from proxyrob.certify.smoothing import CERTIFICATES
from proxyrob.compare import Comparison, Incomparable
from proxyrob.evaluate.verdicts import VERDICTS
from proxyrob.export import CARD, CARD_JSON, MODEL
from proxyrob.figures import PicturesReport
from proxyrob.storage.files import require_writable, write_bytes

FAREWELL_S = 3.0
"""How long the end of a failed run waits for the last points of its curves."""


class Outcome:
    """Opens the parent run, marks it failed if the block fails, and writes the output folder at the end."""

    def __init__(self, plan: Plan, changes: tuple[str, ...], output: str | None) -> None:
        self.plan = plan
        settings = current_session().settings
        self.folder = Path(output).absolute() if output else settings.runs / plan.run_name
        require_writable(self.folder)
        require_writable(settings.store)
        self.tracker = Tracker(settings, current_session().display.note)
        self._curves: list[LiveCurve] = []
        self._title = " ".join([plan.config.name, *(changes or ("as it ships",))])
        self._started = time.monotonic()
        self._run_id = ""

    def __enter__(self) -> Self:
        self._run_id = self.tracker.open_pipeline(self.plan, self._title, current_session().device)
        write_bytes(self.folder / CONFIGURATION, yaml.safe_dump(self.plan.config.dump(), sort_keys=False).encode())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        close_all(self._curves, FAREWELL_S)
        if error is not None:
            self.tracker.fail(self._run_id, str(error) or type(error).__name__)

    def curve(self, variant: Variant, prefix: str) -> LiveCurve:
        """Shows a training of a variant in MLflow while it runs; ``prefix`` is that of its figures."""
        curve = self.tracker.live_curve(self.tracker.open_variant(self.plan, variant, self._run_id), prefix)
        self._curves.append(curve)
        return curve

    def record_models(self) -> str:
        """Record the proxy and every model, with what their curves lack; the run id of the model that is released."""
        close_all(self._curves)
        self.tracker.record_proxy(self.plan, self._run_id)
        runs = {variant: self.tracker.record_variant(self.plan, variant, self._run_id) for variant in self.plan.variants}
        for run in runs.values():
            self.tracker.close_model(run)
        return runs[self.plan.released]

    def conclude(self, comparison: dict[str, Comparison | Incomparable], registration: Registration) -> dict[str, Any]:
        """Write the output folder, finish the parent run, show the result in Prefect's UI; the report."""
        submitted = current_session().submitted
        cached = [label for label, entry in submitted.items() if entry.future.state.name == CACHED]
        seconds = {}
        for label, entry in submitted.items():
            record = entry.stage.record()
            assert record is not None
            seconds[label] = round(record.elapsed_s, 2)
        report = build_report(
            self.plan,
            comparison,
            registration,
            preset=self.plan.config.name,
            seconds={"total": round(time.monotonic() - self._started, 2), **seconds},
            cached=cached,
        )
        report["tracked"] = {"experiment": self.tracker.experiment(self.plan.config.name), "run": self._run_id}
        self._copy_results()
        add_decision(self.folder, registration.decision)
        write_report(self.folder, report)
        note = render_markdown(report)
        if not self.tracker.is_finished(self._run_id):
            self.tracker.close_pipeline(self.plan, self._run_id, report, note)
        for name in self._pictures():
            content = base64.b64encode(self.plan.pictures.verified(name).read_bytes()).decode()
            create_image_artifact(
                key=name.removesuffix(".png"), image_url=f"data:image/png;base64,{content}", description=self._title
            )
        create_markdown_artifact(key="result", markdown=note, description=f"{self._title} ({self.plan.digest[:12]})")
        create_table_artifact(
            key="stages", table=[{"stage": k, "seconds": v, "cached": k in cached} for k, v in seconds.items()]
        )
        return report

    def _pictures(self) -> tuple[str, ...]:
        pictures = self.plan.pictures.finished(PicturesReport)
        assert pictures is not None
        return pictures.names

    def _copy_results(self) -> None:
        plan = self.plan
        files = {name: plan.export.verified(name) for name in (MODEL, CARD, CARD_JSON)}
        files |= {name: plan.pictures.verified(name) for name in self._pictures()}
        for variant, stages in plan.variants.items():
            files[f"{variant}/{VERDICTS}"] = stages.evaluate.verified(VERDICTS)
            files[f"{variant}/{CERTIFICATES}"] = stages.certify.verified(CERTIFICATES)
        for name, path in files.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, self.folder / name)
