"""Schedules by hand, optimizers against torch, what decays, what is clipped by which norm, where moments lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from rljax.optim import (
    OptimConfig,
    decay_mask,
    global_norm,
    make_optimizer,
    make_schedule,
    state_shardings,
    tree_norms,
    update_ratios,
)

pytestmark = pytest.mark.fast


def rates(total_steps: int, **config) -> list[float]:
    schedule = make_schedule(OptimConfig(learning_rate=1.0, **config), total_steps)
    return [float(schedule(step)) for step in range(total_steps + 2)]


def test_linear_by_hand():
    # w = 3: 1/4, 2/4, 3/4, then 1 - (s - 3)/(8 - 3), and 0 from step 8 on.
    expected = [0.25, 0.5, 0.75, 1, 0.8, 0.6, 0.4, 0.2, 0, 0]
    np.testing.assert_allclose(rates(8, schedule="linear", warmup_steps=3), expected, atol=1e-7)


def test_cosine_by_hand():
    # No warm-up, 4 steps, floor 0.2: 0.2 + 0.8 (1 + cos(pi s / 4)) / 2, with cos(pi/4) = 0.70710678.
    expected = [1, 0.2 + 0.4 * 1.70710678, 0.6, 0.2 + 0.4 * 0.29289322, 0.2, 0.2]
    np.testing.assert_allclose(rates(4, schedule="cosine", final_learning_rate=0.2), expected, atol=1e-7)


def test_inverse_sqrt_by_hand():
    # w = 3: 1/4, 2/4, 3/4, 1, then sqrt(4/n) with n = 5, 6, 7, 8, 9 ..., not below 0.7: sqrt(4/9) = 0.667 is.
    expected = [0.25, 0.5, 0.75, 1, 0.8944272, 0.8164966, 0.7559289, 0.7071068, 0.7, 0.7]
    np.testing.assert_allclose(
        rates(8, schedule="inverse_sqrt", warmup_steps=3, final_learning_rate=0.7), expected, atol=1e-7
    )


def test_constant_and_warmup_fraction():
    np.testing.assert_allclose(rates(6, warmup_fraction=1 / 3), [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1], atol=1e-7)
    assert rates(1, warmup_fraction=0.1) == [1.0, 1.0, 1.0]


def test_schedule_is_the_same_traced():
    schedule = make_schedule(OptimConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=5), 50)
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(50))
    np.testing.assert_allclose(traced, [float(schedule(s)) for s in range(50)], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schedule": "cosin"}, "optim.schedule 'cosin'"),
        ({"name": "adam"}, "optim.name 'adam'"),
        ({"learning_rate": float("nan")}, "optim.learning_rate"),
        ({"clip_norm": -1.0}, "optim.clip_norm"),
        ({"b2": 1.0}, "optim.b2"),
        ({"eps": 0.0}, "optim.eps"),
        ({"warmup_steps": 3, "warmup_fraction": 0.1}, "both set"),
        ({"final_learning_rate": 0.1}, "does nothing on a constant schedule"),
        ({"schedule": "inverse_sqrt"}, "set optim.warmup_steps"),
    ],
)
def test_bad_configs_name_their_key(change, named):
    with pytest.raises(ValueError, match=named):
        OptimConfig(**{"learning_rate": 1.0, **change})


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match="50 warm-up steps do not fit into a run of 50"):
        make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=50), 50)


def stacked_params(rng: np.random.Generator) -> dict:
    return {
        "embed": rng.normal(size=(7, 4)),
        "layers": {
            "attention_norm": rng.normal(size=(2, 4)),
            "q": rng.normal(size=(2, 4, 4)),
            "q_bias": np.ones((2, 4)),
        },
        "head": {"scale": np.ones(4)},
    }


def test_decay_mask_reads_the_path():
    params = stacked_params(np.random.default_rng(0))
    layers = {"attention_norm": False, "q": True, "q_bias": False}
    assert decay_mask(params) == {"embed": True, "layers": layers, "head": {"scale": False}}
    assert decay_mask(params, decay_embeddings=False)["embed"] is False


def torch_run(name: str, config: OptimConfig, params: dict, gradients: list[dict], total_steps: int) -> dict:
    """The same steps in torch, float64: clipping and the schedule by hand, decay only where the mask says."""
    mask = jax.tree.leaves(decay_mask(params))
    leaves, treedef = jax.tree.flatten(params)
    tensors = [torch.tensor(x, requires_grad=True) for x in leaves]
    groups = [{"params": [t], "weight_decay": config.weight_decay * m} for t, m in zip(tensors, mask, strict=True)]
    betas = (config.b1, config.b2)
    make = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.eps),
        "sgd": lambda: torch.optim.SGD([{"params": tensors}], lr=1.0, momentum=config.b1),
        "rmsprop": lambda: torch.optim.RMSprop([{"params": tensors}], lr=1.0, alpha=config.b2, eps=config.eps),
    }
    optimizer = make[name]()
    schedule = make_schedule(config, total_steps)
    for step, gradient in enumerate(gradients):
        flat = jax.tree.leaves(gradient)
        norm = np.sqrt(sum((g**2).sum() for g in flat))
        for tensor, g in zip(tensors, flat, strict=True):
            tensor.grad = torch.tensor(g * min(1.0, config.clip_norm / norm))
        for group in optimizer.param_groups:
            group["lr"] = float(schedule(step))
        optimizer.step()
    return jax.tree.unflatten(treedef, [t.detach().numpy() for t in tensors])


@pytest.mark.parametrize("name", ["adamw", "sgd", "rmsprop"])
def test_updates_match_torch(name):
    rng = np.random.default_rng(1)
    params = {"policy": stacked_params(rng)}
    # Norms from 0.5 to 20: some steps are clipped at 3, some are not.
    gradients = [jax.tree.map(lambda x, s=s: s * rng.normal(size=x.shape), params) for s in (0.05, 2, 0.2, 1, 0.1)]
    decay = 0.1 if name == "adamw" else 0.0
    with jax.enable_x64(True):
        config = OptimConfig(
            learning_rate=1e-2, schedule="cosine", warmup_steps=2, name=name, clip_norm=3.0, weight_decay=decay
        )
        expected = torch_run(name, config, params, gradients, 5)
        optimizer = make_optimizer({"policy": config}, 5)
        state, ours = optimizer.init(params), jax.tree.map(jnp.asarray, params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, ours)
            ours = optax.apply_updates(ours, updates)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert a.dtype == jnp.float64
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_adamw_first_step_by_hand():
    # m = .1 g, v = .001 g², both corrected to g and g²: the step is lr (g/|g| + wd p) = .1 (1 + .5·2) = .2 for p = 2.
    # In float64, because 1 - b2 costs float32 four digits on the first step.
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=0.0)
    optimizer = make_optimizer({"policy": config}, 1)
    with jax.enable_x64(True):
        params = {"policy": {"w": jnp.full((1, 1), 2.0)}}
        updates, _ = optimizer.update({"policy": {"w": jnp.full((1, 1), 3.0)}}, optimizer.init(params), params)
        np.testing.assert_allclose(updates["policy"]["w"], [[-0.2]], rtol=1e-8)


TREES = {"policy": {"w": jnp.zeros(2)}, "critic": {"w": jnp.zeros(2)}}
GRADIENTS = {
    "policy": {"w": jnp.array([3.0, 4.0])},
    "critic": {"w": jnp.array([0.0, 12.0])},
}  # norms 5, 12; together 13


def sgd_step(clip_scope: str, policy: OptimConfig, critic: OptimConfig) -> dict:
    optimizer = make_optimizer({"policy": policy, "critic": critic}, 10, clip_scope=clip_scope)
    return optimizer.update(GRADIENTS, optimizer.init(TREES), TREES)[0]


def test_each_tree_has_its_own_rate_and_clip():
    updates = sgd_step(
        "tree",
        OptimConfig(learning_rate=1.0, name="sgd", clip_norm=1.0),
        OptimConfig(learning_rate=0.5, name="sgd", clip_norm=0.0, schedule="linear", warmup_steps=4),
    )
    np.testing.assert_allclose(updates["policy"]["w"], [-0.6, -0.8], rtol=1e-6)  # 5 -> 1
    np.testing.assert_allclose(updates["critic"]["w"], [0.0, -1.2], rtol=1e-6)  # rate 0.5 / 5, not clipped


def test_joint_clip_keeps_the_proportion_of_the_trees():
    config = OptimConfig(learning_rate=1.0, name="sgd", clip_norm=6.5)
    updates = sgd_step("joint", config, config)  # 13 -> 6.5: everything halves
    np.testing.assert_allclose(updates["policy"]["w"], [-1.5, -2.0], rtol=1e-6)
    np.testing.assert_allclose(updates["critic"]["w"], [0.0, -6.0], rtol=1e-6)


def test_trees_that_do_not_match_are_refused():
    config = OptimConfig(learning_rate=1.0)
    with pytest.raises(ValueError, match=r"configs for \['policy'\], but the trained trees are \['critic', 'policy'\]"):
        make_optimizer({"policy": config}, 1).init(TREES)
    with pytest.raises(ValueError, match=r"one clip_norm for all trees, not \[0.5, 1.0\]"):
        make_optimizer({"a": config, "b": OptimConfig(learning_rate=1.0, clip_norm=0.5)}, 1, clip_scope="joint")
    with pytest.raises(ValueError, match="clip_scope 'both'"):
        make_optimizer({"a": config}, 1, clip_scope="both")


def test_moments_are_born_where_their_parameters_lie():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
    shapes = {"policy": {"w": (16, 4), "norm": (4,)}, "critic": {"w": (8,)}}
    params = jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))
    where = {"policy": {"w": split, "norm": whole}, "critic": {"w": split}}
    optimizer = make_optimizer({"policy": OptimConfig(learning_rate=1.0), "critic": OptimConfig(learning_rate=2.0)}, 9)
    shardings = state_shardings(jax.eval_shape(optimizer.init, params), where, whole)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)
    for moment in optax.tree.get_all_with_path(state, "mu") + optax.tree.get_all_with_path(state, "nu"):
        tree = next(key for key in ("policy", "critic") if key in str(moment[0]))
        assert moment[1][tree]["w"].sharding.is_equivalent_to(split, moment[1][tree]["w"].ndim)
    assert {x.sharding.spec for x in jax.tree.leaves(state) if x.ndim == 0} == {PartitionSpec()}


def test_norms_and_ratios():
    assert {k: float(v) for k, v in tree_norms(GRADIENTS).items()} == {"policy": 5.0, "critic": 12.0}
    assert float(global_norm(GRADIENTS)) == 13.0
    assert float(global_norm({})) == 0.0
    # 300 squares of 1 in bfloat16 stop growing at 256; the sum must not.
    assert float(global_norm(jnp.ones(300, jnp.bfloat16))) == pytest.approx(300**0.5, rel=1e-6)
    ratios = update_ratios(
        TREES | {"critic": {"w": jnp.ones(2)}}, {"policy": TREES["policy"], "critic": GRADIENTS["critic"]}
    )
    assert float(ratios["policy"]) == 0.0
    assert float(ratios["critic"]) == pytest.approx(2**0.5 / 12, rel=1e-6)


def test_a_tree_that_is_held_stays_as_it_is_and_then_begins_at_its_own_step_0():
    held = OptimConfig(learning_rate=0.1, freeze_steps=2, weight_decay=0.1, schedule="linear", warmup_steps=1)
    free = OptimConfig(learning_rate=0.1)
    params = {"policy": jnp.asarray([1.0, -2.0]), "critic": jnp.asarray([0.5])}
    optimizer = make_optimizer({"policy": held, "critic": free}, 6)
    alone = make_optimizer({"policy": OptimConfig(**{**vars(held), "freeze_steps": 0})}, 4)
    state, alone_state = optimizer.init(params), alone.init({"policy": params["policy"]})
    now, expected = params, {"policy": params["policy"]}
    for step in range(4):
        gradients = {"policy": jnp.asarray([3.0, step + 1.0]), "critic": jnp.asarray([1.0])}
        updates, state = optimizer.update(gradients, state, now)
        now = optax.apply_updates(now, updates)
        if step < 2:
            np.testing.assert_array_equal(now["policy"], params["policy"])  # to the bit
            assert now["critic"][0] != params["critic"][0]
            continue
        # The moments of the held steps were not kept: from here on it is an optimizer that has just begun.
        updates, alone_state = alone.update({"policy": gradients["policy"]}, alone_state, expected)
        expected = optax.apply_updates(expected, updates)
        np.testing.assert_array_equal(now["policy"], expected["policy"])
