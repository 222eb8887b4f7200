"""FAISS, behind one door: the only package that imports it.

`factory` decides what may be built, `model` trains it, `encoder` fills shards, `files` writes and
reads them, `segment` searches them, `rearrange` makes one shard of several. Nothing outside sees a FAISS object.
"""

from .encoder import ShardEncoder
from .factory import Capability, capability_table, footprint, split_factory, table_bytes, validate_factory
from .files import load_model, load_shard, save_model, save_shard
from .kmeans import (
    Grid,
    KMeansPlan,
    PartialSums,
    means_of,
    moved_centroids,
    nearest,
    objective_of,
    partial_sums,
    row_exponents,
    settled,
)
from .mask import Mask
from .model import (
    ERROR_ROWS,
    CodesPlan,
    Model,
    RangesPlan,
    assemble_model,
    check_trainable,
    codes_plan,
    given_centroids,
    has_transforms,
    limit_threads,
    lists_plan,
    prepare,
    ranges_plan,
    spread_numbers,
    train_model,
    train_sub_quantizers,
    train_transforms,
    transform_sample,
    transformed,
)
from .rearrange import rearrange
from .segment import CodeStage, Probed, Segment, empty_segment, flat_segment, merge_shards

__all__ = [
    "ERROR_ROWS",
    "Capability",
    "CodeStage",
    "CodesPlan",
    "Grid",
    "KMeansPlan",
    "Mask",
    "Model",
    "PartialSums",
    "Probed",
    "RangesPlan",
    "Segment",
    "ShardEncoder",
    "assemble_model",
    "capability_table",
    "check_trainable",
    "codes_plan",
    "empty_segment",
    "flat_segment",
    "footprint",
    "given_centroids",
    "has_transforms",
    "limit_threads",
    "lists_plan",
    "load_model",
    "load_shard",
    "means_of",
    "merge_shards",
    "moved_centroids",
    "nearest",
    "objective_of",
    "partial_sums",
    "prepare",
    "ranges_plan",
    "rearrange",
    "row_exponents",
    "save_model",
    "save_shard",
    "settled",
    "split_factory",
    "spread_numbers",
    "table_bytes",
    "train_model",
    "train_sub_quantizers",
    "train_transforms",
    "transform_sample",
    "transformed",
    "validate_factory",
]
