"""How much to draft: the budget of drafted nodes that makes a whole step the fastest.

``costs.py`` is what a step takes, measured or by arithmetic; ``worth.py`` what a node is worth, its
path probability set against what was accepted; ``rule.py`` weighs the one against the other for all
requests of a step; ``depth.py`` decides how deep to draft next, down to not at all; ``shapes.py``
chooses between a chain and a tree once, at start. Nothing here knows vLLM or reads a clock, and no
choice made here changes an output: the target decides every token whatever was drafted.
``usual.py`` is what a tree looks like where only a draft's acceptance by depth is known.

Where a step's requests all get the same number of nodes, as CUDA graphs want it, the same question
has a smaller answer: ``size_costs.py`` is what whole steps of each size take, ``accepted.py`` what
is accepted of each size, ``size_schedule.py`` which size a batch gets.
"""

from vllm_msd.budget.accepted import AcceptedTokens
from vllm_msd.budget.costs import CostTable
from vllm_msd.budget.depth import DepthChooser, DraftPlan
from vllm_msd.budget.rule import best_rate, prefix_lengths
from vllm_msd.budget.shapes import AUTO, choose_shape
from vllm_msd.budget.size_costs import SizeCosts, candidate_sizes
from vllm_msd.budget.size_schedule import SizeSchedule
from vllm_msd.budget.usual import PAPER_TREE, expected_tree, ratio_for, usual_tree
from vllm_msd.budget.worth import AcceptancePrior, Calibration

__all__ = [
    "AUTO",
    "PAPER_TREE",
    "AcceptancePrior",
    "AcceptedTokens",
    "Calibration",
    "CostTable",
    "DepthChooser",
    "DraftPlan",
    "SizeCosts",
    "SizeSchedule",
    "best_rate",
    "candidate_sizes",
    "choose_shape",
    "expected_tree",
    "prefix_lengths",
    "ratio_for",
    "usual_tree",
]
