"""Router metrics: whether DenseMixer does anything in a run.

``router_metrics``  all of them, in the order of a training loop
``gradients``       the routers' gradient, what DenseMixer adds to it, the experts' load
``drift``           how far training has moved the routing, on one fixed batch
``lost_updates``    the updates that rounding has swallowed
``verdict``         what they say
``names``           what logs call them
"""
