"""The YAML of ``gist-fast train``: its keys (`schema`), its scalars and their lines (`yaml_values`), how it is read."""

from gist_fast.config.load import TrainConfig, load_config

__all__ = ["TrainConfig", "load_config"]
