"""A base model in one file, written here by hand in the layout of the original code; and files that lie elsewhere."""

import copyreg
import io
import json
import pickle
import re
import shutil
import struct
import threading
import types
from pathlib import Path

import pytest


def run_in_threads(*calls):
    """What each call gives, each in a thread of its own, all begun at once; errors are raised here."""
    results, barrier = [None] * len(calls), threading.Barrier(len(calls))

    def run(index):
        barrier.wait()
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.fixture(scope="session")
def in_threads():
    """Function, see run_in_threads."""
    return run_in_threads


def make_copier(original):
    """Function: () -> what copy.deepcopy makes of the original as it is now, in a fifth of the time: pickle, which is
    written in C, walks through the objects; tensors are cloned, and functions and classes are the same ones.
    """
    import torch

    from msdiffusion import MSDiffusion

    kept, numbers = [], {}
    shared = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type)

    def own(item):
        if not isinstance(item, torch.Tensor):
            return item
        copied = item.detach().clone()
        return torch.nn.Parameter(copied, item.requires_grad) if isinstance(item, torch.nn.Parameter) else copied

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, (torch.Tensor, *shared)):
                return None
            if id(item) not in numbers:
                numbers[id(item)] = len(kept)
                kept.append((own(item), item))  # the original too, so that nothing else gets its id
            return numbers[id(item)]

        def reducer_override(self, item):
            return (copyreg.__newobj__, (type(item),), vars(item)) if isinstance(item, MSDiffusion) else NotImplemented

    pickled = io.BytesIO()
    Pickler(pickled, protocol=5).dump(original)

    def make():
        made = {}

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, number):
                if number not in made:
                    made[number] = own(kept[number][0])
                return made[number]

        with torch._C.DisableTorchFunction():  # Lightning looks at every call while it makes a model
            return Unpickler(io.BytesIO(pickled.getvalue())).load()

    return make


@pytest.fixture(scope="session")
def copier():
    """Function, see make_copier."""
    return make_copier


@pytest.fixture(scope="session")
def new_model(tiny_model_dir):
    """Function: () -> the model of tiny_model_dir, for the caller alone: a copy, as loading takes far longer."""
    from msdiffusion import MSDiffusion

    return make_copier(MSDiffusion.from_pretrained(tiny_model_dir, device="cpu"))


@pytest.fixture(scope="session")
def networks_by_files():
    """What loaded_once has loaded: only copies of these leave it."""
    return {}


@pytest.fixture
def loaded_once(request, monkeypatch, networks_by_files):
    """For tests that load base models but are not about it: the networks of a folder are read once, then copied.

    A folder whose files have changed is read anew. Tests with ``shifted`` are about it: copies lie where torch puts all
    tensors, wherever the weights lay in their files.
    """
    if "shifted" in request.fixturenames:
        return
    from msdiffusion.backbone import pretrained

    read = pretrained.load_network

    def load_network(kind, place, what, **options):
        folder = Path(place)
        if not folder.is_dir():
            return read(kind, place, what, **options)
        files = [(path.name, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.iterdir())]
        key = (kind, str(folder.resolve()), repr(sorted(options.items())), *files)
        if key not in networks_by_files:
            networks_by_files[key] = make_copier(read(kind, place, what, **options))
        return networks_by_files[key]()

    monkeypatch.setattr(pretrained, "load_network", load_network)


RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("time_emb_proj", "emb_layers.1"),
    ("conv_shortcut", "skip_connection"),
)
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def shift_tensors(folder: Path, place: Path, offset: int) -> Path:
    """A copy of a folder, its safetensors files with spaces after their headers, so that all tensors begin so many
    bytes after a multiple of 64.
    """
    shutil.copytree(folder, place)
    for path in place.rglob("*.safetensors"):
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = content[8 : 8 + length] + b" " * ((offset - 8 - length) % 64)
        assert json.loads(header)
        path.write_bytes(struct.pack("<Q", len(header)) + header + content[8 + length :])
    return place


@pytest.fixture(scope="session")
def shifted():
    """Function: (folder, place of the copy, offset) -> the copy, see shift_tensors."""
    return shift_tensors


