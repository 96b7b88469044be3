"""A pairs dataset of the documented schema, written here by hand: training must not need mining to be tested."""

import functools
import hashlib
import http.server
import io
import json
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WORDS = ("dog", "cat", "teapot", "hat")


def encode(picture, format):
    buffer = io.BytesIO()
    picture.save(buffer, format, **({"quality": 95, "subsampling": 0} if format == "JPEG" else {}))
    return buffer.getvalue()


def make_record(key, boxes, size, **changes):
    record = {
        "schema": "msdiffusion.pairs/1",
        "key": key,
        "caption": " and ".join(f"a {WORDS[i]}" for i in range(len(boxes))) + " on the beach",
        "width": size[0],
        "height": size[1],
        "subjects": [{"phrase": WORDS[i], "target_box": list(box)} for i, box in enumerate(boxes)],
    }
    return record | changes


def write_shard(path, entries, size=(96, 64), seed=0, leave_out=(), **changes):
    """entries: (key, record) each; the target is noise with every subject's box filled in one colour.

    The pictures are those of the record, the json is the record with ``changes``.
    """
    generator = np.random.default_rng(seed)
    with tarfile.open(path, "w") as archive:
        for key, record in entries:
            pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            files = {}
            for i, subject in enumerate(record["subjects"]):
                x1, y1, x2, y2 = (np.array(subject["target_box"]) * [*size, *size]).round().astype(int)
                color = generator.integers(0, 256, 3, dtype=np.uint8)
                pixels[y1:y2, x1:x2] = color
                cut_out = np.full((20 + i, 30, 4), 255, dtype=np.uint8)
                cut_out[..., :3] = color
                files[f"reference_{i}.png"] = encode(Image.fromarray(cut_out), "PNG")
            files["target.jpg"] = encode(Image.fromarray(pixels), "JPEG")
            files["json"] = json.dumps(record | changes).encode()
            for suffix, content in files.items():
                if suffix not in leave_out:
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def write_pairs(directory, count, size=(96, 64), per_shard=10):
    """count pairs with 1, 2, 1, 2, ... subjects side by side."""
    directory.mkdir(parents=True, exist_ok=True)
    layouts = ([(0.25, 0.25, 0.75, 0.75)], [(0.05, 0.25, 0.45, 0.75), (0.55, 0.25, 0.95, 0.75)])
    keys = [f"clip_{i:06d}" for i in range(count)]
    entries = [(key, make_record(key, layouts[i % 2], size)) for i, key in enumerate(keys)]
    for number, start in enumerate(range(0, count, per_shard)):
        path = directory / f"pairs-{number:06d}.tar"
        write_shard(path, entries[start : start + per_shard], size, seed=number)
    return directory


@pytest.fixture(scope="session")
def pairs_dir(tmp_path_factory) -> Path:
    """24 pairs of 96 x 64 pixels in three shards."""
    return write_pairs(tmp_path_factory.mktemp("pairs"), 24)


@pytest.fixture(scope="session")
def few_pairs_dir(tmp_path_factory) -> Path:
    """4 pairs: one batch."""
    return write_pairs(tmp_path_factory.mktemp("few_pairs"), 4)


@pytest.fixture
def shard_writer():
    """(write_shard, make_record), for datasets with something wrong in them."""
    return write_shard, make_record


def finish(directory):
    """Write the build.json and the index.parquet that a finished mining run leaves beside its shards."""
    import pyarrow
    import pyarrow.parquet

    shards, rows = [], []
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as archive:
            records = [json.load(archive.extractfile(m)) for m in archive if m.name.endswith(".json")]
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        shards.append({"name": path.name, "samples": len(records), "bytes": len(content), "sha256": digest})
        names = ("key", "width", "height", "caption")
        rows += [{"shard": path.name} | {name: record[name] for name in names} for record in records]
    build = {"schema": "data_pipeline.build/1", "shards": shards, "counts": {"samples": len(rows)}}
    (directory / "build.json").write_text(json.dumps(build))
    # small row groups, so that more than one is read
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), directory / "index.parquet", row_group_size=7)
    return directory


@pytest.fixture
def finished_dir(tmp_path) -> Path:
    """24 pairs in three shards as mining leaves them, to be damaged at will."""
    return finish(write_pairs(tmp_path / "finished", 24))


@pytest.fixture
def finisher():
    """finish, for other datasets."""
    return finish


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on this machine, and misbehaves as it is told.

    requests: (method, file name) of each so far. failures: file name -> how many GETs of it to answer with 503.
    slow: seconds after every 4096 bytes of a body. unlisted: asking for the folder itself is answered with 404.
    headless: every HEAD is answered with 503.
    """

    daemon_threads = True

    def __init__(self, folder):
        server = self
        self.requests, self.failures, self.slow, self.unlisted, self.headless = [], {}, 0.0, False, False

        class Handler(http.server.SimpleHTTPRequestHandler):
            def send_head(self):
                name = self.path.rpartition("/")[2].partition("?")[0]
                server.requests.append((self.command, name))
                if server.failures.get(name, 0) > 0 and self.command == "GET":
                    server.failures[name] -= 1
                    self.send_error(503)
                    return None
                if server.headless and self.command == "HEAD":
                    self.send_error(503)
                    return None
                if server.unlisted and not name:
                    self.send_error(404)
                    return None
                return super().send_head()

            def copyfile(self, source, outputfile):
                while block := source.read(4096):
                    outputfile.write(block)
                    time.sleep(server.slow)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_):
        """A client that was killed is what a test wants."""

    def gets(self, name):
        return self.requests.count(("GET", name))


@pytest.fixture
def serve():
    """folder -> Server of it, running."""
    servers = []

    def start(folder):
        servers.append(Server(folder))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


RESAMPLER = {"width": 32, "depth": 1, "heads": 2, "head_width": 16}


@pytest.fixture
def make_module(tiny_model_dir):
    """Function: settings -> MSDiffusionModule on the miniature of SDXL, nothing loaded yet."""
    from msdiffusion.training.module import MSDiffusionModule

    def make(**settings):
        folders = {"base_model": str(tiny_model_dir / "base"), "image_encoder": str(tiny_model_dir / "image_encoder")}
        if "adapter" not in settings:
            folders["resampler"] = RESAMPLER
        return MSDiffusionModule(**folders | settings)

    return make


@pytest.fixture
def configured(make_module, pairs_dir):
    """Function: settings -> (module with its networks, a batch of pairs with one and two subjects); no run.

    ``data`` are settings of the data module, ``rows`` which pairs make the batch.
    """
    import pytorch_lightning as pl
    import torch

    from msdiffusion.training.datamodule import PairsDataModule

    def make(data=None, rows=(0, 1), **settings):
        torch.manual_seed(0)
        module = make_module(**settings)
        defaults = {"pairs": str(pairs_dir), "resolution": 32, "batch_size": 4, "max_subjects": 2}
        datamodule = PairsDataModule(**defaults | {"validation_fraction": 0} | (data or {}))
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        datamodule.trainer = trainer
        trainer.strategy.connect(module)
        datamodule.setup("fit")
        module.configure_model()
        return module, datamodule.collate([datamodule.training[row] for row in rows])

    return make
