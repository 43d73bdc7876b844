"""How wide a model's embeddings are, by its small files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def saved_width(path: str, revision: str | None = None) -> int | None:
    """The width of the embeddings of a model that is in a folder or in the hub's cache.

    None where its small files do not tell: it is not here yet, or its last modules are of a kind that is not known.
    """
    from sentence_transformers.base.modules import Dense
    from sentence_transformers.sentence_transformer.modules import Pooling

    where: dict[str, Any] = {"revision": revision, "local_files_only": True}
    name = str(Path(path).expanduser())
    try:
        file = Pooling.load_file_path(name, "modules.json", **where)
        modules = [] if file is None else json.loads(Path(file).read_text(encoding="utf-8"))
        for module in reversed(modules):
            kind = module["type"].rpartition(".")[2]
            if kind == "Dense":
                return int(Dense.load_config(name, subfolder=module["path"], **where)["out_features"])
            if kind == "Pooling":
                config = Pooling.load_config(name, subfolder=module["path"], **where)
                return int(Pooling(**config).get_embedding_dimension())
            if kind not in ("Normalize", "Dropout", "LayerNorm"):
                return None
    except Exception:  # of files that are damaged, which loading the model tells
        return None
    return None
