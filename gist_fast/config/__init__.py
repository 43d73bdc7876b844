"""The YAML of ``gist-fast train``: its keys (`schema`), its scalars and their lines (`yaml_values`), how it is read."""

from gist_fast.config.load import TrainConfig, load_config
from gist_fast.moved import names_in

__all__ = ["TrainConfig", "load_config"]

__getattr__ = names_in("gist_fast.config", "load", "schema")
