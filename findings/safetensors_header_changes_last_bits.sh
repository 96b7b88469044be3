#!/usr/bin/env bash
# Where two libraries meet: the length of a safetensors header decides last bits of what a layer computes.
#
# safetensors.torch.load_file maps the file and hands out tensors where they lie in it. The format asks for no more than
# that the header is a multiple of 8 bytes long, so the same weight saved with one more word of metadata begins at another
# distance from a multiple of 16. MKL, inside torch's CPU wheels for x86, then takes another path for products of few rows
# on AMD processors, and sums in another order. MKL_CBWR=AVX2 or a clone() of the weight removes the difference.
# Versions: torch 2.15.0, safetensors 0.8.0, numpy 2.4.6. Seen on an AMD EPYC (family 23): differences of 2e-6 and 4e-6.
# On processors of other makers only the first half is checked.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.15.0 safetensors==0.8.0 numpy==2.4.6
unset MKL_CBWR
cat > "$place/show.py" <<'PYTHON'
import os, platform, sys
import torch
from safetensors.torch import load_file, save_file

torch.manual_seed(0)
torch.set_num_threads(1)
weight, x = torch.randn(64, 64), torch.randn(1, 64)
starts, answers, copies = [], [], []
for word in ("", "x" * 8):
    path = os.path.join(sys.argv[1], f"{len(word)}.safetensors")
    save_file({"weight": weight}, path, metadata={"note": word})
    loaded = load_file(path)["weight"]
    assert torch.equal(loaded, weight)
    starts.append(loaded.data_ptr() % 16)
    answers.append(torch.nn.functional.linear(x, loaded))
    copies.append(torch.nn.functional.linear(x, loaded.clone()))
amd = os.path.exists("/proc/cpuinfo") and "AuthenticAMD" in open("/proc/cpuinfo").read()
gap = (answers[0] - answers[1]).abs().max().item()
print(f"{platform.machine()} AMD={amd}: bytes after a multiple of 16: {starts}; difference {gap:.1e}, of copies",
      (copies[0] - copies[1]).abs().max().item())
assert sorted(starts) == [0, 8], "tensors no longer lie where the header puts them"
assert torch.equal(*copies)
assert not amd or gap > 0 or os.environ.get("MKL_CBWR"), "MKL's path no longer depends on the address"
assert not os.environ.get("MKL_CBWR") or gap == 0, "MKL_CBWR no longer helps"
PYTHON
"$place/venv/bin/python" "$place/show.py" "$place"
MKL_CBWR=AVX2 "$place/venv/bin/python" "$place/show.py" "$place"
