import pytorch_lightning as pl

from msdiffusion.training import callbacks


def test_every_name_is_a_callback():
    for name in callbacks.__all__:
        assert issubclass(getattr(callbacks, name), pl.Callback), name
