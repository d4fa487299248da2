"""Writes docs/losses.md, one row for each public function of rljax.losses: ``python docs/make_losses_table.py``.

The equation and the paper come from the docstring, the test from the tests that mention the function, the names
elsewhere from the table below. A public function without a source or a test is an error.
"""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import rljax.losses

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "losses"

PLACE = r"(?:eqs?\.|section|sections|algorithm|details?) \d+(?:\.\d+)*(?:(?:, | and )\d+(?:\.\d+)*)*"
CITATION = re.compile(rf"\b\d{{4}}\.\d{{5}}(?:, {PLACE})?")

# Sources that are not on arXiv; "definition" marks what no paper has to be cited for.
SOURCES = {
    "cdpo": "ericmitchell.ai/cdpo.pdf",
    "huber_value_loss": "Huber 1964",
    "k1": "joschu.net/blog/kl-approx.html",
    "k2": "joschu.net/blog/kl-approx.html",
    "merge_moments": "Chan, Golub and LeVeque 1979",
    "reinforce": "Williams 1992",
}
DEFINITIONS = """
    aggregate append_rest batch_mean broadcast_to_tokens chunked_logprobs count_all_sequences count_sequences
    count_tokens empty_moments empty_percentile_scale entropy entropy_bonus fixed_kl_coef full_kl
    geometric_importance_weights group_ids group_max group_mean group_std group_sum head_logits importance_weights
    is_clipped_high is_clipped_low is_last_token k4 log_normalizer log_ratio mask_truncated masked_importance
    masked_mean masked_sum masked_var moments_of n_step_returns on_last_token rank_order rankings
    reduce_logits_in_chunks reward_to_go running_std sequence_importance_weights sequence_logprobs
    squared_value_loss straight_through symexp token_logprobs topk_divergence topk_logprobs truncated_logprobs
    two_hot two_hot_value valid_pairs zero_masked
"""
SOURCES |= dict.fromkeys(DEFINITIONS.split(), "definition")

