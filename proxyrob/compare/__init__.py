"""Two models on the same images, two ways of making one over several seeds, and the gate that is built on the first."""

from proxyrob.compare.again import compare_attacked_again
from proxyrob.compare.bootstrap import BootstrapInterval, bootstrap_difference
from proxyrob.compare.gate import GateDecision, decide_promotion
from proxyrob.compare.paired import Comparison, Incomparable, Verdict, compare_paired
from proxyrob.compare.sandwich import Contradiction, Sandwich, check_sandwich
from proxyrob.compare.seeds import SeedComparison, Spread, compare_over_seeds, summarise_seeds
from proxyrob.compare.tables import compare_certificates, compare_verdicts, compare_where_possible

__all__ = [
    "BootstrapInterval",
    "Comparison",
    "Contradiction",
    "GateDecision",
    "Incomparable",
    "Sandwich",
    "SeedComparison",
    "Spread",
    "Verdict",
    "bootstrap_difference",
    "check_sandwich",
    "compare_attacked_again",
    "compare_certificates",
    "compare_over_seeds",
    "compare_paired",
    "compare_verdicts",
    "compare_where_possible",
    "decide_promotion",
    "summarise_seeds",
]
