"""Cases of every op and quantizer, and what judges their results: for tests and benchmarks."""
