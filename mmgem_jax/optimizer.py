"""One optax chain from the config; every parameter is covered by exactly one group."""

import re

import jax
import optax

from mmgem_jax.errors import UserError
from mmgem_jax.sharding import path_name

# Parameters that weight decay pulls to zero: matrices, not norms, biases or positions.
DECAYED = ("kernel", "embedding", "head")


def group_labels(groups, params):
    """The group of each parameter, as a tree of names.

    Args:
      groups: mapping from a group's name to its settings; `pattern` is a regular expression that
        matches whole parameter paths such as `vision/blocks/query/kernel`.
      params: tree of parameters.

    Raises:
      UserError: a parameter that no group or more than one group matches, a group that matches
        none, or a pattern that is no regular expression.
    """
    patterns = {group: compile_pattern(group, groups[group].pattern) for group in groups}

    def label(path, _):
        name = path_name(path)
        found = [group for group in groups if patterns[group].fullmatch(name)]
        if len(found) != 1:
            raise UserError(
                f"optimizer.groups: parameter {name} is matched by {found or 'no group'}; "
                "expected exactly one"
            )
        return found[0]

    labels = jax.tree_util.tree_map_with_path(label, params)
    unused = sorted(set(groups) - set(jax.tree.leaves(labels)))
    if unused:
        raise UserError(
            f"optimizer.groups.{unused[0]}.pattern: {groups[unused[0]].pattern!r} matches "
            "no parameter"
        )
    return labels


def compile_pattern(group, pattern):
    """The regular expression of a group."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"optimizer.groups.{group}.pattern: {pattern!r} is no regular expression ({error})"
        ) from None


def schedule(config):
    """Share of a group's learning rate at a step: linear warm-up, then cosine to `final_share`."""
    if config.warmup_steps >= config.total_steps:
        raise UserError(
            f"optimizer.warmup_steps: {config.warmup_steps} is not below the run's "
            f"{config.total_steps} steps"
        )
    return optax.schedules.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=1.0,
        warmup_steps=config.warmup_steps,
        decay_steps=config.total_steps,
        end_value=config.final_share,
    )


def make_optimizer(config):
    """Clipping by the global norm, then each group's own rule.

    Args:
      config: `config.optimizer` with `total_steps` filled in; fields in configs/base.py.

    Returns:
      An optax GradientTransformation over the whole tree of parameters.
    """
    share = schedule(config)
    rules = {name: group_rule(name, group, config, share) for name, group in config.groups.items()}
    partition = optax.partition(rules, lambda params: group_labels(config.groups, params))
    if config.clip_norm <= 0:
        return partition
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), partition)


def group_rule(name, group, config, share):
    """The optax rule of one group."""

    def learning_rate(step):
        return group.learning_rate * share(step)

    if group.algorithm == "frozen":
        return optax.set_to_zero()
    if group.algorithm == "adamw":
        return optax.adamw(
            learning_rate,
            b1=config.adam_b1,
            b2=config.adam_b2,
            eps=config.adam_epsilon,
            weight_decay=group.weight_decay,
            mask=decay_mask,
        )
    if group.algorithm == "muon":
        return optax.contrib.muon(
            learning_rate,
            beta=config.muon_beta,
            weight_decay=group.weight_decay,
            weight_decay_mask=decay_mask,
            muon_weight_dimension_numbers=matrix_axes,
        )
    raise UserError(
        f"optimizer.groups.{name}.algorithm: {group.algorithm!r}; expected adamw, muon or frozen"
    )


def decay_mask(params):
    """True for the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path_name(path).split("/")[-1] in DECAYED, params
    )


def matrix_axes(params):
    """Muon's matrices are the last two axes, [in, out]; an axis before them is the stack's."""

    def axes(path, leaf):
        if path_name(path).split("/")[-1] not in DECAYED:
            raise UserError(f"optimizer.groups: muon takes matrices; {path_name(path)} is none")
        return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def stop_frozen(groups, params):
    """The same parameters, without gradients where their group is frozen."""
    labels = group_labels(groups, params)
    return jax.tree.map(
        lambda label, param: (
            jax.lax.stop_gradient(param) if groups[label].algorithm == "frozen" else param
        ),
        labels,
        params,
    )
