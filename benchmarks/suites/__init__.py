"""The suites of `gist_fast.bench` under pytest-benchmark: ``pytest benchmarks/suites --scale small|medium|large``."""
