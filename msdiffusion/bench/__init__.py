"""Benchmarks of methods on the procedural world: `msdiffusion bench world` and `msdiffusion bench explore`."""
