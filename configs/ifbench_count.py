"""Following instructions: IFBench's constraints on counts (2507.02833), by a decoder from random weights.

    python -m rljax.main --config configs/ifbench_count.py

Prompts name a subject and how many words, different words or numbers to write: ``red fox, 3 to 5 words:``. The text
has 25 % of answers that do, the others pay no heed; GRPO is rewarded by the verifiers of IFBench. Held-out prompts are
of the same constraints, with other subjects and counts together.

Hardware: 2 CPU cores, 8 minutes beside other work. Measured (LOG.md): a held-out score of 0.064 after the warm start,
0.447 (0.404 to 0.490) after GRPO; `tests/test_ifbench_count.py` (slow) runs it.
"""

from ml_collections import ConfigDict

from configs.quickstart import get_config as quickstart
from rljax.data.constraints import ALPHABET


def get_config() -> ConfigDict:
    config = quickstart()
    config.name = "ifbench_count"
    config.tokenizer.path = f"characters:{ALPHABET}"
    config.data.train = config.data.dev = config.data.test = "constraints"
    with config.unlocked():
        config.data.options = ConfigDict({"ignored_share": 0.75})
    config.data.prompt_lengths = (32,)
    config.data.row_length = 88
    config.rollout.max_new_tokens = 56
    config.reward.names = ("ifeval",)
    config.stages.warm_start.steps = 600
    config.steps = 60
    return config
