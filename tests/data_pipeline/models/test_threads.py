import os

import pytest
import torch

from data_pipeline.errors import InputError
from data_pipeline.models.threads import check_device, use_one_thread


def test_one_thread_for_a_torch_that_is_there_and_for_what_comes(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("MKL_NUM_THREADS", "7")
    try:
        torch.set_num_threads(2)
        use_one_thread()
        assert torch.get_num_threads() == 1
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "1"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("device", "devices"), [("cuda", 0), ("cuda:2", 2), ("cuda", None)])
def test_a_device_that_is_not_here(monkeypatch, device, devices):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices is not None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    with pytest.raises(InputError, match=f"--device {device}: {devices or 0} usable CUDA devices here"):
        check_device(device)


def test_devices_that_are_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("", "cpu", "cuda", "cuda:1"):
        check_device(device)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(InputError, match="--device mps is not usable here"):
        check_device("mps")
