"""A look before training, from a few batches: would the routing move, and by a signal or by noise? Nothing is trained.

``look``       `preflight`, which looks; the order of things
``batch``      what it looks at
``passes``     the routers' gradients of each batch, by each estimator
``watch``      what passes by in a layer meanwhile: its edge of the selection, and what swaps there would gain
``edge``       how far routers can move the edge: a bound, and what noise does
``steps``      Adam's steps on copies of the routers' weights, and how the model would route with these
``agreement``  how far gradients of halves of the data agree
``verdict``    what all that says
``result``     all of it
"""

from densemixer_adapters.preflight.look import preflight
from densemixer_adapters.preflight.result import Estimated, Preflight

__all__ = ["Estimated", "Preflight", "preflight"]
