"""Speed, recall and memory, measured side by side with raw FAISS and with Lance's own index.

Run ``make bench``, or ``python -m benchmarks --help``. What is measured and how to read it:
``docs/explanation/benchmarks.md``.
"""
