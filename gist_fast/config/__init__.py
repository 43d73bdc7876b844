"""The YAML of ``gist-fast train``: its keys (`schema`), its scalars and their lines (`yaml_values`), how it is read."""

from gist_fast.config.load import TrainConfig, load_config
from gist_fast.config.schema import DataConfig as DataConfig
from gist_fast.config.schema import EvaluationConfig as EvaluationConfig
from gist_fast.config.schema import GuideConfig as GuideConfig
from gist_fast.config.schema import LoraConfig as LoraConfig
from gist_fast.config.schema import ModelConfig as ModelConfig
from gist_fast.config.schema import SourceConfig as SourceConfig
from gist_fast.config.schema import StudentConfig as StudentConfig

__all__ = ["TrainConfig", "load_config"]
