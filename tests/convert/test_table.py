"""Names and reshapes both ways: nothing is lost, nothing is left over."""

import jax
import numpy as np
import pytest
import tiny

from mmgem_jax.convert.table import decoder_places, model_places, to_params, to_weights


@pytest.mark.parametrize("tied", [False, True])
def test_ours_to_theirs_and_back_is_bit_for_bit(tied):
    setup = tiny.setup({"model.decoder.tie_embeddings": tied, "model.embedding_grid": 2})
    params = tiny.randomise(setup.params)
    places = model_places(setup.model.config)
    weights = dict(to_weights(params, places))
    assert ("language_model.lm_head.weight" in weights) != tied
    for name, place in places.items():
        assert weights[name].shape == place.their_shape(params), name
        assert weights[name].flags.c_contiguous and weights[name].dtype == np.float32, name
    back = to_params(weights, places)
    jax.tree.map(np.testing.assert_array_equal, back, jax.device_get(params))


def test_a_parameter_without_a_name_is_an_error():
    setup = tiny.setup()
    params = setup.params["decoder"] | {"bias": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"no name of theirs for \['bias'\]"):
        next(to_weights(params, decoder_places(setup.model.config.decoder)))
