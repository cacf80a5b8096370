"""PyTorch models written by others (transformers 4.x), with random weights, beside ours loaded from their state dicts."""

from __future__ import annotations

import argparse
import pathlib
import sys
import warnings

import numpy as np
import pytest
from flax import nnx

from flax_layers import WindowFitWarning, _tensor_files, checkpoints, models

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import natten_adapter

try:
    import torch
    import transformers
except ImportError as error:
    MISSING = f"{error.name} is not installed: pip install '.[parity]'"
else:
    # Later ones unpack DinatModel's 4-D tokens into three axes, and 5 has no NatModel.
    usable = tuple(map(int, transformers.__version__.split(".")[:2])) <= (4, 49)
    MISSING = None if usable else f"transformers {transformers.__version__} is newer than 4.49: pip install '.[parity]'"

EMBED_DIM, DEPTHS, HEADS = 32, (2, 1, 1), (1, 2, 4)
SHAPE = {"embed_dim": EMBED_DIM, "depths": list(DEPTHS), "num_heads": list(HEADS), "mlp_ratio": 3.0, "num_labels": 11}
DILATIONS = ((1, 3), (2,), (1,))


@pytest.fixture(scope="module")
def theirs():
    """PyTorch classifiers with every parameter random, also those that start as constants."""
    if MISSING is not None:
        pytest.skip(MISSING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        natten_adapter.install()
        from transformers import DinatConfig, NatConfig
        from transformers.models.deprecated.nat import modeling_nat
        from transformers.models.dinat import modeling_dinat

    built = {}
    for name, module, config in (
        ("dinat", modeling_dinat, DinatConfig(**SHAPE, kernel_size=5, dilations=[list(d) for d in DILATIONS])),
        (
            "dinat_scaled",
            modeling_dinat,
            DinatConfig(**SHAPE, kernel_size=5, dilations=DILATIONS, layer_scale_init_value=0.1),
        ),
        ("nat", modeling_nat, NatConfig(**SHAPE, kernel_size=7)),
    ):
        # The classes ask transformers whether natten is installed; its operations come from the adapter.
        module.requires_backends = lambda *_: None
        module.natten2dqkrpb, module.natten2dav = natten_adapter.natten2dqkrpb, natten_adapter.natten2dav
        torch.manual_seed(0)
        classes = {"nat": "NatForImageClassification"}
        model = getattr(module, classes.get(name, "DinatForImageClassification"))(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
        built[name] = model
    return built


def make(name: str, **overrides):
    options = {"nat": {"window_size": 7}}.get(name, {"window_size": 5, "dilations": DILATIONS})
    return models.NAT(
        embed_dim=EMBED_DIM,
        depths=DEPTHS,
        num_heads=HEADS,
        mlp_ratio=3.0,
        drop_path_rate=0.0,
        layer_scale=0.1 if "scaled" in name else None,
        num_classes=11,
        **(options | overrides),
        rngs=nnx.Rngs(0),
    )


def compare(theirs, ours, size: int) -> None:
    images = np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        expected = theirs(pixels, output_hidden_states=True)
        base = theirs.dinat if hasattr(theirs, "dinat") else theirs.nat
        encoded = base.encoder(
            base.embeddings(pixels), output_hidden_states=True, output_hidden_states_before_downsampling=True
        )
    assert float(expected.logits.std()) > 0.05
    logits, features = nnx.jit(lambda model, x: (model(x), model.features(x)))(ours, images)
    np.testing.assert_allclose(logits, expected.logits.numpy(), atol=1e-4, rtol=1e-4)
    levels = encoded.reshaped_hidden_states[1:]
    assert len(features) == len(levels) == len(DEPTHS)
    for feature, level in zip(features, levels, strict=True):
        np.testing.assert_allclose(feature, level.numpy().transpose(0, 2, 3, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["dinat", "dinat_scaled", "nat"])
def test_logits_and_every_feature_level(theirs, name):
    ours = checkpoints.from_state_dict(nnx.eval_shape(lambda: make(name)), theirs[name].state_dict())
    compare(theirs[name], ours, 112 if name == "nat" else 80)


def test_small_images_are_padded_as_there(theirs):
    ours = checkpoints.from_state_dict(make("dinat", fit="pad", implementation="reference"), theirs["dinat"].state_dict())
    with pytest.warns(WindowFitWarning):
        compare(theirs["dinat"], ours, 48)


@pytest.mark.parametrize("name", ["dinat_scaled", "nat"])
def test_and_back(theirs, name):
    """Their weights, through ours, back into theirs: not one bit differs."""
    state = theirs[name].state_dict()
    ours = checkpoints.from_state_dict(make(name), state)
    back = checkpoints.to_state_dict(ours, "huggingface", prefix=name.split("_")[0] + ".")
    assert set(back) == set(state)
    theirs[name].load_state_dict({key: torch.from_numpy(value) for key, value in back.items()}, strict=True)
    for key, value in state.items():
        np.testing.assert_array_equal(back[key], value.numpy(), err_msg=key)


def test_files_that_pytorch_writes_and_reads(theirs, tmp_path):
    state = theirs["dinat"].state_dict()
    torch.save(state, tmp_path / "pytorch_model.bin")
    torch.save(
        {"model": {f"module.{key}": value.to(torch.bfloat16) for key, value in state.items()}, "epoch": 3},
        tmp_path / "x.pth",
    )
    for path, tolerance in ((tmp_path, 0), (tmp_path / "x.pth", 1e-2)):
        read = _tensor_files.read(path)
        assert set(read) == set(state)
        for key, value in state.items():
            np.testing.assert_allclose(read[key].astype(np.float32), value.numpy(), rtol=tolerance)
    ours = checkpoints.load_pretrained(lambda: make("dinat"), tmp_path)
    checkpoints.save(ours, tmp_path / "ours.bin", "huggingface", prefix="dinat.")
    theirs["dinat"].load_state_dict(torch.load(tmp_path / "ours.bin", weights_only=True), strict=True)
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed: pip install '.[parity]'")
    checkpoints.save(ours, tmp_path / "ours.safetensors", "original")
    assert set(safetensors.load_file(tmp_path / "ours.safetensors")) == set(checkpoints.to_state_dict(ours))
    safetensors.save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "model.safetensors")
    for key, value in _tensor_files.read(tmp_path / "model.safetensors").items():
        np.testing.assert_array_equal(value, state[key].numpy())


def test_what_a_training_script_saved_beside_the_weights_is_passed_over(theirs, tmp_path):
    """As in StyleNAT's files: both generators, optimizer, arguments. Nothing of a foreign class is called."""
    state = theirs["nat"].state_dict()

    class Trap:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "called",))

    arguments = {"args": argparse.Namespace(lr=0.1), "trap": Trap(), "g_optim": {"state": {0: {"step": 3}}}}
    for generators in ({"g": {}, "g_ema": state}, {"state_dicts": {"g": {}, "g_ema": state}}):
        torch.save(generators | arguments, tmp_path / "training.pt")
        read = _tensor_files.read(tmp_path / "training.pt")
        assert set(read) == set(state)
        np.testing.assert_array_equal(read["nat.layernorm.weight"], state["nat.layernorm.weight"].numpy())
    assert not (tmp_path / "called").exists()


def test_an_archive_with_anything_but_tensors_is_refused(theirs, tmp_path):
    torch.save(theirs["dinat"], tmp_path / "whole.pt")
    with pytest.raises(Exception, match=r"refers to .*Save the state dict alone"):
        _tensor_files.read(tmp_path / "whole.pt")
