"""ONNX export, the proof that it is equal, and cards."""

from proxyrob.export.card import ModelCard
from proxyrob.export.measurement import (
    MEASUREMENT,
    MEASUREMENT_CARD,
    Measurement,
    read_measurement,
    render_measurement,
    require_own_folder,
    write_measurement,
)
from proxyrob.export.onnx import CARD, CARD_JSON, MODEL, ExportReport, export_classifier, read_card, write_onnx
from proxyrob.export.parity import ParityReport, prove_parity

__all__ = [
    "CARD",
    "CARD_JSON",
    "MEASUREMENT",
    "MEASUREMENT_CARD",
    "MODEL",
    "ExportReport",
    "Measurement",
    "ModelCard",
    "ParityReport",
    "export_classifier",
    "prove_parity",
    "read_card",
    "read_measurement",
    "render_measurement",
    "require_own_folder",
    "write_measurement",
    "write_onnx",
]
