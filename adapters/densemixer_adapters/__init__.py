"""DenseMixer for training frameworks. The method itself is in `densemixer_core`.

Doors, a module each: ``transformers``, ``environment`` (any program), ``callback`` (the HF Trainer's log),
``llamafactory``, ``verl``, ``open_instruct``, ``deepspeed``, ``megatron``. ``_boot`` has the table of all hooks.

Wings: ``transformers`` and ``megatron``, what is attached to a model; ``metrics``, whether it does anything; ``cli``,
the command. ``switch`` and ``errors`` are what doors share, ``expert_parallel`` what wings share, ``verl_engines`` what
verl's engines do; ``original`` is about the package of the paper's authors.
"""
