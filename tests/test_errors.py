"""Every illegal argument: the right exception, which names the argument, its value and the limit."""

import jax
import jax.numpy as jnp
import pytest
from jax.lax import DotAlgorithmPreset, Precision

import jax_na
from jax_na._spec import canonical_precision

Q = jnp.zeros((2, 8, 9, 4, 16))
K = jnp.zeros((2, 8, 9, 2, 16))


def attend(query=Q, key=K, value=K, window_size=3, **kwargs):
    return jax_na.neighborhood_attention(query, key, value, window_size, **kwargs)


@pytest.mark.parametrize(
    "kwargs, error, words",
    [
        (dict(window_size=0), ValueError, ["window_size=0", "axis 0", "at least 1"]),
        (dict(window_size=(3, -2)), ValueError, ["window_size=-2", "axis 1", "at least 1"]),
        (dict(window_size=(3, 3, 3)), ValueError, ["window_size=(3, 3, 3)", "3 entries", "2 spatial axes"]),
        (dict(window_size=2.5), TypeError, ["window_size", "2.5"]),
        (dict(window_size="7"), TypeError, ["window_size", "'7'"]),
        (dict(window_size=True), TypeError, ["window_size", "True"]),
        (dict(window_size=20, dilation=20), ValueError, ["window_size=20", "dilation=20", "<= 8. Pad the input"]),
        (dict(query=None), TypeError, ["query is None"]),
        (dict(value=None), TypeError, ["value is None"]),
        (dict(query=Q[..., :0], key=K[..., :0]), ValueError, ["head_dim of query is 0", "at least 1"]),
        (dict(value=K[..., :0]), ValueError, ["head_dim of value is 0", "at least 1"]),
        (dict(query=Q[..., :0, :]), ValueError, ["heads of query is 0", "at least 1"]),
        (dict(scale=jnp.ones(3)), TypeError, ["scale", "multiply query by a traced scale"]),
        (dict(deterministic="yes"), TypeError, ["deterministic", "'yes'"]),
        (dict(window_size=9), ValueError, ["window_size=9", "axis 0", "<= 8", "shrink_window=True"]),
        (dict(dilation=(1, 4)), ValueError, ["dilation=4", "axis 1", "12", "<= 9", "at most 2", "at most 3"]),
        (dict(dilation=0), ValueError, ["dilation=0", "axis 0", "at least 1"]),
        (dict(stride=4), ValueError, ["stride=4", "axis 0", "window_size=3", "stride <= window_size"]),
        (dict(stride=0), ValueError, ["stride=0", "at least 1"]),
        (dict(is_causal=(True,)), ValueError, ["is_causal", "1 entries", "2 spatial axes"]),
        (dict(is_causal=1), TypeError, ["is_causal", "1"]),
        (dict(scale=float("nan")), ValueError, ["scale=nan", "finite"]),
        (dict(scale="big"), TypeError, ["scale", "'big'"]),
        (dict(scale="0.5"), TypeError, ["scale", "'0.5'"]),
        (dict(scale=10**400), ValueError, ["scale=inf", "finite"]),
        (dict(precision="extreme"), ValueError, ["precision='extreme'", "highest"]),
        (dict(precision={}), ValueError, ["precision={}", "highest"]),
        (dict(implementation="magic"), ValueError, ["implementation='magic'", "xla", "reference"]),
        (dict(implementation=["xla"]), ValueError, ["implementation=['xla']", "xla", "reference"]),
        (dict(query=Q[0, 0, 0]), ValueError, ["query", "(4, 16)", "1, 2 or 3 spatial axes"]),
        (dict(query=Q.astype(jnp.int32)), TypeError, ["query", "int32", "bfloat16"]),
        (dict(key=K.astype(jnp.bfloat16)), TypeError, ["key", "bfloat16", "float32"]),
        (dict(key=K[:, :7]), ValueError, ["key", "(2, 7, 9, 2, 16)", "(2, 8, 9, 2, 16)"]),
        (dict(key=K[0]), ValueError, ["same number of axes", "(8, 9, 2, 16)"]),
        (dict(key=K[0, 0]), ValueError, ["key", "(9, 2, 16)", "1, 2 or 3 spatial axes"]),
        (dict(value=K[..., :1, :]), ValueError, ["value", "(2, 8, 9, 1, 16)", "kv_heads"]),
        (
            dict(key=jnp.zeros((2, 8, 9, 3, 16)), value=jnp.zeros((2, 8, 9, 3, 16))),
            ValueError,
            ["4 heads", "3", "multiple"],
        ),
        (dict(bias=jnp.zeros((4, 5, 4))), ValueError, ["bias", "(4, 5, 4)", "(4, 5, 5)"]),
        (dict(window_size=4, bias=jnp.zeros((4, 7, 7))), ValueError, ["bias", "odd window_size", "(4, 4)"]),
        (dict(additional_keys=K[:, 0]), ValueError, ["additional_keys and additional_values"]),
        (
            dict(additional_keys=K[:, 0], additional_values=K[:, 0, :4]),
            ValueError,
            ["additional_values", "(2, 4, 2, 16)", "(2, 9, 2, 16)"],
        ),
        (dict(additional_keys=K, additional_values=K), ValueError, ["additional_keys", "4 axes"]),
    ],
)
def test_illegal_argument(kwargs, error, words):
    with pytest.raises(error) as caught:
        attend(**kwargs)
    message = str(caught.value)
    assert all(word in message for word in words), message


def test_windows_shrink_on_request():
    query = jnp.linspace(0, 1, Q.size).reshape(Q.shape)
    small = attend(query, window_size=20, dilation=(1, 2), shrink_window=True)
    fitting = attend(query, window_size=(8, 4), dilation=(1, 2))
    assert (small == fitting).all()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("BF16_BF16_F32", Precision.DEFAULT),
        (DotAlgorithmPreset.TF32_TF32_F32, Precision.HIGH),
        (["high", "default"], Precision.HIGH),
        ("F32_F32_F32", Precision.HIGHEST),
    ],
)
def test_precision_as_jax_spells_it(given, meant):
    """The names of algorithms, too, that `jax_default_matmul_precision` may hold."""
    assert canonical_precision(given) is meant
    if isinstance(given, str):
        with jax.default_matmul_precision(given):
            assert canonical_precision(None) is meant
