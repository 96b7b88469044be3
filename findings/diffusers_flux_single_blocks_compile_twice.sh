#!/usr/bin/env bash
# diffusers' Flux with compile_repeated_blocks(): the blocks of one stream are compiled twice, not once.
#
# FluxTransformer2DModel has two kinds of repeated blocks, and "regional" compilation is meant to compile each kind once. A block
# of one stream gives back its picture as a slice of text and picture, so the first of these blocks sees a picture that is
# contiguous (it comes from a block of two streams), and all later ones a view with the strides of the whole sequence. torch
# takes that for another input and compiles the block again: three graphs in place of two, and for a user the largest part
# of the compiling twice. Where it bites: start-up times, and whoever counts graphs or sets error_on_recompile from the
# second call of the first step on. Way round: count on three; the result is right.
# Versions: torch 2.15.0, diffusers 0.42.1, numpy 2.4.6; Linux.
set -euo pipefail
place=$(mktemp -d); trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet torch==2.15.0 diffusers==0.42.1 numpy==2.4.6
cat > "$place/show.py" <<'PYTHON'
import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo.utils import counters

torch.manual_seed(0)
model = FluxTransformer2DModel(
    patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(4, 6, 6),
)
given = {
    "hidden_states": torch.randn(1, 15, 4), "encoder_hidden_states": torch.randn(1, 4, 12),
    "pooled_projections": torch.randn(1, 6), "timestep": torch.tensor([0.5]),
    "img_ids": torch.zeros(15, 3), "txt_ids": torch.zeros(4, 3), "return_dict": False,
}
strides = []
watch = [
    block.register_forward_pre_hook(lambda _, __, named: strides.append(named["hidden_states"].stride()), with_kwargs=True)
    for block in model.single_transformer_blocks
]
with torch.no_grad():
    model(**given)
    print("strides of the picture in the blocks of one stream:", strides)
    for hook in watch:
        hook.remove()
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    model(**given)
print("graphs:", counters["stats"]["unique_graphs"])
PYTHON
cd "$place"
export OMP_NUM_THREADS=1
said=$(venv/bin/python show.py 2>/dev/null); echo "$said"
[[ $said == *"[(480, 32, 1), (608, 32, 1), (608, 32, 1)]"* ]] || { echo "changed: the strides"; exit 1; }
[[ $said == *"graphs: 3" ]] || { echo "changed: not three graphs any more"; exit 1; }
