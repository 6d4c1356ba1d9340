"""DenseMixer for training frameworks. The method itself is in `densemixer_core`.

Doors, a module each: ``transformers``, ``environment`` (any program), ``callback`` (the HF Trainer's log),
``llamafactory``, ``axolotl``, ``verl`` (with ``verl_engines``), ``open_instruct``, ``deepspeed``, ``megatron``,
``torchtitan``, ``automodel``. ``_boot`` has the table of all hooks.

Wings: ``transformers``, ``megatron``, ``torchtitan`` and ``automodel``, what is attached to a model; ``metrics``,
whether it does anything; ``preflight``, whether it would; ``selftest``, whether a machine gives the right numbers;
``cli``, the command. Doors and wings share ``switch``, ``errors``, ``handle``, ``observer``, ``expert_parallel`` and
its ``collectives``. ``original`` is about the package of the paper's authors.
"""
