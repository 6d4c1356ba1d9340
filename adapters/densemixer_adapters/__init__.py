"""DenseMixer for training frameworks, one module each. The method itself is in `densemixer_core`."""