def unet_name(name, layers):
    """diffusers' name of a UNet's weight -> the original one, for blocks of ``layers`` residual layers."""
    stem, part = name.rsplit(".", 1)
    if stem in UNET_ENDS:
        return f"{UNET_ENDS[stem]}.{part}"
    where, rest = re.fullmatch(r"(down_blocks\.\d+|up_blocks\.\d+|mid_block)\.(.*)", name).groups()
    kind, index, rest = rest.split(".", 2)
    index = int(index)
    for new, old in RESNET if kind == "resnets" else ():
        rest = rest.replace(new, old)
    if where == "mid_block":
        return f"middle_block.{2 * index if kind == 'resnets' else 1}.{rest}"
    block = int(where.split(".")[1])
    if where.startswith("down"):
        if kind == "downsamplers":
            return f"input_blocks.{(layers + 1) * (block + 1)}.0.op.{part}"
        return f"input_blocks.{(layers + 1) * block + index + 1}.{int(kind == 'attentions')}.{rest}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers + 1) * block + layers}.UPSAMPLER{block}.{rest}"
    return f"output_blocks.{(layers + 1) * block + index}.{int(kind == 'attentions')}.{rest}"


def unet_weights(unet):
    layers = unet.config.layers_per_block
    names = {name: unet_name(name, layers) for name in unet.state_dict()}
    crossed = {block for block, kind in enumerate(unet.config.up_block_types) if kind.startswith("CrossAttn")}
    return {
        # an upsampler is the last module of its place: the third, or the second where there is no attention
        re.sub(r"UPSAMPLER(\d+)", lambda match: "2" if int(match[1]) in crossed else "1", names[name]): weight
        for name, weight in unet.state_dict().items()
    }


def vae_weights(vae):
    blocks = len(vae.config.block_out_channels)
    result = {}
    for name, weight in vae.state_dict().items():
        new = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        new = re.sub(r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2", new)
        new = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", new)
        new = re.sub(r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", new)
        new = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", new)
        new = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", new)
        if "mid_block.attentions" in new:
            new = new.replace("mid_block.attentions.0", "mid.attn_1").replace("group_norm", "norm")
            new = re.sub(r"to_([qkv])\.", r"\1.", new).replace("to_out.0", "proj_out")
            weight = weight[:, :, None, None] if weight.ndim == 2 else weight
        result[new] = weight
    return result


def text_weights(encoder):
    return {f"text_model.{name.removeprefix('text_model.')}": weight for name, weight in encoder.state_dict().items()}


def open_clip_text_weights(encoder):
    import torch

    weights = {name.removeprefix("text_model."): weight for name, weight in encoder.state_dict().items()}
    result = {
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
        "text_projection": weights["text_projection.weight"].T,
    }
    for layer in range(encoder.config.num_hidden_layers):
        here, there = f"encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for part in ("weight", "bias"):
            stacked = [weights[f"{here}self_attn.{letter}_proj.{part}"] for letter in "qkv"]
            result[f"{there}attn.in_proj_{part}"] = torch.cat(stacked)
            for new, old in (("self_attn.out_proj", "attn.out_proj"), ("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"),
                             ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj")):  # fmt: skip
                result[f"{there}{old}.{part}"] = weights[f"{here}{new}.{part}"]
    return result


def write_single_file(pipeline, path):
    """The weights of a StableDiffusionXLPipeline or StableDiffusionPipeline as one file of the original layout."""
    from safetensors.torch import save_file

    parts = {"model.diffusion_model.": unet_weights(pipeline.unet), "first_stage_model.": vae_weights(pipeline.vae)}
    if hasattr(pipeline, "text_encoder_2"):
        parts["conditioner.embedders.0.transformer."] = text_weights(pipeline.text_encoder)
        parts["conditioner.embedders.1.model."] = open_clip_text_weights(pipeline.text_encoder_2)
    else:
        parts["cond_stage_model.transformer."] = text_weights(pipeline.text_encoder)
    save_file(
        {prefix + name: weight.contiguous() for prefix, weights in parts.items() for name, weight in weights.items()},
        path,
    )
    return path


@pytest.fixture(scope="session")
def single_file(tiny_model_dir, tmp_path_factory) -> Path:
    """The base of tiny_model_dir as one file."""
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(str(tiny_model_dir / "base"), add_watermarker=False)
    return write_single_file(pipeline, tmp_path_factory.mktemp("single") / "fine_tune.safetensors")


@pytest.fixture(scope="session")
def sd1_single_file(tiny_sd1_model_dir, tmp_path_factory) -> Path:
    """The base of tiny_sd1_model_dir as one file."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(str(tiny_sd1_model_dir / "base"), requires_safety_checker=False)
    return write_single_file(pipeline, tmp_path_factory.mktemp("single_sd1") / "fine_tune.safetensors")
