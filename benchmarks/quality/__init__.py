"""How good the objects are. `benchmarks/bench_quality.py` makes, draws and scores them; see `docs/quality.md`."""
