"""What the module refuses at construction, before anything is loaded, and what it says then."""

import pytest

from msdiffusion.errors import RequestError
from msdiffusion.training.learning import optimizers
from msdiffusion.training.learning.settings import validation_timesteps
from msdiffusion.training.module import MSDiffusionModule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"learning_rate": float("inf")}, "learning_rate must be above 0"),
        ({"box_loss_weight": 0.0}, "box_loss_weight must be above 0"),
        ({"timestep_exponent": -1.0}, "timestep_exponent must be above 0"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be above 0"),
        ({"weight_decay": -0.1}, "weight_decay must not be below 0"),
        ({"weight_decay": float("nan")}, "weight_decay must not be below 0"),
        ({"warmup_steps": -1}, "warmup_steps must not be below 0"),
        ({"noise_offset": -0.1}, "noise_offset must not be below 0"),
        ({"layout_loss_weight": -1.0}, "layout_loss_weight must not be below 0"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0"),
        ({"drop_text": 2.0}, "drop_text must be in"),
        ({"decay": "steps"}, "decay must be one of"),
        ({"loss_weighting": "snr"}, "loss_weighting must be one of"),
        ({"timestep_sampling": "mode"}, "timestep_sampling must be one of"),
        ({"size_condition": "none"}, "size_condition must be one of"),
        ({"base_dtype": "int8"}, "base_dtype must be one of"),
        ({"attention": "flash"}, "attention must be one of"),
        (
            {"timestep_sampling": "logit_normal", "timestep_exponent": 0.5},
            "timestep_exponent=0.5 tilts timestep_sampling='uniform': leave it at 1 with 'logit_normal'",
        ),
        ({"compile": True, "layout_loss_weight": 0.1}, "compile does not allow"),
        ({"validation_timesteps": []}, r"validation_timesteps must be different whole numbers .* got \[\]"),
        ({"validation_timesteps": [100, 100]}, "validation_timesteps must be different"),
        ({"validation_timesteps": [-1]}, "validation_timesteps must be"),
        ({"validation_timesteps": [0.5]}, "validation_timesteps must be"),
        ({"validation_timesteps": [True]}, "validation_timesteps must be"),
        ({"optimizer": "sgd"}, "optimizer must be 'adamw' or 'adamw_8bit', got 'sgd'"),
        ({"resampler": {"size": 1}}, r"resampler has unknown sizes \['size'\]; known: \['box_frequencies', 'depth'"),
        ({"resampler": {"depth": 0}}, "resampler parameter depth must be a whole number of at least 1, got 0"),
        ({"reference_background": [256, 0, 0]}, "reference_background must be three whole numbers in 0-255"),
        ({"reference_fit": "crop"}, 'reference_fit must be "squash" or "pad"'),
        ({"projector": "linear"}, 'projector must be "resampler" or "global"'),
        ({"regions": "none"}, 'regions must be "boxes" or "everywhere"'),
        ({"defaults": {"step": 3}}, r"unknown defaults \['step'\]"),
        ({"defaults": {"steps": 0}}, "defaults in an adapter's config: "),
    ],
)
def test_bad_settings_are_told_at_construction(settings, message):
    with pytest.raises(RequestError, match=message):
        MSDiffusionModule(**{"base_model": "base", "image_encoder": "encoder"} | settings)


def test_the_eight_bit_optimizer_is_refused_where_its_library_is_missing(monkeypatch):
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match="needs the library bitsandbytes, which is not installed: pip install"):
        MSDiffusionModule("base", "encoder", optimizer="adamw_8bit")
    with pytest.raises(RequestError, match="fused is a setting of optimizer='adamw'"):
        MSDiffusionModule("base", "encoder", optimizer="adamw_8bit", fused=True)


def test_validation_timesteps():
    assert validation_timesteps(None, 1000) == [100, 300, 500, 700, 900]
    assert validation_timesteps(None, 50) == [5, 15, 25, 35, 45]
    assert validation_timesteps([0, 999], 1000) == [0, 999]
    with pytest.raises(RequestError, match=r"validation_timesteps=\[10, 1000\] go beyond .* last timestep is 999"):
        validation_timesteps([10, 1000], 1000)
