"""The data side leaf needs no jax: rows and batches are made where no accelerator library is."""

import subprocess
import sys

BLOCKED = """
import sys
sys.modules["jax"] = None  # an import of jax fails
from rljax.data import arithmetic, batches, overlap, preferences, rows, tokenizer
digits = tokenizer.character_tokenizer(arithmetic.ALPHABET)
source = batches.PromptSource(rows.load_rows("arithmetic"), digits, (16,), seed=0)
print(source.take(batches.DataPosition(), 2)[1].tokens.shape)
"""


def test_data_needs_no_jax():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", BLOCKED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "(2, 16)"
