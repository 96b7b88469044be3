#!/usr/bin/env bash
# Where three libraries meet: importing diffusers takes the GPU away from every process that is forked afterwards.
#
# diffusers.utils.torch_utils asks torch.accelerator.is_available() when it is imported, and keeps the answer as its
# torch_device. The question goes to CUDA's runtime, and torch then marks all later forks as "bad": their CUDA cannot be used.
# A server that loads diffusers before it forks its workers (gunicorn --preload, a job queue with prefork) has workers
# without a GPU, although nobody touched it. Lightning looks at the same mark: in such a fork ddp_fork ends with
# "Cannot re-initialize CUDA in forked subprocess", on machines without any CUDA, too; without the import it trains.
# Way round: fork first, or have is_available answered by somebody else while diffusers is imported, or spawn.
# Versions: torch 2.15.0, diffusers 0.42.1, pytorch-lightning 2.6.6, numpy 2.4.6; Linux.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1 pytorch-lightning==2.6.6 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import os
import sys

import pytorch_lightning as pl
import torch


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, number):
        return self.layer(batch[0]).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def train():
    data = torch.utils.data.TensorDataset(torch.ones(4, 1))
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp_fork", devices=2, max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        default_root_dir=sys.argv[2],
    )
    trainer.fit(Model(), torch.utils.data.DataLoader(data))


if sys.argv[1] == "with":
    import diffusers.utils.torch_utils
child = os.fork()
if child == 0:
    print("bad fork:", torch.cuda._is_in_bad_fork(), flush=True)
    try:
        train()
        print("trained", flush=True)
    except RuntimeError as error:
        print(str(error).splitlines()[0], flush=True)
    os._exit(0)
os.waitpid(child, 0)
PYTHON
cd "$place"
export OMP_NUM_THREADS=1
without=$(venv/bin/python show.py without "$place" 2>/dev/null); with=$(venv/bin/python show.py with "$place" 2>/dev/null)
printf 'without diffusers: %s\nwith diffusers: %s\n' "$without" "$with"
[[ $without == *"bad fork: False"* && $without == *trained* ]] || { echo "changed: it does not train without diffusers"; exit 1; }
[[ $with == *"bad fork: True"* && $with == *"Cannot re-initialize CUDA in forked subprocess"* ]] \
  || { echo "changed: diffusers' import spoils no forks any more"; exit 1; }
