"""Data sets, tokenizers and chat templates in; fixed-shape NumPy batches out. The position in the data is integers."""
