"""``gist-fast``: one file a command, put together in `gist_fast.cli.main`.

Modules here import torch, transformers and their like inside functions only, so that ``gist-fast --help`` is immediate.
"""
