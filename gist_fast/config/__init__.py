"""The YAML of ``gist-fast train``: its keys (`schema`), its scalars and their lines (`yaml_values`), how it is read."""

from gist_fast.config.load import TrainConfig, load_config
from gist_fast.config.schema import (
    DataConfig,
    EvaluationConfig,
    GuideConfig,
    LoraConfig,
    ModelConfig,
    SourceConfig,
    StudentConfig,
)

__all__ = [
    "DataConfig",
    "EvaluationConfig",
    "GuideConfig",
    "LoraConfig",
    "ModelConfig",
    "SourceConfig",
    "StudentConfig",
    "TrainConfig",
    "load_config",
]
