"""Tree-structured attention (TAM) for image classifiers: a timm model zoo that folds to plain backbones."""

__version__ = "0.1.0"  # before the imports: rooms read it

from tamzoo import registry as registry  # registers every model with timm
from tamzoo.attention import CBAM, SE, TAM
from tamzoo.fold import reparameterize_model
from tamzoo.gates import measure_gates

__all__ = ["CBAM", "SE", "TAM", "measure_gates", "reparameterize_model"]