# The name of the same thing in TRL, verl and open-instruct (OI), where it has one.
ELSEWHERE = {
    "adaptive_kl_coef": "verl `AdaptiveKLController`",
    "aggregate": "verl `agg_loss`",
    "alpha_score": 'TRL `f_divergence_type="alpha_divergence"`',
    "aot": 'TRL `loss_type="aot"`',
    "aot_unpaired": 'TRL `loss_type="aot_unpaired"`',
    "apo_down": 'TRL `loss_type="apo_down"`',
    "apo_zero": 'TRL `loss_type="apo_zero"`',
    "bco": "TRL `BCOTrainer`",
    "bco_loss": "TRL `BCOTrainer`",
    "bradley_terry": "TRL `RewardTrainer`, `margin` column; OI `reward_modeling.py`",
    "bradley_terry_loss": "TRL `RewardTrainer`",
    "cdpo": "TRL `label_smoothing`; OI `dpo_label_smoothing`",
    "centering_penalty": "TRL `center_rewards_coefficient`",
    "chunked_logprobs": "TRL, OI liger's fused losses",
    "cispo": 'TRL `loss_type="cispo"`; verl `cispo`',
    "clip_cov": "verl `clip_cov`",
    "clipped_surrogate": "TRL `epsilon`, `epsilon_high`; verl `vanilla`; OI `clip_lower`, `clip_higher`",
    "clipped_value_loss": "TRL `cliprange_value`; verl `compute_value_loss`",
    "constant_length": 'TRL `loss_type="dr_grpo"`; verl `seq-mean-token-sum-norm`',
    "cpo": "TRL `CPOTrainer`",
    "cpo_loss": "TRL `CPOTrainer`",
    "cross_entropy": "TRL `SFTTrainer`, `num_items_in_batch`",
    "dft": 'TRL `loss_type="dft"`',
    "dft_loss": 'TRL `SFTConfig(loss_type="dft")`',
    "dpo": 'TRL `loss_type="sigmoid"`; OI `dpo_loss`',
    "dpo_loss": "TRL `DPOTrainer`; OI `dpo`, and `dpo_norm` with `average=True`",
    "dual_clip": "verl `clip_ratio_c`",
    "entropy": "TRL, verl, OI `entropy_from_logits`",
    "entropy_bonus": "verl `entropy_coeff`",
    "exo": 'TRL `loss_type="exo_pair"`',
    "f_dpo": "TRL `f_divergence_type`",
    "fixed_kl_coef": "verl `FixedKLController`",
    "forward_kl": "TRL `GKDConfig(beta=0)`",
    "full_kl": "verl `kl_penalty: full`",
    "gae": "verl `compute_gae_advantage_return`; TRL `PPOTrainer`",
    "generalized_jsd": "TRL `generalized_jsd_loss`",
    "gkd_loss": "TRL `GKDTrainer`",
    "gmpo": "verl `geo_mean`",
    "gpg_advantages": "verl `compute_gpg_outcome_advantage`",
    "grpo_loss": "TRL `GRPOTrainer`; OI `grpo_fast.py`",
    "gspo": 'TRL `importance_sampling_level="sequence"`; verl `gspo`',
    "gspo_token": "verl `gspo`",
    "hinge": 'TRL `loss_type="hinge"`',
    "ipo": 'TRL `loss_type="ipo"`',
    "jensen_shannon": "TRL `generalized_jsd_loss`",
    "js_score": 'TRL `f_divergence_type="js_divergence"`',
    "k1": "verl `kl_penalty: kl`; OI `estimate_kl`",
    "k2": "verl `kl_penalty: mse`; OI `estimate_kl`",
    "k3": "TRL `beta` of GRPO; verl `kl_penalty: low_var_kl`; OI `estimate_kl`",
    "k4": "OI `estimate_kl`",
    "kl_cov": "verl `kl_cov`",
    "kto": 'TRL `loss_type="kto"`',
    "kto_loss": "TRL `KTOTrainer`",
    "ld_logprobs": "TRL `ld_alpha`",
    "leave_one_out": "TRL `RLOOTrainer`; verl `compute_rloo_outcome_advantage`",
    "mask_truncated": "TRL `mask_truncated_completions`",
    "masked_importance": 'TRL `vllm_importance_sampling_mode="token_mask"`',
    "masked_mean": "verl, OI `masked_mean`",
    "masked_sum": "verl `masked_sum`",
    "masked_var": "verl `masked_var`",
    "mix_reference": "TRL `sync_ref_model`, `ref_model_mixup_alpha`",
    "nash_md_per_token": "TRL `NashMDTrainer`",
    "nca": 'TRL `loss_type="nca_pair"`',
    "normalize_rewards": "TRL `scale_rewards`; OI `advantage_normalization_type`",
    "opo_baseline": "verl `compute_opo_outcome_advantage`",
    "orpo": "TRL `ORPOTrainer`",
    "orpo_loss": "TRL `ORPOTrainer`",
    "ppo_loss": "TRL `PPOTrainer`; verl `vanilla` + `compute_value_loss`",
    "process_loss": "TRL `PRMTrainer`",
    "reinforce_plus_plus": "verl `compute_reinforce_plus_plus_outcome_advantage`",
    "reinforce_plus_plus_baseline": "verl `compute_reinforce_plus_plus_baseline_outcome_advantage`",
    "remax": "verl `compute_remax_outcome_advantage`",
    "reverse_kl": "TRL `GKDConfig(beta=1)`",
    "robust_dpo": 'TRL `loss_type="robust"`',
    "sapo": 'TRL `loss_type="sapo"`; verl `sapo`',
    "sequence_importance_weights": "TRL `vllm_importance_sampling_mode`, sequence forms",
    "sft_loss": "TRL `SFTTrainer`",
    "simpo": 'TRL `CPOConfig(loss_type="simpo")`; OI `simpo_loss`, γ/β',
    "simpo_loss": 'TRL `CPOConfig(loss_type="simpo")`; OI `simpo`',
    "smoothed_cross_entropy": "torch `cross_entropy(label_smoothing=)`",
    "soft_overlong_penalty": "TRL `get_soft_overlong_punishment`; verl `overlong_buffer`",
    "sppo_hard": 'TRL `loss_type="sppo_hard"`',
    "token_logprobs": "TRL `selective_log_softmax`; verl `logprobs_from_logits`; OI `log_softmax_and_gather`",
    "truncated_importance": 'TRL `vllm_importance_sampling_mode="token_truncate"`; '
    "OI `truncated_importance_sampling_ratio_cap`",
    "whiten": "TRL, verl `masked_whiten`",
    "wpo_weights": "TRL `use_weighting`; OI `wpo_loss`",
    "xpo": "TRL `XPOTrainer`",
}

