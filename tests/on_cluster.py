"""A flow of four stages that are shared by the cluster of the environment: samples, labels, an attack and certificates.

``main(FOLDER)`` does them all at once, in FOLDER, which holds the stages they need.
"""

from pathlib import Path
from typing import Any

from tests.at_once import JITTER, SAMPLING, THRESHOLD
from tests.toys import SMALL_CERTIFY, SMALL_EVALUATE, SMALL_SIGMA, SMALL_THREAT, stage_in

SHARED = ("sample", "label", "evaluate", "certify")


def main(folder: Path) -> None:
    """Run the flow, with a Prefect server of its own, as ``proxyrob run`` does."""
    from flows.running.embedded_api import await_api, start_api
    from flows.settings import Settings, prepare_environment

    settings = Settings()
    prepare_environment(settings)
    server = start_api()
    from prefect import flow

    from flows.running.display import QuietDisplay
    from flows.running.stages import Session, open_session

    assert server is not None
    await_api(server)
    with open_session(Session(settings, "cpu", QuietDisplay())):
        flow(name="share", validate_parameters=False)(share_stages)(folder)


def share_stages(folder: Path) -> None:
    """Submit the four stages, and wait for them."""
    from flows.running.stages import await_stages, submit_stage
    from proxyrob.certify import certify_classifier
    from proxyrob.evaluate import evaluate_classifier
    from proxyrob.label import label_shards
    from proxyrob.proxy import sample_proxy
    from proxyrob.storage import DataPlace

    source, voters = stage_in(folder, "source"), [stage_in(folder, "train", model=model) for model in ("cnn", "resnet")]
    measured: dict[str, Any] = {"source": source, "model": voters[0], "seed": 0, "device": "cpu"}
    functions: dict[str, tuple[Any, dict[str, Any]]] = {
        "sample": (
            sample_proxy,
            {"config": JITTER, "sampling": SAMPLING, "source": source, "proxy": None, "seed": 0, "device": "cpu"},
        ),
        "label": (
            label_shards,
            {
                "threshold": THRESHOLD,
                "source": source,
                "images": DataPlace.of(stage_in(folder, "samples").folder),
                "first": voters[0],
                "second": voters[1],
                "device": "cpu",
            },
        ),
        "evaluate": (evaluate_classifier, {"config": SMALL_EVALUATE, "threat": SMALL_THREAT, **measured}),
        "certify": (certify_classifier, {"config": SMALL_CERTIFY, "sigma": SMALL_SIGMA, **measured}),
    }
    for name in SHARED:
        function, arguments = functions[name]
        submit_stage(function, stage_in(folder, name), name, sharded=True, **arguments)
    await_stages()
