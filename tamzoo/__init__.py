"""Tree-structured attention (TAM) for image classifiers: a timm model zoo that folds to plain backbones."""

__version__ = "0.1.0"  # before the imports: rooms read it

from tamzoo import registry as registry  # registers every model with timm
from tamzoo.attention import CBAM, SE, TAM
from tamzoo.fold import reparameterize_model
from tamzoo.gates import measure_gates, remember_gates
from tamzoo.onnx_export import export_entry

__all__ = ["CBAM", "SE", "TAM", "export_entry", "measure_gates", "remember_gates", "reparameterize_model"]
