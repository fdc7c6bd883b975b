"""Inference algorithms and objectives, one per file."""

from ppl_gen.fitting.algorithm import Algorithm, Iterative
from ppl_gen.fitting.stopping import Patience, Plateau
from ppl_gen.inference.cavi import CAVI
from ppl_gen.inference.em.em import EM
from ppl_gen.inference.guides.flow_guide import flow_guide
from ppl_gen.inference.laplace import Laplace
from ppl_gen.inference.mcmc.nuts import NUTS
from ppl_gen.inference.objectives.adversarial import Adversarial
from ppl_gen.inference.objectives.base import Objective
from ppl_gen.inference.objectives.conditional import ConditionalAdversarial
from ppl_gen.inference.objectives.contrastive import ContrastiveDivergence
from ppl_gen.inference.objectives.divergences import Divergence
from ppl_gen.inference.objectives.domains import DomainAdversarial
from ppl_gen.inference.objectives.ebgan import EBGAN
from ppl_gen.inference.objectives.elbo import ELBO
from ppl_gen.inference.objectives.game import Game, Loss, Player
from ppl_gen.inference.objectives.iwae import IWAE
from ppl_gen.inference.objectives.robust import AdversarialTraining
from ppl_gen.inference.objectives.simple_diffusion import SimpleDiffusion
from ppl_gen.inference.objectives.wae import WAE
from ppl_gen.inference.objectives.wake_sleep import WakeSleep
from ppl_gen.inference.objectives.walkback import Walkback
from ppl_gen.inference.pathfinder import Pathfinder
from ppl_gen.inference.svi import SVI

__all__ = [
    "CAVI",
    "EBGAN",
    "ELBO",
    "EM",
    "IWAE",
    "NUTS",
    "SVI",
    "WAE",
    "Adversarial",
    "AdversarialTraining",
    "Algorithm",
    "ConditionalAdversarial",
    "ContrastiveDivergence",
    "Divergence",
    "DomainAdversarial",
    "Game",
    "Iterative",
    "Laplace",
    "Loss",
    "Objective",
    "Pathfinder",
    "Patience",
    "Plateau",
    "Player",
    "SimpleDiffusion",
    "WakeSleep",
    "Walkback",
    "flow_guide",
]
