"""Two models on the same images, and the gate that is built on it."""

from proxyrob.compare.gate import GateDecision, decide_promotion
from proxyrob.compare.paired import Comparison, Verdict, compare_paired
from proxyrob.compare.tables import compare_certificates, compare_verdicts

__all__ = [
    "Comparison",
    "GateDecision",
    "Verdict",
    "compare_certificates",
    "compare_paired",
    "compare_verdicts",
    "decide_promotion",
]
