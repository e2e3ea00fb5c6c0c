"""What stands on MLflow's pages in words: descriptions of experiments, runs and registered models, in Markdown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote

from flows.describe import describe_data, describe_training
from flows.plan import Plan, Variant
from flows.records.views import MODELS, view_link
from proxyrob.certify import CertificationReport
from proxyrob.evaluate import GATE, EvaluationReport, SanityReport
from proxyrob.export import ModelCard
from proxyrob.intervals import Measured

MEASUREMENTS = "measurements"
"""The experiment of what was measured outside a pipeline."""


def describe_experiment(name: str, experiment_id: str) -> str:
    """What an experiment holds, with links to its views."""
    if name == MEASUREMENTS:
        return (
            "Models that were measured outside a pipeline, whoever trained them: `proxyrob evaluate` and `certify`, `--track`."
        )
    links = {
        "pipelines": view_link(experiment_id),
        "as charts, with pictures": view_link(experiment_id, charts=True),
        "models": view_link(experiment_id, MODELS),
    }
    pipelines, charts, models = (f"[**{text}**]({link})" for text, link in links.items())
    return (
        f"Runs of the preset **{name}**: compare {pipelines} ({charts}) or single {models} with their curves. Both "
        "views are in the menu «Views», too, once a run has finished. The row of a pipeline has the figures of the model it "
        "released; unfold it for `mixed`, `real-only` and `proxy`. Accuracies are shares of the test images, `…_low` and "
        "`…_high` their 95 % intervals."
    )


def describe_variant(plan: Plan, variant: Variant) -> str:
    """What a trained model can do, and how it was made."""
    stages = plan.variants[variant]
    evaluation, certification = stages.evaluate.finished(EvaluationReport), stages.certify.finished(CertificationReport)
    sanity = stages.sanity.finished(SanityReport)
    assert evaluation is not None
    assert certification is not None
    assert sanity is not None
    attacked = "Gate search" if evaluation.ensemble == GATE else "AutoAttack"
    figures = {
        attacked: evaluation.autoattack,
        f"PGD-{plan.config.evaluate.pgd_steps}": evaluation.pgd,
        "clean": evaluation.clean,
    }
    certified = {f"certified at radius {radius}": share for radius, share in certification.certified.items() if float(radius)}
    failed = ", ".join(check.name for check in sanity.having("failed"))
    return (
        f"{_list_figures(figures)}\n\n"
        f"Of the smoothed classifier: {_list_figures(certified)}\n\n"
        f"{describe_training(plan.config, variant)}; {describe_data(plan.config, variant)}. "
        f"Sanity checks: {f'failed: {failed}' if failed else 'none failed'}."
    )


def describe_proxy(name: str, figures: Mapping[str, float]) -> str:
    """What a proxy made, and what of it is used."""
    return (
        f"{figures['synthetic_images']:,.0f} images of the proxy *{name}*, of which {100 * figures['kept']:.1f} % are used: "
        f"the two labelers disagree on {100 * figures['labelers_disagree']:.1f} %, "
        f"{figures['near_test_images']:.0f} nearly equal a test image."
    )


@dataclass(frozen=True)
class VersionRow:
    """A version in the table of its registered model: figures as its tags have them, empty where they are not known."""

    number: int
    aliases: tuple[str, ...]
    threat: str
    autoattack: str
    clean: str
    verdict: str


def describe_model(name: str, rows: Iterable[VersionRow], count: int) -> str:
    """The page of a registered model: what it is, how it is used, its versions, the newest first."""
    table = "\n".join(
        f"| [{row.number}](#/models/{name}/versions/{row.number}) | {', '.join(f'**{alias}**' for alias in row.aliases)} | "
        f"{_percent(row.autoattack)} | {_percent(row.clean)} | {row.threat} | {row.verdict} |"
        for row in rows
    )
    data, _, norm = name.rpartition("-")
    return (
        f"Image classifiers of **{data}**, trained to withstand perturbations that are small in the norm **{norm}**, as ONNX "
        "with normalisation inside. The page of each version is its card: what was measured and how.\n\n"
        "| version | alias | AutoAttack | clean | threat model | gate |\n|---|---|---|---|---|---|\n"
        f"{table}\n\n"
        f"{count} version{'s' if count > 1 else ''}; accuracies are shares of the test images. **champion** is the one to use: "
        "the last that the gate let pass (no worse than the champion before it by a paired test, the ONNX file equal to the "
        "trained network, every sanity check passed or waived with a reason). **challenger** is the newest. "
        f"`proxyrob history {name}` says who was champion when and why; the tags `champion.…` below hold it.\n\n"
        f'```python\nimport mlflow\n\nmodel = mlflow.pyfunc.load_model("models:/{name}@champion")\n'
        'logits = model.predict(images)["logits"]  # images: float32 in [0,1], not normalised\n```'
    )


def summarise_card(card: ModelCard) -> str:
    """A model in one line."""
    figures = {card.autoattack_name: card.autoattack, "clean": card.clean}
    return f"{_list_figures(figures)} · {card.threat} · {card.autoattack.n} test images"


def show_pictures(run_id: str, names: Iterable[str]) -> str:
    """The pictures of a run, as its page shows them."""
    return "\n\n".join(
        f"![{name.removesuffix('.png')}](get-artifact?path={quote(f'figures/{name}', safe='')}&run_uuid={run_id})"
        for name in names
    )


def _list_figures(figures: Mapping[str, Measured]) -> str:
    return " · ".join(
        f"{name} **{100 * found.value:.1f} %** [{100 * found.low:.1f}, {100 * found.high:.1f}]"
        for name, found in figures.items()
    )


def _percent(share: str) -> str:
    return f"{100 * float(share):.1f} %" if share else ""
