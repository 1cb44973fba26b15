"""What a run leaves in its folder, of parameters that are noise, without training."""

import jax
import tiny

from mmgem_jax import run, run_folder, sharding, train_state
from mmgem_jax.checkpoint import Checkpoints
from mmgem_jax.data.pipeline import training_batches
from mmgem_jax.evaluation.suite import Evaluator, final_evaluation
from mmgem_jax.optimizer import make_optimizer


def save_run(config, workdir, steps):
    """Checkpoints and results of a run whose parameters are noise; the results and the states."""
    tokenizer = run.load_run_tokenizer(config)
    config = run.complete(config, tokenizer)
    mesh, model = sharding.make_mesh(config.mesh), run.build_model(config.model)
    optimizer, shapes = make_optimizer(config.optimizer), run.batch_shapes(config)
    abstract = train_state.abstract_state(model, optimizer, True, shapes, mesh)
    batches, states = training_batches(config, tokenizer), {}
    run_folder.claim_workdir(workdir, config, tokenizer)
    with sharding.use_mesh(mesh), Checkpoints(workdir) as checkpoints:
        state = train_state.init_state(model, optimizer, abstract, shapes, seed=0)
        for step in steps:
            params = tiny.randomise(state.params, step, 0.3)
            made = state.replace(params=params, average=tiny.randomise(params, step, 0.1))
            states[step] = jax.device_put(made, train_state.shardings_of(abstract))
            checkpoints.save(step, states[step], batches)
        evaluator = Evaluator(config, model, tokenizer, mesh)
        return final_evaluation(evaluator, states[step].eval_params, workdir, step), states
