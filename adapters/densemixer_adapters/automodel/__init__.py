"""DenseMixer in NeMo Automodel: ``densemixer: true`` under ``model:`` in its YAML, or `apply_densemixer`.

Models of Automodel's own Mixture-of-Experts layer are served by this wing, those that it loads from transformers by
`densemixer_adapters.transformers`.

``attach``       attaches to a model, and takes off again
``refuse``       what DenseMixer doesn't work with, and why
``layer``        one layer: what its hooks do in a forward and in its backward
``experts``      the experts' weights, and what they compute
``door``         the key, read where Automodel builds its models
``verl_engine``  verl's engine ``automodel``
"""

from densemixer_adapters.automodel.attach import AutomodelHandle, apply_densemixer
from densemixer_adapters.errors import UnsupportedModelError

__all__ = ["AutomodelHandle", "UnsupportedModelError", "apply_densemixer"]
