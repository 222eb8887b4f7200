"""FAISS, behind one door: the only package that imports it.

`factory` decides what may be built, `model` trains it, `encoder` fills shards, `files` writes and
reads them, `segment` searches them, `rearrange` makes one shard of several. Nothing outside sees a FAISS object.
"""

from .encoder import ShardEncoder
from .factory import Capability, capability_table, footprint, split_factory, table_bytes, validate_factory
from .files import load_model, load_shard, save_model, save_shard
from .mask import Mask
from .model import Model, check_trainable, limit_threads, prepare, train_model
from .rearrange import rearrange
from .segment import CodeStage, Probed, Segment, empty_segment, flat_segment, merge_shards

__all__ = [
    "Capability",
    "CodeStage",
    "Mask",
    "Model",
    "Probed",
    "Segment",
    "ShardEncoder",
    "capability_table",
    "check_trainable",
    "empty_segment",
    "flat_segment",
    "footprint",
    "limit_threads",
    "load_model",
    "load_shard",
    "merge_shards",
    "prepare",
    "rearrange",
    "save_model",
    "save_shard",
    "split_factory",
    "table_bytes",
    "train_model",
    "validate_factory",
]
