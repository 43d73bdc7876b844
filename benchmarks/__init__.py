"""Measurements of gist_fast: each checks its result first, and reports ratios taken in one run."""
