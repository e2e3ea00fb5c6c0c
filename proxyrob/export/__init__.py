"""ONNX export, the proof that it is equal, and the card."""

from proxyrob.export.card import ModelCard
from proxyrob.export.onnx import CARD, CARD_JSON, MODEL, ExportReport, export_classifier, read_card, write_onnx
from proxyrob.export.parity import ParityReport, prove_parity

__all__ = [
    "CARD",
    "CARD_JSON",
    "MODEL",
    "ExportReport",
    "ModelCard",
    "ParityReport",
    "export_classifier",
    "prove_parity",
    "read_card",
    "write_onnx",
]
