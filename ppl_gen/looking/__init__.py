"""Looking inside networks: what they see, what they would like to see, and what fools them.

Functions of any `torch.nn.Module` that reads rows, from a fit (``fit.module("encoder")``) or from elsewhere, and gives
scores, rows x numbers, or a distribution over real numbers, which is read by its mean. Nothing about the network is
changed: it is run in evaluation mode, without layers that work in place, and every part of it is left as it was.
"""

from ppl_gen.looking.covering import occlusion
from ppl_gen.looking.flattening import Embedding, mds, som, tsne
from ppl_gen.looking.fooling import AdversarialExamples, adversarial_example
from ppl_gen.looking.gradients import deconvnet, guided_backprop, saliency
from ppl_gen.looking.layers import embed_layers
from ppl_gen.looking.maps import activation_maps, filters
from ppl_gen.looking.maximising import activation_maximisation
from ppl_gen.looking.neighbours import Neighbours, nearest_images
from ppl_gen.looking.patches import Patches, top_patches

__all__ = [
    "AdversarialExamples",
    "Embedding",
    "Neighbours",
    "Patches",
    "activation_maps",
    "activation_maximisation",
    "adversarial_example",
    "deconvnet",
    "embed_layers",
    "filters",
    "guided_backprop",
    "mds",
    "nearest_images",
    "occlusion",
    "saliency",
    "som",
    "top_patches",
    "tsne",
]
