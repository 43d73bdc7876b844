"""What a saved model says of itself in its small files, before any of its weights is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gist_fast.data.per_column import positions
from gist_fast.evaluation.metric_names import SIMILARITIES
from gist_fast.runtime.errors import InputError, first_line

MARKERS = ("modules.json", "config.json", "adapter_config.json")
"""Files of which a saved model has at least one."""
_WEIGHTS = (".safetensors", ".bin", ".gguf")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "*processor_config.json")
_NO_LENGTH = 1e9
"""Above, a tokenizer says that it knows no maximum (1e30)."""
_WITH_SETTINGS = ("Pooling", "Dense")
"""Modules of sentence-transformers that cannot be loaded without their config.json."""
_OTHER_KINDS = {
    "SparseEncoder": "its embeddings are sparse",
    "CrossEncoder": "it scores pairs, and embeds no text",
    "MultiVectorEncoder": "it gives a text several embeddings",
}


@dataclass(frozen=True)
class SavedModel:
    """A model in a folder, or in the cache of the hub; of what is not there yet, nothing is known."""

    path: str
    role: str
    """What to call it in an error: ``student``, ``guide``."""
    revision: str | None = None

    @cached_property
    def folder(self) -> Path | None:
        """The folder; None for a name of the hub."""
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    @property
    def is_here(self) -> bool:
        """Whether anything of it can be read."""
        return self.folder is not None or any(self._read(name) is not None for name in MARKERS)

    @cached_property
    def modules(self) -> list[dict[str, Any]] | None:
        """The modules of a model of sentence-transformers; None where the folder is one of plain transformers."""
        return self._read("modules.json")

    @property
    def prompts(self) -> dict[str, str]:
        """By name, as loading makes them: without a saved one, those for queries and documents are empty."""
        saved = self._of_sentence_transformers.get("prompts") or {}
        return {"query": "", "document": "", **{name: prompt or "" for name, prompt in saved.items()}}

    @property
    def default_prompt_name(self) -> str | None:
        return self._of_sentence_transformers.get("default_prompt_name")

    @property
    def similarity(self) -> str | None:
        """By which its embeddings are compared; None of a model that is not here."""
        saved = self._of_sentence_transformers.get("similarity_fn_name") or SIMILARITIES[0]
        return saved if self.is_here else None

    @property
    def adapter_base(self) -> str | None:
        """Where its weights are those of an adapter of peft: the model that they go with."""
        adapter = self._read(self._transformer + "adapter_config.json")
        return None if adapter is None else str(adapter.get("base_model_name_or_path"))

    @property
    def routes(self) -> list[str]:
        """The routes of a ``Router``, which reads queries by other modules than documents; empty where it has none."""
        structure = (self._read(self._transformer + "router_config.json") or {}).get("structure") or {}
        return sorted(structure)

    @property
    def pooling(self) -> str | None:
        """How sentence-transformers pools the tokens of a model of plain transformers; None where it is its own."""
        config = self._read("config.json")
        if self.modules is not None or config is None:
            return None
        causal = ((config.get("architectures") or [""])[0]).endswith("ForCausalLM") and config.get("is_causal", True)
        return "last-token pooling" if causal else "mean pooling"

    @cached_property
    def positions(self) -> int | None:
        """Tokens of a text that it has position embeddings for; None where it has no table of them, or it cannot be
        told from the configuration alone."""
        import torch
        from transformers import AutoConfig, AutoModel

        try:
            config = AutoConfig.from_pretrained(**self._where, local_files_only=True)
            rotary = any(getattr(config, name, None) for name in ("rope_parameters", "rope_theta", "rope_scaling"))
            if rotary or not (getattr(config, "max_position_embeddings", None) or 0) > 0:
                return None
            with torch.device("meta"):
                return positions(AutoModel.from_config(config))
        except Exception:  # of a kind that only its own code can make: found when it is loaded
            return None

    @cached_property
    def max_seq_length(self) -> int | None:
        """Tokens of a text that it reads, as it was saved; None where nothing says."""
        saved = (self._read(self._transformer + "sentence_bert_config.json") or {}).get("max_seq_length")
        if saved is None:
            # As sentence-transformers does; it does not ask at which place a model starts counting.
            tokenizer = self._read(self._transformer + "tokenizer_config.json") or {}
            config = self._read(self._transformer + "config.json") or {}
            known = tokenizer.get("model_max_length"), config.get("max_position_embeddings")
            saved = min((length for length in known if length is not None and length > 0), default=None)
        return None if saved is None or saved > _NO_LENGTH else int(saved)

    @cached_property
    def width(self) -> int | None:
        """The width of its embeddings; None where its small files do not tell: its last modules are of a kind that is
        not known, or damaged, which loading it tells."""
        from sentence_transformers.base.modules import Dense
        from sentence_transformers.sentence_transformer.modules import Pooling

        name = str(self.folder or self.path)
        where: dict[str, Any] = {"revision": self.revision, "local_files_only": True}
        for module in reversed(self.modules or []):
            kind, place = module.get("type", "").rpartition(".")[2], module.get("path")
            try:
                if kind == "Dense":
                    return int(Dense.load_config(name, subfolder=place, **where)["out_features"])
                if kind == "Pooling":
                    config = Pooling.load_config(name, subfolder=place, **where)
                    return int(Pooling(**config).get_embedding_dimension())
            except Exception:  # of whatever kind: a damaged file
                return None
            if kind not in ("Normalize", "Dropout", "LayerNorm"):
                return None
        return None

    def check(self, *, trust_remote_code: bool, switch: str, tokenizer: bool = True) -> None:
        """Refuse what could not be loaded as a model of dense embeddings.

        Args:
            switch: how the user says that the model's code may run.
            tokenizer: whether to read its tokenizer too.

        Raises:
            InputError: it is of another kind, its files are not all there, or it has code of its own that is not
                trusted.
        """
        kind = self._of_sentence_transformers.get("model_type")
        if kind is None and "sentence_transformers" in (self._read("config.json") or {}):
            kind = "CrossEncoder"
        if kind is None and any(".sparse_encoder." in module.get("type", "") for module in self.modules or []):
            kind = "SparseEncoder"
        if kind in _OTHER_KINDS:
            raise InputError(
                f"{self.role}: {self.path} is a {kind}: {_OTHER_KINDS[kind]}; a SentenceTransformer is needed."
            )
        code = self.own_code
        if code and not trust_remote_code:
            raise InputError(
                f"{self.role}: {self.path} comes with code of its own ({code}), which would run here. Read it, and if "
                f"you trust it, set {switch}."
            )
        if self.folder is not None:
            self._check_files(self.folder)
        if tokenizer:
            check_tokenizer(self._tokenizer, self.path, self.role)

    @cached_property
    def _of_sentence_transformers(self) -> dict[str, Any]:
        return self._read("config_sentence_transformers.json") or {}

    @property
    def _transformer(self) -> str:
        """Where its first module is, as the beginning of a file's name."""
        path = self.modules[0].get("path", "") if self.modules else ""
        return f"{path}/" if path else ""

    @property
    def _is_transformer(self) -> bool:
        """Whether its first module is the one that sentence-transformers has for a model of transformers."""
        first = self.modules[0].get("type", "") if self.modules else "sentence_transformers.Transformer"
        return first.startswith("sentence_transformers.") and first.endswith("Transformer")

    @property
    def _where(self) -> dict[str, Any]:
        """The arguments of transformers that name the configuration."""
        if self.adapter_base is not None:
            return {"pretrained_model_name_or_path": self.adapter_base}
        if self.folder is not None:
            return {"pretrained_model_name_or_path": self.folder / self._transformer}
        return {
            "pretrained_model_name_or_path": self.path,
            "revision": self.revision or "main",
            "subfolder": self._transformer,
        }

    @property
    def _tokenizer(self) -> Any:
        """Its tokenizer; None where it can only be found with the model."""
        from transformers import AutoTokenizer

        if not self._is_transformer or self.adapter_base is not None or not self.is_here:
            return None
        try:
            return AutoTokenizer.from_pretrained(**self._where, local_files_only=True)
        except Exception:  # of a kind of its own: found, or missed, when the model is loaded
            return None

    @property
    def own_code(self) -> str | None:
        """The code that it brings, by the name under which it asks for it."""
        for module in self.modules or []:
            if not module.get("type", "sentence_transformers.").startswith("sentence_transformers."):
                return module["type"]
        config = self._read(self._transformer + "config.json") or {}
        from transformers import CONFIG_MAPPING

        if config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
            return str(next(iter(config["auto_map"].values())))
        return None

    def _check_files(self, folder: Path) -> None:
        """Raise `InputError` where a file is missing or cut off, as where saving or copying was."""
        for module in self.modules or []:
            name = module.get("type", "").rpartition(".")[2]
            if name in _WITH_SETTINGS and not (folder / module.get("path", "") / "config.json").is_file():
                self._refuse(f"{module.get('path')}/config.json is missing")
        place = folder / self._transformer
        if not place.is_dir():
            self._refuse(f"{self._transformer} is missing")
        if not self._is_transformer:
            return
        if not (place / "config.json").is_file() and self.adapter_base is None:
            self._refuse(f"{self._transformer}config.json is missing")
        if not any(any(place.glob(pattern)) for pattern in _TOKENIZERS):
            # transformers would go on with a tokenizer that knows no word.
            self._refuse("there is no tokenizer, as tokenizer.json")
        files = [file for file in place.iterdir() if file.suffix in _WEIGHTS and file.name != "training_args.bin"]
        for index in place.glob("*.index.json"):
            shards = set((self._read(self._transformer + index.name) or {}).get("weight_map", {}).values())
            if missing := sorted(shards - {file.name for file in files}):
                self._refuse(f"{index.name} names {missing[0]}, which is missing")
        if not files:
            self._refuse("there are no weights, as model.safetensors")
        for file in files:
            if file.suffix == ".safetensors":
                from safetensors import SafetensorError, safe_open

                try:
                    with safe_open(file, "pt"):
                        pass
                except (SafetensorError, OSError) as error:
                    self._refuse(f"{file.name} is damaged or cut off: {first_line(error)}")

    def _refuse(self, problem: str) -> None:
        raise InputError(f"{self.role}: {self.path} is no whole model: {problem}. Save or copy it again.")

    def _read(self, name: str) -> Any:
        """A JSON file of the model; None where it has none, or it is not here."""
        if self.folder is not None:
            file = self.folder / name
        else:
            from huggingface_hub import try_to_load_from_cache

            found = try_to_load_from_cache(self.path, name, revision=self.revision)
            if not isinstance(found, str):
                return None
            file = Path(found)
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.role}: {self.path} cannot be loaded as a model ({name}: expected JSON: {error})."
            ) from None


def check_tokenizer(tokenizer: Any, path: str, role: str) -> None:
    """Refuse a tokenizer that cannot serve: without a vocabulary, which transformers makes where files are missing, or
    without a token to pad with.

    Args:
        tokenizer: of another kind than transformers' own, or None: not looked at.

    Raises:
        InputError: naming the model and what to do.
    """
    if not hasattr(tokenizer, "all_special_tokens"):
        return
    special = list(tokenizer.all_special_tokens)
    if not set(tokenizer.get_vocab()) - set(special):
        raise InputError(
            f"{role}: {path}: its tokenizer knows no token but {', '.join(special)}, so files of it are missing "
            "(tokenizer.json, or its vocabulary). Save or copy it again."
        )
    if tokenizer.pad_token is None:
        token = tokenizer.eos_token or "<a token of its vocabulary>"
        raise InputError(
            f'{role}: {path}: its tokenizer has no token to pad with; add "pad_token": {token!r} to its '
            "tokenizer_config.json."
        )