INTRODUCTION = """# Losses and estimators

One row for each public function of `rljax.losses`, written by `docs/make_losses_table.py`; a test fails when this page
is not what the script writes. Numbers such as 2305.18290 are arXiv identifiers. Shapes, signs, normalisers and what an
empty mask gives stand in the docstrings. "Elsewhere" names the same thing in TRL, verl and open-instruct (OI).
"""


def table() -> str:
    tests = list(test_functions())
    functions = {name: f for name in rljax.losses.__all__ if inspect.isfunction(f := vars(rljax.losses)[name])}
    problems = [
        f"{name} is in SOURCES or ELSEWHERE but not public" for name in (SOURCES | ELSEWHERE).keys() - functions
    ]
    modules: dict[str, list[str]] = {}
    for name, function in functions.items():
        paper, test = source(name, function), pinning_test(name, function.__module__, tests)
        if not paper:
            problems.append(f"{name} has no arXiv number in its docstring and no entry in SOURCES")
        if not test:
            problems.append(f"{name} is mentioned by no test under tests/losses")
        row = (f"`{name}`", equation(function), paper, test, ELSEWHERE.get(name, ""))
        modules.setdefault(function.__module__, []).append(f"| {' | '.join(cell(x) for x in row)} |")
    if problems:
        raise SystemExit("docs/losses.md cannot be written: " + "; ".join(sorted(problems)) + ".")
    return "\n".join([INTRODUCTION, *(section(module, modules[module]) for module in sorted(modules))])


def section(module: str, rows: list[str]) -> str:
    title = module.rsplit(".", 1)[1]
    header = "| function | equation | source | pinned by | elsewhere |\n| --- | --- | --- | --- | --- |"
    return "\n".join([f"## {title}\n", header, *sorted(rows)]) + "\n"


def source(name: str, function) -> str:
    """Every paper the docstring cites, or the entry in SOURCES."""
    found = dict.fromkeys(CITATION.findall(inspect.getdoc(function) or ""))
    return "; ".join(found) or SOURCES.get(name, "")


def equation(function) -> str:
    """The docstring's first sentence without its citation."""
    first = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
    first = re.sub(r" \([^()]*\d{4}\.\d{5}[^()]*\)", "", first)
    return re.split(r"(?<![.])(?<!Dr)\.(?: |$)", first, maxsplit=1)[0].replace("``", "`")


def test_functions() -> Iterator[tuple[str, str, list[set[str]]]]:
    """(file, test, names it mentions: itself, then through module-level helpers and tables)."""
    for path in sorted(TESTS.glob("test_*.py")):
        body = ast.parse(path.read_text()).body
        helpers = {name: mentions(node) for node in body for name in defined(node)}
        for node in body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                direct = mentions(node)
                reached: set[str] = set()
                waiting = [name for name in direct if name in helpers]
                while waiting:
                    name = waiting.pop()
                    if name not in reached:
                        reached.add(name)
                        waiting += [n for n in helpers[name] if n in helpers]
                yield path.name, node.name, [direct, {n for name in reached for n in helpers[name]}]


def defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [n.id for target in node.targets for n in ast.walk(target) if isinstance(n, ast.Name)]
    return []


def mentions(node: ast.stmt) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def pinning_test(name: str, module: str, tests) -> str:
    """The most telling test that mentions the function: of its module, named after it, by hand; then the others."""
    own_file = f"test_{module.rsplit('.', 1)[1]}.py"

    def rank(test) -> tuple:
        file, title, (direct, _) = test
        named = f"_{name}_" in f"{title}_"
        by_hand, refusal = "by_hand" in title, "refuse" in title
        return (file != own_file, refusal, not named, not by_hand, name not in direct, "torch" not in title)

    candidates = [test for test in tests if any(name in names for names in test[2])]
    if not candidates:
        return ""
    file, title, _ = min(candidates, key=rank)
    return f"`{file}::{title}`"


def cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs" / "losses.md").write_text(table())
