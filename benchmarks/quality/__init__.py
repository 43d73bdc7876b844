"""What guiding does to quality: studies, arms, runs and their tables. ``python -m benchmarks.quality``."""
