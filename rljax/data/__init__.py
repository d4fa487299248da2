"""Datasets, tokenizers and chat templates in; fixed-shape NumPy batches out. The data position is a few integers."""
