"""Networks; normalisation is their first layer."""

from proxyrob.models.classifier import (
    MODEL_FILES,
    Classifier,
    ClassifierCard,
    build_classifier,
    channel_statistics,
    load_classifier,
    read_classifier,
    save_classifier,
)
from proxyrob.models.folded import FoldedCopy
from proxyrob.models.given import (
    GIVEN,
    GivenReport,
    ModelIdentity,
    OnnxModel,
    adopt_model,
    identify_model,
    is_given,
    load_model,
)
from proxyrob.models.hashing import hash_inputs
from proxyrob.models.onnx_files import read_onnx, require_whole_onnx
from proxyrob.models.pieces import InPieces, in_pieces
from proxyrob.models.published import PUBLISHED, load_published, published_card

__all__ = [
    "GIVEN",
    "MODEL_FILES",
    "PUBLISHED",
    "Classifier",
    "ClassifierCard",
    "FoldedCopy",
    "GivenReport",
    "InPieces",
    "ModelIdentity",
    "OnnxModel",
    "adopt_model",
    "build_classifier",
    "channel_statistics",
    "hash_inputs",
    "identify_model",
    "in_pieces",
    "is_given",
    "load_classifier",
    "load_model",
    "load_published",
    "published_card",
    "read_classifier",
    "read_onnx",
    "require_whole_onnx",
    "save_classifier",
]
