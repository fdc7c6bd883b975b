"""What an algorithm or an objective of one's own is made of, beside what `ppl_gen.inference` exports to derive from."""

from ppl_gen.data.batches import Batches
from ppl_gen.data.batching import Batch
from ppl_gen.fitting.posteriors.base import Posterior
from ppl_gen.fitting.posteriors.chains import ChainPosterior
from ppl_gen.fitting.posteriors.draws import DrawsPosterior
from ppl_gen.fitting.posteriors.guides import GuidePosterior
from ppl_gen.fitting.posteriors.points import PointPosterior
from ppl_gen.fitting.run import Ending, Info, Outcome, Run
from ppl_gen.inference.guides.vector_guide import guide_from_vector
from ppl_gen.inference.objectives.game import GameState, Setting
from ppl_gen.inference.objectives.observed import ObservedRows
from ppl_gen.inference.objectives.tracing import traces
from ppl_gen.inference.unconstrained import Unconstrained
from ppl_gen.program.info import ProgramInfo

__all__ = [
    "Batch",
    "Batches",
    "ChainPosterior",
    "DrawsPosterior",
    "Ending",
    "GameState",
    "GuidePosterior",
    "Info",
    "ObservedRows",
    "Outcome",
    "PointPosterior",
    "Posterior",
    "ProgramInfo",
    "Run",
    "Setting",
    "Unconstrained",
    "guide_from_vector",
    "traces",
]
